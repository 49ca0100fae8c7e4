"""16-bit towers and projectors in 8 bits for the CPU kernels: which are packed, what that takes, how they are kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from int8_folders import int8_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from make_tiny_model import make_tiny_model
from tinychat import packed_cache, packed_tower, packing, planner
from tinychat.errors import ModelError, UsageError
from tinychat.layers.packed_linear import PackedLinear
from tinychat.load import _dtype_of, assemble, load_model, open_source
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat.placement import Placement
from tinychat_kernels import cpu, cpu_tower

available, reason = cpu.available()
pytestmark = [pytest.mark.skipif(not available, reason=reason), pytest.mark.usefixtures("on_cpu")]
LAYERS = 3
ROUNDED = 3e-2  # relative: 8-bit linears in three layers and the projector


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TINYCHAT_BACKEND", raising=False)
    monkeypatch.setenv("TINYCHAT_CACHE", str(tmp_path / "cache"))


def made(folder: Path, layout: str = "vila", **changes: Any) -> Path:
    return make_tiny_model(folder, layout, **{"dtype": "float16", "quantize": 32, "vision_layers": LAYERS, **changes})


def loaded(folder: Path, **placed: Any) -> VilaLlamaForCausalLM:
    return assemble(open_source(folder), Placement(device="cpu", **placed))


def rounded(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed ones beside the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear) and name != packing.HEAD
    }


@torch.no_grad()
def features(model: VilaLlamaForCausalLM) -> Tensor:
    vision = model.config.vision
    assert vision is not None
    shape = 2, 3, vision.image_size, vision.image_size
    return model.encode_images(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize("layout", ["vila", "llava", "llava_hf"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_a_tower_and_its_projector_are_packed_side_by_side(tmp_path: Path, layout: str, vision: str):
    model, floats = (loaded(made(tmp_path / "m", layout, vision=vision), tower=kind) for kind in ("int8", "float"))
    assert len(rounded(model)) == 6 * LAYERS + 2 and not rounded(floats)
    assert model.vision_tower is not None and model.vision_tower.one_call is not None
    for layer in model.vision_tower.vision_model.encoder.layers:
        blocks = [layer.get_submodule(f"self_attn.{name}").packed.blocks for name in ("q_proj", "k_proj", "v_proj")]
        for before, after in zip(blocks, blocks[1:], strict=False):
            assert after.data_ptr() == before.data_ptr() + before.nbytes
    assert 1e-4 < relative(features(model), features(floats)) < ROUNDED


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "mlp_downsample"])
def test_pictures_threads_and_batches_do_not_change_a_bit(tmp_path: Path, projector: str):
    model, before = loaded(made(tmp_path / "m", projector=projector)), cpu.threads()
    pixels = torch.randn((3, 3, 56, 56), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = model.encode_images(pixels)
        for threads in (1, 2, 3):
            cpu.set_threads(threads)
            cpu.set_least_work(0)
            assert torch.equal(model.encode_images(pixels), together)
            assert torch.equal(torch.cat([model.encode_images(one[None]) for one in pixels]), together)
    cpu.set_threads(before)
    cpu.set_least_work()


@pytest.mark.parametrize("projector", ["linear", "mlp_downsample", "mlp_downsample_3x3_fix"])
def test_projectors_of_other_kinds(tmp_path: Path, projector: str):
    folder = made(tmp_path / "m", projector=projector)
    model = loaded(folder)
    linears = [module for module in model.mm_projector.modules() if isinstance(module, nn.Linear | PackedLinear)]
    assert linears and all(isinstance(module, PackedLinear) for module in linears)
    assert relative(features(model), features(loaded(folder, tower="float"))) < ROUNDED


def test_sizes_between_the_linears_of_an_mlp_may_be_any(tmp_path: Path):
    """4304 = 16 x 269 of SigLIP: there are no groups in it; 272 is as bad."""
    folder = made(tmp_path / "m", vision="siglip", vision_intermediate_size=272)
    model = loaded(folder)
    mlp = model.vision_tower.vision_model.encoder.layers[0].mlp
    assert (mlp.fc1.packed.out_features, mlp.fc2.packed.in_features, mlp.fc1.out_features) == (384, 384, 272)
    assert mlp.fc2.packed.group == 128 and model.vision_tower.one_call is not None
    assert relative(features(model), features(loaded(folder, tower="float"))) < ROUNDED
    other = copy.deepcopy(model)
    assert not rounded(other) and relative(features(other), features(loaded(folder, tower="float"))) < 1e-5


def test_exact_and_float_keep_the_floats(tmp_path: Path):
    folder = made(tmp_path / "m")
    for placed in ({"exact": True}, {"tower": "float"}, {"dequantize": True}):
        model = loaded(folder, **placed)
        assert not rounded(model) and model.vision_tower.one_call is None
    exact = features(loaded(folder, exact=True))
    assert relative(exact, features(make_float(folder, tmp_path))) < 1e-5


def make_float(folder: Path, tmp_path: Path) -> VilaLlamaForCausalLM:
    """The same tower beside a decoder of floats."""
    return loaded(made(tmp_path / "float", quantize=None), dtype="float32")


def test_only_16_bit_towers_beside_4_bit_decoders(tmp_path: Path):
    assert not rounded(loaded(made(tmp_path / "float", quantize=None)))
    assert not rounded(loaded(made(tmp_path / "wide", dtype="float32")))
    in_8_bits = loaded(int8_folder(tmp_path / "int8"))
    assert set(rounded(in_8_bits)) == {"mm_projector.layers.0", "mm_projector.layers.2"}
    assert in_8_bits.vision_tower.one_call is not None


def test_a_tower_with_8_bits_on_disk_keeps_what_was_spared(tmp_path: Path):
    model = loaded(int8_folder(tmp_path / "int8", spare="fc2"))
    assert isinstance(model.vision_tower.vision_model.encoder.layers[0].mlp.fc2, nn.Linear)
    assert model.vision_tower.one_call is None and torch.isfinite(features(model)).all()


def test_without_the_kernels_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = made(tmp_path / "m")
    expected = features(loaded(folder, exact=True))
    monkeypatch.setattr(cpu, "available", lambda: (False, "no C++ compiler was found"))
    model = loaded(folder)
    assert not rounded(model) and torch.equal(features(model), expected)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_the_plan_counts_what_is_held(tmp_path: Path, dtype: str | None):
    source, placement = open_source(made(tmp_path / "m")), Placement(device="cpu", dtype=dtype)
    packed = packing.packing_of(source, placement)
    assert packed is not None
    model = assemble(source, placement)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    held += sum(module.packed.blocks.nbytes for module in model.modules() if hasattr(module, "packed"))
    kind = _dtype_of(source, placement, packed)
    assert planner.weights_bytes(source.index, kind, held=packed.held(source.index)) == held
    assert not any(name.endswith(("_proj.weight", "fc1.weight")) for name, _ in model.named_parameters())


def test_what_is_saved_has_the_floats(tmp_path: Path):
    folder = made(tmp_path / "m")
    model = loaded(folder)
    model.save_pretrained(tmp_path / "saved")
    ours, theirs = (load_file(home / "vision_tower" / "model.safetensors") for home in (tmp_path / "saved", folder))
    ours, theirs = ({name.removeprefix("vision_model."): t for name, t in each.items()} for each in (ours, theirs))
    linears = [name for name in theirs if name.endswith(("_proj.weight", "fc1.weight", "fc2.weight"))]
    assert len(linears) == 6 * LAYERS
    assert all(torch.equal(ours[name].half(), theirs[name]) for name in linears)
    assert torch.equal(features(load_model(tmp_path / "saved", device="cpu")), features(model))


def test_the_second_start_reads_what_was_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "KEPT_FROM", 0)
    folder = made(tmp_path / "m")
    first = features(loaded(folder))
    with monkeypatch.context() as patch:
        patch.setattr(cpu_tower, "round_linear", lambda *_, **__: pytest.fail("rounded again"))
        assert torch.equal(features(loaded(folder)), first)
    floats = features(loaded(folder, tower="float"))
    assert not torch.equal(floats, first)
    assert len(list((tmp_path / "cache/packed").glob("*.bin"))) == 2
    monkeypatch.setattr(cpu_tower, "GROUPS", (32,))  # other groups are other bytes
    assert not torch.equal(features(loaded(folder, tower="int8")), floats)


def test_another_towers_weights_are_packed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "KEPT_FROM", 0)
    first = features(loaded(made(tmp_path / "m")))
    assert not torch.equal(features(loaded(made(tmp_path / "m", seed=1))), first)


def test_a_small_model_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed_cache, "save", lambda *_: pytest.fail("kept"))
    loaded(made(tmp_path / "m"))


def test_weights_that_cannot_be_rounded_are_named(tmp_path: Path):
    folder = made(tmp_path / "m")
    home = folder / "vision_tower" / "model.safetensors"
    tensors = load_file(home)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))
    tensors[name][3, 3] = torch.nan
    save_file(tensors, home)
    with pytest.raises(
        ModelError, match=r"layers\.1\.mlp\.fc1: the weight holds NaN .*or keep them with --tower float"
    ):
        loaded(folder)
    assert features(loaded(folder, tower="float")).isnan().any()


def test_a_tower_of_another_kind_is_refused():
    with pytest.raises(UsageError, match="the tower is 'int4'; give int8 or float"):
        Placement(tower="int4")


def test_a_text_model_has_none(tmp_path: Path):
    assert packed_tower.packed_sizes(open_source(make_tiny_model(tmp_path / "m", "text", dtype="float16"))) == {}


def test_torchs_other_threads_stay_asleep_beside_the_kernels(tmp_path: Path):
    folder, before, seen = made(tmp_path / "m"), torch.get_num_threads(), list[int]()
    torch.set_num_threads(2)
    try:
        for placed in ({}, {"tower": "float"}):
            model = loaded(folder, **placed)
            model.mm_projector.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
            features(model)
            assert torch.get_num_threads() == 2
        assert seen == [1, 2]
    finally:
        torch.set_num_threads(before)
