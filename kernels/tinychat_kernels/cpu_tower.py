"""A vision transformer on the CPU, one C call a picture: between the pixels and the features no torch op computes.

Linears have 8-bit weights and round what comes to 8 bits; the rest is float32. A picture's features have the same bits
whatever stands beside it, and for any number of threads. The structures are those of csrc/cpu/tower.h.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tinychat_kernels import cpu
from tinychat_kernels.cpu import Packed
from tinychat_kernels.cpu_decoder import LANES, MOST_HEAD_DIM, Linear, _address, _packed
from tinychat_kernels.errors import KernelError

GROUPS = (128, 64, 32)  # inputs that share a scale, the best first
PANEL = 64  # outputs of the patches' embedding that are computed together
STAGES = ("patches", "norm", "qkv", "heads", "attention", "out", "up", "gelu", "down")
GELUS = {"gelu": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "quick_gelu": 2}  # as tower.h numbers them

_POINTER, _INT64, _INT32, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """weight and bias, float32 `[D]`."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """qkv has the outputs of q, k and v. Linears have 8-bit weights."""

    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    attention_norm: LayerNorm
    mlp_norm: LayerNorm


@dataclass(frozen=True, slots=True)
class Weights:
    """CLIP's or SigLIP's tower. The embedding of patches is `[D, C, P, P]`, its bias, `first` and positions float32.

    `first` `[D]` is the token before the patches, `norm` comes before the layers; None: there is none.
    """

    layers: Sequence[Layer]
    embedding: Tensor
    patch_bias: Tensor | None
    first: Tensor | None
    positions: Tensor
    norm: LayerNorm | None
    heads: int
    eps: float
    gelu: str


def group_of(inputs: int) -> int:
    """Inputs that share a scale in a linear of so many: the whole row where it cannot be parted."""
    return next((group for group in GROUPS if inputs % group == 0), inputs)


def widened(inner: int) -> int:
    """The outputs of `up` with those added that make whole groups of the inputs of `down`; zeros change nothing."""
    return inner if group_of(inner) < inner or inner <= GROUPS[0] else -(-inner // GROUPS[0]) * GROUPS[0]


def linear_size(inputs: int, outputs: int) -> int:
    """Bytes of such a linear that `round_linear` makes."""
    return cpu.packed_size(inputs, outputs, group_of(inputs), 8, torch.float16)


def round_linear(weight: Tensor, inputs: int, outputs: int, memory: Tensor | None = None) -> Packed:
    """A float weight `[N, K]`, with zeros up to these sizes, in 8 bits with a scale for each output and group.

    Raises LayoutError for NaN and Inf.
    """
    wide = pad(weight, (0, inputs - weight.shape[1], 0, outputs - weight.shape[0]))
    return cpu.quantize_head(wide, group_of(inputs), memory)


class _LayerNorm(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("bias", _POINTER))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, cpu._Weights) for name in ("qkv", "out", "up", "down")),
        *((f"{name}_bias", _POINTER) for name in ("qkv", "out", "up", "down")),
        ("attention_norm", _LayerNorm),
        ("mlp_norm", _LayerNorm),
    )


class _Tower(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        *((name, _INT64) for name in ("width", "inner", "heads", "head_dim", "patch", "patches")),
        *((name, _POINTER) for name in ("embedding", "patch_bias", "first", "positions")),
        ("norm", _LayerNorm),
        ("eps", _FLOAT),
        ("gelu", _INT32),
    )


class _Picture(ctypes.Structure):
    _fields_ = (
        ("patches", _POINTER),
        ("layers", _INT64),
        *((name, _POINTER) for name in ("hidden", "memory", "nanoseconds")),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = cpu.library()
    cpu.declare(
        loaded,
        {
            "tc_picture_memory": (ctypes.c_size_t, (_POINTER, _INT64)),
            "tc_encode": (ctypes.c_int, (_POINTER, _POINTER)),
            "tc_layer_norm_rows": (None, (_POINTER, _POINTER, _POINTER, _FLOAT, _INT64, _INT64, _POINTER)),
            "tc_gelu_rows": (None, (_POINTER, _INT32, _INT64, _INT64, _POINTER)),
        },
    )
    return loaded


class Tower:
    """The weights behind one C structure, and the memory that a picture needs. Not for several threads at once.

    Raises KernelError for sizes that the kernels do not take.
    """

    def __init__(self, weights: Weights) -> None:
        check_sizes(len(weights.embedding), weights.layers[0].up.weight.out_features, weights.heads, weights.gelu)
        self.weights = weights
        self.nanoseconds: Tensor | None = None
        width, _, self._side, _ = weights.embedding.shape
        table = pad(weights.embedding.detach().float().flatten(1), (0, 0, 0, -width % PANEL))
        self._panels = table.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
        self._layers = (_Layer * len(weights.layers))(*map(_layer, weights.layers))
        self._struct = _Tower(
            self._layers, width, weights.layers[0].up.weight.out_features, weights.heads, width // weights.heads,
            table.shape[1], len(weights.positions) - (weights.first is not None), self._panels.data_ptr(),
            _address(weights.patch_bias), _address(weights.first), weights.positions.data_ptr(),
            _norm(weights.norm), weights.eps, GELUS[weights.gelu],
        )  # fmt: skip
        self._memory = torch.empty(0, dtype=torch.uint8)

    def encode(self, pixels: Tensor, layers: int | None = None) -> Tensor:
        """Pictures `[N, C, H, W]` -> float32 `[N, tokens, D]` after so many layers (None: all of them)."""
        depth = len(self.weights.layers) if layers is None else layers
        patches = self._patches(pixels)
        if patches.shape[1] != self._struct.patches or not 0 <= depth <= len(self.weights.layers):
            message = f"{patches.shape[1]} patches and {depth} layers were asked of a tower"
            raise KernelError(f"{message} of {self._struct.patches} and {len(self.weights.layers)}")
        out = torch.empty((len(pixels), *self.weights.positions.shape))
        memory = self._room(depth)
        for one, hidden in zip(patches, out, strict=True):
            picture = _Picture(one.data_ptr(), depth, hidden.data_ptr(), memory, _address(self.nanoseconds))
            failed = _library().tc_encode(ctypes.addressof(self._struct), ctypes.addressof(picture))
            cpu.check_memory(failed, "a picture's features")
        return out

    def profile(self) -> dict[str, float]:
        """Seconds spent in each stage since `start_profile`."""
        spent = torch.zeros(len(STAGES)) if self.nanoseconds is None else self.nanoseconds / 1e9
        return dict(zip(STAGES, spent.tolist(), strict=True))

    def start_profile(self) -> None:
        """Measure what follows, from zero."""
        self.nanoseconds = torch.zeros(len(STAGES), dtype=torch.int64)

    def _patches(self, pixels: Tensor) -> Tensor:
        """[N, C, H, W] -> float32 `[N, patches, numbers of one]`, row by row, as the embedding's weights lie."""
        side = self._side
        high, wide = (size // side * side for size in pixels.shape[2:])  # as a convolution leaves out the rest
        squares = (
            pixels[..., :high, :wide].float().unflatten(3, (-1, side)).unflatten(2, (-1, side))
        )  # [N, C, rows, P, columns, P]
        return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2).contiguous()

    def _room(self, depth: int) -> int:
        """The address of enough memory for a picture."""
        needed = _library().tc_picture_memory(ctypes.addressof(self._struct), depth)
        if needed > self._memory.numel():
            self._memory = cpu.empty(needed)
        return self._memory.data_ptr()


def layer_norm(x: Tensor, norm: LayerNorm, eps: float, add: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x float32 `[M, D]`, plus `add` -> that sum, and its norm."""
    x, out, struct = x.clone(), torch.empty_like(x), _norm(norm)
    address = ctypes.addressof(struct)
    _library().tc_layer_norm_rows(x.data_ptr(), _address(add), address, eps, *x.shape, out.data_ptr())
    return x, out


def gelu(x: Tensor, kind: str) -> Tensor:
    """x float32 `[M, D]` -> the same, by one of GELUS."""
    out = torch.empty_like(x)
    _library().tc_gelu_rows(x.data_ptr(), GELUS[kind], *x.shape, out.data_ptr())
    return out


def check_sizes(width: int, inner: int, heads: int, gelu: str) -> None:
    """Raise KernelError for a tower that the kernels do not take."""
    if width % heads or width // heads > MOST_HEAD_DIM:
        raise KernelError(f"{heads} heads of a width of {width}: at most {MOST_HEAD_DIM} channels each are supported")
    for name, size in (("hidden", width), ("intermediate", inner)):
        if size % LANES:
            raise KernelError(f"the {name} size {size} is no multiple of {LANES}")
    if gelu not in GELUS:
        raise KernelError(f"the activation {gelu} is none of {', '.join(GELUS)}")


def _norm(norm: LayerNorm | None) -> _LayerNorm:
    return _LayerNorm() if norm is None else _LayerNorm(norm.weight.data_ptr(), norm.bias.data_ptr())


def _layer(layer: Layer) -> _Layer:
    linears = (layer.qkv, layer.out, layer.up, layer.down)
    return _Layer(
        *(_packed(linear.weight) for linear in linears),
        *(_address(linear.bias) for linear in linears),
        _norm(layer.attention_norm),
        _norm(layer.mlp_norm),
    )
