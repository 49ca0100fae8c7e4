"""Write a Llama of random weights as .gguf files: `python -m peers.make_gguf SHAPE_JSON FOLDER TYPE [TYPE ...]`.

A type is q4_0 or q4_k_m. The weights are drawn once, in 16 bits, and quantized by llama.cpp itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np

from peers.protocol import Decoder

NAMES = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
TYPES = {"q4_0": 2, "q4_k_m": 15}  # llama_ftype


def write_f16(shape: Decoder, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_name("random")
    writer.add_context_length(16384)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    draw = np.random.default_rng(0)

    def add(name: str, *dims: int) -> None:
        values = np.ones(dims, np.float32) if len(dims) == 1 else draw.standard_normal(dims, np.float32) * 0.02
        writer.add_tensor(f"{name}.weight", values.astype(np.float16 if len(dims) > 1 else np.float32))

    add("token_embd", shape.vocab_size, shape.hidden_size)
    add("output", shape.vocab_size, shape.hidden_size)
    add("output_norm", shape.hidden_size)
    for i in range(shape.layers):
        add(f"blk.{i}.attn_norm", shape.hidden_size)
        add(f"blk.{i}.ffn_norm", shape.hidden_size)
        for name, rows, columns in shape.linears:
            add(f"blk.{i}.{NAMES.get(name, f'ffn_{name}')}", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path, kind: str) -> None:
    import llama_cpp  # pyright: ignore[reportMissingImports]

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params):
        raise SystemExit(f"{kind} was not written")


def main() -> None:
    shape, folder = Decoder(**json.loads(sys.argv[1])), Path(sys.argv[2])
    wanted = [kind for kind in sys.argv[3:] if not (folder / f"{kind}.gguf").exists()]
    if not wanted:
        return
    source = folder / "f16.gguf"
    write_f16(shape, source)
    for kind in wanted:
        quantize(source, folder / f"{kind}.part", kind)
        (folder / f"{kind}.part").rename(folder / f"{kind}.gguf")
    source.unlink()


if __name__ == "__main__":
    main()
