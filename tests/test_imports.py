"""Who may import whom. A wrong arrow fails here, with file and line; so does a heavy module that loads too early."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"tinychat": "tinychat", "awq": "awq", "tinychat_kernels": "kernels/tinychat_kernels"}

LAYOUT = "tinychat_kernels.layout"
MAY_IMPORT: dict[str, set[str]] = {  # the longest matching prefix owns a module
    "tinychat_kernels": set(),
    "awq": {"tinychat_kernels"},
    "tinychat.__init__": {  # lazy re-exports only
        "tinychat.core", "tinychat.engine", "tinychat.errors", "tinychat.load", "tinychat.models", "tinychat.session",
    },
    "tinychat.core": {"tinychat.errors"},
    "tinychat.errors": set(),
    "tinychat.config": {"tinychat.core", "tinychat.errors", "tinychat.tiling"},
    "tinychat.tiling": {"tinychat.errors"},
    "tinychat.checkpoint": {"tinychat.weight_files", "tinychat.errors", LAYOUT},
    "tinychat.weight_files": {"tinychat.errors"},
    "tinychat.hub": {"tinychat.config", "tinychat.errors"},
    "tinychat.packed_cache": {"tinychat_kernels"},
    "tinychat.layouts": {"tinychat.config", "tinychat.errors", "tinychat_kernels"},
    "tinychat.pickled": set(),
    "tinychat.search_results": {
        "tinychat.checkpoint", "tinychat.weight_files", "tinychat.errors", "tinychat_kernels.errors", LAYOUT,
    },
    "tinychat.layers": {"tinychat_kernels", "tinychat.errors"},
    "tinychat.models": {
        "tinychat.layers", "tinychat.config", "tinychat.checkpoint", "tinychat.errors", "tinychat.tiling",
    },
    "tinychat.inputs": {"tinychat.core", "tinychat.config", "tinychat.errors", "tinychat.tiling"},
    "tinychat.engine": {"tinychat.layers", "tinychat.inputs", "tinychat.core", "tinychat.errors"},
    "tinychat.store": {"tinychat.core", "tinychat.errors"},
    "tinychat.flags": {"tinychat.core", "tinychat.errors"},
    "tinychat.search_flags": {"tinychat.flags", "tinychat.errors"},
    "tinychat.picture_files": {"tinychat.errors"},
    "tinychat.picture_index": {
        "tinychat.inputs.images", "tinychat.packed_cache", "tinychat.picture_files", "tinychat.core", "tinychat.errors",
    },
    "tinychat.telemetry": {"tinychat.core", "tinychat.errors"},
    "tinychat.session": {"tinychat.engine", "tinychat.inputs", "tinychat.store", "tinychat.core", "tinychat.errors"},
    "tinychat.terminal": {
        "tinychat.session", "tinychat.inputs.images", "tinychat.telemetry", "tinychat.core", "tinychat.errors",
    },
    "tinychat.server": {"tinychat.engine", "tinychat.inputs", "tinychat.core", "tinychat.errors"},
    "tinychat.eval": {"tinychat.engine", "tinychat.inputs", "tinychat.core", "tinychat.errors", "tinychat_kernels"},
}  # fmt: skip
IN_FUNCTIONS = {"tinychat.models": {"tinychat.load"}, "tinychat.engine": {"tinychat.load"}}
VERBS = {
    "tinychat.cli",
    "tinychat.ask",
    "tinychat.bench",
    "tinychat.doctor",
    "tinychat.evaluate",
    "tinychat.opening",
    "tinychat.search",
    "tinychat.__main__",
}
ASSEMBLY = {
    "tinychat.load",
    "tinychat.placement",
    "tinychat.sharding",
    "tinychat.quantization",
    "tinychat.int8_tower",
    "tinychat.repack",
    "tinychat.convert",
    "tinychat.convert_files",
    "tinychat.cuda_packing",
    "tinychat.doctor_kernels",
    "tinychat.quantize",
    "tinychat.planner",
    "tinychat.packed_tower",
    "tinychat.packing",
    "tinychat.offload",
    "tinychat.spread",
    "tinychat.picture_encoder",
    "tinychat.ranks",
    *VERBS,
}  # anything, lazily

ONLY_IN = {  # a third party -> the modules that may know it
    "transformers": {
        "tinychat.config",
        "tinychat.inputs",
        "tinychat.models",
        "tinychat.engine.foreign",
        "tinychat.engine.foreign_cache",
        "tinychat.engine.foreign_vlm",
        *ASSEMBLY,
    },
    "PIL": {"tinychat.inputs", "tinychat.eval", "tinychat.server", *ASSEMBLY},
    "prompt_toolkit": {"tinychat.terminal", *VERBS},
    "rich": {"tinychat.terminal", *VERBS},
    "typer": {"tinychat.flags", "tinychat.search_flags", *VERBS},
}
HEAVY = ("torch", "transformers", "prompt_toolkit")


def within(module: str, prefix: str) -> bool:
    return f"{module}.".startswith(f"{prefix}.")


def owner(module: str) -> str | None:
    return max((name for name in (*MAY_IMPORT, *ASSEMBLY) if within(module, name)), key=len, default=None)


def allowed(module: str, names: set[str]) -> bool:
    return any(within(module, name) for name in names)


def imports(node: ast.AST, in_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(module or module.name, line, whether a function holds it) of every import below the node."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno, in_function) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        yield from ((f"{module}.{alias.name}", node.lineno, in_function) for alias in node.names)
    inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from imports(child, inside)


def sources() -> Iterator[tuple[str, Path]]:
    for package, folder in SOURCES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)), path


def wrong_arrow(module: str, target: str, in_function: bool) -> str | None:
    """What is wrong with an import of `target` by `module`, if anything is."""
    here, there = owner(module), owner(target)
    assert here, f"{module} has no row in MAY_IMPORT"
    if target.startswith("."):
        return f"write the absolute import instead of {target}"
    third = target.partition(".")[0]
    if third in ONLY_IN and not allowed(module, ONLY_IN[third]):
        return f"{module} must not import {third}"
    if there == here or here in ASSEMBLY:
        return None
    if there is None:
        return f"import {target} from its own module" if third == "tinychat" else None
    names = MAY_IMPORT[here] | (IN_FUNCTIONS.get(here, set()) if in_function else set())
    return None if allowed(target, names) else f"{here} must not import {target}"


def test_arrows_point_one_way():
    wrong = []
    for module, path in sources():
        if owner(module) is None:
            wrong.append(f"{path.relative_to(ROOT)}: {module} has no row in MAY_IMPORT")
            continue
        for target, line, in_function in imports(ast.parse(path.read_text("utf-8"), str(path))):
            if reason := wrong_arrow(module, target, in_function):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "target", "in_function", "reason"),
    [
        ("tinychat.engine.engine", "tinychat.models.llama", True, "tinychat.engine must not import"),
        ("tinychat.engine.causal_lm", "tinychat.load.load_model", False, "tinychat.engine must not import"),
        ("tinychat.engine.causal_lm", "tinychat.load.load_model", True, None),
        ("tinychat.terminal", "tinychat.inputs.processor.Processor", False, "tinychat.terminal must not import"),
        ("tinychat.checkpoint", "tinychat_kernels.layout.unpack", False, None),
        ("tinychat.checkpoint", "tinychat_kernels.ref.w4_linear", False, "tinychat.checkpoint must not import"),
        ("tinychat.engine.sampler", "transformers.GenerationConfig", True, "must not import transformers"),
        ("awq.scale", "tinychat.errors.UsageError", False, "awq must not import"),
        ("tinychat.session", ".store.Store", False, "absolute"),
        ("tinychat.session", "tinychat.Engine", False, "its own module"),
        ("awq.quantize", "transformers.AutoModel", False, "awq.quantize must not import transformers"),
        ("tinychat.cli", "tinychat.terminal", False, None),
    ],
)
def test_wrong_arrows_are_seen(module: str, target: str, in_function: bool, reason: str | None):
    found = wrong_arrow(module, target, in_function)
    assert (found is None) if reason is None else (found is not None and reason in found)


def heavy_after(code: str) -> str:
    """Runs the code in a new Python and names the heavy modules that it has loaded."""
    probe = f"{code}\nimport sys\nprint('loaded:', *sorted({set(HEAVY)!r} & set(sys.modules)), file=sys.stderr)"
    path = [str(ROOT), str(ROOT / "kernels")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{probe}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.rpartition("loaded:")[2].strip()


def test_the_probe_sees_a_heavy_module():
    assert heavy_after("import prompt_toolkit") == "prompt_toolkit"


def test_import_is_light():
    assert heavy_after("import tinychat, awq") == ""


RUN_HELP = """
import runpy, sys
sys.argv = ["tinychat", {arguments}]
try:
    runpy.run_module("tinychat", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize("arguments", ['"--help"', '"ask", "--help"', '"chat", "--help"'])
def test_help_is_light(arguments: str):
    assert heavy_after(RUN_HELP.format(arguments=arguments)) == ""
