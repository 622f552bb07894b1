"""Configs of each family."""

LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}


GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}


FAMILIES = {
    "gpt2": GPT2 | {"model_type": "gpt2"},
    "opt": LLAMA | {"model_type": "opt", "ffn_dim": 24},
    "opt_350m": LLAMA
    | {
        "model_type": "opt",
        "ffn_dim": 24,
        "word_embed_proj_dim": 8,
        "do_layer_norm_before": False,
    },
    "llama": LLAMA | {"model_type": "llama"},
    "llama_tied": LLAMA | {"model_type": "llama", "tie_word_embeddings": True},
    "llama_biases": LLAMA | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": LLAMA | {"model_type": "mistral"},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen3": LLAMA | {"model_type": "qwen3"},
    "gemma3": LLAMA | {"model_type": "gemma3_text", "head_dim": 4, "sliding_window_pattern": 2},
    "gemma2": LLAMA | {"model_type": "gemma2", "head_dim": 4},
    "smollm3": LLAMA | {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "olmo2": LLAMA | {"model_type": "olmo2"},
    "granite": LLAMA | {"model_type": "granite", "residual_multiplier": 0.5},
    "phi3": LLAMA | {"model_type": "phi3"},
    "mixtral": LLAMA | {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": LLAMA
    | {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "olmoe": LLAMA | {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": LLAMA
    | {"model_type": "gpt_oss", "head_dim": 4, "num_local_experts": 4, "rope_theta": 1e3},
    "qwen3_biases": LLAMA | {"model_type": "qwen3", "attention_bias": True},
}
