"""The CLIP vision transformer (arXiv 2103.00020), its weights split over a tensor-parallel group where there is one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tinychat.config import VisionConfig
from tinychat.errors import ModelError, UsageError
from tinychat.layers.attention import attend
from tinychat.layers.parallel import Source, column_linear, fill, replicated, row_linear


class CLIPVisionEmbeddings(nn.Module):
    """pixels `[N, 3, H, W]` -> `[N, 1 + patches, D]`: the class token, then the patches row by row, with positions."""

    def __init__(self, prefix: str, config: VisionConfig | PretrainedConfig, weights: Source = None) -> None:
        super().__init__()
        self.config = config = VisionConfig.of(config)
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(config.grid**2 + 1, config.hidden_size)
        fill(self.class_embedding, weights, f"{prefix}.class_embedding")
        for name in ("patch_embedding", "position_embedding"):
            replicated(getattr(self, name), f"{prefix}.{name}", weights)

    def forward(self, pixel_values: Tensor) -> Tensor:
        check_pixels(pixel_values, self.config)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight


class CLIPAttention(nn.Module):
    """[N, S, D] -> [N, S, D]: every position looks at every other."""

    def __init__(self, prefix: str, config: VisionConfig, weights: Source = None) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        if size % self.num_heads:
            raise ModelError(f"a width of {size} does not divide by {self.num_heads} heads", "check the vision config")
        self.q_proj = column_linear(f"{prefix}.q_proj", size, size, weights)
        self.k_proj = column_linear(f"{prefix}.k_proj", size, size, weights)
        self.v_proj = column_linear(f"{prefix}.v_proj", size, size, weights)
        self.out_proj = row_linear(f"{prefix}.out_proj", size, size, weights)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend(q, k, v, None).transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """[..., D] -> [..., D]."""

    def __init__(self, prefix: str, config: VisionConfig, weights: Source = None) -> None:
        super().__init__()
        self.fc1 = column_linear(f"{prefix}.fc1", config.hidden_size, config.intermediate_size, weights)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = row_linear(f"{prefix}.fc2", config.intermediate_size, config.hidden_size, weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """[N, S, D] -> [N, S, D]: attention and MLP, each behind a norm and a residual sum."""

    def __init__(self, prefix: str, config: VisionConfig, weights: Source = None) -> None:
        super().__init__()
        self.layer_norm1 = layer_norm(f"{prefix}.layer_norm1", config, weights)
        self.self_attn = CLIPAttention(f"{prefix}.self_attn", config, weights)
        self.layer_norm2 = layer_norm(f"{prefix}.layer_norm2", config, weights)
        self.mlp = CLIPMLP(f"{prefix}.mlp", config, weights)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The layers; `depth` of them are run."""

    def __init__(self, prefix: str, config: VisionConfig, weights: Source = None) -> None:
        super().__init__()
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(CLIPEncoderLayer(f"{prefix}.layers.{i}", config, weights) for i in layers)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        for layer in self.layers[:depth]:
            x = layer(x)
        return x

    def depth(self, select_layer: int) -> int:
        """Layers to run for hidden_states[select_layer], where hidden_states[0] are the embeddings."""
        count = len(self.layers)
        if not -count - 1 <= select_layer <= count:
            raise ModelError(f"select_layer is {select_layer}, the tower has {count} layers", "check the config")
        return select_layer if select_layer >= 0 else count + 1 + select_layer


class CLIPVisionTransformer(nn.Module):
    """pixels `[N, 3, H, W]` -> last_hidden_state `[N, 1 + patches, D]`, CLS first, and pooler_output `[N, D]`."""

    def __init__(self, prefix: str, config: VisionConfig | PretrainedConfig, weights: Source = None) -> None:
        super().__init__()
        self.config = config = VisionConfig.of(config)
        self.embeddings = CLIPVisionEmbeddings(f"{prefix}.embeddings", config, weights)
        self.pre_layrnorm = layer_norm(f"{prefix}.pre_layrnorm", config, weights)  # the checkpoints' own spelling
        self.encoder = CLIPEncoder(f"{prefix}.encoder", config, weights)
        self.post_layernorm = layer_norm(f"{prefix}.post_layernorm", config, weights)

    def hidden_state(self, pixel_values: Tensor, select_layer: int = -1) -> Tensor:
        """hidden_states[select_layer] `[N, 1 + patches, D]`; layers beyond it are not run."""
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        return self.encoder(x, self.encoder.depth(select_layer))

    def forward(self, pixel_values: Tensor | None = None) -> BaseModelOutputWithPooling:
        """Raises UsageError without pixels."""
        if pixel_values is None:
            raise UsageError("pixel_values is None", "give pixels [N, 3, H, W]")
        hidden = self.hidden_state(pixel_values)
        pooled = self.post_layernorm(hidden[:, 0])
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


def layer_norm(prefix: str, config: VisionConfig, weights: Source) -> nn.Module:
    """A LayerNorm over the tower's width."""
    return replicated(nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps), prefix, weights)


def check_pixels(pixels: Tensor, config: VisionConfig) -> None:
    """Raise ModelError where pictures do not have the tower's size."""
    wanted = (config.num_channels, config.image_size, config.image_size)
    if tuple(pixels.shape[1:]) != wanted:
        raise ModelError(
            f"pixels have shape {list(pixels.shape)}, the tower takes [N, {', '.join(map(str, wanted))}]",
            "use the checkpoint's own image processor",
        )
