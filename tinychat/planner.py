"""Will it fit? The memory that a model and a context need, against what is free, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from tinychat.checkpoint import Index
from tinychat.config import TextConfig, VilaConfig, VisionConfig
from tinychat.errors import CapacityError
from tinychat_kernels.ref import SLICE

GIB = 2**30
CHUNK = 512  # tokens of a prefill chunk
PACKED = (".qweight", ".qzeros", ".scales")  # stay as on disk
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
    """Bytes needed by part, and bytes free. `activations` are those of one chunk, `vision` those of one picture."""

    context: int
    weights: int
    kv: int
    activations: int
    vision: int
    margin: int
    free: int

    @property
    def total(self) -> int:
        """Encoding a picture and a chunk of the prompt do not happen at once."""
        return self.weights + self.kv + max(self.activations, self.vision) + self.margin

    @property
    def fits(self) -> bool:
        return self.total <= self.free

    @property
    def sentence(self) -> str:
        parts = f"weights {_gib(self.weights)}, {self.context} tokens of context {_gib(self.kv)}"
        work = _gib(max(self.activations, self.vision) + self.margin)
        return f"{_gib(self.total)} GiB are needed ({parts}, work space {work}), {_gib(self.free)} GiB are free"


def check(
    config: VilaConfig,
    context: int,
    *,
    weights_bytes: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    free: int | None = None,
    quantized: bool = False,
) -> Plan:
    """The plan, if it fits. Raises CapacityError with one sentence: the figures, and what to change."""
    where = torch.device(device)
    working = _chunk_bytes(config.text, context, dtype) + (_slice_bytes(config.text, dtype) if quantized else 0)
    plan = _plan(config, context, weights_bytes, working, dtype, where, free_bytes(where) if free is None else free)
    if not plan.fits:
        raise CapacityError(plan.sentence, _remedy(plan, config.text, dtype, quantized))
    return plan


def weights_bytes(index: Index, dtype: torch.dtype, dequantize: bool = False) -> int:
    """Bytes of a checkpoint's tensors once loaded: floats in `dtype`, packed weights and scales as on disk.

    With `dequantize` the packed weights become floats as well, and their scales and zeros go.
    """
    if dequantize:
        words = sum(math.prod(index.shape(name)) for name in index.names() if name.endswith(".qweight"))
        return float_bytes(index, dtype) + words * WEIGHTS_A_WORD * dtype.itemsize
    return float_bytes(index, dtype) + sum(index.entry(name).nbytes for name in index.names() if _stays(index, name))


def float_bytes(index: Index, dtype: torch.dtype) -> int:
    """Of these, the tensors that take on `dtype`."""
    entries = [index.entry(name) for name in index.names() if not _stays(index, name)]
    return sum(entry.nbytes // entry.dtype.itemsize * dtype.itemsize for entry in entries)


def kv_bytes(text: TextConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes."""
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * dtype.itemsize


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


def _plan(
    config: VilaConfig, context: int, held: int, working: int, dtype: torch.dtype, device: torch.device, free: int
) -> Plan:
    kv = kv_bytes(config.text, dtype) * context
    encoding = _vision_bytes(config.vision, dtype) if config.vision is not None else 0
    fixed = CUDA_CONTEXT if device.type == "cuda" else CPU_WORKSPACE
    return Plan(context, held, kv, working, encoding, fixed + int(MARGIN * (held + kv)), free)


def _chunk_bytes(text: TextConfig, context: int, dtype: torch.dtype) -> int:
    """Activations of one layer for a chunk: the residual stream, q, k and v, gate and up, the mask, and the logits."""
    tokens = min(CHUNK, context)
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


def _remedy(plan: Plan, text: TextConfig, dtype: torch.dtype, quantized: bool) -> str:
    """What to change: a shorter context where that suffices, else smaller weights."""
    spare = plan.free - (plan.total - plan.kv - int(MARGIN * plan.kv))
    fitting = int(spare / (kv_bytes(text, dtype) * (1 + MARGIN))) // STEP * STEP
    if fitting > 0:
        return f"try --context {fitting}"
    if dtype == torch.float32:
        return f"try --dtype bf16, where the weights take {_gib(plan.weights // 2)} GiB"
    if not quantized:
        smaller = _gib(int(plan.weights / dtype.itemsize * BITS_4))
        return f"take a 4-bit checkpoint of this model, whose weights take about {smaller} GiB, or free memory"
    return "free memory, or take a smaller model"


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}" if count >= GIB / 10 else f"{count / GIB:.3f}"
