"""The layers that CLIP's and SigLIP's encoders share, split over a tensor-parallel group where there is one.

Each layer adds up twice over the ranks: after attention and after the MLP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import Tensor, nn
from transformers.activations import ACT2FN

from tinychat.errors import ModelError, UsageError
from tinychat.layers.attention import attend, causal_mask
from tinychat.layers.float_linear import activated, product, products
from tinychat.layers.parallel import (
    Source,
    column_linear,
    column_linears,
    group_of,
    replicated,
    row_linear,
    share,
    total,
)
from tinychat.models.dual_config import EncoderConfig, TextEncoderConfig


class CLIPAttention(nn.Module):
    """[N, S, D] -> [N, S, D]: every position looks at every other, or at those that the mask lets it see."""

    def __init__(self, prefix: str, config: EncoderConfig, weights: Source = None) -> None:
        super().__init__()
        size, heads = config.hidden_size, config.num_attention_heads
        if size % heads:
            raise ModelError(f"a width of {size} does not divide by {heads} heads", "check the vision config")
        self.group = group_of(weights)
        self.num_heads = share(heads, self.group, f"attention heads of {prefix}")
        names = ("q_proj", "k_proj", "v_proj")
        self.q_proj, self.k_proj, self.v_proj = column_linears(prefix, names, size, size, weights)
        self.out_proj = row_linear(f"{prefix}.out_proj", size, size, weights)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        found = products(x, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in found)
        seen = attend(q, k, v, mask, causal)
        return total(product(seen.transpose(1, 2).flatten(2), self.out_proj), self.group)


class CLIPMLP(nn.Module):
    """[..., D] -> [..., D]."""

    def __init__(self, prefix: str, config: EncoderConfig, weights: Source = None) -> None:
        super().__init__()
        self.group = group_of(weights)
        self.fc1 = column_linear(f"{prefix}.fc1", config.hidden_size, config.intermediate_size, weights)
        self.act, self._act_name = ACT2FN[config.hidden_act], config.hidden_act
        self.fc2 = row_linear(f"{prefix}.fc2", config.intermediate_size, config.hidden_size, weights)

    def forward(self, x: Tensor) -> Tensor:
        return total(product(activated(x, self.fc1, self.act, self._act_name), self.fc2), self.group)


class CLIPEncoderLayer(nn.Module):
    """[N, S, D] -> [N, S, D]: attention and MLP, each behind a norm and a residual sum."""

    def __init__(self, prefix: str, config: EncoderConfig, weights: Source = None) -> None:
        super().__init__()
        self.layer_norm1 = layer_norm(f"{prefix}.layer_norm1", config, weights)
        self.self_attn = CLIPAttention(f"{prefix}.self_attn", config, weights)
        self.layer_norm2 = layer_norm(f"{prefix}.layer_norm2", config, weights)
        self.mlp = CLIPMLP(f"{prefix}.mlp", config, weights)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask, causal)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The layers; `depth` of them are run."""

    def __init__(self, prefix: str, config: EncoderConfig, weights: Source = None) -> None:
        super().__init__()
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(CLIPEncoderLayer(f"{prefix}.layers.{i}", config, weights) for i in layers)

    def forward(self, x: Tensor, depth: int) -> Tensor:
        for layer in self.layers[:depth]:
            x = layer(x)
        return x

    def states(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Iterator[Tensor]:
        """hidden_states: what the first layer takes, then what each layer gives."""
        yield x
        for layer in self.layers:
            x = layer(x, mask, causal)
            yield x

    def depth(self, select_layer: int) -> int:
        """Layers to run for hidden_states[select_layer], where hidden_states[0] are the embeddings."""
        count = len(self.layers)
        if not -count - 1 <= select_layer <= count:
            raise ModelError(f"select_layer is {select_layer}, the tower has {count} layers", "check the config")
        return select_layer if select_layer >= 0 else count + 1 + select_layer


class CLIPTextEmbeddings(nn.Module):
    """ids `[N, T]` -> `[N, T, D]`, with positions from 0 on."""

    def __init__(self, prefix: str, config: TextEncoderConfig, weights: Source = None) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        for name in ("token_embedding", "position_embedding"):
            replicated(getattr(self, name), f"{prefix}.{name}", weights)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


def last_of(states: Iterator[Tensor], keep: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The last of the hidden states, and all of them where they are to be kept."""
    kept = tuple(states) if keep else deque(states, maxlen=1)
    return kept[-1], kept if isinstance(kept, tuple) else None


def layer_norm(prefix: str, config: EncoderConfig, weights: Source) -> nn.Module:
    """A LayerNorm over the encoder's width."""
    return replicated(nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps), prefix, weights)


def check_ids(input_ids: Tensor | None, attention_mask: Tensor | None, config: TextEncoderConfig) -> Tensor:
    """The ids `[N, T]`. Raises UsageError where there are none, or they or their mask do not fit the encoder."""
    if input_ids is None:
        raise UsageError("input_ids is None", "give token ids [N, T]")
    if input_ids.ndim != 2 or not input_ids.numel():
        raise UsageError(f"input_ids have shape {list(input_ids.shape)}", "give token ids [N, T], a text a row")
    if (count := input_ids.shape[1]) > (most := config.max_position_embeddings):
        raise UsageError(f"texts have {count} tokens, the encoder has {most} positions", f"cut them to {most} tokens")
    lowest, highest = (int(end) for end in input_ids.aminmax())
    if lowest < 0 or highest >= config.vocab_size:
        wrong = lowest if lowest < 0 else highest
        message = f"token id {wrong} is not one of the encoder's {config.vocab_size}"
        raise UsageError(message, "use the checkpoint's own tokenizer")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        shapes = f"{list(attention_mask.shape)}, input_ids have {list(input_ids.shape)}"
        raise UsageError(f"attention_mask has shape {shapes}", "give 1 for each token and 0 for padding")
    return input_ids


def padding_mask(attention_mask: Tensor | None, causal: bool) -> Tensor | None:
    """bool `[N, 1, T or 1, T]`, True = look, of a mask `[N, T]` with 0 = padding; None where nothing is padding."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    seen = attention_mask.bool()[:, None, None]
    if causal:
        count = attention_mask.shape[1]
        seen = seen & causal_mask([0], count, count, None, attention_mask.device)
    return seen | ~seen.any(-1, keepdim=True)  # padding before a text sees nothing: it may look anywhere
