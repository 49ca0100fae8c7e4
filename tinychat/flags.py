"""Flags that several verbs share, each written once, as frozen dataclasses that typer fills."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from tinychat.core import SamplingParams, StoppingParams
from tinychat.errors import UsageError

SIZE = re.compile(r"\d+(\.\d+)?(GiB|MiB|KiB|GB|MB|KB)", re.IGNORECASE)
MOST_THREADS = 1024  # that the CPU kernels take
VERBOSE = "verbose"  # the key in the root context's obj


def _remember_verbose(context: typer.Context, value: bool) -> None:
    if value:
        context.find_root().obj[VERBOSE] = True


Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show the trace of an unexpected error.", callback=_remember_verbose)
]
Images = Annotated[list[str], typer.Option("--image", "-i", metavar="FILE", help="A picture; repeatable.")]
System = Annotated[str | None, typer.Option(help="The system prompt.", show_default="the template's")]
Plain = Annotated[
    bool, typer.Option("--plain", "--no-color", help="Plain text without colours or drawing; NO_COLOR does the same.")
]
Stats = Annotated[bool, typer.Option("--stats", help="Show tokens, speed and times after an answer.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True)
class ModelFlags:
    """Which model, and how it is put into memory."""

    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A model folder or a hub id.", show_default="the embedded model")
    ] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None
    dtype: Annotated[
        str | None,
        typer.Option(help="bf16, fp16 or fp32.", show_default="the checkpoint's, or what the device does well"),
    ] = None
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="a GPU where there is one")
    ] = None
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Spread the layers over GPUs, RAM and disk: auto, balanced, sequential, or a JSON object or file of "
            "modules and devices."
        ),
    ] = None
    max_memory: Annotated[str | None, typer.Option(help="Limits for --device-map, such as 0=10GiB,cpu=30GiB.")] = None
    tp: Annotated[
        int | None,
        typer.Option(
            help="Processes that share the model, each with a GPU of its own.", min=1, max=64, show_default="1"
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of context to hold.", min=1, show_default="4096, or the most that the model can"),
    ] = None
    chunk: Annotated[int, typer.Option(help="Prompt tokens computed at once.", min=1)] = 512
    speculate: Annotated[
        int,
        typer.Option(
            help="Tokens to guess ahead, by what followed the same words before; the answer stays the same.",
            min=0,
            max=15,
            show_default="0, off",
        ),
    ] = 0
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Hold 4-bit weights as floats: faster, at 4 to 8 times their memory.")
    ] = False
    exact: Annotated[
        bool, typer.Option("--exact", help="Keep activations in 32 bits where 4-bit layers run on a CPU: slower.")
    ] = False
    head: Annotated[
        str | None,
        typer.Option(help="A 16-bit head of a 4-bit model: int8, or float to keep it.", show_default="int8"),
    ] = None
    tower: Annotated[
        str | None,
        typer.Option(
            help="A 16-bit vision tower of a 4-bit model on a CPU: int8, or float to keep it.", show_default="int8"
        ),
    ] = None
    kv_cache_dtype: Annotated[
        str, typer.Option(help="Keys and values in memory: int8, half as large as auto's 16 bits, or float.")
    ] = "auto"
    template: Annotated[
        str | None, typer.Option(help="Chat template by name, such as vicuna_v1.", show_default="the checkpoint's")
    ] = None
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", min=1, max=MOST_THREADS, show_default="one a core")
    ] = None

    @property
    def asked(self) -> frozenset[str]:
        """The options that were given and round or keep something: each has to have something to do."""
        given = {"--exact": self.exact, "--head int8": self.head == "int8", "--tower int8": self.tower == "int8"}
        return frozenset(option for option, is_given in given.items() if is_given)


CHECKPOINT_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are drawn and when an answer ends; what is not given comes from the verb's own default."""

    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this total.")] = None
    top_k: Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens; 0 is off.")] = None
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest one.")] = None
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same answer.")] = None
    max_new_tokens: Annotated[int | None, typer.Option(help="End an answer after this many tokens.")] = None
    stop: Annotated[list[str], typer.Option(metavar="TEXT", help="End an answer at this text; repeatable.")] = field(
        default_factory=list
    )

    def __post_init__(self) -> None:
        """Raises UsageError before a model is loaded."""
        self.sampling(SamplingParams())
        self.stopping()

    def sampling(self, base: SamplingParams) -> SamplingParams:
        """`base` with what the flags set; raises UsageError where a value is out of range."""
        names = ("temperature", "top_p", "top_k", "min_p", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(base, **given)

    def stopping(self) -> StoppingParams:
        ends = StoppingParams(stop=tuple(self.stop))
        return ends if self.max_new_tokens is None else replace(ends, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True)
class ChatFlags:
    """The chat's own."""

    image: Images = field(default_factory=list[str])
    system: System = None
    plain: Plain = False
    stats: Stats = False


@dataclass(frozen=True)
class AskFlags:
    """What to ask, and how the answer is given."""

    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="QUESTION | FILE",
            help="The question and its pictures, in any order. - is stdin; a pipe is read without it too, "
            "unless there is a question and the pipe stays silent for a second.",
        ),
    ] = None
    image: Images = field(default_factory=list[str])
    system: System = None
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print the answer as it grows.")] = True
    plain: Plain = False
    stats: Stats = False
    json: AsJson = False
    jsonl: Annotated[
        str | None, typer.Option(metavar="OUT", help="Ask once for each FILE, one JSON line each; resumable.")
    ] = None
    concurrency: Annotated[
        int | None, typer.Option(help="FILES that --jsonl asks about together.", min=1, max=64, show_default="1")
    ] = None

    def __post_init__(self) -> None:
        if self.json and self.jsonl is not None:
            raise UsageError("--json and --jsonl exclude each other", "give one of the two")
        if self.concurrency is not None and self.jsonl is None:
            raise UsageError("--concurrency is for --jsonl, which asks about several files", "leave it out")


@dataclass(frozen=True)
class BenchFlags:
    """What a round of the benchmark does."""

    prompt_tokens: Annotated[int, typer.Option(help="Tokens of text in the prompt.", min=1)] = 512
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 64
    images: Annotated[int, typer.Option(help="Generated pictures in the prompt.", min=0)] = 0
    rounds: Annotated[int, typer.Option(help="Measured rounds, after one that is not.", min=1)] = 3
    depth: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="Decode on contexts of these lengths as well, such as 0,2048,8192."),
    ] = None
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Show where a token's time goes: needs the CPU kernels.")
    ] = False
    json: AsJson = False
    startup: Annotated[bool, typer.Option("--startup", help="Measure how fast the command starts instead.")] = False

    def __post_init__(self) -> None:
        _ = self.depths

    @property
    def depths(self) -> tuple[int, ...]:
        """The contexts of --depth. Raises UsageError."""
        parts = [part.strip() for part in self.depth.split(",")] if self.depth is not None else []
        if not all(part.isdecimal() for part in parts):
            raise UsageError(f"--depth is {self.depth!r}", "give lengths of 0 or more, such as 0,2048,8192")
        return tuple(map(int, parts))


@dataclass(frozen=True)
class EvalFlags:
    """What is measured, on how many questions, and when the result counts as a failure."""

    words: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]", help="The same as --model.")] = None
    tasks: Annotated[
        str | None,
        typer.Option(
            help="What to measure, of demo (questions about generated pictures), ppl (perplexity) and probes "
            "(generated pictures that ask for one ability each), separated by commas.",
            show_default="demo; with --against or --card ppl,probes",
        ),
    ] = None
    per_task: Annotated[int, typer.Option(help="demo: questions of each task and split.", min=1)] = 200
    only: Annotated[list[str], typer.Option(metavar="TASK", help="demo: only this task, such as read; repeatable.")] = (
        field(default_factory=list)
    )
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="The model that MODEL was made from, to compare it with.")
    ] = None
    nearest: Annotated[
        bool | None,
        typer.Option(
            "--nearest/--no-nearest",
            help="Measure BASE rounded to nearest as well.",
            show_default="with --card, where MODEL is quantized",
        ),
    ] = None
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="ppl: a text in UTF-8.", show_default="a small one of ours")
    ] = None
    seqlen: Annotated[
        int | None,
        typer.Option(help="ppl: tokens of a window.", min=2, show_default="2048, or 256 without --text"),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(
            help="Held-out dialogues of each kind, and probes of each kind and size.",
            min=1,
            show_default="64 for demo models, else 16",
        ),
    ] = None
    heldout: Annotated[
        str | None,
        typer.Option(
            help="What to compare and probe on: demo (what the embedded model knows) or plain.",
            show_default="by the model's vocabulary",
        ),
    ] = None
    fail_under: Annotated[
        str | None,
        typer.Option(
            metavar="BOUNDS",
            help="End with code 1 where a figure is worse, such as top1=0.95,kl=0.05,probes=0.8. At least: demo, "
            "probes, top1, unchanged, sqnr; at most: ppl, ppl_ratio, kl, kl99. A number alone is for demo.",
        ),
    ] = None
    card: Annotated[
        bool, typer.Option("--card", help="Write the card into MODEL's folder: quality.json, a part of README.md.")
    ] = False
    plots: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Draw the errors as PNG files; needs the extra plots.")
    ] = None
    json: AsJson = False

    def __post_init__(self) -> None:
        if len(self.words or []) > 1:
            raise UsageError(f"{len(self.words or [])} models are named", "evaluate one at a time")


@dataclass(frozen=True)
class QuantizeFlags:
    """What is quantized, how, on which data, and within which bounds."""

    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A folder or a hub id, in 16 or 32 bits.")] = None
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="The folder to write.")] = None
    method: Annotated[str, typer.Option(help="awq: search what the weights can bear; rtn: round to the nearest.")] = (
        "awq"
    )
    vision: Annotated[
        str,
        typer.Option(
            help="16bit: the vision tower stays; w8a8: 8-bit weights and activations, smoothed on 16 pictures or more."
        ),
    ] = "16bit"
    bits: Annotated[int, typer.Option(help="Bits a weight; other than 4 with --pseudo alone.")] = 4
    group_size: Annotated[int, typer.Option(help="Weights a scale: 32, 64 or 128; -1 is a row.")] = 128
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Without zero points.")] = False
    pseudo: Annotated[
        bool, typer.Option("--pseudo", help="Write 16-bit weights that stand for the quantized ones.")
    ] = False
    calib: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="Calibration data: a .jsonl file, a text file, or a folder of pictures with questions; repeatable.",
            show_default="a set that is generated",
        ),
    ] = field(default_factory=list)
    calib_samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 64
    calib_seqlen: Annotated[int, typer.Option(help="Tokens of each, at most.", min=1)] = 512
    seed: Annotated[int, typer.Option(help="The same seed draws the same data.")] = 0
    template: Annotated[
        str | None, typer.Option(help="Chat template by name, such as vicuna_v1.", show_default="the checkpoint's")
    ] = None
    clip: Annotated[bool, typer.Option("--clip/--no-clip", help="Search ranges as well as scales.")] = True
    duo: Annotated[bool, typer.Option("--duo/--no-duo", help="Weigh the weights' magnitudes too.")] = True
    compensate: Annotated[
        bool, typer.Option("--compensate/--no-compensate", help="Let weights make up for the rounding of others.")
    ] = True
    scale_grid: Annotated[int, typer.Option(help="Scales tried.", min=1)] = 20
    loss_tokens: Annotated[int, typer.Option(help="Tokens that judge a scale.", min=1)] = 2048
    search_results: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Scale and clip as a .pt file of llm-awq's --dump_awq says; search nothing."),
    ] = None
    card: Annotated[
        bool, typer.Option("--card/--no-card", help="Measure the result, and write the quality card into OUT.")
    ] = True
    card_samples: Annotated[
        int | None,
        typer.Option(
            help="Card: held-out dialogues of each kind, and probes of each kind and size.",
            min=1,
            show_default="a quarter of what eval takes: 16 for demo models, else 4",
        ),
    ] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="a GPU where there is one")
    ] = None
    max_ram: Annotated[
        str | None, typer.Option(help="Memory to use, such as 6GiB.", show_default="nine tenths of what is free")
    ] = None
    max_disk: Annotated[str | None, typer.Option(help="Disk to use.", show_default="what is free")] = None
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads. The last bits depend on them: --resume takes as many as before, and no others.",
            min=1,
            show_default="torch decides",
        ),
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and do nothing.")] = False
    resume: Annotated[bool, typer.Option("--resume", help="Go on with work that was cut off.")] = False
    plain: Plain = False
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object an event.")] = False

    def __post_init__(self) -> None:
        if self.model is None or self.out is None:
            raise UsageError("a model and a folder to write are needed", "write tinychat quantize MODEL OUT")


@dataclass(frozen=True)
class ConvertFlags:
    """Which 4-bit checkpoint is written where, and as what."""

    model: Annotated[str | None, typer.Argument(metavar="IN", help="A 4-bit model: a folder or a hub id.")] = None
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="The folder to write.")] = None
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="awq-gemm or compressed-tensors (folders of transformers, for vLLM and SGLang), vila or llm-awq-v2.",
        ),
    ] = None
    scales: Annotated[
        str | None,
        typer.Option(
            help="Store scales as fp16 or bf16, where every one has the value.",
            show_default="fp16 for awq-gemm, else as they are",
        ),
    ] = None
    lm_head_bits: Annotated[
        int | None,
        typer.Option(help="4 or 8: round the head as well; compressed-tensors alone.", show_default="as it is"),
    ] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None
    plain: Plain = False
    json: AsJson = False

    def __post_init__(self) -> None:
        if self.model is None or self.out is None or self.to is None:
            message = "a model, a folder to write and a format are needed"
            raise UsageError(message, "write tinychat convert IN OUT --to FORMAT")
        if self.scales not in (None, "fp16", "bf16"):
            raise UsageError(f"--scales is {self.scales!r}", "give fp16 or bf16")
        if self.lm_head_bits not in (None, 4, 8, 16):
            raise UsageError(f"--lm-head-bits is {self.lm_head_bits}", "give 4, 8 or 16")


@dataclass(frozen=True)
class DoctorFlags:
    """What doctor looks at."""

    json: AsJson = False
    cache: Annotated[bool, typer.Option("--cache", help="Show our cache and its parts only.")] = False
    clear: Annotated[bool, typer.Option("--clear", help="With --cache: delete them.")] = False
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Run every CUDA kernel on this machine's GPU, and check what it gives.")
    ] = False

    def __post_init__(self) -> None:
        if self.clear and not self.cache:
            raise UsageError("--clear is for the cache", "write doctor --cache --clear")
        if self.kernels and self.cache:
            raise UsageError("both --kernels and --cache are given", "give one of the two")


def checkpoint_sampling(generation: Mapping[str, Any]) -> SamplingParams:
    """What a checkpoint's generation_config.json asks for; as in transformers, greedy unless do_sample is set."""
    given = {name: generation[name] for name in CHECKPOINT_SAMPLING if generation.get(name) is not None}
    if generation.get("do_sample"):
        return SamplingParams(**({"temperature": 1.0, "top_k": 50} | given))
    return SamplingParams(repetition_penalty=given.get("repetition_penalty", 1.0))


def parse_size(flag: str, text: str | None) -> int | None:
    """`6GiB` or `500MB` -> bytes. Raises UsageError."""
    if text is None:
        return None
    if not SIZE.fullmatch(text):
        raise UsageError(f"{flag} has the size {text!r}", "write it as 10GiB, 500MB or 64KiB")
    return _bytes(text)


def _bytes(size: str) -> int:
    unit = size.lstrip("0123456789.")
    power = "KMG".index(unit[0].upper()) + 1
    return int(float(size.removesuffix(unit)) * (1024 if "i" in unit.lower() else 1000) ** power)


def parse_device_map(text: str | None) -> str | dict[str, str | int] | None:
    """A word, or a JSON object of modules and devices, or the file that holds one. Raises UsageError."""
    if text is None or text.isalpha():
        return text
    remedy = """give auto, balanced, sequential, or a JSON object such as '{"llm": 0, "": "cpu"}', or its file"""
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--device-map {text!r} cannot be read ({error})", remedy) from error
    if not (isinstance(found, dict) and found and all(type(value) in (str, int) for value in found.values())):
        raise UsageError(f"--device-map {text!r} is no JSON object of modules and devices", remedy)
    return found


def parse_max_memory(text: str | None) -> dict[int | str, int] | None:
    """`0=10GiB,cpu=30GiB` -> bytes of each device; a small b means bytes as well, and not accelerate's bits."""
    if text is None:
        return None
    limits = dict[int | str, int]()
    for item in text.split(","):
        device, equals, size = (part.strip() for part in item.partition("="))
        if not (device and equals and size):
            raise UsageError(f"--max-memory has {item!r}", "write device=size, such as 0=10GiB,cpu=30GiB")
        if not SIZE.fullmatch(size):
            raise UsageError(f"--max-memory has the size {size!r} for {device}", "write it as 10GiB, 500MB or 64KiB")
        if not (device == "cpu" or device.isdecimal()):
            raise UsageError(f"--max-memory has the device {device!r}", "name cpu, or a CUDA device by its number")
        limits[int(device) if device.isdecimal() else device] = _bytes(size)
    return limits


def with_flags(verb: Callable[..., int]) -> Callable[..., int]:
    """`verb` as typer wants it: each parameter, a dataclass of flags, becomes one flag a field; --verbose is added."""
    groups: dict[str, Any] = {name: kind for name, kind in get_type_hints(verb).items() if name != "return"}

    @functools.wraps(verb)
    def command(**given: Any) -> int:
        return verb(**{name: kind(**{f.name: given[f.name] for f in fields(kind)}) for name, kind in groups.items()})

    parameters = [flag for kind in groups.values() for flag in _flags(kind)]
    parameters.append(_keyword("verbose", False, Verbose))
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _flags(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [_keyword(f.name, _default(f), hints[f.name]) for f in fields(kind)]


def _default(of: Field[Any]) -> object:
    return of.default if of.default_factory is MISSING else of.default_factory()


def _keyword(name: str, default: object, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
