"""The tower in 8 bits from folder to folder: what it computes, what the decoder is fitted to, resuming, refusals."""

from __future__ import annotations

import io
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from int8_folders import int8_folder
from PIL import Image as Pictures
from quantize_runs import content, cut_off_at_every_file, made, spawn
from quantize_runs import job as quick_job
from quantize_runs import model as tiny
from safetensors.torch import load_file, save_file

from awq import save
from awq.recipes import encoder_recipe
from awq.smooth import SmoothOptions, smooth_block
from make_tiny_model import make_tiny_model
from tinychat.core import Progress
from tinychat.errors import ModelError, UsageError
from tinychat.flags import QuantizeFlags
from tinychat.layers.int8_linear import Int8Linear
from tinychat.load import load_model, open_source
from tinychat.quantize import run as running
from tinychat.quantize import verb
from tinychat.quantize.embedding import Embedder
from tinychat.quantize.job import Calibration, Job
from tinychat.quantize.run import Began, LayerDone, Run, Written
from tinychat.quantize.tower import Encoders, TowerLayerDone, TowerStage, with_tower
from tinychat.terminal.quantizing import LineBoard
from tinychat_kernels.int8 import quantize_rows

TOWER_LAYERS = 3
CPU = torch.device("cpu")


def model(models: Path, layout: str = "vila", **shape: Any) -> Path:
    return tiny(models, layout, **shape)


def job(folder: Path, out: Path, **changes: Any) -> Job:
    return quick_job(folder, out, **({"vision": "w8a8"} | changes))


def tower_of(folder: Path) -> dict[str, torch.Tensor]:
    """A folder's tower, its tensors named from the encoder's layers."""
    tensors = load_file(folder / "vision_tower" / "model.safetensors")
    return {name.rpartition("encoder.")[2]: tensor for name, tensor in tensors.items()}


def pixels(size: int = 56) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


# What the result computes


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_tower_is_the_one_smoothed_in_memory(models, tmp_path, family):
    wanted = job(model(models, vision=family), tmp_path / "out")
    run = Run(wanted)
    events = [*run.events()]
    about = next(event for event in events if isinstance(event, Progress) and event.stage == "tower")
    assert (about.done, about.total) == (0, TOWER_LAYERS)
    assert events.index(about) < next(i for i, event in enumerate(events) if isinstance(event, TowerLayerDone))
    assert len([event for event in events if isinstance(event, TowerLayerDone)]) == TOWER_LAYERS
    assert run.data is not None and run.processor is not None
    reference = load_model(wanted.folder, dtype=torch.float32)
    stored = tower_of(tmp_path / "out")
    slots = [(prompt, slot) for prompt in run.data.prompts for slot in prompt.slots if slot.start < run.data.seqlen]
    shown = [run.processor.pixels(prompt, [slot.image]) for prompt, slot in slots]
    with torch.no_grad():
        states = [reference.get_vision_tower().vision_model.hidden_state(picture, 0)[0] for picture in shown]
    layers = reference.get_vision_tower().vision_model.encoder.layers
    for i, layer in enumerate(layers):
        seen: dict[int, torch.Tensor] = {}
        found = smooth_block(
            layer, lambda b, x: b(x[None])[0], states, encoder_recipe(family), SmoothOptions(), seen.__setitem__
        )
        states = [seen[j] for j in range(len(states))]
        for name, packed in found.weights.items():
            assert torch.equal(stored[f"layers.{i}.{name}.weight"], packed.weight)
            assert torch.equal(stored[f"layers.{i}.{name}.weight_scale"], packed.scale[:, None])
        for name, tensor in found.tensors.items():
            assert torch.equal(stored[f"layers.{i}.{name}"], tensor.half())


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_features_are_near_those_of_sixteen_bits(models, tmp_path, family):
    source = model(models, vision=family)
    facts = made(job(source, tmp_path / "out"))
    ours, theirs = (load_model(folder, dtype=torch.float32) for folder in (tmp_path / "out", source))
    assert sum(isinstance(part, Int8Linear) for part in ours.modules()) == 6 * TOWER_LAYERS
    with torch.no_grad():
        near, exact = (torch.stack(list(m.encode_images(pixels()))) for m in (ours, theirs))
    assert 1e-5 < float((near - exact).norm() / exact.norm()) < 5e-2
    told = facts["vision"]
    assert told["scheme"] == "w8a8" and len(told["layers"]) == TOWER_LAYERS and told["spared"] == []
    assert {"mlp.fc2", "self_attn.out_proj"} < set(told["layers"][0]["linears"])
    assert facts["spared"] == ["mm_projector", "lm_head"] and facts["options"]["vision"] == "w8a8"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_error_that_is_told_is_that_of_what_is_stored(models, tmp_path, dtype):
    run = Run(job(model(models, dtype=dtype, vision="siglip"), tmp_path / "out"))
    *_, end = run.events()
    assert isinstance(end, Written) and run.data is not None and run.processor is not None
    encoders = Encoders(run.source, CPU)
    states = [*encoders.first(run.processor, run.data)]
    layers = load_model(tmp_path / "out", dtype=torch.float32).get_vision_tower().vision_model.encoder.layers
    for i, (after, told) in enumerate(zip(layers, end.facts["vision"]["layers"], strict=True)):
        before = encoders.open(i)
        outputs = [encoders.run(before, hidden) for hidden in states]
        noise = sum((encoders.run(after, x) - y).square().sum() for x, y in zip(states, outputs, strict=True))
        signal = sum((y - x).square().sum() for x, y in zip(states, outputs, strict=True))
        assert told["error"][told["kept"]] == pytest.approx(float(noise / signal), rel=1e-4)
        states = outputs


def test_what_is_no_linear_of_the_encoder_is_carried_over(models, tmp_path):
    source = model(models)
    made(job(source, tmp_path / "out", method="rtn"))
    before, after = tower_of(source), tower_of(tmp_path / "out")
    linears = {name for name in before if name.startswith("layers.") and before[name].ndim == 2}
    assert len(linears) == 6 * TOWER_LAYERS and after.keys() - before.keys() == {f"{name}_scale" for name in linears}
    for name, tensor in before.items():
        wanted = quantize_rows(tensor).weight if name in linears else tensor
        assert torch.equal(after[name], wanted)
    config = json.loads((tmp_path / "out" / "vision_tower" / "config.json").read_text())
    said = config["quantization_config"]
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "int-quantized")
    assert said["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    llm = json.loads((tmp_path / "out" / "llm" / "config.json").read_text())["quantization_config"]
    assert llm["quant_method"] == "awq" and "vision_tower" in llm["modules_to_not_convert"]


def test_the_decoder_is_fitted_to_what_the_tower_gives_now(models, tmp_path, monkeypatch):
    """The states before its first layer are those of the finished model, and not those of the 16-bit one."""
    wanted = job(model(models), tmp_path / "out")
    run = Run(wanted)
    events = run.events()
    for event in events:
        if isinstance(event, TowerLayerDone) and event.index + 1 == TOWER_LAYERS:
            break
    work = save.Work.resume(wanted.partial)
    assert run.data is not None and run.processor is not None
    sources, used = (with_tower(run.source, work), run.source), []
    monkeypatch.setattr(running, "Embedder", lambda source, *rest: used.append(source.int8) or Embedder(source, *rest))
    ours, before = (
        [*Embedder(source, run.processor, CPU, stream).embed(run.data.prompts, 10**6)]
        for source, stream in zip(sources, (True, False), strict=True)
    )
    assert isinstance([*events][-1], Written)
    assert used == [sources[0].int8] and len(used[0]) == 6 * TOWER_LAYERS
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")  # kernels would round the projector too
    finished = load_model(wanted.out, dtype=torch.float32)
    seen = 0
    for i, prompt in enumerate(run.data.prompts):
        for slot in prompt.slots:
            with torch.no_grad():
                features = finished.encode_images(run.processor.pixels(prompt, [slot.image]))[0]
            torch.testing.assert_close(ours[i][slot.start : slot.end], features)
            assert not torch.equal(ours[i][slot.start : slot.end], before[i][slot.start : slot.end])
            seen += 1
    assert seen == run.data.pictures > 0


def test_a_linear_that_stays_is_told_and_read(models, tmp_path):
    source = tmp_path / "source"
    make_tiny_model(source, "vila", dtype="float16", vision="siglip")
    home = source / "vision_tower" / "model.safetensors"
    tensors = load_file(home)
    for name in [name for name in tensors if "layers.1.mlp" in name]:
        if name.endswith("fc1.bias"):
            tensors[name][7] = 3000
        if name.endswith("fc2.weight"):
            tensors[name][:, 7] *= 1e-3
    save_file(tensors, home)
    facts = made(job(source, tmp_path / "out"))
    assert facts["vision"]["spared"] == ["layers.1.mlp.fc2"]
    ignored = json.loads((tmp_path / "out" / "vision_tower" / "config.json").read_text())["quantization_config"][
        "ignore"
    ]
    assert "re:.*[.]layers[.]1[.]mlp[.]fc2$" in ignored
    loaded = load_model(tmp_path / "out", dtype=torch.float32).get_vision_tower()
    kinds = [isinstance(layer.mlp.fc2, Int8Linear) for layer in loaded.vision_model.encoder.layers]
    assert kinds == [True, False, True]


def test_without_a_search_it_is_rounded(models, tmp_path):
    facts = made(job(model(models), tmp_path / "out", method="rtn"))
    assert [layer["kept"] for layer in facts["vision"]["layers"]] == ["plain"] * TOWER_LAYERS
    assert open_source(tmp_path / "out").int8


def test_sixteen_bits_are_the_default(models, tmp_path):
    source = model(models)
    facts = made(job(source, tmp_path / "out", method="rtn", vision="16bit"))
    assert facts["vision"] is None and "vision_tower" in facts["spared"]
    assert not open_source(tmp_path / "out").int8
    assert all(torch.equal(tensor, tower_of(tmp_path / "out")[name]) for name, tensor in tower_of(source).items())


# Resuming


def test_cut_off_at_every_file_the_result_is_the_same(models, tmp_path, monkeypatch):
    source = model(models, layers=1, vision_layers=2)
    made(job(source, tmp_path / "whole"))
    wanted = job(source, tmp_path / "out")
    assert cut_off_at_every_file(wanted, monkeypatch) > 8  # more than the files of one layer
    assert content(wanted.out) == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def to_kill(source: Path, out: Path) -> subprocess.Popen[str]:
    return spawn(source, out, "--scale-grid", "2", "--vision", "w8a8", "--no-card")


@pytest.mark.timeout(600)
def test_killed_in_the_tower_it_goes_on(models, tmp_path):
    source = model(models, layers=1)
    with to_kill(source, tmp_path / "whole") as child:
        assert child.wait() == 0, child.communicate()[1]
    with to_kill(source, tmp_path / "out") as child:
        assert child.stdout is not None
        while json.loads(child.stdout.readline())["event"] != "tower_layer":
            pass
        child.send_signal(signal.SIGKILL)
    with to_kill(source, tmp_path / "out") as child:
        printed, errors = child.communicate()
        assert child.returncode == 0, errors
    kinds = [json.loads(line)["event"] for line in printed.splitlines()]
    assert kinds.count("tower_layer") < TOWER_LAYERS
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_another_tower_is_not_mixed_in(models, tmp_path):
    wanted = job(model(models), tmp_path / "out")
    events = Run(wanted).events()
    next(event for event in events if isinstance(event, TowerLayerDone))
    events.close()  # type: ignore[attr-defined]  # a generator
    with pytest.raises(UsageError, match="options: vision was w8a8 and is 16bit"):
        made(job(model(models), tmp_path / "out", vision="16bit"), resume=True)


# The plan, and what is shown


def test_the_plan_knows_the_tower(models, tmp_path):
    source = model(models)
    plans = {kind: Run(job(source, tmp_path / kind, vision=kind)).plan for kind in ("16bit", "w8a8")}
    eight, sixteen = plans["w8a8"], plans["16bit"]
    assert eight.output < sixteen.output and eight.spared == ("mm_projector", "lm_head")
    assert eight.ram["tower"] > 0 and "tower" not in sixteen.ram
    for kind, plan in plans.items():
        made(job(source, tmp_path / kind, vision=kind))
        weights = sum(path.stat().st_size for path in (tmp_path / kind).rglob("*.safetensors"))
        assert 0 < weights - plan.output < 20_000  # the files' headers
        assert plan.disk > 2 * plan.output


@pytest.mark.parametrize(("count", "words"), [(1, "1 picture, whose"), (15, "15 pictures, whose"), (16, "")])
def test_few_pictures_to_smooth_on_are_told_of(models, tmp_path, count, words):
    lines = [{"messages": [{"role": "user", "content": "What is it?"}], "images": ["a.png"]}] * count
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Pictures.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    seen = Calibration((str(tmp_path / "a.jsonl"),), samples=count, seqlen=60)
    run = Run(job(model(models), tmp_path / "out", calibration=seen))
    flags = QuantizeFlags("M", "OUT", vision="w8a8")
    sentence = f"the vision tower is smoothed on {words} quirks its scales may fit: 16 or more are better"
    assert run.plan.to_json()["warnings"] == ([sentence] if words else [])
    assert (f"\nwarning: {sentence}" in verb.plan_text(run.plan, flags)) == bool(words)
    assert not Run(job(model(models), tmp_path / "out", calibration=seen, vision="16bit")).plan.warnings
    board, said = LineBoard(io.StringIO()), list[str]()
    board.say = said.append  # type: ignore[method-assign]
    verb._show(Began(run.plan, 0), False, board, said.append)
    assert said[1:] == ([f"warning: {sentence}"] if words else [])


def test_lines(capsys):
    done = TowerLayerDone(1, 3, "smooth", {"plain": 1e-3, "smooth": 1e-4}, ("mlp.fc2",), 3.0)
    text = "vision layer 2 of 3: 30.0 dB of signal to noise in 8 bits, 40.0 dB smoothed, mlp.fc2 left in 16 bit, 3 s"
    assert verb.tower_text(done) == text
    plain = TowerLayerDone(0, 3, "plain", {"plain": 1e-4, "smooth": 1e-3}, (), 3.0)
    assert "40.0 dB of signal to noise in 8 bits, 30.0 dB smoothed, which is not kept, 3 s" in verb.tower_text(plain)
    assert (
        verb.tower_text(TowerLayerDone(0, 3, "plain", None, (), 3.0)) == "vision layer 1 of 3: rounded to 8 bits, 3 s"
    )
    assert verb.to_json(done)["event"] == "tower_layer" and verb.to_json(done)["spared"] == ("mlp.fc2",)


# Refusals


@pytest.mark.parametrize("layout", ["llava", "llava_hf"])
def test_a_layout_that_cannot_say_it(models, tmp_path, layout):
    with pytest.raises(ModelError, match=r"cannot say that one is awq and the other w8a8; quantize a VILA folder \("):
        Run(job(model(models, layout), tmp_path / "out"))


def test_a_model_without_a_tower(models, tmp_path):
    with pytest.raises(ModelError, match="has no vision tower; leave out --vision w8a8"):
        Run(job(model(models, "text"), tmp_path / "out"))


def test_a_tower_that_has_eight_bits_already(tmp_path):
    source = int8_folder(tmp_path / "source", quantize=None)
    for kind in ("w8a8", "16bit"):
        with pytest.raises(ModelError, match="the vision tower of .* is quantized to 8 bits already; give the 16-bit"):
            Run(job(source, tmp_path / "out", vision=kind))


def test_a_calibration_without_pictures(models, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("nothing to see here " * 50)
    wanted = job(model(models), tmp_path / "out", calibration=Calibration((str(text),), samples=1, seqlen=20))
    with pytest.raises(UsageError, match="--vision w8a8 looks at pictures, and the calibration has none; give a"):
        Run(wanted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision": "w4a4"}, "--vision is 'w4a4'; give 16bit or w8a8"),
        ({"pseudo": True}, "--pseudo writes 16-bit weights, and --vision w8a8 asks for 8-bit ones; give one of them"),
    ],
)
def test_what_contradicts_itself(models, tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        job(model(models), tmp_path / "out", **changes)


def test_weights_that_are_not_finite(models, tmp_path):
    source = tmp_path / "source"
    make_tiny_model(source, "vila", dtype="float16")
    home = source / "vision_tower" / "model.safetensors"
    tensors = load_file(home)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, home)
    for method in ("rtn", "awq"):
        with pytest.raises(ModelError, match="the tower's layer 1, mlp.fc1.weight holds NaN or Inf values; check the"):
            made(job(source, tmp_path / method, method=method))
    run = Run(job(source, tmp_path / "rtn", method="rtn"))  # the stage itself does not take them either
    with pytest.raises(ModelError, match="the tower's layer 1: the weight holds NaN"):
        [*TowerStage(run.job, run.source, run.processor, run.data).events(save.Work.begin(tmp_path / "work", {}))]


def test_the_stage_needs_no_decoder(models, tmp_path):
    """It is begun and finished by itself."""
    run = Run(job(model(models), tmp_path / "out"))
    work = save.Work.begin(tmp_path / "work", {})
    events = [*TowerStage(run.job, run.source, run.processor, run.data).events(work)]
    assert not any(isinstance(event, LayerDone) for event in events)
    assert sorted(work.parts) == [f"tower-{i:05d}" for i in range(TOWER_LAYERS)]
    assert sorted(path.name for path in work.folder.glob("*.bin")) == []
