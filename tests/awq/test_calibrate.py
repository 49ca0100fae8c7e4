"""Sums stand for activations: exactly where they can, without bias where they cannot."""

from __future__ import annotations

import pytest
import torch
from decoder_blocks import decoder_block, sequences
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from awq.calibrate import Moments, Sketch, collect
from awq.errors import CalibrationError

CPU = torch.device("cpu")


def moments_of(x: Tensor, width: int, rows: int, pieces: int = 3, seed: int = 0) -> Moments:
    out = Moments(x.shape[1], width, rows, seed, CPU)
    for piece in x.tensor_split(pieces):
        out.add(piece)
    return out


@given(st.integers(1, 50), st.sampled_from([32, 64]), st.sampled_from([16, 48, 64, 1024]), st.integers(0, 99))
def test_errors_equal_those_of_the_activations(tokens: int, width: int, rows: int, seed: int) -> None:
    """Gram matrices always, sketches up to their number of rows."""
    generator = torch.Generator().manual_seed(seed)
    x, delta = torch.randn(tokens, 64, generator=generator), torch.randn(5, 64, generator=generator)
    sums = moments_of(x, width, rows)
    torch.testing.assert_close(sums.mean_magnitude(), x.abs().mean(0))
    if rows >= 64 or tokens <= rows:
        assert sums.error(delta) == pytest.approx(float((x @ delta.T).square().mean()), rel=1e-4)
    if rows >= width or tokens <= rows:
        x_groups, groups = x.unflatten(1, (-1, width)), delta.unflatten(1, (-1, width))
        expected = torch.einsum("tbg,nbg->tnb", x_groups, groups).square().mean(0)
        torch.testing.assert_close(sums.group_errors(groups), expected, rtol=1e-4, atol=1e-5)


def test_sketches_are_right_on_average() -> None:
    """One loud token among many: a sample would miss it or overrate it."""
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    x[123] *= 100
    delta = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    exact = float((x @ delta.T).square().mean())
    found = torch.tensor([moments_of(x, 64, 32, seed=seed).error(delta) for seed in range(20)])
    assert float(found.mean()) == pytest.approx(exact, rel=0.01)
    assert float((found / exact - 1).abs().max()) < 0.05


@pytest.mark.parametrize("rows", [32, 1024])
def test_pieces_do_not_matter(rows: int) -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    delta = torch.eye(64)
    assert moments_of(x, 64, rows, 1).error(delta) == pytest.approx(moments_of(x, 64, rows, 7).error(delta), rel=1e-5)


def gather(inputs: list[Tensor], budget: int | None = 2048, emit: object = None):
    block, run = decoder_block()
    one = Moments(64, 32, 1024, 0, CPU)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    inspected: dict[str, nn.Module] = {"mlp": block.get_submodule("mlp")}
    with torch.no_grad():
        return one, collect(block, run, inputs, dict.fromkeys(names, one), inspected, budget, emit)  # type: ignore[arg-type]


def test_linears_that_share_an_input_count_it_once() -> None:
    one, sample = gather(sequences(5, 9))
    assert one.count == 14
    assert [len(output) for output in sample.output] == [5, 9]
    assert [tuple(call.output.shape) for call in sample.calls["mlp"]] == [(1, 5, 64), (1, 9, 64)]


@pytest.mark.parametrize(("budget", "taken"), [(None, 8), (10_000, 8), (40, 4), (1, 1)])
def test_the_sample_is_spread_over_the_sequences(budget: int | None, taken: int) -> None:
    inputs = sequences(*[10] * 8)
    one, sample = gather(inputs, budget)
    assert one.count == 80
    assert len(sample.hidden) == len(sample.calls["mlp"]) == taken
    if taken == 4:
        places = [next(i for i, x in enumerate(inputs) if torch.equal(x, hidden)) for hidden in sample.hidden]
        assert places == [0, 2, 4, 6]


def test_the_sample_outlives_inputs_that_emit_overwrites() -> None:
    inputs = sequences(4, 4)
    before = [hidden.clone() for hidden in inputs]
    _, sample = gather(inputs, None, lambda i, output: inputs[i].copy_(output))
    assert all(torch.equal(a, b) for a, b in zip(sample.hidden, before, strict=True))
    assert not torch.equal(inputs[0], before[0])


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ([], "there are no calibration inputs; give at least one sequence"),
        ([torch.zeros(3, 64), torch.zeros(0, 64)], r"sequence 1 has shape \[0, 64\]; give \[T, D\] with T > 0"),
        ([torch.zeros(1, 3, 64)], r"sequence 0 has shape \[1, 3, 64\]"),
        ([torch.ones(3, 64), torch.full((2, 64), torch.nan)], "sequence 1 gives self_attn.q_proj inputs that are NaN"),
        ([torch.full((2, 64), torch.inf)], "sequence 0 gives self_attn.q_proj inputs that are NaN or Inf"),
    ],
)
def test_bad_inputs_are_refused_by_name(inputs: list[Tensor], sentence: str) -> None:
    with pytest.raises(CalibrationError, match=sentence):
        gather(inputs)


def test_products_of_pairs_are_exact_beside_a_sketch() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(2))
    sums = Moments(64, 32, 16, 0, CPU, pairs=True)
    for piece in x.split(20):
        sums.add(piece)
    scale = torch.linspace(0.5, 2, 64)
    expected = (x / scale).T @ (x / scale) / 50
    assert torch.allclose(sums.products(scale), expected, atol=1e-5)
    assert isinstance(sums.whole, Sketch)
