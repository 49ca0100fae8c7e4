"""How files hold a 4-bit linear, or an 8-bit head: which tensors, of which shapes, and how they give q, scale, zero.

Every format is exact: `unpack(pack(logical)) == logical`, or pack says why it cannot hold it. Sources: AutoAWQ's
WQLinear_GEMM, WQLinear_GEMV and WQLinear_GEMVFast; llm-awq's qmodule.py of its three generations (v0 = GEMM, v1 =
GEMV, v2 = GEMVFast); GPTQ as AutoGPTQ and GPTQModel write it; compressed-tensors' pack-quantized.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tinychat_kernels import words
from tinychat_kernels.errors import LayoutError
from tinychat_kernels.layout import HALVES, Logical, QuantSpec, check_values, from_logical, unpack_awq
from tinychat_kernels.words import PER_WORD

Shapes = Mapping[str, Sequence[int]]
Tensors = Mapping[str, Tensor]


class Format(ABC):
    """A format's tensors by the ends of their names. K inputs, N outputs; the first tensor marks a linear."""

    name: str
    bits = 4
    scale_name = "scales"
    needs: Mapping[str, tuple[str, ...]]  # q, scale, zero -> the tensors that tell it

    @abstractmethod
    def shapes(self, spec: QuantSpec, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a linear of K=rows inputs and N=columns outputs."""

    @abstractmethod
    def size(self, shapes: Shapes) -> tuple[int, int]:
        """(K, N) from the tensors' shapes."""

    @abstractmethod
    def q(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        """uint8 `[K, N]`."""

    @abstractmethod
    def scale(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        """`[K/G, N]` in the file's dtype."""

    @abstractmethod
    def zero(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        """uint8 `[K/G, N]`. Raises LayoutError where the file's zero points are none of 0..15."""

    @abstractmethod
    def _pack(self, logical: Logical, spec: QuantSpec) -> dict[str, Tensor]: ...

    def check(self, spec: QuantSpec, rows: int, columns: int) -> None:
        """Raise LayoutError where the format cannot hold a linear of this size."""
        self._check_bits(spec)
        spec.check(rows, columns)

    def _check_bits(self, spec: QuantSpec) -> None:
        if spec.bits != self.bits:
            raise LayoutError(f"{self.name} is read and written with {self.bits} bits, not {spec.bits}")

    def pack(self, logical: Logical, spec: QuantSpec) -> dict[str, Tensor]:
        """The tensors of a linear. Raises LayoutError where they would not give (q, scale, zero) back."""
        self.check(spec, *logical.q.shape)
        check_values(logical, spec)
        return {name: tensor.contiguous() for name, tensor in self._pack(logical, spec).items()}

    def unpack(self, tensors: Tensors, spec: QuantSpec) -> Logical:
        """(q, scale, zero). Raises LayoutError for shapes or values that contradict the spec."""
        self.check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, spec)
        return Logical(self.q(tensors, spec), self.scale(tensors, spec), self.zero(tensors, spec))

    def check_shapes(self, found: Shapes, spec: QuantSpec) -> tuple[int, int]:
        """(K, N). Raises LayoutError where a tensor that is needed is missing or has another shape."""
        rows, columns = self.size(found)
        self.check(spec, rows, columns)
        for name, shape in self.shapes(spec, rows, columns).items():
            if name not in found and name in {part for parts in self.needs.values() for part in parts}:
                raise LayoutError(f"{name} is missing")
            if tuple(found.get(name, shape)) != shape:
                there = f"{name} has shape {list(found[name])}"
                raise LayoutError(f"{there}, {list(shape)} is needed for {rows}x{columns} weights in {self.name}")
        return rows, columns


class Gemm(Format):
    """AutoAWQ GEMM, llm-awq v0, and our memory: qweight `[K, N/8]` and qzeros `[K/G, N/8]` in AWQ's order."""

    name = "awq-gemm"
    needs = {"q": ("qweight",), "scale": ("scales",), "zero": ("qzeros",)}

    def shapes(self, spec: QuantSpec, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        wide, groups = columns // PER_WORD, spec.groups(rows)
        return {"qweight": (rows, wide), "qzeros": (groups, wide), "scales": (groups, columns)}

    def size(self, shapes: Shapes) -> tuple[int, int]:
        return shapes["qweight"][0], shapes["qweight"][1] * PER_WORD

    def q(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        return unpack_awq(tensors["qweight"])

    def scale(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        return tensors["scales"]

    def zero(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        return unpack_awq(tensors["qzeros"])

    def _pack(self, logical: Logical, spec: QuantSpec) -> dict[str, Tensor]:
        return from_logical(logical, spec)._asdict()


def padded_groups(spec: QuantSpec, rows: int) -> int:
    """Groups as the GEMV layouts pad them, by whole words and the kernel's blocks of 1024 inputs."""
    group = spec.group(rows)
    block = {32: 4, 64: 2}.get(group, 1)
    whole = math.ceil(rows // group / PER_WORD)
    return math.ceil(whole / block) * block * PER_WORD


class Gemv(Format):
    """AutoAWQ GEMV and llm-awq v1: qweight `[N, K/8]` and qzeros `[N, P/8]` in plain order, scales `[N, P]`."""

    name = "awq-gemv"
    needs = {"q": ("qweight",), "scale": ("scales", "qweight"), "zero": ("qzeros", "qweight")}

    def shapes(self, spec: QuantSpec, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        padded = padded_groups(spec, rows)
        return {
            "qweight": (columns, rows // PER_WORD),
            "qzeros": (columns, padded // PER_WORD),
            "scales": (columns, padded),
        }

    def size(self, shapes: Shapes) -> tuple[int, int]:
        return shapes["qweight"][1] * PER_WORD, shapes["qweight"][0]

    def check(self, spec: QuantSpec, rows: int, columns: int) -> None:
        super().check(spec, rows, columns)
        _check_rows(self.name, rows, PER_WORD)

    def q(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        return words.unpack(tensors["qweight"]).T

    def scale(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        return tensors["scales"][:, : self._groups(tensors, spec)].T

    def zero(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        return words.unpack(tensors["qzeros"])[:, : self._groups(tensors, spec)].T

    def _groups(self, tensors: Tensors, spec: QuantSpec) -> int:
        return spec.groups(tensors["qweight"].shape[1] * PER_WORD)

    def _pack(self, logical: Logical, spec: QuantSpec) -> dict[str, Tensor]:
        padding = (0, padded_groups(spec, logical.q.shape[0]) - logical.scale.shape[0])
        zeros = torch.nn.functional.pad(logical.zero.T, padding)
        scales = torch.nn.functional.pad(logical.scale.T, padding)
        return {"qweight": words.pack(logical.q.T), "qzeros": words.pack(zeros), "scales": scales}


class GemvFast(Format):
    """llm-awq v2 and AutoAWQ GEMVFast: qweight int16 `[N/4, K]`, scales and -scale*zero `[P, N]` of 16 bits.

    A tile of 4 outputs and 64 inputs is 64 words; its nibbles go by output, half of the inputs, pair, parity, and
    eight of the half, as the kernel loads and shifts them. AutoAWQ calls the scaled zeros `qzeros`.
    """

    def __init__(self, name: str, zeros: str) -> None:
        self.name = name
        self.zeros = zeros
        self.needs = {"q": ("qweight",), "scale": ("scales", "qweight"), "zero": ("scales", zeros, "qweight")}

    def shapes(self, spec: QuantSpec, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        padded = padded_groups(spec, rows)
        return {"qweight": (columns // 4, rows), "scales": (padded, columns), self.zeros: (padded, columns)}

    def size(self, shapes: Shapes) -> tuple[int, int]:
        return shapes["qweight"][1], shapes["qweight"][0] * 4

    def check(self, spec: QuantSpec, rows: int, columns: int) -> None:
        super().check(spec, rows, columns)
        _check_rows(self.name, rows, 64)

    def q(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        packed = tensors["qweight"]
        nibbles = torch.stack([(packed >> (4 * i)).to(torch.uint8) & 0xF for i in range(4)], -1)
        tiles = nibbles.reshape(packed.shape[0], -1, 4, 2, 4, 2, 4)
        return tiles.permute(0, 2, 1, 3, 6, 4, 5).reshape(packed.shape[0] * 4, -1).T

    def scale(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        return tensors["scales"][: spec.groups(tensors["qweight"].shape[1])]

    def zero(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        scale = self.scale(tensors, spec)
        scaled = tensors[self.zeros][: len(scale)]
        ratio = (-scaled.float() / scale.float()).round()
        zero = torch.where(scale == 0, 0, ratio).nan_to_num(0).clamp(0, spec.max_q)
        if len(wrong := (_scaled(zero, scale) != scaled).nonzero()):
            group, column = wrong[0].tolist()
            example = f"{float(scaled[group, column]):g} at a scale of {float(scale[group, column]):g}"
            where = f"group {group} of output {column}"
            raise LayoutError(
                f"{len(wrong)} {self.zeros} are no scale times 0..{spec.max_q}, such as {example}, {where}"
            )
        return zero.to(torch.uint8)

    def _pack(self, logical: Logical, spec: QuantSpec) -> dict[str, Tensor]:
        rows, columns = logical.q.shape
        if logical.scale.dtype not in HALVES:
            raise LayoutError(f"scales are {logical.scale.dtype}, {self.name} has float16 or bfloat16")
        padding = (0, 0, 0, padded_groups(spec, rows) - logical.scale.shape[0])
        tiles = logical.q.T.reshape(columns // 4, 4, -1, 2, 4, 4, 2).permute(0, 2, 1, 3, 5, 6, 4)
        pairs = tiles[..., 0::2] | (tiles[..., 1::2] << 4)
        packed = {
            "qweight": pairs.contiguous().view(torch.int16).reshape(columns // 4, rows),
            "scales": torch.nn.functional.pad(logical.scale, padding),
            self.zeros: torch.nn.functional.pad(_scaled(logical.zero, logical.scale), padding),
        }
        if not torch.equal(self.zero(packed, spec), logical.zero):
            raise LayoutError(f"zero points cannot be told from scale times zero in {logical.scale.dtype}")
        return packed


def _scaled(zero: Tensor, scale: Tensor) -> Tensor:
    """-scale * zero, rounded once."""
    return -(scale.float() * zero.float()).to(scale.dtype)


class CompressedTensors(Format):
    """pack-quantized: weight_packed `[N, K/8]`, weight_scale `[N, K/G]`, weight_zero_point `[N/8, K/G]`, all shifted.

    Symmetric groups have no weight_zero_point, and take any N. weight_shape is [N, K]. A word has 4 values of 8 bits.
    """

    name = "compressed-tensors"
    scale_name = "weight_scale"
    needs = {"q": ("weight_packed",), "scale": ("weight_scale",), "zero": ("weight_scale", "weight_zero_point")}

    def __init__(self, bits: int = 4) -> None:
        self.bits = bits
        self.per_word = 32 // bits
        self.middle = 2 ** (bits - 1)  # the zero point of symmetric groups, and what signed values are shifted by
        self._words = (words.pack, words.unpack) if bits == 4 else (words.pack_bytes, words.unpack_bytes)

    def shapes(self, spec: QuantSpec, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        groups = spec.groups(rows)
        zeros = {"weight_zero_point": (columns // self.per_word, groups)} if spec.zero_point else {}
        packed = {"weight_packed": (columns, rows // self.per_word), "weight_scale": (columns, groups)}
        return {**packed, **zeros, "weight_shape": (2,)}

    def size(self, shapes: Shapes) -> tuple[int, int]:
        return shapes["weight_packed"][1] * self.per_word, shapes["weight_packed"][0]

    def check(self, spec: QuantSpec, rows: int, columns: int) -> None:
        self._check_bits(spec)
        spec.group(rows)
        _check_rows(self.name, rows, self.per_word)
        if spec.zero_point and columns % self.per_word:
            raise LayoutError(f"out_features={columns} is not a multiple of {self.per_word}, which zero points need")

    def q(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        return self._words[1](tensors["weight_packed"]).T

    def scale(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        return tensors["weight_scale"].T

    def zero(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        if not spec.zero_point:
            return torch.full_like(tensors["weight_scale"].T, self.middle, dtype=torch.uint8)
        return self._words[1](tensors["weight_zero_point"].T)

    def _pack(self, logical: Logical, spec: QuantSpec) -> dict[str, Tensor]:
        rows, columns = logical.q.shape
        packed = {"weight_packed": self._words[0](logical.q.T), "weight_scale": logical.scale.T}
        if spec.zero_point:
            packed["weight_zero_point"] = self._words[0](logical.zero).T
        elif not bool((logical.zero == self.middle).all()):
            raise LayoutError(f"symmetric {self.name} weights have no zero points, and some here are not {self.middle}")
        return {**packed, "weight_shape": torch.tensor([columns, rows])}


class Gptq(Format):
    """qweight `[K/8, N]` packed along K, qzeros `[K/G, N/8]`, scales `[K/G, N]`, g_idx `[K]`, all in plain order.

    With `less_one` (version 1) zero points are stored less one: 0 borrows from its neighbour in the word, and what
    a reader makes of it differs, so it is refused. So is activation order (a g_idx that does not count up).
    """

    needs = {"q": ("qweight", "g_idx"), "scale": ("scales",), "zero": ("qzeros",)}

    def __init__(self, name: str, less_one: bool) -> None:
        self.name = name
        self.less_one = less_one

    def shapes(self, spec: QuantSpec, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        groups = spec.groups(rows)
        zeros = (groups, columns // PER_WORD)
        return {"qweight": (rows // PER_WORD, columns), "qzeros": zeros, "scales": (groups, columns), "g_idx": (rows,)}

    def size(self, shapes: Shapes) -> tuple[int, int]:
        return shapes["qweight"][0] * PER_WORD, shapes["qweight"][1]

    def check(self, spec: QuantSpec, rows: int, columns: int) -> None:
        super().check(spec, rows, columns)
        _check_rows(self.name, rows, PER_WORD)

    def q(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        rows = tensors["qweight"].shape[0] * PER_WORD
        if not torch.equal(tensors["g_idx"].long(), torch.arange(rows) // spec.group(rows)):
            raise LayoutError("g_idx does not count up: the weights are in activation order (desc_act)")
        return words.unpack(tensors["qweight"].T).T

    def scale(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        return tensors["scales"]

    def zero(self, tensors: Tensors, spec: QuantSpec) -> Tensor:
        found = words.unpack(tensors["qzeros"])
        if not self.less_one:
            return found
        if wrapped := int((found == spec.max_q).sum()):
            raise LayoutError(f"{wrapped} zero points are stored as {spec.max_q}, which readers take for 0 or for 16")
        return found + 1

    def _pack(self, logical: Logical, spec: QuantSpec) -> dict[str, Tensor]:
        rows = logical.q.shape[0]
        if self.less_one and int(logical.zero.min()) == 0:
            raise LayoutError(f"{self.name} stores zero points less one, and {int((logical.zero == 0).sum())} are 0")
        stored = logical.zero - 1 if self.less_one else logical.zero
        packed = {"qweight": words.pack(logical.q.T).T, "qzeros": words.pack(stored), "scales": logical.scale}
        return {**packed, "g_idx": (torch.arange(rows) // spec.group(rows)).to(torch.int32)}


def _check_rows(name: str, rows: int, multiple: int) -> None:
    if rows % multiple:
        raise LayoutError(f"in_features={rows} is not a multiple of {multiple}, which {name} needs")


GEMM = Gemm()
GEMV = Gemv()
GEMV_FAST = GemvFast("awq-gemv-fast", "qzeros")
LLM_AWQ_V2 = GemvFast("llm-awq-v2", "scaled_zeros")
COMPRESSED_TENSORS = CompressedTensors()
COMPRESSED_TENSORS_8 = CompressedTensors(bits=8)  # of a head: what a decoder's linears are held in has 4 bits
GPTQ = Gptq("gptq", less_one=True)
GPTQ_V2 = Gptq("gptq-v2", less_one=False)
FORMATS = (GEMM, GEMV, GEMV_FAST, LLM_AWQ_V2, COMPRESSED_TENSORS, GPTQ, GPTQ_V2)
