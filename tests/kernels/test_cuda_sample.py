"""Drawing tokens in the emulator: the likeliest, and the distribution function inverted, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulated import Defects, GuardedLaunch, launch_for, modes, needs_compiler, numbers
from torch import Tensor

from emu.launcher import Mode
from tinychat_kernels import cuda_ops, ref
from tinychat_kernels.cuda_ops import SAMPLE_BLOCKS, Draw

pytestmark = needs_compiler
DTYPES = [(torch.float32, 75), (torch.float32, 80), (torch.float16, 75), (torch.float16, 80), (torch.bfloat16, 80)]
every_dtype = pytest.mark.parametrize(("dtype", "arch"), DTYPES, ids=lambda value: str(value).removeprefix("torch."))
FAR = 1e-4  # of a distribution function: within this of a step, either neighbour is right


def run(launch: GuardedLaunch, logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities; every position goes on by one."""
    rows = len(logits)
    draw = Draw(
        temperature, uniform, torch.full((rows,), -1, dtype=torch.int32), torch.zeros(rows),
        torch.full((rows, SAMPLE_BLOCKS, 4), float("nan")),
    )  # fmt: skip
    positions = torch.arange(rows, dtype=torch.int32) * 7
    cuda_ops.sample(launch, logits, draw, positions)
    assert positions.tolist() == [7 * row + 1 for row in range(rows)]
    return draw.tokens, draw.logprobs


def chances(rows: int, temperature: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    return torch.full((rows,), temperature), uniform


def check(
    launch: GuardedLaunch, vocabulary: int, dtype: torch.dtype, temperature: float, rows: int = 3, seed: int = 0
) -> None:
    logits = numbers(rows, vocabulary, dtype=dtype, seed=seed, heavy=True) * 2
    at, uniform = chances(rows, temperature, seed)
    tokens, logprobs = run(launch, logits, at, uniform)
    expected = ref.sample(logits, at, uniform)[0]
    cumulative = (logits.double() / max(temperature, 1e-6)).softmax(-1).cumsum(-1)
    for row, (token, exact) in enumerate(zip(tokens.tolist(), expected.tolist(), strict=True)):
        below = float(cumulative[row, token - 1]) if token else 0.0
        near = below - FAR <= float(uniform[row]) <= float(cumulative[row, token]) + FAR
        assert token == exact or (temperature > 0 and near and float(cumulative[row, token]) > below)
    wide = logits.double().log_softmax(-1).gather(1, tokens.long()[:, None])[:, 0]
    assert torch.allclose(logprobs.double(), wide, rtol=1e-5, atol=1e-5)


@every_dtype
@pytest.mark.parametrize("vocabulary", [1, 2, 31, 99, 8192, 32003])
def test_against_float64(vocabulary: int, dtype: torch.dtype, arch: int):
    for temperature in (0.0, 0.7, 1.5):
        check(launch_for(arch), vocabulary, dtype, temperature)


@modes
def test_in_every_order(mode: Mode):
    for dtype, arch in DTYPES:
        for temperature in (0.0, 1.0):
            check(launch_for(arch, mode), 1003, dtype, temperature, rows=2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_of_equal_logits_the_first_is_the_likeliest(temperature: float):
    logits = torch.full((1, 5000), -200.0)
    logits[0, [3000, 4999, 299, 300]] = 50.0
    token = run(launch_for(), logits, torch.tensor([temperature]), torch.tensor([0.0]))[0]
    assert token.tolist() == [299]


@pytest.mark.parametrize("vocabulary", [7, 99, 1000])
def test_every_token_has_its_share(vocabulary: int):
    """Numbers in the middle of each token's share draw just that token."""
    logits = numbers(1, vocabulary, dtype=torch.float32)
    cumulative = (logits.double() / 0.8).softmax(-1).cumsum(-1)[0]
    shares = torch.cat((torch.zeros(1).double(), cumulative))
    wanted = torch.arange(vocabulary)[:: max(1, vocabulary // 100)]
    middle = ((shares[:-1] + shares[1:]) / 2)[wanted].float()
    rows = logits.expand(len(wanted), -1).contiguous()
    tokens = run(launch_for(), rows, torch.full((len(wanted),), 0.8), middle)[0]
    assert torch.equal(tokens.long(), wanted)


def test_the_ends_of_the_distribution_are_tokens_with_a_chance():
    logits = torch.full((2, 700), float("-inf"))
    logits[:, 100:600] = numbers(500, dtype=torch.float32)
    tokens = run(launch_for(), logits, torch.ones(2), torch.tensor([0.0, 1 - 2.0**-24]))[0]
    assert tokens.tolist() == [100, 599]


def test_a_cold_draw_is_the_likeliest():
    logits = numbers(3, 999, dtype=torch.float32)
    tokens = run(launch_for(), logits, torch.full((3,), 1e-9), torch.tensor([0.01, 0.5, 0.99]))[0]
    assert torch.equal(tokens.long(), logits.argmax(-1))


def test_rows_do_not_know_of_each_other():
    logits, uniform = numbers(4, 600, dtype=torch.float32), torch.tensor([0.3, 0.1, 0.8, 0.5])
    at = torch.tensor([0.0, 1.0, 0.5, 2.0])
    together = run(launch_for(), logits, at, uniform)
    for i in range(4):
        alone = run(launch_for(), logits[i : i + 1], at[i : i + 1], uniform[i : i + 1])
        assert all(torch.equal(found[i : i + 1], part) for found, part in zip(together, alone, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_distribution_gives_a_token_and_no_log_probability(temperature: float):
    logits = numbers(5, 300, dtype=torch.float32)
    logits[0, 7], logits[1, 9], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3] = float("nan")
    tokens, logprobs = run(launch_for(), logits, torch.full((5,), temperature), torch.full((5,), 0.5))
    assert ((tokens >= 0) & (tokens < 300)).all() and tokens[1] == 9
    assert logprobs.isnan().tolist() == [True, True, True, True, False]


DEFECTS = {
    "the last of equal ones": ("at < index", "at > index"),
    "the likeliest of one warp": ("for (int i = 0; i < kWarps; ++i) own.take", "for (int i = 0; i < 1; ++i) own.take"),
    "a part that ends early": ("min((index + 1) * size, vocabulary)", "min((index + 1) * size - 1, vocabulary)"),
    "a part behind the end": ("min((index + 1) * size, vocabulary)", "(index + 1) * size"),
    "no temperature": ("tempered += __expf(below * inverse)", "tempered += __expf(below)"),
    "a temperature in the log-probability": ("plain += __expf(below)", "plain += __expf(below * inverse)"),
    "sums share their room": ("sums + kMostWarps", "sums"),
    "parts are not scaled": ("parts[i].z * __expf(parts[i].x - out.most.logit)", "parts[i].z"),
    "the last part is left out": ("int i = 1; i < count;", "int i = 1; i + 1 < count;"),
    "the part behind": ("out.left = target - before;", "out.left = target;"),
    "the first part that begins below": ("weight > 0 && before <= target", "weight > 0 && out.part < 0"),
    "warps before are not summed": ("for (int i = 0; i < warp; ++i) out += scratch[i];", ""),
    "lanes are summed with their own": ("lane == 0 ? out : out + inside", "out + sum"),
    "neighbours overlap": ("min(first + each, part.end)", "min(first + each + 1, part.end)"),
    "the position stays": ("positions[row] += 1;", ""),
    "another row's temperature": ("inverse_of(temperature[blockIdx.y])", "inverse_of(temperature[0])"),
    "parts are read before all are there": ("blocks + thread];\n    __syncthreads();", "blocks + thread];"),
    "rows are mixed": ("parts[row * blocks + ", "parts["),
}  # fmt: skip


def check_small(launch: GuardedLaunch) -> None:
    """Draws where several warps weigh, likeliest tokens that stand twice in a part, and one in the last part."""
    logits = numbers(6, 9001, dtype=torch.float32)
    logits[1, [900, 899, 1101, 8999]] = logits[5, 8990] = 20.0
    at, uniform = torch.tensor([0.6, 0.0, 1.0, 1.0, 1.5, 0.0]), torch.tensor([0.37, 0.2, 0.83, 0.11, 0.995, 0.6])
    tokens, logprobs = run(launch, logits, at, uniform)
    expected, wide = ref.sample(logits, at, uniform)
    assert torch.equal(tokens, expected) and torch.allclose(logprobs, wide, atol=1e-4)


@modes
def test_without_a_defect_it_passes(mode: Mode):
    check_small(launch_for(80, mode))


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_found(defect: str, tmp_path: Path):
    trims = (("ENTRIES(f16, F16)\n#ifdef TINYCHAT_BF16\nENTRIES(bf16, BF16)\n#endif", ""),)
    assert not Defects("sample", trims).survive(check_small, tmp_path, DEFECTS[defect])
