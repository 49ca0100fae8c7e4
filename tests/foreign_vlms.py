"""Random tiny vision-language models of transformers, with their processors: `KINDS` makes each once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from models.tiny import shake
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    GemmaConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

FAKE, IMAGE, UTTERANCE = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
LLAVA: dict[str, Any] = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def words() -> Any:
    """Bytes, then the special tokens; BOS is added in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>", FAKE, IMAGE, UTTERANCE]
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    bos = inner.token_to_id("<bos>")
    inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def seeded(model: Any) -> Any:
    shake(model.eval())
    model.generation_config.eos_token_id = None
    return model


@cache
def idefics2(splitting: bool) -> tuple[Any, Any]:
    tokenizer = words()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics2Config(
        text_config=MistralConfig(**TEXT).to_dict(),
        vision_config={**vision, "image_size": 56, "patch_size": 14},
        perceiver_config={
            "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8,
            "num_key_value_heads": 1, "hidden_size": 32,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
    )  # fmt: skip
    torch.manual_seed(3)
    made = Idefics2ImageProcessorPil(
        size={"longest_edge": 56, "shortest_edge": 28}, do_image_splitting=splitting, do_pad=True
    )
    processor = Idefics2Processor(made, tokenizer, image_seq_len=4)
    return seeded(Idefics2ForConditionalGeneration(config)), processor


@cache
def paligemma() -> tuple[Any, Any]:
    tokenizer = words()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**{**TEXT, "vocab_size": 1536}, head_dim=16).to_dict(),
        vision_config={**vision, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14,
                       "vision_use_head": False, "projection_dim": 32},
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        projection_dim=32, hidden_size=32,
    )  # fmt: skip
    torch.manual_seed(4)
    made: Any = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    made.image_seq_length = 4
    model = seeded(PaliGemmaForConditionalGeneration(config))
    with torch.no_grad():  # else the newest token alone decides about the next
        for layer in model.model.language_model.layers:
            for parameter in layer.parameters():
                parameter.mul_(8)
    return model, PaliGemmaProcessor(made, tokenizer)


@cache
def llava(tiled: bool) -> tuple[Any, Any]:
    tokenizer = words()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    parts: dict[str, Any] = {
        "text_config": LlamaConfig(**TEXT).to_dict(),
        "vision_config": {**vision, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
    }
    square = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    torch.manual_seed(6)
    if not tiled:
        model = LlavaForConditionalGeneration(LlavaConfig(**parts))
        made = LlavaProcessor(CLIPImageProcessorPil(**square), tokenizer, patch_size=14, **LLAVA)
        return seeded(model), made
    grid = [[28, 56], [56, 28], [56, 56]]
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**parts, image_grid_pinpoints=grid))
    pixels = LlavaNextImageProcessorPil(**square, image_grid_pinpoints=grid)
    return seeded(model), LlavaNextProcessor(pixels, tokenizer, patch_size=14, **LLAVA)


KINDS: dict[str, Any] = {
    "idefics2": lambda: idefics2(False),
    "split": lambda: idefics2(True),
    "paligemma": paligemma,
    "llava": lambda: llava(False),
    "llava_next": lambda: llava(True),
}
FOREIGN = ("idefics2", "split", "paligemma")  # those that our own loader does not read
