"""The numbers of the published evaluation: text scores of groups of requests, exposure bias.

What the published code does and the package does not is written out here. N requests, S samples of
each, T columns, R response positions, M soft-prompt tokens, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_cases
from helpers.golden import assert_close

from promptkd_jax.distill.losses.losses import forward_kl
from promptkd_jax.evaluation.text_metrics import text_scores
from promptkd_jax.models.decoder import head
from promptkd_jax.models.io.peft import load_soft_prompt
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model

# Text scores


def published_scores(predictions, references) -> dict[str, float]:
    """Those of `text_scores` that the published code has."""
    scores = text_scores(predictions, references)
    return {name: scores[name] for name in ("rougeL", "exact_match")}


def grouped_text_scores(predictions, references, groups) -> dict[str, float]:
    """`published_scores` of each group of requests, under `<metric>_for_<group>`."""
    scores = {}
    for group in dict.fromkeys(groups):
        members = [index for index, other in enumerate(groups) if other == group]
        found = published_scores(
            [predictions[i] for i in members], [references[i] for i in members]
        )
        scores |= {f"{name}_for_{group}": value for name, value in found.items()}
    return scores


@pytest.mark.parametrize("folder, golden", golden_cases("rouge_unit"))
def test_published_text_scores(folder, golden):
    """Of all pairs, of each group, and where the longer of two lists is cut."""
    predictions = [pair["prediction"] for pair in golden["pairs"]]
    references = [pair["references"] for pair in golden["pairs"]]
    assert published_scores(predictions, references) == golden["compute_metrics_all"]
    scores = grouped_text_scores(predictions, references, golden["groups"])
    assert scores == golden["compute_grouped_metrics"]
    for which, count in (("predictions", "n_pred"), ("references", "n_ref")):
        case = golden[f"compute_metrics_{which}_shorter"]
        both = predictions[: case[count]], references[: case[count]]
        assert published_scores(*both) == case["result"]


# Exposure bias


class PublishedExposureBias(NamedTuple):
    """Curves of the published evaluation, each `[R]`; errors in nats, the last two in percent."""

    mean_R: jax.Array
    mean_eps: jax.Array
    std_R: jax.Array
    std_eps: jax.Array
    ex_acc_err: jax.Array
    std_err: jax.Array


def published_curve(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    sequences: jax.Array,
    *,
    query_length: int,
    eos_id: int,
) -> jax.Array:
    """Accumulated error of each request as the published code computes it, in nats.

    Unlike `evaluation.exposure_bias` it takes the distributions *after* each response token instead
    of those that predict it, counts tokens other than the EOS, and adds 1e-3 to the number of
    samples.

    Args:
      teacher_logits, student_logits: `[S, N, T, V]`, or `[S, N, M + T, V]` of a model behind a soft
        prompt, whose M positions are passed over.
      sequences: `[S, N, T]`: `query_length` columns of left-padded query, then the response, the
        rest EOS.

    Returns:
      `[N, T - query_length]`.
    """
    width = sequences.shape[-1] - query_length
    error = forward_kl(teacher_logits[:, :, -width:], student_logits[:, :, -width:])
    counted = sequences[:, :, -width:] != eos_id
    mean = (error * counted).sum(axis=0) / (counted.sum(axis=0) + 1e-3)
    return jnp.cumsum(mean, axis=-1)


def published_ex_acc_err(
    student_curves: jax.Array, teacher_curves: jax.Array
) -> PublishedExposureBias:
    """The published summary of `published_curve` on the student's and on the teacher's text.

    Args:
      student_curves, teacher_curves: `[N, R]`, one curve for each of at least two requests.

    Returns:
      Means and sample standard deviations over the requests, ExAccErr and its published error bar,
      in which std_eps is divided by itself, where error propagation has mean_eps.
    """
    mean_R, mean_eps = student_curves.mean(axis=0), teacher_curves.mean(axis=0)
    std_R, std_eps = student_curves.std(axis=0, ddof=1), teacher_curves.std(axis=0, ddof=1)
    excess = (mean_R - mean_eps) / mean_eps * 100
    std_err = (jnp.abs(std_R / mean_R) + jnp.abs(std_eps / std_eps)) * excess
    return PublishedExposureBias(mean_R, mean_eps, std_R, std_eps, excess, std_err)


@pytest.mark.parametrize("folder, case", golden_cases("exposure_bias_unit"))
def test_published_curve(folder, case):
    arrays = np.load(folder / "calc_batch.npz")
    for name in case["cases"]:
        curve = published_curve(
            arrays[f"{name}_teacher_logits"],
            arrays[f"{name}_model_logits"],
            arrays[f"{name}_sequences_padded"],
            query_length=case["query_len"],
            eos_id=case["pad_token_id"],
        )
        assert_close(curve, arrays[f"{name}_cumulative_error"], 1e-5, name)


@pytest.mark.parametrize("folder, case", golden_cases("exposure_bias_models"))
@pytest.mark.parametrize("view", ["plain", "prompted"])
def test_published_evaluation(folder, case, view):
    path = {name: folder / relative for name, relative in case["paths"].items()}
    arrays = np.load(path["evaluate"])
    teacher, student = (load_model(str(path[name])) for name in ("teacher", "student"))
    soft_prompt = load_soft_prompt(path["prompt_adapter"]) if view == "prompted" else None
    how = dict(query_length=case["max_prompt_length"], eos_id=case["eos_token_id"])

    def curves(writer: str):
        sequences = np.moveaxis(arrays[f"{view}_{writer}_generated_ids"], 1, 0)  # [S, N, T]
        logits = functools.partial(left_padded_logits, sequences=sequences, eos_id=how["eos_id"])
        return published_curve(logits(teacher, soft_prompt), logits(student), sequences, **how)

    found = published_ex_acc_err(curves("student"), curves("teacher"))
    for name, array in found._asdict().items():
        expected = arrays[f"{view}_{name}"]
        tolerance = 1e-4 if name.endswith("err") else 1e-5  # percent, nats
        assert_close(array, expected, tolerance * max(1, np.abs(expected).max()), name)


def left_padded_logits(model: Model, soft_prompt=None, *, sequences, eos_id: int) -> np.ndarray:
    """Logits `[S, N, T, V]` of the published layout: EOS hidden from attention, wherever it stands.

    Columns that nobody sees may as well stand behind all others, and the decoder has them there.
    What remains of the layout is the prompted GPT-2, whose positions count the hidden columns: its
    position table is put in the order in which the tokens want its rows.
    """
    config, (samples, rows, width) = model.decoder.config, sequences.shape
    assert config.learned_positions, "rotary positions behind a prompt cannot be moved this way"
    flat = sequences.reshape(-1, width)
    order = np.argsort(flat == eos_id, axis=1, kind="stable")  # [S N, T]
    counts_hidden = config.family == "gpt2" and soft_prompt is not None
    wanted = order if counts_hidden else np.broadcast_to(np.arange(width), order.shape)
    shift = config.position_offset + (0 if soft_prompt is None else len(soft_prompt))

    @jax.jit
    @jax.vmap
    def logits(tokens, wanted):
        table = model.params["positions"]["embedding"]
        table = table.at[shift : shift + width].set(table[shift + wanted])
        params = {**model.params, "positions": {"embedding": table}}
        hidden = model.decoder.apply({"params": params}, tokens[None], prefix=soft_prompt)[0]
        return hidden @ head(params).T

    found = np.array(logits(np.take_along_axis(flat, order, axis=1), wanted))
    back = np.argsort(order, axis=1)
    found = np.take_along_axis(found, back[:, :, None], axis=1)
    return found.reshape(samples, rows, width, -1)
