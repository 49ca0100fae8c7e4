"""What a comparison found: the object that is written, its Markdown, and a chart of bars."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from peers.protocol import Json

SCHEMA = "tinychat.bench_peers/1"
OURS = "tinychat"
BAR = 40  # characters of the longest bar
Samples = Mapping[tuple[str, str], Sequence[float | None]]  # (program, task) -> a value a round


def spread(values: Sequence[float]) -> Json:
    """Median, quartiles and ends."""
    low, middle, high = quartiles(values)
    return {"median": middle, "q1": low, "q3": high, "min": min(values), "max": max(values), "rounds": len(values)}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The three, by linear interpolation between the values themselves."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def speeds(samples: Samples) -> list[Json]:
    """Tokens a second of each program and task."""
    rows: list[Json] = []
    for (program, task), values in samples.items():
        if known := [value for value in values if value is not None]:
            rows.append({"program": program, "task": task, **spread(known), "values": known})
    return rows


def ratios(samples: Samples) -> list[Json]:
    """Ours over each other program's, round by round, in the tasks that both did."""
    rows: list[Json] = []
    for (program, task), values in samples.items():
        ours = samples.get((OURS, task), ())
        both = [mine / other for mine, other in zip(ours, values, strict=False) if mine and other]
        if program != OURS and both:
            rows.append({"task": task, "peer": program, **spread(both), "values": both})
    return rows


def markdown(found: Json) -> str:
    """The whole comparison as a page."""
    machine = found["machine"]
    read, int8 = machine.get("read"), machine.get("int8")
    lines = [
        f"# {found['shape']} shape, {found['threads']} threads, {found['rounds']} rounds",
        "",
        f"{machine['cpu']}; {found['date']}, commit {found['commit']}. Tokens a second; rounds are interleaved, their "
        "order is drawn anew each time, and programs that wait are stopped.",
        "",
    ]
    if found.get("tower"):
        lines += [
            "encode 1: pictures a second. picture N: N over the seconds from pixels to the first token. ms: of one."
        ]
        lines += [""]
    if read:
        lines.append(_best("Memory reads", read, 1e9, "GB/s"))
    if int8:
        lines.append(_best("int8 in registers", int8, 1e12, "TOP/s"))
    lines += ["", *_program_lines(found), "", *_speed_lines(found), "", *_ratio_lines(found)]
    return "\n".join(lines) + "\n"


def _best(name: str, values: Json, unit: float, label: str) -> str:
    best, median, low, high = (values[key] / unit for key in ("max", "median", "q1", "q3"))
    return f"{name}, before each turn: {best:.2f} {label} at best, median {median:.2f} ({low:.2f} to {high:.2f}).\n"


def _program_lines(found: Json) -> list[str]:
    rows = ["| program | version | MB a token | peak MiB | notes |", "|---|---|--:|--:|---|"]
    for name, program in found["programs"].items():
        if error := program.get("error"):
            rows.append(f"| {name} | left out: {error} | | | |")
            continue
        streamed = "" if program["bytes_per_token"] is None else f"{program['bytes_per_token'] / 1e6:.0f}"
        peak = f"{program['peak_memory'] / 2**20:.0f}"
        notes = program["notes"].replace("|", ",")
        rows.append(f"| {name} | {program['version']} | {streamed} | {peak} | {notes} |")
    return rows


def _speed_lines(found: Json) -> list[str]:
    rows = [
        "| task | program | median | quartiles | least | most | of the best read | ms |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(found["speeds"], key=lambda row: (row["task"], -row["median"])):
        quarters = f"{row['q1']:.1f} .. {row['q3']:.1f}"
        numbers = f"{row['median']:.1f} | {quarters} | {row['min']:.1f} | {row['max']:.1f}"
        once = f"{row['milliseconds']:.4g}" if "milliseconds" in row else ""
        rows.append(f"| {row['task']} | {row['program']} | {numbers} | {_share(row)} | {once} |")
    return rows


def _share(row: Json) -> str:
    return f"{100 * row['of_best_read']:.0f} %" if row.get("of_best_read") else ""


def _ratio_lines(found: Json) -> list[str]:
    rows = [
        f"| task | {OURS} against | median ratio | lower quartile | least | most |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in sorted(found["ratios"], key=lambda row: (row["task"], row["median"])):
        numbers = f"{row['median']:.2f} | {row['q1']:.2f} | {row['min']:.2f} | {row['max']:.2f}"
        rows.append(f"| {row['task']} | {row['peer']} | {numbers} |")
    return rows


def tasks_of(found: Json) -> dict[str, list[Json]]:
    """Task -> the programs' speeds, the fastest first."""
    ranked = sorted(found["speeds"], key=lambda row: -row["median"])
    return {task: [row for row in ranked if row["task"] == task] for task in dict.fromkeys(r["task"] for r in ranked)}


def text_chart(found: Json) -> str:
    """Bars of characters."""
    lines: list[str] = []
    for task, rows in tasks_of(found).items():
        lines += ["", task]
        width = max(len(row["program"]) for row in rows)
        for row in rows:
            bar = "#" * max(1, round(BAR * row["median"] / rows[0]["median"]))
            lines.append(f"  {row['program']:<{width}}  {bar} {row['median']:.1f}")
    return "\n".join(lines)


def draw_chart(found: Json, path: Path) -> bool:
    """Bars with quartiles as a picture; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    tasks = tasks_of(found)
    figure = Figure(figsize=(9, 1 + sum(0.5 + 0.32 * len(rows) for rows in tasks.values())), layout="constrained")
    heights = [len(rows) + 1 for rows in tasks.values()]
    axes = figure.subplots(len(tasks), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (task, rows) in zip(axes, tasks.items(), strict=True):
        ranked = rows[::-1]
        middles = [row["median"] for row in ranked]
        errors = [
            [row["median"] - row["q1"] for row in ranked],
            [row["q3"] - row["median"] for row in ranked],
        ]
        colours = ["tab:orange" if row["program"].startswith(OURS) else "tab:grey" for row in ranked]
        axis.barh([row["program"] for row in ranked], middles, xerr=errors, color=colours)
        axis.set_title(f"{task}, tokens a second", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=120)
    return True
