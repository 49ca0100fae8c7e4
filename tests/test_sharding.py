"""A model that several ranks share, against transformers' own classes and against the model on one rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.tiny import IMAGE_ID, TEXT, ids, llava_pair, pixels, text_pair
from rank_pool import Rank, RankPool
from same import assert_close, assert_same
from torch import Tensor
from transformers import LlamaConfig

from make_tiny_model import make_tiny_model
from tinychat import load
from tinychat.config import TextConfig
from tinychat.errors import ModelError
from tinychat.layers.parallel import ALONE, Group
from tinychat.load import open_source
from tinychat.models.shares import Share, cuts, misfit
from tinychat.models.vila_fusion import IMAGE_TOKEN_INDEX
from tinychat.placement import Placement
from tinychat_kernels import registry
from tinychat_kernels.layout import AwqGemm, QuantSpec, to_logical

SIZES = (2, 4)
FLOATS = {"kv_cache_dtype": "float"}
PACKED: dict[str, dict[str, Any]] = {
    "rounded": {},
    "exact": {"exact": True, "head": "float"},
    "floats": {"dequantize": True},
}


def read(group: Group, folder: Path, tokens: Tensor, images: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The logits after every token, read in two pieces, and of three tokens that are decoded one by one."""
    source = open_source(folder, group)
    model = load.assemble(source, Placement(device="cpu", **{"dtype": "float32", **options}))
    with torch.inference_mode():
        whole = model(input_ids=tokens, images=images).logits
        embeds = model(input_ids=tokens, images=images, output_hidden_states=True).hidden_states[0]
        cache = model.make_cache(len(tokens), 64)
        first = model.verify(embeds[:, :5], cache)
        rest = model.verify(embeds[:, 5:], cache)
        more = [rest[:, -1:]]
        for _ in range(3):
            more.append(model.decode(more[-1].argmax(-1), cache))
    if options != PACKED["rounded"]:
        assert_same(torch.cat((first, rest), 1), whole)
    return torch.cat((whole, *more[1:]), 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "intermediate_size": 98}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 2}),
    ],
)
def test_shared_decoders_equal_transformers(
    ranks: RankPool, tmp_path: Path, size: int, family: str, changes: dict[str, Any]
) -> None:
    theirs, _ = text_pair(family, **changes)
    theirs.save_pretrained(tmp_path)
    tokens = ids(2, 24)
    with torch.no_grad():
        wanted = theirs(input_ids=tokens).logits
    found = ranks.run(size, read, tmp_path, tokens, None, FLOATS)
    for one in found:
        assert_close(one[:, :24], wanted)
        assert torch.equal(one, found[0])


@pytest.mark.parametrize("size", SIZES)
def test_a_shared_llava_equals_transformers(ranks: RankPool, tmp_path: Path, size: int) -> None:
    theirs, ours = llava_pair()
    theirs.save_pretrained(tmp_path)
    prompt = torch.cat((ids(1, 4), torch.tensor([[IMAGE_TOKEN_INDEX]]), ids(1, 9, seed=1)), 1)
    wide = torch.cat((prompt[:, :4], torch.full((1, ours.config.tokens_per_image), IMAGE_ID), prompt[:, 5:]), 1)
    with torch.no_grad():
        wanted = theirs(input_ids=wide, pixel_values=pixels(1)).logits
    for one in ranks.run(size, read, tmp_path, prompt, pixels(1), FLOATS):
        assert_close(one[:, : wanted.shape[1]], wanted)


def loaded(group: Group, folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return load.load_model(folder, dtype="float32", device="cpu", group=group)(input_ids=tokens).logits


def test_a_script_of_ones_own_may_share_a_model(ranks: RankPool, tmp_path: Path) -> None:
    theirs, _ = text_pair("llama")
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = theirs(input_ids=ids(1, 9)).logits
    for found in ranks.run(2, loaded, tmp_path, ids(1, 9)):
        assert_close(found, wanted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("options", PACKED)
def test_shared_4_bit_models_equal_whole_ones(
    ranks: RankPool, tmp_path: Path, size: int, group: int, options: str
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 640, "heads": 8, "kv_heads": 2}
    folder = make_tiny_model(tmp_path / "model", quantize=group, dtype="float16", **sizes)
    source = open_source(folder)
    assert source.config.vision is not None
    side = source.config.vision.image_size
    picture = torch.randn((1, 3, side, side), generator=torch.Generator().manual_seed(0))
    prompt = torch.cat((ids(1, 4), torch.tensor([[IMAGE_TOKEN_INDEX]]), ids(1, 9, seed=1)), 1)
    one = read(ALONE, folder, prompt, picture, PACKED[options])
    shared = ranks.run(size, read, folder, prompt, picture, PACKED[options])
    if options != "rounded":
        assert_same(shared[-1], one)
        return
    exact = read(ALONE, folder, prompt, picture, PACKED["exact"])  # rounding to 8 bits costs no more than on one rank
    assert float((shared[-1] - exact).norm()) < 1.25 * float((one - exact).norm())


def read_kept(group: Group, folder: Path, tokens: Tensor, cache: Path) -> tuple[Tensor, int]:
    """The logits of a model whose packed weights are kept in a folder, and how many files are there then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYCHAT_CACHE", str(cache))
        patch.setattr("tinychat.packing.KEPT_FROM", 0)
        logits = read(group, folder, tokens, None, {})
    return logits, len(list((cache / "packed").glob("*.bin")))


@pytest.mark.skipif(registry.chosen().name != "cpu", reason="needs the CPU kernels")
def test_each_rank_keeps_its_own_packed_weights(ranks: RankPool, tmp_path: Path) -> None:
    cache, kernels = tmp_path / "cache", Path(os.environ["TINYCHAT_CACHE"], "kernels")
    cache.mkdir()
    (cache / "kernels").symlink_to(kernels.resolve())
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "heads": 4, "kv_heads": 2}
    folder = make_tiny_model(tmp_path / "model", quantize=64, dtype="float16", layout="text", **sizes)
    tokens = ids(1, 9)
    wanted = ranks.run(2, read, folder, tokens, None, {})[0]
    first, again = (ranks.run(2, read_kept, folder, tokens, cache) for _ in range(2))
    for logits, _ in (*first, *again):
        assert torch.equal(logits, wanted)
    assert max(count for _, count in again) == 2


@pytest.mark.parametrize("size", [2, 4])
def test_packed_parts_are_parts_of_the_whole_bit_for_bit(tmp_path: Path, size: int) -> None:
    folder = make_tiny_model(tmp_path, quantize=128, hidden_size=256, intermediate_size=640, heads=4, kv_heads=2)
    whole = open_source(folder)
    assert whole.spec is not None
    for rank in range(size):
        source = open_source(folder, Rank(rank, size))
        assert source.spec is not None
        assert source.share is not None
        head = whole.config.text.head_dim
        heads = range(source.share.heads.start * head, source.share.heads.stop * head)
        kv = [line for one in source.share.kv_heads for line in range(one * head, one * head + head)]
        for name, inputs, outputs in (
            ("self_attn.q_proj", range(256), heads),
            ("self_attn.k_proj", range(256), kv),
            ("self_attn.o_proj", heads, range(256)),
            ("mlp.gate_proj", range(256), source.share.inner),
            ("mlp.down_proj", source.share.inner, range(256)),
        ):
            stem = f"llm.model.layers.1.{name}"
            part = weights(source.index, stem, source.spec)
            assert torch.equal(part, weights(whole.index, stem, whole.spec)[list(inputs)][:, list(outputs)])


def weights(index: Any, stem: str, spec: QuantSpec) -> Tensor:
    """(q - zero) * scale `[K, N]`."""
    q, scale, zero = to_logical(AwqGemm(*(index.get(f"{stem}.{end}") for end in AwqGemm._fields)), spec)
    count = len(q) // len(scale)
    return (q.float() - zero.float().repeat_interleave(count, 0)) * scale.repeat_interleave(count, 0)


def test_groups_get_smaller_where_heads_end_inside_one(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, quantize=128, hidden_size=256, intermediate_size=640, heads=4, kv_heads=2)
    groups = [source.spec.group_size for n in (1, 2, 4) if (source := open_source(folder, Rank(0, n))).spec]
    assert groups == [128, 128, 64]


def test_heads_that_end_inside_the_smallest_group_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, quantize=128, hidden_size=128, intermediate_size=256, heads=8, kv_heads=8)
    with pytest.raises(ModelError, match="8 ranks would cut inside the groups of 128 weights that share a scale"):
        open_source(folder, Rank(0, 8))


def test_ranks_that_do_not_divide_the_heads_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    words = r"3 ranks cannot share this model: its 4 attention heads do not divide by 3; take 1, 2 or 4"
    with pytest.raises(ModelError, match=words):
        open_source(folder, Rank(0, 3))
    with pytest.raises(ModelError, match="8 ranks cannot share this model: it has 4 attention heads"):
        open_source(folder, Rank(0, 8))


def test_a_tower_that_the_ranks_do_not_divide_is_whole_on_each(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)  # its tower has two heads
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert open_source(folder, Rank(0, 4)).index.shape(name) == open_source(folder).index.shape(name)
    assert open_source(folder, Rank(0, 2)).index.shape(name)[0] * 2 == open_source(folder).index.shape(name)[0]


@given(length=st.integers(1, 500), size=st.integers(1, 9), unit=st.sampled_from([1, 8, 32]))
def test_cuts_cover_everything_once_in_whole_units(length: int, size: int, unit: int) -> None:
    found = cuts(length, size, unit)
    assert [i for part in found for i in part] == list(range(length))
    assert all(part.start % unit == 0 for part in found if len(part))
    units = [-(-len(part) // unit) for part in found]
    assert max(units) - min(units) <= 1


@given(kv_heads=st.integers(1, 8), queries=st.integers(1, 8), data=st.data())
def test_every_query_head_finds_its_keys(kv_heads: int, queries: int, data: st.DataObject) -> None:
    heads = kv_heads * queries
    size = data.draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    changes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 4, "hidden_size": 4 * heads}
    config = TextConfig.of(LlamaConfig(**{**TEXT, **changes}))
    assert misfit(config, size) is None
    seen: list[int] = []
    for rank in range(size):
        share = Share.of(config, Rank(rank, size))
        each = share.config.num_attention_heads // share.config.num_key_value_heads
        assert len(share.kv_heads) * each == len(share.heads)
        assert [share.kv_heads[i // each] for i in range(len(share.heads))] == [head // queries for head in share.heads]
        seen += share.heads
    assert seen == list(range(heads))
