"""The KV cache: rows keep what was written, verbs move rows and lengths together, nothing wraps."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tinychat.errors import CapacityError, UsageError
from tinychat.layers.kv_cache import KVCache, KVPool


class Shape(NamedTuple):
    num_hidden_layers: int = 2
    num_key_value_heads: int = 3
    head_dim: int = 4


def pool(slots: int = 4, capacity: int = 8, dtype: torch.dtype = torch.float32) -> KVPool:
    return KVPool(Shape(), slots, capacity, dtype)


def draw(rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, 3, count, 4), generator=torch.Generator().manual_seed(seed))


def fill(cache: KVCache, k: Tensor, start: int | Tensor = 0) -> None:
    """k into layer 0 and 1 (v is its negative there), and the lengths with it."""
    for layer in (0, 1):
        cache.write(layer, k + layer, -k, start)
    cache.advance(k.shape[2])


def test_what_is_written_is_seen() -> None:
    cache = pool().take(2)
    k = draw(2, 7)
    fill(cache, k[:, :, :5])
    fill(cache, k[:, :, 5:], 5)
    assert cache.lengths == [7, 7] and cache.capacity == 8 and len(cache) == 2
    for layer in (0, 1):
        keys, values = cache.view(layer, 7)
        assert torch.equal(keys, k + layer) and torch.equal(values, -k)


def test_write_moves_no_length_and_advance_does() -> None:
    cache = pool().take(2)
    cache.write(0, draw(2, 3), draw(2, 3), 0)
    assert cache.lengths == [0, 0]
    cache.advance([3, 1])
    assert cache.lengths == [3, 1]


def test_rows_are_written_each_from_its_own_place() -> None:
    cache = pool().take(3)
    k = draw(3, 2)
    cache.write(0, k, -k, torch.tensor([0, 4, 2]))
    keys, values = cache.view(0, 8)
    for row, at in enumerate((0, 4, 2)):
        assert torch.equal(keys[row, :, at : at + 2], k[row])
        assert torch.equal(values[row, :, at : at + 2], -k[row])
        assert not keys[row, :, :at].any() and not keys[row, :, at + 2 :].any()


def test_a_view_of_neighbours_is_no_copy() -> None:
    cache = pool().take(3)
    fill(cache, draw(3, 2))
    assert cache.view(0, 2)[0].data_ptr() == cache.layer(0).k.data_ptr()
    picked = cache.select([2, 0])
    assert torch.equal(picked.view(0, 2)[0], draw(3, 2)[[2, 0]])


def test_select_and_cat_move_rows_with_their_lengths_and_copy_nothing() -> None:
    store = pool()
    one, two = store.take(2), store.take(1)
    fill(one, draw(2, 3, seed=1))
    fill(two, draw(1, 5, seed=2))
    joined = KVCache.cat([two, one.select([1])])
    assert joined.rows == [2, 1] and joined.lengths == [5, 3]
    assert torch.equal(joined.view(1, 3)[0], torch.cat([draw(1, 5, seed=2)[:, :, :3], draw(2, 3, seed=1)[1:]]) + 1)
    assert joined.layer(0).k is one.layer(0).k
    joined.truncate([2, 0])
    assert two.lengths == [5] and one.lengths == [3, 3]


def test_truncate_forgets_the_end() -> None:
    cache = pool().take(2)
    fill(cache, draw(2, 6))
    cache.truncate(4)
    assert cache.lengths == [4, 4]
    cache.truncate([4, 1])
    assert cache.lengths == [4, 1]


def test_an_exported_row_is_a_copy_that_can_be_loaded_elsewhere() -> None:
    store = pool()
    cache, other = store.take(2), store.take(1)
    fill(cache, draw(2, 6))
    saved = cache.export(1, 2, 6)
    assert len(saved) == 2 and saved[0][0].shape == (3, 4, 4)
    fill(cache, draw(2, 6, seed=9) * 0, 0)
    fill(other, draw(1, 3, seed=5))
    other.load(0, 2, saved)
    assert other.lengths == [6]
    keys, values = other.view(1, 6)
    assert torch.equal(keys[0, :, 2:], draw(2, 6)[1, :, 2:] + 1)
    assert torch.equal(values[0, :, 2:], -draw(2, 6)[1, :, 2:])
    assert torch.equal(keys[0, :, :2], draw(1, 3, seed=5)[0, :, :2] + 1)


def near(found: Tensor, plain: Tensor) -> bool:
    """Whether each number is within half a step of 127 to its token's and head's largest."""
    return bool(((found - plain).abs() <= plain.abs().amax(-1, keepdim=True) / 253.9).all())


def test_a_pool_of_int8_keeps_a_scale_for_each_token_and_head() -> None:
    cache, k = pool(dtype=torch.int8).take(3), draw(3, 6)
    fill(cache, k[:, :, :2])
    fill(cache, k[:, :, 2:], torch.tensor([2, 2, 2]))
    layer = cache.layer(1)
    assert layer.k.dtype == layer.v.dtype == torch.int8
    assert layer.k_scale is not None and layer.v_scale is not None
    assert layer.k_scale.shape == layer.v_scale.shape == (4, 3, 8) and layer.k_scale.dtype == torch.float32
    assert torch.allclose(layer.v_scale[:3, :, :6], k.abs().amax(-1) / 127)
    assert layer.v[:3, :, :6].abs().amax(-1).eq(127).all()
    for view, index in ((cache, [0, 1, 2]), (cache.select([2, 0]), [2, 0])):
        keys, values = view.view(1, 6)
        assert keys.dtype == values.dtype == torch.float32
        assert near(keys, k[index] + 1) and near(values, -k[index])
        assert not torch.equal(values, -k[index])


def test_rows_of_int8_move_as_others_do() -> None:
    store = pool(dtype=torch.int8)
    cache, other = store.take(2), store.take(1)
    fill(cache, draw(2, 6))
    before = cache.view(0, 6)[0][1].clone()
    saved = cache.export(1, 2, 6)
    assert [part.shape for part in saved[0]] == [(3, 4, 4), (3, 4, 4), (3, 4), (3, 4)]
    fill(other, draw(1, 3, seed=5))
    other.load(0, 2, saved)
    joined = KVCache.cat([other, cache])
    assert joined.rows == [2, 0, 1] and joined.lengths == [6, 6, 6]
    assert torch.equal(joined.view(0, 6)[0][0][:, 2:], before[:, 2:])
    cache.truncate(3)
    assert near(cache.view(0, 3)[0], draw(2, 6)[:, :, :3])


@pytest.mark.parametrize("source", [torch.float32, torch.int8])
def test_what_one_kind_of_pool_exports_another_loads(source: torch.dtype) -> None:
    target = torch.int8 if source == torch.float32 else torch.float32
    cache, other, k = pool(dtype=source).take(1), pool(dtype=target).take(1), draw(1, 5)
    fill(cache, k)
    other.load(0, 0, cache.export(0, 0, 5))
    assert other.lengths == [5] and other.layer(0).k.dtype == target
    assert near(other.view(0, 5)[1], -k)


def test_zeros_and_what_is_no_number_in_int8() -> None:
    cache, k = pool(dtype=torch.int8).take(1), torch.zeros(1, 3, 2, 4)
    k[0, 1, 1, 2] = torch.nan
    fill(cache, k)
    values = cache.view(0, 2)[1]
    assert values[0, 1, 1].isnan().all()
    assert values.isnan().sum() == 4 and not values.nan_to_num().any()


def test_released_rows_can_be_taken_again() -> None:
    store = pool(slots=3)
    first, second = store.take(1), store.take(2)
    store.release(first)
    assert len(first) == 0 and first.lengths == []
    again = store.take(1)
    assert again.rows == [0] and again.lengths == [0]
    store.release(second)
    assert store.take(2).rows == [1, 2]


def test_nothing_that_is_stored_carries_a_gradient() -> None:
    cache = pool().take(1)
    fill(cache, draw(1, 2).requires_grad_())
    assert not cache.view(0, 2)[0].requires_grad


def test_a_pool_made_in_inference_mode_serves_outside_it() -> None:
    with torch.inference_mode():
        cache = pool().take(1)
    fill(cache, draw(1, 2))
    assert torch.equal(cache.view(0, 2)[0], draw(1, 2))


def test_what_does_not_fit_is_said_with_numbers() -> None:
    cache = pool(capacity=8).take(2)
    fill(cache, draw(2, 7))
    with pytest.raises(CapacityError, match="9 tokens of context are needed, the cache holds 8") as caught:
        cache.write(0, draw(2, 2), draw(2, 2), 7)
    assert "--context" in caught.value.remedy
    with pytest.raises(CapacityError, match="10 tokens"):
        cache.write(0, draw(2, 3), draw(2, 3), torch.tensor([2, 7]))
    with pytest.raises(CapacityError, match="9 tokens"):
        cache.load(0, 7, [(draw(1, 2)[0], draw(1, 2)[0])] * 2)
    assert torch.equal(cache.view(0, 7)[0], draw(2, 7)) and cache.lengths == [7, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_rows_of_several_pools_come_into_a_new_one(dtype) -> None:
    shape = pool().config
    caches = [KVPool(shape, 2, capacity, dtype).take(2) for capacity in (4, 9)]
    for cache, count in zip(caches, (3, 7), strict=True):
        fill(cache, draw(2, count))
    caches[0].truncate([3, 0])
    joined = KVCache.cat([caches[1], caches[0].select([1, 0])])
    assert joined.lengths == [7, 7, 0, 3] and joined.capacity == 9 and joined.pool is not caches[1].pool
    for row, (cache, i) in enumerate([(caches[1], 0), (caches[1], 1), (caches[0], 1), (caches[0], 0)]):
        length = joined.lengths[row]
        for ours, theirs in zip(joined.export(row, 0, length), cache.export(i, 0, length), strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert caches[0].lengths == [3, 0] and caches[1].lengths == [7, 7]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda c: c.truncate(4), "a cache row of 3 tokens cannot be cut to 4; give a length of 0 to 3"),
        (lambda c: c.truncate(-1), "a cache row of 3 tokens cannot be cut to -1"),
        (lambda c: c.write(0, draw(3, 1), draw(3, 1), 0), "keys of 3 rows came for a cache of 2"),
        (lambda c: c.write(0, draw(1, 1), draw(1, 1), 0), "keys of 1 rows came for a cache of 2"),
        (lambda c: c.write(0, draw(2, 1), draw(2, 1), torch.tensor([0])), "1 start positions came for 2 rows"),
        (lambda c: c.export(0, 1, 4), "tokens 1 to 4 of a cache row of 3 are wanted"),
        (lambda c: c.load(0, 4, [(draw(1, 1)[0], draw(1, 1)[0])] * 2), "a cache row of 3 tokens cannot go on at 4"),
    ],
)
def test_what_cannot_be_is_refused(act, words) -> None:
    cache = pool().take(2)
    fill(cache, draw(2, 3))
    with pytest.raises(UsageError, match=words):
        act(cache)


def test_more_rows_than_there_are() -> None:
    store = pool(slots=3)
    store.take(2)
    with pytest.raises(CapacityError, match="2 cache rows are needed, 1 are free; run fewer requests at once"):
        store.take(2)


def test_each_layer_lies_on_its_own_device() -> None:
    mixed = KVPool(Shape(3), 2, 8, torch.float32, ["cpu", "meta", "cpu"])
    cache = mixed.take(2)
    assert [cache.layer(i).k.device.type for i in range(3)] == ["cpu", "meta", "cpu"]
    k = draw(2, 3)
    for i, device in enumerate(mixed.devices):
        cache.write(i, k.to(device), k.to(device), 0)
    cache.advance(3)
    assert torch.equal(cache.view(2, 3)[0], k)
    assert cache.view(1, 3)[0].device.type == "meta"
    assert [part.device.type for part, _ in cache.export(0, 0, 3)] == ["cpu", "meta", "cpu"]
    other = KVPool(mixed.config, 1, 8, torch.float32, mixed.devices).take(1)
    other.load(0, 0, cache.export(1, 0, 3))
    joined = KVCache.cat([cache, other])
    assert joined.pool.devices == mixed.devices
    assert torch.equal(joined.view(0, 3)[0][2], k[1])


def test_as_many_devices_as_layers() -> None:
    with pytest.raises(UsageError, match="2 devices came for the caches of 3 layers; give one, or one a layer"):
        KVPool(Shape(3), 1, 8, torch.float32, ["cpu", "cpu"])
