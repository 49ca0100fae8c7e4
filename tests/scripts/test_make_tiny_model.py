"""The folders that make_tiny_model writes: transformers loads what it knows, our config and checkpoint the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    SiglipVisionModel,
)

import make_tiny_model as script
from make_tiny_model import IMAGE, Shape, main, make_tiny_model
from tinychat.checkpoint import Index, open_model
from tinychat.config import read_config, read_json
from tinychat.errors import UsageError
from tinychat_kernels.layout import AwqGemm, QuantSpec, dequantize, to_logical


def loads_whole(kind, folder: Path) -> torch.nn.Module:
    """Load by transformers; nothing may be missing, left over or of another shape."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert {name: list(found) for name, found in report.items() if found} == {}
    return model


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_the_text_layout(tmp_path, text, tied):
    model = loads_whole(AutoModelForCausalLM, make_tiny_model(tmp_path, "text", text=text, tied=tied))
    logits = model(torch.arange(12)[None]).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1
    assert read_config(tmp_path).text.family == text


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_transformers_loads_the_llava_layout_and_its_processor(tmp_path, vision):
    model = loads_whole(LlavaForConditionalGeneration, make_tiny_model(tmp_path, "llava_hf", vision=vision))
    processor = AutoProcessor.from_pretrained(tmp_path)
    pixels = torch.zeros(3, 40, 60, dtype=torch.uint8)
    inputs = processor(text=f"{IMAGE}\nWhat is this?", images=pixels, return_tensors="pt")
    assert (inputs["input_ids"] == 259).sum() == read_config(tmp_path).tokens_per_image == 16
    assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize(("height", "width"), [(40, 60), (1, 1000), (198, 176)])
def test_transformers_loads_the_llava_next_layout_and_its_processor(tmp_path, vision, height, width):
    model = loads_whole(LlavaNextForConditionalGeneration, make_tiny_model(tmp_path, "llava_next", vision=vision))
    processor = AutoProcessor.from_pretrained(tmp_path)
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    inputs = processor(text=f"{IMAGE}\nWhat is this?", images=pixels, return_tensors="pt")
    tiling = read_config(tmp_path).tiling
    assert tiling is not None
    assert (inputs["input_ids"] == 259).sum() == tiling.tokens((height, width))
    assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize(("vision", "kind"), [("clip", CLIPVisionModel), ("siglip", SiglipVisionModel)])
@pytest.mark.parametrize("layout", ["vila", "llava"])
def test_transformers_loads_the_parts_of_the_other_layouts(tmp_path, layout, vision, kind):
    make_tiny_model(tmp_path, layout, vision=vision)
    loads_whole(kind, tmp_path / "vision_tower")
    assert AutoImageProcessor.from_pretrained(tmp_path / "vision_tower") is not None
    if layout == "vila":
        loads_whole(AutoModelForCausalLM, tmp_path / "llm")


PROJECTORS = ["linear", "mlp2x_gelu", "mlp3x_gelu", *script.DOWNSAMPLE]


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("layout", ["vila", "llava"])
def test_projectors_get_our_names(tmp_path, layout, projector):
    make_tiny_model(tmp_path, layout, projector=projector, vision="siglip")
    config = read_config(tmp_path)
    assert config.layout == layout
    config.vision_tower_cfg = read_json(tmp_path / "vision_tower" / "config.json")
    assert config.projector is not None
    assert config.projector.type == projector
    tower = tmp_path / "vision_tower" if layout == "llava" else None
    names = open_model(tmp_path, layout, tower).renamed(layout).names()
    assert "mm_projector.layers.weight" not in names
    assert sum(name.startswith("mm_projector.layers.") for name in names) >= 2


@pytest.mark.parametrize("layout", ["vila", "llava", "llava_hf", "llava_next", "text"])
def test_the_tokenizer_chats(tmp_path, layout):
    make_tiny_model(tmp_path, layout)
    words = AutoTokenizer.from_pretrained(tmp_path / "llm" if layout == "vila" else tmp_path)
    text = "Grüße, 世界 🙂\n  <b>"
    assert words.decode(words.encode(text, add_special_tokens=False)) == text
    ids = words.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    assert ids[0] == words.convert_tokens_to_ids("<|im_start|>")
    assert words.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (IMAGE in words.get_vocab()) == (layout in ("llava_hf", "llava_next"))


def test_the_seed_makes_the_model(tmp_path):
    first, again, other = (make_tiny_model(tmp_path / name, "text", seed=len(name)) for name in ("a", "b", "cc"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(Index.of(first).get(name), Index.of(again).get(name))
    assert not torch.equal(Index.of(first).get(name), Index.of(other).get(name))


def test_large_tensors_repeat_a_block(monkeypatch):
    monkeypatch.setattr(script, "BLOCK", 15)
    drawn = script.draw("w", (8, 5), script.Recipe(0, torch.float32, None, 1)).flatten()
    assert torch.equal(drawn[:15], drawn[15:30])
    assert len(set(drawn[:15].tolist())) == 15


@pytest.mark.parametrize("layout", ["vila", "llava", "llava_hf", "text"])
def test_quantized_linears_stand_for_the_float_ones(tmp_path, layout):
    changes = {"hidden_size": 128, "heads": 4, "kv_heads": 4, "tied": False}
    plain = make_tiny_model(tmp_path / "plain", layout, **changes)
    packed = make_tiny_model(tmp_path / "packed", layout, quantize=64, **changes)
    float_index, index = (open_model(folder, layout).renamed(layout) for folder in (plain, packed))
    base = "llm.model.layers.1.mlp.down_proj"
    parts = AwqGemm(*(index.get(f"{base}.{name}") for name in AwqGemm._fields))
    weight = dequantize(to_logical(parts, QuantSpec(group_size=64)), torch.float32)
    wanted = float_index.get(f"{base}.weight")
    assert (weight - wanted).abs().max() < 0.55 * parts.scales.max()
    assert sum(name.endswith("qweight") for name in index.names()) == 14
    where = packed / "llm" if layout == "vila" else packed
    assert json.loads((where / "config.json").read_text())["quantization_config"]["group_size"] == 64


def test_from_the_command_line(tmp_path, capsys):
    main([str(tmp_path), "--layout", "text", "--layers", "1", "--tied", "--dtype", "bfloat16"])
    assert capsys.readouterr().out == f"wrote {tmp_path}: random weights, 0.1 MiB\n"
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert "model.layers.1.mlp.up_proj.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_large_shapes_are_as_large_as_they_say():
    for name, low, high in (("1b", 1.1e9, 1.6e9), ("3b", 2.5e9, 3.2e9), ("8b", 8e9, 8.6e9)):
        shape = script.SHAPES[name]
        parts = (script.decoder_tensors(shape), script.tower_tensors(shape), script.projector_tensors(shape))
        assert low < sum(torch.Size(dims).numel() for part in parts for _, dims in part) < high


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(UsageError, match="vocab_size is 200; give a larger one"):
        make_tiny_model(tmp_path, "text", vocab_size=200)
    with pytest.raises(UsageError, match="the projector is linear; the layout llava_hf knows mlp2x_gelu alone"):
        make_tiny_model(tmp_path, "llava_hf", projector="linear")
    with pytest.raises(TypeError, match="widht"):
        make_tiny_model(tmp_path, "text", widht=3)
    with pytest.raises(UsageError, match="null/model cannot be made: Not a directory; give another folder"):
        make_tiny_model(Path("/dev/null/model"), "text")
    assert Shape().head_dim == 16


@pytest.mark.parametrize(
    "flags", [["--quantize", "48"], ["--text", "foo"], ["--vision", "dino"], ["--projector", "x"], ["--layers", "0"]]
)
def test_a_wrong_choice_is_named(tmp_path, capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "model"), *flags])
    assert f"error: argument {flags[0]}: invalid" in capsys.readouterr().err


def test_groups_that_do_not_divide_are_one_line_and_nothing_is_written(tmp_path, capsys):
    assert main([str(tmp_path / "model"), "--quantize", "128"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ") and "64" in err and "128" in err
    assert not (tmp_path / "model").exists()
