"""Weights that come for their module's forward: the same tokens bit for bit, little memory, nothing left on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from int8_folders import int8_folder
from packed_folders import as_pickle, packed_folder
from torch import Tensor
from transformers import LlamaConfig

from make_tiny_model import make_tiny_model
from tinychat import load, offload
from tinychat.core import Finished, Message, Request, StoppingParams, Text
from tinychat.engine.engine import Engine
from tinychat.errors import CapacityError, FormatError, ModelError, UsageError
from tinychat.layers.kv_cache import KVPool
from tinychat.layers.linear import QuantLinear
from tinychat.load import load_model, open_source
from tinychat.models.llama import LlamaForCausalLM
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat.offload import Guests, OnDisk, pieces_of, put_aside, spare_file
from tinychat.placement import Placement
from tinychat_kernels import formats

LAYERS = 4
MIDDLE = {"": "cpu", "llm.model.layers.0.mlp": "disk", "llm.model.layers.1": "disk", "vision_tower": "disk"}
ALL = {"": "disk"}
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "float": lambda folder: make_tiny_model(folder, layers=LAYERS),
    "widened from 16 bits": lambda folder: make_tiny_model(folder, layers=LAYERS, dtype="bfloat16"),
    "tied": lambda folder: make_tiny_model(folder, layers=LAYERS, tied=True),
    "shards": lambda folder: make_tiny_model(folder, layers=LAYERS, shard_size=2**17),
    "tiles": lambda folder: make_tiny_model(folder, "llava_next", layers=LAYERS),
    "SigLIP": lambda folder: make_tiny_model(folder, layers=LAYERS, vision="siglip"),
    "4 bits": lambda folder: make_tiny_model(folder, layers=LAYERS, quantize=32),
    "int8 tower": lambda folder: int8_folder(folder, layers=LAYERS),
    "packed otherwise": lambda folder: packed_folder(folder, formats.GEMV),
    "a pickle": lambda folder: as_pickle(make_tiny_model(folder, "text", layers=LAYERS, quantize=32)),
}


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What device maps compute with, without one as well; and a cache folder of its own."""
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")
    monkeypatch.setenv("TINYCHAT_CACHE", str(tmp_path / "cache"))


@torch.no_grad()
def said(model: VilaLlamaForCausalLM) -> list[Tensor]:
    """Features of pictures, and logits of a prefill, of some greedy tokens, and of a whole forward."""
    found: list[Tensor] = []
    tower = model.vision_tower
    if tower is not None and model.tiling is None:
        side = tower.config.image_size
        found += list(model.encode_images(torch.linspace(-1, 1, 6 * side**2).view(2, 3, side, side)))
    ids, cache = torch.arange(1, 12), model.make_cache(1, 32)
    found.append(model.prefill(model.embed(ids), cache, 0, chunk=4))
    for _ in range(3):
        found.append(model.decode(found[-1][:, -1].argmax(-1, keepdim=True), cache))
    found.append(model(input_ids=ids[None], output_hidden_states=True).logits)
    return found


def held(model: VilaLlamaForCausalLM) -> int:
    """Bytes of weights in memory."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in tensors.values() if not tensor.is_meta)


@pytest.mark.parametrize("device_map", [MIDDLE, ALL], ids=["some", "all"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_what_lies_on_disk_says_the_same_bit_for_bit(tmp_path: Path, kind: str, device_map: dict[str, str]) -> None:
    folder = FOLDERS[kind](tmp_path / "model")
    if open_source(folder).config.vision is None:
        device_map = {name: place for name, place in device_map.items() if name != "vision_tower"}
    plain = load_model(folder, device="cpu")
    spread = load_model(folder, device_map=device_map)
    for ours, theirs in zip(said(spread), said(plain), strict=True):
        assert torch.equal(ours, theirs)
    assert spread.llm.model.layers[1].input_layernorm.weight.is_meta
    assert held(spread) < held(plain)
    if device_map == ALL:
        assert held(spread) == image_newline(spread)
    assert spread.device.type == "cpu" and spread.one_call is None


def image_newline(model: VilaLlamaForCausalLM) -> int:
    return 0 if model.image_newline is None else model.image_newline.nbytes


def test_less_memory_than_the_model_puts_layers_on_disk(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "text", layers=LAYERS)
    plain = load_model(folder, device="cpu")
    for limit in ("300KB", "1KB"):
        spread = load_model(folder, device_map="sequential", max_memory={"cpu": limit})
        assert torch.equal(said(spread)[-1], said(plain)[-1])
        assert held(spread) <= 300_000


def test_a_tensor_on_disk_is_read_from_the_checkpoint_itself(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "text")
    index = open_source(folder).index
    pieces = pieces_of(index, dict.fromkeys(index.names(), torch.float16), None)
    assert put_aside(index, dict.fromkeys(index.names(), torch.float16)) == 0
    disk = OnDisk({name: {name: piece} for name, piece in pieces.items()})
    for name in [*index.names(), *reversed(index.names())]:
        assert torch.equal(disk.take(name)[name], index.get(name))
    embeddings = "llm.model.embed_tokens.weight"
    assert torch.equal(disk.rows(pieces[embeddings], [319, 0, 7]), index.get(embeddings)[[319, 0, 7]])
    assert not (tmp_path / "cache").exists()


def test_what_is_put_aside_has_no_name(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path / "model", formats.GEMV)
    load_model(folder, device_map=ALL)
    aside = tmp_path / "cache" / "offload"
    assert aside.is_dir() and not list(aside.iterdir())


def test_a_disk_without_room_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed_folder(tmp_path / "model", formats.GEMV)
    monkeypatch.setattr("tinychat.checkpoint.stream_into", None)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(2000, 1000, 1000))
    words = r"\d\.\d+ GiB of weights have to be put aside in .*offload, which has 0\.000 GiB free; free some disk, set "
    with pytest.raises(CapacityError, match=words + "TINYCHAT_CACHE to another one, or allow more with --max-memory"):
        load_model(folder, device_map=ALL)
    monkeypatch.setenv("TINYCHAT_CACHE", str(folder / "config.json"))
    with pytest.raises(CapacityError, match="weights cannot be put aside in .*config.json/offload"):
        load_model(folder, device_map=ALL)


def test_a_file_that_shrinks_and_one_that_is_gone(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "text")
    model = load_model(folder, device_map=ALL)
    path = folder / "model.safetensors"
    os.truncate(path, 4096)
    with pytest.raises(FormatError, match="model.safetensors has become shorter"):
        said(model)
    other = load_model(make_tiny_model(tmp_path / "other", "text"), device_map=ALL)
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises((ModelError, FormatError), match="cannot be read from disk any more"):
        said(other)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_is_cut_off_does_no_harm(tmp_path: Path, error: type[BaseException]) -> None:
    model = load_model(make_tiny_model(tmp_path / "model", "text"), device_map=ALL)
    wanted = said(model)

    def stop(*_: object) -> None:
        raise error

    handle = model.llm.model.layers[1].mlp.act.register_forward_hook(stop)
    with pytest.raises(error):
        said(model)
    handle.remove()
    assert held(model) == 0 or error is KeyboardInterrupt  # which leaves one block, until its next forward
    assert all(torch.equal(again, before) for again, before in zip(said(model), wanted, strict=True))
    assert held(model) == 0


def test_saving_what_is_not_in_memory_is_refused(tmp_path: Path) -> None:
    model = load_model(make_tiny_model(tmp_path / "model"), device_map=MIDDLE)
    with pytest.raises(UsageError, match=r"\d+ tensors of the model are not in memory.*; load it without a device map"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("kv", ["float", "int8"])
def test_the_engine_says_the_same(tmp_path: Path, kv: str) -> None:
    """Rows that come together and leave at different times, and guesses."""
    folder = make_tiny_model(tmp_path / "model", "text", layers=LAYERS)
    texts = ["one", "two words", "three more words of it"]
    said: list[list[Any]] = []
    for how in ({"device": "cpu"}, {"device_map": {"": "disk", "llm.model.layers.0": "cpu"}}):
        ready = load.load_folder(folder, Placement(**how, kv_cache_dtype=kv), context=256, rows=2)  # type: ignore[arg-type]
        engine = Engine(ready.model, ready.processor, context=256, chunk=8, rows=2, speculate=3)
        limits = [StoppingParams(max_new_tokens=count) for count in (12, 3, 7)]
        requests = [
            Request(str(i), (Message("user", (Text(text),)),), stopping=limit)
            for i, (text, limit) in enumerate(zip(texts, limits, strict=True))
        ]
        ends = {event.request_id: event for event in engine.run(requests) if isinstance(event, Finished)}
        said.append([ends[str(i)].token_ids for i in range(len(texts))])
    assert said[0] == said[1] and all(said[0])


PLACES = st.sampled_from(["cpu", "disk"])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(PLACES, min_size=LAYERS, max_size=LAYERS), rest=PLACES, head=PLACES, mlp=PLACES)
def test_any_map_says_the_same(tmp_path: Path, layers: list[str], rest: str, head: str, mlp: str) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        make_tiny_model(folder, "text", layers=LAYERS, quantize=32)
    places = {f"llm.model.layers.{i}": place for i, place in enumerate(layers)}
    device_map = {"": rest, "llm.lm_head": head, "llm.model.layers.0.mlp": mlp, **places}
    for ours, theirs in zip(said(load_model(folder, device_map=device_map)), said(load_model(folder)), strict=True):
        assert torch.equal(ours, theirs)


def test_a_failure_to_read_is_no_lasting_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(make_tiny_model(tmp_path / "model", "text"), device_map=ALL)
    wanted, read = said(model), os.preadv

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", fail)
    with pytest.raises(ModelError, match="cannot be read from disk any more: .*Input/output error; see to the disk"):
        said(model)
    monkeypatch.setattr("os.preadv", read)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(said(model), wanted, strict=True))


def test_blocks_come_in_any_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = spare_file(tmp_path, 1000)
    pieces: dict[str, Mapping[str, offload.Piece]] = {}
    wanted: dict[str, Tensor] = {}
    for name in "abcde":
        wanted[name] = torch.randint(0, 99, (7, len(pieces) + 1))
        at = file.tell()
        file.write(wanted[name].numpy().tobytes())
        kind = (tuple(wanted[name].shape), wanted[name].dtype, wanted[name].nbytes)
        pieces[name] = {name: offload.Piece(None, at, *kind)}
    file.flush()
    disk = OnDisk(pieces, file)
    for name in "abcdeabceeddabcadeab":
        assert torch.equal(disk.take(name)[name], wanted[name])


def test_layers_on_another_device_get_what_they_need_there() -> None:
    """meta stands in for a second GPU: whatever were left behind on the CPU would not meet meta's tensors."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    llm = LlamaForCausalLM(config)
    there = torch.device("meta")
    devices = [torch.device("cpu"), there, there]
    blocks: list[Any] = [*llm.model.layers, llm.model.norm, llm.lm_head]
    for block, device in zip(blocks, [*devices, there, there], strict=True):
        block.to(device)
        Guests(block, device, None)
    cache = KVPool(llm.config, 2, 16, torch.float32, devices).take(2)
    with torch.no_grad():
        hidden = llm.model(llm.model.embed_tokens(torch.arange(10).view(2, 5)), [0, 0], cache).hidden
    cache.advance(5)
    cache.truncate([3, 5])
    with torch.no_grad():  # rows of unequal length are masked
        hidden = llm.model(llm.model.embed_tokens(torch.arange(4).view(2, 2)), [3, 5], cache).hidden
    assert llm.logits(hidden).shape == (2, 2, 32) and hidden.device == there
    assert cache.layer(0).k.device.type == "cpu" and bool(cache.layer(0).k.any())


RUN = """
import json, sys
from pathlib import Path
import torch
from make_tiny_model import make_tiny_model
from tinychat import load
from tinychat.placement import Placement

def memory(name):
    rows = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[name].split()[0]) * 1024

small, big, device_map, limit, wait = sys.argv[1:]
device_map = json.loads(device_map) if device_map.startswith("{") else device_map
said = []
for folder in (small, big):
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    ready = load.load_folder(Path(folder), Placement(device_map=device_map, max_memory={"cpu": limit}), context=64)
    cache, logits = ready.model.make_cache(1, 64), None
    logits = ready.model.prefill(ready.model.embed(torch.arange(1, 30)), cache, 0)
    for _ in range(3):
        said.append(int(logits[0, -1].argmax()))
        logits = ready.model.decode(torch.tensor([said[-1:]]), cache)
disk = sum(tensor.nbytes for tensor in ready.model.state_dict(keep_vars=True).values() if tensor.is_meta)
print(json.dumps({"grown": memory("VmHWM") - before, "disk": disk, "said": said, "notes": ready.notes}), flush=True)
if wait == "wait":
    sys.stdin.read()
"""


def started(folder: Path, tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[1]
    paths = os.pathsep.join(str(root / part) for part in (".", "kernels", "scripts"))
    small = make_tiny_model(tmp_path / "small", "text")
    command = [sys.executable, "-c", RUN, str(small), str(folder), *arguments]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is looked up in /proc")
def test_memory_stays_below_the_model(tmp_path: Path) -> None:
    shape = {"layers": 8, "hidden_size": 768, "intermediate_size": 2048, "heads": 12, "kv_heads": 12}
    folder = make_tiny_model(tmp_path / "model", "text", **shape)
    whole = open_source(folder).index.total_bytes
    assert whole > 220e6
    found: dict[str, Any] = {}
    for limit in ("260MB", "1GB"):
        process = started(folder, tmp_path, "auto", limit, "")
        found[limit] = json.loads(process.communicate(timeout=120)[0])
        assert process.returncode == 0
    some, all_of_it = found["260MB"], found["1GB"]
    assert all_of_it["disk"] == 0 and not all_of_it["notes"] and all_of_it["grown"] >= whole
    assert 0.5 * whole < some["disk"] < whole and some["said"] == all_of_it["said"]
    assert some["grown"] < 260e6 - 128 * 2**20 < 0.6 * whole
    assert (
        "MiB of weights stay on disk and are read whenever they are used; allow more with --max-memory"
        in some["notes"][0]
    )


def test_nothing_is_left_of_a_killed_process(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path / "model", formats.GEMV)
    process = started(folder, tmp_path, json.dumps(ALL), "1GB", "wait")
    assert process.stdout is not None and process.stdin is not None
    assert json.loads(process.stdout.readline())["disk"] > 0
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    process.stdin.close()
    aside = tmp_path / "cache" / "offload"
    assert aside.is_dir() and not list(aside.iterdir())


def test_4_bit_layers_keep_their_form(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "text", quantize=32)
    model = load_model(folder, device_map=ALL)
    linear = model.llm.model.layers[0].self_attn.q_proj
    assert isinstance(linear, QuantLinear) and linear.qweight.is_meta and not linear.prepared
    assert load.plan(open_source(folder), 64, Placement(device_map=ALL)).disk > 0
