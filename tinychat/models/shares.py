"""What one rank of a tensor-parallel group holds of a decoder: a smaller decoder, whose sums the others complete.

Heads are dealt equally. The width of the MLP and the vocabulary are cut as equally as whole units allow, so that groups
of 4-bit weights stay whole. Where there are fewer key and value heads than ranks, several ranks hold the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinychat.config import TextConfig, VisionConfig
from tinychat.errors import ModelError
from tinychat.layers.parallel import ALONE, Group


@dataclass(frozen=True, slots=True)
class Share:
    """`config` has the rank's own sizes. Ranges are of the whole model's heads, MLP channels and vocabulary.

    `vocabularies` are those of all ranks; `kv_heads[i]` is the whole model's name of this rank's i-th one.
    """

    group: Group
    config: TextConfig
    heads: range
    kv_heads: tuple[int, ...]
    inner: range
    vocabularies: tuple[range, ...]

    @classmethod
    def of(cls, config: TextConfig, group: Group = ALONE, unit: int = 1) -> Share:
        """The share of `group.rank()`; the MLP is cut in whole `unit`s. Raises ModelError where ranks do not fit."""
        rank, size = group.rank(), group.size()
        if wrong := misfit(config, size):
            *most, last = [n for n in range(1, config.num_attention_heads + 1) if misfit(config, n) is None]
            fitting = " or ".join(([", ".join(map(str, most))] if most else []) + [str(last)])
            raise ModelError(f"{size} ranks cannot share this model: {wrong}", f"take {fitting}")
        count = config.num_attention_heads // size
        heads = range(rank * count, (rank + 1) * count)
        kv_heads = _kv_heads(heads, config.num_attention_heads // config.num_key_value_heads)
        inner = cuts(config.intermediate_size, size, unit)[rank]
        vocabularies = cuts(config.vocab_size, size)
        own = replace(
            config, num_attention_heads=count, num_key_value_heads=len(kv_heads), intermediate_size=len(inner),
            vocab_size=len(vocabularies[rank]),
        )  # fmt: skip
        return cls(group, own, heads, kv_heads, inner, vocabularies)

    @property
    def vocabulary(self) -> range:
        """This rank's tokens."""
        return self.vocabularies[self.group.rank()]


def tower_group(config: VisionConfig, group: Group) -> Group:
    """Those who share a vision tower: the group, or everyone alone where the ranks do not divide its heads or MLP."""
    sizes = config.num_attention_heads, config.intermediate_size
    return group if all(size % group.size() == 0 for size in sizes) else ALONE


def misfit(config: TextConfig, size: int) -> str | None:
    """Why so many ranks cannot share a decoder; None where they can."""
    for count, what in (
        (config.num_attention_heads, "attention heads"),
        (config.intermediate_size, "channels of the MLP"),
        (config.vocab_size, "tokens of the vocabulary"),
    ):
        if count < size:
            return f"it has {count} {what}"
    if config.num_attention_heads % size:
        return f"its {config.num_attention_heads} attention heads do not divide by {size}"
    return None


def cuts(length: int, size: int, unit: int = 1) -> tuple[range, ...]:
    """A length in `size` ranges of whole units, as equal as they allow; the last unit may be shorter."""
    units = -(-length // unit)
    borders = [min(units * rank // size * unit, length) for rank in range(size + 1)]
    return tuple(range(start, end) for start, end in zip(borders, borders[1:], strict=False))


def _kv_heads(heads: range, queries: int) -> tuple[int, ...]:
    """The key and value heads of some query heads: each once where that keeps the groups equal, else one each."""
    wanted = [head // queries for head in heads]
    once = sorted(set(wanted))
    each = len(wanted) // len(once)
    equal = wanted == [head for head in once for _ in range(each)]
    return tuple(once if equal else wanted)
