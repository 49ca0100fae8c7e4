"""Linears of the CPU kernels against float64, and the bits of a row whatever runs it and stands beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinychat_kernels import cpu, ref
from tinychat_kernels.errors import KernelError, LayoutError
from tinychat_kernels.int8 import dequantize_rows, quantize_rows
from tinychat_kernels.layout import Logical, QuantSpec, dequantize, from_logical, quantize

available, reason = cpu.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)

ROUNDED = 1e-6  # relative, against float64 with the same rounded activations
EXACT = 2e-6  # relative, of float32 activations
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 33)
FEW_ROWS = (1, 4, 7, 13)
SHAPES = [  # inputs, outputs, group
    (32, 8, 32), (96, 24, 32), (128, 8, 128), (192, 40, 64), (384, 72, 128), (640, 200, -1), (1152, 136, 128),
]  # fmt: skip


@pytest.fixture
def team() -> Iterator[None]:
    """Threads share even the smallest work."""
    cpu.set_least_work(0)
    yield
    cpu.set_least_work()
    cpu.set_threads(0)


@pytest.fixture(params=cpu.isas() if available else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.use_isa(request.param):
        yield request.param


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gaussian(rows: int, inputs: int) -> Tensor:
    return noise(rows, inputs, seed=1)


def heavy_tailed(rows: int, inputs: int) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    return noise(rows, inputs, seed=2) / (noise(3, rows, inputs, seed=3).square().mean(0)).sqrt()


def outlier_channels(rows: int, inputs: int) -> Tensor:
    """Eight channels sixty times as large as the others."""
    x = noise(rows, inputs, seed=4)
    x[:, noise(inputs, seed=5).argsort()[:8]] *= 60
    return x


# What rounding activations by row and group of 128 costs one linear, relative: measured .0065, .014 and .023 on wide
# linears; narrow ones scatter around that.
INPUTS = {gaussian: 0.01, heavy_tailed: 0.025, outlier_channels: 0.035}


def layer(inputs: int, outputs: int, group: int, dtype: torch.dtype = torch.float16) -> tuple[Logical, cpu.Packed]:
    spec = QuantSpec(group_size=group)
    logical = quantize(noise(outputs, inputs, seed=6).to(dtype), spec)
    return logical, cpu.pack(from_logical(logical, spec), spec)


def rounded(x: Tensor, group: int) -> Tensor:
    """x as the kernels round it, in float64."""
    values, scales = cpu.quantize(x, group)
    return (values.double().reshape(len(x), -1, group) * scales.double()[..., None]).reshape(x.shape)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


def test_the_kernels_say_what_they_run_on() -> None:
    assert reason == f"{cpu.isa()} instructions, {cpu.threads()} threads"


# 4-bit linears


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("inputs", "outputs", "group"), SHAPES)
def test_w4_linear_equals_float64_on_rounded_rows(
    isa: str, inputs: int, outputs: int, group: int, dtype: torch.dtype
) -> None:
    logical, packed = layer(inputs, outputs, group, dtype)
    weight, bias = dequantize(logical, torch.float64), noise(outputs, seed=7)
    spec = QuantSpec(group_size=group)
    for make in INPUTS:
        for rows in (1, 3, 17):
            x = make(rows, inputs)
            theirs = rounded(x, packed.group) @ weight.T
            assert relative(cpu.w4_linear(x, packed, spec), theirs) <= ROUNDED
            assert relative(cpu.w4_linear(x, packed, spec, bias), theirs + bias) <= ROUNDED
            assert relative(cpu.w4_linear(x, packed, spec, bias, exact=True), x.double() @ weight.T + bias) <= EXACT


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)
def test_rounding_rows_costs_what_is_stated(isa: str, make, group: int) -> None:
    logical, packed = layer(1152, 136, group)
    x = make(16, 1152)
    theirs = x.double() @ dequantize(logical, torch.float64).T
    assert 1e-4 < relative(cpu.w4_linear(x, packed, QuantSpec(group_size=group)), theirs) <= INPUTS[make]


@pytest.mark.usefixtures("team")
@pytest.mark.parametrize(("inputs", "outputs", "group"), [SHAPES[0], SHAPES[3], SHAPES[5]])
@pytest.mark.parametrize("exact", [False, True])
def test_a_row_has_the_same_bits_in_any_company(inputs: int, outputs: int, group: int, exact: bool) -> None:
    _, packed = layer(inputs, outputs, group)
    x, bias, spec = outlier_channels(max(ROWS), inputs), noise(outputs, seed=7), QuantSpec(group_size=group)
    with cpu.use_isa("generic"):
        cpu.set_threads(1)
        together = cpu.w4_linear(x, packed, spec, bias, exact=exact)
    for name in cpu.isas():
        with cpu.use_isa(name):
            for threads in (1, 3):
                cpu.set_threads(threads)
                for rows in ROWS if threads == 1 else FEW_ROWS:
                    ours = cpu.w4_linear(x[-rows:], packed, spec, bias, exact=exact)
                    assert torch.equal(ours, together[-rows:]), (name, threads, rows)


@settings(max_examples=40)
@given(
    inputs=st.integers(1, 12), outputs=st.integers(1, 20), rows=st.integers(1, 40),
    group=st.sampled_from([32, 64, 128]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(inputs: int, outputs: int, rows: int, group: int, seed: int) -> None:
    logical, packed = layer(inputs * group, outputs * 8, group)
    x = noise(rows, inputs * group, seed=seed)
    ours = cpu.w4_linear(x, packed, QuantSpec(group_size=group))
    theirs = rounded(x, group) @ dequantize(logical, torch.float64).T
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * math.sqrt(inputs * group))


@pytest.mark.usefixtures("team")
def test_many_rows_and_threads_split_the_rows_too() -> None:
    _, packed = layer(256, 72, 128)
    x, spec = gaussian(200, 256), QuantSpec()
    cpu.set_threads(1)
    whole = cpu.w4_linear(x, packed, spec)
    cpu.set_threads(4)
    assert torch.equal(cpu.w4_linear(x, packed, spec), whole)
    assert torch.equal(torch.cat([cpu.w4_linear(part, packed, spec) for part in x.split(7)]), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_result_has_the_dtype_of_the_rows(dtype: torch.dtype) -> None:
    _, packed = layer(128, 16, 128)
    x = gaussian(3, 128).to(dtype)
    ours = cpu.w4_linear(x, packed, QuantSpec())
    assert ours.dtype == dtype
    assert torch.equal(ours, cpu.w4_linear(x.float(), packed, QuantSpec()).to(dtype))


def test_no_rows_give_no_rows() -> None:
    _, packed = layer(128, 16, 128)
    assert cpu.linear(torch.zeros(0, 128), packed).shape == (0, 16)


def test_rows_that_lie_apart(isa: str) -> None:
    _, packed = layer(128, 16, 128)
    wide = gaussian(6, 256)
    assert torch.equal(cpu.linear(wide[:, 64:192], packed), cpu.linear(wide[:, 64:192].clone(), packed))


def test_three_bits_run_as_four() -> None:
    spec = QuantSpec(bits=3, group_size=64)
    logical = quantize(noise(24, 128, seed=8).half(), spec)
    packed = cpu.pack(from_logical(logical, spec), spec)
    x = gaussian(5, 128)
    theirs = rounded(x, 64) @ dequantize(logical, torch.float64).T
    assert relative(cpu.w4_linear(x, packed, spec), theirs) <= ROUNDED


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_in_its_row_alone(isa: str, bad: float) -> None:
    _, packed = layer(256, 24, 128)
    x = gaussian(11, 256)
    clean = cpu.w4_linear(x, packed, QuantSpec())
    x[4, 200] = bad
    ours = cpu.w4_linear(x, packed, QuantSpec())
    assert torch.isnan(ours[4]).all()
    others = torch.arange(11) != 4
    assert torch.equal(ours[others], clean[others])
    assert torch.isnan(cpu.w4_linear(x[4:5], packed, QuantSpec())).all()


def test_zeros_and_vanishing_rows_give_the_bias(isa: str) -> None:
    _, packed = layer(128, 24, 64)
    bias = noise(24, seed=9)
    for value in (0.0, -0.0, 1e-38, 1e-45):
        ours = cpu.w4_linear(torch.full((2, 128), value), packed, QuantSpec(group_size=64), bias)
        assert torch.equal(ours, bias.expand(2, -1))


# Rounding to int8


@pytest.mark.parametrize("group", [4, 32, 33, 128, 588])
def test_rows_are_rounded_to_the_nearest_by_group(isa: str, group: int) -> None:
    x = torch.cat([make(7, 2 * group) for make in INPUTS]) * torch.logspace(-20, 20, 21)[:, None]
    values, scales = cpu.quantize(x, group)
    groups = x.reshape(21, 2, group)
    top = groups.abs().amax(2)
    assert torch.equal(scales, top / 127)
    steps = groups.double() / scales.double()[..., None]
    assert (values.reshape(groups.shape).double() - steps).abs().max() <= 0.5 + 1e-4
    assert int(values.abs().max()) == 127


def test_every_instruction_set_rounds_alike() -> None:
    x = torch.cat([heavy_tailed(9, 588), torch.arange(9 * 588).reshape(9, 588) / 2 - 1000])  # ties too
    results = []
    for name in cpu.isas():
        with cpu.use_isa(name):
            results.append(cpu.quantize(x, 196))
    assert all(torch.equal(one, two) for pair in results for one, two in zip(pair, results[0], strict=True))


def test_the_callers_float_mode_changes_nothing() -> None:
    _, packed = layer(128, 24, 128)
    x = gaussian(5, 128) * 1e-20
    packed_tiny = cpu.pack_int8(quantize_rows(noise(24, 128) * 1e-20))
    before = cpu.linear(x, packed), cpu.linear(x, packed_tiny)
    assert (before[1] != 0).any() and before[1].abs().max() < torch.finfo(torch.float32).tiny
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU keeps subnormal numbers always")
    try:
        after = cpu.linear(x, packed), cpu.linear(x, packed_tiny)
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


# 8-bit linears


@pytest.mark.parametrize(("inputs", "outputs"), [(33, 7), (64, 16), (588, 50), (1024, 129)])
def test_w8a8_linear_equals_float64_and_ref(isa: str, inputs: int, outputs: int) -> None:
    weight = quantize_rows(noise(outputs, inputs, seed=10))
    packed, bias = cpu.pack_int8(weight), noise(outputs, seed=11)
    wide = dequantize_rows(weight, torch.float64)
    for rows in (1, 2, 9):
        x = heavy_tailed(rows, inputs)
        ours = cpu.w8a8_linear(x, packed, bias)
        assert relative(ours, rounded(x, inputs) @ wide.T + bias) <= ROUNDED
        assert relative(ours, ref.w8a8_linear(x, weight, bias).double()) <= 1e-3  # ties fall either way
        assert relative(cpu.linear(x, packed, bias, exact=True), x.double() @ wide.T + bias) <= EXACT


@pytest.mark.usefixtures("team")
@pytest.mark.parametrize(("inputs", "outputs"), [(33, 7), (588, 50), (640, 129)])
def test_8_bit_rows_have_the_same_bits_in_any_company(inputs: int, outputs: int) -> None:
    packed, x = cpu.pack_int8(quantize_rows(noise(outputs, inputs, seed=10))), heavy_tailed(33, inputs)
    with cpu.use_isa("generic"):
        together = cpu.linear(x, packed)
    for name in cpu.isas():
        with cpu.use_isa(name):
            for threads in (1, 3):
                cpu.set_threads(threads)
                for rows in ROWS if threads == 1 else FEW_ROWS:
                    assert torch.equal(cpu.linear(x[-rows:], packed), together[-rows:]), (name, threads, rows)


def test_extreme_8_bit_weights(isa: str) -> None:
    """-128 is no weight of ours, but a checkpoint may hold it; the sums are the largest there are."""
    weight = torch.full((20, 640), -128, dtype=torch.int8)
    weight[1::2] = 127
    packed = cpu.pack_int8(quantize_rows(torch.ones(20, 640))._replace(weight=weight, scale=torch.ones(20)))
    x = torch.full((9, 640), -127.0)
    x[::2] = 127.0
    assert torch.equal(cpu.linear(x, packed).double(), x.double() @ weight.double().T)


@pytest.mark.parametrize(("inputs", "group"), [(256, 128), (192, 192), (100, 100)])
def test_a_head_is_rounded_slice_by_slice(isa: str, inputs: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = noise(200, inputs, seed=12).half()
    whole = cpu.quantize_head(weight)
    assert (whole.group, whole.bits) == (group, 8)
    monkeypatch.setattr(cpu, "SLICE", 48)
    assert torch.equal(cpu.quantize_head(weight).blocks, whole.blocks)
    for rows in (1, 9):
        x = gaussian(rows, inputs)
        assert relative(cpu.linear(x, whole, exact=True), x.double() @ weight.double().T) <= 0.008
        assert relative(cpu.linear(x, whole), x.double() @ weight.double().T) <= 0.015


def test_a_head_of_zeros_and_of_nan() -> None:
    weight = noise(32, 128, seed=12)
    weight[5] = 0
    assert torch.equal(cpu.linear(gaussian(1, 128), cpu.quantize_head(weight))[0, 5], torch.tensor(0.0))
    weight[3, 3] = math.nan
    with pytest.raises(LayoutError, match="the weight holds NaN or Inf values"):
        cpu.quantize_head(weight)


# Memory and errors


@pytest.mark.parametrize("size", [1, 4096, cpu.HUGE, 3 * cpu.HUGE + 5])
def test_memory_is_aligned_and_zero(size: int) -> None:
    memory = cpu.empty(size)
    assert memory.numel() == size and memory.data_ptr() % (cpu.HUGE if size >= cpu.HUGE else 64) == 0
    assert not memory.any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    _, packed = layer(128, 16, 128)
    with pytest.raises(KernelError, match=r"x has shape \[2, 64\] on cpu, \[rows, 128\] on cpu is needed"):
        cpu.linear(torch.zeros(2, 64), packed)
    with pytest.raises(KernelError, match=r"x has shape \[2, 128\] on meta, \[rows, 128\] on cpu is needed"):
        cpu.linear(torch.zeros(2, 128, device="meta"), packed)
    with pytest.raises(KernelError, match=r"x has shape \[96\] on cpu, \[rows, inputs\] on cpu is needed"):
        cpu.quantize(torch.zeros(96), 32)
    with pytest.raises(LayoutError, match="the weights have 4 bits, the spec says 8"):
        cpu.w4_linear(torch.zeros(2, 128), packed, QuantSpec(bits=8))
    with pytest.raises(KernelError, match="rows of 100 values are no multiple of groups of 32"):
        cpu.quantize(torch.zeros(2, 100), 32)
    spec = QuantSpec(group_size=-1)
    odd = from_logical(quantize(noise(8, 100), spec), spec)
    with pytest.raises(LayoutError, match="groups of 100 inputs are no multiple of 32: the CPU kernels cannot hold"):
        cpu.pack(odd, spec)
    wide = odd._replace(scales=odd.scales.double())
    with pytest.raises(LayoutError, match=r"scales are torch.float64; the CPU kernels hold torch.float16, .*"):
        cpu.pack(wide._replace(qweight=wide.qweight[:64]), spec)


@pytest.mark.parametrize("bias", [torch.zeros(3), torch.zeros(1, 16), torch.zeros(16, device="meta")])
def test_a_bias_that_does_not_fit_is_refused(bias: torch.Tensor) -> None:
    _, packed = layer(128, 16, 128)
    with pytest.raises(KernelError, match=r"the bias is \[.*\] on (cpu|meta), \[16\] on cpu is needed"):
        cpu.linear(torch.zeros(2, 128), packed, bias)


@pytest.mark.parametrize("wrong", ["short", "long", "askew", "kind"])
def test_memory_that_does_not_fit_is_refused(wrong: str) -> None:
    words = from_logical(quantize(noise(16, 128), QuantSpec()), QuantSpec())
    head = noise(16, 128)
    for pack, bits, scale in (
        (lambda memory: cpu.pack(words, QuantSpec(), memory), 4, words.scales.dtype),
        (lambda memory: cpu.quantize_head(head, memory=memory), 8, torch.float16),
    ):
        size = cpu.packed_size(128, 16, 128, bits, scale)
        room = cpu.empty(size + 64)
        cases = {
            "short": room[: size - 1],
            "long": room,
            "askew": room[1 : size + 1],
            "kind": room[:size].view(torch.int8),
        }
        pack(room[:size])
        with pytest.raises(LayoutError, match=f"came for {size} bytes aligned to 64"):
            pack(cases[wrong])


def test_too_little_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A library whose calls find no memory."""

        def __getattr__(self, name: str) -> object:
            return lambda *_: 1

    _, packed = layer(128, 16, 128)
    monkeypatch.setattr(cpu, "library", Full)
    with pytest.raises(KernelError, match="there is no memory to compute 2 rows of 128 inputs"):
        cpu.linear(torch.zeros(2, 128), packed)


def test_unknown_and_missing_instructions_are_refused() -> None:
    with pytest.raises(KernelError, match="there are no instructions 'mmx'; known are generic, avx2, "):  # noqa: SIM117
        with cpu.use_isa("mmx"):
            pass
    missing = next(name for name in cpu.ISAS if name not in cpu.isas())
    sentence = f"this CPU has no {missing} instructions: unset TINYCHAT_ISA, and {cpu.isa()} is used"
    with pytest.raises(KernelError, match=sentence):  # noqa: SIM117
        with cpu.use_isa(missing):
            pass
