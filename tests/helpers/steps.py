"""Small models, a batch, and the parts of a train step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from promptkd_jax.data.batch import Batch
from promptkd_jax.distill.methods.method import Method
from promptkd_jax.distill.methods.method_fields import Execution
from promptkd_jax.distill.targets import rollout
from promptkd_jax.infra.specs import declared
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.decoder import Decoder, head
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.params import abstract_params
from promptkd_jax.models.sampling_rules import Sampling

EOS = 5


VOCABULARY = 61  # shared; the teacher has three more that are padding


STEPS = 4


jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def llama(depth: int, width: int, mlp_width: int, vocab_size: int, *, tied=False) -> DecoderConfig:
    """Grouped heads, rotary positions."""
    return from_hugging_face(
        {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": mlp_width,
            "max_position_embeddings": 128,
            "tie_word_embeddings": tied,
        }
    )


def gpt2() -> DecoderConfig:
    """Tied embeddings, learned positions, biases."""
    return from_hugging_face(
        {
            "model_type": "gpt2",
            "vocab_size": VOCABULARY,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 3,
            "n_positions": 64,
        }
    )


TEACHER, STUDENT = Decoder(llama(2, 32, 48, VOCABULARY + 3)), Decoder(gpt2())


def random_params(config: DecoderConfig, seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def fill(path, x):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(centre, 0.3, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract_params(config))


@functools.cache
def teacher_params():
    return random_params(TEACHER.config, 0)


@functools.cache
def batch() -> Batch:
    """Micro-batches of 14 and 6 response tokens; row 1 answers with EOS; padding is EOS."""
    tokens = np.random.default_rng(1).integers(6, VOCABULARY, (4, 12)).astype(np.int32)
    prompt_lengths, lengths = (np.array(x, np.int32) for x in ([3, 1, 4, 2], [12, 2, 9, 7]))
    tokens[np.arange(12) >= lengths[:, None] - 1] = EOS
    return Batch(tokens, prompt_lengths, lengths)


def method(**changes) -> Method:
    """PromptKD on the rows of the batch, unless changed."""
    base = dict(
        targets="gold",
        student_terms=(("reverse_kl", 1.0),),
        total_steps=STEPS,
        response_capacity=11,
        prompt_capacity=4,
        vocab_size=VOCABULARY,
        teacher_view="prompted",
    )
    return changed(Method(**base), **changes)


def changed(method: Method, **changes) -> Method:
    """Replaces fields of a method, also those of its execution."""
    how = {name: changes.pop(name) for name in declared(Execution) if name in changes}
    execution = dataclasses.replace(method.execution, **how)
    return dataclasses.replace(method, execution=execution, **changes)


ON_POLICY = method(targets="student", response_capacity=8, sampling=Sampling(eos_ids=(EOS, 9)))


def assert_close(found, expected, atol=2e-6) -> None:
    """Equal trees; `atol` is a share of an array's largest entry or of 1."""

    def check(path, a, b):
        largest = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=atol * largest, rtol=1e-5, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, found, expected)


def log_probs(decoder: Decoder, params, tokens, prefix=None):
    """log p(next token), `[B, T - 1, V]`."""
    hidden = decoder.apply({"params": params}, tokens, prefix=prefix)
    logits = hidden @ head(params).T
    return jax.nn.log_softmax(logits[:, :-1, :VOCABULARY])


def kl(log_p, log_q):
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def supervised(rows: Batch):
    """`[B, T - 1]`: column t predicts token t + 1, which is in the response or is its EOS."""
    following = np.arange(1, rows.tokens.shape[1])
    return (following >= rows.prompt_lengths[:, None]) & (following < rows.lengths[:, None])


@jit
def student_rows(student, key) -> tuple[Batch, jax.Array]:
    """What `student` writes with `key`, and which rows ended by themselves."""
    return rollout(
        STUDENT,
        student,
        batch(),
        key,
        prompt_capacity=4,
        max_new_tokens=8,
        sampling=ON_POLICY.sampling,
        vocab_size=VOCABULARY,
        force_eos=False,
    )
