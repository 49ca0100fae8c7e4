"""Where a check runs: a GPU that is timed by events over CUDA graphs, or for a dry run the emulator on a CPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_checks.store import FAULTS, Json
from tinychat_kernels.cuda_ops import Argument, Grid, Launch

Run = Callable[[], object]
REPLAYS = 15  # timed, of which the median counts
LEAST_SECONDS = 5e-3  # of a replay, so that its ends do not count
MOST_SETS = 48  # of weights that take turns
ROOM = 0.25  # of the free memory, for what takes turns
SEED = 20261121
DRY_OPS = ("norm", "rope_kv")  # of cuda_golden's, in a dry run


@dataclass(frozen=True)
class Machine:
    """A device and its launcher; `dry`: a CPU, where times mean nothing and sizes are tiny."""

    name: str
    device: torch.device
    launch: Launch
    processors: int
    cache_bytes: int
    arch: str
    made_by: str
    dry: bool = False

    @property
    def faults(self) -> tuple[type[Exception], ...]:
        """What a launch, and all around it, may raise."""
        if not self.dry:
            return FAULTS
        from emu.launcher import EmulationError

        return (*FAULTS, EmulationError)

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        """Gaussian ones, made on the device: timing on zeros would flatter."""
        return torch.randn(shape, device=self.device, dtype=dtype)

    def sets(self, size: int) -> int:
        """How many sets of so many bytes have to take turns so that none is found in the cache."""
        if self.dry:
            return 2
        free = torch.cuda.mem_get_info(self.device)[0]
        wanted = -(-3 * self.cache_bytes // max(size, 1)) + 1
        return int(max(2, min(wanted, MOST_SETS, ROOM * free // max(size, 1))))

    def seconds(self, runs: Sequence[Run]) -> float:
        """Seconds of one run, the median over replays of a graph of all of them, one after the other."""
        for run in runs:
            run()
        self.wait()
        if self.dry:
            return self._wall(runs)
        times = max(1, round(LEAST_SECONDS / max(self._events(lambda: [run() for run in runs], 1), 1e-6)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                for run in runs:
                    run()
        graph.replay()
        found = [self._events(graph.replay, 1) for _ in range(REPLAYS)]
        return statistics.median(found) / (times * len(runs))

    def eager(self, run: Run, repeats: int = 10) -> float:
        """Seconds of a run that no graph can hold, launches and waiting included; the median."""
        run()
        found = []
        for _ in range(1 if self.dry else repeats):
            self.wait()
            begun = time.perf_counter()
            run()
            self.wait()
            found.append(time.perf_counter() - begun)
        return statistics.median(found)

    def in_graph(self, unit: str, entry: str, grid: Grid, block: int, shared: int, *args: Argument) -> None:
        """As `launch`, by a CUDA graph that holds this launch alone; the entry has run before."""
        if self.dry:
            return self.launch(unit, entry, grid, block, shared, *args)
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        self.wait()
        with torch.cuda.stream(aside):
            graph.capture_begin()
            self.launch(unit, entry, grid, block, shared, *args)
            graph.capture_end()
        graph.replay()
        return self.wait()

    def wait(self) -> None:
        """Until the device has done everything."""
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Give memory back."""
        if not self.dry:
            gc.collect()
            torch.cuda.empty_cache()

    def _events(self, run: Run, count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    def _wall(self, runs: Sequence[Run]) -> float:
        begun = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - begun) / len(runs)


def gpu_machine() -> Machine:
    """The current GPU. Raises KernelError where the kernels run on none."""
    from tinychat_kernels.cuda_gpu import gpu

    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    found = gpu(index)
    facts: Any = torch.cuda.get_device_properties(index)
    cache = getattr(facts, "L2_cache_size", 64 << 20)
    device = torch.device("cuda", index)
    return Machine(facts.name, device, found, found.processors, cache, found.target.arch, found.made_by)


def dry_machine() -> Machine:
    """The emulator, for a dry run."""
    from emu.launcher import Emulator

    return Machine(
        "emulator", torch.device("cpu"), Emulator().launch, 2, 1 << 20, "sm_80", "the C++ compiler", dry=True
    )


def facts(machine: Machine) -> Json:
    """What results were taken on."""
    import platform
    from importlib.metadata import version

    from tinychat_kernels import cuda_build

    out: Json = {
        "gpu": machine.name,
        "arch": machine.arch,
        "processors": machine.processors,
        "cache_bytes": machine.cache_bytes,
        "compiler": machine.made_by,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "transformers": version("transformers"),
        "system": f"{platform.system()} {platform.machine()}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "build": cuda_build.build_digest(),
        "dry": machine.dry,
    }
    if not machine.dry:
        from tinychat_kernels.cuda_driver import driver

        out["driver_cuda"] = ".".join(map(str, driver().version))
        out["memory_bytes"] = torch.cuda.mem_get_info(machine.device)[1]
    return out


def copy_bandwidth(machine: Machine) -> float:
    """Bytes a second that a copy within the device's memory reads and writes together: what others are parts of."""
    size = 1 << 16 if machine.dry else min(1 << 30, torch.cuda.mem_get_info(machine.device)[0] // 8)
    source, target = (torch.empty(size, dtype=torch.uint8, device=machine.device) for _ in range(2))
    source.random_()
    seconds = machine.seconds([lambda: target.copy_(source)])
    return 2 * size / seconds
