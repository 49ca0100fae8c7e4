"""The rules of the house that no linter knows: short functions, a true README, documented names, a complete wheel."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

import readme_tree
import tinychat

ROOT = Path(__file__).parents[1]
PACKAGES = ("tinychat", "awq", "kernels/tinychat_kernels")
LONGEST_FUNCTION = 60
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def python_files() -> list[Path]:
    return [ROOT / path for path in readme_tree.files(ROOT) if path.suffix == ".py"]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_are_short():
    lengths = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in python_files()
        for node in functions(path)
    }
    assert lengths
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}


def test_no_drawer_for_everything():
    wrong = [str(path) for path in readme_tree.files(ROOT) if BANNED_NAMES & {*path.parts, path.stem}]
    assert not wrong


def test_tests_are_no_packages():
    assert not [path for path in readme_tree.files(ROOT) if path.parts[0] == "tests" and path.name == "__init__.py"]


def test_every_source_folder_is_a_package():
    folders = {path.parent for path in python_files() for package in PACKAGES if (ROOT / package) in path.parents}
    assert folders
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]


def test_readme_shows_the_real_tree():
    text = (ROOT / "README.md").read_text("utf-8")
    assert text == readme_tree.with_tree(text, readme_tree.tree(ROOT)), "run scripts/check --fix"


def test_tree_takes_comments_from_the_files(tmp_path: Path):
    (tmp_path / "tinychat/engine").mkdir(parents=True)
    (tmp_path / "tests/engine").mkdir(parents=True)
    (tmp_path / "tinychat/engine/__init__.py").write_text('"""The loop."""\n')
    (tmp_path / "tinychat/engine/sampler.py").write_text('"""Draws a token.\n\nMore.\n"""\n')
    (tmp_path / "tests/engine/test_sampler.py").write_text("")
    lines = [" ".join(line.split()) for line in readme_tree.tree(tmp_path).splitlines()]
    assert lines == ["tinychat/", "engine/ The loop", "sampler.py Draws a token", "tests/ mirror the source"]


def test_long_comments_lose_clauses():
    assert readme_tree.shortened("One, two: three. Four", 99) == "One, two: three"
    assert readme_tree.shortened("One, two: three. Four", 12) == "One, two"
    assert readme_tree.shortened("Without a stop", 7) == "Without"


def test_tree_needs_its_marks():
    with pytest.raises(ValueError, match="README.md needs the lines"):
        readme_tree.with_tree("# no marks", "tree")


@pytest.mark.parametrize("name", tinychat.__all__)
def test_exported_names_are_documented(name: str):
    value = getattr(tinychat, name)
    if isinstance(value, type) or callable(value):
        assert value.__doc__
        assert not value.__doc__.startswith(f"{name}("), f"{name} has the docstring that dataclass makes"


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'tinychat' has no attribute 'Nothing'"):
        _ = tinychat.Nothing  # type: ignore[attr-defined]


def test_commands_say_what_they_do():
    scripts = [path for path in readme_tree.files(ROOT) if path.parts[0] == "scripts" and not path.suffix]
    assert scripts
    assert not [str(path) for path in scripts if not readme_tree.summary(ROOT / path)]
    assert not [str(path) for path in scripts if not os.access(ROOT / path, os.X_OK)]


@pytest.mark.parametrize(
    "reach", [lambda: socket.create_connection(("192.0.2.1", 9), 1), lambda: socket.getaddrinfo("a.invalid", 9)]
)
def test_no_test_reaches_the_network(reach: Callable[[], object]):
    with pytest.raises(pytest.fail.Exception, match="a test reached for the network"):
        reach()


def test_loopback_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), 5).close()


# README's console blocks


def console_commands(text: str) -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_console_commands_are_found():
    assert console_commands("```console\n$ one\noutput\n$ two\n```\n```sh\n$ three\n```\n") == ["one", "two"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_readme_console_blocks_run():
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    commands = console_commands((ROOT / "README.md").read_text("utf-8"))
    assert commands, "README.md has no console block"
    for command in commands:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=ROOT, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"$ {command}\n{done.stderr}"


# Set-up


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project with a .venv that sees what is installed here, before which lies a torch of its own."""
    root = tmp_path / "checkout"
    for name in (*PACKAGES, "scripts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    venv.create(root / ".venv", symlinks=True)
    site = next((root / ".venv").glob("lib/python*/site-packages"))
    (site / "installed_here.pth").write_text(str(distribution("pip").locate_file("")))
    return root


def fake_torch(root: Path, version: str) -> None:
    site = next((root / ".venv").glob("lib/python*/site-packages"))
    info = site / f"torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (info / "RECORD").write_text("")
    (info / "INSTALLER").write_text("nobody\n")


def dry_run(root: Path, report: Path) -> subprocess.CompletedProcess[str]:
    offline = {
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_REPORT": str(report),
        "PIP_CONFIG_FILE": os.devnull,
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    return subprocess.run(
        ["sh", root / "scripts/setup", "--dry-run"], env={**environment, **offline}, capture_output=True, text=True
    )


@pytest.mark.parametrize("version", ["99.0", "2.6.0+nv24.12"])
def test_an_installed_torch_is_never_replaced(checkout: Path, tmp_path: Path, version: str):
    fake_torch(checkout, version)
    done = dry_run(checkout, tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    assert f"torch {version} is installed and stays as it is" in done.stderr
    chosen = {item["metadata"]["name"] for item in json.loads((tmp_path / "report.json").read_text())["install"]}
    assert "tinychat" in chosen
    assert "torch" not in chosen


def test_a_torch_that_is_too_old_is_named(checkout: Path, tmp_path: Path):
    fake_torch(checkout, "2.5.1")
    done = dry_run(checkout, tmp_path / "report.json")
    assert done.returncode == 1
    assert "tinychat needs torch 2.6 or newer, and does not replace torch 2.5.1" in done.stderr


def setup_with_only(tmp_path: Path, python3: str | None) -> subprocess.CompletedProcess[str]:
    """scripts/setup in a bare checkout, where PATH holds the plain tools and, if given, this script as python3."""
    programs, root = tmp_path / "bin", tmp_path / "bare"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    programs.mkdir()
    for name in ("sh", "cat", "cksum", "dirname", "grep", "id", "rm"):
        (programs / name).symlink_to(shutil.which(name) or name)
    if python3:
        (programs / "python3").write_text(python3)
        (programs / "python3").chmod(0o755)
    return subprocess.run(["sh", root / "scripts/setup"], env={"PATH": str(programs)}, capture_output=True, text=True)


OLD = "#!/bin/sh\nexit 1\n"
NO_VENV = (
    '#!/bin/sh\ncase "$*" in *venv*) echo "No module named venv"; exit 1 ;; --version) echo Python 3.12.1 ;; esac\n'
)


@pytest.mark.parametrize(
    ("python3", "sentence"),
    [
        (None, "no Python 3.10 or newer was found in PATH; install one"),
        (OLD, "no Python 3.10 or newer was found in PATH; install one"),
        (NO_VENV, "cannot make a virtual environment; on Debian, Ubuntu and JetPack: sudo apt install python3-venv"),
    ],
)
def test_setup_says_what_is_missing(tmp_path: Path, python3: str | None, sentence: str):
    done = setup_with_only(tmp_path, python3)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert not (tmp_path / "bare/.venv").exists()


def test_setup_refuses_unknown_flags():
    done = subprocess.run(["sh", ROOT / "scripts/setup", "--all"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "usage: scripts/setup [--dev] [--dry-run]\n")


def in_wheel(path: Path) -> bool:
    folders = ("tinychat/assets/demo", "tinychat/assets/search", "kernels/tinychat_kernels/csrc")
    data = any(path.is_relative_to(folder) for folder in folders)
    shipped = path.suffix == ".py" or path.name == "py.typed" or data
    return shipped and any(path.is_relative_to(package) for package in PACKAGES)


def wheel_of(checkout: Path, out: Path, compiler: str | None) -> tuple[set[str], str]:
    """The names in the wheel, and what pip said; `compiler` None: the machine's."""
    shutil.copytree(ROOT / "tinychat", checkout / "tinychat", dirs_exist_ok=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-v"]
    chosen = {} if compiler is None else {"CXX": compiler}
    done = subprocess.run(
        [*command, "-w", out, checkout], check=True, timeout=900, capture_output=True, text=True,
        env={**os.environ, **chosen},
    )  # fmt: skip
    with zipfile.ZipFile(next(out.glob("tinychat-*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    return names, done.stdout + done.stderr


def shipped() -> set[str]:
    return {path.as_posix().removeprefix("kernels/") for path in readme_tree.files(ROOT) if in_wheel(path)}


def test_the_wheel_is_complete_and_says_what_a_missing_compiler_costs(checkout: Path, tmp_path: Path):
    names, said = wheel_of(checkout, tmp_path, compiler="no-such-compiler")
    assert names == shipped()
    assert "tinychat is installed without its CPU kernels and will be slow: no-such-compiler does not run" in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_the_wheel_holds_the_compiled_kernels(checkout: Path, tmp_path: Path):
    names, _ = wheel_of(checkout, tmp_path, compiler=None)
    assert names == shipped() | {"tinychat_kernels/_cpu.so"}
