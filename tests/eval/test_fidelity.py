"""Noise of known power gives its decibels; factors that AWQ moves between layers are no noise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tinychat.errors import ModelError
from tinychat.eval.fidelity import OutputErrors, compare_others, compare_weights, decibels, fitted, weights_in
from tinychat.layers.linear import QuantLinear
from tinychat_kernels.layout import QuantSpec


class Model(nn.Module):
    """Two layers of two linears, under the decoder's names."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.ModuleDict({"up_proj": nn.Linear(128, 64), "down_proj": nn.Linear(64, 128)}) for _ in range(2)]
        self.llm = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(layers)})})

    def layer(self, number: int) -> nn.ModuleDict:
        return self.get_submodule(f"llm.model.layers.{number}")  # type: ignore[return-value]


def noisy(x: Tensor, power: float, seed: int = 99) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return x + noise * (x.pow(2).mean() * power).sqrt()


def test_equal_weights_have_no_error() -> None:
    for together, each in compare_weights(Model(), weights_in(Model())):
        assert together.sqnr_db == math.inf and together.cosine == pytest.approx(1)
        assert each == {"up_proj": math.inf, "down_proj": math.inf}


def test_noise_is_found_in_its_layer_and_linear() -> None:
    model = Model()
    with torch.no_grad():
        up = model.layer(1)["up_proj"].weight
        up.copy_(noisy(up, 0.01))
    clean, (together, each) = compare_weights(model, weights_in(Model()))
    assert clean[0].sqnr_db == math.inf
    assert each["up_proj"] == pytest.approx(20, abs=0.3) and each["down_proj"] == math.inf
    # both linears have as many weights, the other one's variance (1 / 3K) is twice as large: a third of the power
    assert together.sqnr_db == pytest.approx(20 + 10 * math.log10(3), abs=0.4)
    assert together.cosine == pytest.approx(1 - 0.01 / 3 / 2, abs=3e-4)


class Ends(nn.Module):
    """Embeddings and a head, under the decoder's names."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        embeddings, head = nn.Embedding(5000, 16), nn.Linear(16, 5000, bias=False)
        self.llm = nn.ModuleDict({"model": nn.ModuleDict({"embed_tokens": embeddings}), "lm_head": head})
        self.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_and_embeddings_are_told_where_they_are_others(dtype: torch.dtype) -> None:
    model = Ends(dtype)
    assert compare_others(weights_in(model), weights_in(Ends())) == {}
    with torch.no_grad():
        head = model.get_submodule("llm.lm_head").weight
        head.copy_(noisy(head.float(), 0.001))  # type: ignore[operator, arg-type]
    found = compare_others(weights_in(model), weights_in(Ends()))
    assert list(found) == ["lm_head"] and found["lm_head"].sqnr_db == pytest.approx(30, abs=0.3)


def test_scales_that_awq_moves_are_no_error() -> None:
    base = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    into, out = (torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.5 for size in ((1, 128), (64, 1)))
    error = (fitted(base * into * out, base) - base).pow(2).sum() / base.pow(2).sum()
    assert decibels(float(error)) > 60
    moved = (fitted(noisy(base, 0.01) * into * out, base) - base).pow(2).sum() / base.pow(2).sum()
    assert decibels(float(moved)) == pytest.approx(20, abs=0.4)


@given(st.integers(0, 1000))
def test_the_fit_never_does_harm(seed: int) -> None:
    base, ours = (torch.randn(8, 16, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 5000))
    assert (fitted(ours, base) - base).norm() <= min((ours - base).norm(), base.norm()) * 1.0001


def test_quantized_linears_are_compared_by_what_they_stand_for() -> None:
    model, spec = Model(), QuantSpec(group_size=64)
    layer = model.layer(0)
    layer["up_proj"] = QuantLinear.from_linear(layer["up_proj"], spec)  # type: ignore[arg-type]
    (_, each), _ = compare_weights(model, weights_in(Model()))
    # uniform weights in 15 steps: 10 log10(15^2), and a little less for the range that groups extend to
    assert 20 < each["up_proj"] < 26 and each["down_proj"] == math.inf


def test_models_of_other_sizes_are_refused() -> None:
    with pytest.raises(ModelError, match=r"up_proj is \[64, 128\] here and \[3, 3\] in the model that it is compared"):
        list(compare_weights(Model(), lambda _: torch.zeros(3, 3)))


def test_every_token_weighs_the_same() -> None:
    base = torch.randn(2, 500, 256, generator=torch.Generator().manual_seed(0))
    ours = torch.stack([noisy(base[0], 0.1), base[1]])
    base[0, 0] *= 1e4  # one token of huge norm, as decoders have at their start
    ours[0, 0] = base[0, 0]
    errors = OutputErrors()
    errors.add(ours[:, :100], base[:, :100])
    errors.add(ours[:, 100:], base[:, 100:])
    first, second = errors.layers()
    assert first.sqnr_db == pytest.approx(10, abs=0.1) and first.cosine == pytest.approx(1 / math.sqrt(1.1), abs=2e-3)
    assert second.sqnr_db == math.inf and second.cosine == pytest.approx(1)
