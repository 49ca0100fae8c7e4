"""What was found, as tables in Markdown, and as a short block to paste."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpu_checks import targets
from gpu_checks.targets import Json

GIGA = 1e9
DRY = " (dry run: times mean nothing)"
Line = Sequence[object]


def markdown(data: Json) -> str:
    """All tables."""
    facts, stages = data["facts"], data["stages"]
    title = f"# {facts['gpu']}{DRY if facts['dry'] else ''}"
    parts = [title, table(("what", "which"), [(name, value) for name, value in facts.items() if name != "dry"])]
    for name, make in SECTIONS.items():
        if stages.get(name):
            parts += [f"## {name}", *make(stages[name])]
    if found := _targets(data):
        rows = [(one.aim, f"{one.found:.2f}", f"{one.floor:g}", one.held) for one in found]
        parts += ["## Targets", table(("aim", "found", "floor", "held"), rows)]
    return "\n\n".join(parts) + "\n"


def summary(data: Json, names: Sequence[str]) -> str:
    """What was asked for: the targets, what is wrong, and the block to paste."""
    text = markdown(data)
    sections = [part for part in text.split("\n## ")[1:] if part.partition("\n")[0] in (*names, "Targets")]
    return "\n".join(
        [*(f"## {part.strip()}\n" for part in sections), *(f"WRONG: {one}" for one in _wrong(data)), paste(data)]
    )


def paste(data: Json) -> str:
    """A block for an issue or a chat: the GPU, what is right, and the figures that count."""
    facts, stages = data["facts"], data["stages"]
    wrong = wrong_results(data)
    lines = [
        f"{facts['gpu']}{DRY if facts['dry'] else ''} ({facts['arch']}), torch {facts['torch']}, CUDA {facts['cuda']}, "
        f"{facts['compiler']}, {facts['date']}",
        f"kernels {facts['build'][:8]}: {_said(wrong, stages)}",
    ]
    if copied := stages.get("kernels", stages.get("endtoend", {})).get("copy", {}).get("bytes_per_second"):
        lines.append(f"copy {copied / GIGA:.0f} GB/s")
    for name, found in stages.get("endtoend", {}).items():
        for row in found.get("decode", []):
            roofline = f", {row['of_roofline']:.0%} of the byte roofline" if "of_roofline" in row else ""
            rows = f"{row['rows']} row{'s' if row['rows'] > 1 else ''} at {row['depth']}"
            lines.append(f"{name}, {rows}: {row['tokens_per_second']:.1f} tokens/s{roofline}")
    lines += [f"missed: {one.aim}: {one.found:.2f}" for one in _targets(data) if one.held == "NO"]
    return "\n".join(["```text", *lines, "```"])


def _targets(data: Json) -> list[targets.Target]:
    """A dry run has none: its times mean nothing."""
    return [] if data["facts"]["dry"] else targets.targets(data["stages"])


def wrong_results(data: Json) -> list[str]:
    """The names of what was found to be wrong."""
    return [name for stage in data["stages"].values() for name, found in stage.items() if found.get("right") is False]


def _wrong(data: Json) -> list[str]:
    """What is wrong, with the reason."""
    found = [(stage, name, one) for stage, all_of in data["stages"].items() for name, one in all_of.items()]
    return [f"{stage}: {name}: {one['said']}" for stage, name, one in found if one.get("right") is False]


def _said(wrong: Sequence[str], stages: Json) -> str:
    if wrong:
        return f"WRONG: {', '.join(wrong)}"
    count = sum(found.get("right") is True for stage in stages.values() for found in stage.values())
    return f"all of {count} checks are right" if count else "not checked"


def table(head: Line, rows: Sequence[Line]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def _verdicts(stage: Json) -> Iterator[str]:
    rows = [(name, _verdict(found), found.get("said", found.get("missing", ""))) for name, found in stage.items()]
    yield table(("check", "", "found"), rows)


def _verdict(found: Json) -> str:
    return "not run" if "missing" in found else "right" if found["right"] else "WRONG"


def _failed(stage: Json) -> Iterator[str]:
    """Figures that could not be found, with their reasons."""
    if failed := {name: found for name, found in stage.items() if "missing" in found or "right" in found}:
        yield from _verdicts(failed)


# kernels


def _kernels(stage: Json) -> Iterator[str]:
    copied = stage.get("copy", {}).get("bytes_per_second", float("nan"))
    yield f"Copy within the device: {copied / GIGA:.0f} GB/s, read and written."
    rivals = stage.get("rivals", {})
    if timed := targets.linears(stage):
        rows = [_linear(stage, name, found) for name, found in timed.items()]
        yield table(("linear", "µs", "of copy", *(f"{name}, times ours" for name in rivals)), rows)
    if rivals:
        rows = [_mean(stage, name, found) for name, found in rivals.items()]
        yield table(("rival", "geometric mean, times ours", "worst shape", "version"), rows)
    for prefix, head, line in TABLES:
        of_kind = [(name.removeprefix(prefix), found) for name, found in stage.items() if name.startswith(prefix)]
        if rows := [line(name, found, copied) for name, found in of_kind if "right" not in found]:
            yield table(head, rows)
    yield from _failed({name: found for name, found in stage.items() if not _is_rivals(name, rivals)})


def _is_rivals(name: str, rivals: Json) -> bool:
    return any(name == "rivals" or name.startswith(f"{rival} linear ") for rival in rivals)


def _linear(stage: Json, name: str, found: Json) -> Line:
    ratios = [targets.times(stage, name, rival) for rival in stage.get("rivals", {})]
    shown = ["-" if one is None else f"{one:.2f}" for one in ratios]
    return [name, _us(found["ours"]), f"{found['of_copy']:.0%}", *shown]


def _mean(stage: Json, rival: str, here: Json) -> Line:
    if (found := targets.mean_times(stage, rival)) is None:
        reasons = [
            one["missing"] for name, one in stage.items() if name.startswith(f"{rival} linear ") and "missing" in one
        ]
        return rival, "not run", here.get("missing", next(iter(reasons), "not asked")), here.get("version", "-")
    mean, least, worst = found
    return rival, f"{mean:.2f}", f"{least:.2f} ({worst})", here["version"]


def _attention(name: str, found: Json, copied: float) -> Line:
    return name, _us(found["ours"]), f"{found['bytes_per_second'] / copied:.0%}", _us(found.get("torch"))


def _small(name: str, found: Json, _: float) -> Line:
    return name, ", ".join(f"{op} {_us(seconds)}" for op, seconds in found.items())


def _crossing(name: str, found: Json, _: float) -> Line:
    return name, _us(found["gemm"]), _us(found["decoded"])


def _tower(name: str, found: Json, _: float) -> Line:
    return name, _us(found["ours"]), _us(found["torch"])


TABLES: tuple[tuple[str, Line, Callable[[str, Json, float], Line]], ...] = (
    ("crossing rows ", ("rows of the largest linear", "gemm, µs", "decoded, then torch's product, µs"), _crossing),
    ("attention ", ("attention", "µs", "of copy", "torch, µs"), _attention),
    ("small ops ", ("model", "between linears, µs"), _small),
    ("tower ", ("8-bit linear of a tower", "µs", "float16, µs"), _tower),
)


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


# endtoend


def _endtoend(stage: Json) -> Iterator[str]:
    decoded = [_decode(name, row) for name, found in stage.items() for row in found.get("decode", [])]
    yield table(("decoding", "rows", "depth", "ms", "tokens/s", "of the byte roofline"), decoded)
    prompts = [_prompt(name, row) for name, found in stage.items() for row in found.get("prefill", [])]
    yield table(("prompt", "tokens", "ms", "tokens/s"), prompts)
    if answers := [_answer(name, found["engine"]) for name, found in stage.items() if "engine" in found]:
        yield table(("the engine's answer", "tokens/s", "prompt, tokens/s", "first token, ms"), answers)
    yield from _failed(stage)


def _decode(name: str, row: Json) -> Line:
    part = f"{row['of_roofline']:.0%}" if "of_roofline" in row else "-"
    return name, row["rows"], row["depth"], f"{row['seconds'] * 1e3:.2f}", f"{row['tokens_per_second']:.1f}", part


def _prompt(name: str, row: Json) -> Line:
    return name, row["tokens"], f"{row['seconds'] * 1e3:.1f}", f"{row['tokens_per_second']:.0f}"


def _answer(name: str, found: Json) -> Line:
    if "missing" in found:
        return f"{name}, not run", found["missing"], "", ""
    speeds = f"{found['tokens_per_second']:.1f}", f"{found['prefill_tokens_per_second']:.0f}"
    return f"{name}, {found['prompt']} + {found['answer']} tokens", *speeds, f"{found['first_token_seconds'] * 1e3:.1f}"


SECTIONS: dict[str, Callable[[Any], Iterator[str]]] = {
    "correctness": _verdicts,
    "sanitize": _verdicts,
    "kernels": _kernels,
    "endtoend": _endtoend,
}
