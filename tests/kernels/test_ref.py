"""The reference of every op against float64, and that it never holds a whole float weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tinychat_kernels import ref
from tinychat_kernels.layout import AwqGemm, QuantSpec, dequantize, from_logical, quantize, to_logical


def layer(inputs: int, outputs: int, spec: QuantSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> AwqGemm:
    weight = torch.randn((outputs, inputs), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return from_logical(quantize(weight, spec), spec)


def exact(x: Tensor, packed: AwqGemm, spec: QuantSpec, bias: Tensor | None = None) -> Tensor:
    out = x.double() @ dequantize(to_logical(packed, spec), torch.float64).T
    return out if bias is None else out + bias.double()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("rows", "outputs"), [(1, 64), (16, 8), (5, 1024), (3, 1032), (2, 2056)])
def test_w4_linear_against_float64(dtype: torch.dtype, group: int, rows: int, outputs: int) -> None:
    spec = QuantSpec(group_size=group)
    packed = layer(256, outputs, spec, dtype)
    x, bias = noise(rows, 256).to(dtype), noise(outputs).to(dtype)
    for b in (None, bias):
        out = ref.w4_linear(x, packed, spec, b)
        assert out.dtype == dtype and out.shape == (rows, outputs)
        assert relative(out, exact(x, packed, spec, b)) <= (1e-5 if dtype == torch.float32 else 5e-3)


def test_scales_of_half_precision_serve_a_bfloat16_input() -> None:
    spec = QuantSpec(group_size=64)
    packed, x = layer(256, 64, spec, torch.float16), noise(4, 256).bfloat16()
    assert relative(ref.w4_linear(x, packed, spec), exact(x, packed, spec)) <= 5e-3


def test_no_whole_float_weight_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(logical, dtype):
        out = dequantize(logical, dtype)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(ref, "dequantize", counted)
    spec = QuantSpec(group_size=128)
    ref.w4_linear(noise(2, 128), layer(128, 4000, spec), spec)
    assert sizes == [1024 * 128] * 3 + [928 * 128]


# What a decoder does between its linears


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_norm_and_gate_against_torch() -> None:
    x, delta, weight = noise(3, 64), noise(3, 64) / 2, noise(64)
    total, out = ref.add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    assert relative(out, torch.nn.functional.rms_norm(x + delta, (64,), weight, 1e-5).double()) < 1e-6
    assert torch.equal(ref.add_rms_norm(x, None, weight, 1e-5)[0], x)
    gate, up = x.chunk(2, 1)
    assert relative(ref.swiglu(x), (gate.double() * gate.double().sigmoid() * up)) < 1e-6


def test_rotary_positions_against_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, kv_heads, dim = 4, 2, 16
    slots, positions = ints(2, 0, 2), ints(5, 1, 6)
    angles = torch.rand(8, dim // 2)
    keys, values = torch.zeros(3, kv_heads, 8, dim), torch.zeros(3, kv_heads, 8, dim)
    qkv = noise(3, (heads + 2 * kv_heads) * dim)
    q = ref.rope_kv(qkv, angles.cos(), angles.sin(), slots, positions, keys, values)
    parts = qkv.unflatten(1, (-1, dim))
    as_theirs = parts.transpose(0, 1)[None]
    wide = torch.cat((angles, angles), 1)[positions][None]
    theirs_q, theirs_k = apply_rotary_pos_emb(as_theirs[:, :4], as_theirs[:, 4:6], wide.cos(), wide.sin())
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        assert torch.allclose(q[row], theirs_q[0, :, row], atol=1e-6)
        assert torch.allclose(keys[slot, :, position], theirs_k[0, :, row], atol=1e-6)
        assert torch.equal(values[slot, :, position], parts[row, 6:])
    assert int(keys.abs().sum(3).gt(0).sum()) == 3 * kv_heads


@pytest.mark.parametrize("window", [0, 3])
def test_attention_of_a_token_against_torch(window: int) -> None:
    keys, values, q = noise(2, 2, 9, 16), noise(2, 2, 9, 16) + 1, noise(3, 4, 16)
    slots, positions, begins = ints(1, 1, 0), ints(0, 8, 4), ints(0, 2, 0)
    out = ref.attn_decode(q, keys, values, slots, positions, window, begins)
    for row in range(3):
        place = torch.arange(9)
        seen = (place <= positions[row]) & (place >= begins[row])
        if window:
            seen &= place > positions[row] - window
        k, v = keys[slots[row]], values[slots[row]]
        theirs = torch.nn.functional.scaled_dot_product_attention(
            q[row][:, None], k, v, seen[None, None], enable_gqa=True
        )
        assert torch.allclose(out[row], theirs[:, 0], atol=1e-6)


def test_draws_follow_the_distribution() -> None:
    logits = noise(1, 50).expand(2000, -1)
    uniform = (torch.arange(2000) + 0.5) / 2000
    tokens, logprobs = ref.sample(logits, torch.full((2000,), 0.7), uniform)
    expected = (logits[0].double() / 0.7).softmax(0)
    assert (tokens.long().bincount(minlength=50) / 2000 - expected).abs().max() < 1e-3
    assert torch.allclose(logprobs, logits[0].log_softmax(0)[tokens.long()])


def test_the_first_of_equal_logits_is_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [0.0, float("nan"), 1.0, 3.0]])
    tokens, logprobs = ref.sample(logits, torch.zeros(2), torch.tensor([0.9, 0.5]))
    assert tokens[0] == 1 and tokens.dtype == torch.int32
    assert logprobs[0].isfinite() and logprobs[1].isnan()
