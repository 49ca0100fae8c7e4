"""The memory plan: its figures against tensors that were really made, its sentences by their text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from make_tiny_model import make_tiny_model
from tinychat import planner
from tinychat.config import VilaConfig
from tinychat.errors import CapacityError
from tinychat.layers.kv_cache import KVPool
from tinychat.load import Placement, load_model, open_source, plan
from tinychat.planner import Need, Plan, free_bytes, kv_bytes, weights_bytes

LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
GIB = 2**30
FLOAT16 = int(12.6 * GIB)  # of a Llama of 7 billion weights


def config(**changes: object) -> VilaConfig:
    return VilaConfig(
        llm_cfg={**LLAMA_7B, **changes},
        vision_tower_cfg=CLIP_L,
        mm_projector_cfg={"mm_projector_type": "mlp2x_gelu"},
    )


def check(config: VilaConfig, context: int, *, free: int, **need: Any) -> Plan:
    return planner.check(Need(config, **need), context, free)


@pytest.mark.parametrize("layout", ["vila", "llava", "llava_hf", "text"])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_those_of_the_loaded_model(tmp_path, layout, group, dtype):
    folder = make_tiny_model(tmp_path, layout, quantize=group)
    model = load_model(folder, dtype=dtype, device="cpu")
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert weights_bytes(open_source(folder).index, dtype) == held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_kv_is_that_of_a_pool(tmp_path, dtype):
    text = open_source(make_tiny_model(tmp_path, "text")).config.text
    pool = KVPool(text, 1, 96, dtype)
    assert kv_bytes(text, dtype) * 96 == sum(part.nbytes for layer in pool.layers for part in layer)


def test_a_seven_billion_llama_in_sixteen_bit():
    found = check(config(), 4096, weights=FLOAT16, dtype=torch.float16, free=20 * GIB)
    assert found.kv == 2 * GIB
    assert found.fits
    assert 15 * GIB < found.total < 16.5 * GIB
    assert found.sentence == (
        f"{found.total / GIB:.1f} GiB are needed (weights 12.6, 4096 tokens of context 2.0, work space "
        f"{(found.total - found.weights - found.kv) / GIB:.1f}), 20.0 GiB are free"
    )


def refusal(free: float, context: int = 4096, dtype: torch.dtype = torch.float16, **more: object) -> str:
    held = FLOAT16 * dtype.itemsize // 2
    with pytest.raises(CapacityError) as caught:
        check(config(), context, **{"weights": held, "dtype": dtype, "free": int(free * GIB), **more})
    assert caught.value.exit_code == 5
    return str(caught.value)


def test_a_shorter_context_is_suggested_and_fits():
    text = refusal(14.5)
    assert re.search(r"15\.\d GiB are needed \(weights 12\.6, .*\), 14\.5 GiB are free; try --context \d+$", text)
    shorter = int(text.rsplit(maxsplit=1)[1])
    assert check(config(), shorter, weights=FLOAT16, dtype=torch.float16, free=int(14.5 * GIB)).fits
    assert shorter >= 1024


@given(free=st.floats(13, 40), context=st.integers(1, 32768), heads=st.sampled_from([4, 8, 32]))
def test_what_is_suggested_fits(free, context, heads):
    room = {"weights": FLOAT16, "dtype": torch.float16, "free": int(free * GIB)}
    narrow = config(num_key_value_heads=heads)
    try:
        assert check(narrow, context, **room).fits
    except CapacityError as error:
        if error.remedy.startswith("try --context"):
            shorter = int(error.remedy.split()[-1])
            assert shorter < context
            assert check(narrow, shorter, **room).fits


def test_the_mask_of_a_chunk_is_counted_in_what_is_suggested():
    """A short context of a small model: what grows with the context is the mask, not the keys and values."""
    small = config(num_hidden_layers=1, num_key_value_heads=1, hidden_size=64, intermediate_size=64, vocab_size=100)
    room = {"weights": 2**20, "dtype": torch.float32, "free": GIB}
    with pytest.raises(CapacityError, match=r"100000000 tokens of context .*; try --context \d+$") as caught:
        check(small, 10**8, **room)
    longest = int(caught.value.remedy.split()[-1])
    assert longest > 4096
    assert check(small, longest, **room).fits
    with pytest.raises(CapacityError):
        check(small, longest + planner.STEP, **room)


def test_a_smaller_chunk_takes_less():
    room = {"weights": FLOAT16, "dtype": torch.float16, "free": 40 * GIB}
    whole, small = (check(config(), 4096, chunk=chunk, **room).activations for chunk in (512, 64))
    assert 7 * small < whole <= 8 * small


def test_smaller_weights_are_suggested_where_no_context_fits():
    assert refusal(8).endswith(
        "take a 4-bit checkpoint of this model, whose weights take about 3.3 GiB, or free memory"
    )
    assert refusal(16, dtype=torch.float32).endswith("try --dtype bf16, where the weights take 12.6 GiB")
    assert re.search(r"; try --dtype bf16 --context \d+$", refusal(14.5, dtype=torch.float32))
    assert "--dtype" not in refusal(8, dtype=torch.float32)
    halved = refusal(14.5, dtype=torch.float32, kv_dtype=torch.float16)
    assert re.search(r"4096 tokens of context 2\.0, .*; try --dtype bf16 --context \d+$", halved)
    assert refusal(8, quantized=True).endswith("; free memory, or take a smaller model")


def test_a_cuda_context_is_counted():
    room = {"weights": FLOAT16, "dtype": torch.float16, "free": 40 * GIB}
    on_cuda, on_cpu = (check(config(), 512, device=torch.device(device), **room) for device in ("cuda", "cpu"))
    assert on_cuda.margin - on_cpu.margin == planner.CUDA_CONTEXT - planner.CPU_WORKSPACE


def test_small_figures_are_not_rounded_to_nothing(tmp_path):
    source = open_source(make_tiny_model(tmp_path, "vila"))
    found = plan(source, 512, Placement(device="cpu"))
    assert "0.0 " not in found.sentence
    assert found.fits


def test_plan_of_a_folder_raises_before_loading(tmp_path, monkeypatch):
    source = open_source(make_tiny_model(tmp_path, "vila"))
    monkeypatch.setattr(planner, "free_bytes", lambda device: 2**20)
    with pytest.raises(CapacityError, match=r"GiB are needed \(weights 0\.001, 512 tokens of context "):
        plan(source, 512, Placement(device="cpu"))


# what is free


def room(root: Path, groups: str, files: dict[str, str]) -> list[int]:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return planner._container_room(root, groups)


def test_limits_of_containers(tmp_path):
    assert room(tmp_path / "none", "", {}) == []
    assert room(tmp_path / "bare", "0::/\n", {}) == []
    stat = "anon 1\ninactive_file 500\n"
    v2 = {"memory.max": "4000\n", "memory.current": "3000\n", "memory.stat": stat}
    assert room(tmp_path / "v2", "0::/\n", v2) == [1500]
    assert room(tmp_path / "unlimited", "0::/\n", {**v2, "memory.max": "max\n"}) == []
    assert room(tmp_path / "over", "0::/\n", {"memory.max": "10", "memory.current": "30"}) == [0]


def test_limits_of_the_groups_around_a_group(tmp_path):
    files = {
        "memory/memory.limit_in_bytes": "4000",
        "memory/memory.usage_in_bytes": "3900",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 60\n",
        "memory/a/b/memory.limit_in_bytes": "1000",
        "memory/a/b/memory.usage_in_bytes": "100",
    }
    assert room(tmp_path, "9:name=systemd:/x\n4:memory:/a/b\n0::/\n", files) == [900, 160]


def test_free_memory_is_the_tightest_limit(monkeypatch):
    monkeypatch.setattr(planner, "_container_room", lambda root, groups: [123, 456])
    assert free_bytes(torch.device("cpu")) == 123
    monkeypatch.setattr(planner, "_container_room", lambda root, groups: [])
    assert free_bytes(torch.device("cpu")) > 2**20
