"""What else multiplies such weights here: torch in float16, tinygemm, gemlite, Marlin. None of them is needed.

What is not here is named with its reason, and nothing is claimed about it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu_checks.machine import Machine
from gpu_checks.store import FAULTS, Json

TINYGEMM_ROWS = 64  # above, tinygemm is ten times slower than float16 and not worth its time
SHOWN = 160  # characters of a reason
Rival = Callable[[Machine, int, int, int, int], list[Callable[[], object]]]  # outputs, inputs, rows, sets -> runs


def here() -> Json:
    """For each rival its version, or why it is missing."""
    out: Json = {name: {"version": f"torch {torch.__version__}"} for name in ("float16", "tinygemm")}
    for name in ("gemlite", "marlin"):
        try:
            module = importlib.import_module(name)
            out[name] = {"version": str(getattr(module, "__version__", "installed"))}
        except FAULTS as error:
            out[name] = {"missing": f"does not import ({_short(error)})"}
    return out


def asked(found: Json, rows: int, bits: int) -> list[str]:
    """The rivals that such a linear is compared with."""
    there = [name for name in RIVALS if "version" in found.get(name, {})]
    if bits != 4:
        return [name for name in there if name == "float16"]
    return [name for name in there if name != "tinygemm" or rows <= TINYGEMM_ROWS]


def timed(machine: Machine, name: str, size: tuple[int, int], rows: int) -> Json:
    """A rival's seconds, or in a sentence why there are none."""
    outputs, inputs = size
    try:
        runs = RIVALS[name](machine, outputs, inputs, rows, machine.sets(outputs * inputs // 2))
        return {"seconds": machine.seconds(runs)}
    except FAULTS as error:
        return {"missing": _short(error)}
    finally:
        machine.forget()


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:SHOWN]


def float16(machine: Machine, outputs: int, inputs: int, rows: int, sets: int) -> list[Callable[[], object]]:
    """torch's own product of float16, which is cuBLAS."""
    x, count = machine.numbers(rows, inputs), max(2, sets // 4)
    weights = [machine.numbers(outputs, inputs) for _ in range(count)]
    return [partial(torch.nn.functional.linear, x, weight) for weight in weights]


def tinygemm(machine: Machine, outputs: int, inputs: int, rows: int, sets: int) -> list[Callable[[], object]]:
    """torch's 4-bit product, in bfloat16, groups of 128."""
    if machine.dry:
        raise NotImplementedError("its weights are packed otherwise on a CPU")
    x = machine.numbers(rows, inputs, dtype=torch.bfloat16)
    q = torch.randint(0, 256, (outputs, inputs // 2), device=machine.device).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(q, 8)
    scales = machine.numbers(inputs // 128, outputs, 2, dtype=torch.bfloat16)
    product = torch.ops.aten._weight_int4pack_mm
    return [partial(product, x, packed.clone(), 128, scales.clone()) for _ in range(sets)]


def gemlite(machine: Machine, outputs: int, inputs: int, rows: int, sets: int) -> list[Callable[[], object]]:
    """gemlite's Triton kernels, where the package is installed."""
    core: Any = importlib.import_module("gemlite.core")
    kind = core.DType.FP16
    x = machine.numbers(rows, inputs)
    runs = []
    for _ in range(sets):
        layer = core.GemLiteLinear(4, 128, inputs, outputs, input_dtype=kind, output_dtype=kind)
        q = torch.randint(0, 16, (outputs, inputs), device=machine.device).to(torch.uint8)
        scales, zeros = (machine.numbers(outputs, inputs // 128) for _ in range(2))
        layer.pack(q, scales, zeros, bias=None)
        runs.append(partial(layer, x))
    return runs


def marlin(machine: Machine, outputs: int, inputs: int, rows: int, sets: int) -> list[Callable[[], object]]:
    """IST's Marlin, where its package is installed: symmetric, groups of 128."""
    module: Any = importlib.import_module("marlin")
    x, out = machine.numbers(rows, inputs), machine.numbers(rows, outputs)
    workspace = torch.zeros(outputs // 128 * 16, dtype=torch.int32, device=machine.device)
    words = [
        torch.randint(-(2**31), 2**31, (inputs // 16, outputs * 2), device=machine.device).to(torch.int32)
        for _ in range(sets)
    ]
    scales = machine.numbers(inputs // 128, outputs)
    return [partial(module.mul, x, word, out, scales, workspace) for word in words]


RIVALS: dict[str, Rival] = {"float16": float16, "tinygemm": tinygemm, "gemlite": gemlite, "marlin": marlin}
