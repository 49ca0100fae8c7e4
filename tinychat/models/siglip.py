"""The SigLIP vision transformer (arXiv 2303.15343): CLIP's layers without class token and first norm."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tinychat.config import VisionConfig
from tinychat.errors import UsageError
from tinychat.layers.parallel import Source, replicated
from tinychat.models.clip import CLIPEncoder, check_pixels, layer_norm


class SiglipVisionEmbeddings(nn.Module):
    """pixels `[N, 3, H, W]` -> `[N, patches, D]`: the patches row by row, with positions."""

    def __init__(self, prefix: str, config: VisionConfig, weights: Source = None) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(config.grid**2, config.hidden_size)
        for name in ("patch_embedding", "position_embedding"):
            replicated(getattr(self, name), f"{prefix}.{name}", weights)

    def forward(self, pixel_values: Tensor) -> Tensor:
        check_pixels(pixel_values, self.config)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class SiglipVisionTransformer(nn.Module):
    """pixels `[N, 3, H, W]` -> last_hidden_state `[N, patches, D]` after the last norm; no pooling head."""

    def __init__(self, prefix: str, config: VisionConfig | PretrainedConfig, weights: Source = None) -> None:
        super().__init__()
        self.config = config = VisionConfig.of(config)
        self.embeddings = SiglipVisionEmbeddings(f"{prefix}.embeddings", config, weights)
        self.encoder = CLIPEncoder(f"{prefix}.encoder", config, weights)
        self.post_layernorm = layer_norm(f"{prefix}.post_layernorm", config, weights)

    def hidden_state(self, pixel_values: Tensor, select_layer: int = -1) -> Tensor:
        """hidden_states[select_layer] `[N, patches, D]`, before the last norm; layers beyond it are not run."""
        return self.encoder(self.embeddings(pixel_values), self.encoder.depth(select_layer))

    def forward(self, pixel_values: Tensor | None = None) -> BaseModelOutputWithPooling:
        """Raises UsageError without pixels."""
        if pixel_values is None:
            raise UsageError("pixel_values is None", "give pixels [N, 3, H, W]")
        return BaseModelOutputWithPooling(last_hidden_state=self.post_layernorm(self.hidden_state(pixel_values)))
