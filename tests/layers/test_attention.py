"""Attention against a definition written out in loops: windows, caches, ragged starts, grouped heads."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from same import assert_close
from torch import Tensor

from tinychat.layers.attention import CausalSelfAttention, Span, attend, attend_with_weights, causal_mask
from tinychat.layers.kv_cache import KVCache, KVPool


class Shape(NamedTuple):
    num_hidden_layers: int = 1
    hidden_size: int = 24
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 6
    qkv_bias: bool = True
    out_bias: bool = True


SHAPE = Shape()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written_out(layer: CausalSelfAttention, x: Tensor, window: int | None) -> Tensor:
    """One row `[T, D]`, no rotation: every head of every token looks at itself and at what its window holds."""
    heads, groups = SHAPE.num_attention_heads, SHAPE.num_attention_heads // SHAPE.num_key_value_heads
    q, k, v = (proj(x).unflatten(-1, (-1, SHAPE.head_dim)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    out = torch.zeros(len(x), heads, SHAPE.head_dim)
    for t in range(len(x)):
        first = 0 if window is None else max(0, t - window + 1)
        for h in range(heads):
            scores = torch.stack([q[t, h] @ k[s, h // groups] for s in range(first, t + 1)]) / SHAPE.head_dim**0.5
            out[t, h] = scores.softmax(0) @ v[first : t + 1, h // groups]
    return layer.o_proj(out.flatten(1))


def run(layer: CausalSelfAttention, x: Tensor, starts: list[int], cache: KVCache | None, weights: bool = False):
    still = torch.zeros(1, 1, 1, SHAPE.head_dim)
    still = still.expand(-1, -1, x.shape[1], -1)
    return layer(x, Span(still + 1, still, starts, cache), weights)


def make(window: int | None) -> CausalSelfAttention:
    torch.manual_seed(0)
    return CausalSelfAttention(SHAPE, 0, window)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 50])
@torch.no_grad()
def test_one_shot_chunks_and_single_tokens(window: int | None) -> None:
    layer, x = make(window), noise(1, 11, 24)
    expected = written_out(layer, x[0], window)
    assert_close(run(layer, x, [0], None)[0][0], expected, 1e-5)
    assert_close(run(layer, x, [0], None, weights=True)[0][0], expected, 1e-5)
    for sizes in ([11], [4, 6, 1], [1] * 11):
        cache = KVPool(SHAPE, 1, 11, torch.float32).take(1)
        pieces = [run(layer, piece, [at], cache)[0] for piece, at in pieces_of(x, sizes)]
        assert_close(torch.cat(pieces, 1)[0], expected, 1e-5)


def pieces_of(x: Tensor, sizes: list[int]):
    return zip(x.split(sizes, 1), [sum(sizes[:i]) for i in range(len(sizes))], strict=True)


@pytest.mark.parametrize("window", [None, 3])
@torch.no_grad()
def test_rows_that_start_at_unequal_places(window: int | None) -> None:
    layer, lengths = make(window), (9, 4, 6)
    rows = [noise(length + 2, 24, seed=length) for length in lengths]
    cache = KVPool(SHAPE, 3, 16, torch.float32).take(3)
    for i, row in enumerate(rows):
        run(layer, row[None, :-2], [0], cache.select([i]))
    last = torch.stack([row[-2:] for row in rows])
    found = run(layer, last, list(lengths), cache)[0]
    for i, row in enumerate(rows):
        assert_close(found[i], written_out(layer, row, window)[-2:], 1e-5)


@torch.no_grad()
def test_weights_sum_to_one_and_give_the_output() -> None:
    layer, x = make(4), noise(2, 7, 24)
    out, weights = run(layer, x, [0, 0], None, weights=True)
    assert weights is not None and weights.shape == (2, 4, 7, 7)
    assert_close(weights.sum(-1), torch.ones(2, 4, 7), 1e-5)
    allowed = causal_mask([0], 7, 7, 4, torch.device("cpu"))
    assert not weights.masked_select(~allowed.expand_as(weights)).any()
    assert_close(out, run(layer, x, [0, 0], None)[0], 1e-5)
    assert run(layer, x, [0, 0], None)[1] is None


def test_both_forms_of_attention_agree() -> None:
    q, k, v = noise(2, 4, 3, 6), noise(2, 2, 5, 6, seed=1), noise(2, 2, 5, 6, seed=2)
    for mask in (None, causal_mask([2], 3, 5, None, torch.device("cpu"))):
        assert_close(attend(q, k, v, mask), attend_with_weights(q, k, v, mask)[0], 1e-5)


def test_masks_number_by_number() -> None:
    mask = causal_mask([1, 3], 2, 5, 2, torch.device("cpu"))
    assert mask.int().tolist() == [[[[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]], [[[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]]]
    assert causal_mask([0, 0], 2, 2, None, torch.device("cpu")).int().tolist() == [[[[1, 0], [1, 1]]]]
