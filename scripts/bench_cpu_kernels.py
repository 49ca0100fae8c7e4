"""Measure the CPU linears against what this machine can do and against torch's, in interleaved rounds.

Every round reads memory, multiplies int8 in registers, and runs each candidate over the linears of some decoder layers
and a head, all of other weights, so that nothing is found in a cache. Ratios of one run's medians are what counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tinychat_kernels import cpu
from tinychat_kernels.cpu import Packed

SHAPES = {  # outputs, inputs of a layer's fused linears, and of the head
    "1b": (((2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632)), (32000, 2048)),
    "3b": (((5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192)), (32000, 3072)),
}
GROUP = 128
MOST_ROWS_WITH_HEAD = 8
PROBE_BYTES = 256 << 20
PROBE_ROUNDS = 200_000
Run = Callable[[], object]


@dataclass(frozen=True)
class Candidate:
    """Something that is timed: what it does, how many bytes it reads and products it computes."""

    name: str
    run: Run
    read: int
    products: int


def random_packed(outputs: int, inputs: int, bits: int) -> Packed:
    """Weights of no meaning; scales are small and finite."""
    size = cpu.packed_size(inputs, outputs, GROUP, bits, torch.float16)
    blocks = cpu.empty(size)
    blocks.copy_(torch.randint(0, 60, (4096,), dtype=torch.uint8).repeat(size // 4096 + 1)[:size])
    return Packed(blocks, inputs, outputs, GROUP, bits, torch.float16)


def ours(weights: list[Packed], rows: int) -> Run:
    """All linears once, called through ctypes with nothing else between them."""
    library, calls, kept = cpu.library(), [], []
    for packed in weights:
        x, y = torch.randn(rows, packed.in_features), torch.empty(rows, packed.out_features)
        kept.append((x, y, packed))
        calls.append((cpu._weights(packed), x.data_ptr(), x.shape[1], rows, y.data_ptr(), y.shape[1], None, 0))

    def run() -> None:
        for call in calls:
            library.tc_linear(*call)
        assert kept

    return run


def torch_int4(shapes: list[tuple[int, int]], rows: int) -> Run:
    """torch's own 4-bit linear for CPUs, group 128, bfloat16 activations."""
    parts = []
    for outputs, inputs in shapes:
        q = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
        scales = torch.rand(inputs // GROUP, outputs, 2).bfloat16() / 100
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 2)
        parts.append((torch.randn(rows, inputs).bfloat16(), packed, scales))
    return lambda: [torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP, s) for x, w, s in parts]


def torch_bf16(shapes: list[tuple[int, int]], rows: int) -> Run:
    parts = [(torch.randn(rows, k).bfloat16(), torch.randn(n, k).bfloat16()) for n, k in shapes]
    return lambda: [torch.nn.functional.linear(x, w) for x, w in parts]


def candidates(shape: str, layers: int, rows: int) -> list[Candidate]:
    """What is compared at so many rows. A prompt's head runs for one row only and is left out there."""
    layer, head = SHAPES[shape]
    linears = [*layer] * layers
    weights = [random_packed(*size, 4) for size in linears]
    if rows <= MOST_ROWS_WITH_HEAD:
        linears, weights = [*linears, head], [*weights, random_packed(*head, 8)]
    products = sum(n * k for n, k in linears) * rows
    weights_read = sum(packed.blocks.numel() for packed in weights)
    return [
        Candidate("ours", ours(weights, rows), weights_read, products),
        Candidate("torch int4pack", torch_int4(linears, rows), products // rows * 17 // 32, products),
        Candidate("torch bf16", torch_bf16(linears, rows), products // rows * 2, products),
    ]


def probes() -> list[Candidate]:
    memory = cpu.empty(PROBE_BYTES)
    memory.fill_(1)
    library = cpu.library()
    done = library.tc_products(PROBE_ROUNDS)
    return [
        Candidate("read", lambda: library.tc_read(memory.data_ptr(), PROBE_BYTES), PROBE_BYTES, 0),
        Candidate("int8 peak", lambda: library.tc_products(PROBE_ROUNDS), 0, done),
    ]


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(entries: list[Candidate], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, by round; the order turns from round to round."""
    for entry in entries:
        entry.run()
    times: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for i in range(rounds):
        turn = i % len(entries)
        for entry in entries[turn:] + entries[:turn]:
            times[entry.name].append(seconds(entry.run))
    return times


def row(entry: Candidate, times: dict[str, list[float]], all_of: list[Candidate]) -> dict[str, float | str]:
    """Median figures, and medians of the ratios within each round."""
    mine = times[entry.name]
    by_name = {other.name: other for other in all_of}

    def ratio(other: str, of: Callable[[Candidate], int]) -> float:
        theirs = zip(mine, times[other], strict=True)
        return statistics.median(
            of(entry) / t * u / of(by_name[other]) if of(entry) and of(by_name[other]) else 0.0 for t, u in theirs
        )

    return {
        "name": entry.name,
        "ms": statistics.median(mine) * 1e3,
        "gb_s": entry.read / statistics.median(mine) / 1e9,
        "of_read": ratio("read", lambda e: e.read),
        "gop_s": 2 * entry.products / statistics.median(mine) / 1e9,
        "of_peak": ratio("int8 peak", lambda e: e.products),
        "speed_of_ours": statistics.median(o / t for o, t in zip(times["ours"], mine, strict=True)),
    }


def show(rows: int, table: list[dict[str, float | str]]) -> None:
    print(f"{rows} rows")
    for line in table:
        print(
            f"  {line['name']:<15}{line['ms']:9.2f} ms {line['gb_s']:7.1f} GB/s = {line['of_read']:.2f} of reading"
            f"{line['gop_s']:8.0f} GOP/s = {line['of_peak']:.2f} of the peak   {line['speed_of_ours']:.2f} x ours"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 32, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--isa", choices=cpu.ISAS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cpu.set_threads(arguments.threads)
    torch.set_num_threads(cpu.threads())
    name = cpu_name()
    results = {}
    with cpu.use_isa(arguments.isa or cpu.isa()):
        print(
            f"{name}, {cpu.available()[1]}, {arguments.layers} layers of {arguments.shape}, {arguments.rounds} rounds"
        )
        for rows in arguments.rows:
            entries = [*candidates(arguments.shape, arguments.layers, rows), *probes()]
            times = measure(entries, arguments.rounds)
            results[rows] = [row(entry, times, entries) for entry in entries]
            show(rows, results[rows])
    if arguments.json:
        arguments.json.write_text(json.dumps({"cpu": name, "run": vars(arguments) | {"json": None}, "rows": results}))


if __name__ == "__main__":
    main()
