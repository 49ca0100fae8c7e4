"""CLIP (arXiv 2103.00020): the vision tower that the chat uses, the text encoder, and both in one space.

Constructors take a prefix, a config (ours or transformers') and the weights that they fill themselves from, which may
be split over the ranks of a tensor-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from tinychat.config import VisionConfig
from tinychat.errors import ModelError, UsageError
from tinychat.layers.parallel import Source, dotted, fill, replicated
from tinychat.models.clip_encoder import (
    CLIPMLP,
    CLIPAttention,
    CLIPEncoder,
    CLIPEncoderLayer,
    CLIPTextEmbeddings,
    check_ids,
    last_of,
    layer_norm,
    padding_mask,
)
from tinychat.models.dual_config import LEGACY_EOS, DualConfig, TextEncoderConfig

__all__ = [
    "CLIPMLP",
    "CLIPAttention",
    "CLIPEncoder",
    "CLIPEncoderLayer",
    "CLIPModel",
    "CLIPTextEmbeddings",
    "CLIPTextModel",
    "CLIPTextTransformer",
    "CLIPVisionEmbeddings",
    "CLIPVisionModel",
    "CLIPVisionTransformer",
]


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


class CLIPVisionTransformer(nn.Module):
    """pixels `[N, 3, H, W]` -> last_hidden_state `[N, 1 + patches, D]`, CLS first, and pooler_output `[N, D]`."""

    def __init__(self, prefix: str, config: VisionConfig | PretrainedConfig, weights: Source = None) -> None:
        super().__init__()
        self.config = config = VisionConfig.of(config)
        self.embeddings = CLIPVisionEmbeddings(dotted(prefix, "embeddings"), config, weights)
        self.pre_layrnorm = layer_norm(dotted(prefix, "pre_layrnorm"), config, weights)  # the checkpoints' own spelling
        self.encoder = CLIPEncoder(dotted(prefix, "encoder"), config, weights)
        self.post_layernorm = layer_norm(dotted(prefix, "post_layernorm"), config, weights)

    def hidden_state(self, pixel_values: Tensor, select_layer: int = -1) -> Tensor:
        """hidden_states[select_layer] `[N, 1 + patches, D]`; layers beyond it are not run."""
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        return self.encoder(x, self.encoder.depth(select_layer))

    def forward(
        self, pixel_values: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """With all hidden states where they are wanted. Raises UsageError without pixels."""
        if pixel_values is None:
            raise UsageError("pixel_values is None", "give pixels [N, 3, H, W]")
        states = self.encoder.states(self.pre_layrnorm(self.embeddings(pixel_values)))
        hidden, kept = last_of(states, output_hidden_states)
        pooled = self.post_layernorm(hidden[:, 0])
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled, hidden_states=kept)


class CLIPVisionModel(nn.Module):
    """The vision tower under its name in a checkpoint, `vision_model`."""

    def __init__(self, prefix: str, config: VisionConfig | PretrainedConfig, weights: Source = None) -> None:
        super().__init__()
        self.vision_model = CLIPVisionTransformer(dotted(prefix, "vision_model"), config, weights)

    def forward(
        self, pixel_values: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """As CLIPVisionTransformer."""
        return self.vision_model(pixel_values, output_hidden_states)


class CLIPTextTransformer(nn.Module):
    """ids `[N, T]` -> last_hidden_state `[N, T, D]` after the last norm, and pooler_output `[N, D]` at the text's end.

    A token looks at what is before it and is no padding.
    """

    def __init__(self, prefix: str, config: TextEncoderConfig | PretrainedConfig, weights: Source = None) -> None:
        super().__init__()
        self.config = config = TextEncoderConfig.of(config)
        self.embeddings = CLIPTextEmbeddings(dotted(prefix, "embeddings"), config, weights)
        self.encoder = CLIPEncoder(dotted(prefix, "encoder"), config, weights)
        self.final_layer_norm = layer_norm(dotted(prefix, "final_layer_norm"), config, weights)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """`attention_mask [N, T]`: 0 = padding. Raises UsageError for ids or a mask that do not fit."""
        ids = check_ids(input_ids, attention_mask, self.config)
        ends = text_ends(ids, self.config.eos_token_id)
        mask = padding_mask(attention_mask, causal=True)
        states = self.encoder.states(self.embeddings(ids), mask, causal=mask is None)
        hidden, kept = last_of(states, output_hidden_states)
        hidden = self.final_layer_norm(hidden)
        pooled = hidden[torch.arange(len(ids), device=ids.device), ends]
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled, hidden_states=kept)


class CLIPTextModel(nn.Module):
    """The text encoder under its name in a checkpoint, `text_model`."""

    def __init__(self, prefix: str, config: TextEncoderConfig | PretrainedConfig, weights: Source = None) -> None:
        super().__init__()
        self.text_model = CLIPTextTransformer(dotted(prefix, "text_model"), config, weights)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """As CLIPTextTransformer."""
        return self.text_model(input_ids, attention_mask, output_hidden_states)


@dataclass
class ContrastiveOutput(ModelOutput):
    """What transformers' CLIPOutput and SiglipOutput hold; embeddings `[N, P]` have length 1."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None


class CLIPModel(nn.Module):
    """Pictures and texts in one space, and how well each picture fits each text."""

    def __init__(self, prefix: str, config: DualConfig | PretrainedConfig, weights: Source = None) -> None:
        super().__init__()
        self.config = config = DualConfig.of(config)
        self.text_model = CLIPTextTransformer(dotted(prefix, "text_model"), config.text, weights)
        self.vision_model = CLIPVisionTransformer(dotted(prefix, "vision_model"), config.vision, weights)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        for name in ("visual_projection", "text_projection"):
            replicated(getattr(self, name), dotted(prefix, name), weights)
        fill(self.logit_scale, weights, dotted(prefix, "logit_scale"))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Texts `[N, T]` in the common space `[N, P]`, of any length."""
        return self.text_projection(self.text_model(input_ids, attention_mask).pooler_output)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pictures `[N, 3, H, W]` in the common space `[N, P]`, of any length."""
        return self.visual_projection(self.vision_model(pixel_values).pooler_output)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool = False,
        output_hidden_states: bool = False,
    ) -> ContrastiveOutput:
        """logits_per_image `[pictures, texts]`; the loss takes text i to belong to picture i."""
        vision = self.vision_model(pixel_values, output_hidden_states)
        text = self.text_model(input_ids, attention_mask, output_hidden_states)
        vision.pooler_output = self.visual_projection(vision.pooler_output)
        text.pooler_output = self.text_projection(text.pooler_output)
        images, texts = (normalize(output.pooler_output, dim=-1) for output in (vision, text))
        logits = texts @ images.T * self.logit_scale.exp()
        return ContrastiveOutput(
            loss=contrastive_loss(logits) if return_loss else None,
            logits_per_image=logits.T,
            logits_per_text=logits,
            text_embeds=texts,
            image_embeds=images,
            text_model_output=text,
            vision_model_output=vision,
        )


def contrastive_loss(logits: Tensor) -> Tensor:
    """Mean cross entropy of picking each row's column and each column's row. Raises UsageError unless square."""
    check_pairs(logits)
    pairs = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2


def check_pairs(logits: Tensor) -> None:
    """Raise UsageError where there is no picture for each text `[texts, pictures]`."""
    texts, pictures = logits.shape
    if texts != pictures:
        message = f"{texts} texts and {pictures} pictures are no pairs, so there is no loss"
        raise UsageError(message, "give as many texts as pictures, or leave out return_loss")


def text_ends(ids: Tensor, eos_token_id: int) -> Tensor:
    """Where each text `[N, T]` ends `[N]`: at the first eos, or, in legacy configs, at the highest id."""
    if eos_token_id == LEGACY_EOS:
        return ids.argmax(-1)
    ends = ids == eos_token_id
    if not bool((found := ends.any(-1)).all()):
        message = f"text {found.long().argmin()} has no token {eos_token_id}, which ends a text"
        raise UsageError(message, "use the checkpoint's own tokenizer, and keep the last token of a text that is cut")
    return ends.long().argmax(-1)


def check_pixels(pixels: Tensor, config: VisionConfig) -> None:
    """Raise ModelError where pictures do not have the tower's size."""
    wanted = (config.num_channels, config.image_size, config.image_size)
    if tuple(pixels.shape[1:]) != wanted:
        raise ModelError(
            f"pixels have shape {list(pixels.shape)}, the tower takes [N, {', '.join(map(str, wanted))}]",
            "use the checkpoint's own image processor",
        )
