"""From a folder or a hub id to a model: every layout against transformers' own, every refusal by its text."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from same import assert_same
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)

from make_tiny_model import make_tiny_model
from tinychat import load, planner
from tinychat.checkpoint import HARMLESS, rename
from tinychat.core import Progress
from tinychat.errors import CapacityError, FormatError, ModelError, UsageError
from tinychat.layers.linear import QuantLinear
from tinychat.load import Placement, assemble, load_model, open_source, resolve

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


def rewrite(path: Path, **changes: object) -> None:
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def same_tensors(ours: nn.Module, theirs: nn.Module, layout: str) -> None:
    """Every tensor of transformers' model is in ours under its name, and no other."""
    wanted = {rename(name, layout): tensor for name, tensor in theirs.state_dict().items()}
    wanted = {name: tensor for name, tensor in wanted.items() if not HARMLESS.fullmatch(name)}
    found = ours.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


# every layout


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**TEXT, attention_bias=True, mlp_bias=True)),
        (LlamaForCausalLM, LlamaConfig(**TEXT, tie_word_embeddings=True)),
        (MistralForCausalLM, MistralConfig(**TEXT, sliding_window=8)),
        (Qwen2ForCausalLM, Qwen2Config(**TEXT)),
    ],
)
def test_text_folders(tmp_path, kind, config):
    theirs = kind(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    ours = load_model(tmp_path)
    same_tensors(ours, theirs, "text")
    assert not ours.training
    assert (ours.llm.lm_head.weight is ours.llm.model.embed_tokens.weight) == config.tie_word_embeddings
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(ours(input_ids=ids).logits, theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "vision"),
    [(LlamaConfig(**TEXT), CLIPVisionConfig(**VISION)), (Qwen2Config(**TEXT), SiglipVisionConfig(**VISION))],
)
def test_llava_hf_folders(tmp_path, text, vision):
    theirs = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=63))
    theirs.save_pretrained(tmp_path)
    same_tensors(load_model(tmp_path), theirs, "llava_hf")


def test_llava_hf_folders_with_in_memory_names(tmp_path):
    """As `save_file(model.state_dict())` leaves them."""
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION), image_token_index=63
    )
    theirs = LlavaForConditionalGeneration(config)
    theirs.save_pretrained(tmp_path)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    same_tensors(load_model(tmp_path), theirs, "llava_hf")


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_vila_and_original_llava_folders_hold_the_same_model(tmp_path, text, vision):
    models = {}
    for layout in ("vila", "llava"):
        folder = make_tiny_model(tmp_path / layout, layout, text=text, vision=vision)
        models[layout] = load_model(folder)
    vila, llava = models["vila"].state_dict(), models["llava"].state_dict()
    decoder = load_file(tmp_path / "vila" / "llm" / "model.safetensors")
    tower = load_file(tmp_path / "vila" / "vision_tower" / "model.safetensors")
    assert vila.keys() == llava.keys()
    for name, tensor in {
        **{f"llm.{name}": tensor for name, tensor in decoder.items()},
        **{f"vision_tower.{name}": tensor for name, tensor in tower.items()},
    }.items():
        assert torch.equal(vila[name], tensor)
        assert torch.equal(llava[name], tensor)
    first = load_file(tmp_path / "llava" / "model.safetensors")["model.mm_projector.2.weight"]
    assert torch.equal(llava["mm_projector.layers.2.weight"], first)


PROJECTORS = [
    "linear",
    "mlp3x_gelu",
    "mlp_downsample",
    "mlp_downsample_2x2_fix",
    "mlp_downsample_3x3_fix",
    "mlp_downsample_3x3_s2",
    "mlp_downsample_3x3_s2_new",
]


@pytest.mark.parametrize("projector", PROJECTORS)
def test_every_projector_loads(tmp_path, projector):
    model = load_model(make_tiny_model(tmp_path, "vila", projector=projector, vision="siglip"))
    pixels = torch.zeros(1, 3, 56, 56)
    assert tuple(model.encode_images(pixels).shape[1:]) == (model.config.tokens_per_image, 64)


def test_pickled_folders(tmp_path):
    make_tiny_model(tmp_path, "text")
    tensors = load_file(tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(load_model(tmp_path).llm.lm_head.weight, tensors["lm_head.weight"])


# the tower of original LLaVA


def moved_tower(tmp_path: Path, named: str) -> Path:
    folder = make_tiny_model(tmp_path / "model", "llava")
    shutil.move(folder / "vision_tower", tmp_path / "tower")
    rewrite(folder / "config.json", mm_vision_tower=named)
    return folder


def test_the_tower_may_lie_at_an_absolute_path_or_in_the_folder(tmp_path):
    folder = moved_tower(tmp_path, str(tmp_path / "tower"))
    assert load_model(folder).vision_tower is not None
    shutil.move(tmp_path / "tower", folder / "clip")
    for named in ("clip", "./clip"):
        rewrite(folder / "config.json", mm_vision_tower=named)
        assert load_model(folder).vision_tower is not None
    rewrite(folder / "config.json", mm_vision_tower="../model/clip")
    assert load_model(folder).vision_tower is not None
    shutil.move(folder / "clip", folder / "vision_tower")
    rewrite(folder / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    assert load_model(folder).vision_tower is not None


def test_the_tower_may_be_a_hub_id_of_a_whole_clip_model(tmp_path, monkeypatch):
    folder = moved_tower(tmp_path, "owner/clip")
    text = {**VISION, "vocab_size": 99, "eos_token_id": 1}
    whole = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text))
    whole.save_pretrained(tmp_path / "hub")
    projector = load_file(folder / "model.safetensors")
    projector["model.mm_projector.0.weight"] = torch.zeros(64, 16)
    save_file(projector, folder / "model.safetensors")
    asked: list[str] = []

    def download(repo: str, **_: object) -> str:
        asked.append(repo)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load_model(folder)
    assert asked == ["owner/clip"]
    found = model.vision_tower.vision_model.embeddings.class_embedding
    assert torch.equal(found, whole.vision_model.embeddings.class_embedding)


def test_weights_of_the_tower_inside_the_checkpoint_come_first(tmp_path):
    folder = make_tiny_model(tmp_path, "llava")
    tower = load_file(folder / "vision_tower" / "model.safetensors")
    inside = {f"model.vision_tower.vision_tower.{name}": tensor + 1 for name, tensor in tower.items()}
    save_file({**load_file(folder / "model.safetensors"), **inside}, folder / "model.safetensors")
    found = load_model(folder).state_dict()
    assert all(torch.equal(found[f"vision_tower.{name}"], tensor + 1) for name, tensor in tower.items())


def test_a_tower_that_is_nowhere(tmp_path):
    folder = moved_tower(tmp_path, "./gone")
    with pytest.raises(ModelError, match=r"the vision tower '\./gone' of .* was not found \(looked for .*tower\)"):
        load_model(folder)


# quantized


@pytest.mark.parametrize("layout", ["vila", "llava", "llava_hf", "text"])
def test_quantized_folders_compute_what_the_float_ones_do(tmp_path, layout):
    plain = load_model(make_tiny_model(tmp_path / "plain", layout))
    packed = load_model(make_tiny_model(tmp_path / "packed", layout, quantize=32))
    kinds = [type(module) for module in packed.llm.model.layers.modules()]
    assert kinds.count(QuantLinear) == 14
    assert nn.Linear not in kinds
    assert packed.llm.model.layers[0].mlp.up_proj.logical().scale.dtype == torch.float16
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted, found = plain(input_ids=ids).logits, packed(input_ids=ids).logits
    assert torch.nn.functional.cosine_similarity(wanted, found, dim=-1).min() > 0.9


@pytest.mark.parametrize("spared", ["model.layers.1", "mlp.down_proj"])
def test_modules_not_to_convert_stay_float(tmp_path, spared):
    plain, packed = (make_tiny_model(tmp_path / str(group), "text", quantize=group) for group in (None, 32))
    mixed = load_file(packed / "model.safetensors")
    for name, tensor in load_file(plain / "model.safetensors").items():
        if f".{spared}." in f".{name}" and name.endswith("_proj.weight"):
            for part in ("qweight", "qzeros", "scales"):
                del mixed[name.replace("weight", part)]
            mixed[name] = tensor
    save_file(mixed, packed / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    rewrite(packed / "config.json", quantization_config={**config, "modules_to_not_convert": [spared, "lm_head"]})
    model = load_model(packed)
    floats = [name for name, module in model.llm.model.named_modules() if isinstance(module, nn.Linear)]
    assert floats
    assert all(f".{spared}." in f".model.{name}." for name in floats)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "gptq", "desc_act": True}, "GPTQ weights in activation order (desc_act); take one"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "quantized with gptq/marlin, which is not supported"),
        ({"quant_method": "gptq"}, "_proj is not as the quantization_config says: qzeros has shape"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized with bitsandbytes, which is not supported"),
        ({"version": "marlin"}, "quantized with awq/marlin, which is not supported; take a checkpoint in one of 4-bit"),
        ({"version": "gemv"}, "_proj is not as the quantization_config says: qzeros has shape"),
        ({"bits": 3}, "the checkpoint has 3-bit AWQ weights"),
        ({"group_size": 48}, "group_size is 48"),
        ({"group_size": 128}, "llm.model.layers.0.self_attn.q_proj cannot be quantized as the config says"),
    ],
)
def test_other_quantizations_are_refused_by_name(tmp_path, changes, words):
    folder = make_tiny_model(tmp_path, "text", quantize=32)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    rewrite(folder / "config.json", quantization_config={**config, **changes})
    with pytest.raises(ModelError, match=re.escape(words)):
        load_model(folder)


@pytest.mark.parametrize("value", ["awq", [4]])
def test_a_quantization_that_is_no_object(tmp_path, value):
    folder = make_tiny_model(tmp_path, "text", quantize=32)
    rewrite(folder / "config.json", quantization_config=value)
    with pytest.raises(ModelError, match=f"the quantization_config is {re.escape(repr(value))}, not an object"):
        load_model(folder)


# dtype, device, progress


@pytest.mark.parametrize(
    ("asked", "limit", "wanted"),
    [
        (None, 2**30, torch.float32),
        (None, 0, torch.bfloat16),
        ("auto", 0, torch.bfloat16),
        ("float16", 2**30, torch.float16),
        ("fp16", 2**30, torch.float16),
        ("torch.float16", 2**30, torch.float16),
        (torch.float64, 2**30, torch.float64),
    ],
)
def test_dtypes(tmp_path, monkeypatch, asked, limit, wanted):
    monkeypatch.setattr(load, "FLOAT32_LIMIT", limit)
    folder = make_tiny_model(tmp_path, "text", dtype="bfloat16")
    model = load_model(folder, dtype=asked, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert model.config.dtype == wanted


def test_arguments_that_cannot_be_are_named(tmp_path):
    folder = make_tiny_model(tmp_path, "text")
    with pytest.raises(UsageError, match="dtype is 'int4'; give one of float16, bfloat16, float32, fp16, bf16, fp32"):
        load_model(folder, dtype="int4")
    with pytest.raises(UsageError, match="both a --device and a --device-map are given"):
        load_model(folder, device="cpu", device_map="auto")
    with pytest.raises(UsageError, match="--max-memory is given without --device-map; add a device map"):
        load_model(folder, max_memory={"cpu": "1GB"})
    with pytest.raises(UsageError, match="the device map is 'best'"):
        load_model(folder, device_map="best")


@pytest.mark.parametrize("device_map", ["auto", "sequential", {"": "cpu"}, {"llm": "cpu", "llm.lm_head": "cpu"}])
def test_device_maps(tmp_path, device_map):
    folder = make_tiny_model(tmp_path, "text")
    model = load_model(folder, device_map=device_map, max_memory={"cpu": "1GB"})
    assert torch.equal(model.llm.lm_head.weight, load_model(folder, device="cpu").llm.lm_head.weight)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_is_planned_for_with_the_memory_of_its_devices(tmp_path, monkeypatch, device_map):
    folder = make_tiny_model(tmp_path, "text")
    assert load.load(folder, device_map=device_map)[0].device.type == "cpu"
    monkeypatch.setattr("tinychat.checkpoint.stream_into", None)
    with pytest.raises(CapacityError, match=r"GiB are needed .*, 0\.020 GiB are free"):
        load.load(folder, device_map=device_map, max_memory={"cpu": "20MiB"})
    monkeypatch.setattr("tinychat.planner.free_bytes", lambda device: 10 * 2**20)
    with pytest.raises(CapacityError, match=r"0\.010 GiB are free"):
        load.load(folder, device_map=device_map, max_memory={"cpu": "20MiB"})


@pytest.mark.parametrize(
    ("device_map", "limits", "words"),
    [
        ("auto", {"cpu": "xyz"}, "the limit of memory 'xyz' is no size; give bytes, or such as 10GiB"),
        ("auto", {99: "1GiB"}, "CUDA devices, not cuda:99"),
        ("auto", {"disk": "1GiB"}, "max_memory has a limit for disk; limit cpu, or a CUDA device by its number"),
        ({"": "tape"}, None, "there is no device 'tape'; name cpu, disk, or a CUDA device by its number"),
        ({"": "mps"}, None, "a device map cannot use mps"),
    ],
)
def test_devices_and_sizes_that_are_none(tmp_path, device_map, limits, words):
    with pytest.raises(UsageError, match=words):
        load.load(make_tiny_model(tmp_path, "text"), device_map=device_map, max_memory=limits)


def test_a_context_longer_than_the_positions_is_refused(tmp_path):
    folder = make_tiny_model(tmp_path, "text", max_positions=600)
    with pytest.raises(UsageError, match="a context of 601 tokens is asked for, the model is made for 600; try --cont"):
        load.load(folder, context=601)
    config = open_source(folder).config
    assert [load.choose_context(config, asked) for asked in (None, 600, 7)] == [600, 600, 7]
    config.llm_cfg["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    assert load.choose_context(config, 601) == 601


def test_progress_counts_the_tensors(tmp_path):
    folder = make_tiny_model(tmp_path, "text")
    seen: list[Progress] = []
    load_model(folder, progress=seen.append)
    total = len(load_file(folder / "model.safetensors"))
    assert seen == [Progress("", "load", done, total) for done in range(1, total + 1)]


def test_load_gives_the_processor_and_checks_the_memory_first(tmp_path, monkeypatch):
    folder = make_tiny_model(tmp_path, "llava")
    model, processor = load.load(folder, context=256)
    assert processor.tokens_per_image == model.config.tokens_per_image == 16
    monkeypatch.setattr("tinychat.planner.free_bytes", lambda device: 2**20)
    monkeypatch.setattr("tinychat.checkpoint.stream_into", None)
    with pytest.raises(CapacityError, match="GiB are needed"):
        load.load(folder, context=256, device="cpu")


# folders that are wrong


def test_weights_that_do_not_fit_the_config(tmp_path):
    folder = make_tiny_model(tmp_path, "text")
    rewrite(folder / "config.json", intermediate_size=96, num_hidden_layers=3)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert "9 missing: llm.model.layers.2." in caught.value.message
    assert "6 misshapen: llm.model.layers.0." in caught.value.message
    assert "llm.model.layers.1.mlp.gate_proj.weight is [128, 64], [96, 64] is needed" in caught.value.message


def test_folders_that_are_no_models(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"config\.json was looked for, found notes\.txt"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="is not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel \(model_type 'gpt2'\) is not supported; works: VILA"):
        load_model(tmp_path)


# where a model is


def test_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "EMBEDDED", tmp_path / "model")
    with pytest.raises(ModelError, match="this installation has no embedded model; give --model a folder or a hub id"):
        resolve(None)
    make_tiny_model(tmp_path / "model", "vila")
    assert resolve(None) == tmp_path / "model"


def test_files_and_mistyped_folders(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "config.json").touch()
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match=r"config\.json is a file; give the folder of the model"):
        resolve(tmp_path / "config.json")
    for name in ("model", "models/vila/", "mdl/vila/8b"):
        with pytest.raises(ModelError, match=rf"there is no folder .*; {tmp_path}(/models)? has (models|no folders)"):
            resolve(f"{tmp_path}/{name}")
    with pytest.raises(ModelError, match=r"there is no folder \.\./none/such"):
        resolve("../none/such")


def test_offline_without_a_copy_is_said():
    """huggingface_hub itself, with HF_HUB_OFFLINE set for all tests."""
    with pytest.raises(ModelError, match="there is no folder owner/name, the cache has no complete copy, and the hub"):
        resolve("owner/name")


def test_a_cached_copy_is_found_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    storage, commit = tmp_path / "models--owner--name", "a" * 40
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(commit)
    folder = make_tiny_model(storage / "snapshots" / commit, "text")
    listed = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    (storage / "trees").mkdir()
    rows = {name: {"size": 1, "blob_id": "0" * 40} for name in listed}
    (storage / "trees" / f"{commit}.json").write_text(json.dumps({"entries": rows}))
    assert resolve("owner/name") == folder


def hub_fault(kind: type[Exception]) -> Exception:
    fault = kind.__new__(kind)
    fault.args = ("told by the hub",)
    return fault


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (errors.GatedRepoError, "the hub gives owner/name only to those who were granted access"),
        (errors.RepositoryNotFoundError, "there is no folder owner/name, and the hub has no model owner/name"),
        (errors.RevisionNotFoundError, "the hub has no revision v9 of owner/name; check the revision"),
        (OSError, "owner/name could not be downloaded"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, fault, words):
    def download(*_: object, **__: object) -> str:
        raise hub_fault(fault)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=words):
        resolve("owner/name", "v9")


def test_a_name_that_is_no_hub_id():
    with pytest.raises(ModelError, match=r"'my model' is neither a folder nor a hub id"):
        resolve("my model")


def test_only_the_files_needed_are_fetched_and_pickles_last(tmp_path, monkeypatch):
    asked: list[list[str]] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        assert (repo, revision) == ("owner/name", "v1")
        assert "original/*" in ignore_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name", "v1") == tmp_path
    assert ["*.safetensors" in asked[0], "*.bin" in asked[0], "*.bin" in asked[1]] == [True, False, True]
    asked.clear()
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "model.safetensors").touch()
    resolve("owner/name", "v1")
    assert len(asked) == 1


def test_dequantized_weights_say_the_same_and_are_planned_for(tmp_path: Path):
    folder = make_tiny_model(tmp_path, quantize=32)
    source = open_source(folder)
    packed = assemble(source, Placement(device="cpu", exact=True))
    floats = assemble(source, Placement(device="cpu", dequantize=True))
    assert not any(isinstance(module, QuantLinear) for module in floats.modules())
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert_same(floats(input_ids=tokens).logits, packed(input_ids=tokens).logits)
    held = sum(tensor.nbytes for tensor in floats.state_dict().values())
    assert planner.weights_bytes(source.index, floats.dtype, dequantize=True) == held


def test_dequantize_excludes_a_device_map():
    with pytest.raises(UsageError, match="both --dequantize and a --device-map"):
        Placement(device_map="auto", dequantize=True)
