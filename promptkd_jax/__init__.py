"""promptkd_jax: knowledge distillation of language models, PromptKD and its peers, in JAX.

The functional API needs no flags, files or global state:

    import promptkd_jax as pkd

Importing does no work and touches no device; a name imports its module when it is first used.

Dimension letters, everywhere: B batch (rows), T tokens (columns), X prompt columns, M soft-prompt
tokens, R response positions, D width, N heads, K key/value heads, H head width, F feed-forward
width, E experts, V vocabulary, L layers, S columns of the key/value cache, Q slots of the sampler,
G micro-batches of an update, U minibatches of a step. p is the teacher, q the student, P the soft
prompt.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# `__init__.pyi` says the same to editors and type checkers; a test compares the two.
_NAMES = {
    "data.batch": "Batch Responses gather responses",
    "data.packing": "pack_batch",
    "data.top_k": "TopK",
    "distill.losses.losses": "losses divergence",
    "distill.methods.curriculum": "Interpolation first_interpolation",
    "distill.losses.chunked_loss": "linear_loss linear_values top_k",
    "distill.losses.hidden_loss": "HiddenTerm hidden_loss",
    "distill.methods.method": "PRESETS Conventions Method",
    "distill.methods.method_fields": "Execution",
    "distill.optimizer": "adamw decay_mask schedule",
    "distill.losses.policy_gradient": "PolicyGradient",
    "distill.replay": "Replay empty_replay",
    "distill.soft_prompt": "init_soft_prompt zero_gated",
    "distill.state": "Metrics Optimizers TrainState init_state summarize",
    "distill.step": "train_step write_ahead",
    "distill.teacher": "Models lazy_logits lazy_logits_and_states",
    "distill.losses.transport": "Transport token_kernel",
    "models.decoder": "Decoder head",
    "models.layers.gated_prefix": "GatedPrefix",
    "models.io.export": "save_model",
    "models.io.gguf_export": "save_gguf",
    "models.io.peft": "load_soft_prompt save_soft_prompt",
    "models.language_model": "LanguageModel LazyLogits",
    "models.load": "load_model",
    "models.model": "Model keep_layers uniform_layers",
    "models.sampler": "Rollout SamplingModel row_keys sample",
    "models.sampling_rules": "Sampling",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    value = getattr(module, name, module)  # `losses` is a module itself
    globals()[name] = value  # the next time it is found at once
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
