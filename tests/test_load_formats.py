"""A model of every 4-bit format is the same model in memory; what no format allows is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packed_folders import as_pickle, packed_folder, weights_of, without_zero_points
from safetensors.torch import load_file, save_file
from same import assert_close

from tinychat.checkpoint import write_safetensors
from tinychat.errors import FormatError, ModelError
from tinychat.layers.linear import QuantLinear
from tinychat.load import load_model, open_source
from tinychat.planner import weights_bytes
from tinychat_kernels.formats import (
    COMPRESSED_TENSORS,
    FORMATS,
    GEMM,
    GEMV,
    GEMV_FAST,
    GPTQ,
    LLM_AWQ_V2,
    Format,
)

by_name = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)


def same_model(folder: Path, like: Path) -> None:
    """Every tensor of the two in memory, bit for bit, buffers and parameters."""
    found, wanted = (load_model(path, dtype="float32", device="cpu").state_dict() for path in (folder, like))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


@by_name
@pytest.mark.parametrize(("group", "dtype"), [(32, torch.float16), (64, torch.bfloat16), (128, torch.float16)])
def test_every_format_is_the_same_in_memory(tmp_path: Path, format: Format, group: int, dtype: torch.dtype):
    folders = [packed_folder(tmp_path / kind.name, kind, "text", group, dtype) for kind in {GEMM, format}]
    same_model(folders[-1], folders[0])
    source = open_source(folders[-1])
    assert source.spec is not None and source.spec.group_size == group
    names = {name.rpartition(".")[2] for name in source.index.names() if "_proj" in name}
    assert names == {"qweight", "qzeros", "scales"}


@torch.no_grad()
def test_bfloat16_scales_compute_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every q times its scale is a float32 number: a model of such weights answers alike."""
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")
    packed = load_model(
        packed_folder(tmp_path, COMPRESSED_TENSORS, dtype=torch.bfloat16), dtype="float32", device="cpu"
    )
    linears = {name: part for name, part in packed.named_modules() if isinstance(part, QuantLinear)}
    assert {part.packed.scales.dtype for part in linears.values()} == {torch.bfloat16}
    found = packed(input_ids=(ids := torch.arange(3, 23)[None])).logits
    for name, part in linears.items():
        q, scale, zero = (tensor.double() for tensor in part.logical())
        linear = torch.nn.Linear(part.in_features, part.out_features, bias=False)
        linear.weight.data = ((q - zero.repeat_interleave(32, 0)) * scale.repeat_interleave(32, 0)).T.float()
        packed.set_submodule(name, linear)
    assert_close(found, packed(input_ids=ids).logits, 1e-5)


@pytest.mark.parametrize("layout", ["vila", "llava", "llava_hf"])
@pytest.mark.parametrize("format", [LLM_AWQ_V2, COMPRESSED_TENSORS], ids=lambda format: format.name)
def test_every_layout_takes_them(tmp_path: Path, layout: str, format: Format):
    folders = [packed_folder(tmp_path / kind.name, kind, layout) for kind in (format, GEMM)]
    same_model(*folders)


@pytest.mark.parametrize("layout", ["text", "vila"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("format", [GEMM, GEMV, LLM_AWQ_V2], ids=["v0", "v1", "v2"])
def test_llm_awq_files_are_recognised_by_their_tensors(tmp_path: Path, format: Format, group: int, layout: str):
    """A .pt beside a config.json that does not say that anything is quantized."""
    like = packed_folder(tmp_path / "like", GEMM, layout, group)
    folder = as_pickle(packed_folder(tmp_path / "pickled", format, layout, group))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    same_model(folder, like)


@pytest.mark.parametrize("format", [GEMV_FAST, GPTQ], ids=lambda format: format.name)
def test_a_linear_may_lie_across_two_shards(tmp_path: Path, format: Format):
    folder, like = (packed_folder(tmp_path / kind.name, kind) for kind in (format, GEMM))
    tensors = load_file(folder / "model.safetensors")
    write_safetensors(((name, tensors[name]) for name in sorted(tensors)), folder, shard_size=10000)
    assert len(list(folder.glob("*.safetensors"))) > 5
    same_model(folder, like)


def test_symmetric_compressed_tensors_have_no_zero_points(tmp_path: Path):
    folder = without_zero_points(packed_folder(tmp_path, COMPRESSED_TENSORS))
    linear = load_model(folder, device="cpu").llm.model.layers[0].mlp.up_proj
    assert (linear.logical().zero == 8).all()


def test_the_memory_is_planned_for_what_is_held(tmp_path: Path):
    sizes = set()
    for format in (GEMM, GEMV, COMPRESSED_TENSORS):
        sizes.add(weights_bytes(open_source(packed_folder(tmp_path / format.name, format)).index, torch.float32))
    assert len(sizes) == 1


def change(folder: Path, end: str, value: torch.Tensor | None) -> None:
    """Put another tensor in the place of those that end so; None takes them away."""
    home = weights_of(folder)
    tensors = load_file(home / "model.safetensors")
    for name in [name for name in tensors if name.endswith(end)]:
        del tensors[name]
        if value is not None:
            tensors[name] = value.clone()
    save_file(tensors, home / "model.safetensors")


@pytest.mark.parametrize(
    ("format", "end", "value", "words"),
    [
        (GPTQ, "g_idx", torch.zeros(128, dtype=torch.int32), "g_idx does not count up: the weights are in activation"),
        (GPTQ, "g_idx", torch.zeros(96, dtype=torch.int32), r"g_idx has shape \[96\], \[(128|256)\] is needed"),
        (GPTQ, "qzeros", None, "_proj is not as the quantization_config says: qzeros is missing"),
        (LLM_AWQ_V2, "scaled_zeros", None, "_proj is not as the quantization_config says: scaled_zeros is missing"),
        (COMPRESSED_TENSORS, "weight_zero_point", None, "weight_zero_point is missing"),
        (GEMV_FAST, "qzeros", torch.full((32, 128), 0.3).half(), "qzeros are no scale times 0..15, such as 0.3"),
    ],
)
def test_packed_weights_that_are_wrong(tmp_path: Path, format: Format, end: str, value, words: str):
    folder = packed_folder(tmp_path, format)
    change(folder, f"q_proj.{end}", value)
    with pytest.raises(ModelError, match=words):
        load_model(folder, device="cpu")


def test_packed_weights_of_gptq_need_their_config(tmp_path: Path):
    folder = as_pickle(packed_folder(tmp_path, GPTQ))
    with pytest.raises(ModelError, match="down_proj is packed, and no quantization_config says how; add the"):
        open_source(folder)


def configured(**changes: object) -> dict[str, object]:
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", **changes}


W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "float-quantized", "config_groups": {"a": {"weights": W4}}}, "compressed-tensors/float-quantized"),
        ({"config_groups": {}}, "has 0 config_groups, one is supported"),
        ({"config_groups": {"a": {"weights": {**W4, "num_bits": 8}}}}, "has 8-bit compressed-tensors weights"),
        ({"config_groups": {"a": {"weights": {**W4, "actorder": "group"}}}}, "actorder .* is 'group', which is not"),
        ({"config_groups": {"a": {"weights": W4, "input_activations": {"num_bits": 8}}}}, "input_activations .* is {"),
        ({"config_groups": {"a": {"weights": {**W4, "group_size": 16}}}}, "group_size is 16; groups of 32"),
    ],
)
def test_what_of_compressed_tensors_is_not_read(tmp_path: Path, changes, words: str):
    folder = packed_folder(tmp_path, COMPRESSED_TENSORS)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": configured(**changes)}))
    with pytest.raises(ModelError, match=words):
        open_source(folder)


def test_a_damaged_linear_is_a_damaged_file(tmp_path: Path):
    folder = packed_folder(tmp_path, GEMV)
    change(folder, "up_proj.scales", torch.ones((256, 8)).half())
    with pytest.raises(FormatError, match=r"up_proj is not as the .*: scales has shape \[256, 8\], \[256, 32\]"):
        open_source(folder)
