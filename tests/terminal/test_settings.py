from __future__ import annotations

from dataclasses import fields

import pytest
from scripted_engine import ScriptedEngine

from tinychat.core import SamplingParams, StoppingParams
from tinychat.errors import UsageError
from tinychat.session import Session
from tinychat.terminal.settings import SETTINGS, change, current


@pytest.fixture
def session() -> Session:
    return Session(ScriptedEngine())


@pytest.mark.parametrize(
    ("name", "word", "value"),
    [
        ("temperature", "0.7", 0.7),
        ("top_k", "40", 40),
        ("top_k", "off", 0),
        ("top_p", "off", 1.0),
        ("seed", "7", 7),
        ("seed", "off", None),
        ("max_new_tokens", "off", None),
        ("stop", "### end", ("### end",)),
        ("stop", "off", ()),
    ],
)
def test_a_setting_changes_what_is_asked_next(session: Session, name: str, word: str, value: object) -> None:
    change(session, name, word)
    holder = session.sampling if hasattr(session.sampling, name) else session.stopping
    assert getattr(holder, name) == value
    list(session.say("hello"))
    assert session.engine.requests[0].sampling == session.sampling  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "word", "sentence"),
    [
        ("temperature", "hot", "temperature cannot be 'hot'; give a number"),
        ("temperature", "off", "temperature cannot be 'off'; give a number"),
        ("temperature", "nan", "temperature cannot be 'nan'"),
        ("temperature", "-1", "temperature is -1.0, it must be 0 or more"),
        ("top_k", "1.5", "top_k cannot be '1.5'; give a whole number or off"),
        ("top_p", "2", "top_p is 2.0, it must be above 0 and at most 1"),
        ("max_new_tokens", "0", "max_new_tokens is 0, it must be 1 or more"),
        ("temprature", "1", "there is no setting 'temprature'; did you mean temperature?"),
        ("xyzzy", "1", "there is no setting 'xyzzy'; known are temperature, top_k"),
    ],
)
def test_a_bad_value_is_told_and_changes_nothing(session: Session, name: str, word: str, sentence: str) -> None:
    before = (session.sampling, session.stopping)
    with pytest.raises(UsageError) as caught:
        change(session, name, word)
    assert sentence in str(caught.value)
    assert (session.sampling, session.stopping) == before


def test_the_present_values_are_listed(session: Session) -> None:
    change(session, "stop", "END")
    assert dict(current(session)) == {
        **dict.fromkeys(("top_k", "min_p", "frequency_penalty", "presence_penalty", "temperature"), "0"),
        **dict.fromkeys(("top_p", "typical_p", "repetition_penalty"), "1"),
        "seed": "off",
        "max_new_tokens": "512",
        "stop": "'END'",
    }


def test_every_setting_is_a_field() -> None:
    names = {field.name for kind in (SamplingParams, StoppingParams) for field in fields(kind)}
    assert set(SETTINGS) <= names
    elsewhere = {"logit_bias", "ignore_eos", "include_stop", "watermark", "top_n_tokens", "prompt_logprobs"}
    assert names - set(SETTINGS) == elsewhere
