"""SigLIP (arXiv 2303.15343): CLIP's layers without class token and first norm, texts that look both ways.

Constructors are those of tinychat.models.clip.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tinychat.config import VisionConfig
from tinychat.errors import UsageError
from tinychat.layers.parallel import Source, dotted, fill, replicated
from tinychat.models.clip import ContrastiveOutput, check_pairs, check_pixels
from tinychat.models.clip_encoder import (
    CLIPMLP,
    CLIPEncoder,
    CLIPTextEmbeddings,
    check_ids,
    last_of,
    layer_norm,
    padding_mask,
)
from tinychat.models.dual_config import DualConfig, TextEncoderConfig


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


class SiglipPoolingHead(nn.Module):
    """[N, S, D] -> [N, D]: a learned query looks at every position; an MLP behind it."""

    def __init__(self, prefix: str, config: VisionConfig, weights: Source = None) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.layernorm = layer_norm(f"{prefix}.layernorm", config, weights)
        self.mlp = CLIPMLP(f"{prefix}.mlp", config, weights)
        fill(self.probe, weights, f"{prefix}.probe")
        replicated(self.attention, f"{prefix}.attention", weights)
        replicated(self.attention.out_proj, f"{prefix}.attention.out_proj", weights)

    def forward(self, hidden: Tensor) -> Tensor:
        probe = self.probe.expand(len(hidden), -1, -1)
        seen = self.attention(probe, hidden, hidden, need_weights=False)[0][:, 0]
        return seen + self.mlp(self.layernorm(seen))


class SiglipVisionTransformer(nn.Module):
    """pixels `[N, 3, H, W]` -> last_hidden_state `[N, patches, D]` after the last norm, and what the head makes of it.

    Without `with_head` a transformers config's vision_use_head says whether there is one; with ours there is none.
    """

    def __init__(
        self,
        prefix: str,
        config: VisionConfig | PretrainedConfig,
        weights: Source = None,
        with_head: bool | None = None,
    ) -> None:
        super().__init__()
        if with_head is None:
            with_head = isinstance(config, PretrainedConfig) and bool(config.vision_use_head)  # type: ignore[attr-defined]
        self.config = config = VisionConfig.of(config)
        self.embeddings = SiglipVisionEmbeddings(dotted(prefix, "embeddings"), config, weights)
        self.encoder = CLIPEncoder(dotted(prefix, "encoder"), config, weights)
        self.post_layernorm = layer_norm(dotted(prefix, "post_layernorm"), config, weights)
        self.head = SiglipPoolingHead(dotted(prefix, "head"), config, weights) if with_head else None

    def hidden_state(self, pixel_values: Tensor, select_layer: int = -1) -> Tensor:
        """hidden_states[select_layer] `[N, patches, D]`, before the last norm; layers beyond it are not run."""
        return self.encoder(self.embeddings(pixel_values), self.encoder.depth(select_layer))

    def forward(
        self, pixel_values: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """With all hidden states where they are wanted. Raises UsageError without pixels."""
        if pixel_values is None:
            raise UsageError("pixel_values is None", "give pixels [N, 3, H, W]")
        hidden, kept = last_of(self.encoder.states(self.embeddings(pixel_values)), output_hidden_states)
        hidden = self.post_layernorm(hidden)
        pooled = None if self.head is None else self.head(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled, hidden_states=kept)


class SiglipVisionModel(nn.Module):
    """The vision tower under its name in a checkpoint, `vision_model`."""

    def __init__(
        self,
        prefix: str,
        config: VisionConfig | PretrainedConfig,
        weights: Source = None,
        with_head: bool | None = None,
    ) -> None:
        super().__init__()
        self.vision_model = SiglipVisionTransformer(dotted(prefix, "vision_model"), config, weights, with_head)

    def forward(
        self, pixel_values: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """As SiglipVisionTransformer."""
        return self.vision_model(pixel_values, output_hidden_states)


class SiglipTextTransformer(nn.Module):
    """ids `[N, T]` -> last_hidden_state `[N, T, D]` after the last norm; pooler_output `[N, P]`: the last token's head.

    The last token may be padding: texts are padded to the length that the checkpoint was trained with.
    """

    def __init__(self, prefix: str, config: TextEncoderConfig | PretrainedConfig, weights: Source = None) -> None:
        super().__init__()
        self.config = config = TextEncoderConfig.of(config)
        self.embeddings = CLIPTextEmbeddings(dotted(prefix, "embeddings"), config, weights)
        self.encoder = CLIPEncoder(dotted(prefix, "encoder"), config, weights)
        self.final_layer_norm = layer_norm(dotted(prefix, "final_layer_norm"), config, weights)
        self.head = nn.Linear(config.hidden_size, config.projection_size)
        replicated(self.head, dotted(prefix, "head"), weights)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """`attention_mask [N, T]`: 0 = padding. Raises UsageError for ids or a mask that do not fit."""
        ids = check_ids(input_ids, attention_mask, self.config)
        states = self.encoder.states(self.embeddings(ids), padding_mask(attention_mask, causal=False))
        hidden, kept = last_of(states, output_hidden_states)
        hidden = self.final_layer_norm(hidden)
        pooled = self.head(hidden[:, -1])
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled, hidden_states=kept)


class SiglipTextModel(nn.Module):
    """The text encoder under its name in a checkpoint, `text_model`."""

    def __init__(self, prefix: str, config: TextEncoderConfig | PretrainedConfig, weights: Source = None) -> None:
        super().__init__()
        self.text_model = SiglipTextTransformer(dotted(prefix, "text_model"), config, weights)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """As SiglipTextTransformer."""
        return self.text_model(input_ids, attention_mask, output_hidden_states)


class SiglipModel(nn.Module):
    """Pictures and texts in one space, and how well each picture fits each text."""

    def __init__(self, prefix: str, config: DualConfig | PretrainedConfig, weights: Source = None) -> None:
        super().__init__()
        self.config = config = DualConfig.of(config)
        self.text_model = SiglipTextTransformer(dotted(prefix, "text_model"), config.text, weights)
        self.vision_model = SiglipVisionTransformer(dotted(prefix, "vision_model"), config.vision, weights, True)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1))
        for name in ("logit_scale", "logit_bias"):
            fill(getattr(self, name), weights, dotted(prefix, name))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Texts `[N, T]` in the common space `[N, P]`, of any length."""
        return self.text_model(input_ids, attention_mask).pooler_output

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pictures `[N, 3, H, W]` in the common space `[N, P]`, of any length."""
        return self.vision_model(pixel_values).pooler_output

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool = False,
        output_hidden_states: bool = False,
    ) -> ContrastiveOutput:
        """logits_per_image `[pictures, texts]`; the loss takes text i to belong to picture i and to no other."""
        vision = self.vision_model(pixel_values, output_hidden_states)
        text = self.text_model(input_ids, attention_mask, output_hidden_states)
        images, texts = (normalize(output.pooler_output, dim=-1) for output in (vision, text))
        logits = texts @ images.T * self.logit_scale.exp() + self.logit_bias
        return ContrastiveOutput(
            loss=sigmoid_loss(logits) if return_loss else None,
            logits_per_image=logits.T,
            logits_per_text=logits,
            text_embeds=texts,
            image_embeds=images,
            text_model_output=text,
            vision_model_output=vision,
        )


def sigmoid_loss(logits: Tensor) -> Tensor:
    """Each pair of a text and a picture is a yes or a no; summed over pictures, mean over texts."""
    check_pairs(logits)
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -logsigmoid(signs * logits).sum(-1).mean()
