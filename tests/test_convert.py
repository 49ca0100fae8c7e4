"""Conversion is exact, around the ring of formats and layouts; what a target cannot hold is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import json_keys
import pytest
import torch
from packed_folders import as_pickle, packed_folder, set_quantization
from PIL import Image as Pictures
from safetensors.torch import load_file, save_file
from torch import Tensor

from make_tiny_model import make_tiny_model
from tinychat import convert as converting
from tinychat.checkpoint import Index
from tinychat.cli import main
from tinychat.convert import TARGETS, convert, plan
from tinychat.core import Finished, Image, Message, Progress, Request, StoppingParams, Text
from tinychat.engine.engine import Engine
from tinychat.errors import CapacityError, ModelError, TinychatError, UsageError
from tinychat.eval import page
from tinychat.load import load, load_model, open_source
from tinychat.planner import weights_bytes
from tinychat.quantize.run import locked
from tinychat_kernels.formats import COMPRESSED_TENSORS, GEMM, GPTQ, LLM_AWQ_V2, Format

NEW_ROWS = ("llm.model.embed_tokens.weight", "llm.lm_head.weight")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_model(folder, dtype="float32", device="cpu").state_dict()


def same_model(folder: Path, like: Path) -> None:
    """Every tensor in memory, bit for bit; a vocabulary may have grown."""
    found, wanted = tensors_of(folder), tensors_of(like)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        other = found[name][: len(tensor)] if name in NEW_ROWS else found[name]
        assert torch.equal(other, tensor) and found[name].dtype == tensor.dtype, name


def answer(folder: Path, picture: Path | None) -> tuple[int, ...]:
    """Greedy."""
    model, processor = load(folder, dtype="float32", device="cpu", context=256)
    parts = (Image(path=str(picture)), Text("what?")) if picture else (Text("what?"),)
    stopping = StoppingParams(max_new_tokens=12, ignore_eos=True)
    end = list(Engine(model, processor, context=256).run([Request("r", (Message("user", parts),), stopping=stopping)]))
    assert isinstance(end[-1], Finished), end[-1]
    return end[-1].token_ids


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Pictures.effect_noise((70, 50), 90).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("vocabulary", [320, 259])
def test_around_the_ring_with_pictures(tmp_path: Path, picture: Path, vision: str, vocabulary: int):
    """VILA folder -> llm-awq -> LLaVA of transformers -> compressed-tensors -> VILA folder: one model, one answer."""
    options = {"vision": vision, "vocab_size": vocabulary, "hidden_size": 128, "seed": 5}
    source = make_tiny_model(tmp_path / "source", "vila", quantize=32, dtype="float16", **options)
    wanted, here = answer(source, picture), source
    for to in ("llm-awq-v2", "awq-gemm", "compressed-tensors", "vila"):
        convert(here, tmp_path / to, to)
        here = tmp_path / to
        same_model(here, source)
        assert answer(here, picture) == wanted
    assert len(set(wanted)) > 1
    packed = load_file(here / "llm" / "model.safetensors")
    for name, tensor in load_file(source / "llm" / "model.safetensors").items():
        other = packed[name][: len(tensor)] if f"llm.{name}" in NEW_ROWS else packed[name]
        assert torch.equal(other, tensor) and other.dtype == tensor.dtype, name


@pytest.mark.parametrize("to", ["awq-gemm", "compressed-tensors", "llm-awq-v2"])
@pytest.mark.parametrize("format", [GEMM, GPTQ, LLM_AWQ_V2, COMPRESSED_TENSORS], ids=lambda format: format.name)
def test_text_models(tmp_path: Path, format: Format, to: str):
    source = packed_folder(tmp_path / "source", format)
    found = convert(source, tmp_path / "out", to)
    same_model(tmp_path / "out", source)
    assert answer(tmp_path / "out", None) == answer(source, None)
    assert found["from"] == {"layout": "text", "format": format.name}
    assert (found["linears"], found["group_size"], found["layout"]) == (14, 32, "text")
    assert found["bytes"] == sum((tmp_path / "out" / name).stat().st_size for name in found["files"])


@pytest.mark.parametrize("layout", ["llava", "llava_hf", "llava_next"])
@pytest.mark.parametrize("to", TARGETS)
def test_llava_folders(tmp_path: Path, layout: str, to: str, picture: Path):
    source = packed_folder(tmp_path / "source", GEMM, layout)
    convert(source, tmp_path / "out", to)
    same_model(tmp_path / "out", source)
    assert answer(tmp_path / "out", picture) == answer(source, picture)


def test_an_old_pickle_becomes_what_transformers_names(tmp_path: Path):
    """VILA's .pt of llm-awq, with the names and the config of LlavaForConditionalGeneration."""
    source = as_pickle(packed_folder(tmp_path / "source", LLM_AWQ_V2, "vila"))
    convert(source, tmp_path / "out", "awq-gemm")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["architectures"] == ["LlavaForConditionalGeneration"]
    assert raw["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": [
            "vision_tower",
            "multi_modal_projector",
            "lm_head",
            "model.vision_tower",
            "model.multi_modal_projector",
        ],
    }
    assert raw["image_token_index"] < raw["text_config"]["vocab_size"]
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "language_model.model.layers.1.mlp.down_proj.qweight" in names
    assert {name.split(".")[0] for name in names} == {"language_model", "vision_tower", "multi_modal_projector"}


def test_transformers_builds_the_model_with_those_tensors(tmp_path: Path):
    """Its own class, on the meta device, has every tensor that is not packed, of that shape."""
    from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaProcessor

    for vision in ("clip", "siglip"):
        source = make_tiny_model(tmp_path / vision, "vila", quantize=32, vision=vision)
        convert(source, tmp_path / f"{vision}-out", "awq-gemm")
        config = AutoConfig.from_pretrained(tmp_path / f"{vision}-out")
        with torch.device("meta"):
            theirs = LlavaForConditionalGeneration(config).state_dict()
        shapes = {
            tuple(tensor.shape) for tensor in load_file(tmp_path / f"{vision}-out" / "model.safetensors").values()
        }
        floats = [name for name in theirs if "language_model.layers" not in name or not name.endswith("_proj.weight")]
        assert not [name for name in floats if tuple(theirs[name].shape) not in shapes]
        processor = LlavaProcessor.from_pretrained(tmp_path / f"{vision}-out", backend="pil")
        text = processor(images=Pictures.new("RGB", (56, 56)), text="<image> hi", return_tensors="pt")
        features = int((text["input_ids"] == config.image_token_id).sum())
        assert features == config.image_seq_length == 16


def test_what_belongs_to_the_words_is_carried(tmp_path: Path):
    source = make_tiny_model(tmp_path / "source", "vila", quantize=32)
    (source / "README.md").write_text("a card")
    for to in ("awq-gemm", "llm-awq-v2"):
        convert(source, tmp_path / to, to)
    files = {path.name for path in (tmp_path / "awq-gemm").iterdir()}
    assert files >= {"README.md", "tokenizer.json", "generation_config.json", "preprocessor_config.json"}
    assert files >= {"processor_config.json", "chat_template.jinja"}
    vila = tmp_path / "llm-awq-v2"
    assert (vila / "README.md").read_text() == "a card"
    for name in ("tokenizer.json", "generation_config.json"):
        assert (vila / "llm" / name).read_bytes() == (source / "llm" / name).read_bytes()
    assert [path.name for path in (vila / "llm").glob("model*")] == ["model-w4-g32-awq-v2.pt"]
    assert "quantization_config" not in (vila / "config.json").read_text() + (vila / "llm/config.json").read_text()


def test_linears_that_stay_float_are_named(tmp_path: Path):
    source = packed_folder(tmp_path / "source", GEMM)
    tensors = load_file(source / "model.safetensors")
    stem = "model.layers.1.mlp.down_proj"
    for part in ("qweight", "qzeros", "scales"):
        del tensors[f"{stem}.{part}"]
    tensors[f"{stem}.weight"] = torch.randn(128, 256)
    save_file(tensors, source / "model.safetensors")
    for to, key in (("awq-gemm", "modules_to_not_convert"), ("compressed-tensors", "ignore")):
        convert(source, tmp_path / to, to)
        raw = json.loads((tmp_path / to / "config.json").read_text())["quantization_config"]
        assert len(raw[key]) == 2 and "down_proj" in raw[key][1]
        same_model(tmp_path / to, source)


@pytest.mark.parametrize("layout", ["text", "vila"])
def test_shards_and_progress(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch):
    write = converting.write_safetensors
    monkeypatch.setattr(converting, "write_safetensors", lambda tensors, folder: write(tensors, folder, 20000))
    source = packed_folder(tmp_path / "source", GEMM, layout)
    seen: list[Progress] = []
    convert(source, tmp_path / "out", "vila" if layout == "vila" else "awq-gemm", progress=seen.append)
    assert [step.done for step in seen] == list(range(1, seen[0].total + 1))
    assert len(list((tmp_path / "out").rglob("model-*-of-*.safetensors"))) > 3
    same_model(tmp_path / "out", source)


def test_one_linear_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tensors are asked for as they are written, not before."""
    asked: list[str] = []
    get = Index.get
    monkeypatch.setattr(Index, "get", lambda self, name: (asked.append(name), get(self, name))[1])
    ahead: list[int] = []

    def write(tensors, folder):
        for written, _ in enumerate(tensors, 1):
            ahead.append(len(asked) - written)

    monkeypatch.setattr(converting, "write_safetensors", write)
    convert(packed_folder(tmp_path / "source", GEMM), tmp_path / "out", "awq-gemm")
    assert max(ahead) <= 2


def test_scales_in_another_type(tmp_path: Path):
    source = packed_folder(tmp_path / "bf16", GEMM, dtype=torch.bfloat16)
    convert(source, tmp_path / "fp16", "awq-gemm", scales=torch.float16)
    found = load_file(tmp_path / "fp16" / "model.safetensors")
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(found[name].double(), tensor.double())
        assert found[name].dtype == (torch.float16 if name.endswith("scales") else tensor.dtype)


def test_awq_gemm_has_scales_in_float16_or_what_was_asked_for(tmp_path: Path):
    source = packed_folder(tmp_path / "bf16", COMPRESSED_TENSORS, dtype=torch.bfloat16)
    convert(source, tmp_path / "fp16", "awq-gemm")
    convert(source, tmp_path / "kept", "awq-gemm", scales=torch.bfloat16)
    convert(source, tmp_path / "as", "compressed-tensors")
    for folder, kind, end in (("fp16", torch.float16, "scales"), ("kept", torch.bfloat16, "scales")):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert {tensor.dtype for name, tensor in found.items() if name.endswith(end)} == {kind}
        assert answer(tmp_path / folder, None) == answer(source, None)
    same_model(tmp_path / "as", source)


@pytest.mark.parametrize("value", [1e-9, 1e5], ids=["too small", "too large"])
def test_scales_that_float16_has_not_are_refused(tmp_path: Path, value: float):
    source = packed_folder(tmp_path / "source", GEMM, dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][0, 3] = value
    save_file(tensors, source / "model.safetensors")
    words = (
        r"up_proj cannot be converted: 1 of \d+ scales are torch.bfloat16 and have no value in torch.float16; choose"
    )
    with pytest.raises(ModelError, match=words):
        convert(source, tmp_path / "out", "awq-gemm")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(source, tmp_path / "out", "awq-gemm", scales=torch.bfloat16)


# A head of 4 or 8 bits


def head_of(folder: Path) -> Tensor:
    return tensors_of(folder)["llm.lm_head.weight"]


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """To the nearest, symmetrically: steps of a group's largest magnitude over the top integer."""
    groups = weight.float().unflatten(1, (-1, group))
    top = 2 ** (bits - 1) - 1
    step = (groups.abs().amax(2, keepdim=True) / top).half().float()
    return ((groups / step).round().clamp(-top - 1, top) * step).flatten(1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("layout", ["text", "vila"])
def test_a_head_of_few_bits(tmp_path: Path, bits: int, layout: str):
    source = packed_folder(tmp_path / "source", GEMM, layout)
    (source / "quality.json").write_text("{}")
    (source / "README.md").write_text(f"# Mine\n\n{page.BEGIN}\nfigures\n{page.END}\nand more\n")
    found = convert(source, tmp_path / "out", "compressed-tensors", lm_head_bits=bits)
    assert found["lm_head_bits"] == bits
    assert not (tmp_path / "out" / "quality.json").exists(), "it tells of another head"
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine\nand more\n"
    wanted = rounded(head_of(source), bits, 32)
    off = (head_of(tmp_path / "out")[: len(wanted)] - wanted).abs() > 1e-6
    assert int(off.sum()) <= 1e-3 * off.numel()  # ties, and steps whose last bit depends on the order of computing
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [group["targets"] for group in raw["config_groups"].values()] == [["Linear"], ["re:.*lm_head$"]]
    assert raw["config_groups"]["group_1"]["weights"]["num_bits"] == bits and "lm_head" not in str(raw["ignore"])
    prefix = "language_model." if layout == "vila" else ""
    packed = load_file(tmp_path / "out" / "model.safetensors")[f"{prefix}lm_head.weight_packed"]
    assert packed.dtype == torch.int32 and packed.shape[1] == 128 * bits // 32

    convert(tmp_path / "out", tmp_path / "again", "compressed-tensors")
    same_model(tmp_path / "again", tmp_path / "out")


def test_the_memory_of_a_packed_head_is_that_of_a_float_one(tmp_path: Path):
    source = packed_folder(tmp_path / "source", COMPRESSED_TENSORS)
    convert(source, tmp_path / "out", "compressed-tensors", lm_head_bits=8)
    sizes = [weights_bytes(open_source(path).index, torch.float16) for path in (source, tmp_path / "out")]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("to", "bits", "packed", "words"),
    [
        ("awq-gemm", 8, None, "awq-gemm cannot say that the head has 8 bits; give --to compressed-tensors"),
        ("awq-gemm", None, 8, "awq-gemm cannot say that the head has 8 bits"),
        ("llm-awq-v2", 4, None, "llm-awq-v2 cannot say that the head has 4 bits"),
        ("compressed-tensors", 4, 8, "the head has 8 bits, and 4 are asked for; convert the 16-bit original"),
        ("compressed-tensors", 16, 4, "the head has 4 bits, and 16 are asked for"),
        ("compressed-tensors", 5, None, "a head of 5 bits is asked for; give 4, 8 or 16"),
    ],
)
def test_heads_that_cannot_be(tmp_path: Path, to: str, bits: int | None, packed: int | None, words: str):
    source = packed_folder(tmp_path / "source", GEMM)
    if packed:
        convert(source, tmp_path / "packed", "compressed-tensors", lm_head_bits=packed)
        source = tmp_path / "packed"
    with pytest.raises(TinychatError, match=words):
        convert(source, tmp_path / "out", to, lm_head_bits=bits)


def test_a_head_that_is_the_embeddings_stays(tmp_path: Path):
    source = make_tiny_model(tmp_path / "source", "text", quantize=32, tied=True)
    with pytest.raises(ModelError, match="the head is the embeddings, which stay in 16 bits, and 8 bits are asked"):
        convert(source, tmp_path / "out", "compressed-tensors", lm_head_bits=8)


def command(capfd: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main(["convert", *map(str, args)])
    out, err = capfd.readouterr()
    return code, out, err


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    source = packed_folder(tmp_path / "source", GPTQ)
    code, out, _ = command(capfd, source, tmp_path / "out", "--to", "awq-gemm", "--json", "--scales", "fp16")
    assert code == 0
    json_keys.check(json.loads(out), "tinychat.convert/1")
    code, out, _ = command(capfd, source, tmp_path / "again", "--to", "compressed-tensors")
    assert code == 0
    assert "again holds" in out and "as compressed-tensors: 14 4-bit linears, " in out


def test_the_home_folder_may_be_a_tilde(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    packed_folder(tmp_path / "source", GEMM)
    monkeypatch.chdir(tmp_path / "source")
    assert command(capfd, "~/source", "~/out", "--to", "awq-gemm")[0] == 0
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "source" / "~").exists()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (
            ("source",),
            2,
            "a model, a folder to write and a format are needed; write tinychat convert IN OUT",
        ),
        (("source", "out", "--to", "awq-gemm", "--scales", "fp8"), 2, "--scales is 'fp8'; give fp16 or bf16"),
        (("source", "out", "--to", "awq-gemm", "--lm-head-bits", "5"), 2, "--lm-head-bits is 5; give 4, 8 or 16"),
        (("source", "source", "--to", "awq-gemm"), 2, "source exists; give a folder that does not exist yet"),
        (("source", "out", "--to", "vila"), 3, "the model reads text only"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    code: int,
    words: str,
):
    packed_folder(tmp_path / "source", GEMM)
    monkeypatch.chdir(tmp_path)
    args = tuple(f"./{arg}" if arg == "source" else arg for arg in args)
    found, _, said = command(capfd, *args)
    assert found == code and words in said


# refusals


def text(tmp_path: Path, format: Format = GEMM) -> Path:
    return packed_folder(tmp_path / "source", format)


def vila(tmp_path: Path, **options: object) -> Path:
    return make_tiny_model(tmp_path / "source", "vila", quantize=32, **options)


def tiled_vila(tmp_path: Path) -> Path:
    with TemporaryDirectory() as folder:
        convert(make_tiny_model(Path(folder) / "next", "llava_next", quantize=32), tmp_path / "source", "vila")
    return tmp_path / "source"


def narrow(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "source", "text", quantize=32, intermediate_size=96)


def without(folder: Path, end: str) -> Path:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.endswith(end)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("make", "to", "options", "words"),
    [
        (text, "gguf", {}, "there is no format 'gguf'; give one of awq-gemm, vila, compressed-tensors, llm-awq-v2"),
        (text, "vila", {}, "the model reads text only, and a VILA folder has a vision tower; try --to awq-gemm"),
        (
            narrow,
            "llm-awq-v2",
            {},
            "down_proj cannot be converted: in_features=96 is not a multiple of 64, which llm-awq",
        ),
        (
            text,
            "awq-gemm",
            {"scales": torch.bfloat16},
            r"_proj cannot be converted: \d+ of \d+ scales are torch.float16 and have no value in torch.bfloat16",
        ),
        (
            lambda tmp_path: vila(tmp_path, projector="mlp_downsample"),
            "awq-gemm",
            {},
            "has a projector of type mlp_downsample, and transformers' LLaVA is two linears: vLLM and SGLang would "
            "take it for another model; give --to vila, which tinychat serves, or --to llm-awq-v2",
        ),
        (
            tiled_vila,
            "awq-gemm",
            {},
            r"has pictures in tiles, which LLaVA has not \(LLaVA-NeXT has\): .* give --to vila, which tinychat serves",
        ),
        (
            lambda tmp_path: make_tiny_model(tmp_path / "source", "text"),
            "awq-gemm",
            {},
            "source has no 4-bit weights; quantize the model first",
        ),
        (
            lambda tmp_path: without(text(tmp_path), "layers.0.mlp.up_proj.qzeros"),
            "compressed-tensors",
            {},
            "1 missing: llm.model.layers.0.mlp.up_proj.qzeros",
        ),
        (
            lambda tmp_path: without(text(tmp_path, GPTQ), "layers.0.mlp.up_proj.scales"),
            "awq-gemm",
            {},
            "up_proj is not as the quantization_config says: scales is missing",
        ),
    ],
)
def test_what_cannot_be_converted(tmp_path: Path, make, to: str, options, words: str):
    source = make(tmp_path)
    with pytest.raises(TinychatError, match=words):
        convert(source, tmp_path / "out", to, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_scales_of_32_bits_have_no_place_in_llm_awq(tmp_path: Path):
    source = packed_folder(tmp_path / "source", GEMM, dtype=torch.float32)
    with pytest.raises(ModelError, match="scales are torch.float32, llm-awq-v2 has float16 or bfloat16"):
        convert(source, tmp_path / "out", "llm-awq-v2")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_written_over(tmp_path: Path):
    source = text(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="out exists; give a folder that does not exist yet"):
        convert(source, tmp_path / "out", "awq-gemm")


def test_a_full_disk_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CapacityError, match=r"^\d+\.\d KiB are needed on the disk of .*, 1\.0 KiB are free"):
        plan(text(tmp_path), tmp_path / "deep" / "out", "awq-gemm")


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(converting, "write_safetensors", full)
    source = text(tmp_path)
    with pytest.raises(UsageError, match="out cannot be written: Permission denied; give another folder"):
        convert(source, tmp_path / "out", "awq-gemm")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to", ["awq-gemm", "llm-awq-v2"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, to: str):
    resource = pytest.importorskip("resource")
    source = text(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, before[1]))  # the weights take more than that
    try:
        with pytest.raises(CapacityError, match="the disk of .*out is full, and nothing was written; free some"):
            convert(source, tmp_path / "out", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to", ["awq-gemm", "llm-awq-v2"])
def test_killed_for_good_it_leaves_no_half_of_a_folder(tmp_path: Path, to: str):
    """At moments of the writing, as another process shows them; the same command then does the whole."""
    source = packed_folder(tmp_path / "source", GEMM)
    slow = (
        "import sys, time; from pathlib import Path; from tinychat import convert\n"
        "def tell(progress):\n"
        "    if progress.done >= int(sys.argv[4]): print('now', flush=True); time.sleep(60)\n"
        "convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], progress=tell)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for moment in (1, 30):
        arguments = [sys.executable, "-c", slow, source, tmp_path / "out", to, str(moment)]
        with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stdout.readline() == "now\n"
            child.send_signal(signal.SIGKILL)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.converting", "source"]
    convert(source, tmp_path / "out", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    same_model(tmp_path / "out", source)


def test_two_do_not_write_one_folder(tmp_path: Path):
    source = text(tmp_path)
    with locked(tmp_path / "out.converting"), pytest.raises(UsageError, match="another run works in .*out.converting"):
        convert(source, tmp_path / "out", "awq-gemm")


def test_a_group_a_row(tmp_path: Path):
    """compressed-tensors calls it channel, AWQ -1."""
    source = make_tiny_model(tmp_path / "source", "text", quantize=64)
    tensors = load_file(source / "model.safetensors")
    assert all(len(t) in (1, 2) for n, t in tensors.items() if n.endswith("scales"))
    kept = {n: t[:1].clone() if n.endswith(("scales", "qzeros")) else t for n, t in tensors.items()}
    save_file(kept, source / "model.safetensors")
    group = {"bits": 4, "group_size": -1, "zero_point": True}
    set_quantization(source, {"quant_method": "awq", "version": "gemm", **group})
    convert(source, tmp_path / "ct", "compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "gemm", "awq-gemm")
    same_model(tmp_path / "gemm", source)
