#!/usr/bin/env python3
"""Prove that a real checkpoint is read rightly: its keys, its sizes, and its greedy tokens against transformers.

    scripts/verify_checkpoint.py MODEL [--dtype float32] [--tokens 16] [--keys-only]

MODEL is a folder or a hub id. Both models are run one after the other, so memory for one of them suffices. The output
ends with a block to paste into an issue. Exit code 0: nothing is wrong; 3: something is.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import tinychat
from tinychat import load, planner
from tinychat.checkpoint import KeyReport, compare, rename
from tinychat.config import VilaConfig, read_config
from tinychat.errors import CapacityError, ModelError, TinychatError
from tinychat.terminal.clean import clean_line
from tinychat.tiling import Tiles

TEXT = "The three primary colours are red, yellow and"
PART = " (the decoder alone; tower and projector by their names and shapes)"
LISTED = 10
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
CLOSE = 1e-3  # of the logits' spread, in float32; 16-bit types are given 50 times that
VERDICTS = {True: "right", False: "WRONG", None: "names and shapes are right, numbers were not compared"}
Row = tuple[str, str]


@dataclass(frozen=True)
class Greedy:
    """Tokens chosen one after the other, the logits before each `[steps, V]`, by ours or by transformers."""

    tokens: list[int]
    logits: Tensor


@dataclass(frozen=True)
class Subject:
    """What both models are given: prompt ids `[1, T]`, and for a vision model pixels where the placeholders stand."""

    ids: Tensor
    pixels: Tensor | Tiles | None
    start: int
    end: int

    def for_transformers(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The pixels by transformers' names, tiles with the picture's size."""
        if isinstance(self.pixels, Tiles):
            sizes = torch.tensor(self.pixels.sizes)
            return {"pixel_values": torch.stack(self.pixels.pixels).to(dtype), "image_sizes": sizes}
        return {} if self.pixels is None else {"pixel_values": self.pixels.to(dtype)}


def key_rows(report: KeyReport, on_disk: int) -> Iterator[Row]:
    """The key report as rows, each list cut."""
    bad = len(report.unexpected) + len(report.duplicate)
    yield "tensors on disk", str(on_disk)
    yield "found", str(len(report.found))
    yield "not needed", str(max(0, on_disk - len(report.found) - bad))
    for kind in ("missing", "unexpected", "duplicate", "misshapen"):
        names = getattr(report, kind)
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        yield kind, f"{len(names)}" + (f": {', '.join(names[:LISTED])}{more}" if names else "")


def config_rows(config: VilaConfig) -> Iterator[Row]:
    """What the config was read as."""
    text, vision, projector = config.text, config.vision, config.projector
    heads = f"{text.num_attention_heads}/{text.num_key_value_heads} heads"
    layers = f"{text.num_hidden_layers} layers of {text.hidden_size}"
    yield "layout", config.layout
    yield "decoder", f"{text.family}, {layers}, {heads}, {text.vocab_size} tokens"
    yield "positions", f"rope {text.rope.type}, theta {text.rope.theta:g}, up to {text.max_position_embeddings}"
    if vision is not None and projector is not None:
        layers = f"{vision.num_hidden_layers} layers of {vision.hidden_size}"
        patches = f"{vision.image_size} pixels in patches of {vision.patch_size}"
        yield "tower", f"{vision.family}, {layers}, hidden state {vision.select_layer}"
        yield "projector", f"{projector.type}" + (f", read by {projector.token_order}s" if projector.block > 1 else "")
        most = "at most " if config.tiling is not None else ""
        yield "tokens a picture", f"{most}{config.tokens_per_image} ({patches})"


def is_decoder_alone(source: load.Source) -> bool:
    """Whether transformers has no class for the whole: VILA and original LLaVA folders, 4-bit weights on a CPU."""
    return source.spec is not None or source.config.layout in ("vila", "llava")


def subject(source: load.Source) -> Subject:
    """A sentence, and where transformers reads the vision part too a picture of noise before it."""
    folder, config = source.folder, source.config
    home = folder / "llm" if (folder / "llm").is_dir() else folder
    words = transformers.AutoTokenizer.from_pretrained(home, trust_remote_code=False)
    ids = words(TEXT, return_tensors="pt")["input_ids"]
    if is_decoder_alone(source) or config.vision is None or config.image_token_id is None:
        return Subject(ids, None, 0, 0)
    side, tiling = config.vision.image_size, config.tiling
    size = (side, 2 * side - 1)
    count = config.tokens_per_image if tiling is None else tiling.tokens(size)
    squares = 1 if tiling is None else tiling.tiles(size)
    slot = torch.full((1, count), config.image_token_id)
    pixels = torch.randn(squares, 3, side, side, generator=torch.Generator().manual_seed(0))
    if tiling is not None:
        return Subject(torch.cat((ids[:, :1], slot, ids[:, 1:]), 1), Tiles((pixels,), (size,)), 1, 1 + count)
    return Subject(torch.cat((ids[:, :1], slot, ids[:, 1:]), 1), pixels, 1, 1 + count)


@torch.inference_mode()
def by_ours(source: load.Source, dtype: torch.dtype, what: Subject, steps: int) -> Greedy:
    model = load.assemble(source, load.Placement(dtype, "cpu", exact=True, head="float"))
    features = [] if what.pixels is None else list(model.encode_images(what.pixels.to(dtype)))
    slots = [(what.start, what.end)] if features else []
    cache = model.make_cache(1, what.ids.shape[1] + steps)
    logits = model.prefill(model.embed(what.ids[0], slots, features), cache, 0)
    return _greedy(logits, lambda token: model.decode(token, cache), steps)


@torch.inference_mode()
def by_transformers(source: load.Source, dtype: torch.dtype, what: Subject, steps: int) -> Greedy:
    model = their_model(source, dtype).eval()
    out = model(input_ids=what.ids, use_cache=True, **what.for_transformers(dtype))
    cache = out.past_key_values

    def decode(token: Tensor) -> Tensor:
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits

    return _greedy(out.logits[:, -1:], decode, steps)


def their_model(source: load.Source, dtype: torch.dtype) -> Any:
    """As transformers loads it; where it cannot load the folder itself, its decoder with the folder's tensors."""
    layout = source.config.layout
    if source.spec is not None or layout == "llava":
        return their_decoder(source, dtype)
    kinds = {"llava_hf": transformers.LlavaForConditionalGeneration}
    kind = kinds.get(layout, transformers.AutoModelForCausalLM)
    if layout == "llava_hf" and source.config.tiling is not None:
        kind = transformers.LlavaNextForConditionalGeneration
    folder = source.folder / "llm" if layout == "vila" else source.folder
    return kind.from_pretrained(folder, dtype=dtype, trust_remote_code=False)


def their_decoder(source: load.Source, dtype: torch.dtype) -> Any:
    """transformers' class of the decoder, filled by the tensors as they are on disk, 4-bit ones dequantized here."""
    raw = {name: value for name, value in (source.config.llm_cfg or {}).items() if name != "quantization_config"}
    config = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.load_state_dict(dict(decoder_tensors(source, dtype)), strict=False, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    if empty := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise ModelError(f"transformers' {type(model).__name__} gets no {', '.join(empty)}", "report it")
    return model


def decoder_tensors(source: load.Source, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The decoder's float tensors by transformers' names."""
    for name in source.index.names():
        base, _, kind = name.rpartition(".")
        if not name.startswith("llm.") or kind in ("qzeros", "scales"):
            continue
        if kind == "qweight":
            parts = (source.index.get(f"{base}.{part}") for part in ("qweight", "qzeros", "scales"))
            yield f"{base}.weight".removeprefix("llm."), unpacked(*parts).to(dtype)
        else:
            yield name.removeprefix("llm."), source.index.get(name).to(dtype)


def unpacked(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """AWQ GEMM `[K, N / 8]`, `[K / group, N / 8]`, `[K / group, N]` -> float32 `[N, K]`, apart from the runtime's code.

    An int32 holds eight columns, from its lowest four bits on those of NIBBLES.
    """
    rows, columns = qweight.shape[0], 8 * qweight.shape[1]

    def columns_of(packed: Tensor) -> Tensor:
        out = torch.empty(packed.shape[0], packed.shape[1], 8)
        for at, column in enumerate(NIBBLES):
            out[..., column] = ((packed >> 4 * at) & 15).float()
        return out.reshape(-1, columns)

    times = rows // scales.shape[0]
    zeros, steps = (part.repeat_interleave(times, 0) for part in (columns_of(qzeros), scales.float()))
    return ((columns_of(qweight) - zeros) * steps).T.contiguous()


def _greedy(logits: Tensor, decode: Callable[[Tensor], Tensor], steps: int) -> Greedy:
    rows: list[Tensor] = []
    tokens: list[int] = []
    while True:
        rows.append(logits[0, -1].float())
        tokens.append(int(rows[-1].argmax()))
        if len(tokens) == steps:
            return Greedy(tokens, torch.stack(rows))
        logits = decode(torch.tensor([[tokens[-1]]]))


def agreement(ours: Greedy, theirs: Greedy, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the logits agree as far as the tokens do, and how far that is, in words.

    A different token is no fault where transformers' own two best stand closer together than the tolerance.
    """
    pairs = zip(ours.tokens, theirs.tokens, strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours.tokens))
    seen = min(same + 1, len(ours.tokens))  # the step of the first difference still had the same input
    spread = float(theirs.logits[:seen].std())
    worst = float((ours.logits[:seen] - theirs.logits[:seen]).abs().max()) / spread
    tolerance = CLOSE * (1 if dtype == torch.float32 else 50)
    good = worst <= tolerance
    words = f"{same} of {len(ours.tokens)} greedy tokens equal, logits differ by {worst:.1e} of their spread"
    if good and same < len(ours.tokens):
        words += " (a near tie, then another text)"
    return good, words


def comparison(source: load.Source, dtype: torch.dtype, steps: int) -> tuple[bool | None, str]:
    """Run both; None and the reason where they cannot be compared."""
    what = subject(source)
    try:
        need = planner.weights_bytes(source.index, dtype, source.spec is not None)
        length = what.ids.shape[1] + steps
        planner.check(planner.Need(source.config, need, dtype), length)
    except CapacityError as error:
        return None, f"not run: {error.message}"
    ours = by_ours(source, dtype, what, steps)
    gc.collect()
    good, words = agreement(ours, by_transformers(source, dtype, what, steps), dtype)
    blind = what.pixels is None and source.config.vision is not None
    return good, words + (PART if blind else "")


def verify(name: str, args: argparse.Namespace) -> tuple[bool | None, list[Row]]:
    """Every row of the report, and whether all is well; None where only names and shapes were looked at."""
    folder = load.resolve(name, args.revision)
    config = read_config(folder)
    index = load.open_index(folder, config)
    spec = load.quant_spec(config, index)
    rows = list(config_rows(config))
    rows.append(("weights", f"4-bit AWQ, groups of {spec.group_size}" if spec else "float"))
    packed = {rename(name, config.layout) for name in load.packed_linears(index)}
    int8 = load.int8_linears(config, index.renamed(config.layout))
    report = compare(load.empty_model(config, torch.float32, spec, packed, int8), index, config.layout)
    rows += key_rows(report, len(index.names()))
    wrong = report.missing or report.unexpected or report.duplicate or report.misshapen
    good = False if wrong else None
    if not wrong and not args.keys_only:
        source = load.open_source(folder)
        dtype = load.choose_dtype(source, args.dtype, torch.device("cpu"))
        good, words = comparison(source, dtype, args.tokens)
        rows += [("dtype", str(dtype).removeprefix("torch.")), ("against transformers", words)]
    return good, rows


def block(name: str, good: bool | None, rows: list[Row]) -> str:
    """The report as text to paste."""
    versions = f"tinychat {tinychat.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    machine = f"Python {platform.python_version()}, {platform.machine()}"
    shown = Path(name).name if Path(name).exists() else name  # a local path is nobody's business
    lines = [("model", shown), *rows, ("versions", f"{versions}, {machine}"), ("verdict", VERDICTS[good])]
    width = max(len(label) for label, _ in lines)
    return "\n".join(["```", *(f"{label:{width}}  {clean_line(text)}" for label, text in lines), "```"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("--revision", help="of the hub id")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as the checkpoint says)")
    parser.add_argument("--tokens", type=int, default=16, help="greedy tokens to compare (%(default)s)")
    parser.add_argument("--keys-only", action="store_true", help="compare names and shapes, read no weights")
    args = parser.parse_args(argv)
    try:
        good, rows = verify(args.model, args)
    except TinychatError as error:
        print(clean_line(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    print(block(args.model, good, rows))
    return 3 if good is False else 0


if __name__ == "__main__":
    sys.exit(main())
