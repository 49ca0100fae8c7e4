"""Stage kernels: times of every op at real models' shapes, beside what else multiplies such weights.

Weights take turns so that none is found in the cache; times are medians over CUDA graphs. What a rival does not offer
here is named and not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gpu_checks import rivals
from gpu_checks.decoders import SHAPES, Shape, packed_bytes, random_packed
from gpu_checks.machine import Machine, copy_bandwidth
from gpu_checks.store import Json, Store
from tinychat_kernels import cuda, cuda_linear, cuda_ops
from tinychat_kernels.cuda_layout import Packed
from tinychat_kernels.cuda_ops import Heads, Layer, Partial, Where
from tinychat_kernels.int8 import Int8, quantize_rows

STAGE = "kernels"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
FEW = (1, 16, 512)  # rows at which every shape of every model is timed
EXTRA = {"4k x 14k": (4096, 14336), "8k x 28k": (8192, 28672)}
Sized = tuple[str, tuple[int, int], int, int]  # a linear's name, its outputs and inputs, rows, bits of a weight
TOWERS = {  # of vision: rows, inputs, outputs
    "SigLIP fc1": (729, 1152, 4304), "SigLIP fc2": (729, 4304, 1152), "CLIP qkv": (577, 1024, 3072),
}  # fmt: skip
LENGTHS = (512, 2048, 4096, 8192, 32768)
CROSSING = (64, 128, 192, 256, 384, 512, 1024)


def run(machine: Machine, store: Store) -> None:
    """Everything that is timed alone; what the targets ask about comes first."""
    copied = store.get(STAGE, "copy", lambda: {"bytes_per_second": copy_bandwidth(machine)})
    here = store.get(STAGE, "rivals", rivals.here)
    for name, size, rows, bits in [*_linears(machine), *_heads(machine)]:
        key = f"linear {name} {size[0]}x{size[1]} rows {rows}"
        store.get(STAGE, key, partial(linear, machine, copied, size, rows, bits))
        for rival in rivals.asked(here, rows, bits):
            store.get(STAGE, f"{rival} {key}", partial(rivals.timed, machine, rival, size, rows), ours=False)
    for key, find in _others(machine):
        store.get(STAGE, key, find)


def _others(machine: Machine) -> Iterator[tuple[str, Callable[[], Json]]]:
    """What is no linear of a decoder."""
    for shape in shapes(machine):
        for length in (32,) if machine.dry else LENGTHS:
            for rows, cached in ((1, "f16"), (1, "int8"), (4, "f16")):
                key = f"attention {shape.name} length {length} rows {rows} {cached}"
                yield key, partial(attention, machine, shape, length, rows, cached)
        yield f"small ops {shape.name}", partial(small_ops, machine, shape)
    for rows in (4, 12) if machine.dry else CROSSING:
        yield f"crossing rows {rows}", partial(crossing, machine, rows)
    for name, size in {"tiny": (17, 64, 48)}.items() if machine.dry else TOWERS.items():
        yield f"tower {name} {size[2]}x{size[1]} rows {size[0]}", partial(tower, machine, *size)


def shapes(machine: Machine) -> list[Shape]:
    """The models whose sizes are timed."""
    return [SHAPES["tiny"]] if machine.dry else [shape for shape in SHAPES.values() if shape.name != "tiny"]


def _linears(machine: Machine) -> Iterator[Sized]:
    """The targets' shapes and the largest model at every number of rows, the others at few."""
    if machine.dry:
        yield from (("tiny", (48, 128), rows, 4) for rows in (1, 12))
        return
    largest, *others = shapes(machine)
    for rows in ROWS:
        yield from ((name, size, rows, 4) for name, size in EXTRA.items())
        yield from ((f"{largest.name} {name}", size, rows, 4) for name, size in largest.linears.items())
    for shape in others:
        yield from ((f"{shape.name} {name}", size, rows, 4) for name, size in shape.linears.items() for rows in FEW)


def _heads(machine: Machine) -> Iterator[Sized]:
    for shape in shapes(machine):
        size = shape.vocabulary, shape.hidden
        yield from ((f"{shape.name} head, {bits} bits", size, 1, bits) for bits in (8, 4))


def linear(machine: Machine, copy: Json, size: tuple[int, int], rows: int, bits: int) -> Json:
    """Seconds, and the part of the copy's bandwidth that weights, inputs and outputs are read and written with."""
    outputs, inputs = size
    weights = [random_packed(machine, *size, bits=bits) for _ in range(machine.sets(outputs * inputs * bits // 8))]
    x, out = machine.numbers(rows, inputs), machine.numbers(rows, outputs)
    seconds = machine.seconds([partial(_ours, machine, x, weight, out) for weight in weights])
    moved = packed_bytes(weights[0]) + 2 * (x.numel() + out.numel())
    del weights
    machine.forget()
    return {"ours": seconds, "bytes": moved, "of_copy": moved / seconds / copy["bytes_per_second"]}


def _ours(machine: Machine, x: Tensor, weight: Packed, out: Tensor) -> None:
    cuda.launch_linear(machine.launch, x, weight, None, out, machine.processors)


def crossing(machine: Machine, rows: int) -> Json:
    """Seconds of the product with decoded weights, and of the kernel that decodes as it goes: who is faster when."""
    outputs, inputs = (48, 128) if machine.dry else SHAPES["Llama-3-8B"].linears["gate_up"]
    weights = [random_packed(machine, outputs, inputs) for _ in range(2)]
    x, out = machine.numbers(rows, inputs), machine.numbers(rows, outputs)
    shape = cuda_linear.gemm_parts(weights[0], rows, machine.processors)
    parts = x.new_empty(shape, dtype=torch.float32) if shape[0] else None
    gemm = [partial(cuda_linear.gemm, machine.launch, x, weight, None, out, parts) for weight in weights]
    decoded = [partial(cuda.multiply_decoded, machine.launch, x, weight, None, out) for weight in weights]
    return {"gemm": machine.seconds(gemm), "decoded": machine.seconds(decoded)}


def attention(machine: Machine, shape: Shape, length: int, rows: int, cached: str) -> Json:
    """Seconds of a token's attention over a cache of this length, beside torch's, and the bandwidth of its keys."""
    heads = Heads(shape.heads, shape.kv_heads, shape.head_dim)
    size = 2 * rows * shape.kv_heads * length * shape.head_dim
    layers = [_layer(machine, shape, rows, length, cached) for _ in range(machine.sets(2 * size))]
    where = Where(*(torch.full((rows,), 0, dtype=torch.int32, device=machine.device) for _ in range(2)))
    where.slots.copy_(torch.arange(rows))
    where.positions.fill_(length - 1)
    q, out = machine.numbers(rows, heads.width), machine.numbers(rows, heads.queries * heads.dim)
    splits = cuda_ops.attention_splits(heads.keys, length, machine.processors)
    wide = partial(torch.empty, device=machine.device, dtype=torch.float32)
    room = Partial(wide(rows, heads.queries, splits, heads.dim), wide(rows, heads.queries, splits, 2))
    ours = machine.seconds(
        [partial(cuda_ops.attn_decode, machine.launch, q, where, heads, layer, room, out) for layer in layers]
    )
    moved = sum(part.numel() * part.element_size() for part in layers[0] if part is not None)
    found: Json = {"ours": ours, "bytes": moved, "bytes_per_second": moved / ours}
    if cached == "f16":
        queries = q[:, : heads.queries * heads.dim].reshape(rows, heads.queries, 1, heads.dim)
        torchs = [partial(_sdpa, queries, layer) for layer in layers]
        found["torch"] = machine.seconds(torchs)
    machine.forget()
    return found


def _sdpa(q: Tensor, layer: Layer) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, layer.keys, layer.values, enable_gqa=True)


def _layer(machine: Machine, shape: Shape, rows: int, length: int, cached: str) -> Layer:
    size = (rows, shape.kv_heads, length, shape.head_dim)
    if cached == "f16":
        return Layer(machine.numbers(*size), machine.numbers(*size))
    values = [torch.randint(-127, 128, size, device=machine.device).to(torch.int8) for _ in range(2)]
    return Layer(*values, *(torch.full(size[:3], 0.01, device=machine.device) for _ in range(2)))


def small_ops(machine: Machine, shape: Shape) -> Json:
    """Seconds of what lies between the linears, for one row."""
    heads = Heads(shape.heads, shape.kv_heads, shape.head_dim)
    x, weight, out = (machine.numbers(1, shape.hidden) for _ in range(3))
    gate_up, gated = machine.numbers(1, 2 * shape.inner), machine.numbers(1, shape.inner)
    zeros = torch.zeros(1, dtype=torch.int32, device=machine.device)
    layer, qkv = _layer(machine, shape, 1, 64, "f16"), machine.numbers(1, heads.width)
    angles = torch.ones(64, heads.dim // 2, device=machine.device)
    wide = partial(torch.zeros, device=machine.device, dtype=torch.float32)
    logits = machine.numbers(1, shape.vocabulary, dtype=torch.float32)
    draw = cuda_ops.Draw(wide(1), wide(1), zeros.clone(), wide(1), wide(1, cuda_ops.SAMPLE_BLOCKS, 4))
    launch = machine.launch
    runs: dict[str, Callable[[], object]] = {
        "norm": lambda: cuda_ops.add_rms_norm(launch, x, out, weight[0], 1e-5, out),
        "swiglu": lambda: cuda_ops.swiglu(launch, gate_up, gated),
        "rope_kv": lambda: cuda_ops.rope_kv(launch, qkv, (angles, angles), Where(zeros, zeros), heads, layer),
        "sample": lambda: cuda_ops.sample(launch, logits, draw, zeros.clone()),
    }
    return {name: machine.seconds([run]) for name, run in runs.items()}


def tower(machine: Machine, rows: int, inputs: int, outputs: int) -> Json:
    """Seconds of a vision tower's linear with 8-bit weights, its inputs rounded as they come, beside float16."""
    from tinychat_kernels import cuda_int8

    count = machine.sets(outputs * inputs)
    floats = [machine.numbers(outputs, inputs) for _ in range(max(2, count // 2))]
    weights = [quantize_rows(weight) for weight in floats]
    x, out, bias = machine.numbers(rows, inputs), machine.numbers(rows, outputs), machine.numbers(outputs)

    def ours(weight: Int8) -> None:
        cuda_int8.linear(machine.launch, x, weight, bias, out, "gelu_tanh", machine.processors)

    def theirs(weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.nn.functional.gelu(x, approximate="tanh"), weight, bias)

    found = {
        "ours": machine.seconds([partial(ours, weight) for weight in weights]),
        "torch": machine.seconds([partial(theirs, weight) for weight in floats]),
    }
    machine.forget()
    return found
