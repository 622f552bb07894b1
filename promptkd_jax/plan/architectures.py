"""The shapes of published models, by hub id, as their `config.json` has them.

So a run can be planned without their files. The models that MiniLLM published are of the shapes of
those that they were tuned from.
"""

from typing import Any

_LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "eos_token_id": 50256,
    }


def _opt(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * width,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "eos_token_id": 2,
    }


def _llama(
    width: int,
    layers: int,
    heads: int,
    num_kv_heads: int,
    feed_forward: int,
    **more: Any,
) -> dict[str, Any]:
    base = {
        "model_type": "llama",
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": feed_forward,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    return base | more


def _llama_3(*sizes: int, factor: float, tied: bool) -> dict[str, Any]:
    return _llama(
        *sizes,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={**_LLAMA_3, "factor": factor},
        tie_word_embeddings=tied,
        eos_token_id=128001,
    )


def _smollm2(*sizes: int, theta: float) -> dict[str, Any]:
    return _llama(
        *sizes,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        tie_word_embeddings=True,
        eos_token_id=0,
    )


_SHAPES = (
    (
        _gpt2(768, 12, 12),
        ("openai-community/gpt2", "gpt2", "MiniLLM/init-gpt2-120M"),
    ),
    (
        _gpt2(1024, 24, 16),
        ("openai-community/gpt2-medium", "gpt2-medium", "MiniLLM/init-gpt2-340M"),
    ),
    (
        _gpt2(1280, 36, 20),
        ("openai-community/gpt2-large", "gpt2-large", "MiniLLM/init-gpt2-760M"),
    ),
    (
        _gpt2(1600, 48, 25),
        ("openai-community/gpt2-xl", "gpt2-xl", "MiniLLM/teacher-gpt2-1.5B"),
    ),
    (_opt(2048, 24, 32), ("facebook/opt-1.3b", "MiniLLM/init-OPT-1.3B")),
    (_opt(2560, 32, 32), ("facebook/opt-2.7b", "MiniLLM/init-OPT-2.7B")),
    (_opt(4096, 32, 32), ("facebook/opt-6.7b", "MiniLLM/init-OPT-6.7B")),
    (_opt(5120, 40, 40), ("facebook/opt-13b", "MiniLLM/teacher-OPT-13B")),
    (_llama(4096, 32, 32, 32, 11008), ("huggyllama/llama-7b", "MiniLLM/init-Llama-7B")),
    (_llama(5120, 40, 40, 40, 13824), ("huggyllama/llama-13b", "MiniLLM/teacher-Llama-13B")),
    (
        _llama_3(4096, 32, 32, 8, 14336, factor=8.0, tied=False),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    ),
    (
        _llama_3(8192, 80, 64, 8, 28672, factor=8.0, tied=False),
        ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B-Instruct"),
    ),
    (
        _llama_3(2048, 16, 32, 8, 8192, factor=32.0, tied=True),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"),
    ),
    (
        _llama_3(3072, 28, 24, 8, 8192, factor=32.0, tied=True),
        ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct"),
    ),
    (
        _smollm2(576, 30, 9, 3, 1536, theta=100000.0),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ),
    (
        _smollm2(960, 32, 15, 5, 2560, theta=100000.0),
        ("HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-360M-Instruct"),
    ),
    (
        _smollm2(2048, 24, 32, 32, 8192, theta=130000.0),
        ("HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    ),
)
CONFIGS: dict[str, dict[str, Any]] = {name: config for config, names in _SHAPES for name in names}
