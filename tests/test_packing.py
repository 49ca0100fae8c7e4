"""Models on the CPU backend: what is packed, what it takes, where it comes from, and that it is the same model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from same import assert_same
from torch import nn

from make_tiny_model import make_tiny_model
from tinychat import packed_cache, packing, planner
from tinychat.errors import UsageError
from tinychat.layers.embedding import StoredEmbedding
from tinychat.layers.head import PackedHead
from tinychat.layers.linear import QuantLinear
from tinychat.layers.packed_linear import PackedLinear
from tinychat.load import _dtype_of, assemble, load_folder, load_model, open_source, plan
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat.placement import Placement
from tinychat.terminal.progress import words
from tinychat_kernels import build, cpu, registry
from tinychat_kernels.errors import BuildError, KernelError

available, reason = cpu.available()
pytestmark = [
    pytest.mark.skipif(not available, reason=reason),
    pytest.mark.usefixtures("on_cpu"),
]
TOKENS = torch.arange(1, 20)[None]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TINYCHAT_BACKEND", raising=False)
    monkeypatch.setenv("TINYCHAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["vila", "tied", "text"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    layout, tied = ("vila", False) if request.param == "vila" else ("text", request.param == "tied")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "tied": tied}
    return make_tiny_model(tmp_path / "model", layout, dtype="float16", quantize=64, **sizes)


def loaded(folder: Path, **placed: Any) -> VilaLlamaForCausalLM:
    return assemble(open_source(folder), Placement(device="cpu", **placed))


def by_ref(folder: Path, monkeypatch: pytest.MonkeyPatch) -> VilaLlamaForCausalLM:
    with monkeypatch.context() as patch:
        patch.setenv("TINYCHAT_BACKEND", "ref")
        return loaded(folder)


@torch.no_grad()
def logits(model: VilaLlamaForCausalLM) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def linears(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def test_every_linear_is_packed_and_those_of_one_input_lie_side_by_side(folder: Path):
    model = loaded(folder)
    assert len(linears(model)) == 14 and all(linear.prepared for linear in linears(model).values())
    for layer in model.llm.model.layers:
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            blocks = [layer.get_submodule(name).packed.blocks for name in names]
            for before, after in zip(blocks, blocks[1:], strict=False):
                assert after.data_ptr() == before.data_ptr() + before.nbytes


def test_exact_is_the_same_and_int8_is_near(folder: Path, monkeypatch: pytest.MonkeyPatch):
    expected = logits(by_ref(folder, monkeypatch))
    assert_same(logits(loaded(folder, exact=True, head="float")), expected)
    near = logits(loaded(folder))
    assert torch.nn.functional.cosine_similarity(near, expected, dim=-1).min() > 0.99
    assert not torch.equal(near, expected)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("kind", "expected"), [("auto", None), ("float", torch.float32), ("int8", torch.int8)])
def test_keys_and_values_are_planned_as_they_are_made(
    folder: Path, kind: str, expected: torch.dtype | None, exact: bool
):
    placement = Placement(device="cpu", kv_cache_dtype=kind, exact=exact)
    source, model = open_source(folder), loaded(folder, kv_cache_dtype=kind, exact=exact)
    pool = model.make_cache(1, 96).pool
    assert model.one_call is not None
    assert pool.layers[0][0].dtype == (expected or (torch.float32 if exact else torch.float16))
    assert plan(source, 96, placement).kv == sum(part.nbytes for layer in pool.layers for part in layer)


def test_the_plan_counts_keys_and_values_without_the_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")
    model, source = loaded(folder), open_source(folder)
    assert model.one_call is None and model.make_cache().layer(0).k.dtype == torch.float32
    found = plan(source, 96, Placement(device="cpu"))
    assert found.kv == 96 * planner.kv_bytes(source.config.text, torch.float32)


def test_the_state_dict_is_what_is_on_disk(folder: Path, monkeypatch: pytest.MonkeyPatch):
    ours, plain = loaded(folder).state_dict(), by_ref(folder, monkeypatch).state_dict()
    assert ours.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(ours[name].to(tensor.dtype), tensor), name


def test_what_is_saved_loads_again(folder: Path, tmp_path: Path):
    model = loaded(folder)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved", device="cpu")), logits(model))


def test_the_plan_counts_what_is_held(folder: Path):
    source, placement = open_source(folder), Placement(device="cpu")
    packed = packing.packing_of(source, placement)
    assert packed is not None
    model = assemble(source, placement)
    tensors = [*model.parameters(), *model.buffers()]
    held = sum(tensor.nbytes for tensor in tensors)
    held += sum(linear.packed.blocks.nbytes for linear in linears(model).values())
    held += sum(module.packed.blocks.nbytes for module in model.modules() if isinstance(module, PackedLinear))
    dtype = _dtype_of(source, placement, packed)
    assert planner.weights_bytes(source.index, dtype, held=packed.held(source.index)) == held


def test_a_16_bit_head_gets_8_bits_unless_it_is_to_stay(folder: Path):
    model = loaded(folder)
    head, kept = model.llm.lm_head, loaded(folder, head="float").llm.lm_head
    assert isinstance(head, PackedHead) and head.packed.bits == 8
    assert isinstance(kept, nn.Linear)
    assert torch.equal(head.weight.float(), kept.weight.float())
    x = torch.randn(3, 128)
    with torch.no_grad():
        assert float((head(x) - kept(x)).norm() / kept(x).norm()) < 0.02


def test_a_32_bit_head_stays(tmp_path: Path):
    model = loaded(make_tiny_model(tmp_path / "model", "text", quantize=64))
    assert isinstance(model.llm.lm_head, nn.Linear)
    assert not isinstance(model.llm.model.embed_tokens, StoredEmbedding)


def test_embeddings_keep_their_16_bits_and_rows_come_in_the_models_type(folder: Path, monkeypatch: pytest.MonkeyPatch):
    table = loaded(folder).llm.model.embed_tokens
    assert table.weight.dtype == torch.float16
    rows = table(torch.tensor([[3, 5]]))
    assert rows.dtype == torch.float32
    assert torch.equal(rows, by_ref(folder, monkeypatch).llm.model.embed_tokens(torch.tensor([[3, 5]])))
    assert table.to(torch.bfloat16)(torch.tensor([3])).dtype == torch.bfloat16


def test_a_copy_computes_with_the_words(folder: Path):
    model = loaded(folder, exact=True)
    other = copy.deepcopy(model)
    assert not any(linear.prepared for linear in linears(other).values())
    assert isinstance(other.llm.lm_head, nn.Linear)
    assert torch.nn.functional.cosine_similarity(logits(other.float()), logits(model), dim=-1).min() > 0.999


def test_a_vocabulary_can_grow_under_a_packed_head(folder: Path):
    model = loaded(folder)
    rows = model.llm.config.vocab_size
    old = model.llm.lm_head.weight.float()
    model.resize_token_embeddings(rows + 8)
    assert torch.equal(model.llm.lm_head.weight[:rows].float(), old)
    assert logits(model).shape[-1] == rows + 8


def test_a_packed_head_stays_on_the_cpu(folder: Path):
    with pytest.raises(UsageError, match="the head is packed for the CPU, x is on meta"):
        loaded(folder).llm.lm_head(torch.empty(1, 128, device="meta"))


def test_gradients_flow_through_packed_weights(folder: Path):
    model = loaded(folder)
    embeds = model.embed_text(TOKENS).detach().requires_grad_()
    model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0


def test_nothing_is_packed_on_ref(folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = by_ref(folder, monkeypatch)
    assert not any(linear.prepared for linear in linears(model).values())
    assert isinstance(model.llm.lm_head, nn.Linear)


def test_nothing_is_packed_without_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "available", lambda: (False, "no C++ compiler was found"))
    assert packing.packing_of(open_source(folder), Placement(device="cpu")) is None
    monkeypatch.setenv("TINYCHAT_BACKEND", "cpu")
    with pytest.raises(KernelError, match=r"the backend cpu is off: no C\+\+ compiler was found"):
        loaded(folder)


def test_a_head_of_another_kind_is_refused():
    with pytest.raises(UsageError, match="the head is 'int4'; give int8 or float"):
        Placement(head="int4")
    with pytest.raises(UsageError, match="--kv-cache-dtype is 'fp8'; give auto, float, int8"):
        Placement(kv_cache_dtype="fp8")


def test_the_second_start_reads_what_was_packed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "KEPT_FROM", 0)
    first = logits(loaded(folder))
    (kept,) = (tmp_path / "cache/packed").glob("*.bin")
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "pack", lambda *_: pytest.fail("packed again"))
        patch.setattr(cpu, "quantize_head", lambda *_, **__: pytest.fail("rounded again"))
        assert torch.equal(logits(loaded(folder)), first)
    damaged = bytearray(kept.read_bytes())
    damaged[-70] ^= 1
    kept.write_bytes(damaged)
    assert torch.equal(logits(loaded(folder)), first)
    assert isinstance(loaded(folder, head="float").llm.lm_head, nn.Linear)
    assert len(list((tmp_path / "cache/packed").glob("*.bin"))) == 2


def test_other_weights_are_packed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "KEPT_FROM", 0)
    made = make_tiny_model(tmp_path / "model", "text", dtype="float16", quantize=32)
    first = logits(loaded(made))
    other = logits(loaded(make_tiny_model(made, "text", dtype="float16", quantize=32, seed=1)))
    assert not torch.equal(first, other)
    assert len(list((tmp_path / "cache/packed").glob("*.bin"))) == 2


def test_a_small_model_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed_cache, "save", lambda *_: pytest.fail("kept"))
    loaded(folder)


def test_who_waits_for_the_compiler_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    source, placed = open_source(folder), Placement(device="cpu")
    monkeypatch.setattr(build, "installed", lambda: None)
    assert packing.waits_for_compiler(source, placed)
    seen: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(registry, "chosen", lambda: registry.Backend("ref", True, "after the compiler"))
        load_folder(folder, placed, progress=lambda step: seen.append(words(step)))
    assert seen[0] == "compiling the CPU kernels, this once" and seen[1].startswith("loading ")
    assert not packing.waits_for_compiler(source, Placement(device="cpu", dequantize=True))
    monkeypatch.setattr(build, "find_compiler", raises_build_error)
    assert not packing.waits_for_compiler(source, placed)
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")
    assert not packing.waits_for_compiler(source, placed)


def raises_build_error() -> list[str]:
    raise BuildError("no C++ compiler was found")


# What the user is told


def notes(folder: Path, **placed: Any) -> tuple[str, ...]:
    return load_folder(folder, Placement(device="cpu", **placed)).notes


def test_falling_back_is_said_with_a_remedy_unless_it_was_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert notes(folder) == ()
    monkeypatch.setattr(cpu, "available", lambda: (False, "no C++ compiler was found"))
    sentence = "4-bit layers run in plain torch, which is slow (cpu is off: no C++ compiler was found); "
    assert notes(folder) == (f"{sentence}install a C++ compiler if there is none, or give --dequantize",)
    assert notes(folder, dequantize=True) == ()
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")
    assert notes(folder) == ()


def test_a_float_model_falls_back_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "available", lambda: (False, "no C++ compiler was found"))
    assert notes(make_tiny_model(tmp_path / "model", "text")) == ()


def test_more_threads_than_cores_are_said(folder: Path):
    cores = cpu.usable_cores()
    assert notes(folder, threads=cores) == ()
    wanted = f"{cores + 1} threads on {cores} cores wait for each other: --threads {cores} is faster"
    assert notes(folder, threads=cores + 1) == (wanted,)
    cpu.set_threads(0)


def test_a_cache_that_cannot_be_written_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(packing, "KEPT_FROM", 0)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/packed").touch()
    kept = f"the packed weights cannot be kept in {tmp_path}/cache/packed, so every start packs them; see"
    assert [note.startswith(kept) for note in notes(folder)] == [True]
    (tmp_path / "cache/packed").unlink()
    assert notes(folder) == notes(folder) == ()


@pytest.mark.parametrize(
    ("option", "placed", "why"),
    [
        ("--exact", {"exact": True, "dequantize": True}, "--dequantize takes them as floats"),
        ("--head int8", {"dequantize": True}, "--dequantize takes them as floats"),
        ("--tower int8", {"dequantize": True}, "--dequantize takes them as floats"),
        ("--tower int8", {"exact": True}, "--exact keeps the tower's floats"),
    ],
)
def test_options_that_do_nothing_are_refused(folder: Path, option: str, placed: dict[str, Any], why: str):
    with pytest.raises(UsageError, match=f"{option} cannot do anything: {why}; leave it out"):
        notes(folder, asked=frozenset([option]), **placed)
    notes(folder, asked=frozenset(["--exact", "--head int8"]), exact=True)
    notes(folder, asked=frozenset(["--head int8", "--tower int8"]))


def test_options_of_4_bit_models_are_refused_elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    floats = make_tiny_model(tmp_path / "floats", "text")
    for option in ("--exact", "--head int8", "--tower int8"):
        with pytest.raises(UsageError, match=f"{option} cannot do anything: the model has no 4-bit layers; leave it"):
            notes(floats, asked=frozenset([option]))
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")
    with pytest.raises(UsageError, match="--exact cannot do anything: TINYCHAT_BACKEND asks for ref; leave it out"):
        notes(folder, asked=frozenset(["--exact"]), exact=True)


def test_progress_counts_tensors_and_then_linears(folder: Path):
    seen: list[tuple[int, int]] = []
    assemble(open_source(folder), Placement(device="cpu"), lambda step: seen.append((step.done, step.total)))
    assert len({total for _, total in seen}) == 1 and [done for done, _ in seen] == list(range(1, seen[0][1] + 1))
