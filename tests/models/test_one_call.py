"""Prefill, decode and verify by the CPU decoder's one call against the modules, and when it is taken."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models.tiny import ids, text_pair
from torch import Tensor, nn

from tinychat.layers import cpu_decoder
from tinychat.layers.kv_cache import KVCache, KVPool
from tinychat.layers.linear import QuantLinear
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat_kernels import cpu
from tinychat_kernels.layout import QuantSpec

available, reason = cpu.available()
pytestmark = pytest.mark.skipif(not available, reason=reason)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
}
CLOSE = 1e-3  # relative, of float activations; the bound


def quantized(family: str = "llama", *, exact: bool = False, **changes: Any) -> VilaLlamaForCausalLM:
    """A tiny model whose decoder's linears are 4-bit ones that the CPU kernels hold."""
    name, config = FAMILIES[family]
    _, model = text_pair(name, **{**config, **changes})
    for part, module in list(model.llm.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            linear = QuantLinear.from_linear(module, QuantSpec(4, 32))
            linear.prepare(exact=exact)
            model.llm.model.layers.set_submodule(part, linear)
    return model


class ByModules:
    """The same model, asked for what its modules give."""

    def __init__(self, model: VilaLlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        self.patch = monkeypatch

    def answers(self, tokens: Tensor, steps: Tensor) -> list[Tensor]:
        with self.patch.context() as patch:
            patch.setattr(cpu_decoder.CpuDecoder, "of", classmethod(lambda cls, llm, config: None))
            self.model._one_call = None
            return answers(self.model, tokens, steps)


def answers(model: VilaLlamaForCausalLM, tokens: Tensor, steps: Tensor) -> list[Tensor]:
    """Logits after a prompt `[B, T]`, after one more token a row, and after each of some more; the cache has the
    model's dtype."""
    capacity = tokens.shape[1] + steps.shape[1]
    with torch.inference_mode():
        cache = KVPool(model.llm.config, len(tokens), capacity, model.dtype).take(len(tokens))
        first = model.prefill(model.embed_text(tokens), cache, 0, chunk=9)
        return [first, model.decode(steps[:, :1], cache), model.verify(steps[:, 1:], cache)]


def in_one_call(model: VilaLlamaForCausalLM) -> bool:
    return model._one_call is not None


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_float_activations_as_the_modules(family: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    model = quantized(family, exact=True)
    tokens, steps = ids(rows, 40), ids(rows, 5, seed=1)
    ours = answers(model, tokens, steps)
    assert in_one_call(model)
    theirs = ByModules(model, monkeypatch).answers(tokens, steps)
    assert not in_one_call(model)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype == torch.float32
        assert relative(one, other) < CLOSE / 100


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_int8_activations_as_the_modules(family: str, monkeypatch: pytest.MonkeyPatch):
    """The modules round the same values, but for a last bit here and there that moves one to the next integer."""
    model = quantized(family)
    tokens, steps = ids(2, 12), ids(2, 3, seed=1)
    ours = answers(model, tokens, steps)
    assert in_one_call(model)
    theirs = ByModules(model, monkeypatch).answers(tokens, steps)
    assert max(relative(*pair) for pair in zip(ours, theirs, strict=True)) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    model = quantized(exact=True)
    wide = answers(model, ids(1, 20), ids(1, 3, seed=1))
    model = quantized(exact=True).to(dtype)
    for module in model.llm.model.layers.modules():
        if isinstance(module, QuantLinear):
            module.prepare(exact=True)
    ours = answers(model, ids(1, 20), ids(1, 3, seed=1))
    assert in_one_call(model)
    theirs = ByModules(model, monkeypatch).answers(ids(1, 20), ids(1, 3, seed=1))
    for one, other, exact in zip(ours, theirs, wide, strict=True):
        assert one.dtype == torch.float32
        assert relative(one, exact) < 2 * relative(other.float(), exact)


def test_chunks_and_rows_do_not_change_a_bit():
    model, tokens = quantized("mistral"), ids(3, 50)
    with torch.inference_mode():
        embeds = model.embed_text(tokens)
        whole = model.prefill(embeds, model.make_cache(3, 50), 0)
        for chunk in (1, 7, 49):
            assert torch.equal(model.prefill(embeds, model.make_cache(3, 50), 0, chunk=chunk), whole)
        for row in range(3):
            assert torch.equal(model.prefill(embeds[row : row + 1], model.make_cache(1, 50), 0), whole[row : row + 1])
        cache = model.make_cache(3, 50)
        every = model.verify(tokens, cache)
        assert torch.equal(every[:, -1:], whole)
        cache = model.make_cache(3, 50)
        single = [model.decode(tokens[:, t : t + 1], cache) for t in range(50)]
        assert torch.equal(torch.cat(single, 1), every)
    assert in_one_call(model)


def test_ragged_rows_of_a_pool_do_not_change_a_bit():
    """Rows that were filled alone, joined in another order, then one filtered out."""
    model, lengths = quantized(), [3, 30, 11]
    prompts = [ids(1, n, seed=n) for n in lengths]
    steps = ids(3, 4, seed=9)
    with torch.inference_mode():
        alone = []
        for row, prompt in enumerate(prompts):
            cache = model.make_cache(1, 60)
            model.prefill(model.embed_text(prompt), cache, 0)
            alone.append([model.decode(steps[row : row + 1, t : t + 1], cache) for t in range(4)])
        pool = KVPool(model.llm.config, 4, 60, model.make_cache().layer(0).k.dtype)
        caches = [pool.take(1) for _ in prompts]
        for prompt, cache in zip(prompts, caches, strict=True):
            model.prefill(model.embed_text(prompt), cache, 0)
        order = [2, 0, 1]
        joined = KVCache.cat([caches[i] for i in order])
        for t in range(4):
            out = model.decode(steps[order, t : t + 1], joined)
            assert torch.equal(out, torch.cat([alone[i][t] for i in order]))
            if t == 1:
                order, joined = [order[0], order[2]], joined.select([0, 2])


def test_the_cache_is_in_half_precision_where_activations_are_rounded(monkeypatch: pytest.MonkeyPatch):
    """The modules read it too: an answer may go on by them."""
    model, tokens, steps = quantized(), ids(2, 20), ids(2, 2, seed=1)
    assert quantized(exact=True).make_cache().layer(0).k.dtype == torch.float32
    assert text_pair("llama")[1].make_cache().layer(0).k.dtype == torch.float32
    with torch.inference_mode():
        cache = model.make_cache(2, 30)
        assert cache.layer(0).k.dtype == torch.float16
        model.prefill(model.embed_text(tokens), cache, 0)
        ours = model.decode(steps[:, :1], cache)
        cache.truncate(20)
        monkeypatch.setattr(cpu_decoder.CpuDecoder, "of", classmethod(lambda cls, llm, config: None))
        model._one_call = None
        assert relative(model.decode(steps[:, :1], cache), ours) < 5e-3


def test_a_cache_of_int8_is_read_and_written_by_modules_and_kernels_alike(monkeypatch: pytest.MonkeyPatch):
    model, tokens, steps = quantized(exact=True), ids(2, 20), ids(2, 2, seed=1)
    floats = answers(model, tokens, steps)
    model.kv_dtype = torch.int8
    found = []
    with torch.inference_mode():
        for in_modules in (False, True):
            if in_modules:
                monkeypatch.setattr(cpu_decoder.CpuDecoder, "of", classmethod(lambda cls, llm, config: None))
                model._one_call = None
            cache = model.make_cache(2, 30)
            first = model.prefill(model.embed_text(tokens), cache, 0)
            found.append((first, model.decode(steps[:, :1], cache), cache))
        (first, second, ours), (other, more, theirs) = found
        assert relative(first, other) < 1e-3 and relative(second, more) < 1e-3
        assert 1e-4 < relative(second, floats[1]) < 2e-2
        for held, kept in zip(ours.layer(0)[:2], theirs.layer(0)[:2], strict=True):
            assert held.dtype == torch.int8
            assert (held != kept).float().mean() < 0.01
        ours.truncate(20)
        assert relative(model.decode(steps[:, :1], ours), second) < 1e-3


def test_the_weights_are_not_held_twice():
    model = quantized()
    answers(model, ids(1, 4), ids(1, 3))
    attention = model.llm.model.layers[0].self_attn
    q, k, v = (part.packed.blocks for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert k.data_ptr() == q.data_ptr() + q.numel()


def test_the_layers_still_compute_and_give_their_weights_back():
    model, tokens = quantized(exact=True), ids(1, 6)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
        answers(model, tokens, ids(1, 3))
        assert in_one_call(model)
        assert torch.equal(model(input_ids=tokens).logits, expected)
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())


def test_copies_and_pickles_leave_the_call_behind():
    model, tokens, steps = quantized(), ids(1, 6), ids(1, 3)
    expected = answers(model, tokens, steps)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert not in_one_call(other)
        answers(other, tokens, steps)
    assert all(torch.equal(a, b) for a, b in zip(answers(model, tokens, steps), expected, strict=True))


def unprepare(model: VilaLlamaForCausalLM) -> None:
    model.llm.model.layers[1].mlp.up_proj.restore()


def watch(model: VilaLlamaForCausalLM) -> None:
    model.llm.model.layers[0].mlp.register_forward_hook(lambda module, given, out: None)


def mix(model: VilaLlamaForCausalLM) -> None:
    model.llm.model.layers[0].mlp.up_proj.exact = True


def special_head(model: VilaLlamaForCausalLM) -> None:
    model.llm.lm_head = nn.Sequential(model.llm.lm_head)  # type: ignore[assignment]


def in_double(model: VilaLlamaForCausalLM) -> None:
    model.llm.model.embed_tokens.double()


def as_float(model: VilaLlamaForCausalLM) -> None:
    layer = model.llm.model.layers[0].self_attn
    layer.q_proj = layer.q_proj.to_linear(torch.float32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (unprepare, "its linears are not 4-bit ones"),
        (as_float, "its linears are not 4-bit ones"),
        (watch, "hooks watch its modules"),
        (mix, "some of its linears are exact"),
        (special_head, "its head is none"),
        (in_double, "its embeddings are none"),
    ],
)
def test_what_stands_in_the_way(change: Any, says: str):
    """Before the first prefill, and after one."""
    for used in (False, True):
        model = quantized()
        if used:
            answers(model, ids(1, 4), ids(1, 3))
            assert in_one_call(model)
        change(model)
        assert says in str(cpu_decoder.obstacle(model.llm, model.llm.config))
        if change not in (special_head, in_double):
            answers(model, ids(1, 4), ids(1, 3))
            assert not in_one_call(model) and says in str(model.obstacle)


def test_another_activation_stays_with_the_modules():
    model = quantized(hidden_act="gelu")
    assert cpu_decoder.obstacle(model.llm, model.llm.config) == "its activation is gelu"


def test_sizes_that_the_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch):
    model = quantized(head_dim=8, num_key_value_heads=4)
    answers(model, ids(1, 4), ids(1, 3))
    assert not in_one_call(model) and "heads of 8 channels: multiples of" in str(model.obstacle)


def test_new_weights_are_seen():
    model, tokens, steps = quantized(exact=True), ids(1, 6), ids(1, 3)
    old = answers(model, tokens, steps)
    layer = model.llm.model.layers[1].mlp
    other = QuantLinear.from_linear(
        nn.Linear(layer.up_proj.in_features, layer.up_proj.out_features), layer.up_proj.spec
    )
    other.bias = None
    other.prepare(exact=True)
    layer.up_proj = other
    new = answers(model, tokens, steps)
    assert in_one_call(model) and model.obstacle is None
    assert relative(new[0], old[0]) > 1e-3


def test_a_larger_vocabulary_is_seen():
    model = quantized()
    answers(model, ids(1, 4), ids(1, 3))
    model.resize_token_embeddings(120)
    assert answers(model, ids(1, 4), ids(1, 3))[0].shape[-1] == 120


def test_a_full_cache_is_refused():
    from tinychat.errors import CapacityError

    model = quantized()
    with torch.inference_mode():
        cache = model.make_cache(1, 8)
        model.prefill(model.embed_text(ids(1, 8)), cache, 0)
        with pytest.raises(CapacityError, match="9 tokens of context are needed, the cache holds 8"):
            model.decode(ids(1, 1), cache)
        assert cache.lengths == [8]
