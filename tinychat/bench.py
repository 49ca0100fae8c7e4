"""`tinychat bench`: tokens a second, time to the first token and memory of any model; --startup times the command."""

from __future__ import annotations

import io
import itertools
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tinychat import __version__
from tinychat.ask import as_error, last
from tinychat.core import Event, Failed, Finished, Image, Request, StoppingParams, Text
from tinychat.core import Token as TokenEvent
from tinychat.errors import UsageError

if TYPE_CHECKING:
    from tinychat.flags import BenchFlags, ModelFlags

Json = dict[str, Any]

SCHEMA = "tinychat.bench/1"
CONTEXT = 4096  # what the engine takes by itself
SPARE = 16  # tokens that a raw prompt may have on top of its text
SENTENCE = "the small red circle is left of a large blue square and three green stars stand above them"
PICTURE_SIZE = (640, 480)
PROCESS_STATUS = Path("/proc/self/status")
METRICS = {  # name in Timings -> the row of the table
    "prefill_tps": "prefill, tokens/s",
    "decode_tps": "decode, tokens/s",
    "ttft_s": "first token, s",
    "image_s": "  read pictures, s",
    "vision_s": "  vision tower, s",
    "prefill_s": "  prefill, s",
}
STARTUP = {
    "python_s": ("python -c pass", ("-c", "pass")),
    "import_s": ("import tinychat", ("-c", "import tinychat")),
    "help_s": ("tinychat --help", ("-m", "tinychat", "--help")),
}


class Engine(Protocol):
    """The part of the engine that is measured."""

    def run(self, requests: Iterable[Request]) -> Iterable[Event]: ...

    def reset(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Workload:
    """What one round does: about `prompt_tokens` tokens of text, the pictures' own on top, and `new_tokens` drawn.

    After them, as many decode `new_tokens` behind `depths` tokens each; `breakdown` measures the stages of more.
    """

    prompt_tokens: int = 512
    new_tokens: int = 64
    images: int = 0
    rounds: int = 3
    depths: tuple[int, ...] = ()
    breakdown: bool = False


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: the name the user gave, the model (for its device and dtype), and the parts that run it."""

    name: str
    model: Any
    processor: Callable[[Request], Any]
    engine: Engine


def measure(subject: Subject, work: Workload, report: Callable[[str], None]) -> Json:
    """One unmeasured round, then `work.rounds`, each with an empty cache and new pictures; as docs/json.md has it."""
    text = prompt_text(subject.processor, work.prompt_tokens)
    rounds = list[Finished]()
    for number in range(work.rounds + 1):
        report(f"round {number} of {work.rounds}" if number else "warm-up")
        rounds.append(_round(subject.engine, request(text, work, number)))
    found = _result(subject, work, rounds[1:])
    found["depths"] = [_at_depth(subject, work, depth, report) for depth in work.depths]
    return found | (_breakdown(subject, work, text, report) if work.breakdown else {"breakdown": [], "encode": []})


def roomy(model: ModelFlags, flags: BenchFlags) -> ModelFlags:
    """The model's flags with a context that holds the deepest of --depth and its answer.

    Raises UsageError for a --depth that the model, or the --context given, does not hold.
    """
    if not flags.depths:
        return model
    from tinychat import config, load

    needed = max(flags.depths) + flags.new_tokens
    read = config.read_config(load.resolve(model.model, model.revision))
    room, most = load.choose_context(read, model.context), load.longest_context(read)
    if model.context is None and needed + SPARE > room:
        room = needed + SPARE if most is None else min(needed + SPARE, most)
    if needed > room:
        message = (
            f"--depth {max(flags.depths)} and {flags.new_tokens} new tokens make {needed}, the context holds {room}"
        )
        more = "" if model.context is None else ", or raise --context"
        raise UsageError(message, f"give a --depth of {max(room - flags.new_tokens, 0)} or less{more}")
    return replace(model, context=room if room > CONTEXT else model.context)


def _at_depth(subject: Subject, work: Workload, depth: int, report: Callable[[str], None]) -> Json:
    """Decoding after a prompt of about `depth` tokens, which only the unmeasured first round computes."""
    text = prompt_text(subject.processor, depth)
    stopping = StoppingParams(max_new_tokens=work.new_tokens, ignore_eos=True)
    subject.engine.reset()
    speeds = list[float]()
    for number in range(work.rounds + 1):
        report(f"depth {depth}, " + (f"round {number} of {work.rounds}" if number else "warm-up"))
        asked = Request(f"depth-{depth}-{number}", parts=(Text(text),), stopping=stopping)
        speeds.append(_finished(subject.engine.run([asked])).timings.decode_tps)
    return {"tokens": depth, "decode_tps": spread(speeds[1:])}


def _breakdown(subject: Subject, work: Workload, text: str, report: Callable[[str], None]) -> Json:
    """Seconds of each stage of the decoder for a prompt and for a token, and of the tower for a picture: medians.

    Raises UsageError without the kernels.
    """
    decoder = getattr(subject.model, "one_call", None)
    if decoder is None or not hasattr(decoder.kernel, "start_profile"):
        raise UsageError(
            f"--breakdown reads the CPU kernels' clock, and {subject.name} runs on {backend_of(subject.model)}"
            + "".join(f", its {name} by modules, since {why}" for name, why in _obstacles(subject.model).items()),
            "take a 4-bit model on a CPU; `tinychat doctor` says whether the kernels run here",
        )
    tower = getattr(getattr(subject.model, "vision_tower", None), "one_call", None) if work.images else None
    kernels = [part.kernel for part in (decoder, tower) if part is not None]
    rounds = list[Json]()
    for number in range(1, work.rounds + 1):
        report(f"breakdown, round {number} of {work.rounds}")
        rounds.append(_profiled(subject.engine, kernels, request(text, work, work.rounds + number)))
    return {
        "breakdown": _medians([once["breakdown"] for once in rounds]),
        "encode": _medians([once["encode"] for once in rounds]),
    }


def _profiled(engine: Engine, kernels: Sequence[Any], asked: Request) -> Json:
    """The stages of one request: the decoder's, and the tower's where its kernel comes second."""
    engine.reset()
    for kernel in kernels:
        kernel.start_profile()
    prompt, end = dict[str, float](), None
    for event in engine.run([asked]):
        if isinstance(event, TokenEvent) and not prompt:
            prompt = kernels[0].profile()
        end = event
    if isinstance(end, Failed):
        raise as_error(end)
    assert isinstance(end, Finished)
    whole, tokens = kernels[0].profile(), max(end.usage.completion_tokens - 1, 1)
    stages = [
        {"stage": stage, "prefill_s": prompt[stage], "decode_s": (whole[stage] - prompt[stage]) / tokens}
        for stage in whole
    ]
    spent = kernels[1].profile() if len(kernels) > 1 else {}
    images = sum(isinstance(part, Image) for part in asked.parts)
    return {"breakdown": stages, "encode": _encode_stages(spent, end.timings.vision_s, images)}


def _medians(rounds: Sequence[Sequence[Json]]) -> list[Json]:
    """Stage by stage, the median of each of its figures."""
    return [
        {key: one[0][key] if key == "stage" else statistics.median(stage[key] for stage in one) for key in one[0]}
        for one in zip(*rounds, strict=True)
    ]


def _encode_stages(spent: Json, vision_s: float, images: int) -> list[Json]:
    """A picture's part of each stage of the tower; what is left of its time is the projector's."""
    if not spent:
        return []
    every = {**spent, "projector": max(vision_s - sum(spent.values()), 0.0)}
    return [{"stage": stage, "seconds": seconds / images} for stage, seconds in every.items()]


def backend_of(model: Any) -> str:
    """What computes the 4-bit linears of a model."""
    from tinychat.layers.linear import QuantLinear
    from tinychat_kernels import cpu, cuda, cuda_layout

    held = {type(module.packed) for module in model.modules() if isinstance(module, QuantLinear)}
    if not held:
        return "torch"
    for kind, backend in ((cpu.Packed, cpu), (cuda_layout.Packed, cuda)):
        if held == {kind}:
            return f"{backend.__name__.rpartition('.')[2]}, {backend.available()[1]}"
    return "ref"


def _threads(model: Any) -> int:
    """Threads that compute on the CPU: the kernels' where they run, else torch's."""
    import torch

    from tinychat_kernels import cpu

    return cpu.threads() if backend_of(model).startswith("cpu") else torch.get_num_threads()


def _obstacles(model: Any) -> dict[str, str]:
    """Why parts of a model run module by module, and not in one call of the kernels, by their names."""
    from tinychat_kernels import registry

    parts = {"decoder": model, "vision tower": getattr(model, "vision_tower", None)}
    found = {name: str(part.obstacle) for name, part in parts.items() if getattr(part, "obstacle", None)}
    fallen = registry.why_not(model.device.type) if found and backend_of(model) == "ref" else None
    return dict.fromkeys(found, fallen) if fallen else found


def request(text: str, work: Workload, number: int) -> Request:
    """A raw prompt of that round's pictures and the text, with exactly `work.new_tokens` to draw."""
    pictures = (Image(data=picture(number * work.images + index)) for index in range(work.images))
    stopping = StoppingParams(max_new_tokens=work.new_tokens, ignore_eos=True)
    return Request(f"bench-{number}", parts=(*pictures, Text(text)), stopping=stopping)


def _round(engine: Engine, request: Request) -> Finished:
    engine.reset()
    return _finished(engine.run([request]))


def _finished(events: Iterable[Event]) -> Finished:
    """The end of an answer. Raises the error that it failed with."""
    end = last(events)
    if isinstance(end, Failed):
        raise as_error(end)
    return end


def prompt_text(processor: Callable[[Request], Any], tokens: int) -> str:
    """The longest run of SENTENCE's words that makes at most `tokens` tokens, and at least one word."""
    low, high = 1, max(tokens, 1)  # words: every word makes a token or more
    while low < high:
        middle = (low + high + 1) // 2
        prompt = processor(Request("bench", parts=(Text(_words(middle)),)))
        low, high = (middle, high) if len(prompt.ids) <= tokens else (low, middle - 1)
    return _words(low)


def _words(count: int) -> str:
    return " ".join(itertools.islice(itertools.cycle(SENTENCE.split()), count))


def picture(seed: int) -> bytes:
    """A JPEG of coloured boxes, a different one for each seed."""
    from PIL import Image as Pictures
    from PIL import ImageDraw

    draw = random.Random(seed)
    canvas = Pictures.new("RGB", PICTURE_SIZE, _colour(draw))
    for _ in range(12):
        xs, ys = (sorted(draw.sample(range(side), 2)) for side in PICTURE_SIZE)
        ImageDraw.Draw(canvas).rectangle((xs[0], ys[0], xs[1], ys[1]), fill=_colour(draw))
    out = io.BytesIO()
    canvas.save(out, "JPEG", quality=90)
    return out.getvalue()


def _colour(draw: random.Random) -> tuple[int, int, int]:
    return draw.randrange(256), draw.randrange(256), draw.randrange(256)


def _result(subject: Subject, work: Workload, rounds: Sequence[Finished]) -> Json:
    import torch

    from tinychat import doctor

    usage = rounds[0].usage
    return {
        "schema": SCHEMA,
        "model": subject.name,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "device": str(subject.model.device),
        "threads": _threads(subject.model),
        "ranks": _ranks(subject.model),
        "cpu": doctor.cpu()["name"],
        "backend": backend_of(subject.model),
        "obstacles": _obstacles(subject.model),
        "kv_cache_dtype": str(getattr(subject.model, "cache_dtype", subject.model.dtype)).removeprefix("torch."),
        "versions": {"tinychat": __version__, "torch": torch.__version__},
        "prompt_tokens": usage.prompt_tokens,
        "image_tokens": usage.image_tokens,
        "new_tokens": usage.completion_tokens,
        "images": work.images,
        "rounds": work.rounds,
        "load_s": rounds[0].timings.load_s,
        **{name: spread([getattr(end.timings, name) for end in rounds]) for name in METRICS},
        "peak_memory": {"ram_bytes": peak_ram(), "cuda_bytes": _peak_cuda(torch, subject.model.device)},
    }


def _ranks(model: Any) -> int:
    """Processes that share the model."""
    return model.llm.share.group.size() if hasattr(model, "llm") else 1


def spread(values: Sequence[float]) -> Json:
    """The median of the rounds, and how far they lie apart."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def peak_ram() -> int:
    """The most bytes of RAM that this process has held, loading included.

    getrusage is the second choice: on Linux it begins with what the parent held when it started this process.
    """
    if PROCESS_STATUS.exists():
        lines = PROCESS_STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_cuda(torch: Any, device: Any) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def startup(rounds: int) -> Json:
    """Wall time of a new Python that does nothing, imports us, or prints our help."""
    times = {name: spread(_times(arguments, rounds)) for name, (_, arguments) in STARTUP.items()}
    return {"schema": SCHEMA, "versions": {"tinychat": __version__}, "rounds": rounds, "startup": times}


def _times(arguments: Sequence[str], rounds: int) -> list[float]:
    return [_time([sys.executable, *arguments]) for _ in range(rounds + 1)][1:]


def _time(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def rows(found: Json) -> list[tuple[str, ...]]:
    """The table of a result: a head, then one row for each metric."""
    times = {label: found["startup"][name] for name, (label, _) in STARTUP.items()} if "startup" in found else {}
    times |= {label: found[name] for name, label in METRICS.items() if name in found}
    times |= {f"decode after {at['tokens']}, tokens/s": at["decode_tps"] for at in found.get("depths", ())}
    cells = [(label, *(_number(value[key]) for key in ("median", "min", "max"))) for label, value in times.items()]
    return [("", "median", "min", "max"), *cells]


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def stage_rows(found: Json) -> list[tuple[str, ...]]:
    """The table of a breakdown: microseconds and shares; nothing where there is none."""
    stages = found.get("breakdown") or []
    if not stages:
        return []
    totals = {key: sum(stage[key] for stage in stages) for key in ("prefill_s", "decode_s")}
    rows = [
        (stage["stage"], *(cell for key, total in totals.items() for cell in _share(stage[key], total)))
        for stage in [*stages, {"stage": "all", **totals}]
    ]
    prompt = f"prompt of {found['prompt_tokens']}, us"
    return [(f"median of {found['rounds']}", prompt, "%", "token after it, us", "%"), *rows]


def encode_rows(found: Json) -> list[tuple[str, ...]]:
    """The table of a picture's way through tower and projector; nothing where the kernels have no part in it."""
    stages = found.get("encode") or []
    if not stages:
        return []
    total = sum(stage["seconds"] for stage in stages)
    rows = [
        (stage["stage"], *_share(stage["seconds"], total)) for stage in [*stages, {"stage": "all", "seconds": total}]
    ]
    return [("stage", "picture, us", "%"), *rows]


def _share(seconds: float, total: float) -> tuple[str, str]:
    return _number(seconds * 1e6), f"{100 * seconds / total:.1f}" if total else ""


def headline(found: Json) -> str:
    """What was measured, in one line; a model's name may be a path with anything in it."""
    from tinychat.terminal.clean import clean_line

    if "startup" in found:
        return f"tinychat {found['versions']['tinychat']}, {found['rounds']} rounds, seconds"
    shared = "" if found["ranks"] == 1 else f"{found['ranks']} ranks of "
    return clean_line(
        f"{found['model']}, {found['dtype']} on {found['device']}, {shared}{found['threads']} threads, {found['cpu']}; "
        f"backend {found['backend']}; keys and values {found['kv_cache_dtype']}; "
        f"{found['prompt_tokens']} prompt tokens ({found['image_tokens']} of {found['images']} pictures), "
        f"{found['new_tokens']} new tokens, {found['rounds']} rounds"
    )


def foot(found: Json) -> str:
    """What does not vary with the rounds, in one line; nothing of --startup."""
    from tinychat.doctor import size

    if "startup" in found:
        return ""
    peak = found["peak_memory"]
    cuda = "" if peak["cuda_bytes"] is None else f", CUDA {size(peak['cuda_bytes'])}"
    slower = "".join(f"; {name} by modules, since {why}" for name, why in found["obstacles"].items())
    return f"peak memory: RAM {size(peak['ram_bytes'])}{cuda}; loaded in {found['load_s']:.1f} s{slower}"
