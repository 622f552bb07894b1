"""The replay buffer of DistiLLM (arXiv 2402.03898), and the schedule of its use.

B rows of a batch, T columns; `capacity` rows of the buffer.
"""

import flax.struct
import jax
import jax.numpy as jnp

from promptkd_jax.data.batch import Batch, pad_to


@flax.struct.dataclass
class Replay:
    """The latest rows that the student wrote, and how often they are used.

    DistiLLM's adaptive off-policy schedule (arXiv 2402.03898, section 3.2): a batch is the
    student's with probability `threshold`, which rises when the validation loss does; of these
    batches ever fewer are written anew and ever more drawn from the buffer.

    Attributes:
      rows: `[capacity, T]`.
      count: `[]`, rows pushed in all, more than `capacity` after the first round.
      threshold: `[]`, probability that a batch is the student's, in [0, 1].
      validation_loss: `[]`, that of the last rise, which the next is compared with; inf before any.
    """

    rows: Batch
    count: jax.Array
    threshold: jax.Array
    validation_loss: jax.Array

    @property
    def full(self) -> jax.Array:
        """Whether every place holds a row."""
        return self.count >= self.rows.lengths.shape[0]


def empty_rows(number: int, columns: int) -> Batch:
    """`number` rows of `columns` zeros, for places that hold no row yet."""
    # A prompt of one token and no response: rows whose lengths are valid, and no position counts.
    lengths = jnp.ones(number, jnp.int32)
    return Batch(jnp.zeros((number, columns), jnp.int32), lengths, lengths)


def empty_replay(capacity: int, columns: int, threshold: float = 0.0) -> Replay:
    """An empty buffer of `capacity` rows of `columns` tokens.

    Args:
      threshold: the first probability that a batch is the student's.
    """
    rows = empty_rows(capacity, columns)
    count, threshold = jnp.zeros((), jnp.int32), jnp.full((), threshold, jnp.float32)
    return Replay(rows, count, threshold, jnp.full((), jnp.inf, jnp.float32))


def push(replay: Replay, rows: Batch) -> Replay:
    """Puts rows `[B, …]` in the places of the oldest. Raises ValueError where B > `capacity`."""
    capacity, columns = replay.rows.tokens.shape
    number = rows.tokens.shape[0]
    if number > capacity:
        raise ValueError(f"a replay buffer of {capacity} rows cannot take {number} at once")
    # A ring: the oldest rows are those behind the last that was written.
    places = (replay.count + jnp.arange(number)) % capacity
    rows = pad_to(rows, columns)
    rows = jax.tree.map(lambda old, new: old.at[places].set(new), replay.rows, rows)
    return replay.replace(rows=rows, count=replay.count + number)


def draw(replay: Replay, key: jax.Array, number: int) -> Batch:
    """`number` different rows of a full buffer, each equally likely."""
    capacity = replay.rows.lengths.shape[0]
    # Without replacement; an empty place is never drawn, since only a full buffer is asked.
    chosen = jax.random.choice(key, capacity, (number,), replace=False)
    return jax.tree.map(lambda x: x[chosen], replay.rows)


def adapt(
    replay: Replay, validation_loss: jax.Array, *, tolerance: float = 0.1, increment: float = 0.1
) -> Replay:
    """Raises the threshold by `increment` if the validation loss rose by at least `tolerance`.

    It is compared with the loss of the last rise, at first with that of the first call.
    """
    loss = jnp.asarray(validation_loss, jnp.float32)
    # inf: no validation loss was seen yet, and the first one is what others compare with.
    first = jnp.isinf(replay.validation_loss)
    # Compared with the loss of the last rise, not of the last call: a slow climb counts too.
    rose = ~first & (loss >= replay.validation_loss + tolerance)
    return replay.replace(
        threshold=jnp.where(rose, jnp.minimum(replay.threshold + increment, 1.0), replay.threshold),
        validation_loss=jnp.where(first | rose, loss, replay.validation_loss),
    )
