"""What the card of a new checkpoint will take, and so how it is made: of whole models, or a layer at a time."""

from __future__ import annotations

from dataclasses import dataclass

from tinychat import planner
from tinychat.checkpoint import EMBEDDINGS, MAPPED, Index
from tinychat.config import FLOAT_TYPES
from tinychat.core import Request, Text
from tinychat.engine.engine import CONTEXT
from tinychat.eval import card, divergence, heldout, probes
from tinychat.eval.card import CardPlan
from tinychat.eval.heldout import speaks_demo
from tinychat.eval.logits import memory
from tinychat.inputs.processor import Processor
from tinychat.quantize.job import Job, Source, linears

LAYERS, NONE = "layers", "none"
FLOAT = 4
SHARE = 4  # of the samples that `tinychat eval` takes, one in so many: a card is made of every checkpoint
SPILL = 64 * 2**20  # bytes of what the original said that are kept in memory
SLICE = 8192  # rows of the head at once
FIT = 8  # copies of the largest linear, while it is compared
WORDS = 80  # tokens of a question, its template and an answer, roughly
SHORT = 8  # tokens of an answer to a probe


@dataclass(frozen=True, slots=True)
class CardCost:
    """How a card is made: of whole models in the dtype of that name, a layer at a time, or not at all.

    `ram` and `device` are bytes besides what the process has; `whole` is what a whole model would take. `products` are
    floating-point operations, `streamed` bytes of weights read for one token after the other.
    """

    how: str
    ram: int = 0
    device: int = 0
    whole: int = 0
    disk: int = 0
    products: float = 0.0
    streamed: float = 0.0


def plan_of(processor: Processor, samples: int | None) -> CardPlan:
    """What is measured, on the set that suits the model; samples of each kind are by default a part of the set's."""
    name = "demo" if speaks_demo(processor) else "plain"
    return CardPlan(name, samples or max(1, heldout.heldout(name).samples // SHARE), spill_limit=SPILL)


@dataclass(frozen=True, slots=True)
class Workload:
    """What each model is asked: tokens to read, pictures to look at, tokens to say; those of the original apart."""

    longest: int
    texts: int
    dialogues: int
    probes: int
    picture: int
    window_tokens: int
    answer: int

    @classmethod
    def of(cls, plan: CardPlan, processor: Processor) -> Workload:
        pictures, count = card.sees(processor), plan.per_kind
        picture = processor.tokens_per_image or 0
        words = card.text_for(plan)
        tokens = len(processor(Request("text", parts=(Text(words[1]),))).ids) if words else 0
        kinds = len(probes.SETS[plan.heldout].sizes) + len(probes.KINDS) - 1
        return cls(
            longest=picture + 3 * WORDS + heldout.ANSWER_TOKENS,
            texts=count,
            dialogues=count if pictures else 0,
            probes=kinds * count if pictures else 0,
            picture=picture,
            window_tokens=tokens or 2 * count * WORDS,
            answer=heldout.ANSWER_TOKENS,
        )

    @property
    def once(self) -> int:
        """Tokens of all dialogues and texts, read once."""
        return (self.texts + self.dialogues) * (WORDS + self.answer) + self.dialogues * self.picture

    @property
    def probed(self) -> int:
        return self.probes * (self.picture + WORDS)


class Costs:
    """The ways to make a job's card. `looking`: bytes that a picture takes in the tower."""

    def __init__(self, job: Job, source: Source, looking: int) -> None:
        self.source, self.looking, self.cuda = source, looking, job.device.startswith("cuda")
        processor = Processor.from_folder(job.folder, source.config, job.calibration.template)
        self.work = Workload.of(plan_of(processor, job.card_samples), processor)
        stored = str(source.stored(source.index.entry(EMBEDDINGS))).removeprefix("torch.")
        self.dtypes = list(dict.fromkeys([stored] if self.cuda else ["float32", stored]))

    def best(self, room: int, device_room: int) -> CardCost:
        """What there is room for: whole models in float32 on a CPU, in the stored dtype, or a layer at a time."""
        found = map(self.of, (*self.dtypes, LAYERS))
        return next((one for one in found if one.ram <= room and one.device <= device_room), self.of(LAYERS))

    def of(self, how: str) -> CardCost:
        """What one way takes."""
        if how == NONE:
            return CardCost(NONE)
        if how != LAYERS:
            return self._of_whole(how)
        whole = self._of_whole(self.dtypes[-1])
        return self._in_layers(whole.ram + whole.device)

    def _of_whole(self, how: str) -> CardCost:
        source, work, dtype, text = self.source, self.work, FLOAT_TYPES[how], self.source.config.text
        numbers = _numbers(source)
        states = (text.num_hidden_layers + 8) * work.longest * text.hidden_size * FLOAT
        scores = work.longest * (text.num_attention_heads * work.longest + 4 * text.intermediate_size) * FLOAT
        context = min(text.max_position_embeddings, CONTEXT) * planner.kv_bytes(text, dtype)
        running = context + max(states + scores + self._predictions(), self.looking)
        model = numbers * dtype.itemsize + max(running, min(MAPPED, source.index.total_bytes))
        rest = SPILL + FIT * FLOAT * _largest(source) + self._tables()
        per_token = 2 * _weights(source)
        tokens = 4 * work.once + 3 * (work.probed + work.window_tokens)
        pictures = 4 * work.dialogues + 3 * work.probes
        said = (work.texts + work.dialogues) * work.answer + 3 * work.probes * SHORT
        return CardCost(
            how,
            ram=rest + (_largest(source) * FLOAT + self._predictions() if self.cuda else model),
            device=model if self.cuda else 0,
            products=per_token * tokens + pictures * _picture_products(source),
            streamed=float(said * _weights(source) * dtype.itemsize),
        )

    def _predictions(self) -> int:
        """Logits at some positions, and what is kept of those of a whole dialogue, twice."""
        vocabulary = self.source.config.text.vocab_size
        kept = 2 * FLOAT * self.work.longest * min(vocabulary, divergence.WHOLE)
        return memory(vocabulary, self.work.longest) + kept

    def _tables(self) -> int:
        """Embeddings or a head as they lie on the disk: pages of a mapped file count while it is looked at."""
        return self.source.index.entry(EMBEDDINGS).nbytes

    def _in_layers(self, whole: int) -> CardCost:
        source, work, text = self.source, self.work, self.source.config.text
        layer = max(
            sum(_count(source.layer(i), name) for name in source.layer(i).names()) for i in range(source.layers)
        )
        heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
        passing = work.longest * (
            6 * text.hidden_size + 2 * heads + 4 * text.intermediate_size + text.num_attention_heads * work.longest
        )
        computing = FLOAT * (3 * layer + passing + SLICE * text.hidden_size) + self._predictions() + self.looking
        tokens = work.once + work.window_tokens
        states = FLOAT * tokens * text.hidden_size
        rest = FIT * FLOAT * _largest(source) + 2 * self._tables()
        return CardCost(
            LAYERS,
            ram=rest + (self._predictions() if self.cuda else computing),
            device=computing if self.cuda else 0,
            whole=whole,
            disk=6 * states,
            products=3 * 2 * _weights(source) * tokens + work.dialogues * _picture_products(source),
        )


def _numbers(source: Source) -> int:
    return sum(_count(source.index, name) for name in source.index.names())


def _weights(source: Source) -> int:
    """Weights that a token is multiplied with."""
    text = source.config.text
    return sum(rows * columns for rows, columns in linears(source).values()) + text.vocab_size * text.hidden_size


def _largest(source: Source) -> int:
    return max(rows * columns for rows, columns in linears(source).values())


def _picture_products(source: Source) -> int:
    vision = source.config.vision
    if vision is None:
        return 0
    numbers = sum(_count(source.index, name) for name in source.index.names() if name.startswith("vision_tower."))
    return 2 * numbers * vision.num_features


def _count(index: Index, name: str) -> int:
    entry = index.entry(name)
    return entry.nbytes // entry.dtype.itemsize
