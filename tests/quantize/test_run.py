"""From folder to folder: what the result computes, and how runs are refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from quantize_runs import LAYERS, begun, job, made, model
from safetensors.torch import load_file, save_file
from same import assert_same
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from awq.quantize import quantize_block
from awq.recipes import recipe_for
from make_tiny_model import make_tiny_model
from tinychat.checkpoint import Index
from tinychat.config import read_config
from tinychat.core import Progress
from tinychat.errors import ModelError, TinychatError, UsageError
from tinychat.load import load, load_folder, load_model, quant_spec
from tinychat.placement import Placement
from tinychat.quantize import output
from tinychat.quantize import run as running
from tinychat.quantize.blocks import Blocks
from tinychat.quantize.embedding import Embedder
from tinychat.quantize.facts import for_card
from tinychat.quantize.layered import packed_side
from tinychat.quantize.run import Run, Written
from tinychat_kernels.layout import QuantSpec

FAMILIES = [("text", family) for family in ("llama", "mistral", "qwen2")] + [
    (layout, "llama") for layout in ("llava_hf", "llava_next", "vila", "llava")
]


# What the result computes


@pytest.mark.parametrize(("layout", "family"), FAMILIES)
def test_the_checkpoint_is_the_model_quantized_in_memory(models, tmp_path, layout, family):
    wanted = job(model(models, layout, text=family), tmp_path / "out")
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_loss_that_is_told_is_that_of_what_is_stored(models, tmp_path, dtype):
    search = {"scale_grid": 3, "clip_grid": 4, "loss_tokens": 10**6}
    run = Run(job(model(models, dtype=dtype, text="qwen2"), tmp_path / "out", search=search))
    *_, end = run.events()
    assert isinstance(end, Written) and run.data is not None and run.processor is not None
    cpu = torch.device("cpu")
    blocks, packed = Blocks(run.source, cpu), packed_side(tmp_path / "out", cpu, "")
    states = list(Embedder(run.source, run.processor, cpu, stream=False).embed(run.data.prompts, run.data.seqlen))
    for i, told in enumerate(end.facts["layers"]):
        before, after = blocks.open(i), packed.open(i)
        pairs = [(blocks.run(before, hidden), blocks.run(after, hidden)) for hidden in states]
        error = torch.cat([(x - y).square().flatten() for x, y in pairs]).mean()
        assert told["kept"] == "awq" and told["loss"]["awq"] == pytest.approx(float(error), rel=1e-5)
        states = [x for x, _ in pairs]


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


def with_value(source: Path, folder: Path, file: str, name: str, value: float) -> Path:
    """A copy of a model, one number of one tensor changed."""
    shutil.copytree(source, folder)
    path = folder / file
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})
    return folder


NO_NUMBERS = "holds values that are no finite float16 numbers; check the checkpoint's weights"
SOMEWHERE = (
    ("text", "model.safetensors", "model.layers.2.mlp.up_proj.weight", "layer 2, mlp.up_proj.weight holds NaN or Inf"),
    ("text", "model.safetensors", "model.layers.2.input_layernorm.weight", "layer 2, input_layernorm.weight holds NaN"),
    ("text", "model.safetensors", "model.embed_tokens.weight", f"model.embed_tokens.weight {NO_NUMBERS}"),
    ("text", "model.safetensors", "lm_head.weight", f"lm_head.weight {NO_NUMBERS}"),
    ("text", "model.safetensors", "model.norm.weight", f"model.norm.weight {NO_NUMBERS}"),
    ("vila", "mm_projector/model.safetensors", "layers.2.bias", f"layers.2.bias {NO_NUMBERS}"),
    (
        "vila",
        "vision_tower/model.safetensors",
        "vision_model.encoder.layers.1.mlp.fc1.weight",
        f"encoder.layers.1.mlp.fc1.weight {NO_NUMBERS}",
    ),
)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(("layout", "file", "name", "words"), SOMEWHERE, ids=[row[2] for row in SOMEWHERE])
def test_weights_that_are_no_numbers_are_refused_before_the_work(models, tmp_path, layout, file, name, words, value):
    source = with_value(model(models, layout), tmp_path / "model", file, name, value)
    with pytest.raises(ModelError, match=re.escape(words)):
        for event in Run(job(source, tmp_path / "out", method="rtn")).events():
            assert isinstance(event, Progress) and event.stage == "check"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_float16_cannot_hold_is_refused_before_the_work(models, tmp_path):
    wide = model(models, "text", dtype="float32")
    source = with_value(wide, tmp_path / "model", "model.safetensors", "model.norm.weight", 1e6)
    with pytest.raises(ModelError, match=f"^model.norm.weight {NO_NUMBERS}, or store the model as bfloat16 first"):
        made(job(source, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_are_checked_once(models, tmp_path):
    wanted = job(model(models), tmp_path / "out", method="rtn")
    stages = [[e.stage for e in Run(wanted).events(resume) if isinstance(e, Progress)] for resume in (False, True)]
    assert stages[0].count("check") == len(Index.of(wanted.folder).names()) and "check" not in stages[1]


def test_a_folder_that_cannot_be_written_is_named(models):
    sentence = r"/dev/null/out\.partial cannot be written or read: Not a directory; mend that, or give another folder"
    with pytest.raises(UsageError, match=sentence):
        made(job(model(models), Path("/dev/null/out")))


def test_errors_are_ours(models, tmp_path):
    with pytest.raises(TinychatError, match="--method is 'gptq'; give awq or rtn"):
        job(model(models), tmp_path / "out", method="gptq")
