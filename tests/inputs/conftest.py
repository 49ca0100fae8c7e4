"""Small tokenizers and configs, made here: a byte-level BPE with ChatML or Llama 3 tokens, and Llama-like ones."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tinychat.config import VilaConfig

WORDS = [
    "What colour is the picture? The image shows a red square and two blue circles.",
    "USER: ASSISTANT: system user assistant You are a helpful assistant. <image> </s> <|im_end|>",
    "A chat between a curious user and an artificial intelligence assistant. [INST] [/INST]",
] * 4
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant"
    "<|im_end|>\n{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAVA_HF = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)


def byte_level(specials: list[str], *, eos: str, bos: str | None = None, template: str | None = None):
    """A byte-level BPE as Qwen2's and Llama 3's are, with these special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    if bos is not None:
        pair = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)
    made.chat_template = template
    return made


def llama_like(*, legacy: bool = False, template: str | None = None, image: bool = False):
    """A BPE over ▁ with byte fallback as Llama's: `legacy` adds ▁ to every stretch, else only to the first."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127))]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = []
    for left, right in (
        ("<", "/"),
        ("s", ">"),
        ("</", "s>"),
        ("i", "m"),
        ("▁", "t"),
        ("▁t", "h"),
        ("▁th", "e"),
        ("▁", "a"),
    ):
        merges.append((left, right))
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(["<image>"] if image else [])]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


_CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_LLAMA_3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_MAKERS = {
    "chatml": lambda: byte_level(_CHATML_TOKENS, eos="<|im_end|>", template=CHATML),
    "chatml_image": lambda: byte_level([*_CHATML_TOKENS, "<image>"], eos="<|im_end|>", template=CHATML),
    "llama_3": lambda: byte_level(_LLAMA_3_TOKENS, eos="<|end_of_text|>", bos="<|begin_of_text|>", template=LLAMA_3),
    "bare_chatml": lambda: byte_level(_CHATML_TOKENS, eos="<|endoftext|>"),
    "bare_llama_3": lambda: byte_level(_LLAMA_3_TOKENS, eos="<|end_of_text|>", bos="<|begin_of_text|>"),
    "llama": llama_like,
    "llama_legacy": lambda: llama_like(legacy=True),
    "llava_hf": lambda: llama_like(template=LLAVA_HF, image=True),
    "mistral": lambda: llama_like(template=MISTRAL),
}
_made = {}


def make_tokenizer(name: str):
    return _made.setdefault(name, None) or _made.update({name: _MAKERS[name]()}) or _made[name]


def make_config(vision: str = "clip", vocab_size: int = 600, **fields) -> VilaConfig:
    """A tiny VILA config: 28-pixel pictures, patch 14, so 4 tokens a picture."""
    text = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {
        "num_attention_heads": 1,
        "vocab_size": vocab_size,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    }
    if not vision:
        return VilaConfig(**text, **fields)
    tower = {"model_type": f"{vision}_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    return VilaConfig(llm_cfg=text, vision_tower_cfg=tower, mm_projector_cfg={"mm_projector_type": "linear"}, **fields)


@pytest.fixture(scope="session")
def tokenizers():
    return make_tokenizer


@pytest.fixture
def new_tokenizer():
    """One that a test may change."""
    return byte_level(_CHATML_TOKENS, eos="<|im_end|>", template=CHATML)


@pytest.fixture(scope="session")
def configs():
    return make_config
