"""promptkd_jax: knowledge distillation of language models, PromptKD and its peers, in JAX.

The functional API needs no flags, files or global state:

    import promptkd_jax as pkd

Importing does no work and touches no device.

Dimension letters, everywhere: B batch (rows), T tokens (columns), M soft-prompt tokens, R response
positions, D width, N heads, K key/value heads, H head width, F feed-forward width, V vocabulary,
L layers, G micro-batches. p is the teacher, q the student, P the soft prompt.
"""

from promptkd_jax.data.batch import Batch, Responses, gather, responses
from promptkd_jax.data.top_k import TopK
from promptkd_jax.distill import losses
from promptkd_jax.distill.chunked_loss import Linear, linear_loss, linear_values
from promptkd_jax.distill.hidden_loss import HiddenTerm, hidden_loss
from promptkd_jax.distill.losses import divergence
from promptkd_jax.distill.method import PRESETS, Conventions, Method
from promptkd_jax.distill.optimizer import adamw, decay_mask, schedule
from promptkd_jax.distill.policy_gradient import PolicyGradient
from promptkd_jax.distill.replay import Replay, empty_replay
from promptkd_jax.distill.soft_prompt import init_soft_prompt
from promptkd_jax.distill.step import (
    Metrics,
    Optimizers,
    TrainState,
    init_state,
    summarize,
    train_step,
    write_ahead,
)
from promptkd_jax.distill.teacher import Models, view, view_with_states
from promptkd_jax.models.decoder import Decoder, embed, head
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.io.peft import load_soft_prompt, save_soft_prompt
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model, keep_layers, uniform_layers
from promptkd_jax.models.sampler import Rollout, Sampling, Voice, row_keys, sample

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Batch",
    "Conventions",
    "Decoder",
    "HiddenTerm",
    "Linear",
    "Method",
    "Metrics",
    "Model",
    "Models",
    "Optimizers",
    "PolicyGradient",
    "Replay",
    "Responses",
    "Rollout",
    "Sampling",
    "TopK",
    "TrainState",
    "Voice",
    "adamw",
    "decay_mask",
    "divergence",
    "embed",
    "empty_replay",
    "gather",
    "head",
    "hidden_loss",
    "init_soft_prompt",
    "init_state",
    "keep_layers",
    "linear_loss",
    "linear_values",
    "load_model",
    "load_soft_prompt",
    "losses",
    "responses",
    "row_keys",
    "sample",
    "save_model",
    "save_soft_prompt",
    "schedule",
    "summarize",
    "train_step",
    "uniform_layers",
    "view",
    "view_with_states",
    "write_ahead",
]
