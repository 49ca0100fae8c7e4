"""What a rank reads and holds of a checkpoint: its own slices, and never the whole of a tensor that is split."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny import VISION
from rank_pool import Rank
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, CLIPVisionModel

from make_tiny_model import make_tiny_model
from tinychat import load
from tinychat.checkpoint import Index, Weights
from tinychat.errors import ModelError
from tinychat.models.clip import CLIPVisionTransformer
from tinychat.placement import Placement

MAPS = Path("/proc/self/smaps")
ROWS, COLUMNS = 8192, 1024
SLACK = 2**22 + 2**18  # pages around a slice come along, and they may be large


class Copies(TorchDispatchMode):
    """Bytes of every tensor that an operation made, but for those that lie in a mapped file."""

    def __init__(self, mapped: Callable[[int], bool]) -> None:
        super().__init__()
        self.mapped = mapped
        self.sizes: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no address comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not self.mapped(tensor.data_ptr()):
                self._kept.append(tensor)
                self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return result


def spans(path: Path) -> list[tuple[int, int]]:
    """Addresses at which this process has mapped a file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = (line.split()[0].split("-") for line in lines if line.endswith(str(path)))
    return [(int(start, 16), int(end, 16)) for start, end in ends]


def bytes_read(path: Path) -> int:
    """What of a mapped file is in this process's memory."""
    _, *parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", MAPS.read_text(), flags=re.MULTILINE)
    ours = [part for part in parts if part.partition("\n")[0].endswith(str(path))]
    return sum(int(size) * 1024 for part in ours for size in re.findall(r"^Rss: +(\d+) kB", part, re.MULTILINE))


def copies_of(path: Path) -> Copies:
    def mapped(address: int) -> bool:
        return any(start <= address < end for start, end in spans(path))

    return Copies(mapped)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"k": torch.ones(ROWS, COLUMNS)}, path)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.randn(64, 32) for name in "qkv"}, path)
    return path


pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's /proc")


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_slice_of_rows_brings_no_others_into_memory(large: Path, rank: int) -> None:
    weights = Weights(Index.of(large.parent), "", Rank(rank, 4))
    part = weights.get_sharded("k", 0)
    assert part.shape == (ROWS // 4, COLUMNS)
    read = bytes_read(large)
    assert part.nbytes <= read <= part.nbytes + SLACK
    assert weights.get("k").nbytes == 4 * part.nbytes
    assert bytes_read(large) > 3.9 * part.nbytes  # the measure sees what is read


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_slice_is_copied_once(small: Path, dim: int, dtype: torch.dtype | None) -> None:
    weights = Weights(Index.of(small.parent), "", Rank(1, 4), dtype)
    with copies_of(small) as copies:
        part = weights.get_sharded("k", dim)
    assert sum(copies.sizes.values()) == part.nbytes
    with copies_of(small) as copies:
        joined = weights.get_multi_sharded("qkv", dim)
    assert sum(copies.sizes.values()) == joined.nbytes == 3 * part.nbytes
    whole = [Weights(Index.of(small.parent), dtype=dtype).get(name) for name in "qkv"]
    assert torch.equal(joined, torch.cat([tensor.chunk(4, dim)[1] for tensor in whole], dim))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_tower_that_fills_itself_holds_its_share_and_what_is_replicated(tmp_path: Path, size: int) -> None:
    config = CLIPVisionConfig(**{**VISION, "hidden_size": 64, "intermediate_size": 256})
    tensors = {f"tower.{name}": tensor for name, tensor in CLIPVisionModel(config).state_dict().items()}
    save_file(tensors, path := tmp_path / "model.safetensors")
    with copies_of(path) as copies:
        tower = CLIPVisionTransformer("tower", config, Weights(Index.of(tmp_path), group=Rank(size - 1, size)))
    held = sum(parameter.nbytes for parameter in tower.parameters())
    cut = {name for name in tensors if re.search(r"(proj|fc[12])\.weight|[qkv]_proj\.bias|fc1\.bias", name)}
    shares = {name: tensor.nbytes // (size if name in cut else 1) for name, tensor in tensors.items()}
    assert held == sum(shares.values())
    assert held <= sum(copies.sizes.values()) <= 2 * held  # the parameters, and the room that was kept for them
    assert max(copies.sizes.values()) == max(shares.values())


def test_parts_of_different_dtypes_and_shapes(tmp_path: Path) -> None:
    tensors = {"q": torch.ones(4, 2).half(), "k": torch.ones(4, 2), "v": torch.ones(4, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = Weights(Index.of(tmp_path), "", Rank(0, 2))
    assert weights.get_multi_sharded("qk", 0).dtype == torch.float32
    with pytest.raises(ModelError, match=re.escape("q [4, 2], v [4, 3] do not join along dim 0")):
        weights.get_multi_sharded("qv", 0)


@pytest.mark.parametrize("quantize", [None, 32])
def test_a_rank_of_a_shared_decoder_holds_its_share_alone(tmp_path: Path, quantize: int | None) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 512,
        "heads": 4,
        "kv_heads": 4,
    }
    folder = make_tiny_model(tmp_path, "text", quantize=quantize, dtype="float16", **sizes)
    placement = Placement(device="cpu", dtype="float16", head="float")
    with pytest.MonkeyPatch.context() as patch, copies_of(folder / "model.safetensors") as copies:
        patch.setenv("TINYCHAT_BACKEND", "ref")  # weights stay as they were read
        model = load.assemble(load.open_source(folder, Rank(1, 4)), placement)
    held = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    whole = load.open_source(folder).index
    norms = sum(size for name, size in held.items() if "norm" in name)
    assert sum(held.values()) - norms == (whole.total_bytes - norms) // 4
    assert max(copies.sizes.values()) == max(held.values())
    assert sum(copies.sizes.values()) <= 1.1 * sum(held.values())
