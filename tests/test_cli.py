"""The command line: what each verb hands on, what is printed where, and the exit code of every way to end."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import json_keys
import pytest
import torch
from PIL import Image as pillow
from scripted_engine import ScriptedEngine

from make_tiny_model import make_tiny_model
from tinychat import __version__, cli, doctor
from tinychat.core import Failed, Image, Message, Request, SamplingParams, StoppingParams, Text
from tinychat.errors import CapacityError, FormatError, MediaError, ModelError, TinychatError, UsageError
from tinychat.flags import ModelFlags
from tinychat.opening import Loaded
from tinychat_kernels import cpu, registry
from tinychat_kernels.errors import KernelError, LayoutError, SettingError

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line with nothing on stdin; returns (exit code, stdout, stderr)."""

    def call(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        code = cli.main(arguments)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


class Engine(ScriptedEngine):
    def reset(self) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine in place of the loaded one; `engine.flags` is what the model was opened with."""
    fake = Engine()
    fake.flags = None  # type: ignore[attr-defined]

    def open_model(flags: ModelFlags, plain: bool = False, rows: int = 1, for_all: bool = False) -> Loaded:
        fake.flags = flags  # type: ignore[attr-defined]
        model = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"), modules=list)
        return Loaded(model, FakeProcessor(), fake)  # type: ignore[arg-type]

    monkeypatch.setattr(cli, "open_model", open_model)
    return fake


class FakeProcessor:
    generation = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}

    def __call__(self, request: Any) -> SimpleNamespace:
        return SimpleNamespace(ids=request.parts[0].text.split())


@pytest.fixture
def picture(tmp_path: Path) -> str:
    pillow.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def raises(error: BaseException) -> Callable[..., None]:
    def act(*_: object, **__: object) -> None:
        raise error

    return act


# Help


def test_help_lists_what_works_and_nothing_else(run: Run):
    code, out, _ = run("--help")
    assert code == 0
    verbs = re.findall(r"^  ([a-z]+) {2,}", out.partition("Commands:")[2], re.M)
    assert verbs == ["chat", "ask", "search", "bench", "eval", "quantize", "convert", "doctor"]


def test_no_verb_shows_the_help(run: Run):
    assert run() == run("--help")


def test_the_version(run: Run):
    assert run("--version") == (0, f"tinychat {__version__}\n", "")


@pytest.mark.parametrize("verb", ["chat", "ask", "bench"])
def test_the_model_s_flags_are_everywhere(run: Run, verb: str):
    out = run(verb, "--help")[1]
    for name in ModelFlags.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in out


# Ends


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["aks"], "error: no such command 'aks'; did you mean 'ask'?"),
        (["frobnicate"], "error: no such command 'frobnicate'; `tinychat --help` shows what there is"),
        (["ask", "--modle", "x"], "error: no such option: --modle; did you mean --model?"),
        (["ask", "--seed"], "error: option '--seed' requires an argument; `tinychat"),
        (["ask", "--context", "many"], "error: --context is many, it must be a valid integer; `tinychat ask --help`"),
        (
            ["bench", "--rounds", "0"],
            "error: --rounds is 0, it must be greater than or equal to 1; `tinychat bench --help`",
        ),
        (["ask", "--temperature", "-1", "hi"], "error: temperature is -1.0, it must be 0 or more; give a temperature"),
        (["ask"], "error: there is no question; write one"),
        (["ask", "hi", "--json", "--jsonl", "x"], "error: --json and --jsonl exclude each other; give one of the two"),
        (["doctor", "--clear"], "error: --clear is for the cache; write doctor --cache --clear"),
    ],
)
def test_a_wrong_call_is_one_line_and_code_2(run: Run, arguments: list[str], sentence: str):
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(sentence)


@pytest.mark.parametrize(
    ("kind", "code"),
    [(TinychatError, 1), (UsageError, 2), (ModelError, 3), (FormatError, 3), (MediaError, 4), (CapacityError, 5)],
)
def test_each_of_our_errors_is_one_line_and_its_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, kind: type[TinychatError], code: int
):
    monkeypatch.setattr(cli, "open_model", raises(kind("there is\x1b[31m no\nmodel", "take another")))
    assert run("ask", "hi") == (code, "", "error: there is[31m no model; take another\n")


def test_a_bug_says_so_and_shows_its_trace_when_asked(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "open_model", raises(ZeroDivisionError("by 0")))
    code, out, err = run("ask", "hi")
    assert (code, out) == (1, "")
    assert err.startswith("tinychat hit a bug: ZeroDivisionError: by 0; run it again with --verbose")
    for arguments in (["--verbose", "ask", "hi"], ["ask", "--verbose", "hi"]):
        code, _, err = run(*arguments)
        assert code == 1
        assert err.startswith("Traceback") and "tinychat hit a bug" in err


def test_a_missing_library_is_named(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "open_model", raises(ModuleNotFoundError("No module named 'torch'", name="torch")))
    assert run("ask", "hi") == (1, "", "error: torch is not installed; install it: pip install torch\n")


def test_what_the_kernels_refuse_is_the_model_s(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TINYCHAT_BACKEND", raising=False)
    for error in (
        KernelError("no backend has an op 'x': see `tinychat doctor`"),
        LayoutError("no backend has an op 'x'"),
    ):
        monkeypatch.setattr(cli, "open_model", raises(error))
        assert run("ask", "hi") == (3, "", "error: no backend has an op 'x'; see `tinychat doctor`\n")


def test_an_interrupted_run_ends_with_130(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "open_model", raises(KeyboardInterrupt()))
    assert run("ask", "hi") == (130, "", "")


def test_a_reader_that_goes_away_is_no_news():
    out, into = os.pipe()
    os.close(out)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    with os.fdopen(into, "wb") as sink:
        done = subprocess.run(
            [sys.executable, "-m", "tinychat", "--help"],
            stdout=sink,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": ""},  # buffered, so that the exit flushes too
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (141, b"")


# ask


def test_ask_prints_the_answer(run: Run, engine: Engine, picture: str):
    assert run("ask", "What is it?", picture) == (0, "It is a red circle.\n", "")
    [request] = engine.requests
    assert request.messages[0].text == "What is it?"
    assert request.messages[0].images == (Image(path=picture),)
    assert (request.sampling, request.stopping) == (SamplingParams(temperature=0.0), StoppingParams())


def test_ask_hands_on_what_the_flags_say(run: Run, engine: Engine):
    flags = "--system Brief. --temperature 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --seed 7 --max-new-tokens 9 --stop END"
    code, _, _ = run("ask", "hi", *flags.split(), "--stop", "\n\n", "-m", "folder", "--threads", "1", "--no-stream")
    assert code == 0
    [request] = engine.requests
    assert [message.text for message in request.messages] == ["Brief.", "hi"]
    assert request.sampling == SamplingParams(temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, seed=7)
    assert request.stopping == StoppingParams(9, ("END", "\n\n"))
    assert engine.flags == ModelFlags(model="folder", threads=1)  # type: ignore[attr-defined]


def test_ask_shows_its_figures_when_asked(run: Run, engine: Engine):
    code, out, err = run("ask", "hi", "--stats")
    assert (code, out) == (0, "It is a red circle.\n")
    assert "tokens at 20.0/s" in err and "context 17 of 2,048" in err


def test_ask_prints_one_object(run: Run, engine: Engine, picture: str):
    code, out, err = run("ask", "What?", "-i", picture, "--json", "-m", "folder")
    found = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert (found["schema"], found["model"], found["usage"]["image_tokens"]) == ("tinychat.ask/1", "folder", 64)


def test_ask_says_why_an_answer_is_cut(run: Run, engine: Engine):
    engine.finish_reason = "length"
    out = "It is a red circle.\n"
    note = "the answer is cut after 7 tokens; --max-new-tokens 14 allows more\n"
    assert run("ask", "hi") == (0, out, note)
    assert run("ask", "hi", "--max-new-tokens", "7") == (0, out, "")
    engine.context = 17
    note = "the answer is cut: the context of 17 tokens is full; give more by --context, or ask for less\n"
    assert run("ask", "hi", "--max-new-tokens", "7") == (0, out, note)


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_what_the_engine_fails_with_is_the_code(run: Run, engine: Engine, more: tuple[str, ...]):
    engine.scripts = [Failed("ask", "9000 tokens do not fit into 4096", "ask for less", 5)]
    assert run("ask", "hi", *more) == (5, "", "error: 9000 tokens do not fit into 4096; ask for less\n")


def test_ask_answers_each_file_once(run: Run, engine: Engine, picture: str, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    code, printed, err = run("ask", "What?", picture, "gone.png", "--jsonl", str(out))
    assert (code, printed) == (4, "")
    assert err.startswith("gone.png does not exist; ")
    assert [json.loads(line)["input"] for line in out.read_text().splitlines()] == [picture]
    run("ask", "What?", picture, "--jsonl", str(out))
    assert len(engine.requests) == 1


def test_answers_for_each_file_need_files(run: Run, engine: Engine, tmp_path: Path):
    code, _, err = run("ask", "What?", "--jsonl", str(tmp_path / "out.jsonl"))
    assert (code, err) == (2, "error: --jsonl has no FILES to ask about; name one or more\n")


def test_ask_reads_stdin_where_a_dash_says_so(run: Run, engine: Engine, picture: str):
    assert run("ask", "What is it?", "-", stdin=Path(picture).read_bytes())[0] == 0
    assert run("ask", "Sum up:", "-", stdin=b"some text")[0] == 0
    assert engine.requests[0].messages[0].images == (Image(data=Path(picture).read_bytes()),)
    assert engine.requests[1].messages[0].text == "Sum up:\n\nsome text"


def test_a_bad_picture_is_refused_before_the_model_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(cli, "open_model", raises(AssertionError("loaded")))
    (tmp_path / "notes.png").write_text("words")
    code, _, err = run("ask", "What?", str(tmp_path / "notes.png"))
    assert (code, err.partition(";")[0]) == (4, f"error: {tmp_path / 'notes.png'} is a text file, not a picture")


# A real model, opened


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model"), "vila", max_positions=600))


def test_a_model_folder_answers(run: Run, model: str, picture: str):
    arguments = ("ask", "What?", picture, "-m", model, "--max-new-tokens", "6", "--json")
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["usage"]["image_tokens"] == 16
    assert found["timings"]["load_s"] > 0
    assert json.loads(run(*arguments)[1])["token_ids"] == found["token_ids"]


def test_files_asked_about_together_have_the_answers_that_each_has_alone(
    run: Run, model: str, picture: str, tmp_path: Path
):
    files, answers = [str(tmp_path / f"{name}.png") for name in "abcde"], list[dict[str, list[int]]]()
    for i, file in enumerate(files):
        pillow.new("RGB", (30 + 5 * i, 40), (40 * i, 90, 200)).save(file)
    for more in ([], ["--concurrency", "3"]):
        out = tmp_path / f"{len(more)}.jsonl"
        arguments = ["--jsonl", str(out), "-m", model, "--max-new-tokens", "6", *more]
        code, said, err = run("ask", "What?", *files, str(tmp_path / "gone.png"), *arguments)
        assert (code, said) == (4, "") and "gone.png does not exist" in err and "5 answered, 0 skipped" in err
        lines = map(json.loads, out.read_text().splitlines())
        answers.append({line["input"]: line["token_ids"] for line in lines})
    assert answers[0] == answers[1] and sorted(answers[0]) == files


def test_what_the_loader_is_told(model: str, monkeypatch: pytest.MonkeyPatch):
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    flags = ModelFlags(
        model, dtype="bf16", device="cpu", context=100, chunk=7, template="vicuna_v1", threads=3, speculate=2
    )
    loaded = cli.open_model(flags, rows=3)
    assert (loaded.engine.scheduler.rows, loaded.engine.scheduler.lm.speculate) == (3, 2)
    assert (loaded.model.dtype, str(loaded.model.device)) == (torch.bfloat16, "cpu")
    assert (loaded.engine.context, loaded.engine.scheduler.chunk, threads) == (100, 7, [3])
    assert "USER: hi ASSISTANT:" in loaded.processor.tokenizer.decode(loaded.processor(hi()).ids)
    assert cli.open_model(ModelFlags(model)).engine.context == 600


def hi() -> Request:
    return Request("hi", messages=(Message("user", (Text("hi"),)),))


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["-m", "no/such/folder"], 3, "error: there is no folder no/such/folder"),
        (
            ["--context", "601"],
            2,
            "error: a context of 601 tokens is asked for, the model is made for 600; try --context",
        ),
        (["--device-map", "auto", "--max-memory", "cpu=1MiB"], 5, "GiB are needed"),
        (["--template", "nope"], 2, "error: there is no template 'nope'"),
        (["--dtype", "int3"], 2, "error: dtype is 'int3'; give one of"),
        (["--device", "tpus"], 2, "error: there is no device 'tpus'; give cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], 2, "CUDA devices, not cuda:99; see `tinychat doctor`"),
        (["--max-memory", "0=1GiB"], 2, "error: --max-memory is given without --device-map"),
        (["--max-memory", "1GiB", "--device-map", "auto"], 2, "error: --max-memory has '1GiB'"),
    ],
)
def test_what_cannot_work_is_refused_before_the_weights_are_read(
    run: Run, monkeypatch: pytest.MonkeyPatch, model: str, flags: list[str], code: int, sentence: str
):
    monkeypatch.setattr("tinychat.load.assemble", raises(AssertionError("loaded")))
    found, out, err = run("ask", "hi", "-m", model, *flags)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert sentence in err


def test_an_unknown_backend_is_a_wrong_call(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packed = str(make_tiny_model(tmp_path, "text", quantize=32))
    monkeypatch.setenv("TINYCHAT_BACKEND", "warp\x1b")
    code, out, err = run("ask", "hi", "-m", packed)
    known = ", ".join(registry.ORDER)
    remedy = "set TINYCHAT_BACKEND to one of them, or to nothing"
    assert (code, out) == (2, "")
    assert err == f"error: there is no backend 'warp\\x1b'; known are {known}; {remedy}\n"


def test_a_fallback_is_one_line_beside_the_answer(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packed = str(make_tiny_model(tmp_path, "text", quantize=32))
    monkeypatch.delenv("TINYCHAT_BACKEND", raising=False)
    monkeypatch.setattr(cpu, "available", lambda: (False, "no C++ compiler was found"))
    flags = ("-m", packed, "--device", "cpu", "--max-new-tokens", "2")
    code, out, err = run("ask", "hi", "--json", *flags)
    assert code == 0 and json.loads(out)["usage"]["completion_tokens"] == 2
    assert err.startswith("4-bit layers run in plain torch, which is slow (cpu is off: no C++ compiler was found); ")
    assert err.count("\n") == 1
    monkeypatch.setenv("TINYCHAT_BACKEND", "ref")
    assert run("ask", "hi", "--json", *flags)[2] == ""


def test_an_option_that_does_nothing_is_a_wrong_call(run: Run, model: str):
    for option in (["--exact"], ["--head", "int8"], ["--tower", "int8"]):
        code, out, err = run("ask", "hi", "-m", model, *option)
        sentence = f"error: {' '.join(option)} cannot do anything: the model has no 4-bit layers; leave it out\n"
        assert (code, out, err) == (2, "", sentence)
    assert run("ask", "hi", "-m", model, "--head", "float", "--max-new-tokens", "2")[0] == 0


def test_threads_have_a_most(run: Run):
    code, _, err = run("ask", "hi", "--threads", "2000")
    assert code == 2 and "--threads is 2000, it must be less than or equal to 1024; " in err


def test_wrong_instructions_are_a_wrong_call(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packed = str(make_tiny_model(tmp_path, "text", quantize=32))
    monkeypatch.delenv("TINYCHAT_BACKEND", raising=False)
    wrong = SettingError("TINYCHAT_ISA is 'avx9', this CPU has generic", "TINYCHAT_ISA")
    monkeypatch.setattr(cpu, "available", raises(wrong))
    code, out, err = run("ask", "hi", "-m", packed, "--device", "cpu")
    assert (code, out) == (2, "")
    assert err == f"error: {wrong}; set TINYCHAT_ISA to one of them, or to nothing\n"


def test_a_prompt_that_does_not_fit_says_so(run: Run, model: str):
    code, _, err = run("ask", "hi " * 500, "-m", model)
    assert code == 5
    assert re.match(r"error: the prompt has \d+ tokens, the context holds 600 with an answer; ", err)


def test_a_real_bench(run: Run, model: str):
    arguments = ["--images", "1", "--prompt-tokens", "100", "--new-tokens", "5", "--rounds", "2", "--json"]
    code, out, _ = run("bench", "-m", model, *arguments)
    found = json.loads(out)
    json_keys.check(found, "tinychat.bench/1")
    assert (code, found["image_tokens"], found["new_tokens"], found["rounds"]) == (0, 16, 5, 2)
    assert 90 <= found["prompt_tokens"] - found["image_tokens"] <= 100
    assert found["vision_s"]["min"] > 0
    assert found["ttft_s"]["min"] >= found["vision_s"]["min"] + found["prefill_s"]["min"]


# chat, bench, doctor


def test_chat_hands_on_what_the_flags_say(run: Run, engine: Engine, picture: str, monkeypatch: pytest.MonkeyPatch):
    chats: list[tuple[Any, dict[str, Any]]] = []

    def run_chat(session: Any, **how: Any) -> int:
        chats.append((session, how))
        return 7

    monkeypatch.setattr("tinychat.terminal.repl.run_chat", run_chat)
    assert run("chat", "-i", picture, "--system", "Brief.", "--top-p", "0.5", "--no-color", "--stats")[0] == 7
    [(session, how)] = chats
    images = [Image(path=picture)]
    assert how == {"plain": True, "images": images, "title": "tinychat with embedded", "stats": True}
    assert (session.system, session.engine) == ("Brief.", engine)
    assert session.sampling == SamplingParams(temperature=0.2, top_k=50, top_p=0.5)


def test_bench_prints_a_table_or_an_object(run: Run, engine: Engine):
    code, out, err = run("bench", "--prompt-tokens", "20", "--rounds", "1")
    assert (code, err) == (0, "warm-up\nround 1 of 1\n")
    assert re.search(r"^decode, tokens/s +20 +20 +20$", out, re.M)
    assert "peak memory: RAM" in out
    code, out, _ = run("bench", "--prompt-tokens", "20", "--rounds", "1", "--images", "1", "--json")
    assert (code, json.loads(out)["images"]) == (0, 1)


HOSTILE = "a\x1b]0;owned\x07\nb\u202e"  # a window title, a forged line and a turn to the left
TAMED = "a]0;owned b"


def test_a_model_s_name_cannot_steer_the_terminal(run: Run, engine: Engine):
    code, out, _ = run("bench", "-m", HOSTILE, "--prompt-tokens", "20", "--rounds", "1")
    assert (code, out.partition(",")[0]) == (0, TAMED)


def test_a_variable_cannot_steer_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TINYCHAT_HOME", str(tmp_path / HOSTILE))
    _, out, _ = run("doctor")
    assert f"\n  TINYCHAT_HOME={tmp_path / TAMED}\n" in out
    assert f"\n  home {tmp_path / TAMED} (not made yet)\n" in out
    assert out.replace("\n", "").isprintable()


def test_a_trace_cannot_steer_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "open_model", raises(ModelError(HOSTILE, "take another")))
    err = run("ask", "hi", "--verbose")[2]
    assert err.startswith("Traceback") and "a]0;owned" in err
    assert err.replace("\n", "").isprintable()


def test_doctor_prints_text_or_an_object(run: Run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert out.startswith(f"Versions\n  tinychat {__version__}\n")
    assert json.loads(run("doctor", "--json")[1])["schema"] == "tinychat.doctor/1"


def test_doctor_clears_the_cache(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TINYCHAT_CACHE", str(tmp_path))
    (tmp_path / doctor.CACHES[0]).mkdir()
    (tmp_path / doctor.CACHES[0] / "a").write_bytes(b"12345")
    code, out, err = run("doctor", "--cache", "--clear")
    assert (code, out, err) == (0, f"Cache\n  {tmp_path}\n", "deleted 5 B\n")
    assert list(tmp_path.iterdir()) == []
