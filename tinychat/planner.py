"""Will it fit? The memory that a model and a context need, against what is free, before anything is loaded."""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from tinychat.checkpoint import Index
from tinychat.config import TextConfig, VilaConfig, VisionConfig
from tinychat.engine.engine import CHUNK
from tinychat.errors import CapacityError
from tinychat_kernels.ref import SLICE

GIB = 2**30
CPU = torch.device("cpu")
PACKED = (".qweight", ".qzeros", ".scales", ".weight_scale")  # stay as on disk
WEIGHTS_A_WORD = 8
MARGIN = 0.05  # of the rest, for what is not counted below
CUDA_CONTEXT = 400 * 2**20  # the driver's context and the kernels
CPU_WORKSPACE = 128 * 2**20  # imported libraries and the allocator's slack, as measured
STEP = 256  # contexts are suggested in multiples of this
CGROUPS = {  # the controller's name in /proc/self/cgroup -> its folder, and the files of the limit and of what is used
    "": ("", "memory.max", "memory.current"),  # version 2
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),  # version 1
}
BITS_4 = (4 + 20 / 128) / 8  # bytes a weight at group size 128: the weight, a 16-bit scale and a 4-bit zero a group


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes needed by part, and bytes free. `activations` are those of one chunk, `vision` those of one picture.

    `disk` are the bytes of weights that stay on disk, `where` is one device of several.
    """

    context: int
    weights: int
    kv: int
    activations: int
    vision: int
    margin: int
    free: int
    rows: int = 1
    disk: int = 0
    where: str = ""

    @property
    def total(self) -> int:
        """Encoding a picture and a chunk of the prompt do not happen at once."""
        return self.weights + self.kv + max(self.activations, self.vision) + self.margin

    @property
    def fits(self) -> bool:
        return self.total <= self.free

    @property
    def sentence(self) -> str:
        each = "" if self.rows == 1 else f"{self.rows} x "
        parts = f"weights {_gib(self.weights)}, {each}{self.context} tokens of context {_gib(self.kv)}"
        work = _gib(max(self.activations, self.vision) + self.margin)
        parts += f"; {_gib(self.disk)} stay on disk" if self.disk else ""
        where = f" on {self.where}" if self.where else ""
        return f"{_gib(self.total)} GiB are needed ({parts}, work space {work}), {_gib(self.free)} GiB are free{where}"


@dataclass(frozen=True, slots=True)
class Need:
    """What decides how much memory a context takes: `weights` are bytes, kv_dtype that of keys and values (dtype's).

    `rows` are answered at once, each in a context of its own. `text`: a rank's share of the decoder, where it
    is not the whole one of config.
    """

    config: VilaConfig
    weights: int
    dtype: torch.dtype
    device: torch.device = CPU
    quantized: bool = False
    chunk: int = CHUNK
    kv_dtype: torch.dtype | None = None
    rows: int = 1
    text: TextConfig | None = None

    def plan(self, context: int, free: int) -> Plan:
        text, vision = self.text or self.config.text, self.config.vision
        kv = kv_bytes(text, self.kv_dtype or self.dtype) * context * self.rows
        unpacking = _slice_bytes(text, self.dtype) if self.quantized else 0
        working = _chunk_bytes(text, context, min(self.chunk, context), self.dtype) + unpacking
        tiles = self.config.tiles_per_image
        encoding = tiles * _vision_bytes(vision, self.dtype) if vision is not None else 0
        fixed = CUDA_CONTEXT if self.device.type == "cuda" else CPU_WORKSPACE
        return Plan(
            context, self.weights, kv, working, encoding, fixed + int(MARGIN * (self.weights + kv)), free, self.rows
        )

    def longest(self, below: int, free: int) -> int:
        """The most tokens of context that fit, in whole steps and below a context that does not; 0 where none does."""
        contexts = range(0, below, STEP)
        return (
            max(0, bisect.bisect_right(contexts, free, key=lambda context: self.plan(context, free).total) - 1) * STEP
        )

    def narrowed(self) -> Need:
        """The same in bfloat16, from float32."""
        kept = None if self.kv_dtype == self.dtype else self.kv_dtype
        return replace(self, weights=self.weights // 2, dtype=torch.bfloat16, kv_dtype=kept)


def check(need: Need, context: int, free: int | None = None) -> Plan:
    """The plan, if it fits. Raises CapacityError with one sentence: the figures, and what to change."""
    plan = need.plan(context, free_bytes(need.device) if free is None else free)
    if not plan.fits:
        raise CapacityError(plan.sentence, _remedy(need, plan))
    return plan


def weights_bytes(
    index: Index, dtype: torch.dtype, dequantize: bool = False, held: Mapping[str, int] | None = None
) -> int:
    """Bytes of a checkpoint's tensors once loaded: floats in `dtype`, packed weights and scales as on disk.

    With `dequantize` the packed weights become floats as well, and their scales and zeros go. `held` are the bytes of
    those that are held in some other form.
    """
    if dequantize:
        words = [math.prod(index.shape(name)) for name in index.names() if name.endswith(".qweight")]
        bytewise = [math.prod(index.shape(name)) for name in index.names() if index.dtype(name) == torch.int8]
        weights = sum(words) * WEIGHTS_A_WORD + sum(bytewise)
        return float_bytes(index, dtype) + weights * dtype.itemsize
    others = held or {}
    stay = [index.entry(name).nbytes for name in index.names() if _stays(index, name) and name not in others]
    return float_bytes(index, dtype, others) + sum(stay) + sum(others.values())


def float_bytes(index: Index, dtype: torch.dtype, but: Collection[str] = ()) -> int:
    """Of these, the tensors that take on `dtype`."""
    entries = [index.entry(name) for name in index.names() if not _stays(index, name) and name not in but]
    return sum(entry.nbytes // entry.dtype.itemsize * dtype.itemsize for entry in entries)


def kv_bytes(text: TextConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes, scales included."""
    head = text.head_dim * dtype.itemsize + (torch.float32.itemsize if dtype == torch.int8 else 0)
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head


def free_bytes(device: torch.device) -> int:
    """Memory that a process can still take: on a CPU what the system and its container leave, else the device's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    groups = _text(Path("/proc/self/cgroup"))
    return min([psutil.virtual_memory().available, *_container_room(Path("/sys/fs/cgroup"), groups)])


def _container_room(root: Path, groups: str) -> list[int]:
    """What the limits of the control groups around this process leave, page cache not counted as taken."""
    rooms: list[int] = []
    for line in groups.splitlines():
        _, controller, path = line.split(":", 2)
        if controller in CGROUPS:
            folder, limit, used = CGROUPS[controller]
            own = Path(path.lstrip("/"))
            rooms += [_room(root / folder / part, limit, used) for part in (own, *own.parents)]
    return [room for room in rooms if room >= 0]


def _room(folder: Path, limit_name: str, used_name: str) -> int:
    """What one control group leaves; -1 where it sets no limit."""
    limit, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
    if not (limit.isdecimal() and used.isdecimal()):  # no such file, or "max"
        return -1
    rows = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines())
    given_back = int(rows.get("total_inactive_file") or rows.get("inactive_file", 0))
    return max(0, int(limit) - int(used) + given_back)


def _text(path: Path) -> str:
    """A file of the kernel's, or nothing where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _stays(index: Index, name: str) -> bool:
    return name.endswith(PACKED) or not index.dtype(name).is_floating_point


def _chunk_bytes(text: TextConfig, context: int, tokens: int, dtype: torch.dtype) -> int:
    """Activations of one layer for a chunk: the residual stream, q, k and v, gate and up, the mask, and the logits."""
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    rows = 4 * text.hidden_size + 2 * heads * text.head_dim + 3 * text.intermediate_size
    return tokens * (rows * dtype.itemsize + context * 5) + text.vocab_size * 8


def _slice_bytes(text: TextConfig, dtype: torch.dtype) -> int:
    """The plain torch backend's float copies of a slice of 4-bit weights, as measured: the widest linear's."""
    return SLICE * max(text.intermediate_size, text.hidden_size) * (8 + 4 * dtype.itemsize)


def _vision_bytes(vision: VisionConfig, dtype: torch.dtype) -> int:
    """Activations of one layer of the tower for one picture, with the attention scores of all heads."""
    tokens = vision.num_features + 1
    rows = 6 * vision.hidden_size + 2 * vision.intermediate_size
    pixels = 3 * vision.image_size**2 * 4
    return tokens * (rows + vision.num_attention_heads * tokens) * dtype.itemsize + pixels


def _remedy(need: Need, plan: Plan) -> str:
    """What to change: a shorter context where that suffices, else smaller weights."""
    if fitting := need.longest(plan.context, plan.free):
        return f"try --context {fitting}"
    if need.quantized:
        return "free memory, or take a smaller model"
    if need.dtype == torch.float32 and (advice := _narrower(need.narrowed(), plan)):
        return advice
    smaller = _gib(int(plan.weights / need.dtype.itemsize * BITS_4))
    return f"take a 4-bit checkpoint of this model, whose weights take about {smaller} GiB, or free memory"


def _narrower(need: Need, plan: Plan) -> str:
    """Advice to take bfloat16, with as much context as then fits; nothing where even that does not fit."""
    if need.plan(plan.context, plan.free).fits:
        return f"try --dtype bf16, where the weights take {_gib(need.weights)} GiB"
    fitting = need.longest(plan.context, plan.free)
    return f"try --dtype bf16 --context {fitting}" if fitting else ""


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}" if count >= GIB / 10 else f"{count / GIB:.3f}"
