"""The scale search against a plain rendering of the paper, and scales that leave a layer's function alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from decoder_blocks import decoder_block, sequences, state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from awq.calibrate import Moments, collect
from awq.options import Options
from awq.recipes import recipe_for
from awq.rounding import Rounding
from awq.scale import Factors, Inspection, Layer, candidates, search_scale
from tinychat_kernels.layout import QuantSpec, dequantize, quantize

SPEC = QuantSpec(4, 32)
ROUNDING = Rounding(SPEC, torch.float32)
PAPER = Options(SPEC, duo=False, compensate=False)


def layer_of(linear: nn.Linear, x: Tensor, name: str = "linear", clips: bool = False) -> Layer:
    sums = Moments(linear.in_features, 32, 1024, 0, torch.device("cpu"))
    sums.add(x)
    return Layer(name, linear, linear.weight.detach(), sums, clips)


@pytest.mark.parametrize(
    ("family", "changes", "unscaled"),
    [
        ("llama", {}, 0),
        ("llama", {"attention_bias": True, "mlp_bias": True}, 0),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": 7}, 1),
        ("qwen2", {"num_key_value_heads": 2}, 1),
        ("qwen2", {}, 0),
    ],
)
def test_scales_leave_the_function_alone(family: str, changes: dict[str, object], unscaled: int) -> None:
    """In float64, with biases: those of a previous linear are divided, those of scaled linears are not touched."""
    block, run = decoder_block(family, dtype=torch.float64, **changes)
    hidden = sequences(12, dtype=torch.float64)[0]
    factors, generator, left = Factors(), torch.Generator().manual_seed(3), 0
    for group in recipe_for(family).groups:
        width = block.get_submodule(group.linears[0]).in_features
        if block.get_parameter(f"{group.previous}.weight").shape[0] != width:
            left += 1
            continue
        factors.add(group.previous, group.linears, torch.rand(width, generator=generator) * 3 + 0.2)
    assert left == unscaled
    with torch.no_grad():
        before, weights = run(block, hidden), state(block)
        for name, parameter in block.named_parameters():
            parameter.copy_(factors.apply(name, parameter))
        torch.testing.assert_close(run(block, hidden), before, rtol=1e-10, atol=1e-10)
    changed = {name for name, tensor in state(block).items() if not torch.equal(tensor, weights[name])}
    assert {"input_layernorm.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"} <= changed
    assert not changed & {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "mlp.gate_proj.bias"}
    for name in changed - {name for name in changed if "norm" in name}:
        module = name.rpartition(".")[0]
        if name.endswith("weight"):
            torch.testing.assert_close(factors.undo(module, state(block)[name]), weights[name], rtol=1e-5, atol=1e-6)


def paper_scales(x: Tensor, grid: int = 20) -> list[Tensor]:
    """The definition, in float64: mean |x| to the power i/grid, at least 1e-4, over sqrt(max min)."""
    out = []
    for i in range(grid):
        s = x.double().abs().mean(0).pow(i / grid).clamp(min=1e-4)
        out.append(s / (s.max() * s.min()).sqrt())
    return out


def rounded(weight: Tensor, s: Tensor) -> Tensor:
    """Q(W s) / s by the layouts' own rounding."""
    return dequantize(quantize((weight.double() * s).float(), SPEC)).double() / s


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_a_linears_scale_is_the_papers(power: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator) * (torch.rand(64, generator=generator) * 9 + 0.1).pow(power)
    x[:, 5] = 0
    linear = nn.Linear(64, 8, bias=False)
    nn.init.normal_(linear.weight, generator=generator)
    weight = linear.weight.detach().clone()
    expected = paper_scales(x)
    losses = [float((x.double() @ (rounded(weight, s) - weight).T).square().sum()) for s in expected]
    found = search_scale([layer_of(linear, x)], None, ROUNDING, PAPER)
    best = expected[losses.index(min(losses))]
    torch.testing.assert_close(torch.ones(64) if found is None else found, best.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(linear.weight, weight)
    assert (found is not None) == (losses.index(min(losses)) > 0)


@pytest.mark.parametrize("inspect", ["self_attn", "mlp"])
def test_an_inspected_modules_scale_is_the_papers(inspect: str) -> None:
    """The module runs with the linears' weights replaced, on all tokens, and its output is compared in fp32."""
    block, run = decoder_block("llama", loud=12.0)
    group = next(group for group in recipe_for("llama").groups if group.inspect == inspect)
    linears = {name: block.get_submodule(name) for name in group.linears}
    inputs = sequences(1, 30, 21)
    seen: list[Tensor] = []
    hook = next(iter(linears.values())).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    sums = Moments(64, 32, 1024, 0, torch.device("cpu"))
    module = block.get_submodule(inspect)
    with torch.no_grad():
        sample = collect(block, run, inputs, dict.fromkeys(linears, sums), {inspect: module}, None, None)
        hook.remove()
        layers = [Layer(name, m, m.weight.detach(), sums, False) for name, m in linears.items()]  # type: ignore[arg-type]
        found = search_scale(layers, Inspection(module, sample.calls[inspect]), ROUNDING, PAPER)
        losses = []
        for s in paper_scales(torch.cat(seen)):
            changed = copy.deepcopy(block)
            for name in linears:
                weight = changed.get_parameter(f"{name}.weight")
                weight.copy_(rounded(weight, s))
            losses.append(loss_of_module(block, changed, inspect, run, inputs))
    best = paper_scales(torch.cat(seen))[losses.index(min(losses))]
    assert losses.index(min(losses)) > 0
    assert found is not None
    torch.testing.assert_close(found, best.float(), rtol=1e-5, atol=1e-6)


def loss_of_module(block: nn.Module, changed: nn.Module, name: str, run: object, inputs: list[Tensor]) -> float:
    """Squared difference of a module's outputs when both are given what the first block gives it."""
    total = 0.0

    def compare(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object], output: object) -> None:
        nonlocal total
        other = changed.get_submodule(name)(*args, **kwargs)
        ours, theirs = (out[0] if isinstance(out, tuple) else out for out in (output, other))
        total += float((ours - theirs).square().sum())

    hook = block.get_submodule(name).register_forward_hook(compare, with_kwargs=True)
    for hidden in inputs:
        run(block, hidden)  # type: ignore[operator]
    hook.remove()
    return total


@settings(max_examples=20)
@given(st.integers(0, 999), st.booleans(), st.sampled_from([3, 4]))
def test_no_scale_is_worse_than_none(seed: int, duo: bool, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 64, generator=generator) * torch.rand(64, generator=generator).mul(4).exp()
    linear = nn.Linear(64, 8, bias=False)
    nn.init.normal_(linear.weight, generator=generator)
    options = Options(QuantSpec(bits, 32), duo=duo)
    rounding = replace(ROUNDING, spec=options.spec)
    layer = layer_of(linear, x, clips=True)
    found = search_scale([layer], None, rounding, options)
    scale = torch.ones(64) if found is None else found
    quantized = dequantize(quantize(layer.weight * scale, options.spec)) / scale
    plain = dequantize(quantize(layer.weight, options.spec))
    assert layer.moments.error(quantized - layer.weight) <= layer.moments.error(plain - layer.weight) * (1 + 1e-5)
    assert torch.isfinite(scale).all()
    assert float(scale.min()) > 0


def test_duo_scales_weigh_the_weights() -> None:
    """A loud input whose weights are relatively large as well needs less protection."""
    linear = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        linear.weight.fill_(0.1)
        linear.weight[:, :32] = 1.0
        linear.weight[:, 32] = 1.0
    options = Options(SPEC, duo=True, scale_grid=2)
    ones, even, half = candidates([layer_of(linear, torch.ones(4, 64))], options, ROUNDING)
    assert (ones == 1).all()
    assert float(even[0] / even[33]) == pytest.approx(0.1, rel=1e-2)  # in its group channel 33 is a tenth of 32
    assert float(half[0] / half[33]) == pytest.approx(0.1**0.5, rel=1e-2)
    assert len(list(candidates([layer_of(linear, torch.ones(4, 64))], replace(options, scale_grid=1), ROUNDING))) == 1


def test_silent_inputs_are_no_trouble() -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    x[:, :40] = 0
    linear = nn.Linear(64, 8, bias=False)
    scales = list(candidates([layer_of(linear, x)], PAPER, ROUNDING))
    assert len(scales) == 20
    assert all(torch.isfinite(scale).all() and float(scale.min()) > 0 for scale in scales)
