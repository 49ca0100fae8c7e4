"""Sums and joins over ranks in one process, a thread a rank; tests/layers/test_local_ranks.py has processes."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinychat_kernels import cpu
from tinychat_kernels.cpu_ranks import Exchange, memory_size
from tinychat_kernels.errors import KernelError

available, reason = cpu.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)

PIECE = 1024  # bytes: small tensors already go in several turns
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
T = TypeVar("T")


def nobody() -> str | None:
    return None


def on_all(size: int, work: Callable[[Exchange, int], T], gone: Callable[[], str | None] = nobody) -> list[T]:
    """What each rank's thread makes of its place in new memory."""
    memory = mmap.mmap(-1, memory_size(size, PIECE))
    places = [Exchange(memory, rank, size, gone, PIECE) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, places, range(size)))


def summed(addends: Sequence[Tensor]) -> Tensor:
    """Added in float32, rank after rank, and rounded once."""
    return reduce(torch.add, (x.float() for x in addends)).to(addends[0].dtype)


calls = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.one_of(st.integers(0, 40), st.integers(0, 2000))), min_size=1, max_size=6
)


@given(size=st.integers(1, 4), wanted=calls, seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_sums_are_those_in_the_order_of_the_ranks(size: int, wanted: list[tuple[torch.dtype, int]], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    addends = [[torch.randn(n, generator=random).to(dtype) for _ in range(size)] for dtype, n in wanted]

    def work(place: Exchange, rank: int) -> list[Tensor]:
        own = [call[rank].clone() for call in addends]
        for x in own:
            place.sum(x)
        return own

    expected = [summed(call) for call in addends]
    for found in on_all(size, work):
        assert all(map(torch.equal, found, expected))


@given(
    rows=st.integers(0, 30), widths=st.lists(st.integers(0, 50), min_size=1, max_size=4), dtype=st.sampled_from(DTYPES)
)
@settings(max_examples=60)
def test_parts_of_any_width_stand_side_by_side(rows: int, widths: list[int], dtype: torch.dtype) -> None:
    parts = [torch.randn(2, rows, width).to(dtype) for width in widths]

    def work(place: Exchange, rank: int) -> Tensor:
        return place.gather(parts[rank], widths)

    for found in on_all(len(widths), work):
        assert torch.equal(found, torch.cat(parts, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, 1e-40, -0.0]).to(dtype)

    def work(place: Exchange, rank: int) -> Tensor:
        x = odd.clone()
        place.sum(x)
        return x

    for found in on_all(2, work):
        torch.testing.assert_close(found, summed([odd, odd]), rtol=0, atol=0, equal_nan=True)


def test_one_that_waits_looks_around_and_goes_on() -> None:
    memory = mmap.mmap(-1, memory_size(2, PIECE))
    late = Exchange(memory, 1, 2, nobody, PIECE)
    looks: list[int] = []

    def look() -> str | None:
        looks.append(1)
        if len(looks) == 2:
            late.sum(torch.ones(4))
        return None

    x = torch.ones(4)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(Exchange(memory, 0, 2, look, PIECE).sum, x)
        done.result(20)
    assert (x.tolist(), len(looks)) == ([2.0] * 4, 2)


def test_a_rank_that_is_gone_ends_the_call_and_all_after_it() -> None:
    memory = mmap.mmap(-1, memory_size(2, PIECE))
    place = Exchange(memory, 0, 2, lambda: "the connection to rank 1 is gone", PIECE)
    with pytest.raises(RuntimeError, match="^the connection to rank 1 is gone$"):
        place.sum(torch.ones(4))
    with pytest.raises(RuntimeError, match="was broken off before this one: they are out of step"):
        place.sum(torch.ones(4))


def test_one_that_went_after_it_brought_its_part_is_no_loss() -> None:
    memory = mmap.mmap(-1, memory_size(2, PIECE))
    other = Exchange(memory, 1, 2, nobody, PIECE)

    def brings_and_goes() -> str:
        other.sum(torch.full((4,), 2.0))
        return "the connection to rank 1 is gone"

    x = torch.ones(4)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(Exchange(memory, 0, 2, brings_and_goes, PIECE).sum, x).result(20)
    assert x.tolist() == [3.0] * 4


def test_tensors_of_two_sizes_are_out_of_step() -> None:
    def work(place: Exchange, rank: int) -> str:
        with pytest.raises(RuntimeError, match="another size|does not come") as caught:
            place.sum(torch.ones(4 + rank))
        return str(caught.value)

    assert any("brought a tensor of another size" in said for said in on_all(2, work, lambda: "one does not come"))


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.ones(4, dtype=torch.int64), "torch.int64 on cpu came"),
        (torch.ones(4, 4).T, "contiguous on cpu, one of float16, bfloat16, float32"),
        (torch.ones(4, requires_grad=True), "carries no gradient"),
    ],
)
def test_what_cannot_be_summed_is_refused(x: Tensor, said: str) -> None:
    place = Exchange(mmap.mmap(-1, memory_size(1, PIECE)), 0, 1, nobody, PIECE)
    with pytest.raises(KernelError, match=said):
        place.sum(x)


def test_places_and_widths_that_do_not_fit_are_refused() -> None:
    memory = mmap.mmap(-1, memory_size(1, PIECE))
    with pytest.raises(KernelError, match="bytes came for rank 0 of 2 with pieces of 1024"):
        Exchange(memory, 0, 2, nobody, PIECE)
    with pytest.raises(KernelError, match=r"x has shape \[2, 3\], the ranks' widths are \[4\]"):
        Exchange(memory, 0, 1, nobody, PIECE).gather(torch.ones(2, 3), [4])
