"""Indexes, names and streaming: against what safetensors and transformers themselves write."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rank_pool import Rank
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tinychat import checkpoint
from tinychat.checkpoint import Index, Weights, compare, open_model, rename, stream_into, write_safetensors
from tinychat.errors import FormatError, ModelError
from tinychat.weight_files import DTYPES, entries_of

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
DECODER_NAMES = re.compile(
    r"llm\.(lm_head\.weight|model\.(embed_tokens|norm)\.weight"
    r"|model\.layers\.\d+\.(input_layernorm|post_attention_layernorm)\.weight"
    r"|model\.layers\.\d+\.self_attn\.[qkvo]_proj\.(weight|bias)|model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight)"
)
TOWER_NAMES = re.compile(
    r"vision_tower\.vision_model\.(embeddings\.(class_embedding|patch_embedding\.(weight|bias)|position_embedding\.weight)"
    r"|(pre_layrnorm|post_layernorm)\.(weight|bias)"
    r"|encoder\.layers\.\d+\.(layer_norm[12]|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.(weight|bias))"
)
PROJECTOR_NAMES = re.compile(r"mm_projector\.layers\.\d+\.(weight|bias)")


def ours(name: str) -> bool:
    return any(kind.fullmatch(name) for kind in (DECODER_NAMES, TOWER_NAMES, PROJECTOR_NAMES))


class Small(nn.Module):
    """A decoder of two tensors, tied or not, and a norm."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.llm = nn.Module()
        self.llm.model = nn.Module()
        self.llm.model.embed_tokens = nn.Embedding(8, 4)
        self.llm.model.norm = nn.LayerNorm(4, bias=False)
        self.llm.lm_head = nn.Linear(4, 8, bias=False)
        if tied:
            self.llm.lm_head.weight = self.llm.model.embed_tokens.weight


def empty(tied: bool = False) -> Small:
    with torch.device("meta"):
        return Small(tied)


def tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    whole: dict[str, Tensor | None] = {
        "model.embed_tokens.weight": torch.arange(32.0).reshape(8, 4),
        "model.norm.weight": torch.ones(4),
        "lm_head.weight": -torch.arange(32.0).reshape(8, 4),
        **changes,
    }
    return {name: tensor for name, tensor in whole.items() if tensor is not None}


def saved(folder: Path, content: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(content, folder / "model.safetensors")
    return folder


# names


def in_memory_names(model: nn.Module, layout: str, prefix: str = "") -> list[str]:
    return [rename(prefix + name, layout) for name in model.state_dict()]


def tiny_llava(**changes: object) -> LlavaForConditionalGeneration:
    parts = {"text_config": LlamaConfig(**TEXT), "vision_config": CLIPVisionConfig(**VISION), **changes}
    return LlavaForConditionalGeneration(LlavaConfig(**parts, image_token_index=63))


@pytest.mark.parametrize(
    ("text", "vision"),
    [(LlamaConfig(**TEXT), CLIPVisionConfig(**VISION)), (Qwen2Config(**TEXT), SiglipVisionConfig(**VISION))],
)
def test_llava_hf_names_on_disk_and_in_memory_become_ours(tmp_path, text, vision):
    model = tiny_llava(text_config=text, vision_config=vision)
    model.save_pretrained(tmp_path)
    on_disk = Index.of(tmp_path).renamed("llava_hf")
    wanted = {name for name in in_memory_names(model, "llava_hf") if ".head." not in name}
    assert set(on_disk.names()) == wanted
    assert all(ours(name) for name in wanted), sorted(name for name in wanted if not ours(name))


def test_llava_hf_hub_names_are_those_of_today(tmp_path):
    tiny_llava().save_pretrained(tmp_path)
    today = Index.of(tmp_path).names()
    hub = [name.replace("vision_tower.", "vision_tower.vision_model.") for name in today]
    assert hub != today
    assert [rename(name, "llava_hf") for name in hub] == [rename(name, "llava_hf") for name in today]


def test_text_and_original_llava_names():
    decoder = LlamaForCausalLM(LlamaConfig(**TEXT))
    for layout in ("text", "llava"):
        assert all(DECODER_NAMES.fullmatch(name) for name in in_memory_names(decoder, layout))
    for theirs, wanted in {
        "model.mm_projector.0.weight": "mm_projector.layers.0.weight",
        "model.mm_projector.2.bias": "mm_projector.layers.2.bias",
        "model.mm_projector.weight": "mm_projector.layers.0.weight",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": "vision_tower.vision_model.pre_layrnorm.bias",
    }.items():
        assert rename(theirs, "llava") == wanted


@pytest.mark.parametrize(
    "tower", [CLIPVisionModel(CLIPVisionConfig(**VISION)), SiglipVisionModel(SiglipVisionConfig(**VISION))]
)
def test_tower_folders_of_either_generation(tower):
    for inner in ("", "vision_model.", "vision_tower.vision_model."):
        names = in_memory_names(tower, "vila", f"vision_tower.{inner}")
        assert all(TOWER_NAMES.fullmatch(name) or checkpoint.HARMLESS.fullmatch(name) for name in names)


def test_a_whole_clip_model_serves_as_tower(tmp_path):
    model = CLIPModel(CLIPConfig(vision_config=VISION, text_config={**VISION, "vocab_size": 99, "eos_token_id": 1}))
    model.save_pretrained(tmp_path)
    names = Index.of(("vision_tower.", tmp_path)).renamed("llava").names()
    tower = in_memory_names(CLIPVisionModel(CLIPVisionConfig(**VISION)), "llava", "vision_tower.")
    assert sorted(names) == sorted(tower)


WORDS = st.sampled_from(
    ["model", "vision_tower", "vision_model", "language_model", "lm_head", "mm_projector", "multi_modal_projector"]
    + ["linear_1", "linear_2", "layers", "embed_tokens", "norm", "llm", "0", "2", "weight", "encoder", "embeddings"]
)


@given(name=st.lists(WORDS, min_size=1, max_size=7).map(".".join), layout=st.sampled_from(sorted(checkpoint.RENAMES)))
def test_renaming_twice_is_renaming_once(name, layout):
    once = rename(name, layout)
    assert rename(once, layout) == once


def test_harmless_extras_are_skipped(tmp_path):
    extras = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    content = tensors(**{name: torch.ones(2) for name in extras})
    assert set(Index.of(saved(tmp_path, content)).renamed("llava").names()) == set(Small().state_dict())


# files


def sharded(folder: Path) -> Path:
    write_safetensors(tensors().items(), folder, shard_size=150)
    assert len(list(folder.glob("model-*.safetensors"))) == 2
    return folder


def bins(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    first, second = dict(list(tensors().items())[:2]), dict(list(tensors().items())[2:])
    torch.save(first, folder / "pytorch_model-00001-of-00002.bin")
    torch.save(second, folder / "pytorch_model-00002-of-00002.bin")
    return folder


def legacy_pt(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": tensors()}, folder / "weights.pt", _use_new_zipfile_serialization=False)
    return folder


def loose(folder: Path) -> Path:
    saved(folder, tensors())
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    torch.save({"other": torch.ones(1)}, folder / "ignored.bin")
    save_file({"lora": torch.ones(1)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("write", [lambda folder: saved(folder, tensors()), sharded, bins, legacy_pt, loose])
def test_every_container_gives_the_same_tensors(tmp_path, write):
    index = Index.of(write(tmp_path / "model"))
    wanted = tensors()
    assert set(index.names()) == set(wanted)
    assert index.total_bytes == sum(tensor.nbytes for tensor in wanted.values())
    streamed = dict(index.stream())
    for name, tensor in wanted.items():
        assert index.shape(name) == tuple(tensor.shape)
        assert index.dtype(name) == tensor.dtype
        assert torch.equal(index.get(name), tensor)
        assert torch.equal(streamed[name], tensor)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_headers_agree_with_safetensors_on_every_dtype(tmp_path, dtype):
    tensor = torch.ones(3, 4).to(DTYPES[dtype])
    index = Index.of(saved(tmp_path, {"a": tensor}))
    assert index.dtype("a") == tensor.dtype
    assert index.shape("a") == (3, 4)


def test_the_index_reads_no_data(tmp_path):
    """A sparse file of a gigabyte is indexed, and one small tensor of it read, at once."""
    header = {
        "huge": {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]},
        "last": {"dtype": "F32", "shape": [2], "data_offsets": [2**30, 2**30 + 8]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + 2**30 + 8)
    before = anonymous_bytes()
    assert Index.of(tmp_path).get("last").tolist() == [0, 0]
    assert anonymous_bytes() - before < 2**26


def fault(folder: Path) -> str:
    with pytest.raises(FormatError) as caught:
        Index.of(folder)
    return str(caught.value)


def test_all_faults_of_all_shards_are_listed(tmp_path):
    content = list(tensors(extra=torch.ones(1)).items())
    write_safetensors(content, tmp_path, shard_size=1)
    first, second, third, fourth = sorted(tmp_path.glob("model-*.safetensors"))
    second.unlink()
    third.write_bytes(third.read_bytes()[:-4])
    save_file({"model.embed_tokens.weight": torch.ones(1)}, fourth)
    text = fault(tmp_path)
    assert f"{second.name} is missing (1 tensors)" in text
    assert f"{third.name} is truncated: its header describes 128 bytes of data, it has 124" in text
    assert f"{fourth.name} lacks extra, which the index puts there" in text
    assert f"model.embed_tokens.weight is in {first} and {fourth}" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "announces a header of 0 bytes and is 0 bytes long"),
        ((1000).to_bytes(8, "little") + b"{}", "announces a header of 1000 bytes and is 10 bytes long"),
        ((2).to_bytes(8, "little") + b"{]", "has a header that cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "is a Git LFS pointer"),
    ],
)
def test_damaged_safetensors(tmp_path, content, words):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert words in fault(tmp_path)


@pytest.mark.parametrize("starts", [(0, 4), (0, 12), (4, 12)])
def test_tensors_that_overlap_or_leave_gaps(tmp_path, starts):
    rows = {str(n): {"dtype": "F32", "shape": [2], "data_offsets": [n, n + 8]} for n in starts}
    raw = json.dumps(rows).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(max(starts) + 8))
    with pytest.raises(SafetensorError):
        load_file(path)
    assert re.search(r"a tensor begins at byte \d+, the one before it ends at \d+", fault(tmp_path))


def test_a_file_that_is_damaged_after_its_header_was_read(tmp_path):
    index = Index.of(saved(tmp_path, tensors()))
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"damaged so that nothing can be read")
    with pytest.raises(FormatError, match=r"model.safetensors cannot be read \(.*\); download or copy the file again"):
        index.get(index.names()[0])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "X"]), "shape": JSON, "data_offsets": JSON})


@example(header={"": {"dtype": "F32", "shape": [math.inf], "data_offsets": None}}, data=b"")
@given(header=JSON | st.dictionaries(st.text(max_size=3), ROWS, max_size=3), data=st.binary(max_size=16))
def test_any_header_gives_entries_or_a_format_error(tmp_path_factory, header, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    problems: list[FormatError] = []
    entries = entries_of(path, problems)
    assert sum(entry.nbytes for entry in entries.values()) <= len(data) * max(1, len(entries)) or problems


@given(content=st.binary(max_size=64))
def test_any_bytes_give_entries_or_a_format_error(tmp_path_factory, content):
    for suffix in (".safetensors", ".pt"):
        path = (tmp_path_factory.getbasetemp() / "fuzzed").with_suffix(suffix)
        path.write_bytes(content)
        problems: list[FormatError] = []
        entries_of(path, problems)
        assert len(problems) == 1 or suffix == ".safetensors"


class Unsafe:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, ("pickle_was_run",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1), "b": Unsafe()}, tmp_path / "pytorch_model.bin")
    assert fault(tmp_path).endswith(
        "pytorch_model.bin needs more than tensors to be read (torch's weights_only refuses it); "
        "convert it to safetensors where you trust it"
    )
    assert not (tmp_path / "pickle_was_run").exists()


def test_a_pickle_of_something_else(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "a.pt")
    assert "a.pt holds something else than named tensors" in fault(tmp_path)


def test_an_index_file_that_is_none_or_points_outside(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": 3}')
    assert "is not an index of shards" in fault(tmp_path)
    path.write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    assert "points outside its folder, to ../secret.safetensors" in fault(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"has no \*\.safetensors, \*\.bin or \*\.pt; found notes\.txt"):
        Index.of(tmp_path)


def test_a_vila_folder_is_three_parts_and_a_llava_folder_may_have_a_tower_elsewhere(tmp_path):
    for name in ("llm", "vision_tower", "mm_projector"):
        saved(tmp_path / name, {"layers.0.weight": torch.ones(1)})
    assert open_model(tmp_path, "vila").names() == [
        "llm.layers.0.weight",
        "vision_tower.layers.0.weight",
        "mm_projector.layers.0.weight",
    ]
    names = open_model(tmp_path / "llm", "llava", tower=tmp_path / "vision_tower").names()
    assert names == ["layers.0.weight", "vision_tower.layers.0.weight"]


# streaming


def test_streaming_fills_the_model(tmp_path):
    model, index = empty(), Index.of(saved(tmp_path, tensors()))
    seen: list[tuple[int, int]] = []
    stream_into(model, index, "text", torch.bfloat16, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for name, tensor in tensors().items():
        found = model.state_dict()[f"llm.{name}"]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.float(), tensor)
    assert model.llm.lm_head.weight.requires_grad


@pytest.mark.parametrize("on_disk", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_tied_parameters_stay_one(tmp_path, on_disk):
    dropped = {name: None for name in ("model.embed_tokens.weight", "lm_head.weight") if on_disk not in (name, "both")}
    content = tensors(**dropped)
    model, index = empty(tied=True), Index.of(saved(tmp_path, content))
    assert len(compare(model, index, "text").found) == 2
    stream_into(model, index, "text")
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    wanted = content.get("model.embed_tokens.weight", content.get("lm_head.weight"))
    assert torch.equal(model.llm.lm_head.weight, wanted)


def test_everything_that_is_wrong_comes_in_one_error(tmp_path):
    content = tensors(
        **{
            "model.norm.weight": None,
            "model.embed_tokens.weight": torch.ones(8, 5),
            "llm.lm_head.weight": torch.ones(8, 4),
            "surprise": torch.ones(1),
        }
    )
    with pytest.raises(ModelError) as caught:
        stream_into(empty(), Index.of(saved(tmp_path, content)), "text")
    text = caught.value.message
    assert "1 missing: llm.model.norm.weight" in text
    assert "1 unexpected: surprise" in text
    assert "1 duplicate: llm.lm_head.weight (as " in text
    assert "1 misshapen: llm.model.embed_tokens.weight is [8, 5], [8, 4] is needed" in text


def test_shapes_and_kinds_are_compared(tmp_path):
    content = tensors(**{"lm_head.weight": torch.ones(8, 5), "model.norm.weight": torch.ones(4, dtype=torch.int32)})
    report = compare(empty(), Index.of(saved(tmp_path, content)), "text")
    assert report.misshapen == (
        "llm.lm_head.weight is [8, 5], [8, 4] is needed",
        "llm.model.norm.weight is torch.int32, torch.float32 is needed",
    )


def test_long_lists_are_cut_with_a_count(tmp_path):
    content = tensors(**{f"x{i:02d}": torch.ones(1) for i in range(25)})
    with pytest.raises(ModelError, match=r"25 unexpected: x00, .*, x19 and 5 more\)"):
        stream_into(empty(), Index.of(saved(tmp_path, content)), "text")


def test_a_device_map_places_by_the_longest_prefix(tmp_path):
    model, index = empty(), Index.of(saved(tmp_path, tensors()))
    stream_into(model, index, "text", device={"": "cpu", "llm.model": "meta", "llm.model.norm": "cpu"})
    where = {name: tensor.device.type for name, tensor in model.named_parameters()}
    assert where == {
        "llm.model.embed_tokens.weight": "meta",
        "llm.model.norm.weight": "cpu",
        "llm.lm_head.weight": "cpu",
    }
    with pytest.raises(ModelError, match=r"the device map has no device for llm\."):
        stream_into(empty(), index, "text", device={"vision_tower": "cpu"})


class Packed(nn.Module):
    """A quantized linear's buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros((8, 1), dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(1, 8))


def test_buffers_stay_as_on_disk(tmp_path):
    model = nn.Module()
    with torch.device("meta"):
        model.packed = Packed()
    content = {"packed.qweight": torch.full((8, 1), 7, dtype=torch.int32), "packed.scales": torch.ones(1, 8).half()}
    stream_into(model, Index.of(saved(tmp_path, content)), "text", torch.float32)
    assert model.packed.scales.dtype == torch.float16
    assert torch.equal(model.packed.qweight, content["packed.qweight"])
    assert not dict(model.named_parameters())


class Counting(Index):
    """Counts how many of the tensors that it has given out are still alive."""

    alive = 0
    most = 0

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().stream():
            fresh = tensor.clone()
            del tensor
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(fresh, self._gone)
            yield name, fresh
            del fresh

    def _gone(self) -> None:
        self.alive -= 1


def test_one_tensor_at_a_time(tmp_path):
    index = Counting(Index.of(saved(tmp_path, tensors()))._entries)
    stream_into(empty(), index, "text", torch.float32)
    assert index.most == 1


def anonymous_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory is read from /proc")
    return int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1]) * 1024


MEASURE = """
import re, sys
from pathlib import Path
import torch
from torch import nn
from tinychat.checkpoint import Index, stream_into

def anonymous_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

count, size = map(int, sys.argv[2:])
with torch.device("meta"):
    model = nn.ModuleList(nn.Linear(64, size // 64, bias=False) for i in range(count))
index, peaks, before = Index.of(Path(sys.argv[1])), [], anonymous_bytes()
stream_into(model, index, "text", torch.float32, progress=lambda *_: peaks.append(anonymous_bytes() - before))
assert all(model[i].weight[0, 0].item() == i for i in range(count))
print(max(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_peak_memory_is_the_model_and_one_tensor(tmp_path):
    """In a process of its own: memory that other tests gave back would hide what is taken."""
    count, size = 16, 2**20  # sixteen tensors of 4 MiB
    write_safetensors(((f"{i}.weight", torch.full((size // 64, 64), float(i))) for i in range(count)), tmp_path)
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(count), str(size)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    one = 4 * size
    assert count * one * 0.9 < peak < (count + 1.5) * one


@pytest.mark.skipif(os.name == "nt", reason="files have no such modes")
def test_files_are_as_readable_as_others(tmp_path):
    before = os.umask(0o022)
    try:
        (file,) = write_safetensors(tensors().items(), tmp_path)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o644


def test_what_is_mapped_of_a_file_is_given_back(tmp_path, monkeypatch):
    """A reader lives as long as some tensors, not as long as the file."""
    write_safetensors(((f"{i}.weight", torch.full((256, 4), float(i))) for i in range(9)), tmp_path)
    monkeypatch.setattr(checkpoint, "MAPPED", 2 * 4096)
    opened: list[Path] = []
    real = checkpoint.open_reader
    monkeypatch.setattr(checkpoint, "open_reader", lambda path: opened.append(path) or real(path))
    assert [float(tensor[0, 0]) for _, tensor in Index.of(tmp_path).stream()] == list(range(9))
    assert opened == [tmp_path / "model.safetensors"] * 3  # three tensors each


def test_the_model_owns_its_memory(tmp_path):
    """Overwriting the file in place afterwards changes nothing."""
    folder = saved(tmp_path, tensors())
    model = empty()
    stream_into(model, Index.of(folder), "text", torch.float32)
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(model.llm.model.norm.weight, torch.ones(4))


# slices


@pytest.fixture
def towers(tmp_path) -> Index:
    content = {f"tower.{name}": torch.randn(6, 4, dtype=torch.float64) for name in "qkv"}
    return Index.of(saved(tmp_path, content))


def test_weights_of_one_rank_are_whole(towers):
    weights = Weights(towers, "tower", dtype=torch.float32)
    whole = [towers.get(f"tower.{name}").float() for name in "qkv"]
    assert torch.equal(weights.get("q"), whole[0])
    assert torch.equal(weights.get_sharded("q", 0), whole[0])
    assert torch.equal(weights.get_multi_sharded("qkv", 0), torch.cat(whole))


@pytest.mark.parametrize("dim", [0, 1])
def test_the_ranks_parts_make_the_whole(towers, dim):
    parts = [Weights(towers, "tower", Rank(rank, 2)).get_sharded("k", dim) for rank in range(2)]
    assert torch.equal(torch.cat(parts, dim), towers.get("tower.k"))
    joined = Weights(towers, "tower", Rank(1, 2)).get_multi_sharded("qkv", 0)
    assert torch.equal(joined, torch.cat([towers.get(f"tower.{name}")[3:] for name in "qkv"]))


def test_ranks_that_do_not_divide_raise(towers):
    with pytest.raises(ModelError, match=r"tower\.q has size 6 along dim 0, which 4 ranks do not divide"):
        Weights(towers, "tower", Rank(0, 4)).get_sharded("q", 0)
    with pytest.raises(ModelError, match=r"the checkpoint has no tensor tower\.o"):
        Weights(towers, "tower").get("o")


# writing


def test_written_shards_are_read_by_transformers(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    model.config.save_pretrained(tmp_path)
    files = write_safetensors(model.state_dict().items(), tmp_path, shard_size=4096)
    assert len(files) > 2
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_rewriting_removes_what_the_last_save_left(tmp_path):
    sharded(tmp_path)
    write_safetensors(tensors().items(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    sharded(tmp_path)
    assert "model.safetensors" not in {path.name for path in tmp_path.iterdir()}
    assert set(Index.of(tmp_path).names()) == set(tensors())


def test_views_of_one_tensor_are_written_apart(tmp_path):
    fused = torch.arange(8.0).reshape(4, 2)
    write_safetensors([("q", fused[:2]), ("k", fused[2:]), ("t", fused.T), ("all", fused), ("again", fused)], tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["k"], fused[2:])
    assert torch.equal(found["t"], fused.T)
    assert torch.equal(found["again"], fused)


def test_a_failed_write_leaves_the_old_weights(tmp_path):
    write_safetensors(tensors().items(), tmp_path)
    twice = [("a", torch.ones(2)), ("b", torch.ones(2)), ("a", torch.ones(2))]
    with pytest.raises(ModelError, match="tensor a comes twice"):
        write_safetensors(twice, tmp_path, shard_size=8)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert set(Index.of(tmp_path).names()) == set(tensors())
