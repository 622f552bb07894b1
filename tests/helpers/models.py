"""Random models, ours and those of transformers, with the same weights."""

import copy
import functools
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import traverse_util

from promptkd_jax.models.decoder import Decoder, head
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.params import abstract_params
from promptkd_jax.models.language_model import LazyLogits
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model

VOCAB, WIDTH, POSITIONS = 101, 48, 64


_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 80,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 0.05,  # so large that another value shows
    "tie_word_embeddings": False,
}


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


CONFIGS = {  # config.json of every family and of what families differ in
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": WIDTH,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": POSITIONS,
        "layer_norm_epsilon": 0.05,
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "ffn_dim": 80,
        "max_position_embeddings": POSITIONS,
    },
    "opt_350m": {  # norms of the sum, and embeddings narrower than the model
        "model_type": "opt",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "word_embed_proj_dim": WIDTH,
        "do_layer_norm_before": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "ffn_dim": 80,
        "max_position_embeddings": POSITIONS,
    },
    "llama": {"model_type": "llama", **_LLAMA, "rope_parameters": _LLAMA3_ROPE},
    "llama_linear": {  # with the flat rope fields that transformers 4 wrote
        "model_type": "llama",
        **_LLAMA,
        "num_key_value_heads": 1,
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "llama_tied": {
        "model_type": "llama",
        **_LLAMA,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": 5},
    "qwen2": {
        "model_type": "qwen2",
        **_LLAMA,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 0,
    },
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 16},
    "qwen2_mixed": {
        "model_type": "qwen2",
        **_LLAMA,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **_LLAMA,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gemma2": {
        "model_type": "gemma2",
        **_LLAMA,
        "head_dim": 16,
        "query_pre_attn_scalar": 4,
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,  # so low that both show
        "final_logit_softcapping": 8.0,
    },
    "smollm3": {
        "model_type": "smollm3",
        **_LLAMA,
        "rope_theta": 500.0,
        "no_rope_layer_interval": 2,
    },
    "smollm3_windows": {
        "model_type": "smollm3",
        **_LLAMA,
        "no_rope_layers": [0, 1, 1],
        "use_sliding_window": True,
        "sliding_window": 6,
    },
    "olmo2": {"model_type": "olmo2", **_LLAMA},
    "granite": {
        "model_type": "granite",
        **_LLAMA,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.5,
    },
    "phi3": {
        "model_type": "phi3",
        **_LLAMA,
        "sliding_window": 7,
        "original_max_position_embeddings": POSITIONS,
        "partial_rotary_factor": 0.5,
    },
    "phi3_long": {  # beyond the length before the stretching
        "model_type": "phi3",
        **_LLAMA,
        "max_position_embeddings": 4 * POSITIONS,
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        },
    },
    "mixtral": {
        "model_type": "mixtral",
        **_LLAMA,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_LLAMA,
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "use_sliding_window": True,  # of all layers, whatever max_window_layers says
        "sliding_window": 6,
    },
    "olmoe": {
        "model_type": "olmoe",
        **_LLAMA,
        "intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 3,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        **_LLAMA,
        "head_dim": 16,
        "intermediate_size": 24,
        "sliding_window": 6,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "swiglu_limit": 1.0,  # so low that it shows
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "beta_fast": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_yarn": {
        "model_type": "llama",
        **_LLAMA,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_dynamic": {
        "model_type": "llama",
        **_LLAMA,
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
}


# Those whose rotary frequencies depend on the length of rows.
LENGTH_DEPENDENT = ("phi3_long", "llama_dynamic")


TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, 20), dtype=np.int32)


PREFIX = np.random.default_rng(1).normal(0, 0.5, (5, WIDTH)).astype(np.float32)


LENGTHS = np.array([3, 12, 8], np.int32)


class Pair(NamedTuple):
    """A model of `transformers`, the folder that it was saved to, and what we load from there."""

    reference: object
    folder: pathlib.Path
    model: Model


def random_model(name: str, seed: int = 0, **changes) -> Model:
    """A model with all parameters random, norms and biases too; needs no torch."""
    hf_config = {**CONFIGS[name], "eos_token_id": 0, "bos_token_id": 0, **changes}
    config = from_hugging_face(hf_config)
    flat = traverse_util.flatten_dict(abstract_params(config), sep="/")
    rng = np.random.default_rng(seed)
    drawn = {}
    for path, x in flat.items():
        scale = 0.2 if path.endswith("kernel") else 0.5
        mean = 1 - config.norm_offset if path.endswith("scale") else 0
        drawn[path] = rng.normal(mean, scale, x.shape).astype(np.float32)
    params = traverse_util.unflatten_dict(drawn, sep="/")
    return Model(name, Decoder(config), params, hf_config, None, (0,))


def make_pair(name: str, folder: pathlib.Path) -> Pair:
    """A random model written by transformers, so that nothing of ours is in its files."""
    torch = pytest.importorskip("torch", reason="the models of transformers need torch")
    import transformers

    torch.set_num_threads(1)  # more of them wait for one another longer than they compute
    # It changes the fields in place that are objects.
    fields = copy.deepcopy(CONFIGS[name])
    config = transformers.AutoConfig.for_model(**fields, eos_token_id=0, pad_token_id=0)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    offset = from_hugging_face(CONFIGS[name]).norm_offset
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for path, parameter in reference.named_parameters():
        narrow = parameter.ndim == 2 and not any(x in path for x in ("emb", "wte", "wpe", "head"))
        parameter.data.normal_(0, 0.2 if narrow else 0.5, generator=generator)
        if "norm" in path or "ln_" in path:
            parameter.data += path.endswith("weight") - offset
    reference.save_pretrained(folder)
    return Pair(reference, folder, load_model(str(folder)))


@functools.cache
def _forward(decoder: Decoder):
    def run(params, tokens, prefix):
        hidden = decoder.apply({"params": params}, tokens, prefix=prefix)
        return LazyLogits(hidden, head(params), decoder.logit_soft_cap).logits()

    return jax.jit(run)


def logits(model: Model, tokens=TOKENS, prefix=None) -> np.ndarray:
    """Our logits `[B, T, V]`."""
    return np.asarray(_forward(model.decoder)(model.params, tokens, prefix))


def reference_logits(reference, tokens=TOKENS, prefix=None) -> np.ndarray:
    """The logits of a transformers model; a prefix goes in by `inputs_embeds`."""
    import torch

    with torch.no_grad():
        tokens = torch.tensor(tokens)
        # Dynamic rotary positions remember the longest row, until a short one comes.
        reference(tokens[:, :1])
        if prefix is None:
            return reference(tokens, use_cache=False).logits.float().numpy()
        rows = torch.tensor(prefix)[None].expand(len(tokens), -1, -1)
        embedded = torch.cat([rows, reference.get_input_embeddings()(tokens)], dim=1)
        out = reference(inputs_embeds=embedded, use_cache=False).logits.numpy()
    return out[:, len(prefix) :]


def from_folder(folder: pathlib.Path):
    """What transformers makes of a folder; every weight found and none left over."""
    import transformers

    found, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return found.eval()


def assert_same_params(found: Model, expected: Model) -> None:
    found, expected = (traverse_util.flatten_dict(m.params, sep="/") for m in (found, expected))
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        np.testing.assert_array_equal(found[path], array, err_msg=path)
