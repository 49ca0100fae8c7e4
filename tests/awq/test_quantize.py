"""A block through the whole search: better than rounding to nearest, or rounded to nearest; refused by name."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from decoder_blocks import OUTLIERS, Block, decoder_block, sequences, state
from torch import Tensor, nn

from awq import quantize as quantize_module
from awq.errors import AwqError, CalibrationError, OptionsError, RecipeError, WeightsError
from awq.options import Options
from awq.quantize import BlockResult, quantize_block
from awq.recipes import recipe_for
from awq.scale import Layer
from tinychat_kernels.layout import QuantSpec, dequantize, quantize

RECIPE = recipe_for("llama")
LINEARS = {name for group in RECIPE.groups for name in group.linears}
INPUTS = sequences(40, 25, 60)


def search(block: Block, spec: QuantSpec | None = None, inputs: list[Tensor] | None = None, **changes: Any):
    options = Options(spec or QuantSpec(4, 32), **changes)
    return quantize_block(block.module, block.run, inputs or INPUTS, RECIPE, options, seed=0)


def output_error(block: Block, reference: nn.Module, inputs: list[Tensor]) -> float:
    """Mean squared difference of the block's outputs."""
    with torch.no_grad():
        pairs = [(block.run(block.module, x), block.run(reference, x)) for x in inputs]
    return float(torch.cat([(a - b).float().square().flatten() for a, b in pairs]).mean())


def rtn_error(block: Block, spec: QuantSpec, inputs: list[Tensor]) -> float:
    """The same for weights that the layouts round to nearest."""
    rounded = copy.deepcopy(block.module)
    with torch.no_grad():
        for name in LINEARS:
            weight = rounded.get_parameter(f"{name}.weight")
            weight.copy_(dequantize(quantize(weight, spec)))
    return output_error(block, rounded, inputs)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_result_is_the_block(family: str, kv_heads: int) -> None:
    """Weights and tensors put into a fresh block give what the searched block now gives, and all losses are told."""
    block = decoder_block(family, loud=20.0, num_key_value_heads=kv_heads)
    before = copy.deepcopy(block.module)
    found = search(block)
    assert found.kept == "awq"
    assert set(found.weights) == set(found.losses) == LINEARS
    assert set(found.clips) == LINEARS - {"self_attn.q_proj", "self_attn.k_proj"}
    assert found.block_loss.awq == pytest.approx(output_error(block, before, INPUTS), rel=1e-4)
    assert found.block_loss.rtn == pytest.approx(
        rtn_error(Block(before, block.run), QuantSpec(4, 32), INPUTS), rel=1e-4
    )
    parts = {f"{name}.weight": dequantize(logical) for name, logical in found.weights.items()}
    assert not parts.keys() & found.tensors.keys()
    before.load_state_dict(parts | found.tensors)
    assert output_error(block, before, INPUTS) < 1e-9
    scaled = {previous for previous, _, _ in found.scales}
    assert ("self_attn.v_proj" in scaled) <= (kv_heads == 4)
    assert "input_layernorm" in scaled


def test_norms_and_biases_are_judged_as_they_are_stored() -> None:
    """Scales are float16 in the file, and all else may have another type."""
    kinds = dict.fromkeys(state(decoder_block("qwen2").module), torch.bfloat16)
    kinds["input_layernorm.weight"] = torch.float32
    block = decoder_block("qwen2", loud=20.0)
    before = copy.deepcopy(block.module)
    found = quantize_block(
        block.module, block.run, INPUTS, RECIPE, Options(QuantSpec(4, 32), dtype=torch.float16), seed=0, stored=kinds
    )
    assert found.kept == "awq" and "self_attn.q_proj.bias" in found.tensors
    assert {name: tensor.dtype for name, tensor in found.tensors.items()} == {
        name: kinds[name] for name in found.tensors
    }
    assert {logical.scale.dtype for logical in found.weights.values()} == {torch.float16}
    parts = {f"{name}.weight": dequantize(logical, torch.float32) for name, logical in found.weights.items()}
    after = copy.deepcopy(before)
    after.load_state_dict(parts | found.tensors)
    assert found.block_loss.awq == pytest.approx(output_error(Block(before, block.run), after, INPUTS), rel=1e-5)
    assert output_error(block, after, INPUTS) < 1e-12


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("zero_point", [True, False])
def test_outlier_channels_cost_half_at_most(group: int, bits: int, zero_point: bool) -> None:
    """On other inputs than those of the search, from the same channels."""
    spec = QuantSpec(bits, group, zero_point)
    block = decoder_block("llama", loud=40.0, intermediate_size=128)
    before = Block(copy.deepcopy(block.module), block.run)
    held_out = sequences(50, 31, seed=99)
    found = search(block, spec, [*INPUTS, *sequences(80, 80, seed=7)])
    assert found.kept == "awq"
    assert found.block_loss.awq < found.block_loss.rtn / 2
    assert output_error(block, before.module, held_out) < rtn_error(before, spec, held_out) / 2
    assert all(int(logical.q.max()) <= spec.max_q for logical in found.weights.values())
    if not zero_point:
        assert all((logical.zero == 2 ** (bits - 1)).all() for logical in found.weights.values())
    groups = 1 if group == -1 else 64 // group
    assert found.weights["self_attn.q_proj"].scale.shape == (groups, 64)


def test_outliers_get_finer_weights() -> None:
    found = search(decoder_block("llama", loud=40.0))
    scale = next(scale for previous, _, scale in found.scales if previous == "input_layernorm")
    assert set(scale.topk(2).indices.tolist()) == set(OUTLIERS)


def test_linear_losses_are_those_of_the_outputs() -> None:
    """Also where rows and columns were scaled: up_proj gives a multiple of what it gave."""
    block = decoder_block("llama", loud=20.0)
    seen: list[Tensor] = []
    hook = block.module.get_submodule("mlp.up_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for hidden in INPUTS:
            block.run(block.module, hidden)
    hook.remove()
    x, weight = torch.cat(seen), block.module.get_parameter("mlp.up_proj.weight").detach().clone()
    found = search(block)
    now = dequantize(found.weights["mlp.up_proj"])
    scales = {previous: scale for previous, _, scale in found.scales}
    undone = now / scales["post_attention_layernorm"] * scales["mlp.up_proj"][:, None]
    rounded = dequantize(quantize(weight, QuantSpec(4, 32)))
    assert found.losses["mlp.up_proj"].rtn == pytest.approx(float((x @ (rounded - weight).T).square().mean()), rel=1e-3)
    assert found.losses["mlp.up_proj"].awq == pytest.approx(float((x @ (undone - weight).T).square().mean()), rel=1e-3)


@pytest.mark.parametrize("planted", [None, "harm", "nan"])
def test_a_block_that_awq_makes_worse_falls_back(monkeypatch: pytest.MonkeyPatch, planted: str | None) -> None:
    """Nothing gained, a scale that does harm, and one that makes the loss NaN: all give what rounding gives."""
    spec = QuantSpec(4, 32)
    block = decoder_block("llama", loud=40.0)
    before = state(block.module)
    if planted:
        scale = torch.full((64,), float("nan")) if planted == "nan" else torch.logspace(-2, 2, 64)
        monkeypatch.setattr(quantize_module, "search_scale", lambda layers, *_: scale.repeat(2)[: widths(layers)])
    options = Options(spec, scale_grid=1, clip=False, compensate=False)
    found = quantize_block(block.module, block.run, INPUTS, RECIPE, options, seed=0)
    assert found.kept == "rtn"
    assert (found.scales, found.clips) == ([], {})
    for name in LINEARS:
        for ours, theirs in zip(found.weights[name], quantize(before[f"{name}.weight"], spec), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(block.module.get_parameter(f"{name}.weight"), dequantize(found.weights[name]))
    assert torch.equal(found.tensors["input_layernorm.weight"], before["input_layernorm.weight"])
    assert not found.block_loss.awq < found.block_loss.rtn
    assert (found.block_loss.awq == found.block_loss.rtn) == (planted is None)


def widths(layers: list[Layer]) -> int:
    return layers[0].module.in_features


def same(a: BlockResult, b: BlockResult) -> bool:
    """Whether two results hold the same bytes."""
    tensors = [(a.tensors[name], b.tensors[name]) for name in a.tensors]
    for name in a.weights:
        tensors += zip(a.weights[name], b.weights[name], strict=True)
    tensors += [(a.clips[name], b.clips[name]) for name in a.clips]
    return all(torch.equal(x, y) for x, y in tensors) and (a.losses, a.block_loss) == (b.losses, b.block_loss)


@pytest.mark.parametrize(
    "changes", [{}, {"sketch_rows": 16, "loss_tokens": 40, "compensate": False}, {"duo": False}, {"compensate": False}]
)
def test_the_same_inputs_give_the_same_bytes(changes: dict[str, Any]) -> None:
    first, second = (search(decoder_block("qwen2", loud=20.0), **changes) for _ in range(2))
    assert same(first, second)


@pytest.mark.parametrize(
    "changes",
    [{"duo": False}, {"clip": False}, {"scale_grid": 1}, {"max_shrink": 0.2}, {"compensate": False}],
)
def test_options_change_the_result(changes: dict[str, Any]) -> None:
    """And each search by itself is still better than rounding to nearest."""
    spec = QuantSpec(3, 32)
    plain, other = (search(decoder_block("llama", loud=20.0, seed=4), spec, **kw) for kw in ({}, changes))
    assert other.kept == plain.kept == "awq"
    assert not same(plain, other) if plain.clips.keys() == other.clips.keys() else True
    assert bool(other.clips) == changes.get("clip", True)
    assert bool(other.scales) == (changes.get("scale_grid") != 1)


def test_every_option_is_tested_here() -> None:
    known = {"spec", "scale_grid", "clip_grid", "max_shrink", "clip", "dtype", "duo", "compensate"}
    assert {field.name for field in fields(Options)} == known | {"loss_tokens", "sketch_rows"}


def test_compensation_helps_on_other_inputs() -> None:
    """Inputs of which few directions hold the most, as hidden states are."""
    mix = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    few = [x[:, :8] @ mix + 0.3 * x for x in sequences(*[64] * 20)]
    block = decoder_block("llama", loud=5.0)
    before = Block(copy.deepcopy(block.module), block.run)
    plain = copy.deepcopy(block.module)
    search(Block(plain, block.run), inputs=few[:16], compensate=False)
    search(block, inputs=few[:16])
    assert output_error(block, before.module, few[16:]) < 0.6 * output_error(
        Block(plain, block.run), before.module, few[16:]
    )


def test_a_sample_and_sketches_come_close() -> None:
    """Sums of tokens and some of the sequences give nearly the quality of all."""
    inputs = sequences(*[50] * 12)
    whole = search(decoder_block("llama", loud=5.0), inputs=inputs, loss_tokens=None, compensate=False)
    block = decoder_block("llama", loud=5.0)
    before = copy.deepcopy(block.module)
    search(block, inputs=inputs, loss_tokens=150, sketch_rows=48, compensate=False)
    assert output_error(block, before, inputs) < whole.block_loss.awq * 1.1


def test_emit_is_given_what_the_next_block_is_fitted_to() -> None:
    block = decoder_block("llama", loud=20.0)
    before, given = copy.deepcopy(block.module), dict[int, Tensor]()
    quantize_block(block.module, block.run, INPUTS, RECIPE, Options(QuantSpec(4, 32)), seed=0, emit=given.__setitem__)
    assert list(given) == [0, 1, 2]
    for i, hidden in enumerate(INPUTS):
        assert torch.equal(given[i], block.run(before, hidden))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_blocks(dtype: torch.dtype) -> None:
    inputs = sequences(30, 20, dtype=dtype)
    block = decoder_block("llama", dtype=dtype, loud=40.0)
    before = copy.deepcopy(block.module)
    found = search(block, inputs=inputs)
    assert found.kept == "awq"
    assert found.block_loss.awq < found.block_loss.rtn / 2
    assert found.block_loss.awq == pytest.approx(output_error(block, before, inputs), rel=1e-2)
    assert {tensor.dtype for tensor in found.tensors.values()} == {dtype}
    assert {logical.scale.dtype for logical in found.weights.values()} == {dtype}
    assert {parameter.dtype for parameter in block.module.parameters()} == {dtype}


def test_a_float32_block_for_a_float16_checkpoint() -> None:
    """Weights are rounded with the scales that are stored."""
    block = decoder_block("llama", loud=20.0)
    found = search(block, dtype=torch.float16)
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float16}
    for name, logical in found.weights.items():
        assert logical.scale.dtype == torch.float16
        weight = block.module.get_parameter(f"{name}.weight")
        assert weight.dtype == torch.float32
        assert torch.equal(weight, dequantize(logical, torch.float32))


def test_few_tokens_suffice() -> None:
    found = search(decoder_block("llama", loud=20.0), inputs=sequences(1))
    assert found.block_loss.awq < found.block_loss.rtn


def test_groups_of_zeros_and_of_one_sign() -> None:
    block = decoder_block("llama", loud=10.0)
    with torch.no_grad():
        block.module.get_parameter("mlp.up_proj.weight")[:, :32] = 0
        block.module.get_parameter("mlp.down_proj.weight").abs_().add_(5)
        block.module.get_parameter("self_attn.o_proj.weight")[:8] = 0
    found = search(block)
    assert found.block_loss.awq <= found.block_loss.rtn
    down = dequantize(found.weights["mlp.down_proj"])
    assert not dequantize(found.weights["mlp.up_proj"])[:, :32].any()
    scale = {previous: scale for previous, _, scale in found.scales}.get("mlp.up_proj", torch.ones(96))
    assert float((down / scale - 5.1).abs().max()) < 1.5


def broken(name: str, value: float) -> Block:
    block = decoder_block("qwen2")
    with torch.no_grad():
        block.module.get_parameter(name).view(-1)[5] = value
    return block


@pytest.mark.parametrize(
    ("block", "changes", "error", "sentence"),
    [
        (broken("mlp.up_proj.weight", float("nan")), {}, WeightsError, "mlp.up_proj.weight holds NaN or Inf values"),
        (broken("self_attn.q_proj.bias", float("inf")), {}, WeightsError, "self_attn.q_proj.bias holds NaN or Inf"),
        (
            decoder_block("llama", intermediate_size=80), {}, WeightsError,
            "mlp.down_proj cannot be quantized: in_features=80 is not a multiple of group_size=32; choose",
        ),
        (
            decoder_block(), {"inputs": [torch.full((3, 64), torch.nan)]}, CalibrationError,
            "sequence 0 gives self_attn.q_proj inputs that are NaN or Inf",
        ),
        (
            Block(nn.Sequential(nn.Linear(64, 64)), lambda module, x: module(x)), {}, RecipeError,
            "the block has no input_layernorm, mlp, mlp.down_proj",
        ),
    ],
)  # fmt: skip
def test_refusals_name_the_part(block: Block, changes: dict[str, Any], error: type[AwqError], sentence: str) -> None:
    before = state(block.module)
    with pytest.raises(error, match=sentence) as caught:
        search(block, **changes)
    assert str(caught.value) == f"{caught.value.message}; {caught.value.remedy}"
    after = state(block.module)
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scale_grid": 0}, "scale_grid is 0, it must be 1 or more; give a scale_grid of at least 1"),
        ({"loss_tokens": -5}, "loss_tokens is -5, it must be 1 or more"),
        ({"max_shrink": 1.0}, "max_shrink is 1.0, it must be from 0 to below 1"),
        ({"dtype": torch.int8}, "dtype is torch.int8, scales need a float type"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionsError, match=sentence):
        Options(**changes)
