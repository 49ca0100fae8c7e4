"""Stage correctness: every op beside float64, the same bits twice, in a CUDA graph, and whole steps beside others.

Sizes are drawn at random, the same ones for the same SEED; each op's result names the worst of its cases.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from functools import partial

import torch

from gpu_checks import compiling, decoding, embedded
from gpu_checks.decoders import random_packed
from gpu_checks.machine import DRY_OPS, SEED, Machine
from gpu_checks.random_ops import RANDOM, Case, Sizes
from gpu_checks.store import Json, Store
from tinychat_kernels import autoawq, cuda, cuda_golden
from tinychat_kernels.cuda_golden import CASES, Place
from tinychat_kernels.int8 import quantize_rows

STAGE = "correctness"
SEEDS, DRY_SEEDS = 3, 1
REPEATS, SECONDS = 40, 6.0  # cases of an op, at most
COMPILE_SECONDS = 300.0
AUTOAWQ_BOUND = 5e-3


def run(machine: Machine, store: Store) -> None:
    """Everything that is right or wrong."""
    if not machine.dry:
        store.get(STAGE, "compile", lambda: compiling.compile_all(machine), COMPILE_SECONDS)
    for dtype in dtypes(machine):
        name = str(dtype).removeprefix("torch.")
        for op in DRY_OPS if machine.dry else CASES:
            store.get(STAGE, f"golden {op} {name}", partial(golden, machine, op, dtype))
        for op in RANDOM:
            store.get(STAGE, f"random {op} {name}", partial(at_random, machine, op, dtype))
    store.get(STAGE, "the same bits twice", lambda: same_bits(machine))
    store.get(STAGE, "opcheck", lambda: opcheck(machine))
    store.get(STAGE, "autoawq", lambda: of_autoawq(machine))
    for name, check in decoding.CHECKS.items():
        store.get(STAGE, name, partial(check, machine))
    store.get(STAGE, "the embedded model", lambda: embedded.answers(machine))
    store.get(STAGE, "the embedded model, parts in RAM and on disk", lambda: embedded.answers(machine, spread=True))


def dtypes(machine: Machine) -> list[torch.dtype]:
    """float16, and bfloat16 where the GPU has it."""
    if machine.dry:
        return [torch.float16]
    return [dtype for dtype in cuda.DTYPES if cuda.obstacle(dtype, machine.device) is None]


def golden(machine: Machine, op: str, dtype: torch.dtype) -> Json:
    """An op's table of cases over several seeds, by launches and in CUDA graphs: both give the same bits."""
    worst, said = 0.0, ""
    for seed in range(DRY_SEEDS if machine.dry else SEEDS):
        place = Place(machine.launch, machine.device, dtype, machine.processors, seed)
        (found,) = cuda_golden.results(place, (op,))
        if not found.right:
            return verdict(False, found.error or f"seed {seed}: {found.case} is off by {found.worst:.1e}")
        (again,) = cuda_golden.results(replace(place, launch=machine.in_graph), (op,))
        if again != found:
            return verdict(False, f"seed {seed}: in a CUDA graph, {again.error or again.case} is off by {again.worst}")
        if found.worst >= worst:
            worst, said = found.worst, f"off by {found.worst:.1e} at most ({found.case}), the same in CUDA graphs"
    return verdict(True, said)


def at_random(machine: Machine, op: str, dtype: torch.dtype) -> Json:
    """An op on random sizes: as many as there is time for."""
    cases: list[Case] = []
    draw, until = random.Random(f"{SEED} {op}"), time.monotonic() + SECONDS
    while len(cases) < (2 if machine.dry else REPEATS) and time.monotonic() < until:
        place = Place(machine.launch, machine.device, dtype, machine.processors, draw.randrange(1 << 20))
        sizes = Sizes(draw, machine.dry)
        try:
            case, error, bound = RANDOM[op](place, sizes)
        except machine.faults as reason:
            return verdict(False, f"with the sizes {sizes.drawn}: {type(reason).__name__}: {reason}")
        if not error <= bound:
            return verdict(False, f"{case} is off by {error:.1e}; {bound:.0e} is allowed")
        cases.append((case, error, bound))
    case, error, _ = max(cases, key=lambda found: found[1] / max(found[2], 1e-12))
    return verdict(True, f"{len(cases)} cases, off by {error:.1e} at most ({case})")


def same_bits(machine: Machine) -> Json:
    """The same inputs give the same bits: what moves is a race."""
    sizes = [(1, 4096, 4096), (8, 14336, 4096), (16, 4096, 14336), (100, 4096, 4096)]
    for rows, inputs, outputs in [(1, 256, 256), (9, 256, 136)] if machine.dry else sizes:
        packed, x = random_packed(machine, outputs, inputs), machine.numbers(rows, inputs)
        found = []
        for _ in range(2 if machine.dry else 20):
            out = x.new_full((rows, outputs), float("nan"))
            cuda.launch_linear(machine.launch, x, packed, None, out, machine.processors)
            found.append(out)
        if not bool(found[0].isfinite().all()) or float(found[0].abs().max()) == 0:
            return verdict(False, f"{rows}x{inputs}x{outputs} gives no numbers")
        if any(not torch.equal(found[0], other) for other in found[1:]):
            return verdict(False, f"{rows}x{inputs}x{outputs} gives other bits on the same inputs")
    return verdict(True, f"{len(sizes)} shapes")


def opcheck(machine: Machine) -> Json:
    """torch's own checks of the ops that it knows: schema, fake, and compilation."""
    from tinychat_kernels import cuda_library

    packed = random_packed(machine, 272, 256)
    weight = quantize_rows(machine.numbers(272, 256).float())
    for rows in (1, 9):
        x = machine.numbers(rows, 256)
        sizes = packed.inputs, packed.outputs, packed.group, packed.scale
        torch.library.opcheck(cuda_library.linear, (x, packed.words, packed.scales, None, *sizes))
        torch.library.opcheck(cuda_library.int8_linear, (x, *weight, None, "gelu"))
    return verdict(True, "tinychat::linear, tinychat::int8_linear")


def of_autoawq(machine: Machine) -> Json:
    """AutoAWQ's kernels through our backend, where the package is installed."""
    from tinychat_kernels.layout import QuantSpec, dequantize, from_logical, quantize

    there, reason = autoawq.available()
    if not there:
        return {"missing": reason}
    spec, worst = QuantSpec(), 0.0
    for rows, inputs, outputs in ((1, 4096, 4096), (8, 4096, 14336), (40, 14336, 4096)):
        weight = quantize((torch.randn(outputs, inputs) / 16).half(), spec)
        words = from_logical(weight, spec)
        packed = type(words)(*(part.to(machine.device) for part in words))
        x = machine.numbers(rows, inputs)
        exact = x.double() @ dequantize(weight, torch.float64).to(machine.device).T
        error = cuda_golden.relative(autoawq.w4_linear(x, packed, spec), exact)
        worst = max(worst, error)
        if not error <= AUTOAWQ_BOUND:
            return verdict(False, f"{rows}x{inputs}x{outputs} is off by {error:.1e}")
    return verdict(True, f"off by {worst:.1e} at most")


def verdict(right: bool, said: str) -> Json:
    return {"right": right, "said": said}
