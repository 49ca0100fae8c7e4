"""transformers' LLaVA of random bfloat16 weights: its tower alone, and everything from pixels to the first token."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from peers.picture_peer import noise
from peers.protocol import Facts, Setup, serve, timed, token_ids


class TransformersPicture:
    """A model, and a picture of noise."""

    def __init__(self, setup: Setup) -> None:
        assert setup.tower is not None
        torch.set_num_threads(setup.threads)
        torch.manual_seed(0)
        self.setup, self.tower = setup, setup.tower
        torch.set_default_dtype(torch.bfloat16)
        try:
            self.model: Any = transformers.LlavaForConditionalGeneration(self._config()).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        self.pixels = noise(setup).bfloat16()

    def _config(self) -> Any:
        shape, tower = self.setup.shape, self.tower
        vision = transformers.CLIPVisionConfig(
            hidden_size=tower.hidden_size, intermediate_size=tower.intermediate_size, num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads, image_size=tower.image_size, patch_size=tower.patch_size,
        )  # fmt: skip
        text = transformers.LlamaConfig(
            vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            max_position_embeddings=16384,
        )  # fmt: skip
        return transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=shape.vocab_size - 1, vision_feature_layer=-2
        )

    def facts(self) -> Facts:
        version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        kinds = {type(module).__name__ for module in self.model.modules() if "Attention" in type(module).__name__}
        return Facts(version, None, ("encode", "picture"), f"bf16, {', '.join(sorted(kinds))}")

    @torch.inference_mode()
    def run(self, kind: str, tokens: int, depth: int) -> float:
        if kind == "encode":
            tower = self.model.model.vision_tower
            return timed(lambda: tower(self.pixels, output_hidden_states=True))
        image, vocabulary = self.setup.shape.vocab_size - 1, self.setup.shape.vocab_size - 1
        ids = torch.tensor([[image] * self.tower.image_tokens + list(token_ids(tokens, vocabulary))])

        def first_token() -> int:
            out = self.model(input_ids=ids, pixel_values=self.pixels, use_cache=True, logits_to_keep=1)
            return int(out.logits[0, -1].argmax())

        return timed(first_token)


if __name__ == "__main__":
    serve(TransformersPicture)
