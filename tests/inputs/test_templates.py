"""Templates: rows against strings written out by hand, jinja habits found by trying, choice by tokens alone."""

from __future__ import annotations

import pytest

from tinychat.errors import ModelError, UsageError
from tinychat.inputs.marks import ANSWER, IMAGE, MarkedTokenizer
from tinychat.inputs.templates import ROWS, Jinja, Turn, choose

CHAT = [Turn("system", "SYS"), Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "q2")]
EXPECTED = {
    "vicuna_v1": "SYS USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT:",
    "llama_3": "<|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml": "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
    "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
    "hermes-2": "<|im_start|>system\nSYS<|im_end|><|im_start|>user\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>"
    "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\n",
    "llama_2": "[INST] <<SYS>>\nSYS\n<</SYS>>\n\nq1 [/INST] a1 </s><s>[INST] q2 [/INST]",
    "mistral": "[INST] SYS\n\nq1 [/INST] a1</s>[INST] q2 [/INST]",
    "plain": "SYS\nq1\na1\nq2\n",
}


def marked(tokenizers, name):
    return MarkedTokenizer(tokenizers(name), "<image>")


def jinja(tokenizers, source, name="llama"):
    return Jinja.of(marked(tokenizers, name), source)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_renders_the_strings_it_was_trained_with(name):
    assert ROWS[name].render(CHAT, True) == EXPECTED[name]


@pytest.mark.parametrize("name", ROWS)
def test_the_answer_header_is_what_stands_before_an_answer(name):
    asked = ROWS[name].render(CHAT[:2], True)
    said = ROWS[name].render([*CHAT[:2], Turn("assistant", "a1")], False)
    assert said.partition("a1")[0].rstrip() == asked.rstrip()


def test_default_and_empty_system_words():
    question = Turn("user", "q")
    assert ROWS["vicuna_v1"].render([question], True).startswith("A chat between a curious user and an artificial")
    assert ROWS["vicuna_v1"].render([Turn("system", ""), question], True) == "USER: q ASSISTANT:"
    assert "Answer the questions." in ROWS["hermes-2"].render([question], True)
    assert ROWS["llama_2"].render([question], True) == "[INST] q [/INST]"
    assert ROWS["plain"].render([question], True) == "q\n"


def test_braces_are_text():
    for row in ROWS.values():
        assert "{0} {x} {{ y }} %s {%" in row.render([Turn("user", "{0} {x} {{ y }} %s {%")], True)


@pytest.mark.parametrize(
    ("tokenizer", "chosen"),
    [("chatml", "jinja"), ("bare_chatml", "chatml"), ("bare_llama_3", "llama_3"), ("llama", "vicuna_v1")],
)
def test_the_tokenizer_chooses(tokenizers, tokenizer, chosen):
    assert choose(marked(tokenizers, tokenizer), None, None, "vicuna_v1").name == chosen


def test_a_name_comes_first_then_jinja_then_the_config(tokenizers, tmp_path):
    own = marked(tokenizers, "chatml")
    assert choose(own, "hermes-2", None, "plain").name == "hermes-2"
    assert choose(own, None, "llama_3", "plain").name == "jinja"
    assert choose(marked(tokenizers, "llama"), None, "qwen2", "plain").name == "chatml"
    assert choose(marked(tokenizers, "llama"), None, "unheard-of", "plain").name == "plain"
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}")
    assert choose(own, str(path), None, "plain").render([Turn("user", "q")], True) == "user=q;"


def test_unknown_and_missing_templates(tokenizers):
    with pytest.raises(UsageError, match=r"no template 'vicuna_v2'; did you mean vicuna_v1\? known are vicuna_v1, "):
        choose(marked(tokenizers, "llama"), "vicuna_v2", None, "plain")
    with pytest.raises(UsageError, match="has no chat template of its own; take one of vicuna_v1"):
        choose(marked(tokenizers, "llama"), "jinja", None, "plain")


def test_habits_of_jinja_templates(tokenizers):
    for name, style, fold, stop in (
        ("chatml", "string", False, ("<|im_end|>",)),
        ("llama_3", "string", False, ("<|eot_id|>",)),
        ("llava_hf", "list", False, ()),
        ("mistral", "string", True, ("</s>",)),
    ):
        own = marked(tokenizers, name)
        template = choose(own, None, None, "plain")
        assert (template.style, template.fold, template.stop) == (style, fold, stop), name


def test_system_words_are_folded_where_they_are_refused_or_ignored(tokenizers):
    ignored = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}"
    for template in (choose(marked(tokenizers, "mistral"), None, None, "plain"), jinja(tokenizers, ignored)):
        assert "SYS\n\nq1" in template.render(CHAT[:2], True)
        assert "SYS" in template.render(CHAT[:1], True)


def test_list_templates_place_the_images(tokenizers):
    template = choose(marked(tokenizers, "llava_hf"), None, None, "plain")
    text = template.render([Turn("user", f"{IMAGE}{IMAGE}compare"), Turn("assistant", ANSWER)], False)
    assert text == f"USER: {IMAGE}\n{IMAGE}\ncompare ASSISTANT: {ANSWER} "


def test_lists_of_text_without_images(tokenizers):
    words = "{% if c.type == 'text' %}{{ c.text }}|{% endif %}"
    source = "{% for m in messages %}{% for c in m.content %}" + words + "{% endfor %}{% endfor %}"
    template = jinja(tokenizers, source)
    assert template.style == "marked_list"
    assert template.render([Turn("user", f"{IMAGE}\nq")], True) == f"{IMAGE}\nq|"


def test_system_words_are_folded_where_a_list_of_them_is_printed_raw(tokenizers):
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{{ c.text if c.type == 'text' else '<image>' }}{% endfor %}{% endif %}{% endfor %}"
    )
    template = jinja(tokenizers, source)
    assert (template.style, template.fold) == ("list", True)
    assert template.render([Turn("system", "SYS"), Turn("user", f"{IMAGE}q")], True) == f"SYS\n\n{IMAGE}q"


def test_refusals_of_a_template_are_passed_on(tokenizers):
    template = choose(marked(tokenizers, "mistral"), None, None, "plain")
    with pytest.raises(UsageError, match="refuses this conversation: Conversation roles must alternate"):
        template.render([Turn("user", "a"), Turn("user", "b")], True)


def test_broken_templates_are_refused(tokenizers):
    for source in ("nothing of the message", "{{ raise_exception('never') }}", "{{ messages + 'a' }}"):
        with pytest.raises(ModelError, match="does not render a message.*choose --template: vicuna_v1"):
            jinja(tokenizers, source)
    twice = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="made 2 places for 1 images"):
        jinja(tokenizers, twice).render([Turn("user", IMAGE)], True)
