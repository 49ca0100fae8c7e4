"""From folder to folder: what the result computes, how work is resumed, and how runs are refused."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from same import assert_same
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from awq import save
from awq.quantize import quantize_block
from awq.recipes import recipe_for
from make_tiny_model import make_tiny_model
from tinychat.checkpoint import Index, write_safetensors
from tinychat.config import read_config
from tinychat.errors import CapacityError, ModelError, TinychatError, UsageError
from tinychat.load import load, load_folder, load_model, quant_spec
from tinychat.placement import Placement
from tinychat.quantize import output, plan
from tinychat.quantize import run as running
from tinychat.quantize.blocks import Blocks
from tinychat.quantize.embedding import Embedder
from tinychat.quantize.facts import FACTS, for_card
from tinychat.quantize.job import Calibration, Job
from tinychat.quantize.run import Began, LayerDone, Run, Written
from tinychat_kernels.layout import QuantSpec

SPEC = QuantSpec(group_size=32)
QUICK = {"scale_grid": 3, "clip_grid": 4, "loss_tokens": 64}
LAYERS = 3
FAMILIES = [("text", family) for family in ("llama", "mistral", "qwen2")] + [
    (layout, "llama") for layout in ("llava_hf", "vila", "llava")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models by layout and family, made when first asked for."""
    return tmp_path_factory.mktemp("models")


def model(models: Path, layout: str = "text", family: str = "llama", **changes: Any) -> Path:
    folder = models / f"{layout}-{family}-{len(changes)}"
    if not folder.exists():
        make_tiny_model(folder, layout, **({"dtype": "float16", "text": family, "layers": LAYERS} | changes))
    return folder


def job(folder: Path, out: Path, **changes: Any) -> Job:
    quick: dict[str, Any] = {
        "spec": SPEC,
        "search": QUICK,
        "calibration": Calibration(samples=3, seqlen=40),
        "card": False,
    }
    return Job(folder, out, **(quick | changes))


def made(wanted: Job, resume: bool = False) -> dict[str, Any]:
    """Runs a job to its end and gives the facts."""
    *_, end = Run(wanted).events(resume)
    assert isinstance(end, Written)
    return end.facts


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of a checkpoint's files; of the facts what does not depend on the hour."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop(output.LOG)
    facts = json.loads(found.pop(FACTS))
    return {**found, "facts": json.dumps({**facts, "wall_s": 0, "peak_ram": 0}).encode()}


# What the result computes


@pytest.mark.parametrize(("layout", "family"), FAMILIES)
def test_the_checkpoint_is_the_model_quantized_in_memory(models, tmp_path, layout, family):
    wanted = job(model(models, layout, family), tmp_path / "out")
    run = Run(wanted)
    *_, end = run.events()
    assert isinstance(end, Written) and sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    assert run.data is not None and run.processor is not None
    reference = load_model(wanted.folder, dtype=torch.float32)
    blocks = Blocks(run.source, torch.device("cpu"))
    embedder = Embedder(run.source, run.processor, torch.device("cpu"), stream=False)
    first = states = list(embedder.embed(run.data.prompts, run.data.seqlen))
    for i, layer in enumerate(reference.llm.model.layers):
        outputs = [blocks.run(layer, hidden) for hidden in states]
        quantize_block(layer, blocks.run, states, recipe_for(family), wanted.search_options(), seed=i)
        states = outputs
    packed = load_folder(tmp_path / "out", Placement(torch.float32, "cpu", dequantize=True)).model
    for hidden in first:
        with torch.no_grad():
            ours, theirs = (m(inputs_embeds=hidden[None]).logits for m in (packed, reference))
        assert_same(ours, theirs)


@pytest.mark.parametrize("layout", ["text", "llava_hf", "vila", "llava"])
def test_the_folder_is_complete_and_says_what_is_in_it(models, tmp_path, layout):
    source = model(models, layout)
    facts = made(job(source, tmp_path / "out"))
    read, processor = load(tmp_path / "out")
    spec = quant_spec(read.config)
    assert spec is not None and (spec.bits, spec.group_size) == (4, 32)
    assert processor.stop_ids and (processor.image_processor is None) == (layout == "text")
    config = tmp_path / "out" / ("llm/config.json" if layout == "vila" else "config.json")
    projector = {"llava_hf": "multi_modal_projector", "vila": "mm_projector", "llava": "mm_projector"}.get(layout)
    spared = json.loads(config.read_text())["quantization_config"]["modules_to_not_convert"]
    found_by_beginning = ["model.vision_tower", "model.multi_modal_projector"] if layout == "llava_hf" else []
    assert spared == [*(["vision_tower", projector] if projector else []), "lm_head", *found_by_beginning]
    assert facts["calibration"]["sequences"] == 3 and (facts["calibration"]["pictures"] > 0) == (layout != "text")
    assert [layer["kept"] for layer in facts["layers"]] and set(facts["layers"][0]["linears"]) >= {"mlp.down_proj"}
    assert json.loads((tmp_path / "out" / "quantize.json").read_text()) == facts
    assert for_card(facts)["calibration"] == facts["calibration"] and "wall_s" not in for_card(facts)
    assert "complete" in (tmp_path / "out" / "quantize.log").read_text()


def test_what_is_not_quantized_is_carried_over_bit_for_bit(models, tmp_path):
    source = model(models, "llava_hf")
    made(job(source, tmp_path / "out", method="rtn"))
    before, after = Index.of(source), Index.of(tmp_path / "out")
    kept = [name for name in before.names() if name in after]
    assert len(kept) > 20 and not [name for name in before.names() if name not in kept and "_proj.weight" not in name]
    assert all(torch.equal(before.get(name), after.get(name)) for name in kept)
    scales = [name for name in after.names() if name.endswith(".scales")]
    assert len(scales) == 7 * LAYERS and {after.dtype(name) for name in scales} == {torch.float16}


def test_wide_floats_become_half_ones_and_the_config_says_so(tmp_path):
    source = make_tiny_model(tmp_path / "wide", "llava_hf", dtype="float32")
    made(job(source, tmp_path / "out", method="rtn"))
    written = Index.of(tmp_path / "out")
    assert {written.dtype(name) for name in written.names()} == {torch.float16, torch.int32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_shards_are_found_by_their_index(models, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "write_sharded", lambda copies, folder: writing_sharded(copies, folder, 2**14))
    from tinychat.quantize.writing import write_sharded as writing_sharded

    made(job(model(models), tmp_path / "out", method="rtn"))
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    load_model(tmp_path / "out")


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_pseudo_weights_are_floats_of_few_values(models, tmp_path, bits):
    spec = QuantSpec(bits, 32)
    made(job(model(models), tmp_path / "out", method="rtn", pseudo=True, spec=spec))
    assert quant_spec(read_config(tmp_path / "out")) is None
    weight = Index.of(tmp_path / "out").get("model.layers.0.mlp.up_proj.weight")
    assert max(len(group.unique()) for group in weight.reshape(-1, 32)) in range(4, 2**bits + 1)


# What the decoder sees, by classes that nobody here wrote


@pytest.mark.parametrize("stream", [False, True])
def test_the_states_are_those_of_transformers(models, tmp_path, stream):
    run = Run(job(model(models, "llava_hf"), tmp_path / "out"))
    assert run.data is not None and run.processor is not None
    theirs = LlavaForConditionalGeneration.from_pretrained(run.job.folder, dtype=torch.float32)
    embedder = Embedder(run.source, run.processor, torch.device("cpu"), stream)
    blocks = Blocks(run.source, torch.device("cpu"))
    seen = 0
    for prompt, hidden in zip(run.data.prompts, embedder.embed(run.data.prompts, 10**6), strict=True):
        ids = torch.tensor([prompt.ids])
        pixels = {}
        for slot in prompt.slots:
            ids[0, slot.start : slot.end] = theirs.config.image_token_index
            pixels = {"pixel_values": run.processor.pixels(prompt, [slot.image])}
            seen += 1
        with torch.no_grad():
            states = theirs(input_ids=ids, **pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(hidden, states[0][0], atol=1e-4, rtol=0)
        torch.testing.assert_close(blocks.run(blocks.open(0), hidden), states[1][0], atol=1e-4, rtol=0)
    assert seen == run.data.pictures > 0


def test_the_float_checkpoint_is_read_by_transformers(models, tmp_path):
    made(job(model(models), tmp_path / "out", pseudo=True))
    ours = load_model(tmp_path / "out", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert_same(ours(ids).logits, theirs(ids).logits)


# Resuming


class Cut(BaseException):
    """The process is gone: nothing of ours may catch it."""


def test_cut_off_at_every_file_the_result_is_the_same(models, tmp_path, monkeypatch):
    source = model(models)
    made(job(source, tmp_path / "whole"))
    wanted = replace(job(source, tmp_path / "out"))
    sync, left = save.sync, [0]

    def cut(path: Path) -> None:
        left[0] -= 1
        if not left[0]:
            raise Cut
        sync(path)

    monkeypatch.setattr(save, "sync", cut)
    monkeypatch.setattr(output, "sync", cut)
    for count in range(1, 400):  # each attempt gets one file further than the one before
        left[0] = count
        try:
            made(wanted, resume=True)
            break
        except Cut:
            assert not wanted.out.exists() or (wanted.out / FACTS).exists()
    assert count > 5
    assert content(wanted.out) == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def spawn(source: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tinychat", "quantize", str(source), str(out), "--group-size", "32", "--json"]
    command += ["--calib-samples", "3", "--calib-seqlen", "40", "--resume", "--threads", "1"]
    command += ["--card-samples", "1", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_layers(child: subprocess.Popen[str], count: int) -> None:
    assert child.stdout is not None
    while count and (line := child.stdout.readline()):
        count -= json.loads(line)["event"] == "layer"


def kill_and_resume(source: Path, folder: Path, kills: int, number: int) -> None:
    """Kills the command where layers are being done, again and again; then lets it finish, twice over."""
    chance = random.Random(number)
    with spawn(source, folder / "whole") as child:
        assert child.wait() == 0, child.communicate()[1]
    for _ in range(kills):
        with spawn(source, folder / "out") as child:
            wait_for_layers(child, chance.randrange(2))
            time.sleep(chance.random() / 4)
            child.send_signal(signal.SIGKILL)
    with spawn(source, folder / "out") as child:
        _, errors = child.communicate()
        assert child.returncode == 0, errors
    assert content(folder / "out") == content(folder / "whole")


@pytest.mark.timeout(900)
def test_killed_for_good_it_goes_on(models, tmp_path):
    kill_and_resume(model(models, layers=5), tmp_path, 2, 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_ten_times_it_goes_on(models, tmp_path):
    kill_and_resume(model(models, "vila", layers=8), tmp_path, 10, 1)


def test_states_on_the_disk_give_the_same_as_states_in_memory(models, tmp_path):
    source = model(models, "vila")
    made(job(source, tmp_path / "memory"))
    run = Run(job(source, tmp_path / "disk"))
    run.plan = replace(run.plan, hold=False, stream=True)
    assert isinstance([*run.events()][-1], Written)
    assert content(tmp_path / "memory") == content(tmp_path / "disk")


def begun(wanted: Job, layers: int = 1) -> None:
    """Work that was stopped after some layers."""
    events = Run(wanted).events()
    for event in events:
        if isinstance(event, LayerDone) and event.index + 1 == layers:
            break
    events.close()  # type: ignore[attr-defined]  # a generator


def test_a_result_that_stands_is_not_made_again(models, tmp_path):
    wanted = job(model(models), tmp_path / "out", method="rtn")
    facts = made(wanted)
    events = [*Run(wanted).events(resume=True)]
    assert not [event for event in events if isinstance(event, Began | LayerDone)]
    assert events[-1] == Written(wanted.out, facts)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"spec": QuantSpec(group_size=64)}, "options: group_size was 32 and is 64"),
        ({"calibration": Calibration(samples=2, seqlen=40)}, "calibration was "),
        ({"search": {**QUICK, "clip": False}}, "options: clip was True and is False"),
        ({"method": "rtn"}, "options: method was awq and is rtn"),
    ],
)
def test_other_options_are_not_mixed_in(models, tmp_path, changes, sentence):
    wanted = job(model(models), tmp_path / "out")
    begun(wanted)
    with pytest.raises(UsageError, match=f"was begun with something else: .*{sentence}"):
        made(replace(wanted, **changes), resume=True)
    assert len(Run(wanted).source.index.names()) and (wanted.partial / save.MANIFEST).exists()


def test_another_model_is_not_mixed_in(models, tmp_path):
    source = shutil.copytree(model(models), tmp_path / "model")
    wanted = job(source, tmp_path / "out")
    begun(wanted)
    index = Index.of(source)
    tensors = {name: index.get(name).clone() for name in index.names()}
    tensors["model.norm.weight"] += 1
    write_safetensors(tensors.items(), source)
    with pytest.raises(UsageError, match=r"model: model\.safetensors was [0-9a-f]{12}\.\.\. and is [0-9a-f]{12}\.\.\."):
        made(wanted, resume=True)


def test_damaged_work_is_refused(models, tmp_path):
    wanted = job(model(models), tmp_path / "out")
    begun(wanted)
    with (wanted.partial / "block-00000.safetensors").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(UsageError, match=r"block-00000\.safetensors \(block-00000\) is missing or damaged; delete "):
        made(wanted, resume=True)


# Refusals


def test_what_exists_is_not_overwritten(models, tmp_path):
    wanted = job(model(models), tmp_path / "out")
    begun(wanted)
    with pytest.raises(UsageError, match="holds the work of an earlier run; give --resume to go on with it"):
        made(wanted)
    wanted.out.mkdir()
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"out exists; give another folder to write, or remove it"):
            made(wanted, resume)
    with pytest.raises(UsageError, match="is the model itself"):
        job(wanted.folder, wanted.folder)


def test_two_runs_do_not_share_a_folder(models, tmp_path):
    wanted = job(model(models), tmp_path / "out")
    with running.locked(wanted.partial), pytest.raises(UsageError, match="another run works in"):
        made(wanted)


def test_models_that_cannot_be_quantized_are_named(models, tmp_path):
    with pytest.raises(ModelError, match=r"_proj.weight cannot be quantized: in_features=64 is not a multiple of"):
        Run(job(model(models), tmp_path / "out", spec=QuantSpec()))
    packed = make_tiny_model(tmp_path / "packed", "text", quantize=32)
    with pytest.raises(ModelError, match="is quantized to 4 bits already; give the 16-bit model"):
        Run(job(packed, tmp_path / "out"))
    with pytest.raises(UsageError, match="holds 3-bit weights; give --bits 4, or --pseudo"):
        job(packed, tmp_path / "out", spec=QuantSpec(3, 32))


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_weights_that_are_no_numbers_are_named(models, tmp_path, method):
    source = shutil.copytree(model(models), tmp_path / "model")
    index = Index.of(source)
    tensors = {name: index.get(name).clone() for name in index.names()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    write_safetensors(tensors.items(), source)
    with pytest.raises(ModelError, match=r"layer 1, mlp\.up_proj\.weight holds NaN or Inf values"):
        made(job(source, tmp_path / "out", method=method))


def test_a_full_disk_loses_nothing(models, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    wanted, whole = (job(model(models), tmp_path / name) for name in ("out", "whole"))
    made(whole)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, before[1]))  # a layer's file is larger than that
    try:
        with pytest.raises(CapacityError, match=r"the disk of .*out\.partial is full; the work so far is kept there"):
            made(wanted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not wanted.out.exists()
    made(wanted, resume=True)
    assert content(wanted.out) == content(whole.out)


def test_a_folder_that_cannot_be_written_is_named(models):
    sentence = r"/dev/null/out\.partial cannot be written or read: Not a directory; mend that, or give another folder"
    with pytest.raises(UsageError, match=sentence):
        made(job(model(models), Path("/dev/null/out")))


# The plan


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(models, tmp_path):
    source = model(models)
    for limit, sentence in (
        ({"max_ram": 2**20}, r"of memory are needed and 1\.0 MiB are allowed or free"),
        ({"max_disk": 2**10}, r"are needed on the disk of .*, 1\.0 KiB are allowed or free"),
    ):
        with pytest.raises(CapacityError, match=sentence):
            made(job(source, tmp_path / "out", **limit))
    assert not [*tmp_path.iterdir()]


def test_states_are_spilled_and_the_tower_streamed_where_memory_is_short(models, tmp_path):
    source = model(models, "vila")
    ample = Run(job(source, tmp_path / "out")).plan
    assert ample.hold and not ample.stream
    tight = Run(job(source, tmp_path / "out", max_ram=ample.ram["layers"] - 1)).plan
    assert not tight.hold


def test_work_that_is_there_needs_no_further_disk(models, tmp_path, monkeypatch):
    wanted = job(model(models), tmp_path / "out")
    needed = Run(wanted).plan.disk
    begun(wanted)
    there = sum(path.stat().st_size for path in wanted.partial.rglob("*") if path.is_file())
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - there))
    assert made(wanted, resume=True)["layers"]
    with pytest.raises(CapacityError, match="are needed on the disk"):
        made(job(model(models), tmp_path / "another"))


def test_the_plan_knows_the_size_of_the_result(models, tmp_path):
    wanted = job(model(models, "vila"), tmp_path / "out")
    run = Run(wanted)
    *_, _end = run.events()
    weights = sum(path.stat().st_size for path in wanted.out.rglob("*.safetensors"))
    assert abs(weights - run.plan.output) < 0.05 * weights + 20_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_run_keeps_to_the_plan(capfd):
    import bench_quantize_memory

    code = bench_quantize_memory.main(["--hidden-size", "512", "--intermediate-size", "1536", "--tokens", "1024"])
    assert code == 0, capfd.readouterr().out


def test_errors_are_ours(models, tmp_path):
    with pytest.raises(TinychatError, match="--method is 'gptq'; give awq or rtn"):
        job(model(models), tmp_path / "out", method="gptq")
