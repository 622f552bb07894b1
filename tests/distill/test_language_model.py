"""Models that are no `Decoder`: plain JAX, flax.linen and Equinox, in losses, steps and rollouts.

A `LanguageModel` made of a decoder's own functions must do what the decoder does; models of other
libraries are held against dense losses on their logits.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.methods import OPTIMIZERS, begin, plain
from helpers.steps import (
    EOS,
    ON_POLICY,
    STUDENT,
    TEACHER,
    VOCABULARY,
    assert_close,
    batch,
    changed,
    jit,
    random_params,
    teacher_params,
)

import promptkd_jax as pkd

WIDTH = 16


# A decoder by its functions alone


def by_functions(decoder: pkd.Decoder) -> pkd.LanguageModel:
    return pkd.LanguageModel(decoder.hidden_states, decoder.output_head, decoder.input_embeddings)


SOFT_PROMPT = np.random.default_rng(3).normal(size=(3, 32)).astype(np.float32)
IN_SLOTS = dict(gradient_accumulation_steps=2, max_concurrent_rollouts=2)
SHOWN = dict(teacher_view="in_context", demonstrations=(7, 8, 9))
METHODS = {
    "PromptKD": ON_POLICY,
    "two micro-batches, continuous batching": changed(ON_POLICY, **IN_SLOTS),
    "both write, in context": plain(
        targets="student", teacher_share=0.3, response_capacity=8, **SHOWN
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_functions_of_a_decoder_do_what_the_decoder_does(name):
    """Rollouts without a cache write the same rows; so both updates are the same, to rounding."""
    method = METHODS[name]
    groups = {"soft_prompt": jnp.asarray(SOFT_PROMPT)} if method.prompted else {}
    before = begin(**groups)

    def step(models):
        run = functools.partial(pkd.train_step, method=method, models=models, optimizers=OPTIMIZERS)
        return jit(run)(before, teacher_params(), batch())

    after, metrics = step(pkd.Models(STUDENT, TEACHER))
    found, measured = step(pkd.Models(by_functions(STUDENT), by_functions(TEACHER)))
    assert_close(found.optimizers, after.optimizers)
    np.testing.assert_array_equal(measured.counts, metrics.counts)
    assert pkd.summarize(measured) == pytest.approx(pkd.summarize(metrics), rel=1e-4)


# Models of other libraries: how they are made, and the same functions


class Case(NamedTuple):
    model: pkd.LanguageModel
    params: Any


def behind(prefix, x):
    """The rows `[B, T, D]` behind a prefix `[M, D]`."""
    if prefix is None:
        return x
    return jnp.concatenate([jnp.broadcast_to(prefix, (len(x), *prefix.shape)), x], axis=1)


def plain_jax(seed: int) -> Case:
    """One layer of attention, head and embedding tied."""
    keys = jax.random.split(jax.random.key(seed), 2)
    shapes = {"embedding": (VOCABULARY, WIDTH), "qkv": (WIDTH, 3 * WIDTH)}
    params = {n: 0.5 * jax.random.normal(k, shapes[n]) for n, k in zip(shapes, keys)}

    def hidden_states(params, tokens, prefix):
        x = behind(prefix, params["embedding"][tokens])
        query, key, value = jnp.split((x @ params["qkv"])[:, :, None], 3, axis=-1)
        x = x + jax.nn.dot_product_attention(query, key, value, is_causal=True)[:, :, 0]
        return x[:, -tokens.shape[1] :]

    model = pkd.LanguageModel(
        hidden_states,
        output_head=lambda params: params["embedding"],
        input_embeddings=lambda params, tokens: params["embedding"][tokens],
    )
    return Case(model, params)


class Recurrent(nn.Module):
    """An embedding, a GRU and a head."""

    @nn.compact
    def __call__(self, tokens, prefix=None):
        x = behind(prefix, nn.Embed(VOCABULARY, WIDTH, name="embed")(tokens))
        self.param("head", nn.initializers.normal(0.5), (VOCABULARY, WIDTH))
        return nn.RNN(nn.GRUCell(WIDTH))(x)[:, -tokens.shape[1] :]


def linen(seed: int) -> Case:
    net = Recurrent()
    params = jax.jit(net.init)(jax.random.key(seed), batch().tokens)["params"]

    def hidden_states(params, tokens, prefix):
        return net.apply({"params": params}, tokens, prefix)

    return Case(pkd.LanguageModel(hidden_states, lambda params: params["head"]), params)


def equinox(seed: int) -> Case:
    """A module is a pytree: its arrays are the parameters, all else is static."""
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(seed), 2)

    class Net(eqx.Module):
        embedding: eqx.nn.Embedding
        cell: eqx.nn.GRUCell

        def __call__(self, tokens, prefix):  # [T] -> [T, D]
            x = jax.vmap(self.embedding)(tokens)
            x = x if prefix is None else jnp.concatenate([prefix, x])

            def advance(state, x):
                state = self.cell(x, state)
                return state, state

            _, states = jax.lax.scan(advance, jnp.zeros(WIDTH), x)
            return states[-len(tokens) :]

    net = Net(eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0]), eqx.nn.GRUCell(16, 16, key=keys[1]))
    params, static = eqx.partition(net, eqx.is_array)

    def hidden_states(params, tokens, prefix):
        return jax.vmap(eqx.combine(params, static), (0, None))(tokens, prefix)

    return Case(pkd.LanguageModel(hidden_states, lambda p: p.embedding.weight), params)


@pytest.fixture(params=[plain_jax, linen, equinox], ids=lambda make: make.__name__)
def make(request):
    return request.param


def log_probs(case: Case, tokens, params=None, prefix=None):
    """log p(next token), `[B, T - 1, V]`, dense."""
    params = case.params if params is None else params
    hidden = case.model.hidden_states(params, jnp.asarray(tokens), prefix)
    return jax.nn.log_softmax(hidden[:, :-1] @ case.model.output_head(params).T)


def mean_kl(log_p, log_q, rows: pkd.Batch):
    """KL(p || q), the mean over response tokens."""
    following = np.arange(1, rows.tokens.shape[1])
    mask = (following >= rows.prompt_lengths[:, None]) & (following < rows.lengths[:, None])
    return (mask * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)).sum() / mask.sum()


def test_both_updates_of_promptkd_are_those_of_the_dense_losses(make):
    """P by KL(p_P || q) + alpha KL(p_P || p), then the student by KL(q || p_P), P just updated."""
    teacher, student = plain_jax(0), make(1)
    rate, rows = 0.1, batch()
    method = pkd.Method(
        targets="gold",
        teacher_view="prompted",
        student_terms=(("reverse_kl", 1.0),),
        regularization_schedule="constant",
        total_steps=4,
        response_capacity=11,
        prompt_capacity=4,
        vocab_size=VOCABULARY,
    )
    sgd = pkd.Optimizers(student=optax.sgd(rate), soft_prompt=optax.sgd(rate))
    prompt = jnp.asarray(SOFT_PROMPT[:, :WIDTH])
    state = pkd.init_state(
        {"student": student.params, "soft_prompt": prompt}, sgd, jax.random.key(0)
    )
    models = pkd.Models(student.model, teacher.model)
    step = jit(functools.partial(pkd.train_step, method=method, models=models, optimizers=sgd))
    after, metrics = step(state, teacher.params, rows)

    def prompt_loss(prompt):
        prompted = log_probs(teacher, rows.tokens, prefix=prompt)
        plain = log_probs(teacher, rows.tokens)
        q = log_probs(student, rows.tokens)
        return mean_kl(prompted, q, rows) + mean_kl(prompted, plain, rows)

    # `reverse_kl` of the target q from the learner p_P is KL(p_P || q).
    value, d_prompt = jax.jit(jax.value_and_grad(prompt_loss))(prompt)
    assert_close(after.soft_prompt, prompt - rate * d_prompt)
    assert pkd.summarize(metrics)["prompt_loss"] == pytest.approx(float(value), rel=1e-4)

    def student_loss(params):
        p = log_probs(teacher, rows.tokens, prefix=after.soft_prompt)
        return mean_kl(log_probs(student, rows.tokens, params), p, rows)

    value, d_student = jax.jit(jax.value_and_grad(student_loss))(student.params)
    expected = jax.tree.map(lambda x, d: x - rate * d, student.params, d_student)
    assert_close(after.student, expected)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(d_student)) > 1e-4
    assert pkd.summarize(metrics)["student_loss"] == pytest.approx(float(value), rel=1e-4)


def test_a_rollout_is_the_greedy_continuation(make):
    """Token by token by the dense logits, until EOS."""
    case, rows = make(2), batch()
    sampling = pkd.Sampling(temperature=0.0, eos_ids=(EOS,))
    prompts = jnp.where(np.arange(4) < rows.prompt_lengths[:, None], rows.tokens[:, :4], 0)
    rollout = jit(functools.partial(pkd.sample, case.model, max_new_tokens=5, sampling=sampling))(
        case.params, prompts, rows.prompt_lengths, pkd.row_keys(jax.random.key(0), jnp.arange(4))
    )
    likeliest = jit(lambda tokens: jnp.argmax(log_probs(case, tokens)[0], axis=-1))
    for row, (prompt, length) in enumerate(zip(prompts, rows.prompt_lengths)):
        text = list(np.asarray(prompt[:length]))
        for _ in range(5):
            behind = [0] * (10 - len(text))  # which no token before sees
            text.append(int(likeliest(np.array([text + behind]))[len(text) - 1]))
            if text[-1] == EOS:
                break
        assert list(np.asarray(rollout.tokens[row, : rollout.lengths[row]])) == text
        assert bool(rollout.ended[row]) == (text[-1] == EOS)


def test_top_k_of_all_tokens_is_the_distribution(make):
    """A loss against it is that against the teacher itself; against fewer it is no more."""
    teacher, student, rows = make(3), plain_jax(4), batch()
    where = pkd.responses(rows, 11)

    @jit
    def losses():
        """Against the teacher, all of its tokens, and few; and these."""
        p, q = (
            pkd.lazy_logits(case.model, case.params, rows, where, VOCABULARY)
            for case in (teacher, student)
        )
        targets = p, pkd.top_k(p, VOCABULARY), pkd.top_k(p, 4)
        return targets[-1], [
            pkd.linear_loss([pkd.losses.forward_kl], q, [target], where.mask)[0]
            for target in targets
        ]

    few, (whole, of_all, of_few) = losses()
    assert of_all == pytest.approx(float(whole), rel=1e-5)
    assert few.ids.shape == (*where.mask.shape, 4)
    assert of_few <= whole
    with pytest.raises(ValueError, match="k: 0; expected 1 to 61"):
        pkd.top_k(pkd.lazy_logits(*student, rows, where, VOCABULARY), 0)


# What such a model cannot do is said


def test_inner_layers_cannot_be_seen():
    method = plain(hidden_terms=(pkd.HiddenTerm("cosine", projection=True),))
    models = pkd.Models(STUDENT, by_functions(TEACHER))
    with pytest.raises(ValueError, match="hidden_terms: the teacher is a LanguageModel"):
        pkd.train_step(
            begin(), teacher_params(), batch(), method=method, models=models, optimizers=OPTIMIZERS
        )


def test_dropout_needs_a_decoder():
    models = pkd.Models(by_functions(STUDENT), TEACHER)
    fixed = dict(method=plain(dropout=True), models=models, optimizers=OPTIMIZERS)
    with pytest.raises(ValueError, match="dropout: the student is a LanguageModel"):
        pkd.train_step(begin(), teacher_params(), batch(), **fixed)


def test_demonstrations_need_embeddings():
    method = plain(teacher_view="in_context", demonstrations=(7,))
    models = pkd.Models(STUDENT, pkd.LanguageModel(TEACHER.hidden_states, TEACHER.output_head))
    with pytest.raises(ValueError, match="'in_context' needs LanguageModel"):
        pkd.train_step(
            begin(), teacher_params(), batch(), method=method, models=models, optimizers=OPTIMIZERS
        )


def test_a_decoder_has_the_same_functions():
    """`random_params` are those of a padded vocabulary: the head comes without the padding."""
    params = random_params(TEACHER.config, 0)
    assert TEACHER.output_head(params).shape == (TEACHER.config.vocab_size, 32)
    ids = jnp.array([[3, 4]])
    np.testing.assert_array_equal(
        TEACHER.input_embeddings(params, ids), params["embed"]["embedding"][ids]
    )
