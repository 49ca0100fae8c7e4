"""A vision transformer in one call against the same one written plainly in float64, and its bits in any company."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tinychat_kernels import blocks, cpu, cpu_tower
from tinychat_kernels.cpu_decoder import Linear, fuse
from tinychat_kernels.cpu_tower import GELUS, Layer, LayerNorm, Tower, Weights
from tinychat_kernels.errors import KernelError

available, reason = cpu.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)

SAME_BITS = ("avx2", "avxvnni", "avx512")
EPS = 1e-5
SIDE = 5  # of a patch: its numbers are no multiple of 16
TIES = 5e-3  # relative: here and there float32 and float64 round to neighbouring integers, and what follows differs
ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.fixture(params=cpu.isas() if available else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.use_isa(request.param):
        yield request.param


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(inputs: int, outputs: int, group: int, seed: int) -> Linear:
    weight = cpu.quantize_head(random(outputs, inputs, seed=seed) / math.sqrt(inputs), group)
    return Linear(weight, 0.3 * random(outputs, seed=seed + 500))


def norm(width: int, seed: int) -> LayerNorm:
    return LayerNorm(1 + 0.2 * random(width, seed=seed), 0.2 * random(width, seed=seed + 1))


@dataclasses.dataclass(frozen=True)
class Shape:
    grid: int = 4
    heads: int = 2
    head_dim: int = 16
    inner: int = 96
    group: int = 32
    layers: int = 2
    gelu: str = "gelu"
    first: bool = True
    table: torch.dtype = torch.float32


CLIP, SIGLIP = Shape(), Shape(first=False, gelu="gelu_pytorch_tanh")


def make(s: Shape) -> Weights:
    width = s.heads * s.head_dim
    layers = []
    for i in range(s.layers):
        seed = 20 * i
        qkv = fuse([linear(width, width, s.group, seed + j) for j in range(3)])
        out, up, down = (
            linear(*size, s.group, seed + 3 + j)
            for j, size in enumerate(((width, width), (width, s.inner), (s.inner, width)))
        )
        layers.append(Layer(qkv, out, up, down, norm(width, seed + 10), norm(width, seed + 12)))
    return Weights(
        layers, (random(width, 3, SIDE, SIDE, seed=900) / 9).to(s.table), None if s.first else random(width, seed=901),
        random(width, seed=902) if s.first else None, 0.5 * random(s.grid**2 + s.first, width, seed=903),
        norm(width, 904) if s.first else None, s.heads, EPS, s.gelu,
    )  # fmt: skip


def pictures(s: Shape, count: int = 1, rest: int = 0) -> Tensor:
    """`rest`: pixels beyond the last patch."""
    return random(count, 3, s.grid * SIDE + rest, s.grid * SIDE + rest, seed=77)


def rounded(x: Tensor, group: int) -> Tensor:
    """x as the kernels round it, in float32, as there."""
    parts = x.float().unflatten(-1, (-1, group))
    top = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return ((parts * (127 / top)).round() * (top / 127)).flatten(-2).double()


def apply(x: Tensor, linear: Linear) -> Tensor:
    group = linear.weight.group
    values, scales = blocks.unpack_int8(linear.weight)
    weight = values.double().unflatten(1, (-1, group)) * scales.double()[..., None]
    return rounded(x, group) @ weight.flatten(1).T + torch.as_tensor(linear.bias).double()


def normed(x: Tensor, norm: LayerNorm) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], norm.weight.double(), norm.bias.double(), EPS)


def plain(w: Weights, pixels: Tensor, depth: int) -> Tensor:
    """float64, each picture alone."""
    bias = None if w.patch_bias is None else w.patch_bias.double()
    patches = functional.conv2d(pixels.double(), w.embedding.double(), bias, stride=SIDE).flatten(2).transpose(1, 2)
    first = [] if w.first is None else [w.first.double().expand(len(pixels), 1, -1)]
    x = torch.cat([*first, patches], 1) + w.positions.double()
    x = x if w.norm is None else normed(x, w.norm)
    for layer in w.layers[:depth]:
        q, k, v = (
            part.unflatten(-1, (w.heads, -1)).transpose(1, 2)
            for part in apply(normed(x, layer.attention_norm), layer.qkv).chunk(3, -1)
        )
        mixed = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + apply(mixed.transpose(1, 2).flatten(2), layer.out)
        x = x + apply(ACTIVATIONS[w.gelu](apply(normed(x, layer.mlp_norm), layer.up)), layer.down)
    return x


def distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [CLIP, SIGLIP])
@pytest.mark.parametrize("changes", [
    {}, {"gelu": "quick_gelu"}, {"layers": 1, "heads": 1}, {"grid": 1}, {"grid": 7, "inner": 160},
    {"head_dim": 24, "heads": 4}, {"head_dim": 72, "heads": 4}, {"head_dim": 64}, {"table": torch.bfloat16},
    {"head_dim": 8, "heads": 6, "group": 16}, {"group": 96, "heads": 6},
])  # fmt: skip
def test_features_as_in_float64(isa: str, shape: Shape, changes: dict[str, object]):
    shape = dataclasses.replace(shape, **changes)
    weights, pixels = make(shape), pictures(shape, 2)
    ours = Tower(weights).encode(pixels)
    assert ours.shape == (2, shape.grid**2 + shape.first, shape.heads * shape.head_dim) and ours.dtype == torch.float32
    assert distance(ours, plain(weights, pixels, shape.layers)) < TIES


def test_pixels_that_make_no_patch_are_left_out():
    weights, pixels = make(SIGLIP), pictures(SIGLIP, rest=3)
    assert distance(Tower(weights).encode(pixels), plain(weights, pixels, 2)) < TIES


@pytest.mark.parametrize("grid", [15, 16, 17, 23])
def test_tokens_around_the_edges_of_blocks(isa: str, grid: int):
    """225 to 530 tokens: attention goes by blocks of 256 keys."""
    shape = dataclasses.replace(CLIP, grid=grid, layers=1)
    weights, pixels = make(shape), pictures(shape)
    assert distance(Tower(weights).encode(pixels), plain(weights, pixels, 1)) < TIES


@pytest.mark.parametrize("shape", [CLIP, SIGLIP])
def test_the_layers_asked_for_are_run(shape: Shape):
    weights, pixels = make(shape), pictures(shape)
    tower = Tower(weights)
    for depth in range(3):
        worst = TIES if depth else 1e-6
        assert distance(tower.encode(pixels, depth), plain(weights, pixels, depth)) < worst
    assert torch.equal(tower.encode(pixels), tower.encode(pixels, 2))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_pictures_have_the_bits_of_single_ones(isa: str, threads: int):
    shape = dataclasses.replace(SIGLIP, grid=9, head_dim=24, heads=4)
    tower, pixels = Tower(make(shape)), pictures(shape, 3)
    singles = torch.cat([tower.encode(one[None]) for one in pixels])
    before = cpu.threads()
    cpu.set_threads(threads)
    cpu.set_least_work(0)
    together = tower.encode(pixels)
    cpu.set_threads(before)
    cpu.set_least_work()
    assert torch.equal(together, singles)


def test_what_lay_in_the_memory_does_not_matter():
    tower = Tower(make(dataclasses.replace(SIGLIP, head_dim=24, heads=4)))
    expected = tower.encode(pictures(SIGLIP))
    tower._memory.fill_(255)  # NaN
    assert torch.equal(tower.encode(pictures(SIGLIP)), expected)


def test_instructions_give_the_same_bits():
    names = [name for name in cpu.isas() if name in SAME_BITS]
    if len(names) < 2:
        pytest.skip("this CPU has one instruction set with FMA")
    tower, found = Tower(make(CLIP)), []
    for name in names:
        with cpu.use_isa(name):
            found.append(tower.encode(pictures(CLIP)))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gelu(isa: str, kind: str):
    x = torch.cat([torch.linspace(-12, 12, 4096), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0, 1e4, -1e4])])
    x = torch.cat([x, 5 * random(40, seed=1)])[None]
    ours = cpu_tower.gelu(x, kind)
    error = (ours - ACTIVATIONS[kind](x.double())).abs()
    assert bool((error <= 4e-7 * x.abs().clamp(min=1)).all())
    strange = torch.tensor([[math.nan, math.inf] * 8])
    assert not cpu_tower.gelu(strange, kind).isfinite().any()


def test_every_name_of_an_activation_has_its_formula():
    assert set(GELUS) == {*ACTIVATIONS, "gelu_new"} and GELUS["gelu_new"] == GELUS["gelu_pytorch_tanh"]


@pytest.mark.parametrize("width", [16, 48, 80, 1024])
def test_layer_norm(isa: str, width: int):
    """Rows with a large mean too: the deviation is taken from the differences."""
    x, add, weights = random(3, width, seed=1) * 3 + 100, random(3, width, seed=2), norm(width, 3)
    for more in (None, add):
        total, ours = cpu_tower.layer_norm(x, weights, EPS, more)
        assert torch.equal(total, x if more is None else x + more)
        torch.testing.assert_close(ours.double(), normed(total.double(), weights), rtol=1e-4, atol=2e-5)


def test_a_picture_with_nan_shows_it():
    pixels = pictures(CLIP, 2)
    pixels[1, 0, 3, 3] = math.nan
    found = Tower(make(CLIP)).encode(pixels)
    assert torch.isfinite(found[0]).all() and found[1].isnan().all()


def test_the_stages_add_up():
    tower = Tower(make(CLIP))
    assert set(tower.profile().values()) == {0.0}
    tower.start_profile()
    tower.encode(pictures(CLIP))
    spent = tower.profile()
    assert tuple(spent) == cpu_tower.STAGES and all(seconds > 0 for seconds in spent.values())


@pytest.mark.parametrize(("changes", "message"), [
    ({"gelu": "relu"}, "the activation relu is none of gelu, "),
    ({"heads": 1, "head_dim": 272, "group": 16}, "1 heads of a width of 272: at most 256 channels"),
    ({"inner": 24, "group": 8}, "the intermediate size 24 is no multiple of 16"),
])  # fmt: skip
def test_sizes_that_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(KernelError, match=message):
        Tower(make(dataclasses.replace(CLIP, **changes)))


def test_pictures_and_layers_that_are_refused():
    tower = Tower(make(CLIP))
    with pytest.raises(KernelError, match="25 patches and 2 layers were asked of a tower of 16 and 2"):
        tower.encode(pictures(dataclasses.replace(CLIP, grid=5)))
    with pytest.raises(KernelError, match="16 patches and 3 layers"):
        tower.encode(pictures(CLIP), 3)


@pytest.mark.parametrize(
    ("inner", "wide", "group"),
    [(768, 768, 128), (192, 192, 64), (96, 96, 32), (4304, 4352, 128), (24, 24, 24), (300, 384, 128)],
)
def test_groups_of_odd_sizes(inner: int, wide: int, group: int):
    assert cpu_tower.widened(inner) == wide and cpu_tower.group_of(wide) == group


def test_a_linear_is_rounded_by_groups_and_widened_by_zeros():
    weight = random(300, 160, seed=1)
    packed = cpu_tower.round_linear(weight, 256, 384, cpu.empty(cpu_tower.linear_size(256, 384)))
    assert (packed.in_features, packed.out_features, packed.group) == (256, 384, 128)
    values, scales = blocks.unpack_int8(packed)
    wide = (values.double().unflatten(1, (-1, 128)) * scales.double()[..., None]).flatten(1)
    assert not wide[300:].any() and not wide[:, 160:].any()
    torch.testing.assert_close(wide[:300, :160], weight.double(), rtol=0, atol=float(scales.max()) * 0.51)
