"""The autoawq backend against an extension that computes by ref, and the sentences where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tinychat_kernels import autoawq, ref, registry
from tinychat_kernels.errors import KernelError
from tinychat_kernels.layout import AwqGemm, QuantSpec, from_logical, quantize

SPEC = QuantSpec(group_size=64)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    autoawq._extension.cache_clear()
    yield
    autoawq._extension.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """awq_ext as it is called: rows, words, scales, zeros in this order, and the parts of the sum."""
    made, splits = ModuleType("awq_ext"), []

    def gemm_forward_cuda(x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, split_k: int) -> Tensor:
        assert x.is_contiguous()
        splits.append(split_k)
        return ref.w4_linear(x, AwqGemm(qweight, qzeros, scales), SPEC)

    made.gemm_forward_cuda = gemm_forward_cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "awq_ext", made)
    return splits


def linear(outputs: int = 64, dtype: torch.dtype = torch.float16) -> AwqGemm:
    weight = torch.randn((outputs, 128), generator=torch.Generator().manual_seed(0)).to(dtype)
    return from_logical(quantize(weight, SPEC), SPEC)


def test_the_op_is_the_extensions(calls: list[int]) -> None:
    x, bias = torch.randn(128, 3).half().T, torch.randn(64)
    out = autoawq.w4_linear(x, linear(), SPEC, bias)
    assert torch.equal(out, ref.w4_linear(x, linear(), SPEC, bias)) and out.dtype == torch.float16
    assert calls == [8]
    assert registry.pick("w4_linear", "autoawq") is autoawq.w4_linear


@pytest.mark.parametrize(
    ("x_dtype", "outputs", "says"),
    [
        (torch.bfloat16, 64, "take float16, not torch.bfloat16 with scales of torch.float16"),
        (torch.float16, 72, "take 4 bits and multiples of 64 outputs, not 4 bits and 72"),
    ],
)
def test_what_it_does_not_take_is_named(calls: list[int], x_dtype: torch.dtype, outputs: int, says: str) -> None:
    with pytest.raises(KernelError, match=says):
        autoawq.w4_linear(torch.zeros(1, 128, dtype=x_dtype), linear(outputs), SPEC)
    assert autoawq.obstacle(torch.float16, linear(), SPEC) is None and not calls


def test_why_it_is_off(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert autoawq.available() == (False, "autoawq-kernels imports, but torch finds no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert autoawq.available() == (True, "the kernels of autoawq-kernels, for float16")
    monkeypatch.setitem(sys.modules, "awq_ext", None)
    autoawq._extension.cache_clear()
    assert autoawq.available() == (False, "autoawq-kernels is not installed: pip install 'tinychat[autoawq]'")


def test_an_extension_for_another_torch_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "awq_ext.py").write_text("raise ImportError('undefined symbol: c10')")
    monkeypatch.syspath_prepend(tmp_path)
    assert autoawq.available() == (False, "autoawq-kernels does not import: undefined symbol: c10")
