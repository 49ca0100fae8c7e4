"""The command: its lines, its JSON, its plan, and what it says when it is cut off."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path

import pytest

from make_tiny_model import make_tiny_model
from tinychat import cli
from tinychat.errors import UsageError
from tinychat.flags import QuantizeFlags, parse_size
from tinychat.quantize import verb
from tinychat.quantize.run import LayerDone, Written

QUICK = (
    "--group-size",
    "32",
    "--calib-samples",
    "2",
    "--calib-seqlen",
    "24",
    "--scale-grid",
    "2",
    "--card-samples",
    "1",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("model"), "text"))


def test_a_run_in_lines(model, tmp_path, capfd):
    assert cli.main(["quantize", model, str(tmp_path / "out"), *QUICK]) == 0
    out, err = capfd.readouterr()
    checking, first, about, reading, busy, layer, last, measuring, *figures = err.splitlines()
    assert (checking, first) == ("checking the weights", "reading the model's files")
    assert (reading, busy) == ("reading the calibration data", "quantizing")
    assert about.startswith("about ") and "of memory and" in about
    assert layer.startswith("layer 1 of 2: loss 0.") and " searched" in layer and last.startswith("layer 2 of 2")
    assert measuring == "making the quality card" and figures[0] == "32 bit: 1 held-out answers"
    assert [line.partition(" 4 bit: ")[0] for line in figures[2:]] == ["RTN", "RTN", "AWQ", "AWQ"]
    assert out.rstrip().endswith("; its quality is told in README.md")
    assert out.startswith(f"{tmp_path / 'out'}: ") and "% below that of rounding to the nearest" in out


def test_a_run_in_json(model, tmp_path, capfd):
    assert cli.main(["quantize", model, str(tmp_path / "out"), *QUICK, "--json"]) == 0
    out, err = capfd.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert err == "" and {event["schema"] for event in events} == {"tinychat.quantize/1"}
    kinds = [event["event"] for event in events if event["event"] != "progress"]
    assert kinds == ["began", "layer", "layer", *["figure"] * 6, "written"]
    assert events[-2]["text"].startswith("AWQ 4 bit: perplexity ")
    assert set(events[-1]["facts"]["layers"][0]["loss"]) == {"rtn", "awq"}


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_dry_run_writes_nothing(model, tmp_path, capfd, more):
    assert cli.main(["quantize", model, str(tmp_path / "out"), *QUICK, "--dry-run", *more]) == 0
    out, _ = capfd.readouterr()
    assert not [*tmp_path.iterdir()]
    if more:
        assert json.loads(out)["linears"] == 14
    else:
        heads = ["quantized", "stays", "calibration", "memory", "disk", "card", "time"]
        assert [line.partition(":")[0] for line in out.splitlines()] == heads
        assert out.splitlines()[-1].startswith("time:        about ") and out.endswith(" on this machine\n")
        assert "14 linears of 2 layers" in out and "lm_head, embeddings and norms" in out


def test_a_dry_run_says_that_it_does_not_fit(model, tmp_path, capfd):
    assert cli.main(["quantize", model, str(tmp_path / "out"), *QUICK, "--dry-run", "--max-ram", "1MiB"]) == 5
    out, err = capfd.readouterr()
    assert "1.0 MiB are allowed or free" in out and "error: " in err


@pytest.fixture
def hears_ctrl_c():
    """A process that a shell starts in the background ignores SIGINT; one in a terminal does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_cut_off_it_says_how_to_go_on(model, tmp_path, capfd, monkeypatch, number):
    out = tmp_path / "the out"
    show = verb._show

    def cut(event, *rest):
        show(event, *rest)
        if isinstance(event, LayerDone):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(verb, "_show", cut)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["quantize", model, str(out), *QUICK]) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    last = capfd.readouterr().err.splitlines()[-1]
    said, _, command = last.partition("; go on with: ")
    assert said == f"interrupted; the work so far is kept in {out}.partial"
    assert shlex.split(command)[0] == "tinychat"
    assert cli.main(shlex.split(command)[1:]) == 0
    assert "1 of 2 layers were done before" in capfd.readouterr().err and out.is_dir()


def test_the_command_to_go_on_holds_what_was_given():
    flags = QuantizeFlags("M", "O U T", calib=["a", "b c"], clip=False, duo=False, bits=3, pseudo=True, dry_run=True)
    words = verb.command(flags)
    assert words == "tinychat quantize M 'O U T' --bits 3 --pseudo --calib a --calib 'b c' --no-clip --no-duo --resume"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "a model and a folder to write are needed; write tinychat quantize MODEL OUT"),
        (("M",), 2, "a model and a folder to write are needed"),
        (("/nope/m", "out"), 3, "there is no folder /nope/m"),
        (("MODEL", "out", "--group-size", "48"), 2, "group_size is 48"),
        (("MODEL", "out", "--method", "gptq"), 2, "--method is 'gptq'; give awq or rtn"),
        (("MODEL", "out", "--method", "rtn", "--no-clip"), 2, "--method rtn searches nothing, and --no-clip is given"),
        (("MODEL", "out", "--method", "rtn", "--calib", "a.txt"), 2, "and --calib is given as well; give one of the"),
        (("MODEL", "out", "--search-results", "a.pt", "--calib-seqlen", "9"), 2, "and --calib-seqlen is given as well"),
        (("MODEL", "out", "--no-card", "--card-samples", "2"), 2, "--no-card makes no card, and --card-samples 2 is"),
        (("MODEL", "out", "--max-ram", "much"), 2, "--max-ram has the size 'much'; write it as 10GiB"),
        (("MODEL", "out", "--device", "cuda:99"), 2, "CUDA devices, not cuda:99"),
        (("MODEL", "out"), 3, "is not a multiple of group_size=128; choose another group size"),
    ],
)
def test_what_cannot_work_is_one_line_and_a_code(model, capfd, arguments, code, sentence):
    given = [model if word == "MODEL" else word for word in arguments]
    assert cli.main(["quantize", *given]) == code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize(("text", "count"), [("6GiB", 6 * 2**30), ("1.5MB", 1_500_000), ("64kib", 65536), (None, None)])
def test_sizes(text: str | None, count: int | None) -> None:
    assert parse_size("--max-ram", text) == count


@pytest.mark.parametrize("text", ["", "GiB", "6", "6 GiB", "-1GiB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="--max-disk has the size"):
        parse_size("--max-disk", text)


def test_fallbacks_are_told(tmp_path: Path) -> None:
    losses = [{"kept": "awq", "loss": {"rtn": 2.0, "awq": 1.0}}, {"kept": "rtn", "loss": {"rtn": 2.0, "awq": 3.0}}]
    facts = {"layers": losses, "fallbacks": [1], "wall_s": 90.0}
    text = verb.written_text(Written(tmp_path, facts))
    assert "2 layers in 90 s; the layers' error is 25 % below" in text
    assert text.endswith("1 layers are rounded to the nearest, since no search did better: [1]")
    event = LayerDone(0, 2, "rtn", {"rtn": 0.5, "awq": 0.75}, 3.0, 3.0)
    assert "loss 0.5 rounded to the nearest, 0.75 searched, which is not kept, 3 s, 3 s left" in verb.layer_text(event)
