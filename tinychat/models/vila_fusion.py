"""Fusion of text and pictures as pure functions: embeddings in, embeddings out, no model and no config.

IMAGE_TOKEN_INDEX (-200) stands for a picture in the ids that `prepare_inputs_labels_for_multimodal` takes; everywhere
else a picture is a slot, a half-open range of positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinychat.errors import ModelError, UsageError

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence after fusion: embeds `[T, D]` and labels `[T]`, without padding."""

    embeds: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded rows: embeds `[B, T, D]`, labels `[B, T]`, mask bool `[B, T]`, position_ids `[B, T]` (0 at padding)."""

    embeds: Tensor
    labels: Tensor
    mask: Tensor
    position_ids: Tensor


def fill_slots(embeds: Tensor, slots: Sequence[tuple[int, int]], features: Sequence[Tensor]) -> Tensor:
    """embeds `[T, D]`, one `[n, D]` a slot -> `[T, D]` with the slots' rows replaced. Raises ModelError."""
    if len(slots) != len(features):
        raise ModelError(f"the prompt has {len(slots)} image slots, {len(features)} pictures came", "give one a slot")
    out = embeds.clone()
    for (start, end), rows in zip(slots, features, strict=True):
        if len(rows) != end - start:
            raise ModelError(f"an image slot has {end - start} tokens, the tower gave {len(rows)}", "check the config")
        out[start:end] = rows.to(out.dtype)
    return out


def split_blocks(counts: Sequence[int], features: Tensor | list[Tensor], placeholders: int) -> list[Tensor]:
    """features `[N, n, D]`, or N of `[n, D]`, that came as groups of these counts -> a block `[m, D]` a placeholder.

    Either every picture has its placeholder, or every group has one and its pictures (frames) are joined.
    """
    if placeholders == len(features):
        return list(features)
    if placeholders == len(counts) and isinstance(features, Tensor):
        return [group.flatten(0, 1) for group in features.split(list(counts))]
    raise UsageError(
        f"the ids hold {placeholders} image placeholders, {len(features)} images came",
        f"put {IMAGE_TOKEN_INDEX} into input_ids once an image",
    )


def fuse_row(ids: Tensor, labels: Tensor, text: Tensor, blocks: Iterator[Tensor]) -> Row:
    """ids and labels `[T]`, text embeddings `[T, D]` (any row at placeholders): the placeholders become blocks."""
    embeds: list[Tensor] = []
    targets: list[Tensor] = []
    start = 0
    for at in torch.where(ids == IMAGE_TOKEN_INDEX)[0].tolist():
        block = next(blocks).to(text.dtype)
        embeds += [text[start:at], block]
        targets += [labels[start:at], labels.new_full((len(block),), IGNORE_INDEX)]
        start = at + 1
    return Row(torch.cat([*embeds, text[start:]]), torch.cat([*targets, labels[start:]]))


def pad_rows(rows: Sequence[Row], max_length: int | None, side: str) -> Batch:
    """Rows of any length, cut to max_length -> one batch, padded with zeros on `side` ("left" or "right")."""
    if side not in ("left", "right"):
        raise UsageError(f"the padding side is {side!r}", "set tokenizer_padding_side to left or right")
    rows = [Row(row.embeds[:max_length], row.labels[:max_length]) for row in rows]
    length = max(len(row.labels) for row in rows)
    first = rows[0]
    embeds = first.embeds.new_zeros((len(rows), length, first.embeds.shape[1]))
    labels = first.labels.new_full((len(rows), length), IGNORE_INDEX)
    mask = torch.zeros((len(rows), length), dtype=torch.bool, device=embeds.device)
    positions = torch.zeros((len(rows), length), dtype=torch.long, device=embeds.device)
    for i, row in enumerate(rows):
        n = len(row.labels)
        place = slice(length - n, length) if side == "left" else slice(0, n)
        embeds[i, place], labels[i, place], mask[i, place] = row.embeds, row.labels, True
        positions[i, place] = torch.arange(n, device=embeds.device)
    return Batch(embeds, labels, mask, positions)


def justify(mask: Tensor) -> Tensor:
    """mask bool `[B, T]` -> indices `[B, T]` that bring each row's unmasked tokens to its front, in order."""
    return torch.argsort(~mask, dim=1, stable=True)


def gather(x: Tensor, order: Tensor, dim: int = 1) -> Tensor:
    """x `[B, ..., T, ...]` with T at `dim`, reordered row by row."""
    shape = [x.shape[0]] + [1] * (x.dim() - 1)
    shape[dim] = order.shape[1]
    return x.gather(dim, order.reshape(shape).expand([*x.shape[:dim], order.shape[1], *x.shape[dim + 1 :]]))


def unjustify(x: Tensor, order: Tensor, mask: Tensor, dim: int = 1) -> Tensor:
    """Undo `gather(x, order)`; what stands at masked places becomes 0."""
    back = gather(x, torch.argsort(order, dim=1), dim)
    shape = [x.shape[0]] + [1] * (x.dim() - 1)
    shape[dim] = mask.shape[1]
    return back * mask.reshape(shape).to(back.dtype)
