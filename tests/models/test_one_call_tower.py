"""A vision tower by the CPU kernels' one call against its modules and transformers' classes, and when it is taken."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models.tiny import VISION, pixels, shake
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from tinychat.errors import ModelError
from tinychat.layers import cpu_tower as one_call
from tinychat.layers.int8_linear import Int8Linear
from tinychat.layers.packed_linear import PackedLinear
from tinychat.models.vision_tower import VisionTower
from tinychat_kernels import cpu, cpu_tower

available, reason = cpu.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "clip": (CLIPVisionConfig, CLIPVisionModel, {}),
    "siglip": (SiglipVisionConfig, SiglipVisionModel, {"vision_use_head": False}),
}
ROUNDED = 2e-2  # relative: what rounding costs three layers of random weights; a linear alone 0.01
HELD = ("packed", "int8")


@pytest.fixture(params=cpu.isas() if available else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.use_isa(request.param):
        yield request.param


def pair(kind: str = "clip", **changes: Any) -> tuple[Any, VisionTower]:
    """A tower of transformers, and ours in floats."""
    torch.manual_seed(0)
    config, model, more = KINDS[kind]
    theirs = model(config(**{**VISION, **more, **changes})).eval().requires_grad_(False)
    shake(theirs)
    ours = VisionTower(theirs.config).eval()
    ours.vision_model.load_state_dict({n.removeprefix("vision_model."): t for n, t in theirs.state_dict().items()})
    return theirs, ours.requires_grad_(False)


def packed(linear: nn.Linear) -> PackedLinear:
    weight = linear.weight.detach()
    outputs, inputs = (cpu_tower.widened(size) for size in weight.shape)
    return PackedLinear(cpu_tower.round_linear(weight, inputs, outputs), lambda: weight, linear.bias)


def prepared(linear: nn.Linear) -> Int8Linear:
    made = Int8Linear.from_linear(linear)
    made.prepare()
    return made


def in_8_bits(tower: VisionTower, held: str = "packed") -> VisionTower:
    for name, module in list(tower.vision_model.encoder.named_modules()):
        if isinstance(module, nn.Linear):
            tower.vision_model.encoder.set_submodule(name, {"packed": packed, "int8": prepared}[held](module))
    return tower


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def by_modules(tower: VisionTower, images: Tensor) -> Tensor:
    hidden = tower.vision_model.hidden_state(images, tower.config.select_layer)
    return hidden[:, 1:] if tower.config.has_class_token else hidden


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("changes", [
    {}, {"hidden_act": "gelu"}, {"hidden_act": "quick_gelu"}, {"hidden_size": 96, "num_attention_heads": 4},
    {"intermediate_size": 144}, {"image_size": 31}, {"num_attention_heads": 1, "layer_norm_eps": 1e-3},
])  # fmt: skip
def test_features_are_those_of_transformers_but_for_the_rounding(
    isa: str, kind: str, held: str, changes: dict[str, Any]
):
    theirs, ours = pair(kind, **changes)
    images = torch.randn(2, 3, ours.config.image_size, ours.config.image_size)
    expected = theirs(pixel_values=images, output_hidden_states=True).hidden_states[-2][:, kind == "clip" :]
    assert relative(ours(images), expected) < 1e-5 and ours.one_call is None
    found = in_8_bits(ours, held)(images)
    assert ours.one_call is not None
    assert found.shape == expected.shape and 1e-4 < relative(found, expected) < ROUNDED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", HELD)
def test_the_modules_say_the_same(kind: str, held: str):
    """They round the same values, but for a last bit here and there that moves one to the next integer."""
    tower = in_8_bits(pair(kind)[1], held)
    found = tower(pixels(3))
    assert tower.one_call is not None and relative(found, by_modules(tower, pixels(3))) < 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_threads_and_batches_do_not_change_a_bit(isa: str, kind: str):
    tower = in_8_bits(pair(kind)[1])
    together, before = tower(pixels(3)), cpu.threads()
    for threads in (1, 2, 3):
        cpu.set_threads(threads)
        cpu.set_least_work(0)
        assert torch.equal(tower(pixels(3)), together)
        assert torch.equal(torch.cat([tower(one[None]) for one in pixels(3)]), together)
    cpu.set_threads(before)
    cpu.set_least_work()


def test_layers_beyond_the_selected_one_are_not_run():
    tower = in_8_bits(pair()[1])
    found = tower(pixels(1))
    nn.init.constant_(tower.vision_model.encoder.layers[2].layer_norm1.weight, torch.nan)
    assert torch.equal(tower(pixels(1)), found)
    nn.init.constant_(tower.vision_model.encoder.layers[1].layer_norm1.weight, torch.nan)


def test_a_tower_in_half_precision_gives_half_precision():
    exact = in_8_bits(pair()[1])(pixels(1))
    for dtype in (torch.float16, torch.bfloat16):
        tower = in_8_bits(pair()[1].to(dtype))
        found = tower(pixels(1))
        assert tower.one_call is not None and found.dtype == dtype
        assert relative(found.float(), exact) < ROUNDED


def test_wrong_pictures_are_refused():
    with pytest.raises(ModelError, match=r"pixels have shape \[1, 3, 28, 29\], the tower takes \[N, 3, 28, 28\]"):
        in_8_bits(pair()[1])(torch.zeros(1, 3, 28, 29))


@pytest.mark.parametrize("held", HELD)
def test_the_weights_are_not_held_twice(held: str):
    tower = in_8_bits(pair()[1], held)
    tower(pixels(1))
    attention = tower.vision_model.encoder.layers[0].self_attn
    q, k, v = (one_call._held(part).blocks for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert k.data_ptr() == q.data_ptr() + q.numel()


@pytest.mark.parametrize("held", HELD)
def test_the_weights_are_given_back(held: str):
    tower = in_8_bits(pair()[1], held)
    before = {name: part.clone() for name, part in tower.state_dict().items()}
    tower(pixels(1))
    assert all(torch.equal(part, before[name]) for name, part in tower.state_dict().items())


def test_copies_and_pickles_leave_the_call_behind():
    tower = in_8_bits(pair()[1], "int8")
    expected = tower(pixels(1))
    for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):  # noqa: S301
        assert other._one_call is None and other.one_call is None
        assert relative(other(pixels(1)), expected) < 5e-3
    floats = copy.deepcopy(in_8_bits(pair()[1]))
    assert torch.equal(floats(pixels(1)), pair()[1](pixels(1)))


def test_gradients_go_through_the_modules():
    tower, images = in_8_bits(pair()[1]), pixels(1).requires_grad_()
    tower(images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    with torch.no_grad():
        assert not tower(images).requires_grad


def a_float(tower: VisionTower) -> None:
    tower.vision_model.encoder.layers[0].mlp.fc2 = nn.Linear(64, 32)


def an_exact_one(tower: VisionTower) -> None:
    tower.vision_model.encoder.layers[0].mlp.fc2.exact = True


def a_hook(tower: VisionTower) -> None:
    tower.vision_model.encoder.layers[0].mlp.register_forward_hook(lambda module, given, out: None)


@pytest.mark.parametrize(
    ("change", "says"),
    [(a_float, "its linears are not 8-bit ones"), (an_exact_one, "its linears are not"), (a_hook, "hooks watch its")],
)
def test_what_stands_in_the_way(change: Any, says: str):
    """Before the first picture, and after one."""
    for used in (False, True):
        tower = in_8_bits(pair()[1])
        if used:
            tower(pixels(1))
        change(tower)
        assert says in str(one_call.obstacle(tower.vision_model))
        assert torch.equal(tower(pixels(1)), by_modules(tower, pixels(1))) and tower.one_call is None
        assert says in str(tower.obstacle)


def test_another_activation_and_sizes_stay_with_the_modules():
    for changes, says in (
        ({"hidden_act": "relu"}, "the activation relu is none of"),
        ({"hidden_size": 40, "intermediate_size": 40}, "size 40 is no multiple of"),
    ):
        tower = in_8_bits(pair(**changes)[1])
        assert torch.equal(tower(pixels(1)), by_modules(tower, pixels(1))) and tower.one_call is None
        assert says in str(tower.obstacle)


def test_new_weights_are_seen():
    tower = in_8_bits(pair()[1])
    old, layer = tower(pixels(1)), tower.vision_model.encoder.layers[1]
    layer.mlp.fc1 = packed(nn.Linear(32, 64))
    new = tower(pixels(1))
    layer.layer_norm2 = nn.LayerNorm(32)
    newest = tower(pixels(1))
    assert tower.one_call is not None and relative(new, old) > 1e-3 and relative(newest, new) > 1e-3
