"""How good a student is: its closeness to the teacher, and scores of its responses."""

import collections
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from promptkd_jax.data.batch import Batch, responses
from promptkd_jax.data.batches import eval_batches
from promptkd_jax.data.rows import Rows
from promptkd_jax.distill.losses import losses
from promptkd_jax.distill.losses.chunked_loss import linear_loss
from promptkd_jax.distill.teacher import lazy_logits
from promptkd_jax.evaluation.text_metrics import (
    ROUGE_TOKENIZERS,
    response_statistics,
    text_scores,
    without_tokens,
)
from promptkd_jax.inference.generate import decode, generate_responses, round_up_to_devices
from promptkd_jax.infra import distributed, sharding
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.layers.gated_prefix import GatedPrefix
from promptkd_jax.models.model import Model
from promptkd_jax.models.sampling_rules import Sampling


def teacher_metrics(
    teacher: Model | None,
    student: Model,
    rows: Rows,
    *,
    batch_size: int,
    length: int,
    vocab_size: int,
    soft_prompt: jax.Array | GatedPrefix | None = None,
) -> dict[str, float]:
    """How far the student is from the rows' responses, and from its teacher on them, per token.

    Returns:
      `loss`: the cross-entropy of the responses, in nats; with a teacher also `kl`: KL(teacher ||
      student) in nats, and `agreement`: the share of positions at which both put their largest
      probability on the same token; with a soft prompt also `kl_prompted`: KL(prompted teacher ||
      student).
    """
    capacity = max(rows.num_supervised)
    decoder = teacher and teacher.decoder
    compare = _comparison(decoder, student.decoder, int(capacity), vocab_size)
    total: dict[str, float] = collections.Counter()
    batch_size = round_up_to_devices(batch_size)
    for batch, real in eval_batches(rows, batch_size=batch_size, length=length):
        counted = (np.arange(batch_size) < real).astype(np.float32)
        params = (teacher and teacher.params, student.params)
        placed = sharding.place_rows((batch, counted))
        sums = sharding.to_host(compare(*params, *placed, soft_prompt))
        total.update({name: float(value) for name, value in sums.items()})
    tokens = total.pop("tokens")
    return {name: value / tokens for name, value in total.items()}


@functools.lru_cache(maxsize=8)
def _comparison(teacher: Decoder | None, student: Decoder, capacity: int, vocab_size: int):
    @jax.jit
    def compare(teacher_params, student_params, batch: Batch, counted, soft_prompt):
        where = responses(batch, capacity)
        mask = where.mask * counted[:, None]
        learner = lazy_logits(student, student_params, batch, where, vocab_size)
        terms = {"loss": (losses.cross_entropy, where.labels)}
        if teacher is not None:
            plain = lazy_logits(teacher, teacher_params, batch, where, vocab_size)
            terms |= {
                "kl": (losses.forward_kl, plain),
                "agreement": (losses.agreement, plain),
            }
        if soft_prompt is not None:
            prompted = lazy_logits(teacher, teacher_params, batch, where, vocab_size, soft_prompt)
            terms["kl_prompted"] = (losses.forward_kl, prompted)
        functions, targets = zip(*terms.values())
        _, sums = linear_loss(functions, learner, targets, mask)
        return dict(zip(terms, sums)) | {"tokens": mask.sum()}

    return compare


def generation_metrics(
    model: Model,
    rows: Rows,
    *,
    sampling: Sampling,
    prompt_capacity: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    vocab_size: int | None = None,
    soft_prompt: jax.Array | GatedPrefix | None = None,
    rouge_tokenizer: str = "published",
) -> tuple[dict[str, float], list[str]]:
    """ROUGE-L, chrF and exact match (in percent) of one response to every row, and the responses'
    text.

    Beside them what the responses are like: see `text_metrics.response_statistics`. References that
    ROUGE-L cannot count are warned of.

    Raises:
      DataError: a row without references (see `read_records(need="references")`).
    """
    warn_of_uncounted(rows, rouge_tokenizer)
    written = list(
        generate_responses(
            model,
            rows,
            sampling=sampling,
            prompt_capacity=prompt_capacity,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            key=jax.random.key(seed),
            vocab_size=vocab_size,
            soft_prompt=soft_prompt,
        )
    )
    return score_responses(model.tokenizer, rows, written, sampling.eos_ids, rouge_tokenizer)


def score_responses(
    tokenizer: Any,
    rows: Rows,
    responses: Sequence[Sequence[int]],
    eos_ids: Sequence[int],
    rouge_tokenizer: str = "published",
) -> tuple[dict[str, float], list[str]]:
    """`generation_metrics` of responses that are already written, one to every row."""
    texts = [decode(tokenizer, tokens) for tokens in responses]
    scores = text_scores(texts, [record.references for record in rows.records], rouge_tokenizer)
    return scores | response_statistics(responses, eos_ids), texts


def warn_of_uncounted(rows: Rows, rouge_tokenizer: str) -> None:
    """Warns of rows none of whose references has a token that ROUGE-L counts."""
    references = [record.references for record in rows.records]
    if uncounted := without_tokens(references, rouge_tokenizer):
        better = len(uncounted) - len(without_tokens(references, "unicode"))
        hint = f"rouge_tokenizer 'unicode' counts {better} of them, and " if better else ""
        distributed.warn(
            f"{len(uncounted)} of {len(references)} rows have no reference with a token that "
            f"rouge_tokenizer {rouge_tokenizer!r} knows ({ROUGE_TOKENIZERS[rouge_tokenizer]}), "
            f"such as {references[uncounted[0]][0]!r}: whatever is answered, their ROUGE-L is 0; "
            f"{hint}chrF is of characters"
        )
