"""Write a GGUF file of a tiny random model with a tokenizer of a few letters."""

from pathlib import Path

import gguf
import numpy as np

_SIZE, _WIDE, _LAYERS = 32, 64, 2


def write_tiny_gguf(path: Path) -> None:
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(_LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(_SIZE)
    writer.add_feed_forward_length(_WIDE)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    letters = [*"abcdefghij", "Ġ", "ab", "<s>", "</s>", "<unk>", "<pad>"]
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([1] * (len(letters) - 4) + [3] * 4)
    writer.add_token_merges(["a b"])
    for number, add in enumerate((writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id)):
        add(len(letters) - 4 + number)
    writer.add_pad_token_id(len(letters) - 1)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))

    tensor("token_embd.weight", len(letters), _SIZE)
    tensor("output_norm.weight", _SIZE)
    tensor("output.weight", len(letters), _SIZE)
    for layer in range(_LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            tensor(f"blk.{layer}.{name}.weight", _SIZE)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{layer}.{name}.weight", _SIZE, _SIZE)
        for name in ("ffn_gate", "ffn_up"):
            tensor(f"blk.{layer}.{name}.weight", _WIDE, _SIZE)
        tensor(f"blk.{layer}.ffn_down.weight", _SIZE, _WIDE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
