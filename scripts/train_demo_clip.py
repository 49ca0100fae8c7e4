#!/usr/bin/env python3
"""Train the small CLIP that `tinychat search` takes where no model is named, on generated pictures and their captions.

    scripts/train_demo_clip.py --run runs/clip --minutes 30     # stops cleanly; the same call resumes
    scripts/train_demo_clip.py --run runs/clip --export tinychat/assets/search

The loss is CLIP's (arXiv 2103.00020) over three captions a picture, one that tells all and two that tell a part; where
a caption is true of another picture of the batch as well, that pair is left out. Besides, each patch's features tell
what covers it (tinychat/eval/demo/dense.py). Colours and kinds that demo_captions.HELD_OUT pairs are never shown.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from demo_captions import Caption, caption, compose, facts, holds_out, tell_all, tell_part, words
from demo_export import PREPROCESSOR
from tinychat.eval.demo import GRID, IMAGE_SIZE, PATCH, dense
from tinychat.eval.demo.samples import FAMILIES, Split
from tinychat.eval.demo.scenes import Scene, change
from train_demo_model import DenseHeads, note, pixels, schedule, sines

LENGTH = 40  # tokens of a caption
PAD, BEGIN, END = "<pad>", "<|begin|>", "<|end|>"
MUON_LR, ADAM_LR = 0.015, 1.5e-3
TELLINGS = (tell_all, tell_part, tell_part)
CHANGED = 0.25  # of the pictures of a batch differ in one shape from another one
GROUP = 32  # pictures and captions that are told apart in a validation
WIDTH, PROJECTION = 128, 128


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Small letters; the captions' words are one token each, everything else is bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = dict.fromkeys(("Ġ" + word if spaced else word) for word in words() for spaced in (True, False))
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys((PAD, END, BEGIN, *alphabet, *whole)))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BEGIN, END)])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, vocabulary[BEGIN]), (END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BEGIN, eos_token=END, model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def clip_config(tokenizer: PreTrainedTokenizerFast) -> CLIPConfig:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "hidden_act": "gelu"}
    text = {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    vision = {"num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": PATCH}
    return CLIPConfig(
        text_config={**tower, **text, **ids, "projection_dim": PROJECTION},
        vision_config={**tower, **vision, "projection_dim": PROJECTION},
        projection_dim=PROJECTION,
    )


@torch.no_grad()
def initialize(model: CLIPModel) -> None:
    """As scripts/train_demo_model.py begins: tokens as loud as what attention adds, patches that know their place."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(3 * module.in_features) ** -0.5)
    text, vision = model.text_model.embeddings, model.vision_model.embeddings
    nn.init.normal_(text.token_embedding.weight, std=0.7)
    nn.init.normal_(text.position_embedding.weight, std=0.3)
    vision.position_embedding.weight[1:] = 0.4 * sines(GRID, WIDTH)


@dataclass
class State:
    """Everything that a checkpoint holds."""

    model: CLIPModel
    dense: DenseHeads
    optimizers: list[torch.optim.Optimizer]
    seen: int = 0

    def save(self, path: Path) -> None:
        parts = {"model": self.model.state_dict(), "dense": self.dense.state_dict(), "seen": self.seen}
        beside = path.with_suffix(".tmp")
        torch.save({**parts, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}, beside)
        beside.replace(path)

    def load(self, path: Path) -> None:
        parts = torch.load(path, weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.dense.load_state_dict(parts["dense"])
        for optimizer, saved in zip(self.optimizers, parts["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.seen = parts["seen"]


def new_state(tokenizer: PreTrainedTokenizerFast) -> State:
    torch.manual_seed(0)
    model = CLIPModel(clip_config(tokenizer))
    initialize(model)
    heads = DenseHeads(WIDTH)
    parts = [*model.named_parameters(), *heads.named_parameters()]
    matrices = [p for name, p in parts if p.ndim == 2 and "layers." in name]
    rest = [p for name, p in parts if not (p.ndim == 2 and "layers." in name)]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.05, momentum=0.95)
    adam = torch.optim.AdamW(rest, lr=ADAM_LR, weight_decay=0.02, betas=(0.9, 0.98))
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return State(model, heads, [muon, adam])


def batch_of(first: int, size: int) -> tuple[list[Scene], random.Random]:
    """`size` scenes of the training; some come with a second that differs from it in one shape."""
    rng, shown = random.Random(f"clip/train/{first}"), list[Scene]()
    while len(shown) < size:
        scene = compose(rng, "train")
        pair = [scene]
        if scene.shapes and rng.random() < CHANGED:
            pair.append(change(rng, FAMILIES["train"].style, scene)[0])
        shown += [one for one in pair if not holds_out(one)]
    return shown[:size], rng


def encode(tokenizer: PreTrainedTokenizerFast, captions: list[Caption]) -> Tensor:
    """[N, longest] token ids, padded on the right."""
    texts = [each.text for each in captions]
    return tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]  # type: ignore[return-value]


def image_features(model: CLIPModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 3, S, S] -> normalised embeddings [N, P], patches [N, GRID * GRID, D]."""
    out = model.vision_model(pixel_values=images)
    return normalize(model.visual_projection(out.pooler_output).float(), dim=-1), out.last_hidden_state[:, 1:]


def text_features(model: CLIPModel, ids: Tensor) -> Tensor:
    """[N, T] -> normalised embeddings [N, P]."""
    return normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output).float(), dim=-1)


def contrast(logits: Tensor, true: Tensor) -> Tensor:
    """The loss of logits [N, N] both ways, without the pairs beside the diagonal that are `true` [N, N] as well."""
    own = torch.eye(len(logits), dtype=torch.bool)
    logits = logits.masked_fill(true & ~own, -torch.inf)
    wanted = torch.arange(len(logits))
    return (cross_entropy(logits, wanted) + cross_entropy(logits.T, wanted)) / 2


def losses(state: State, tokenizer: PreTrainedTokenizerFast, first: int, size: int) -> tuple[Tensor, Tensor]:
    """The contrastive loss and that of the patches, of one batch."""
    scenes, rng = batch_of(first, size)
    paint = FAMILIES["train"].style.paint
    images = pixels([paint(rng, scene) for scene in scenes])
    labels = torch.from_numpy(np.stack([dense.dense(scene) for scene in scenes])).long()
    told = [[caption(rng, scene, telling) for scene in scenes] for telling in TELLINGS]
    known = [facts(scene) for scene in scenes]
    with torch.autocast("cpu", torch.bfloat16):
        seen, patches = image_features(state.model, images)
        heard = text_features(state.model, encode(tokenizer, [each for group in told for each in group]))
        side = state.dense.loss(patches, labels)
    scale = state.model.logit_scale.clamp(max=4.6).exp()
    total = torch.zeros(())
    for group, texts in zip(told, heard.split(size), strict=True):
        true = torch.tensor([[each.needs <= fact for each in group] for fact in known])
        total = total + contrast(scale * seen @ texts.T, true) / len(told)
    return total, side


def train(state: State, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Train until --samples are seen, --minutes are over, or a signal comes; and save."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    started, average, step = time.monotonic(), torch.zeros(2), 0
    state.model.train()
    while not (stopped.is_set() or state.seen >= args.samples or time.monotonic() - started > args.minutes * 60):
        loss, side = losses(state, tokenizer, state.seen, args.batch)
        advance(state, loss + args.dense * side, schedule(state.seen / args.samples))
        state.seen, step = state.seen + args.batch, step + 1
        now = torch.stack([loss.detach(), side.detach()])
        average = now if step == 1 else 0.95 * average + 0.05 * now
        if step % 25 == 0:
            speed = step * args.batch / (time.monotonic() - started)
            note(args.run / "log.jsonl", seen=state.seen, loss=average[0].item(), dense=average[1].item(), speed=speed)
        if step % 200 == 0:
            state.save(args.run / "checkpoint.pt")
            scores = {
                split: sum(retrieval(state.model, tokenizer, split, 4)) / 2 for split in ("validation", "heldout")
            }
            note(args.run / "log.jsonl", seen=state.seen, **scores)
    state.save(args.run / "checkpoint.pt")


def advance(state: State, loss: Tensor, share: float) -> None:
    for optimizer in state.optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * max(share, 1e-3)
    loss.backward()
    nn.utils.clip_grad_norm_([*state.model.parameters(), *state.dense.parameters()], 1.0)
    for optimizer in state.optimizers:
        optimizer.step()


@dataclass(frozen=True, slots=True)
class Trial:
    """GROUP pictures; of each a caption that is true of no other, one that tells a part, and its facts."""

    pictures: list[np.ndarray]
    whole: list[Caption]
    parts: list[Caption]
    known: list[frozenset[str]]


def trial(split: Split, index: int, unseen: bool = False) -> Trial:
    """`unseen`: each picture shows a held-out combination; else none does."""
    rng = random.Random(f"clip/{split}/{index}/{unseen}")
    made = Trial([], [], [], [])
    while len(made.pictures) < GROUP:
        scene = compose(rng, split)
        told, fact = caption(rng, scene, tell_all), facts(scene)
        if holds_out(scene) != unseen or any(each.needs <= fact for each in made.whole):
            continue
        made.pictures.append(FAMILIES[split].style.paint(rng, scene))
        made.whole.append(told)
        made.parts.append(caption(rng, scene, tell_part))
        made.known.append(fact)
    return made


@torch.no_grad()
def retrieval(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, split: Split, trials: int, unseen: bool = False
) -> tuple[float, ...]:
    """Of GROUP: captions that find their picture, pictures that find their caption, parts whose first picture fits."""
    was_training = model.training
    model.eval()
    right, own = torch.zeros(3), torch.arange(GROUP)
    for index in range(trials):
        made = trial(split, index, unseen)
        images = image_features(model, pixels(made.pictures))[0]
        scores = text_features(model, encode(tokenizer, made.whole)) @ images.T
        found = (text_features(model, encode(tokenizer, made.parts)) @ images.T).argmax(1).tolist()
        fits = torch.tensor([part.needs <= made.known[i] for part, i in zip(made.parts, found, strict=True)])
        right += torch.stack(
            [(hits).float().mean() for hits in (scores.argmax(1) == own, scores.argmax(0) == own, fits)]
        )
    model.train(was_training)
    return tuple((right / trials).tolist())


CARD = """# The tinychat search model

A toy CLIP that comes with tinychat, so that `tinychat search` can be tried and tested without a download. It was
trained on generated pictures, {side} x {side} pixels, of coloured shapes, numbers, short words and small bar charts,
and on captions such as "two red circles and a blue star" or "the word cat". It knows drawn shapes only: give
`--model` for photographs.

- Architecture: CLIP as transformers has it; {layers} layers of width {width} see, 2 read; {params:.2f} million
  parameters in 16 bit.
- Training: {seen:,} pictures with three captions each, one CPU thread, all generated, with
  `scripts/train_demo_clip.py`; no other data.
- License: that of tinychat.

Top-1 of {group} over {trials} trials: how many captions find their picture among {group}, and how many pictures their
caption, where a caption tells all that its picture shows and is true of that one alone; and of how many captions that
tell a part ("a red circle", "three stars") the first picture fits. "Validation" is drawn as in training; in "new
combinations" each picture shows a {combinations},
which training never did; "other hand" is drawn by other code, with other colours, outlines, grounds and letters.

| | caption finds picture | picture finds caption | part fits |
|---|---|---|---|
{rows}
"""
CASES: tuple[tuple[str, Split, bool], ...] = (
    ("validation", "validation", False),
    ("new combinations", "validation", True),
    ("other hand", "heldout", False),
)


def export(state: State, tokenizer: PreTrainedTokenizerFast, out: Path, trials: int) -> None:
    """Write the folder as transformers reads it, in 16 bit, with its card."""
    model = copy.deepcopy(state.model).half().eval()
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n", encoding="utf-8")
    rows = list[str]()
    for name, split, unseen in CASES:
        shares = retrieval(model.float(), tokenizer, split, trials, unseen)
        rows.append(f"| {name} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")
        print(rows[-1], flush=True)
    card = CARD.format(
        side=IMAGE_SIZE, layers=4, width=WIDTH, params=sum(p.numel() for p in model.parameters()) / 1e6,
        seen=state.seen, group=GROUP, trials=trials, rows="\n".join(rows),
        combinations="gray heart, black star, purple cross or orange square",
    )  # fmt: skip
    (out / "README.md").write_text(card, encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/clip"), help="folder of checkpoint and log")
    parser.add_argument("--samples", type=int, default=250_000, help="pictures in the whole training")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after this long; call again to resume")
    parser.add_argument("--batch", type=int, default=128, help="pictures a step")
    parser.add_argument("--dense", type=float, default=0.1, help="weight of the patches' loss")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the model and its card, and stop")
    parser.add_argument("--trials", type=int, default=32, help="trials a row for the card of --export")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    args.run.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    state = new_state(tokenizer)
    if (args.run / "checkpoint.pt").exists():
        state.load(args.run / "checkpoint.pt")
        print(f"resumed after {state.seen} pictures", flush=True)
    if args.export:
        export(state, tokenizer, args.export, args.trials)
        return 0
    train(state, tokenizer, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
