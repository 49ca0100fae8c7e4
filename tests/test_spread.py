"""Device maps: what goes where with how much memory, what each device has to hold, and maps that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from make_tiny_model import make_tiny_model
from tinychat import load, spread
from tinychat.errors import CapacityError, ModelError, UsageError
from tinychat.load import Source, open_source
from tinychat.placement import Placement
from tinychat.spread import Sizes, Spread

MIB = 2**20
LAYERS = 12
SHAPE = {"layers": LAYERS, "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 1024}
KV = 2 * 2 * 64 * 2  # bytes of keys and values that a token takes in one layer, in 16 bits


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """12 layers of 1.9 MiB, embeddings and head of 0.5 MiB each, all in 16 bits."""
    return open_source(make_tiny_model(tmp_path_factory.mktemp("model"), "text", dtype="bfloat16", **SHAPE))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Free bytes of the GPUs that torch finds: tests add some."""
    free: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(free))
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(free))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free[torch.device(device).index or 0], 10**12))
    monkeypatch.setattr("tinychat.planner.CUDA_CONTEXT", MIB)
    monkeypatch.setattr("tinychat.planner.CPU_WORKSPACE", MIB)
    return free


def map_of(source: Source, asked: Any, limits: dict[Any, Any] | None = None, context: int = 64) -> Mapping[str, Any]:
    placement = Placement(torch.bfloat16, device_map=asked, max_memory=limits)
    found = spread.settle(source, placement, context, chunk=16).device_map
    assert isinstance(found, Mapping)
    return found


def layers_on(source: Source, device_map: Mapping[str, Any]) -> list[str]:
    model = load.empty_of(source, torch.bfloat16)
    places = Spread.of(model, device_map, source.index).places
    return [places[f"llm.model.layers.{i}.mlp.up_proj.weight"] for i in range(LAYERS)]


def test_one_device_is_taken_where_it_suffices(source: Source, gpus: list[int]) -> None:
    assert map_of(source, "auto") == {"": "cpu"}
    gpus += [100 * MIB, 100 * MIB]
    assert map_of(source, "auto") == {"": "cuda:0"}
    assert map_of(source, "sequential") == {"": "cuda:0"}
    assert map_of(source, "auto", {0: "10MiB"}) != {"": "cuda:0"}
    assert map_of(source, "auto", {1: "90MiB"}) == {"": "cuda:1"}
    placement = Placement(device_map={"": "cuda:1"})
    assert placement.main_device == torch.device("cuda:1") and not placement.is_spread


def test_auto_balances_and_sequential_fills(source: Source, gpus: list[int]) -> None:
    gpus += [25 * MIB, 25 * MIB]
    filled = layers_on(source, map_of(source, "sequential"))
    assert filled == sorted(filled) and filled.count("cuda:0") > filled.count("cuda:1") > 0
    balanced = layers_on(source, map_of(source, "auto"))
    assert balanced == sorted(balanced) and abs(balanced.count("cuda:0") - balanced.count("cuda:1")) <= 3
    gpus[:] = [100 * MIB, 100 * MIB]
    assert set(layers_on(source, map_of(source, "balanced"))) == {"cuda:0", "cuda:1"}


def test_what_fits_on_no_gpu_goes_to_memory_and_then_to_disk(source: Source, gpus: list[int]) -> None:
    gpus += [12 * MIB, 9 * MIB]
    found = layers_on(source, map_of(source, "sequential", {0: 12 * MIB, 1: 9 * MIB, "cpu": 9 * MIB}))
    assert list(dict.fromkeys(found)) == ["cuda:0", "cuda:1", "cpu", "disk"]
    only = layers_on(source, map_of(source, "sequential", {1: 9 * MIB, "cpu": 9 * MIB}))
    assert list(dict.fromkeys(only)) == ["cuda:1", "cpu", "disk"]


@pytest.mark.parametrize("limits", [{0: 14 * MIB, 1: 10 * MIB}, {0: 9 * MIB, "cpu": 12 * MIB}, {"cpu": 12 * MIB}])
@pytest.mark.parametrize("asked", ["auto", "sequential", "balanced"])
@pytest.mark.parametrize("context", [64, 1024])
def test_every_device_of_a_proposed_map_has_the_room(
    source: Source, gpus: list[int], asked: str, limits: dict[Any, Any], context: int
) -> None:
    gpus += [20 * MIB, 12 * MIB] if 0 in limits else []
    placement = Placement(torch.bfloat16, device_map=asked, max_memory=limits)
    settled = spread.settle(source, placement, context, chunk=16)
    need = load.need_of(source, settled, chunk=16)
    assert spread.check(source, settled, need, context).fits
    model = load.empty_of(source, torch.bfloat16)
    placed = Spread.of(model, settled.device_map, source.index)  # type: ignore[arg-type]
    sizes = Sizes.of(model, source.index, torch.bfloat16)
    plans = spread.plans(placed, sizes, need, context, settled.rooms)
    for place, limit in limits.items():
        name = place if place == "cpu" else f"cuda:{place}"
        assert plans.get(name) is None or plans[name].total <= limit
    assert sum(plan.kv for plan in plans.values()) == KV * LAYERS * context


def test_keys_and_values_count_where_their_layers_compute(source: Source, gpus: list[int]) -> None:
    gpus += [50 * MIB, 50 * MIB]
    layers = {f"llm.model.layers.{i}": [0, 1, "cpu", "disk"][i // 3] for i in range(LAYERS)}
    placement = Placement(torch.bfloat16, device_map={"": 0, **layers})
    model = load.empty_of(source, torch.bfloat16)
    placed = Spread.of(model, {"": 0, **layers}, source.index)
    assert [str(device) for device in placed.layers] == ["cuda:0"] * 3 + ["cuda:1"] * 3 + ["cuda:0"] * 6
    sizes = Sizes.of(model, source.index, torch.bfloat16)
    plans = spread.plans(placed, sizes, load.need_of(source, placement), 100, placement.rooms)
    assert {name: plan.kv for name, plan in plans.items()} == {"cuda:0": 900 * KV, "cuda:1": 300 * KV, "cpu": 0}
    layer = sum(source.index.entry(name).nbytes for name in source.index.names() if ".layers.0." in name)
    rest = source.index.total_bytes - LAYERS * layer
    assert plans["cuda:0"].weights == rest + 3 * layer + layer  # one of RAM or disk comes for its forward
    assert plans["cuda:1"].weights == 3 * layer
    assert plans["cpu"].weights == 3 * layer + 2 * layer  # two of the disk's are read ahead
    assert plans["cuda:0"].disk == 3 * layer
    assert ", work space" in plans["cuda:0"].sentence and "stay on disk)" not in plans["cuda:1"].sentence
    assert plans["cpu"].sentence.endswith("free on cpu")


def test_embeddings_are_looked_up_where_they_lie(source: Source, gpus: list[int]) -> None:
    gpus += [50 * MIB]
    device_map = {"": 0, "llm.model.embed_tokens": "cpu", "llm.lm_head": "cpu"}
    placed = Spread.of(load.empty_of(source, torch.bfloat16), device_map, source.index)
    assert str(placed.main) == "cuda:0" and placed.moves
    assert placed.runs["llm.model.embed_tokens"].type == "cpu" and placed.runs["llm.lm_head"].type == "cuda"
    assert placed.is_away("llm.lm_head.weight") and not placed.is_away("llm.model.embed_tokens.weight")


def test_too_little_for_the_context_says_which_one_would_fit(source: Source, gpus: list[int]) -> None:
    placement = Placement(torch.bfloat16, device_map="auto", max_memory={"cpu": "12MiB"})
    settled = spread.settle(source, placement, 2048, chunk=16)
    words = (
        r"0\.\d+ GiB are needed \(weights 0\.\d+, 2048 tokens of context 0\.\d+; 0\.\d+ stay on disk, work space "
        r"0\.\d+\), 0\.012 GiB are free on cpu; try --context 1024, or allow more for cpu with --max-memory, or free"
    )
    with pytest.raises(CapacityError, match=words):
        load.plan(source, 2048, settled, chunk=16)
    assert load.plan(source, 1024, settled, chunk=16).fits
    with pytest.raises(CapacityError, match="1280 tokens of context"):
        load.plan(source, 1280, settled, chunk=16)
    small = Placement(torch.bfloat16, device_map="auto", max_memory={"cpu": "1MiB"})
    with pytest.raises(CapacityError, match=r"free on cpu; allow more for cpu with --max-memory, or free memory"):
        load.plan(source, 64, spread.settle(source, small, 64))


@pytest.mark.parametrize(
    ("device_map", "error", "words"),
    [
        ({"llm.model": "cpu"}, ModelError, "no device for llm.lm_head.weight; add the module, or an entry '' for the"),
        ({"": "cpu", "llm.layers": "disk"}, UsageError, "map names llm.layers, which the model does not have; name"),
        (
            {"": 0, "llm.model.layers.3.mlp": 1},
            UsageError,
            "the device map splits llm.model.layers.3 over cuda:0 and cuda:1; give it one device",
        ),
        ({"": 2}, UsageError, "torch finds 2 CUDA devices, not cuda:2"),
    ],
)
def test_maps_that_do_not_fit(
    source: Source, gpus: list[int], device_map: dict[str, Any], error: type[Exception], words: str
) -> None:
    gpus += [50 * MIB, 50 * MIB]
    with pytest.raises(error, match=words):
        placement = Placement(torch.bfloat16, device_map=device_map)
        load.assemble(source, placement)


def test_tied_weights_go_together(tmp_path: Path) -> None:
    source = open_source(make_tiny_model(tmp_path, "text", tied=True))
    with pytest.raises(UsageError, match="embed_tokens.weight and llm.lm_head.weight are one tensor, the device map"):
        load.assemble(source, Placement(device_map={"": "cpu", "llm.lm_head": "disk"}))


def test_tied_weights_count_once_and_come_whole(tmp_path: Path, gpus: list[int]) -> None:
    gpus += [50 * MIB]
    source = open_source(make_tiny_model(tmp_path, "text", tied=True, dtype="bfloat16", **SHAPE))
    model, table = load.empty_of(source, torch.bfloat16), 1024 * 256 * 2
    sizes = Sizes.of(model, source.index, torch.bfloat16)
    for where, kept, read in (("cpu", table, 0), ("disk", 0, 2 * table)):
        device_map = {"": 0, "llm.model.embed_tokens": where, "llm.lm_head": where}
        placed, placement = Spread.of(model, device_map, source.index), Placement(device_map=device_map)
        plans = spread.plans(placed, sizes, load.need_of(source, placement), 0, placement.rooms)
        assert plans["cpu"].weights == kept + read
        assert plans["cuda:0"].weights == source.index.total_bytes  # the head comes for its forward
        assert plans["cuda:0"].disk == table - kept


def test_options_of_the_cpu_kernels_have_nothing_to_do(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "text", quantize=32)
    placement = Placement(device_map={"": "disk"}, exact=True, asked=frozenset(["--exact"]))
    with pytest.raises(UsageError, match="--exact cannot do anything: the device map leaves nothing to the CPU kernel"):
        load.load_folder(folder, placement)


def test_a_slow_placement_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path, "text", quantize=32)
    notes = load.load_folder(folder, Placement(device_map={"": "disk"}), context=64).notes
    assert any(note.startswith("0.2 MiB of weights stay on disk and are read whenever they are used") for note in notes)
    assert "4-bit layers outside of a GPU's memory run in plain torch with this device map, which is slow" in notes
    notes = load.load_folder(folder, Placement(device_map="auto"), context=64).notes
    assert not any("device map" in note or "disk" in note for note in notes)
