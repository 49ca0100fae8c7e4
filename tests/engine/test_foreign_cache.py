"""The cache of foreign models: rows in any order and company hold what they held."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinychat.engine.foreign_cache import ForeignCache, KVLayout
from tinychat.errors import CapacityError, UsageError

LAYERS, HEADS, KEY, VALUE = 3, 2, 4, 5
BLOOM = KVLayout(keys_head_dim_last=False, merged=True)


def part(layer: int, row: int, length: int, width: int) -> Tensor:
    """`[H, length, width]`, other numbers for every row and layer."""
    generator = torch.Generator().manual_seed(1000 * row + 10 * layer + width)
    return torch.randn(HEADS, 64, width, generator=generator)[:, :length]


def left(parts: Sequence[Tensor], longest: int) -> Tensor:
    return torch.stack([torch.nn.functional.pad(one, (0, 0, longest - one.shape[1], 0)) for one in parts])


def expected(rows: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """What a cache of these rows, (name, length), holds."""
    longest = max(length for _, length in rows)
    return [
        tuple(left([part(layer, row, length, width) for row, length in rows], longest) for width in (KEY, VALUE))  # type: ignore[misc]
        for layer in range(LAYERS)
    ]


def cache_of(*rows: tuple[int, int]) -> ForeignCache:
    return ForeignCache.of(expected(rows), [length for _, length in rows], capacity=64)


def forward(cache: ForeignCache, rows: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """What a model does: `count` tokens more of each row; the rows as they are then."""
    grown = [(row, length + count) for row, length in rows]
    with cache.lent(count) as past:
        for layer in range(LAYERS):
            new = [
                torch.stack([part(layer, row, length, width)[:, length - count :] for row, length in grown])
                for width in (KEY, VALUE)
            ]
            past.update(*new, layer)
    return grown


def check(cache: ForeignCache, rows: Sequence[tuple[int, int]]) -> None:
    assert len(cache) == len(rows) and cache.lengths == [length for _, length in rows]
    held = cache.layers()
    if not any(cache.lengths):
        assert held == []
        return
    for layer, wanted in zip(held, expected(rows), strict=True):
        assert all(torch.equal(one, two) for one, two in zip(layer, wanted, strict=True))


def test_a_forward_fills_an_empty_cache() -> None:
    cache = ForeignCache(2, 64)
    check(cache, [(0, 0), (1, 0)])
    rows = forward(cache, [(0, 0), (1, 0)], 3)
    check(cache, rows)
    check(cache, forward(cache, rows, 1))


def test_rows_are_selected_in_the_order_asked_for() -> None:
    cache = cache_of((0, 3), (1, 7), (2, 5))
    check(cache.select([2, 0]), [(2, 5), (0, 3)])
    check(cache.select([1]), [(1, 7)])
    check(cache, [(0, 3), (1, 7), (2, 5)])


def test_the_longest_row_takes_its_padding_with_it() -> None:
    kept = cache_of((0, 3), (1, 9)).select([0])
    assert kept.layers()[0][0].shape[2] == 3
    check(kept, forward(kept, [(0, 3)], 1))


def test_caches_are_joined_and_go_on_together() -> None:
    joined = ForeignCache.cat([cache_of((0, 3)), cache_of((1, 7), (2, 2)), cache_of((3, 5))])
    rows = [(0, 3), (1, 7), (2, 2), (3, 5)]
    check(joined, rows)
    check(joined, forward(joined, rows, 2))


def test_the_capacity_of_joined_caches_is_the_largest() -> None:
    joined = ForeignCache.cat([ForeignCache(1, 9), ForeignCache(2, 7)])
    assert joined.capacity == 9 and joined.lengths == [0, 0, 0]
    joined.check_room(9)
    with pytest.raises(CapacityError, match="10 tokens of context are needed, the cache holds 9"):
        joined.check_room(10)


def test_an_empty_row_joins_one_that_has_tokens() -> None:
    joined = ForeignCache.cat([cache_of((0, 3)), ForeignCache(1, 64)])
    check(joined, [(0, 3), (1, 0)])
    check(joined, forward(joined, [(0, 3), (1, 0)], 2))


def test_rows_are_cut_each_to_its_length() -> None:
    cache = cache_of((0, 3), (1, 7), (2, 5))
    cache.truncate([3, 4, 0])
    rows = [(0, 3), (1, 4), (2, 0)]
    check(cache, rows)
    check(cache, forward(cache, rows, 1))
    cache.truncate(1)
    check(cache, [(0, 1), (1, 1), (2, 1)])


def test_a_cache_cut_to_nothing_begins_anew() -> None:
    cache = cache_of((0, 3), (1, 7))
    cache.truncate(0)
    check(cache, forward(cache, [(0, 0), (1, 0)], 2))


@pytest.mark.parametrize("lengths", [[4, 7], [-1, 2]])
def test_a_row_cannot_be_cut_to_more_than_it_has(lengths: list[int]) -> None:
    cache = cache_of((0, 3), (1, 7))
    with pytest.raises(UsageError, match="a cache row of 3 tokens cannot be cut to"):
        cache.truncate(lengths)
    check(cache, [(0, 3), (1, 7)])


def test_one_length_a_row_is_asked_for() -> None:
    with pytest.raises(UsageError, match="3 start positions came for 2 rows"):
        cache_of((0, 3), (1, 7)).truncate([1, 2, 3])


def test_others_do_not_see_what_happens_to_a_cache() -> None:
    cache = cache_of((0, 3), (1, 7))
    copy, joined = cache.select([0, 1]), ForeignCache.cat([cache, cache_of((2, 4))])
    rows = forward(cache, [(0, 3), (1, 7)], 4)
    copy.truncate([2, 0])
    check(cache, rows)
    check(copy, [(0, 2), (1, 0)])
    check(joined, [(0, 3), (1, 7), (2, 4)])


def test_a_forward_that_fails_changes_nothing() -> None:
    cache = cache_of((0, 3), (1, 7))
    with pytest.raises(ZeroDivisionError), cache.lent(2) as past:
        past.update(torch.ones(2, HEADS, 2, KEY), torch.ones(2, HEADS, 2, VALUE), 0)  # the others do not come
        raise ZeroDivisionError
    check(cache, [(0, 3), (1, 7)])
    check(cache, forward(cache, [(0, 3), (1, 7)], 1))


def test_a_first_forward_that_fails_leaves_the_cache_empty() -> None:
    cache = ForeignCache(1, 64)
    with pytest.raises(ZeroDivisionError), cache.lent(2) as past:
        past.update(torch.ones(1, HEADS, 2, KEY), torch.ones(1, HEADS, 2, VALUE), 0)
        raise ZeroDivisionError
    check(cache, [(0, 0)])
    joined = ForeignCache.cat([cache, cache_of((1, 2))])
    check(joined, forward(joined, [(0, 0), (1, 2)], 1))


def test_layers_are_let_go_one_by_one() -> None:
    """Where nobody else holds what rows were taken from, one layer of it is alive beside the new cache."""
    cache = cache_of((0, 3), (1, 7), (2, 5))
    held = [weakref.ref(keys) for keys, _ in cache._blocks[0]]
    chosen = cache.select([2, 0])
    del cache
    gc.collect()
    alive = list[int]()
    for _ in chosen._gathered():
        alive.append(sum(one() is not None for one in held))
    assert alive == [2, 1, 0]


def test_a_compact_cache_keeps_no_other_row_in_memory() -> None:
    cache = cache_of((0, 3), (1, 7))
    kept = cache.select([0])
    kept.compact()
    held = weakref.ref(cache._blocks[0][0][0])
    del cache
    gc.collect()
    assert held() is None and kept._blocks[0][0][0].numel() == HEADS * 3 * KEY
    check(kept, [(0, 3)])
    empty = ForeignCache(1, 64)
    empty.compact()
    check(empty, [(0, 0)])


def test_memory_that_fails_between_layers_leaves_empty_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of((0, 3), (1, 7)).select([0])
    monkeypatch.setattr(ForeignCache, "_together", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError), cache.lent(1):
        pass
    monkeypatch.undo()
    check(cache, [(0, 0)])


# BLOOM's layout: keys [B * H, D, S], values [B * H, S, D].


def test_blooms_layout_is_a_transposed_one() -> None:
    cache = cache_of((0, 3), (1, 7))
    for (keys, values), (k, v) in zip(cache.layers(BLOOM), expected([(0, 3), (1, 7)]), strict=True):
        assert keys.shape == (2 * HEADS, KEY, 7) and values.shape == (2 * HEADS, 7, VALUE)
        assert torch.equal(keys.view(2, HEADS, KEY, 7).transpose(2, 3), k)
        assert torch.equal(values.view(2, HEADS, 7, VALUE), v)


@pytest.mark.parametrize("layout", [BLOOM, KVLayout(keys_head_dim_last=False), KVLayout(merged=True), KVLayout()])
@pytest.mark.parametrize("rows", [[(0, 4)], [(0, 3), (1, 7), (2, 1)]])
def test_layouts_go_round_through_filter_and_concatenate(layout: KVLayout, rows: list[tuple[int, int]]) -> None:
    lengths = [length for _, length in rows]
    layers = cache_of(*rows).layers(layout)
    back = ForeignCache.of(layers, lengths, 64, layout)
    check(back, rows)
    again = ForeignCache.cat([back.select([0]), ForeignCache.of(layers, lengths, 64, layout)])
    check(again, [rows[0], *rows])
    for layer, wanted in zip(back.layers(layout), layers, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(layer, wanted, strict=True))


def test_a_cache_of_no_width_stays_empty() -> None:
    """`[-0:]` would keep everything."""
    keys, values = torch.ones(1, HEADS, 0, KEY), torch.ones(1, HEADS, 0, VALUE)
    cache = ForeignCache.of([(keys, values)] * LAYERS, [0], 64)
    check(cache, [(0, 0)])
    wide = ForeignCache.of(expected([(0, 6)]), [0], 64)
    check(wide, [(0, 0)])


def test_lengths_beyond_the_tensors_are_refused() -> None:
    with pytest.raises(UsageError, match="8 tokens are said to lie in a cache of 7"):
        ForeignCache.of(expected([(0, 3), (1, 7)]), [3, 8], 64)


@settings(max_examples=60)
@given(st.data())
def test_any_order_of_steps_keeps_every_row(data: st.DataObject) -> None:
    caches = [(cache_of((0, 3), (1, 5)), [(0, 3), (1, 5)]), (cache_of((2, 1)), [(2, 1)])]
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(caches) - 1))
        cache, rows = caches[at]
        action = data.draw(st.sampled_from(["forward", "select", "truncate", "cat"]))
        if action == "forward":
            caches[at] = cache, forward(cache, rows, data.draw(st.integers(1, 3)))
        elif action == "select":
            kept = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
            caches.append((cache.select(kept), [rows[i] for i in kept]))
        elif action == "truncate":
            lengths = [data.draw(st.integers(0, length)) for _, length in rows]
            cache.truncate(lengths)
            caches[at] = cache, [(row, length) for (row, _), length in zip(rows, lengths, strict=True)]
        else:
            other, theirs = caches[data.draw(st.integers(0, len(caches) - 1))]
            caches.append((ForeignCache.cat([cache, other]), [*rows, *theirs]))
    for cache, rows in caches:
        check(cache, rows)
