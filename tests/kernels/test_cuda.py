"""The CUDA backend without a GPU: packing, joining, plain torch as its fallback, and the check of a first use."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from emulated import needs_compiler, relative
from torch import Tensor

from emu.launcher import Emulator
from tinychat_kernels import cuda, cuda_checks, cuda_int8, cuda_layout, cuda_library, cuda_linear, ref, registry
from tinychat_kernels.cuda_layout import Packed
from tinychat_kernels.errors import BuildError, KernelError, LayoutError
from tinychat_kernels.int8 import Int8, quantize_rows
from tinychat_kernels.layout import QuantSpec, dequantize, from_logical, quantize, to_logical


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(outputs: int = 80, inputs: int = 192, group: int = 64, seed: int = 0):
    spec = QuantSpec(group_size=group)
    return from_logical(quantize(noise(outputs, inputs, seed=seed).half(), spec), spec), spec


def packed(outputs: int = 80, inputs: int = 192, group: int = 64, seed: int = 0) -> Packed:
    return cuda.pack(*words(outputs, inputs, group, seed))


@pytest.mark.parametrize(("outputs", "inputs", "group"), [(80, 192, 64), (8, 128, 128), (1040, 96, 32), (24, 160, -1)])
def test_plain_torch_computes_what_ref_does(outputs: int, inputs: int, group: int) -> None:
    disk, spec = words(outputs, inputs, group)
    made = cuda.pack(disk, spec)
    x, bias = noise(3, inputs, seed=1), noise(outputs, seed=2)
    assert relative(cuda.plain(x, made, bias), ref.w4_linear(x, disk, spec, bias)) < 1e-6
    whole = torch.cat(list(cuda.floats(made, torch.float64, tiles=3)))
    assert torch.equal(whole, dequantize(to_logical(disk, spec), torch.float64))
    for ours, theirs in zip(from_logical(cuda.unpack(made, spec), spec), disk, strict=True):
        assert torch.equal(ours, theirs)


def test_the_op_is_torchs_and_the_registrys() -> None:
    disk, spec = words()
    made, x, bias = cuda.pack(disk, spec), noise(2, 192, seed=1).half(), noise(80).half()
    out = registry.pick("w4_linear", "cuda")(x, made, spec, bias)
    assert torch.equal(out, cuda.plain(x, made, bias)) and out.dtype == torch.float16
    for given in (bias, None):
        sizes = made.inputs, made.outputs, made.group, made.scale
        torch.library.opcheck(cuda_library.linear, (x, made.words, made.scales, given, *sizes))
    with pytest.raises(LayoutError, match="the tiles hold weights of 4 bits, the spec says 8"):
        cuda.w4_linear(x, made, QuantSpec(bits=8), None)


def test_linears_are_joined_and_split_without_a_copy() -> None:
    parts = [packed(32), packed(16, seed=1), packed(40, seed=2)]
    whole, x = cuda.join(parts), noise(2, 192, seed=3)
    assert torch.equal(cuda.plain(x, whole, None), torch.cat([cuda.plain(x, part, None) for part in parts], 1))
    own = cuda.split(whole, [32, 16, 40])
    for one, part in zip(own, parts, strict=True):
        assert torch.equal(one.words, part.words) and torch.equal(one.scales, part.scales)
        assert one.words.untyped_storage().data_ptr() == whole.words.untyped_storage().data_ptr()
    with pytest.raises(LayoutError, match=r"outputs \[40\], cannot be joined"):
        cuda.join([parts[2], parts[0]])
    with pytest.raises(LayoutError, match="cannot be joined"):
        cuda.join([parts[0], packed(32, group=32)])


@pytest.mark.parametrize(("outputs", "inputs", "group"), [(72, 256, 128), (20, 96, 96)])
def test_a_head_is_rounded_slice_by_slice(
    monkeypatch: pytest.MonkeyPatch, outputs: int, inputs: int, group: int
) -> None:
    weight = noise(outputs, inputs).half()
    whole = cuda.quantize_head(weight)
    monkeypatch.setattr(cuda, "SLICE", 32)
    made = cuda.quantize_head(weight)
    assert torch.equal(made.words, whole.words) and torch.equal(made.scales, whole.scales)
    assert (made.bits, made.outputs) == (8, outputs)
    found = torch.cat(list(cuda.floats(made, torch.float64)))
    step = (weight.double().unflatten(1, (-1, group)).abs().amax(2) / 127).half().double()
    assert ((found - weight).unflatten(1, (-1, group)).abs() <= 0.501 * step[..., None]).all()
    with pytest.raises(LayoutError, match="NaN or Inf"):
        cuda.quantize_head(weight.index_fill(0, torch.tensor([3]), float("inf")))


@needs_compiler
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(72, 256, 128), (20, 96, 96)])
def test_a_head_of_4_bits(monkeypatch: pytest.MonkeyPatch, outputs: int, inputs: int, group: int) -> None:
    weight = noise(outputs, inputs)
    whole = cuda.quantize_head(weight, bits=4)
    monkeypatch.setattr(cuda, "SLICE", 32)
    made = cuda.quantize_head(weight, bits=4)
    assert torch.equal(made.words, whole.words) and torch.equal(made.scales, whole.scales)
    spec = QuantSpec(4, group if group == 128 else -1)
    exact = dequantize(quantize(weight.half(), spec), torch.float64)
    assert (made.bits, made.outputs) == (4, outputs)
    assert torch.equal(torch.cat(list(cuda.floats(made, torch.float64))), exact)
    for rows in (2, 9, 300):
        x, logits = noise(rows, inputs).half(), torch.full((rows, outputs), float("nan"))
        cuda.launch_linear(Emulator().launch, x, made, None, logits)
        assert relative(logits, x.double() @ exact.T) < 5e-3


def test_other_dtypes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "_trouble", lambda index: "too old" if index else None)
    assert "activations are torch.float32" in str(cuda.obstacle(torch.float32, device))
    assert cuda.obstacle(torch.bfloat16, device) == "this GPU has no products of bfloat16: give --dtype float16"
    assert cuda.obstacle(torch.float16, device) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert cuda.obstacle(torch.bfloat16, device) is None
    assert cuda.obstacle(torch.float16, torch.device("cuda", 1)) == "too old"


# The check of a first use


@needs_compiler
@pytest.mark.parametrize("made", [packed(), packed(8, 128, 32), cuda.quantize_head(noise(100, 256))])
def test_kernels_that_are_right_pass(made: Packed) -> None:
    assert cuda.check(Emulator().launch, made, torch.float16, 1) is None
    assert cuda.check(Emulator().launch, made, torch.bfloat16, 3) is None


@needs_compiler
def test_kernels_that_are_wrong_are_named() -> None:
    made = packed()

    def other_weights(unit, entry, grid, block, shared, *args) -> None:
        swapped = [made.words.flip(0) if arg is made.words else arg for arg in args]
        Emulator().launch(unit, entry, grid, block, shared, *swapped)

    def half_of_the_blocks(unit, entry, grid, block, shared, *args) -> None:
        Emulator().launch(unit, entry, (1, 1, 1), block, shared, *args)

    assert "is off by" in str(cuda.check(other_weights, made, torch.float16, 1))
    assert "is off by nan" in str(cuda.check(half_of_the_blocks, made, torch.float16, 1))
    assert "is off by nan" in str(cuda.check(lambda *args: None, made, torch.float16, 2))


def test_every_kernel_of_a_linear_is_checked_by_itself() -> None:
    names = [cuda.variant(rows, 4) for rows in (1, 2, 8, 9, 16, 17, 64, 65, 256, 257)]
    assert names == [
        "gemv m1",
        *["gemv m8"] * 2,
        *["gemm r16"] * 2,
        "gemm r32",
        "gemm r64",
        *["gemm r128"] * 2,
        "dequantize",
    ]
    assert [cuda.variant(rows, 8) for rows in (1, 8, 9)] == ["gemv m1", "gemv m8", "dequantize"]


def test_a_shape_that_fails_is_said_and_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    results: dict[str, bool] = {}

    def passed(device, name, wrong) -> bool:
        return results.setdefault(name, wrong() is None)

    monkeypatch.setattr(cuda_checks, "passed", passed)
    monkeypatch.setattr(cuda, "check", lambda *args: "is off by 1.0e+00")
    device = SimpleNamespace(index=0, processors=2)
    with pytest.warns(UserWarning, match=r"gemv m8 4 bits 192x80 g64 float16 float16 is off by .* runs on plain torch"):
        assert not cuda.passed(device, packed(), torch.float16, 8)
    monkeypatch.setattr(cuda, "check", lambda *args: None)
    assert cuda.passed(device, dataclasses.replace(packed(), outputs=72), torch.float16, 9)
    assert list(results) == ["gemv m8 4 bits 192x80 g64 float16 float16", "gemm r16 4 bits 192x72 g64 float16 float16"]


@needs_compiler
@pytest.mark.parametrize("spoilt", ["w4_reduce", "bias"])
def test_splits_and_biases_are_checked(monkeypatch: pytest.MonkeyPatch, spoilt: str) -> None:
    made, found = packed(264, 1152, 128), []
    monkeypatch.setattr(cuda_checks, "passed", lambda device, name, wrong: found.append(wrong()) or not found[-1])

    class Spoilt:
        processors = 16

        def __call__(self, unit, entry, grid, block, shared, *args) -> None:
            if spoilt == "bias":
                args = [None if isinstance(a, Tensor) and a.shape == (264,) else a for a in args]
            if spoilt not in entry:
                Emulator().launch(unit, entry, grid, block, shared, *args)

    with pytest.warns(UserWarning, match="runs on plain torch"):
        assert not cuda.passed(Spoilt(), made, torch.float16, 16)
    assert cuda.check(Emulator().launch, made, torch.float16, 16, processors=16) is None
    assert cuda_linear.gemm_splits(made, 16, 16) == 2


def test_a_kernel_that_does_not_compile_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing raises, whoever asks."""
    made = packed()

    def broken(*args: object) -> None:
        raise BuildError("NVRTC cannot compile w4_gemv.cu")

    device = SimpleNamespace(index=0, processors=2, target=SimpleNamespace(arch="sm_87"), made_by="nvcc")
    monkeypatch.setattr(cuda, "check", broken)
    monkeypatch.setattr(cuda_checks, "_keep", lambda more: None)
    monkeypatch.setattr(cuda_checks, "place", lambda device: "here")
    monkeypatch.setattr(cuda_checks, "_known", functools.cache(lambda here: {}))
    for name in ("is_current_stream_capturing", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: False)
    said = r"^gemv m8 .* does not run \(NVRTC cannot compile w4_gemv.cu\) and runs on plain torch"
    with pytest.warns(UserWarning, match=said) as warned:
        assert not any(cuda.passed(device, made, torch.float16, 2) for _ in range(2))
    assert len(warned) == 1


# Linears in 8 bits


def test_the_int8_op_is_torchs_and_the_registrys() -> None:
    weight, x, bias = quantize_rows(noise(70, 48)), noise(5, 48, seed=1).half(), noise(70, seed=2)
    out = registry.pick("w8a8_linear", "cuda")(x, weight, bias)
    assert torch.equal(out, ref.w8a8_linear(x, weight, bias.half())) and out.dtype == torch.float16
    for given in (bias.half(), None):
        torch.library.opcheck(cuda_library.int8_linear, (x, weight.weight, weight.scale, given, "gelu"))
    with pytest.raises(KernelError, match="there is no activation 'relu'; known are none, gelu"):
        cuda.w8a8_linear(x, weight, None, "relu")


@pytest.mark.parametrize("activation", cuda_int8.ACTIVATIONS)
@needs_compiler
def test_plain_torch_rounds_behind_an_activation_as_the_kernels_do(activation: str) -> None:
    weight, x, out = quantize_rows(noise(40, 96)), noise(9, 96, seed=1).half(), torch.empty(9, 40).half()
    cuda_int8.linear(Emulator().launch, x, weight, None, out, activation)
    assert relative(out, cuda.w8a8_linear(x, weight, None, activation)) < 1e-3
    assert not torch.equal(out, cuda.w8a8_linear(x, weight)) or activation == "none"


def test_rows_that_the_int8_kernels_do_not_take() -> None:
    assert [cuda_int8.takes(inputs) for inputs in (16, 588, 4304, 16384, 16400)] == [True, False, True, True, False]


@needs_compiler
def test_int8_kernels_are_checked() -> None:
    weight = quantize_rows(noise(100, 64))
    assert cuda.check_int8(Emulator().launch, weight, torch.float16, 3) is None
    assert cuda.check_int8(Emulator().launch, weight, torch.bfloat16, 70, processors=99) is None

    def other_weights(unit, entry, grid, block, shared, *args) -> None:
        swapped = [weight.weight.flip(0).contiguous() if arg is weight.weight else arg for arg in args]
        Emulator().launch(unit, entry, grid, block, shared, *swapped)

    def a_hole(unit, entry, grid, block, shared, *args) -> None:
        Emulator().launch(unit, entry, grid, block, shared, *args)
        if entry.startswith("int8_gemm"):
            args[5][0, 5] = float("nan")

    assert "is off by" in str(cuda.check_int8(other_weights, weight, torch.float16, 2))
    assert cuda.check_int8(a_hole, weight, torch.float16, 2) == "leaves outputs out"
    assert "is off by nan" in str(cuda.check_int8(lambda *args: None, weight, torch.float16, 2))
    assert cuda.check_int8(Emulator().launch, Int8(weight.weight[:3], weight.scale[:3]), torch.float16, 1) is None


def test_why_the_backend_is_off() -> None:
    if not torch.cuda.is_available():
        assert cuda.available() == (False, cuda.why_none())
    assert cuda_layout.TILE == 16
