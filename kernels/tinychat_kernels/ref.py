"""The definition of every op, in plain torch. Runs on any device; every other backend is measured against it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tinychat_kernels.int8 import TOP, Int8, quantize_tokens
from tinychat_kernels.layout import AwqGemm, Logical, QuantSpec, dequantize, to_logical

SLICE = 1024  # output columns dequantized at a time: the float copy stays a few MB for any layer
FEWEST_ROWS = 32  # a GPU's product of integers takes no fewer than 17


def w4_linear(x: Tensor, packed: AwqGemm, spec: QuantSpec, bias: Tensor | None = None) -> Tensor:
    """x `[M, K]` times 4-bit weights -> `[M, N]` in x's dtype; the weight is dequantized in slices of columns."""
    columns = packed.scales.shape[1]
    out = [_slice(x, packed, spec, start) for start in range(0, columns, SLICE)]
    result = torch.cat(out, dim=1) if len(out) > 1 else out[0]
    return result if bias is None else result + bias.to(result.dtype)


def _slice(x: Tensor, packed: AwqGemm, spec: QuantSpec, start: int) -> Tensor:
    words = slice(start // 8, (start + SLICE) // 8)
    part = AwqGemm(packed.qweight[:, words], packed.qzeros[:, words], packed.scales[:, start : start + SLICE])
    logical: Logical = to_logical(part, spec)
    return torch.nn.functional.linear(x, dequantize(logical, x.dtype))


def w8a8_linear(x: Tensor, packed: Int8, bias: Tensor | None = None) -> Tensor:
    """x `[M, K]` times 8-bit weights -> `[M, N]` in x's dtype: tokens become 8-bit ones, and their sums are exact.

    The sums are scaled, and the bias added, in fp32. A token that holds NaN or Inf gives NaN or Inf.
    """
    tokens, step = quantize_tokens(x)
    out = _integer_sums(tokens, packed.weight).float().mul_(step[:, None]).mul_(packed.scale.float())
    return (out if bias is None else out.add_(bias.float())).to(x.dtype)


def _integer_sums(x: Tensor, weight: Tensor) -> Tensor:
    """int8 `[M, K]` times int8 `[N, K]` -> `[M, N]`, exactly: in integers where torch can, else in float64."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    on_gpu = x.device.type == "cuda"
    if not _multiplies_integers(x.device.type) or (on_gpu and (inputs % 8 or outputs % 8)):
        return x.double() @ weight.double().T
    if on_gpu and rows < FEWEST_ROWS:
        return _product(torch.nn.functional.pad(x, (0, 0, 0, FEWEST_ROWS - rows)), weight)[:rows]
    return _product(x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch._int_mm(x, weight.T)  # type: ignore[attr-defined]  # torch's stubs do not list it


@functools.cache
def _multiplies_integers(device: str) -> bool:
    """Whether torch's product of integers is there and exact: some processors saturate sums of two products."""
    try:
        extremes = torch.tensor([TOP, -TOP, -TOP - 1], dtype=torch.int8, device=device).repeat_interleave(8)
        rows = extremes[:, None].expand(24, 64).contiguous()
        found = _product(rows, rows)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(found.double(), rows.double() @ rows.double().T)


# What a decoder does between its linears; positions, slots and tokens are int32, one a row.


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x `[R, D]` plus delta, in x's dtype, and the RMS norm of that sum times weight (arXiv 1910.07467)."""
    total = x if delta is None else x + delta
    wide = total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight * normed.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate and up `[R, 2N]` -> silu(gate) * up `[R, N]` (arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rope_kv(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """qkv `[R, (Hq + 2 Hkv) D]` -> q `[R, Hq, D]` turned; turned k, and v, go into `[slots, Hkv, capacity, D]`.

    cos and sin are fp32 `[positions, D/2]`; pairs are (i, i + D/2) (arXiv 2104.09864).
    """
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    heads = qkv.unflatten(-1, (-1, head_dim))
    turned = _turned(heads[:, :-kv_heads], cos[positions], sin[positions])
    keys[slots, :, positions] = turned[:, -kv_heads:].to(keys.dtype)
    values[slots, :, positions] = heads[:, -kv_heads:].to(values.dtype)
    return turned[:, :-kv_heads]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[R, H, D]` by the angles of cos and sin `[R, D/2]`."""
    left, right = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def attn_decode(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, window: int = 0,
    begins: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q `[R, Hq, D]` over the cached keys `[slots, Hkv, capacity, D]` up to and with each row's position -> the same.

    At most `window` of them are seen (0: all), and none before `begins`.
    """
    groups = q.shape[1] // keys.shape[1]
    out = torch.empty_like(q)
    for row, (slot, last) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        first = max(0 if begins is None else int(begins[row]), last + 1 - window if window else 0)
        k, v = (part[slot, :, first : last + 1].to(q.dtype).repeat_interleave(groups, 0) for part in (keys, values))
        scores = (k @ q[row, :, :, None])[..., 0] * q.shape[-1] ** -0.5
        out[row] = (scores.softmax(-1, dtype=scores.dtype)[:, None] @ v)[:, 0]
    return out


def sample(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """logits `[R, V]` -> int32 tokens `[R]`, and fp32 log-probabilities before the temperature, which is fp32 `[R]`.

    Temperature 0 takes the first of the highest; else the distribution function is inverted at `uniform`, in [0, 1).
    """
    wide = logits.double()
    cumulative = (wide / temperature.double().clamp(min=1e-6)[:, None]).softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]
    tokens = torch.where(temperature == 0, wide.argmax(-1), drawn.clamp(max=logits.shape[1] - 1))
    return tokens.int(), wide.log_softmax(-1).gather(1, tokens[:, None])[:, 0].float()
