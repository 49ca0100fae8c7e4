"""Decoders with random weights of real models' shapes, made on the device: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gpu_checks.machine import Machine
from tinychat.config import RopeConfig, TextConfig
from tinychat.layers.cuda_decoder import CudaDecoder
from tinychat.layers.head import PackedHead
from tinychat.layers.kv_cache import KVCache, KVPool
from tinychat.layers.linear import QuantLinear
from tinychat.models.llama import LlamaForCausalLM
from tinychat_kernels import cuda, cuda_layout
from tinychat_kernels.cuda_layout import Packed
from tinychat_kernels.layout import Logical, QuantSpec

GROUP, SMALL_GROUP = 128, 32  # the latter where the inputs are no multiple of the former
DTYPE = torch.float16
SCALE = 0.01  # of a 4-bit weight
POSITIONS = 8192
PACKED_HEADS = {"int8": 8, "4-bit": 4}


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's sizes."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of a layer's linears, as the kernels read them."""
        width = self.heads * self.head_dim
        return {
            "qkv": (width + 2 * self.kv_heads * self.head_dim, self.hidden),
            "out": (self.hidden, width),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }

    @property
    def config(self) -> TextConfig:
        return TextConfig(
            family="llama", vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, rope=RopeConfig(500000.0), max_position_embeddings=POSITIONS, rms_norm_eps=1e-5,
            windows=(None,) * self.layers,
        )  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("Llama-3-8B", 4096, 14336, 32, 8, 128, 32, 128256),
        Shape("VILA-3B", 2560, 6912, 20, 20, 128, 32, 32000),
        Shape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 16, 128256),
        Shape("tiny", 128, 160, 4, 2, 32, 2, 99),
    )
}


def random_packed(machine: Machine, outputs: int, inputs: int, bits: int = 4) -> Packed:
    """Weights of no meaning, packed as the kernels read them: random words, and a tile's scales again and again."""
    tile = _tile(machine, inputs, _group(inputs), bits)
    tiles = -(-outputs // cuda_layout.TILE)
    shape = (tiles, *tile.words.shape[1:])
    words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, device=machine.device).to(torch.int32)
    scales = tile.scales.expand(tiles, -1, -1, -1).contiguous()
    return replace(tile, words=words, scales=scales, outputs=outputs)


def _group(inputs: int) -> int:
    return GROUP if inputs % GROUP == 0 else SMALL_GROUP


def _tile(machine: Machine, inputs: int, group: int, bits: int) -> Packed:
    """A tile's outputs with random scales and zero points: packed as any others, so that the layout is the kernels'."""
    size, generator = cuda_layout.TILE, torch.Generator().manual_seed(inputs)
    scale = (SCALE * (0.5 + torch.rand((inputs // group, size), generator=generator))).half().to(machine.device)
    if bits == 8:
        empty = torch.zeros((size, inputs), dtype=torch.int8, device=machine.device)
        return cuda_layout.pack_int8(empty, (scale / 16).T.contiguous())
    q, zero = (torch.randint(4, 12, (rows, size), generator=generator) for rows in (inputs, inputs // group))
    logical = Logical(q.to(machine.device, torch.uint8), scale, zero.to(machine.device, torch.uint8))
    return cuda_layout.pack(logical, QuantSpec(group_size=group))


def packed_bytes(packed: Packed) -> int:
    return 4 * (packed.words.numel() + packed.scales.numel())


def decoder_of(machine: Machine, shape: Shape, head: str = "int8") -> CudaDecoder:
    """A decoder of this shape; the head is one of PACKED_HEADS, or float."""
    with torch.device("meta"):
        llm = LlamaForCausalLM(shape.config)
    for name, module in list(llm.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            linear = _meta_linear(module)
            linear.prepare(random_packed(machine, module.out_features, module.in_features))
            llm.model.layers.set_submodule(name, linear)
    model: Any = llm.model
    for module in model.modules():
        if hasattr(module, "eps"):
            module.weight = nn.Parameter(1 + 0.1 * machine.numbers(shape.hidden, dtype=DTYPE), requires_grad=False)
    model.embed_tokens.weight = nn.Parameter(machine.numbers(shape.vocabulary, shape.hidden), requires_grad=False)
    llm.set_submodule("lm_head", _head(machine, shape, head))
    return CudaDecoder(llm, shape.config, machine.launch, machine.processors)


def float_model(decoder: CudaDecoder, shape: Shape) -> LlamaForCausalLM:
    """The same model in float32 and plain torch, by its modules: nothing of the kernels' but how weights are packed."""
    weights = decoder.kernel.weights
    device = weights.norm.device
    with torch.device(device):
        model: Any = LlamaForCausalLM(shape.config).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(weights.embeddings)
        model.model.norm.weight.copy_(weights.norm)
        model.lm_head.weight.copy_(_floats(weights.head))
        for module, layer in zip(model.model.layers, weights.layers, strict=True):
            attention, mlp = module.self_attn, module.mlp
            _copy([attention.q_proj, attention.k_proj, attention.v_proj], layer.qkv.weight)
            _copy([attention.o_proj], layer.out.weight)
            _copy([mlp.gate_proj, mlp.up_proj], layer.gate_up.weight)
            _copy([mlp.down_proj], layer.down.weight)
            module.input_layernorm.weight.copy_(layer.attention_norm)
            module.post_attention_layernorm.weight.copy_(layer.mlp_norm)
    return model.eval()


def _copy(linears: list[nn.Linear], packed: Packed) -> None:
    """What joined weights stand for, into the linears that were joined."""
    parts = _floats(packed).split([linear.out_features for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.copy_(part)


def _floats(weight: Packed | Tensor) -> Tensor:
    return torch.cat(list(cuda.floats(weight, torch.float32))) if isinstance(weight, Packed) else weight.float()


def _meta_linear(module: nn.Linear) -> QuantLinear:
    with torch.device("meta"):
        return QuantLinear(module.in_features, module.out_features, QuantSpec(group_size=_group(module.in_features)))


def _head(machine: Machine, shape: Shape, head: str) -> nn.Module:
    if head in PACKED_HEADS:
        packed = random_packed(machine, shape.vocabulary, shape.hidden, bits=PACKED_HEADS[head])
        return PackedHead(packed, lambda: torch.empty(0))
    with torch.device("meta"):
        linear = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
    weight = machine.numbers(shape.vocabulary, shape.hidden) * shape.hidden**-0.5
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def cache_of(machine: Machine, shape: Shape, rows: int, capacity: int, filled: int = 0) -> KVCache:
    """A cache that holds so many random tokens a row."""
    cache = KVPool(shape.config, rows, capacity, DTYPE, machine.device).take(rows)
    for part in (part for layer in cache.pool.layers for part in layer) if filled else ():
        part.normal_()
    cache.advance(filled)
    return cache


def weight_bytes(decoder: CudaDecoder) -> int:
    """Bytes of weights that a step reads: all but the embeddings, of which it reads a row."""
    weights = decoder.kernel.weights
    linears = [part.weight for layer in weights.layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    norms = 2 * sum(layer.attention_norm.numel() + layer.mlp_norm.numel() for layer in weights.layers)
    head = weights.head
    last = packed_bytes(head) if isinstance(head, Packed) else 2 * head.numel()
    return sum(map(packed_bytes, linears)) + norms + last
