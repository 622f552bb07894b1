"""Which of its teacher's layers a student can start without.

SLEB (Song et al. 2024, arXiv 2402.09025) leaves out one block after another, each time the one
without which perplexity is least. Here what is least is KL(teacher || student) at the tokens of
responses, where distillation begins.

B rows, R response positions, D width, L layers.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from promptkd_jax.data.batch import Batch, responses
from promptkd_jax.data.batches import eval_batches
from promptkd_jax.data.rows import Rows
from promptkd_jax.distill.losses import losses
from promptkd_jax.distill.losses.chunked_loss import linear_loss
from promptkd_jax.distill.teacher import lazy_logits
from promptkd_jax.inference.generate import round_up_to_devices
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import DataError, ModelError
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.model import Model, keep_layers_config


def leave_out_layers(
    teacher: Model, rows: Rows, *, batch_size: int = 16
) -> Iterator[tuple[int, float]]:
    """Leaves out one layer after the other, each time that which moves the teacher least.

    It is greedy: the first layer costs L forwards of all rows, the second L - 1, and so on. They
    are one program each time, or, where layers are of several kinds, one for every order of kinds
    that is left. A forward takes the memory of a second stack of layers.

    Args:
      teacher: its kernels in a device's memory.
      rows: with responses, best the teacher's own.
      batch_size: B, rows in one forward, rounded up to as many on each device.

    Yields:
      A layer, counted from 0 in the teacher, and KL(teacher || student), in nats per response
      token, without it and all before it; until one layer is left.

    Raises:
      DataError: no row has a response.
      ModelError: the kernels lie in the host's memory, or the divergence is not finite.
    """
    config = teacher.decoder.config
    if config.offload:
        raise ModelError(f"{teacher.name}: is offloaded; layers are searched in a device's memory")
    if not rows.num_supervised.any():
        raise DataError("rows: none has a response; expected some, such as the teacher's own")
    capacity = int(max(rows.num_supervised))
    read = _final_states(teacher.decoder, capacity)
    batch_size, batches = round_up_to_devices(batch_size), []
    for batch, real in eval_batches(rows, batch_size=batch_size, length=max(map(len, rows.tokens))):
        counted = (np.arange(batch_size) < real).astype(np.float32)
        batch, counted = sharding.place_rows((batch, counted))
        batches.append((batch, counted, read(teacher.params, batch)))

    def cost(layers: list[int]) -> float:
        student = Decoder(keep_layers_config(config, layers))
        compute = _divergence(student, capacity, teacher.vocab_size)
        sums = [compute(teacher.params, np.array(layers), *inputs) for inputs in batches]
        kl, tokens = np.sum(sharding.to_host(sums), axis=0)
        if not np.isfinite(kl):
            raise ModelError(
                f"{teacher.name}: KL of the layers {layers} is {kl}; expected a number, as "
                f"{config.dtype} may be too narrow for it"
            )
        return float(kl / tokens)

    left = list(range(config.num_layers))
    while len(left) > 1:
        costs = {layer: cost([other for other in left if other != layer]) for layer in left}
        layer = min(costs, key=costs.__getitem__)
        left.remove(layer)
        yield layer, costs[layer]


@functools.lru_cache(maxsize=1)
def _final_states(teacher: Decoder, capacity: int):
    @jax.jit
    def read(params: Any, batch: Batch) -> jax.Array:
        where = responses(batch, capacity)
        return lazy_logits(teacher, params, batch, where, teacher.config.vocab_size).hidden

    return read


@functools.lru_cache(maxsize=8)
def _divergence(student: Decoder, capacity: int, vocab_size: int):
    @jax.jit
    def compute(params: Any, layers, batch: Batch, counted, hidden) -> tuple[jax.Array, jax.Array]:
        # All layers lie in one stack, [L, …] of every array, of which these are an index.
        kept = params | {"layers": jax.tree.map(lambda x: x[layers], params["layers"])}
        where = responses(batch, capacity)
        mask = where.mask * counted[:, None]  # [B, R]
        learner = lazy_logits(student, kept, batch, where, vocab_size)
        target = learner.replace(hidden=hidden)  # [B, R, D] of the teacher, before the same head
        _, (kl,) = linear_loss((losses.forward_kl,), learner, (target,), mask)
        return kl, mask.sum()

    return compute
