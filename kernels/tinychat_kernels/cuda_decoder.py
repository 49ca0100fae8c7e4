"""A Llama-shaped decoder on the CUDA kernels: the launches of a step, and the step as one CUDA graph.

All of a step's tensors are there before it runs: tokens, positions and slots lie in device memory, where the draw of
one step leaves the inputs of the next. The same launches run in the emulator.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tinychat_kernels import cuda, cuda_checks, cuda_golden, cuda_ops
from tinychat_kernels.cuda_layout import Packed
from tinychat_kernels.cuda_ops import Draw, Heads, Launch, Partial, Where
from tinychat_kernels.cuda_ops import Layer as Cached
from tinychat_kernels.errors import KernelError

if TYPE_CHECKING:
    from tinychat_kernels.cuda_gpu import Gpu

MOST_ROWS = 8  # of a step that is one graph
VECTOR = 8  # numbers: what widths are multiples of
CHECKED_OPS = ("norm", "rope_kv", "attn_decode", "sample")  # beside the linears
CHECKED_ROWS = (1, MOST_ROWS, 16, 32, 64, 128, cuda.MOST_GEMM_ROWS + 1)  # one for each kernel of a linear


@dataclass(frozen=True, slots=True)
class Linear:
    """Packed weights, and a bias of the activations' dtype."""

    weight: Packed
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """qkv has the outputs of q, k and v, gate_up those of gate and up; the norms are weights `[D]`.

    A token sees `window` keys at most, its own included; 0: all.
    """

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    attention_norm: Tensor
    mlp_norm: Tensor
    window: int = 0


@dataclass(frozen=True, slots=True)
class Weights:
    """A decoder's weights. The head is packed, or a table `[V, D]` as the embeddings are."""

    layers: Sequence[Layer]
    norm: Tensor
    head: Packed | Tensor
    embeddings: Tensor
    heads: Heads
    eps: float

    @property
    def vocabulary(self) -> int:
        return self.head.outputs if isinstance(self.head, Packed) else len(self.head)


class Work(NamedTuple):
    """What a forward over R rows computes in, of the activations' dtype."""

    x: Tensor
    normed: Tensor
    qkv: Tensor
    mixed: Tensor
    delta: Tensor
    gate_up: Tensor
    gated: Tensor


Attend = Callable[[Tensor, Cached, Heads, Tensor], None]  # qkv, a layer's cache, its heads -> out


class Decoder:
    """The launches of a forward, for any number of rows. Raises KernelError for sizes that the kernels do not take."""

    def __init__(self, weights: Weights, launch: Launch, processors: int) -> None:
        check(weights)
        self.weights = weights
        self.launch = launch
        self.processors = processors

    def work(self, rows: int) -> Work:
        """Memory for a forward over so many rows."""
        w, like = self.weights, self.weights.embeddings
        width, inner = len(w.norm), w.layers[0].down.weight.inputs
        sizes = width, width, w.heads.width, w.heads.queries * w.heads.dim, width, 2 * inner, inner
        return Work(*(like.new_empty(rows, size) for size in sizes))

    def partial(self, rows: int, capacity: int) -> Partial:
        """Memory for the parts of a step's attention."""
        heads = self.weights.heads
        shape = (rows, heads.queries, cuda_ops.attention_splits(heads.keys, capacity, self.processors))
        like = self.weights.embeddings
        return Partial(*(like.new_empty((*shape, size), dtype=torch.float32) for size in (heads.dim, 2)))

    def layers(
        self, work: Work, where: Where, tables: tuple[Tensor, Tensor], cache: Sequence[Cached], attend: Attend
    ) -> None:
        """work.x holds embeddings -> work.normed, the states after the last norm; keys and values are written."""
        launch, w, delta = self.launch, self.weights, None
        for layer, cached in zip(w.layers, cache, strict=True):
            heads = replace(w.heads, window=layer.window)
            cuda_ops.add_rms_norm(launch, work.x, delta, layer.attention_norm, w.eps, work.normed)
            self._linear(work.normed, layer.qkv, work.qkv)
            cuda_ops.rope_kv(launch, work.qkv, tables, where, heads, cached)
            attend(work.qkv, cached, heads, work.mixed)
            self._linear(work.mixed, layer.out, work.delta)
            cuda_ops.add_rms_norm(launch, work.x, work.delta, layer.mlp_norm, w.eps, work.normed)
            self._linear(work.normed, layer.gate_up, work.gate_up)
            cuda_ops.swiglu(launch, work.gate_up, work.gated)
            self._linear(work.gated, layer.down, work.delta)
            delta = work.delta
        cuda_ops.add_rms_norm(launch, work.x, delta, w.norm, w.eps, work.normed)

    def head(self, hidden: Tensor, logits: Tensor) -> None:
        """hidden `[R, D]` -> logits `[R, V]`: fp32 where the head is packed, else of the activations' dtype."""
        head = self.weights.head
        if isinstance(head, Packed):
            cuda.launch_linear(self.launch, hidden, head, None, logits, self.processors)
        else:
            torch.mm(hidden, head.T, out=logits)

    def logits(self, rows: int) -> Tensor:
        """Memory for the logits of so many rows."""
        like = self.weights.embeddings
        dtype = torch.float32 if isinstance(self.weights.head, Packed) else like.dtype
        return like.new_empty((rows, self.weights.vocabulary), dtype=dtype)

    def _linear(self, x: Tensor, linear: Linear, out: Tensor) -> None:
        cuda.launch_linear(self.launch, x, linear.weight, linear.bias, out, self.processors)


class Step:
    """One token for each of R rows of a pool: tensors that stay, and after its first run a CUDA graph.

    `inputs` int32 `[3, R]` are tokens, positions and slots; `chances` fp32 `[2, R]` are temperatures and numbers in
    [0, 1), zeros at first. With `draws` a step ends with a token a row, which is the next step's input, and
    positions + 1; `state` int32 `[4, R]` is the inputs and then the bits of the tokens' log-probabilities.
    """

    def __init__(
        self, decoder: Decoder, cache: Sequence[Cached], tables: tuple[Tensor, Tensor], rows: int, *, draws: bool
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._tables = tables
        self._draws = draws
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ran = False
        self.greedy = True  # whether `chances` are zeros
        device = decoder.weights.embeddings.device
        self._captures_on = device if device.type == "cuda" else None
        with torch.inference_mode(False):  # else what is made there could be written to nowhere else
            self.state = torch.zeros((4, rows), dtype=torch.int32, device=device)
            self.chances = torch.zeros((2, rows), dtype=torch.float32, device=device)
            self.logits = decoder.logits(rows)
            self.inputs, self._logprobs = self.state[:3], self.state[3].view(torch.float32)
            self._scratch = self.chances.new_zeros((rows, cuda_ops.SAMPLE_BLOCKS, 4))
            self._work = decoder.work(rows)
            self._partial = decoder.partial(rows, cache[0].keys.shape[2])

    def run(self) -> None:
        """Compute from `inputs` to `logits`, and with `draws` to the next `state`."""
        if self._captures_on is None:
            self._launches()
            return
        with torch.cuda.device(self._captures_on):
            if self._ran and self._graph is None:  # the first run compiles what is not compiled
                self._graph = self._captured(self._captures_on)
            if self._graph is not None:
                self._graph.replay()
            else:
                self._launches()
        self._ran = True

    def _captured(self, device: torch.device) -> torch.cuda.CUDAGraph | None:
        """The launches as a graph; None, and from then on no further try, where they cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream(device)),  # which a capture that fails does not put back
                torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
            ):
                self._launches()
        except (KernelError, RuntimeError) as error:
            self._captures_on = None
            warnings.warn(f"a step of {self.inputs.shape[1]} rows runs launch by launch: {error}", stacklevel=3)
            return None
        return graph

    @torch.no_grad()
    def _launches(self) -> None:
        tokens, positions, slots = self.inputs.unbind()
        decoder, work = self._decoder, self._work
        torch.index_select(decoder.weights.embeddings, 0, tokens, out=work.x)
        decoder.layers(work, Where(slots, positions), self._tables, self._cache, self._attend(Where(slots, positions)))
        decoder.head(work.normed, self.logits)
        if self._draws:
            temperatures, uniform = self.chances.unbind()
            draw = Draw(temperatures, uniform, tokens, self._logprobs, self._scratch)
            cuda_ops.sample(decoder.launch, self.logits, draw, positions)

    def _attend(self, where: Where) -> Attend:
        launch, partial = self._decoder.launch, self._partial

        def attend(qkv: Tensor, cached: Cached, heads: Heads, out: Tensor) -> None:
            cuda_ops.attn_decode(launch, qkv, where, heads, cached, partial, out)

        return attend


def check(w: Weights) -> None:
    """Raise KernelError for sizes that the kernels do not take."""
    if w.heads.dim not in cuda_ops.HEAD_DIMS:
        known = ", ".join(map(str, cuda_ops.HEAD_DIMS))
        raise KernelError(f"heads of {w.heads.dim} channels: the CUDA kernels take {known}")
    for name, width in (("hidden", len(w.norm)), ("intermediate", w.layers[0].down.weight.inputs)):
        if width % VECTOR:
            raise KernelError(f"a {name} size of {width} is no multiple of {VECTOR}")
    dtype = w.embeddings.dtype
    norms = [norm for layer in w.layers for norm in (layer.attention_norm, layer.mlp_norm)]
    linears = [linear for layer in w.layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    tensors = [w.norm, *norms, *(one.bias for one in linears if one.bias is not None)]
    if isinstance(w.head, Tensor):
        tensors.append(w.head)
    if dtype not in cuda.DTYPES or any(tensor.dtype != dtype for tensor in tensors):
        kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in (w.embeddings, *tensors)})
        raise KernelError(f"the decoder's tensors are {', '.join(kinds)}; all are to be float16, or all bfloat16")


def examine(device: Gpu, w: Weights) -> None:
    """Compare the kernels that a decoder needs with ref, each once on a GPU. Raises KernelError where one is wrong."""
    dtype = w.embeddings.dtype
    for op in CHECKED_OPS:
        name = f"{op} {dtype}".replace("torch.", "")
        if not cuda_checks.passed(device, name, functools.partial(_wrong, device, op, w.embeddings)):
            raise KernelError(f"{name} is wrong on this GPU: see `tinychat doctor --kernels`")
    for packed in _shapes(w):
        if not all(cuda.passed(device, packed, dtype, rows) for rows in CHECKED_ROWS):
            raise KernelError(f"a linear of {packed.inputs}x{packed.outputs} is wrong on this GPU")


def _wrong(device: Gpu, op: str, like: Tensor) -> str | None:
    """What is wrong with an op, on numbers of its own. Raises KernelError for one that does not run."""
    place = cuda_golden.Place(device, like.device, like.dtype, device.processors)
    (found,) = cuda_golden.results(place, (op,))
    if found.error:
        raise KernelError(found.error)
    return None if found.right else f"is off by {found.worst:.1e} in {found.case}"


def _shapes(w: Weights) -> list[Packed]:
    """Linears that differ in more than their numbers, one of each."""
    linears = [linear.weight for layer in w.layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    if isinstance(w.head, Packed):
        linears.append(w.head)
    return list({(one.inputs, one.outputs, one.group, one.bits, one.scale): one for one in linears}.values())
