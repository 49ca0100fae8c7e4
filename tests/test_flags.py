"""Flags become dataclasses; values that cannot work are refused before a model is loaded."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

from tinychat.core import SamplingParams, StoppingParams
from tinychat.errors import UsageError
from tinychat.flags import SamplingFlags, checkpoint_sampling, parse_device_map, parse_max_memory


def test_flags_set_what_they_name_and_keep_the_rest():
    base = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    found = SamplingFlags(temperature=0.0, top_k=5, seed=3).sampling(base)
    assert found == SamplingParams(temperature=0.0, top_p=0.9, top_k=5, repetition_penalty=1.1, seed=3)


def test_stopping_comes_from_the_flags():
    assert SamplingFlags().stopping() == StoppingParams()
    assert SamplingFlags(max_new_tokens=7, stop=["a", "b"]).stopping() == StoppingParams(7, ("a", "b"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, it must be 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0, it must be above 0 and at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, it must be 1 or more"),
        ({"stop": [""]}, "a stop string is empty"),
    ],
)
def test_values_out_of_range_are_refused_at_once(flags: dict[str, object], sentence: str):
    with pytest.raises(UsageError, match=sentence):
        SamplingFlags(**flags)  # type: ignore[arg-type]


def test_a_checkpoint_that_samples():
    config = GenerationConfig(do_sample=True, temperature=0.2, top_p=0.95, repetition_penalty=1.05)
    assert checkpoint_sampling(config.to_dict()) == SamplingParams(0.2, 50, 0.95, repetition_penalty=1.05)


@pytest.mark.parametrize("raw", [{}, {"do_sample": False, "temperature": 0.9, "top_p": 0.5}])
def test_a_checkpoint_that_does_not_sample_is_greedy(raw: dict[str, object]):
    assert checkpoint_sampling(raw) == SamplingParams(temperature=0.0)


def test_a_device_map_is_a_word_or_json(tmp_path):
    assert parse_device_map(None) is None and parse_device_map("auto") == "auto"
    assert parse_device_map(' {"llm.model": 0, "": "disk"}') == {"llm.model": 0, "": "disk"}
    path = tmp_path / "map.json"
    path.write_text('{"": "cpu"}')
    assert parse_device_map(str(path)) == {"": "cpu"}
    for text in ("{}", '{"": 1.5}', '{"": true}'):
        with pytest.raises(UsageError, match="is no JSON object of modules and devices; give auto, balanced, sequent"):
            parse_device_map(text)
    for text in ("{", "no/such.json", str(tmp_path)):
        with pytest.raises(UsageError, match=r"--device-map '.*' cannot be read \(.*; give auto, balanced, sequential"):
            parse_device_map(text)


def test_max_memory_is_a_list_of_limits():
    assert parse_max_memory("0=10GiB, cpu=30GiB") == {0: 10 * 2**30, "cpu": 30 * 2**30}
    assert parse_max_memory("0=1gb,cpu=1.5mib") == {0: 10**9, "cpu": 3 * 2**19}, "bytes in any case, and never bits"
    assert parse_max_memory(None) is None
    with pytest.raises(UsageError, match=r"--max-memory has '10GiB'; write device=size"):
        parse_max_memory("10GiB")
    with pytest.raises(UsageError, match=r"--max-memory has the size 'xyz' for cpu; write it as 10GiB, 500MB or 64KiB"):
        parse_max_memory("cpu=xyz")
    with pytest.raises(UsageError, match=r"--max-memory has the device 'gpu'; name cpu, or a CUDA device"):
        parse_max_memory("gpu=1GiB")
