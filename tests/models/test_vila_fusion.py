"""Fusion as pure functions: slots, blocks, rows, padding, and bringing padded rows to the front and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tinychat.errors import ModelError, UsageError
from tinychat.models.vila_fusion import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    Row,
    fill_slots,
    fuse_row,
    gather,
    justify,
    pad_rows,
    split_blocks,
    unjustify,
)


def block(count: int, value: float) -> Tensor:
    return torch.full((count, 2), value)


def row(length: int, value: float = 1.0) -> Row:
    return Row(block(length, value), torch.arange(length))


def test_slots_are_replaced_and_the_rest_is_kept() -> None:
    embeds = torch.zeros(6, 2)
    out = fill_slots(embeds, [(1, 3), (5, 6)], [block(2, 7.0), block(1, 8.0).double()])
    assert out[:, 0].tolist() == [0, 7, 7, 0, 0, 8] and not embeds.any()


def test_slots_that_do_not_agree_with_the_pictures() -> None:
    with pytest.raises(ModelError, match="the prompt has 1 image slots, 2 pictures came"):
        fill_slots(torch.zeros(4, 2), [(0, 1)], [block(1, 1.0)] * 2)
    with pytest.raises(ModelError, match="an image slot has 2 tokens, the tower gave 3"):
        fill_slots(torch.zeros(4, 2), [(0, 2)], [block(3, 1.0)])


def test_pictures_or_groups_of_them_have_placeholders() -> None:
    features = torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    assert [len(b) for b in split_blocks([1, 2], features, 3)] == [2, 2, 2]
    frames = split_blocks([1, 2], features, 2)
    assert [b[:, 0].tolist() for b in frames] == [[0, 0], [1, 1, 2, 2]]
    with pytest.raises(UsageError, match="the ids hold 5 image placeholders, 3 images came; put -200 into input_ids"):
        split_blocks([1, 2], features, 5)


@given(st.lists(st.sampled_from([3, 4, IMAGE_TOKEN_INDEX]), min_size=1, max_size=9), st.integers(0, 3))
def test_a_row_of_any_shape(ids: list[int], size: int) -> None:
    """Written out token by token."""
    text = torch.arange(len(ids) * 2.0).reshape(-1, 2)
    blocks = [block(size, -1.0 - i) for i in range(ids.count(IMAGE_TOKEN_INDEX))]
    labels = torch.arange(len(ids)) + 50
    embeds: list[list[float]] = []
    targets: list[int] = []
    waiting = iter(blocks)
    for i, token in enumerate(ids):
        rows = next(waiting).tolist() if token == IMAGE_TOKEN_INDEX else [text[i].tolist()]
        embeds += rows
        targets += [IGNORE_INDEX] * len(rows) if token == IMAGE_TOKEN_INDEX else [50 + i]
    fused = fuse_row(torch.tensor(ids), labels, text, iter(blocks))
    assert fused.embeds.tolist() == embeds and fused.labels.tolist() == targets


@pytest.mark.parametrize(("side", "mask"), [("right", [1, 1, 0]), ("left", [0, 1, 1])])
def test_rows_are_padded_on_either_side(side: str, mask: list[int]) -> None:
    batch = pad_rows([row(3), row(2)], None, side)
    assert batch.mask.int().tolist() == [[1, 1, 1], mask]
    assert batch.embeds[1, :, 0].tolist() == mask
    real = batch.mask[1]
    assert batch.labels[1][real].tolist() == [0, 1] and batch.labels[1][~real].tolist() == [IGNORE_INDEX]
    assert batch.position_ids[1][real].tolist() == [0, 1] and batch.position_ids[1][~real].tolist() == [0]


def test_rows_are_cut_before_they_are_padded() -> None:
    batch = pad_rows([row(5), row(2)], 3, "left")
    assert batch.labels.tolist() == [[0, 1, 2], [IGNORE_INDEX, 0, 1]]
    with pytest.raises(UsageError, match="the padding side is 'middle'; set tokenizer_padding_side to left or right"):
        pad_rows([row(1)], None, "middle")


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_justified_rows_come_back(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    x = torch.arange(1.0, mask.numel() * 2 + 1).reshape(*mask.shape, 2)
    order = justify(mask)
    for i, kept in enumerate(rows):
        assert torch.equal(gather(x, order)[i, : sum(kept)], x[i][mask[i]])
    assert torch.equal(unjustify(gather(x, order), order, mask), x * mask[..., None])
    wide = torch.arange(1.0, mask.numel() * 5 + 1).reshape(len(rows), 1, 5, 5)
    assert torch.equal(unjustify(gather(wide, order, 3), order, mask, 3), wide * mask[:, None, None])
