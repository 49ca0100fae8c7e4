"""Projectors: layer numbers, shapes and token orders, stated apart from the code."""

from __future__ import annotations

import pytest
import torch
from same import assert_close
from torch import Tensor, nn

from tinychat.config import ProjectorConfig, TokenOrder
from tinychat.errors import ModelError
from tinychat.models.projector import Downsample, Projector

V, D = 12, 10  # the tower's width (divisible by 3) and the decoder's


def make(kind: str, **changes: object) -> Projector:
    torch.manual_seed(0)
    return Projector(ProjectorConfig(**{"type": kind, "mm_hidden_size": V, "hidden_size": D, **changes}))


def norm(width: int) -> tuple[str, tuple[int, ...]]:
    return "norm", (width,)


def linear(inputs: int, outputs: int) -> tuple[str, tuple[int, ...]]:
    return "linear", (outputs, inputs)


LAYERS = {  # Sequential index -> module with parameters
    "identity": {},
    "linear": {0: linear(V, D)},
    "mlp1x_gelu": {0: linear(V, D)},
    "mlp2x_gelu": {0: linear(V, D), 2: linear(D, D)},
    "mlp3x_gelu": {0: linear(V, D), 2: linear(D, D), 4: linear(D, D)},
    "mlp_downsample": {1: norm(4 * V), 2: linear(4 * V, D), 4: linear(D, D)},
    "mlp_downsample_2x2_fix": {1: norm(4 * V), 2: linear(4 * V, D), 4: linear(D, D)},
    "mlp_downsample_3x3_fix": {
        1: norm(9 * V), 2: linear(9 * V, 3 * V), 4: norm(3 * V), 5: linear(3 * V, D), 7: linear(D, D),
    },
    "mlp_downsample_3x3_s2": {
        1: norm(9 * V), 2: linear(9 * V, 3 * V), 4: norm(3 * V), 5: linear(3 * V, V),
        7: norm(V), 8: linear(V, V // 3), 10: norm(V // 3), 11: linear(V // 3, D), 13: linear(D, D),
    },
    "mlp_downsample_3x3_s2_new": {
        1: norm(9 * V), 2: linear(9 * V, 4 * V), 4: norm(4 * V), 5: linear(4 * V, 2 * V),
        7: norm(2 * V), 8: linear(2 * V, V), 10: norm(V), 11: linear(V, V // 3),
        13: norm(V // 3), 14: linear(V // 3, D), 16: linear(D, D),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_numbers_and_shapes(kind: str) -> None:
    made = make(kind)
    expected: dict[str, tuple[int, ...]] = {}
    for i, (what, shape) in LAYERS[kind].items():
        expected |= {f"layers.{i}.weight": shape, f"layers.{i}.bias": shape[:1]}
        assert isinstance(made.layers[i], nn.LayerNorm if what == "norm" else nn.Linear)
        assert what == "linear" or made.layers[i].eps == 1e-5
    assert {name: tuple(t.shape) for name, t in made.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("kind", "side", "tokens"),
    [("mlp2x_gelu", 5, 25), ("mlp_downsample", 4, 4), ("mlp_downsample", 27, 196), ("mlp_downsample_2x2_fix", 5, 9),
     ("mlp_downsample_3x3_fix", 27, 81), ("mlp_downsample_3x3_s2", 32, 121), ("mlp_downsample_3x3_s2_new", 4, 4)],
)  # fmt: skip
def test_tokens_that_come_out(kind: str, side: int, tokens: int) -> None:
    assert make(kind)(torch.zeros(2, side * side, V)).shape == (2, tokens, D)


def test_a_linear_without_bias() -> None:
    assert set(make("mlp2x_gelu", bias=False).state_dict()) == {"layers.0.weight", "layers.2.weight"}


def test_identity_changes_nothing() -> None:
    x = torch.randn(1, 3, V)
    assert torch.equal(make("identity")(x), x)


@torch.no_grad()
def test_an_mlp_is_linears_with_gelu_between() -> None:
    made, x = make("mlp2x_gelu"), torch.randn(2, 3, V)
    first, last = made.layers[0], made.layers[2]
    expected = torch.erf((h := x @ first.weight.T + first.bias) / 2**0.5).add(1).mul(h / 2) @ last.weight.T + last.bias
    assert_close(made(x), expected, 1e-5)


@pytest.mark.parametrize(
    ("order", "squares"),
    [
        ("column", [[0, 1, 4, 5], [8, 9, 12, 13], [2, 3, 6, 7], [10, 11, 14, 15]]),
        ("row", [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
    ],
)
def test_both_token_orders_on_a_4x4_grid(order: TokenOrder, squares: list[list[int]]) -> None:
    """As measured with VILA's code before and after NVILA."""
    patches = torch.arange(16.0)[None, :, None]
    assert Downsample(2, order)(patches)[0].int().tolist() == squares


@pytest.mark.parametrize(
    ("block", "side", "squares"),
    [
        (2, 3, [[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]),
        (3, 2, [[1, 2, 0, 3, 4, 0, 0, 0, 0]]),
    ],
)
def test_odd_sides_are_padded_with_zeros_at_the_end(block: int, side: int, squares: list[list[int]]) -> None:
    patches = torch.arange(1.0, side * side + 1)[None, :, None]
    assert Downsample(block, "row")(patches)[0].int().tolist() == squares


def test_channels_of_a_square_stay_together() -> None:
    patches = torch.stack([torch.arange(4.0), torch.arange(4.0) + 10], -1)[None]
    assert Downsample(2, "row")(patches)[0].int().tolist() == [[0, 10, 1, 11, 2, 12, 3, 13]]


@torch.no_grad()
def test_a_downsampling_projector_by_its_definition() -> None:
    made = make("mlp_downsample", token_order="column")
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 16, V)
    square = x[0, [8, 9, 12, 13]].flatten()  # the second token, column by column
    norm, first, last = (made.layers[i] for i in (1, 2, 4))
    normed = (square - square.mean()) / (square.var(unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
    hidden: Tensor = nn.functional.gelu(first.weight @ normed + first.bias)
    assert_close(made(x)[0, 1], last.weight @ hidden + last.bias)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(
        ModelError, match="the projector type 'qformer' is not supported; works: identity, linear, mlpN"
    ):
        make("qformer")
    with pytest.raises(ModelError, match="17 features do not form a square grid; use select_feature 'patch'"):
        make("mlp_downsample")(torch.zeros(1, 17, V))


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_relu", "mlp_downsample_4x4", "xmlp2x_gelu"])
def test_names_that_are_nearly_right(kind: str) -> None:
    with pytest.raises(ModelError, match=f"'{kind}' is not supported"):
        make(kind)
