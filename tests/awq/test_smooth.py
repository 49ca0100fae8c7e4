"""SmoothQuant on encoder layers of transformers: exact folding, the paper's scales, outliers, what stays as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from awq import smooth
from awq.errors import AwqError, CalibrationError, OptionsError, RecipeError, WeightsError
from awq.recipes import Recipe, ScaleGroup, encoder_recipe
from awq.scale import Factors, frozen
from awq.smooth import Scale, SmoothOptions, SmoothResult, candidates, smooth_block
from tinychat_kernels.int8 import dequantize_rows, quantize_rows

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
LINEARS = [f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")] + ["mlp.fc1", "mlp.fc2"]
FAMILIES = ("clip", "siglip")
OUTLIER = 5


def layer(family: str, outlier: float = 1.0, seed: int = 0) -> nn.Module:
    """A random layer of transformers; one channel of its norms is `outlier` times as large."""
    torch.manual_seed(seed)
    kinds = {"clip": (CLIPVisionConfig, CLIPEncoderLayer), "siglip": (SiglipVisionConfig, SiglipEncoderLayer)}
    config, kind = kinds[family]
    block = kind(config(**SIZES, attn_implementation="eager")).eval().requires_grad_(False)
    for parameter in block.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    for norm in (block.layer_norm1, block.layer_norm2):
        norm.weight[OUTLIER] *= outlier
    return block


def run(block: nn.Module, hidden: Tensor) -> Tensor:
    out = block(hidden[None], None)
    return (out[0] if isinstance(out, tuple) else out)[0]


def states(count: int = 6, tokens: int = 20, seed: int = 1) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 32, generator=draw) for _ in range(count)]


def smoothed(
    block: nn.Module,
    family: str = "clip",
    inputs: Sequence[Tensor] = (),
    dtype: torch.dtype | None = None,
    **options: Any,
) -> SmoothResult:
    stored = dict.fromkeys(block.state_dict(), dtype) if dtype else None
    return smooth_block(block, run, inputs or states(), encoder_recipe(family), SmoothOptions(**options), stored=stored)


def install(block: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        setattr(block.get_submodule(module), kind, frozen(tensor))


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_leaves_the_function_alone(family):
    """Any scales of the recipe's groups, not those of a search alone."""
    block, factors = layer(family), Factors()
    wanted = [run(block, hidden) for hidden in states()]
    for i, group in enumerate(encoder_recipe(family).groups):
        scale = torch.randn(32, generator=torch.Generator().manual_seed(i)).exp()
        factors.add(group.previous, group.linears, scale)
    folded = {name: factors.apply(name, tensor) for name, tensor in block.state_dict().items()}
    moved = [name for name, tensor in folded.items() if not torch.equal(tensor, block.state_dict()[name])]
    assert len(moved) == 10  # two of each norm, the weights of all linears but fc2, and the bias of v_proj
    install(block, folded)
    for hidden, output in zip(states(), wanted, strict=True):
        torch.testing.assert_close(run(block, hidden), output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_stored_is_the_folded_layer(family, dtype):
    block = layer(family, outlier=40)
    original = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    result, factors = smoothed(block, family, dtype=dtype), Factors()
    for scale in result.scales:
        factors.add(scale.previous, scale.linears, scale.values)
    assert result.kept == "smooth" and not result.spared and set(result.weights) == set(LINEARS)
    assert {tensor.dtype for tensor in result.tensors.values()} == {dtype}
    assert set(result.tensors) == original.keys() - {f"{name}.weight" for name in LINEARS}
    for name, tensor in result.tensors.items():
        assert torch.equal(tensor, factors.apply(name, original[name]).to(dtype))
    for name, packed in result.weights.items():
        weight = quantize_rows(factors.apply(f"{name}.weight", original[f"{name}.weight"]))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(packed, weight, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outlier_channel_is_smoothed_away(family):
    """One channel a hundred times as large as the others leaves them one or two bits, unless it is scaled down."""
    calm, wild = (smoothed(layer(family, outlier), family, bound=1e9) for outlier in (1, 100))
    assert calm.block_error.plain < 1e-3
    assert wild.block_error.plain > 20 * wild.block_error.smooth
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"):
        assert wild.errors[name].plain > 20 * wild.errors[name].smooth
    assert wild.errors["mlp.fc2"].plain == wild.errors["mlp.fc2"].smooth
    scales = {scale.previous: scale.values for scale in wild.scales}
    assert all(int(scales[name].argmax()) == OUTLIER for name in ("layer_norm1", "layer_norm2"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_search_is_at_least_as_good_as_the_papers_exponent(family):
    searched, paper = (smoothed(layer(family, 30), family, grid=grid) for grid in (10, 2))
    for name in LINEARS:
        assert searched.errors[name].smooth <= paper.errors[name].smooth * 1.2
    assert sum(e.smooth for e in searched.errors.values()) <= sum(e.smooth for e in paper.errors.values())


def test_scales_are_the_papers_up_to_a_factor():
    """The equation of section 4, in the names of its own code; rounding by rows and by tokens sees no factor."""
    draw = torch.Generator().manual_seed(0)
    act_scales, weight_scales = torch.rand(16, generator=draw) + 0.1, torch.rand(16, generator=draw) + 0.1
    found = dict(candidates(act_scales, weight_scales, 4))
    assert list(found) == [0, 0.25, 0.5, 0.75, 1]
    for alpha, scale in found.items():
        wanted = (act_scales.pow(alpha) / weight_scales.pow(1 - alpha)).clamp(min=1e-5)
        ratio = scale / wanted
        torch.testing.assert_close(ratio, ratio[:1].expand(16))
        assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-5)


def test_inputs_that_say_nothing_keep_their_scale():
    x, w = torch.tensor([0.0, 2.0, 4.0, 3.0]), torch.tensor([1.0, 1.0, 2.0, 0.0])
    for _, scale in candidates(x, w, 4):
        assert scale[[0, 3]].tolist() == [1, 1] and torch.isfinite(scale).all()
    assert all(torch.equal(scale, torch.ones(4)) for _, scale in candidates(torch.zeros(4), w, 4))


def test_errors_are_those_of_the_sums():
    block = layer("clip", 20)
    inputs, weight = states(), block.mlp.fc1.weight.double().clone()
    seen: list[Tensor] = []
    hook = block.mlp.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    for hidden in inputs:
        run(block, hidden)
    hook.remove()
    result = smoothed(block, inputs=inputs, tokens=10**6)
    x = torch.cat(seen)
    step = x.abs().amax(1, keepdim=True) / 127
    rounded = torch.round(x / step) * step @ dequantize_rows(quantize_rows(weight), torch.float64).T
    wanted = (rounded - x @ weight.T).square().sum() / (x @ weight.T).square().sum()
    assert result.errors["mlp.fc1"].plain == pytest.approx(float(wanted), rel=1e-3)


def test_the_next_layer_gets_what_this_one_gave():
    block, inputs, given = layer("clip"), states(), dict[int, Tensor]()
    wanted = [run(block, hidden) for hidden in inputs]

    def overwrite(i: int, output: Tensor) -> None:
        given[i] = output.clone()
        inputs[i].zero_()

    result = smooth_block(block, run, inputs, encoder_recipe("clip"), SmoothOptions(), overwrite)
    assert all(torch.equal(given[i], output) for i, output in enumerate(wanted))
    assert 0 < result.block_error.smooth < 1e-3


def test_a_linear_that_is_too_far_off_stays_as_it_was():
    block = layer("siglip")
    block.mlp.fc1.weight[7] *= 3000  # one input of fc2 is large for many tokens, and no scale can pass the activation
    block.mlp.fc2.weight[:, 7] *= 1e-4
    weight = block.mlp.fc2.weight.clone()
    result = smoothed(block, "siglip", dtype=torch.float16)
    assert result.spared == ("mlp.fc2",) and "mlp.fc2" not in result.weights
    assert torch.equal(result.tensors["mlp.fc2.weight"], weight.half())
    assert min(result.errors["mlp.fc2"]) > 1e-3 and min(result.block_error) < 1e-2


def test_smoothing_that_does_harm_is_not_kept(monkeypatch):
    group = encoder_recipe("clip").groups[2]
    harm = Scale(group.previous, group.linears, 0.5, torch.logspace(-3, 3, 32))
    monkeypatch.setattr(smooth, "_search", lambda *_: iter([harm]))
    block = layer("clip")
    norm = block.layer_norm2.weight.clone()
    result = smoothed(block, bound=1e9)
    assert result.kept == "plain" and not result.scales and result.block_error.plain < result.block_error.smooth
    assert torch.equal(result.tensors["layer_norm2.weight"], norm)


def test_one_token_and_one_sequence_are_enough():
    assert smoothed(layer("clip"), inputs=states(1, 1)).kept in ("smooth", "plain")


def spoiled(name: str) -> nn.Module:
    block = layer("clip")
    block.get_parameter(name)[0] = float("nan")
    return block


@pytest.mark.parametrize(
    ("block", "inputs", "error", "words"),
    [
        (spoiled("mlp.fc1.bias"), states(), WeightsError, "mlp.fc1.bias holds NaN or Inf values; check the checkpoint"),
        (
            layer("clip"),
            [states(1)[0] * float("inf")],
            CalibrationError,
            "sequence 0 gives self_attn.q_proj inputs that",
        ),
    ],
)
def test_what_is_not_finite_is_refused(block, inputs, error, words):
    with pytest.raises(error, match=words):
        smoothed(block, inputs=inputs)


def test_what_cannot_work_is_refused():
    with pytest.raises(CalibrationError, match="there are no calibration inputs; give at least one sequence"):
        smooth_block(layer("clip"), run, [], encoder_recipe("clip"), SmoothOptions())
    strange = Recipe((ScaleGroup("norm", ("mlp.fc1",), "mlp.fc1"),))
    with pytest.raises(RecipeError, match="the block has no norm; use the recipe of its architecture"):
        smooth_block(layer("clip"), run, states(), strange, SmoothOptions())
    with pytest.raises(RecipeError, match="no recipe for the vision tower 'vit'; known are clip, siglip"):
        encoder_recipe("vit")
    for wrong, words in (({"grid": 0}, "grid is 0"), ({"tokens": -1}, "tokens is -1"), ({"bound": 0}, "bound is 0")):
        with pytest.raises(OptionsError, match=words):
            SmoothOptions(**wrong)
    assert issubclass(RecipeError, AwqError)
