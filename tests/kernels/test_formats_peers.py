"""Our formats against the packages that write them: bit for bit. Left out where a package is not installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tinychat_kernels.formats import COMPRESSED_TENSORS, GEMM, GEMV, GEMV_FAST, GPTQ, GPTQ_V2, Format
from tinychat_kernels.layout import Logical, QuantSpec, dequantize

INPUTS, OUTPUTS = 256, 64
pytestmark = pytest.mark.filterwarnings("ignore")


class Stub(nn.Module):
    """What their pack methods read and write of a module."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.bits, self.group_size = spec.bits, spec.group_size
        self.in_features, self.out_features = INPUTS, OUTPUTS
        self.interleave, self.zeros_name = 4, "qzeros"


def logical(spec: QuantSpec) -> Logical:
    """Scales are powers of two, so that float arithmetic finds the very q again."""
    draw = torch.Generator().manual_seed(0)
    shape = (INPUTS // spec.group_size, OUTPUTS)
    scale = torch.randint(-8, -4, shape, generator=draw).float().exp2().half()
    zero = torch.randint(1, 16, shape, generator=draw, dtype=torch.uint8)
    return Logical(torch.randint(0, 16, (INPUTS, OUTPUTS), generator=draw, dtype=torch.uint8), scale, zero)


def linear_of(values: Logical) -> nn.Linear:
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = dequantize(values, torch.float32)
    return linear


def same(theirs: dict[str, Tensor], values: Logical, format: Format, spec: QuantSpec) -> None:
    ours = format.pack(values, spec)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    for mine, given in zip(format.unpack(theirs, spec), values, strict=True):
        assert torch.equal(mine, given)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    ("module", "kind", "format"),
    [
        ("gemm_awq", "AwqGEMMLinear", GEMM),
        ("gemv_awq", "AwqGEMVLinear", GEMV),
        ("gemv_fast_awq", "AwqGEMVFastLinear", GEMV_FAST),
    ],
)
def test_awq_as_gptqmodel_packs_it(module: str, kind: str, format: Format, group: int) -> None:
    pytest.importorskip("gptqmodel")
    theirs = getattr(__import__(f"gptqmodel.nn_modules.qlinear.{module}", fromlist=[kind]), kind)
    spec = QuantSpec(group_size=group)
    values, stub = logical(spec), Stub(spec)
    theirs.pack(stub, linear_of(values), values.scale.T.float(), values.zero.T.float())
    same(dict(stub.named_buffers()), values, format, spec)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("format", [GPTQ, GPTQ_V2], ids=lambda format: format.name)
def test_gptq_as_gptqmodel_packs_it(format: Format, group: int) -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    spec = QuantSpec(group_size=group)
    values = logical(spec)
    theirs = TorchLinear(4, group, False, False, INPUTS, OUTPUTS, register_buffers=True)
    index = (torch.arange(INPUTS) // group).int()
    theirs.pack_original(linear_of(values), values.scale.T.float(), values.zero.T.float(), index)
    if format is GPTQ:
        convert_gptq_v2_to_v1_format_module(theirs, SimpleNamespace(bits=4, pack_dtype=torch.int32))
    same(dict(theirs.named_buffers()), values, format, spec)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_as_its_package_packs_them(group: int, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    spec = QuantSpec(group_size=group, zero_point=not symmetric)
    values = logical(spec)
    if symmetric:
        values.zero.fill_(8)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    given = {
        "weight": dequantize(values, torch.float32),
        "weight_scale": values.scale.T.contiguous(),
        "weight_zero_point": (values.zero.T.int() - 8).to(torch.int8).contiguous(),
    }
    packed = PackedQuantizationCompressor.compress(given, scheme)
    same(packed, values, COMPRESSED_TENSORS, spec)
    back = PackedQuantizationCompressor.decompress(COMPRESSED_TENSORS.pack(values, spec), scheme)
    assert torch.equal(back["weight"], dequantize(values))
