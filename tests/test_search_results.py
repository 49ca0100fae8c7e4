"""llm-awq's search results: scales change no answer, clips bound the weights, and another model's are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny import ids, text_pair
from torch import Tensor

from make_tiny_model import make_tiny_model
from tinychat import cli
from tinychat.checkpoint import Index
from tinychat.errors import FormatError, ModelError, UsageError
from tinychat.load import load_model
from tinychat.models.vila_llama import VilaLlamaForCausalLM
from tinychat.quantize.job import Calibration, Job
from tinychat.quantize.run import LayerDone, Run, Written
from tinychat.search_results import apply_search, check_search, read_search
from tinychat_kernels.layout import QuantSpec

LAYER = "model.layers.1"
WIDTH, INNER = 64, 96
SPEC = QuantSpec(group_size=32)
Scales = list[tuple[str, tuple[str, ...], Tensor]]


def factors(size: int) -> Tensor:
    return 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(size))


def scales(layer: str = LAYER, prefix: str = "", v_to_o: bool = False) -> Scales:
    """As llm-awq has them for a Llama; without v -> o where few key heads serve many."""
    at = f"{prefix}{layer}"
    attention = tuple(f"{at}.self_attn.{name}_proj" for name in "qkv")
    mlp = (f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj")
    values = [(f"{at}.self_attn.v_proj", (f"{at}.self_attn.o_proj",), factors(WIDTH).flip(0))]
    return [
        (f"{at}.input_layernorm", attention, factors(WIDTH)),
        *(values if v_to_o else []),
        (f"{at}.post_attention_layernorm", mlp, factors(WIDTH)),
        (f"{at}.mlp.up_proj", (f"{at}.mlp.down_proj",), factors(INNER)),
    ]


def both_layers() -> Scales:
    return scales("model.layers.0") + scales()


def saved(tmp_path: Path, **content: object) -> Path:
    path = tmp_path / "search.pt"
    torch.save({"scale": both_layers(), "clip": [], **content}, path)
    return path


def applied(model: VilaLlamaForCausalLM, path: Path, spec: QuantSpec = SPEC) -> None:
    found = read_search(path)
    check_search(found, model, 2, spec)
    apply_search(found, model)


@pytest.fixture
def model() -> VilaLlamaForCausalLM:
    return text_pair("llama", mlp_bias=True)[1]


@torch.no_grad()
def test_scales_change_the_weights_and_not_the_answer(tmp_path: Path, model: VilaLlamaForCausalLM) -> None:
    prompt = ids(1, 12)
    before, weight = model(input_ids=prompt).logits, model.llm.model.layers[1].mlp.down_proj.weight.clone()
    applied(model, saved(tmp_path))
    assert torch.allclose(model(input_ids=prompt).logits, before, atol=1e-5)
    assert torch.allclose(model.llm.model.layers[1].mlp.down_proj.weight, weight * factors(INNER))


def test_clips_bound_each_group(tmp_path: Path, model: VilaLlamaForCausalLM) -> None:
    weight = model.llm.model.layers[0].self_attn.o_proj.weight
    before = weight.detach().clone().reshape(WIDTH, 2, 32)
    bounds = before.abs().amax(2, keepdim=True) * 0.6
    applied(model, saved(tmp_path, clip=[("model.layers.0.self_attn.o_proj", bounds)]))
    after = weight.detach().reshape(WIDTH, 2, 32)
    assert torch.equal(after, before.clamp(-bounds, bounds)) and not torch.equal(after, before)


def test_scales_come_before_clips(tmp_path: Path, model: VilaLlamaForCausalLM) -> None:
    name = f"{LAYER}.mlp.down_proj"
    weight = model.llm.model.layers[1].mlp.down_proj.weight
    wanted = (weight.detach() * factors(INNER)).clamp(-0.01, 0.01)
    applied(model, saved(tmp_path, clip=[(name, torch.full((WIDTH, 3, 1), 0.01))]))
    assert torch.allclose(weight, wanted)


def test_names_become_ours(tmp_path: Path) -> None:
    found = read_search(saved(tmp_path, scale=scales()))
    assert found.scales[0][0] == "llm.model.layers.1.input_layernorm"
    assert found.scales[2][1] == ("llm.model.layers.1.mlp.down_proj",)


def test_a_layer_s_own_are_named_from_there(tmp_path: Path) -> None:
    clip = [(f"{LAYER}.mlp.up_proj", torch.ones(96, 2, 1))]
    found = read_search(saved(tmp_path, clip=clip)).within("llm.model.layers.1.")
    assert [name for name, *_ in found.scales] == ["input_layernorm", "post_attention_layernorm", "mlp.up_proj"]
    assert found.scales[2][1] == ("mlp.down_proj",) and found.clips[0][0] == "mlp.up_proj"
    assert not read_search(saved(tmp_path, clip=clip)).within("llm.model.layers.0.").clips


UP = f"{LAYER}.mlp.up_proj"
REFUSED: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"scale": [("model.norm",)]}, FormatError, "holds no search results of llm-awq"),
    ({"clip": None}, FormatError, "a dict of the lists scale and clip"),
    ({"clip": [("model.norm", 3.0)]}, FormatError, "factors that are no finite tensors"),
    ({"clip": [("model.norm", torch.tensor(float("nan")))]}, FormatError, "factors that are no finite tensors"),
    ({"clip": [("model.layers.7.mlp.up_proj", torch.ones(96, 1, 1))]}, ModelError, "layers.7.mlp.up_proj, which"),
    ({"clip": [("model.norm", torch.ones(64, 1, 1))]}, ModelError, "llm.model.norm, which is no linear layer"),
    ({"clip": [("lm_head", torch.ones(99, 2, 1))]}, ModelError, "tie llm.lm_head, which lie not in one layer"),
    ({"clip": [("model.layers.0.mlp", torch.ones(64, 1, 1))]}, ModelError, "layers.0.mlp, which has no float"),
    (
        {"clip": [(UP, torch.ones(64, 1, 1))]},
        ModelError,
        r"bounds \[64, 1, 1\] for llm.model.layers.1.mlp.up_proj of 96x64",
    ),
    ({"clip": [(UP, -torch.ones(96, 2, 1))]}, ModelError, "clip llm.model.layers.1.mlp.up_proj at bounds below 0"),
    (
        {"clip": [(UP, torch.ones(96, 1, 1))]},
        ModelError,
        "up_proj in 1 groups a row, 2 are asked for; give --group-size -1, which they were searched for",
    ),
    (
        {"scale": [(f"{LAYER}.self_attn.v_proj", (f"{LAYER}.self_attn.o_proj",), factors(WIDTH))]},
        ModelError,
        "64 factors for llm.model.layers.1.self_attn.v_proj, llm.model.layers.1.self_attn.v_proj has 32",
    ),
    (
        {"scale": [(f"{LAYER}.input_layernorm", (f"{LAYER}.self_attn.q_proj",), torch.zeros(WIDTH))]},
        ModelError,
        "divide llm.model.layers.1.input_layernorm by 0",
    ),
    (
        {"scale": [("model.layers.0.input_layernorm", (f"{LAYER}.self_attn.q_proj",), factors(WIDTH))]},
        ModelError,
        "which lie not in one layer",
    ),
    ({"scale": scales()}, ModelError, "have no scales for 1 of 2 layers: 0; take the search results of this very"),
]


@pytest.mark.parametrize(("content", "kind", "words"), REFUSED)
def test_what_is_not_this_model_s_is_refused_before_anything_is_changed(
    tmp_path: Path, model: VilaLlamaForCausalLM, content: dict[str, object], kind: type[Exception], words: str
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=words):
        applied(model, saved(tmp_path, **content))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_file_with_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"scale": [Path("x")], "clip": []}, tmp_path / "search.pt")
    with pytest.raises(FormatError, match="needs more than tensors to be read"):
        read_search(tmp_path / "search.pt")


# tinychat quantize --search-results


def by_hand(weights: dict[str, Tensor], content: dict[str, Any], group: int) -> None:
    """llm-awq's apply_scale, apply_clip and pseudo_quantize_tensor in float32, as its formulas are written down.

    Its groups have values of both signs here: else its range would leave out zero.
    """
    for previous, names, s in content["scale"]:
        weight = weights[f"{previous}.weight"]
        weights[f"{previous}.weight"] = weight / (s if weight.ndim == 1 else s[:, None])
        for name in names:
            weights[f"{name}.weight"] = weights[f"{name}.weight"] * s
    for name, bounds in content["clip"]:
        weight = weights[f"{name}.weight"]
        groups = weight.reshape(*bounds.shape[:2], -1)
        weights[f"{name}.weight"] = groups.clamp(-bounds, bounds).reshape(weight.shape)
    for name, weight in weights.items():
        if "_proj" not in name:
            weights[name] = weight.half().float()
            continue
        groups = weight.reshape(-1, group)
        top, low = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
        assert bool((top > 0).all() and (low < 0).all())
        scale = ((top - low).clamp(min=1e-5) / 15).half().float()
        zero = (-torch.round(low / scale)).clamp(0, 15)
        q = torch.clamp(torch.round(groups / scale) + zero, 0, 15)
        weights[name] = ((q - zero) * scale).reshape(weight.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", "text", dtype="float16")


def found_in(folder: Path) -> dict[str, Any]:
    """What a search of this model might have found: fp16 tensors, clips that bite."""
    index = Index.of(folder)
    content: dict[str, Any] = {"scale": [], "clip": []}
    for i in range(2):
        layer = f"model.layers.{i}"
        content["scale"] += [(p, n, s.half()) for p, n, s in sized(index, layer)]
        for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            groups = index.get(f"{layer}.{name}.weight").float().unflatten(1, (-1, 32))
            content["clip"].append((f"{layer}.{name}", (groups.abs().amax(2, keepdim=True) * 0.7).half()))
    return content


def sized(index: Index, layer: str) -> Scales:
    """Scales whose widths are those of the model."""
    wide = index.shape(f"{layer}.mlp.down_proj.weight")[1]
    whole = index.shape(f"{layer}.self_attn.v_proj.weight") == index.shape(f"{layer}.self_attn.o_proj.weight")
    known = scales(layer, v_to_o=whole)
    return [(p, n, factors(wide if p.endswith("up_proj") else index.shape(f"{n[0]}.weight")[1])) for p, n, _ in known]


def job(folder: Path, out: Path, results: Path, **changes: Any) -> Job:
    return Job(folder, out, **{"spec": SPEC, "search_results": results, "card": False, **changes})


def made(wanted: Job, resume: bool = False) -> dict[str, Any]:
    *_, end = Run(wanted).events(resume)
    assert isinstance(end, Written)
    return end.facts


@pytest.mark.parametrize(("pseudo", "kv_heads"), [(False, 2), (True, 4)])
def test_a_checkpoint_is_rounded_as_they_say(tmp_path: Path, pseudo: bool, kv_heads: int) -> None:
    folder = make_tiny_model(tmp_path / "model", "text", dtype="float16", kv_heads=kv_heads)
    content = found_in(folder)
    assert len(content["scale"]) == (8 if kv_heads == 4 else 6)
    facts = made(job(folder, tmp_path / "out", saved(tmp_path, **content), pseudo=pseudo))
    index = Index.of(folder)
    weights = {n: index.get(n).float() for n in index.names() if "layers." in n}
    by_hand(weights, {key: [(*row[:-1], row[-1].float()) for row in rows] for key, rows in content.items()}, 32)
    made_of = load_model(tmp_path / "out", dtype=torch.float32, device="cpu")
    if not pseudo:
        from tinychat import load

        load.dequantize(made_of, torch.float32)
    state = made_of.state_dict()
    for name, wanted in weights.items():
        far = (state[f"llm.{name}"] - wanted).abs() / wanted.abs().max()
        ties = int((far > (1e-3 if pseudo else 1e-6)).sum())  # llm-awq rounds before it adds the zero point, we after
        assert ties <= 2 and float(far.max()) < 2.1 / 15, name
    assert facts["options"]["search_results"] == "search.pt" and facts["calibration"] is None
    assert [layer["kept"] for layer in facts["layers"]] == ["given", "given"] and facts["fallbacks"] == []
    assert facts["fingerprint"]["model"]["search results"]


@pytest.mark.parametrize("layout", ["llava_hf", "vila", "llava"])
def test_layouts_with_pictures_take_the_decoder_s(tmp_path: Path, layout: str) -> None:
    source = make_tiny_model(tmp_path / "model", layout, dtype="float16")
    text = load_model(source, device="cpu").llm.state_dict()
    at = {"llava_hf": "language_model.", "vila": "llm.", "llava": ""}[layout]
    rows = [scales(f"model.layers.{i}", at) for i in range(2)]
    fitted = [(p, n, factors(text[f"{n[0].removeprefix(at)}.weight"].shape[1])) for layer in rows for p, n, _ in layer]
    made(job(source, tmp_path / "out", saved(tmp_path, scale=fitted)))
    norm = "layers.0.input_layernorm.weight"
    before, after = (load_model(path, device="cpu").llm.model.state_dict()[norm] for path in (source, tmp_path / "out"))
    assert torch.allclose(after, before / fitted[0][2], rtol=1e-3)


def test_other_results_are_not_mixed_in(folder: Path, tmp_path: Path) -> None:
    content = found_in(folder)
    wanted = job(folder, tmp_path / "out", saved(tmp_path, **content))
    events = Run(wanted).events()
    assert any(isinstance(event, LayerDone) for event in events)
    events.close()  # type: ignore[attr-defined]  # a generator
    saved(tmp_path, **{**content, "clip": []})
    with pytest.raises(UsageError, match="model: search results was [0-9a-f]{12}... and is "):
        made(wanted, resume=True)
    saved(tmp_path, **content)
    made(wanted, resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "rtn"}, "scaled and clipped, and --method rtn is given as well; give one of the two"),
        ({"search": {"scale_grid": 3}}, "and --scale-grid is given as well"),
        ({"calibration": Calibration(("a.txt",))}, "and --calib is given as well"),
    ],
)
def test_what_would_have_no_say_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        job(tmp_path / "in", tmp_path / "out", tmp_path / "search.pt", **changes)


def test_the_command(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, **found_in(folder))
    args = ["quantize", str(folder), str(tmp_path / "out"), "--group-size", "32", "--search-results"]
    assert cli.main([*args, str(path)]) == 0
    out, err = capfd.readouterr()
    assert "layer 1 of 2: scaled and clipped as the search results say, rounded to the nearest, " in err
    assert "2 layers in " in out
    assert json.loads((tmp_path / "out" / "quantize.json").read_text())["options"]["search_results"] == "search.pt"
    assert cli.main([*args, str(tmp_path / "none.pt")]) == 2
    assert "there is no file" in capfd.readouterr().err
    assert cli.main([*args, str(folder / "config.json")]) == 3
    assert "config.json needs more than tensors to be read" in capfd.readouterr().err
