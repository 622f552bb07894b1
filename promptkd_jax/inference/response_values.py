"""Values of a divergence at the response tokens of rows.

B batch, R response positions.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from promptkd_jax.data.batch import Batch, responses
from promptkd_jax.data.batches import eval_batches
from promptkd_jax.data.rows import Rows
from promptkd_jax.distill.losses.chunked_loss import linear_values
from promptkd_jax.distill.losses.losses import Divergence
from promptkd_jax.distill.teacher import lazy_logits
from promptkd_jax.infra import sharding
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.model import Model


def response_values(
    function: Divergence,
    models: Sequence[Model],
    rows: Rows,
    *,
    batch_size: int,
    length: int,
    capacity: int,
    vocab_size: int,
) -> Iterator[np.ma.MaskedArray]:
    """Computes `function` of a target and a learner at every response token, EOS included.

    Args:
      models: target and learner; a learner alone is compared with the tokens themselves.
      length: columns of a batch, at least as many as the longest row has tokens.
      capacity: R, at least as many as the longest response has tokens.
      vocab_size: the vocabulary that the models share.

    Yields:
      `[b, R]` of the rows of a batch, masked where a row has no token.
    """
    compute = _compiled(function, tuple(m.decoder for m in models), capacity, vocab_size)
    params = [model.params for model in models]
    for batch, real in eval_batches(rows, batch_size=batch_size, length=length):
        values, mask = sharding.to_host(compute(params, sharding.place_rows(batch)))
        yield np.ma.array(values[:real], mask=~mask[:real])


@functools.lru_cache(maxsize=8)
def _compiled(function: Divergence, decoders: tuple[Decoder, ...], capacity: int, vocab_size: int):
    @jax.jit
    def compute(params, batch: Batch):
        where = responses(batch, capacity)
        *target, learner = (
            lazy_logits(decoder, its_params, batch, where, vocab_size)
            for decoder, its_params in zip(decoders, params)
        )
        (values,) = linear_values((function,), learner, target or (where.labels,))
        return values, where.mask > 0

    return compute
