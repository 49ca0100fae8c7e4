"""A vision tower in one call of the CPU kernels a picture: pixels in, a layer's hidden state out.

It stands for the modules where all linears of its layers are 8-bit ones that the kernels hold and nothing watches them;
`CpuTower.of` says so. The weights are shared with the modules: q, k and v become views of what is read as one linear.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tinychat.layers.int8_linear import Int8Linear
from tinychat.layers.one_call import Obstacle, Sizes, is_watched, linears_of, refused
from tinychat.layers.packed_linear import PackedLinear
from tinychat_kernels.cpu import Packed

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
MLP = ("fc1", "fc2")


class Config(Sizes, Protocol):
    """The fields of tinychat.config.VisionConfig that matter here."""

    @property
    def layer_norm_eps(self) -> float: ...


class CpuTower:
    """One tower (tinychat.models.clip or siglip) behind the kernels' structure, as its modules are now."""

    def __init__(self, tower: nn.Module, config: Config) -> None:
        from tinychat_kernels import cpu_tower

        sizes = config.hidden_size, config.intermediate_size, config.num_attention_heads
        cpu_tower.check_sizes(*sizes, config.hidden_act)  # before weights are joined
        self._tower = tower
        self._lock = threading.Lock()
        made: Any = tower
        embeddings, first = made.embeddings, getattr(made.embeddings, "class_embedding", None)
        patches, norm = embeddings.patch_embedding, getattr(made, "pre_layrnorm", None)
        self.kernel = cpu_tower.Tower(
            cpu_tower.Weights(
                [_layer(layer) for layer in made.encoder.layers],
                patches.weight, _float(patches.bias), _float(first), _sure(embeddings.position_embedding.weight),
                None if norm is None else _norm(norm), config.num_attention_heads, config.layer_norm_eps,
                config.hidden_act,
            )
        )  # fmt: skip
        self._parts = list(_parts(tower))

    @classmethod
    def of(cls, tower: nn.Module, config: Config) -> CpuTower:
        """Raises Obstacle where `obstacle` names one, or the kernels do not take the tower's sizes or activation."""
        if (reason := obstacle(tower)) is not None:
            raise Obstacle(reason)
        with refused():
            return cls(tower, config)

    def is_current(self) -> bool:
        """Whether the modules are those that this was made from, and nothing watches them."""
        now = list(_parts(self._tower))
        same = len(now) == len(self._parts) and all(a is b for a, b in zip(now, self._parts, strict=True))
        return same and not is_watched(self._tower)

    def forward(self, pixels: Tensor, depth: int) -> Tensor:
        """Pictures `[N, 3, H, W]` -> float32 hidden state `[N, tokens, D]` after so many layers."""
        with self._lock, torch.no_grad():
            return self.kernel.encode(pixels, depth)


def obstacle(tower: nn.Module) -> str | None:
    """Why a tower cannot run in one call; None where nothing is known."""
    if not all(_is_held(linear) for linear in linears_of(tower.get_submodule("encoder.layers"), ATTENTION, MLP)):
        return "its linears are not 8-bit ones that the CPU kernels hold"
    if any(tensor.device.type != "cpu" for tensor in tower.parameters()):
        return "it is not on the CPU"
    return "hooks watch its modules" if is_watched(tower) else None


def _is_held(linear: nn.Module) -> bool:
    rounded = isinstance(linear, PackedLinear) and isinstance(linear.packed, Packed) and not linear.exact
    return rounded or (isinstance(linear, Int8Linear) and linear.prepared)


def _parts(tower: nn.Module) -> Iterator[object]:
    """What a CpuTower is made from."""
    for linear in linears_of(tower.get_submodule("encoder.layers"), ATTENTION, MLP):
        yield from (_held(linear) if _is_held(linear) else linear, linear.bias)
    for module in tower.modules():
        if not isinstance(module, PackedLinear | Int8Linear):
            yield from module.parameters(recurse=False)


def _held(linear: PackedLinear | Int8Linear) -> Packed:
    held = linear.packed if isinstance(linear, PackedLinear) else linear.held
    assert isinstance(held, Packed)
    return held


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _sure(tensor)


def _sure(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def _norm(norm: Any) -> Any:
    from tinychat_kernels.cpu_tower import LayerNorm

    return LayerNorm(_sure(norm.weight), _sure(norm.bias))


def _layer(layer: Any) -> Any:
    from tinychat_kernels import cpu_tower

    attention, mlp = layer.self_attn, layer.mlp
    return cpu_tower.Layer(
        qkv=_joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        out=_linear(attention.out_proj),
        up=_linear(mlp.fc1),
        down=_linear(mlp.fc2),
        attention_norm=_norm(layer.layer_norm1),
        mlp_norm=_norm(layer.layer_norm2),
    )


def _linear(linear: PackedLinear | Int8Linear) -> Any:
    from tinychat_kernels.cpu_decoder import Linear

    held, bias = _held(linear), _float(linear.bias)
    return Linear(held, None if bias is None else pad(bias, (0, held.out_features - len(bias))))


def _joined(linears: Sequence[PackedLinear | Int8Linear]) -> Any:
    """Linears as one; what they hold are parts of it from now on, so that nothing is held twice."""
    from tinychat_kernels.cpu_decoder import fuse

    fused, start = fuse([_linear(linear) for linear in linears]), 0
    for linear in linears:
        held = _held(linear)
        end = start + held.blocks.numel()
        part = dataclasses.replace(held, blocks=fused.weight.blocks[start:end])
        if isinstance(linear, PackedLinear):
            linear.packed = part
        else:
            linear.prepare(part)
        start = end
    return fused
