"""The demo model's tokenizer: bytes, single digits, and the whole words of the generated dialogues."""

from __future__ import annotations

from collections import Counter

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinychat.eval.demo.dialogues import known_words, template_words
from tinychat.eval.demo.samples import dialogue_at

VOCABULARY = 512
PAD, USER, ASSISTANT, SYSTEM, END, IMAGE = "<pad>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<image>"
SPECIALS = (PAD, USER, ASSISTANT, SYSTEM, END, IMAGE)
CORPUS = 6000

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- elif part['type'] in ('image', 'image_url') -%}{{- '<image>' -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer learned from the first CORPUS dialogues of the training split. Deterministic."""
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = VOCABULARY - len(SPECIALS) - len(alphabet)
    vocabulary = {t: i for i, t in enumerate((*SPECIALS, *alphabet, *frequent_words(splitter, room)))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    core.pre_tokenizer = splitter
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM, IMAGE],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def frequent_words(splitter: pre_tokenizers.PreTokenizer, room: int) -> list[str]:
    """The commonest pieces made of template words. What was read off a picture is spelled, and so are slips."""
    counts: Counter[str] = Counter()
    for index in range(CORPUS):
        drawn = dialogue_at("train", index)
        texts = [drawn.system or "", *(f"{turn.question}{END}{turn.answer}" for turn in drawn.turns)]
        counts.update(
            piece for text in texts for part in text.split(END) for piece, _ in splitter.pre_tokenize_str(part)
        )
    answered, kept = known_words(), template_words()
    words = {piece: piece.lstrip("Ġ").lower() for piece in counts if len(piece) > 1}
    wanted = [piece for piece, word in words.items() if word in kept]
    return sorted(wanted, key=lambda piece: (words[piece] not in answered, -counts[piece], piece))[:room]
