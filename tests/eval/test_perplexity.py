"""Perplexity against transformers' own loss, window by window."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from make_tiny_model import make_tiny_model
from tinychat import load
from tinychat.engine.engine import Engine
from tinychat.errors import ModelError, UsageError
from tinychat.eval.heldout import heldout
from tinychat.eval.perplexity import answer_perplexity, perplexity, read_text, text_ids, windows_in


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def theirs(model: torch.nn.Module, ids: list[int], seqlen: int) -> float:
    """transformers' shifted cross-entropy of each whole window, averaged."""
    losses = [
        model(input_ids=(window := torch.tensor([ids[at : at + seqlen]])), labels=window).loss.item()
        for at in range(0, len(ids) - seqlen + 1, seqlen)
    ]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("length", "seqlen"), [(100, 16), (96, 16), (16, 16), (40, 2)])
@torch.no_grad()
def test_windows_and_losses_are_those_of_transformers(length: int, seqlen: int) -> None:
    model = tiny_llama()
    ids = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    assert perplexity(model, ids, seqlen) == pytest.approx(theirs(model, ids, seqlen), rel=1e-5)  # type: ignore[arg-type]
    assert windows_in(ids, seqlen) == length // seqlen


@torch.no_grad()
def test_our_model_scores_as_transformers_does(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "text", "text")
    ours = load.load_folder(folder, load.Placement())
    ids = text_ids(ours.processor, "A text that is a little longer than two windows. " * 3)
    reference = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    assert perplexity(ours.model, ids, 64) == pytest.approx(theirs(reference, list(ids), 64), rel=1e-4)


@torch.no_grad()
def test_right_answers_are_scored_after_their_prompts(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "text", "text")
    ours = load.load_folder(folder, load.Placement())
    reference = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    items = [item for item in heldout("demo").items(3) if item.kind == "text"]
    losses: list[float] = []
    for item in items:
        prompt = list(ours.processor(item.request).ids)
        answer = ours.processor.tokenizer(item.answer, add_special_tokens=False)["input_ids"]  # type: ignore[arg-type]
        logp = reference(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        losses += [-float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
    found = answer_perplexity(Engine(ours.model, ours.processor), items)
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


@pytest.mark.parametrize(
    ("length", "seqlen", "sentence"),
    [
        (15, 16, "the text has 15 tokens, one window takes 16; give a longer text, or --seqlen 15 or less"),
        (1, 16, "the text has 1 tokens, one window takes 16; give a longer text$"),
        (20, 1, "a window of 1 tokens predicts nothing; give --seqlen 2 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(length: int, seqlen: int, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        perplexity(tiny_llama(), [0] * length, seqlen)  # type: ignore[arg-type]


def test_not_a_number_is_named() -> None:
    model = tiny_llama()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(ModelError, match="likelihood of the text is not a number; check its weights"):
        perplexity(model, [0] * 16, 16)  # type: ignore[arg-type]


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match=r"a.png is not text in UTF-8 \(byte 0\)"):
        read_text(picture)
    with pytest.raises(UsageError, match="none.txt cannot be read: No such file"):
        read_text(tmp_path / "none.txt")
