"""A model's decoder on the CUDA kernels, every one of them emulated, against its modules computed by ref."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated import needs_compiler
from models.tiny import ids, text_pair
from torch import Tensor, nn

from emu.launcher import Emulator
from tinychat.layers import cuda_decoder
from tinychat.layers.cuda_decoder import CudaDecoder
from tinychat.layers.head import PackedHead
from tinychat.layers.kv_cache import KVCache, KVPool
from tinychat.layers.linear import QuantLinear
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat_kernels import cuda, cuda_checks, cuda_gpu, cuda_layout, ref
from tinychat_kernels import cuda_decoder as kernels
from tinychat_kernels.cuda_decoder import check
from tinychat_kernels.errors import KernelError
from tinychat_kernels.layout import QuantSpec

pytestmark = needs_compiler
SIZES = {"hidden_size": 128, "intermediate_size": 160}  # heads of 32 channels
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 7}),
}
CLEAR = (1156, 1751, 2329)  # prompts after which the two highest logits always lie at least MARGIN of the spread apart
MARGIN = 0.02


def quantized(family: str = "llama", dtype: torch.dtype = torch.float16) -> VilaLlamaForCausalLM:
    """A tiny model with 4-bit linears, as on disk."""
    name, config = FAMILIES[family]
    torch.manual_seed(0)
    _, model = text_pair(name, **SIZES, **config)
    model = model.to(dtype)
    for part, module in list(model.llm.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            model.llm.model.layers.set_submodule(part, QuantLinear.from_linear(module, QuantSpec(4, 32)))
    return model


def prepared(model: VilaLlamaForCausalLM, head: bool = False) -> VilaLlamaForCausalLM:
    """As loading to a GPU leaves it."""
    for module in model.llm.modules():
        if isinstance(module, QuantLinear):
            module.prepare(cuda.pack(module._words(), module.spec))
    if head:
        weight = model.llm.lm_head.weight.detach()
        model.llm.set_submodule("lm_head", PackedHead(cuda.quantize_head(weight), lambda: weight))
    return model


def emulated(model: VilaLlamaForCausalLM, arch: int = 80, head: bool = False) -> VilaLlamaForCausalLM:
    """The same model, whose decoder runs in the emulator."""
    model = prepared(copy.deepcopy(model), head)
    model._one_call = CudaDecoder(model.llm, model.llm.config, Emulator(arch=arch).launch, processors=2)
    return model


def cache_of(model: VilaLlamaForCausalLM, rows: int, capacity: int = 64, dtype: torch.dtype | None = None) -> KVCache:
    pool = KVPool(model.llm.config, rows + 1, capacity, dtype or model.dtype)
    return pool.take(rows + 1).select(range(1, rows + 1))


@torch.inference_mode()
def answers(
    model: VilaLlamaForCausalLM, tokens: Tensor, steps: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Logits after a prompt in chunks, after one more token a row, and after each of some more."""
    cache = cache_of(model, len(tokens), dtype=dtype)
    first = model.prefill(model.embed_text(tokens), cache, 0, chunk=9)
    return [first, model.decode(steps[:, :1], cache), model.verify(steps[:, 1:], cache)]


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize(
    ("family", "dtype", "arch", "rows"),
    [
        ("llama", torch.float16, 80, 1),
        ("llama", torch.float16, 75, 2),
        ("llama", torch.bfloat16, 80, 2),
        ("biases", torch.float16, 80, 2),
        ("mistral", torch.float16, 80, 2),
    ],
)
def test_logits_are_the_modules(family: str, dtype: torch.dtype, arch: int, rows: int) -> None:
    model = quantized(family, dtype)
    tokens, steps = ids(rows, 20), ids(rows, 4, seed=1)
    exact = answers(copy.deepcopy(model).double(), tokens, steps)
    beside = answers(model, tokens, steps)
    ours = emulated(model, arch)
    for found, rounded, wide in zip(answers(ours, tokens, steps), beside, exact, strict=True):
        assert found.dtype == torch.float32 and found.shape == wide.shape
        assert relative(found, wide) <= 1.5 * relative(rounded, wide)
    assert isinstance(ours._one_call, CudaDecoder) and ours.can_draw


def test_keys_and_values_in_8_bits() -> None:
    model, tokens, steps = quantized("mistral"), ids(2, 20), ids(2, 4, seed=1)
    exact = answers(copy.deepcopy(model).double(), tokens, steps)
    beside = answers(model, tokens, steps, torch.int8)
    for found, rounded, wide in zip(answers(emulated(model), tokens, steps, torch.int8), beside, exact, strict=True):
        assert relative(found, wide) <= 1.5 * relative(rounded, wide) < 0.03


def test_rows_of_different_lengths_and_a_packed_head() -> None:
    model = quantized()
    exact, ours = copy.deepcopy(model).double(), emulated(model, head=True)
    found = []
    for one in (exact, ours):
        with torch.inference_mode():
            cache = cache_of(one, 3)
            for row, length in enumerate((3, 17, 9)):
                part = cache.select([row])
                one.prefill(one.embed_text(ids(1, length, seed=row)), part, 0)
                cache.lengths[row] = part.lengths[0]
            found.append(one.decode(ids(3, 1, seed=5), cache))
            assert cache.lengths == [4, 18, 10]
    assert relative(found[1], found[0]) < 0.02  # the head is rounded to 8 bits


@torch.inference_mode()
def greedy(model: VilaLlamaForCausalLM, tokens: Tensor, count: int) -> tuple[list[list[int]], list[Tensor]]:
    """A row's likeliest tokens one after the other, and the logits that each was the highest of."""
    cache = cache_of(model, len(tokens))
    logits = [model.prefill(model.embed_text(tokens), cache, 0)[:, -1]]
    chosen = [logits[0].argmax(-1)]
    for _ in range(count):
        logits.append(model.decode(chosen[-1][:, None], cache)[:, -1])
        chosen.append(logits[-1].argmax(-1))
    return torch.stack(chosen).tolist(), logits


@torch.inference_mode()
def drawn(model: VilaLlamaForCausalLM, tokens: Tensor, count: int) -> tuple[list[list[int]], list[list[float]]]:
    cache = cache_of(model, len(tokens))
    chosen = [model.prefill(model.embed_text(tokens), cache, 0)[:, -1].argmax(-1).tolist()]
    logprobs: list[list[float]] = []
    for _ in range(count):
        found = model.draw(chosen[-1], cache, [0.0] * len(tokens), [0.0] * len(tokens))
        chosen.append(found[0])
        logprobs.append(found[1])
    assert cache.lengths == [tokens.shape[1] + count] * len(tokens)
    return chosen, logprobs


@pytest.mark.parametrize("rows", [1, 3])
def test_drawn_tokens_are_refs(rows: int) -> None:
    """The whole step, from a token in device memory to the next one, with every op emulated."""
    model, tokens = quantized(), torch.cat([ids(1, 12, seed=seed) for seed in CLEAR[:rows]])
    chosen, logits = greedy(copy.deepcopy(model).float(), tokens, 8)
    for wide in logits:
        top = wide.topk(2).values
        assert ((top[:, 0] - top[:, 1]) > MARGIN * (wide.amax(1) - wide.amin(1))).all(), "take other prompts"
    assert all(len({step[row] for step in chosen}) > 5 for row in range(rows)), "take other prompts"
    ours, logprobs = drawn(emulated(model), tokens, 8)
    assert ours == chosen
    expected = [wide.log_softmax(-1).amax(-1).tolist() for wide in logits[1:]]
    assert torch.allclose(torch.tensor(logprobs), torch.tensor(expected), atol=0.02)


@torch.inference_mode()
def test_tokens_are_drawn_at_a_temperature() -> None:
    model, tokens = emulated(quantized()), ids(3, 8)
    temperatures, uniform = [0.8, 0.0, 1.3], [0.31, 0.5, 0.77]
    cache = cache_of(model, 3)
    model.prefill(model.embed_text(tokens), cache, 0)
    logits = model.decode(torch.tensor([[4], [5], [6]]), cache)[:, -1]
    cache.truncate([8, 8, 8])
    found, logprobs = model.draw([4, 5, 6], cache, temperatures, uniform)
    expected, exact = ref.sample(logits, torch.tensor(temperatures), torch.tensor(uniform))
    assert found == expected.tolist()
    assert torch.allclose(torch.tensor(logprobs), exact, atol=0.01)


def test_a_step_is_gone_on_with_or_begun_anew() -> None:
    """Tokens and positions that the device holds are not given again; others are."""
    model, tokens = emulated(quantized()), ids(2, 6)
    with torch.inference_mode():
        cache = cache_of(model, 2)
        model.prefill(model.embed_text(tokens), cache, 0)
        first = model.draw([1, 2], cache, [0.0, 0.0], [0.0, 0.0])
        second = model.draw(first[0], cache, [0.0, 0.0], [0.0, 0.0])
        cache.truncate([6, 6])
        again = model.draw([1, 2], cache, [0.0, 0.0], [0.0, 0.0])
        assert again == first and model.draw(again[0], cache, [0.0, 0.0], [0.0, 0.0]) == second
        swapped = cache.select([1, 0])
        swapped.truncate([6, 6])
        assert [part[::-1] for part in model.draw([2, 1], swapped, [0.0, 0.0], [0.0, 0.0])] == list(first)


def test_a_longer_context_begins_anew() -> None:
    model, tokens = emulated(quantized()), ids(1, 6)
    with torch.inference_mode():
        found = []
        for capacity in (16, 64):
            cache = cache_of(model, 1, capacity)
            model.prefill(model.embed_text(tokens), cache, 0)
            found.append([model.draw([3], cache, [0.7], [0.4]), model.draw([5], cache, [0.0], [0.4])])
    assert found[0][0][0] == found[1][0][0] and found[0][1][0] == found[1][1][0]
    assert torch.allclose(torch.tensor(found[0][0][1]), torch.tensor(found[1][0][1]), atol=1e-3)


def test_weights_are_shared_with_the_modules() -> None:
    plain = quantized()
    model, before = emulated(plain), plain.state_dict()
    attention = model.llm.model.layers[0].self_attn
    held = [attention.q_proj.packed, attention.k_proj.packed, attention.v_proj.packed]
    assert all(isinstance(one, cuda_layout.Packed) for one in held)
    assert len({one.words.untyped_storage().data_ptr() for one in held}) == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    again = copy.deepcopy(model)
    assert not any(module.prepared for module in again.modules() if isinstance(module, QuantLinear))


def test_what_stands_in_the_way_is_named() -> None:
    def said(**changes: Any) -> str | None:
        model = prepared(quantized())
        return cuda_decoder.obstacle(model.llm, dataclasses.replace(model.llm.config, **changes))

    assert said() is None
    assert said(hidden_act="gelu") == "its activation is gelu"
    rope = dataclasses.replace(quantized().llm.config.rope, type="dynamic")
    assert said(rope=rope) == "its rotary angles grow with the length"
    model = quantized()
    assert "4-bit ones that the CUDA kernels hold" in str(cuda_decoder.obstacle(model.llm, model.llm.config))
    model = prepared(quantized())
    model.llm.model.layers[0].register_forward_hook(lambda *args: None)
    assert cuda_decoder.obstacle(model.llm, model.llm.config) == "hooks watch its modules"


def test_tokens_and_sizes_are_checked() -> None:
    model = emulated(quantized())
    with pytest.raises(KernelError, match="a token is none of the 99 that there are"), torch.inference_mode():
        model.decode(torch.tensor([[99]]), cache_of(model, 1))
    with pytest.raises(KernelError, match="cache holds torch.float32, the CUDA kernels read torch.float16 and int8"):
        model.decode(torch.tensor([[9]]), cache_of(model, 1, dtype=torch.float32))
    decoder = model._one_call
    assert isinstance(decoder, CudaDecoder)
    weights = decoder.kernel.weights
    with pytest.raises(KernelError, match="heads of 48 channels: the CUDA kernels take 32, 64"):
        check(dataclasses.replace(weights, heads=dataclasses.replace(weights.heads, dim=48)))
    with pytest.raises(KernelError, match="tensors are bfloat16, float16; all are to be float16, or all bfloat16"):
        check(dataclasses.replace(weights, norm=weights.norm.bfloat16()))


def test_a_decoder_is_made_anew_where_its_modules_change() -> None:
    model = emulated(quantized())
    decoder = model._one_call
    assert isinstance(decoder, CudaDecoder) and decoder.is_current()
    model.llm.model.norm.weight = nn.Parameter(torch.ones(128).half())
    assert not decoder.is_current()


class FakeGpu:
    """The emulator as a device, without what was found before."""

    index, processors = 0, 2

    def __init__(self, spoilt: str = "") -> None:
        self.spoilt = spoilt  # an entry that computes nothing

    def __call__(self, unit: str, entry: str, *rest: Any) -> None:
        if not self.spoilt or self.spoilt not in entry:
            Emulator().launch(unit, entry, *rest)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What is checked -> what is wrong with it."""
    found: dict[str, str | None] = {}

    def passed(device: FakeGpu, name: str, wrong: Callable[[], str | None]) -> bool:
        return found.setdefault(name, wrong()) is None

    monkeypatch.setattr(cuda_checks, "passed", passed)
    monkeypatch.setattr(kernels, "CHECKED_OPS", ("norm", "sample"))
    return found


def weights_of(model: VilaLlamaForCausalLM) -> kernels.Weights:
    decoder = emulated(model, head=True)._one_call
    assert isinstance(decoder, CudaDecoder)
    return decoder.kernel.weights


def test_every_kernel_of_a_decoder_is_checked_once(checks: dict[str, str | None]) -> None:
    kernels.examine(FakeGpu(), weights_of(quantized()))  # type: ignore[arg-type]
    assert list(checks)[:2] == ["norm float16", "sample float16"] and not any(checks.values())
    sizes = {name.partition(" bits ")[2] for name in checks if " bits " in name}
    assert sizes == {f"{n} g32 float16 float16" for n in ("128x256", "128x128", "128x320", "160x128")} | {
        "128x99 g128 float16 float16"
    }
    assert {name.partition(" bits ")[0] for name in checks if name.endswith("x320 g32 float16 float16")} == {
        *(f"{kind} 4" for kind in ("gemv m1", "gemv m8", "gemm r16", "gemm r32", "gemm r64", "gemm r128", "dequantize"))
    }


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is joined, by its outputs; the model's device is taken for a GPU."""
    found: list[int] = []
    join = cuda.join

    def counting(parts: list[cuda_layout.Packed]) -> cuda_layout.Packed:
        found.append(sum(part.outputs for part in parts))
        return join(parts)

    monkeypatch.setattr(cuda, "join", counting)
    monkeypatch.setattr(VilaLlamaForCausalLM, "device", torch.device("cuda", 0))
    return found


def test_a_refused_decoder_is_not_joined_and_asked_again_only_when_parts_change(
    checks: dict[str, str | None], joins: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared(quantized())
    before = _packed(model)
    monkeypatch.setattr(cuda_gpu, "gpu", lambda index: FakeGpu("add_rms_norm"))
    assert model.one_call is None and "norm float16 is wrong on this GPU" in str(model.obstacle)
    assert joins == [256, 320]  # of one layer of two
    assert all(one is was for one, was in zip(_packed(model), before, strict=True))
    assert model.one_call is None and model.obstacle is not None and len(joins) == 2
    model.llm.model.norm.weight = nn.Parameter(torch.ones(128).half())
    assert model.one_call is None and len(joins) == 4
    model.llm.model.norm.register_forward_hook(lambda *args: None)
    assert model.one_call is None and model.obstacle == "hooks watch its modules" and len(joins) == 4


def _packed(model: VilaLlamaForCausalLM) -> list[object]:
    return [one.packed for one in model.llm.modules() if isinstance(one, QuantLinear)]


def test_a_decoder_that_passes_is_taken(
    checks: dict[str, str | None], joins: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared(quantized())
    monkeypatch.setattr(cuda_gpu, "gpu", lambda index: FakeGpu())
    assert isinstance(model.one_call, CudaDecoder) and model.one_call is model.one_call and model.obstacle is None
    assert joins == [256, 320] * 3


def test_steps_go_with_the_cache_that_they_read() -> None:
    """Before the next one is made: there may be no room for two."""
    model = emulated(quantized())
    with torch.inference_mode():
        cache = cache_of(model, 1)
        model.prefill(model.embed_text(ids(1, 6)), cache, 0)
        model.draw([3], cache, [0.0], [0.0])
        keys = weakref.ref(cache.pool.layers[0][0])
        decoder = model._one_call
        assert isinstance(decoder, CudaDecoder) and decoder._steps and keys() is not None
        del cache
        gc.collect()
        assert not decoder._steps and keys() is None


def test_an_op_that_does_not_run_is_no_result_for_the_file() -> None:
    class NoCompiler(FakeGpu):
        def __call__(self, unit: str, entry: str, *rest: Any) -> None:
            raise KernelError("no compiler at all")

    with pytest.raises(KernelError, match="no compiler at all"):
        kernels._wrong(NoCompiler(), "norm", torch.zeros(1).half())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [("add_rms_norm", "norm float16 is wrong on this GPU"), ("_r32", "a linear of 128x256 is wrong on this GPU")],
)
def test_a_decoder_with_a_wrong_kernel_is_not_run(checks: dict[str, str | None], spoilt: str, said: str) -> None:
    warned = pytest.warns(UserWarning, match="runs on plain torch") if spoilt == "_r32" else contextlib.nullcontext()
    with pytest.raises(KernelError, match=said), warned:
        kernels.examine(FakeGpu(spoilt), weights_of(quantized()))  # type: ignore[arg-type]
