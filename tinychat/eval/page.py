"""How a card is shown and kept: quality.json, a part of README.md, a table in the terminal."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.errors import FormatError, TinychatError
from tinychat.eval import probes

if TYPE_CHECKING:
    from tinychat.eval.card import Card, Column
    from tinychat.eval.divergence import Divergence, Estimate
    from tinychat.eval.fidelity import LayerFidelity
    from tinychat.eval.probes import ProbeScore

SCHEMA = "tinychat.card/1"
FILE, README = "quality.json", "README.md"
BEGIN, END = "<!-- tinychat card: begin -->", "<!-- tinychat card: end -->"
INT8 = "int8_on_cpu"  # the fact that `with_int8` adds
BLOCKS = "▁▂▃▄▅▆▇█"
Json = dict[str, Any]


def as_json(card: Card) -> Json:
    """The card as an object; null stands for what has no value, an SQNR without any error among them."""
    return _plain(
        {
            "schema": SCHEMA,
            "versions": dict(card.versions),
            "measured": asdict(card.measured),
            "models": {name: _column(column) for name, column in card.columns.items()},
            "left_out": list(card.left_out),
            "facts": dict(card.facts),
        }
    )


def _column(column: Column) -> Json:
    return {
        "title": column.title,
        "perplexity": column.perplexity,
        "probes": [_probe(score) for score in column.probes],
        "divergence": {kind: _divergence(found) for kind, found in column.divergence.items()},
        "layers": [asdict(layer) for layer in column.layers],
        "others": {name: asdict(found) for name, found in column.others.items()},
    }


def _probe(score: ProbeScore) -> Json:
    return {**asdict(score), "share": score.share, "interval": list(score.interval)}


def _divergence(found: Divergence) -> Json:
    return {**asdict(found), "unchanged": found.unchanged, "median_first": found.median_first}


def _plain(value: Any) -> Any:
    """What json can say: six digits of a float, none for inf and NaN, lists for tuples."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# The table, of the terminal and of README.md

Cell = Callable[["Column"], str]


def rows(card: Card) -> list[list[str]]:
    """A head and a row a figure; a row that no model has a value for is left out."""
    columns = list(card.columns.values())
    table = [[label, *(cell(column) for column in columns)] for label, cell in _lines(card)]
    return [["", *(column.title for column in columns)], *(row for row in table if any(row[1:]))]


def _lines(card: Card) -> Iterator[tuple[str, Cell]]:
    measured = card.measured
    windows = f", windows of {measured.seqlen}" if measured.seqlen else ""
    yield f"perplexity ({measured.text}{windows})", lambda c: _number(c.perplexity)
    kinds = list(dict.fromkeys(kind for column in card.columns.values() for kind in column.divergence))
    for kind in kinds if len(kinds) > 2 else kinds[:1]:  # with one kind of data, `all` says everything
        yield from _divergence_lines(kind)
    yield "lowest SQNR of a layer's output", lambda c: _lowest(c, lambda layer: layer.output.sqnr_db)
    yield "lowest SQNR of a layer's weights", lambda c: _lowest(c, _weights_sqnr)
    for name in dict.fromkeys(name for column in card.columns.values() for name in column.others):
        yield f"SQNR of {name}", lambda c, name=name: _other(c, name)
    scores = {(score.kind, score.size) for column in card.columns.values() for score in column.probes}
    order = sorted(scores, key=lambda key: (probes.KINDS.index(key[0]), -(key[1] or 0)))
    for kind, size in order:
        label = f"probe: {kind}" if size is None else f"probe: {kind}, text {100 * size:.0f} % of the height"
        yield label, lambda c, key=(kind, size): _right(c, key)


def _divergence_lines(kind: str) -> Iterator[tuple[str, Cell]]:
    lines: tuple[tuple[str, Callable[[Divergence], str]], ...] = (
        ("KL divergence a token, mean", lambda d: _between(d.kl)),
        ("same likeliest token", lambda d: _between(d.top1, 100, " %")),
        ("KL divergence a token, 99th percentile", lambda d: _between(d.kl_p99)),
        ("greedy answers unchanged", lambda d: "" if d.unchanged is None else f"{100 * d.unchanged:.0f} %"),
        ("first diverging token, median", lambda d: _first(d.median_first) if d.first else ""),
    )
    for label, of in lines if kind == "all" else lines[:2]:
        name = label if kind == "all" else f"{label}, {kind}"
        yield name, lambda c, of=of: of(c.divergence[kind]) if kind in c.divergence else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:#.4g}"


def _between(estimate: Estimate, scale: float = 1, unit: str = "") -> str:
    value, low, high = (scale * number for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:.3g}{unit} ({low:.3g} to {high:.3g})"


def _first(place: int | None) -> str:
    return "none" if place is None else str(place + 1)


def _weights_sqnr(layer: LayerFidelity) -> float:
    return layer.weights.sqnr_db if layer.weights else math.nan


def _lowest(column: Column, of: Callable[[LayerFidelity], float]) -> str:
    found = [(of(layer), layer.layer) for layer in column.layers if not math.isnan(of(layer))]
    if not found:
        return ""
    value, layer = min(found)
    return "no error" if value == math.inf else f"{value:.1f} dB (layer {layer})"


def _other(column: Column, name: str) -> str:
    return f"{column.others[name].sqnr_db:.1f} dB" if name in column.others else ""


def _right(column: Column, key: tuple[str, float | None]) -> str:
    score = next((score for score in column.probes if (score.kind, score.size) == key), None)
    if score is None:
        return ""
    low, high = (100 * bound for bound in score.interval)
    return f"{100 * score.share:.0f} % ({low:.0f} to {high:.0f})"


def foot(card: Card) -> list[str]:
    """Lines below the table: errors along the layers and along the answers as sparklines, and what is left out."""
    lines: list[str] = []
    for column in card.columns.values():
        if column.layers:
            noise = [10 ** (-layer.output.sqnr_db / 20) for layer in column.layers]
            lines.append(f"{column.title}: error of the layers' outputs, first to last   {sparkline(noise)}")
        if column.divergence and (along := column.divergence["all"].kl_along):
            lines.append(f"{column.title}: KL divergence along the answers, token by token   {sparkline(along)}")
    return [*lines, *card.left_out]


def sparkline(values: list[float] | tuple[float, ...]) -> str:
    """Values from 0 up as blocks of eight heights, the largest a full one; a gap for what is no number."""
    top = max((value for value in values if math.isfinite(value)), default=0.0)
    steps = len(BLOCKS) - 1
    return "".join(
        BLOCKS[round(value / top * steps) if top > 0 else 0] if math.isfinite(value) else " " for value in values
    )


# The files


def markdown(card: Card) -> str:
    """The part of README.md, markers included."""
    head, *body = [[_escaped(cell) for cell in row] for row in rows(card)]
    table = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
    made = {name: value for name, value in card.facts.items() if name != INT8}
    facts = [f"- {_escaped(name)}: {_escaped(value)}" for name, value in _flat(made)]
    about = [
        "Measured by `tinychat eval` on generated data that the model was not calibrated on; intervals are 95 %. KL "
        "divergence is in nats, from the original's prediction to this one's. "
        f"All figures, layer by layer, are in `{FILE}`."
    ]
    sections = [["## Quality"], about, table, *([left] for left in map(_escaped, card.left_out))]
    if INT8 in card.facts:
        sections.append([_int8(card.facts[INT8])])
    if facts:
        sections += [["How it was made:"], facts]
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    sections.append([f"Versions: {_escaped(versions)}."])
    return "\n\n".join([BEGIN, *("\n".join(section) for section in sections), END]) + "\n"


def _int8(found: Json) -> str:
    """What the CPU kernels' default costs, beside activations, head and tower as they are. Raises FormatError."""
    try:
        low, value, high = (f"{found['kl'][name]:.2g}" for name in ("low", "value", "high"))
        same, right = 100 * found["top1"]["value"], f"{found['right']:d} of {found['asked']:d}"
        return (
            f"On a CPU, {_escaped(found['setting'])} against `--exact --head float`: KL divergence {value} nats a "
            f"token ({low} to {high}), the same likeliest token at {same:.4g} %, {right} questions right "
            f"({found['exact_right']:d} exactly computed)."
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"the card's {INT8} is damaged ({error!r})", f"remove {FILE}") from error


def with_int8(folder: Path, found: Json) -> None:
    """Add to a folder's card what 8-bit activations cost, as scripts/int8_quality.py measures it.

    Raises FormatError where there is no card.
    """
    facts, readme = facts_of(folder), _readme(folder)
    if not facts or BEGIN not in readme:
        raise FormatError(f"{folder} has no card", "make one first: tinychat eval --card")
    if INT8 in facts:
        readme = readme.replace(f"{_int8(facts[INT8])}\n\n", "")
    before, begin, part = readme.partition(BEGIN)
    mark = "How it was made:" if "How it was made:" in part else "Versions: "
    _replace(folder / README, before + begin + part.replace(mark, f"{_int8(found)}\n\n{mark}", 1))
    raw = json.loads((folder / FILE).read_text("utf-8"))
    raw["facts"][INT8] = found
    _replace(folder / FILE, json.dumps(raw, indent=1) + "\n")


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name and value of each fact, nested ones by dotted names."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{name}", str(value)


def _escaped(text: str) -> str:
    """On one line, without what Markdown or HTML would take for its own."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", flat)


def with_part(readme: str, part: str) -> str:
    """README.md with the card's part in it: where one was before, else at the end.

    Raises FormatError where the markers are not one pair.
    """
    counts = readme.count(BEGIN), readme.count(END)
    if counts == (0, 0):
        return f"{readme.rstrip()}\n\n{part}" if readme.strip() else part
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if counts != (1, 1) or not end:
        raise FormatError(
            f"README.md has {counts[0]} marks where a card begins and {counts[1]} where one ends",
            f"leave one pair: {BEGIN} ... {END}",
        )
    return before + part.rstrip("\n") + after


def remove(folder: Path) -> None:
    """Take a card out of a folder, if it has one: what it measured is not what lies there."""
    (folder / FILE).unlink(missing_ok=True)
    before, begin, rest = _readme(folder).partition(BEGIN)
    if begin:
        _replace(folder / README, before.rstrip() + "\n" + rest.partition(END)[2].lstrip("\n"))


def write(card: Card, folder: Path) -> None:
    """quality.json, and the part of README.md; each file is replaced at once, or not at all."""
    try:
        _replace(folder / README, with_part(_readme(folder), markdown(card)))
        _replace(folder / FILE, json.dumps(as_json(card), indent=1) + "\n")
    except OSError as error:
        message = f"the card cannot be written to {folder}: {error.strerror}"
        raise TinychatError(message, "give a folder that can be written, on a disk that is not full") from error


def check_readme(folder: Path) -> None:
    """Raises FormatError where a card could not be put into the folder's README.md."""
    with_part(_readme(folder), "")


def _readme(folder: Path) -> str:
    path = folder / README
    try:
        return path.read_bytes().decode() if path.exists() else ""
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not text in UTF-8 (byte {error.start})", "correct or remove it") from error


def _replace(path: Path, text: str) -> None:
    """Write a file beside, then put it in place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def facts_of(folder: Path) -> Json:
    """The facts of a folder's card: only the quantizer knows them. Raises FormatError for a damaged card."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON ({error})", "remove it: the card will be made anew") from error
    facts = found.get("facts") if isinstance(found, dict) else None
    if not isinstance(facts, dict):
        raise FormatError(f"{path} holds no facts", "remove it: the card will be made anew")
    return facts
