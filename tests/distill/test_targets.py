"""Which positions count follows from lengths alone; the student's rows are training rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import steps

from promptkd_jax.data.batch import Batch, choose_rows, gather, responses, truncate
from promptkd_jax.distill import targets
from promptkd_jax.distill.losses import losses
from promptkd_jax.distill.losses.chunked_loss import linear_loss
from promptkd_jax.distill.methods.method import Method
from promptkd_jax.distill.methods.method_fields import TARGETS, TargetSource
from promptkd_jax.distill.replay import empty_replay
from promptkd_jax.distill.targets import rollout
from promptkd_jax.distill.teacher import lazy_logits
from promptkd_jax.infra.specs import declared
from promptkd_jax.models.config import matrix_parameters
from promptkd_jax.models.decoder import Decoder, embed, head
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.params import abstract_params
from promptkd_jax.models.language_model import LanguageModel
from promptkd_jax.models.sampling_rules import Sampling

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

EOS = 3
CAPACITY = 6


def batch() -> Batch:
    """A response of 4 tokens, an immediate EOS, a full row cut at the limit, and no response."""
    tokens = np.arange(4 * 9, dtype=np.int32).reshape(4, 9) + 10
    prompt_lengths, lengths = np.array([2, 4, 3, 5], np.int32), np.array([6, 5, 9, 5], np.int32)
    tokens[np.arange(9) >= lengths[:, None]] = EOS  # padding is EOS
    tokens[0, 5] = tokens[1, 4] = EOS
    return Batch(tokens, prompt_lengths, lengths)


def test_every_response_token_is_predicted_once_the_eos_included():
    rows, where = batch(), responses(batch(), CAPACITY)
    assert where.mask.sum(axis=1).tolist() == [4, 1, CAPACITY, 0]
    for b, (start, end) in enumerate(zip(rows.prompt_lengths, rows.lengths)):
        real = where.mask[b] == 1
        assert where.labels[b][real].tolist() == rows.tokens[b, start:end].tolist()
        assert where.positions[b][real].tolist() == list(range(start - 1, end - 1))
    assert where.labels[0][3] == where.labels[1][0] == EOS
    assert where.mask.dtype == jnp.float32
    assert set(np.unique(where.mask)) == {0, 1}


def test_response_tokens_without_a_position_are_counted():
    """Beyond the capacity, beyond the columns, and the first of a row without a prompt."""
    assert responses(batch(), CAPACITY).beyond.tolist() == [0, 0, 0, 0]
    assert responses(batch(), 3).beyond.tolist() == [1, 0, 3, 0]
    rows = batch()._replace(prompt_lengths=np.array([0, 4, 3, 5]), lengths=np.array([6, 5, 12, 4]))
    where = responses(rows, 20)
    assert where.beyond.tolist() == [1, 0, 3, 0]
    assert where.mask.sum(axis=1).tolist() == [5, 1, 6, 0]
    assert where.labels[0][where.mask[0] == 1].tolist() == rows.tokens[0, 1:6].tolist()


@pytest.mark.parametrize(
    "changes, capacity, says",
    [
        (dict(lengths=np.ones(3, np.int32)), 6, r"lengths \[3\]; expected \[B, T\]"),
        (dict(prompt_lengths=np.ones((4, 1), np.int32)), 6, r"prompt_lengths \[4, 1\]"),
        (dict(prompt_lengths=np.int32(2)), 6, r"prompt_lengths \[\]"),
        (dict(tokens=np.ones(4, np.int32)), 6, r"tokens \[4\]"),
        (dict(tokens=np.ones((4, 1), np.int32)), 6, "T at least 2"),
        ({}, 0, "capacity: 0; expected at least 1"),
    ],
)
def test_rows_that_do_not_belong_together_are_refused_when_traced(changes, capacity, says):
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda rows: responses(rows, capacity), batch()._replace(**changes))


def test_the_mask_does_not_look_at_tokens():
    rows = batch()
    found = responses(rows._replace(tokens=np.full_like(rows.tokens, EOS)), CAPACITY)
    expected = responses(rows, CAPACITY)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.positions, expected.positions)


def test_columns_that_do_not_count_can_still_be_read():
    """They are clipped into the row, so that no label and no hidden state is out of bounds."""
    where = responses(batch(), 20)
    assert where.positions.min() >= 0 and where.positions.max() == 9 - 2
    assert where.mask.sum(axis=1).tolist() == [4, 1, 6, 0]
    assert np.isin(where.labels, batch().tokens).all()


def test_gather_takes_the_hidden_states_at_the_positions():
    rows = batch()
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9, 5)), jnp.float32)
    where = responses(rows, CAPACITY)
    found = gather(hidden, where)
    assert found.shape == (4, CAPACITY, 5)
    for b in range(4):
        np.testing.assert_array_equal(found[b], hidden[b, where.positions[b]])


VOCABULARY = 20
DECODER = Decoder(
    from_hugging_face(
        {
            "model_type": "llama",
            "vocab_size": VOCABULARY + 4,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 64,
        }
    )
)


@functools.cache
def params():
    rng = np.random.default_rng(1)
    shapes = abstract_params(DECODER.config)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), shapes)


def test_a_teacher_behind_the_embeddings_of_words_reads_the_words():
    """Hidden states behind a soft prompt stand at the same tokens as without one."""
    rng = np.random.default_rng(2)
    words = rng.integers(0, VOCABULARY, 3).astype(np.int32)
    rows = Batch(
        rng.integers(0, VOCABULARY, (2, 7)).astype(np.int32), np.array([2, 4]), np.array([7, 5])
    )
    longer = Batch(
        np.concatenate([np.tile(words, (2, 1)), rows.tokens], axis=1),
        rows.prompt_lengths + 3,
        rows.lengths + 3,
    )

    @jit
    def seen(rows, soft_prompt=None):
        return lazy_logits(DECODER, params(), rows, responses(rows, 5), VOCABULARY, soft_prompt)

    prompted, as_text, plain = seen(rows, embed(params(), words)), seen(longer), seen(rows)
    assert prompted.hidden.shape == (2, 5, 16)
    np.testing.assert_array_equal(prompted.head, head(params())[:VOCABULARY])
    real = responses(rows, 5).mask == 1
    np.testing.assert_allclose(prompted.hidden[real], as_text.hidden[real], atol=1e-5)
    assert np.abs(prompted.hidden - plain.hidden)[real].max() > 0.1


REQUESTS, NEW = 4, 5


@functools.partial(jit, static_argnums=(2, 3))
def write(batch: Batch, key, force_eos: bool, eos_ids: tuple[int, ...]):
    return rollout(
        DECODER,
        params(),
        batch,
        key,
        prompt_capacity=REQUESTS,
        max_new_tokens=NEW,
        sampling=Sampling(eos_ids=eos_ids),
        vocab_size=VOCABULARY,
        force_eos=force_eos,
    )


EOS_IDS = (EOS, 5, 8)


def requests() -> Batch:
    """Requests of 1 to 4 tokens with gold responses behind them."""
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, (8, 9)).astype(np.int32)
    prompt_lengths = np.array([1, 2, 3, 4] * 2, np.int32)
    return Batch(tokens, prompt_lengths, prompt_lengths + 5)


@functools.cache
def written(force_eos: bool = False):
    return jax.device_get(write(requests(), jax.random.key(4), force_eos, EOS_IDS))


def test_a_rollout_is_a_batch_of_requests_and_responses():
    rows, ended = written()
    assert rows.tokens.shape == (8, REQUESTS + NEW)
    np.testing.assert_array_equal(rows.prompt_lengths, requests().prompt_lengths)
    assert 0 < ended.sum() < 8
    for b, (start, end) in enumerate(zip(rows.prompt_lengths, rows.lengths)):
        assert rows.tokens[b, :start].tolist() == requests().tokens[b, :start].tolist()
        assert (rows.tokens[b, end:] == 0).all()
        response = rows.tokens[b, start:end]
        assert 1 <= len(response) <= NEW and response.max() < VOCABULARY
        assert not np.isin(response[:-1], EOS_IDS).any()
        assert np.isin(response[-1], EOS_IDS) == ended[b]
        assert len(response) == NEW or ended[b]
    counted = responses(rows, NEW).mask.sum(axis=1)
    np.testing.assert_array_equal(counted, rows.lengths - rows.prompt_lengths)
    assert counted.min() == 1  # an immediate EOS
    assert (counted[~ended] == NEW).all()


def test_an_eos_is_forced_only_on_rows_that_ran_to_the_limit():
    (rows, ended), (forced, same) = written(), written(force_eos=True)
    np.testing.assert_array_equal(same, ended)
    np.testing.assert_array_equal(forced.lengths, rows.lengths)
    changed = forced.tokens != rows.tokens
    expected = np.zeros_like(changed)
    expected[~ended, rows.lengths[~ended] - 1] = True
    np.testing.assert_array_equal(changed, expected)
    assert (forced.tokens[expected] == EOS).all()  # the first of the ids


def test_gold_responses_are_not_seen():
    given = requests()
    behind = np.arange(9) >= given.prompt_lengths[:, None]
    other = given._replace(tokens=np.where(behind, 0, given.tokens), lengths=given.prompt_lengths)
    found, _ = write(other, jax.random.key(4), False, EOS_IDS)
    np.testing.assert_array_equal(found.tokens, written()[0].tokens)


def test_a_row_does_not_depend_on_the_others_but_on_the_key():
    given = requests()
    other = given._replace(tokens=given.tokens.copy())
    other.tokens[1:] = (other.tokens[1:] + 1) % VOCABULARY
    found, _ = write(other, jax.random.key(4), False, EOS_IDS)
    np.testing.assert_array_equal(found.tokens[0], written()[0].tokens[0])
    found, _ = write(given, jax.random.key(5), False, EOS_IDS)
    assert (found.tokens != written()[0].tokens).any(axis=1).sum() > 4


def test_without_an_eos_every_row_is_full():
    rows, ended = write(requests(), jax.random.key(4), False, ())
    assert not ended.any()
    np.testing.assert_array_equal(rows.lengths, requests().prompt_lengths + NEW)
    assert responses(rows, NEW).mask.all()


# Rows with several turns that a student learns from


def conversation() -> Batch:
    """Row 0 with responses in columns 3 to 5 and 8 to 11; row 1 with its first token and its last
    ones, of which 2 stand behind its end; row 2 with none."""
    rows = steps.batch()
    supervised = np.zeros((4, 12), bool)
    supervised[0, [3, 4, 5, 8, 9, 10, 11]] = True
    supervised[1, [0, 1, 2, 3]] = True
    supervised[3, 2:7] = True
    return rows._replace(supervised=supervised)


def test_positions_are_those_before_supervised_tokens():
    rows = conversation()
    where = responses(rows, 9)
    assert where.mask.sum(axis=1).tolist() == [7, 1, 0, 5]
    for row in range(4):
        columns = np.flatnonzero(rows.supervised[row] & (np.arange(12) < rows.lengths[row]))
        columns = columns[columns > 0]
        real = np.asarray(where.mask[row]) == 1
        assert np.asarray(where.positions[row])[real].tolist() == (columns - 1).tolist()
        assert where.labels[row][real].tolist() == rows.tokens[row, columns].tolist()
    assert where.beyond.tolist() == [0, 3, 0, 0]
    assert responses(rows, 5).beyond.tolist() == [2, 3, 0, 0]
    assert responses(rows, 20).mask.shape == (4, 20)
    assert responses(rows, 20).mask.sum() == where.mask.sum()


def test_all_supervised_is_the_response():
    """A mask of the response's tokens gives the positions that its lengths give."""
    rows = steps.batch()
    columns = np.arange(12)
    inside = (columns >= rows.prompt_lengths[:, None]) & (columns < rows.lengths[:, None])
    found, expected = responses(rows._replace(supervised=inside), 9), responses(rows, 9)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.beyond, expected.beyond)
    for name in ("positions", "labels"):
        values = (np.asarray(getattr(x, name)) * np.asarray(x.mask) for x in (found, expected))
        np.testing.assert_array_equal(*values)


def test_a_conversation_has_the_gradient_of_its_turns_one_by_one():
    """Row 0 is two turns of the assistant; the rows of a single turn end with it."""
    tokens = steps.batch().tokens[:1]
    supervised = np.zeros((1, 12), bool)
    supervised[0, [3, 4, 5, 8, 9, 10, 11]] = True
    ends, starts = np.array([6, 12], np.int32), np.array([3, 8], np.int32)
    one = Batch(tokens, starts[:1], ends[1:], supervised=supervised)
    two = Batch(np.repeat(tokens, 2, axis=0), starts, ends)
    params, teacher = steps.random_params(steps.STUDENT.config, 1), steps.teacher_params()

    @functools.partial(jit, static_argnums=0)
    def loss(capacity, params, rows):
        def total(params):
            where = responses(rows, capacity)
            models = ((steps.STUDENT, params), (steps.TEACHER, teacher))
            q, p = (lazy_logits(*model, rows, where, steps.VOCABULARY) for model in models)
            terms = [losses.reverse_kl, losses.cross_entropy]
            return linear_loss(terms, q, [p, where.labels], where.mask)[0]

        return jax.value_and_grad(total)(params)

    (value, found), (expected, by_turn) = loss(7, params, one), loss(4, params, two)
    steps.assert_close(value, expected)
    steps.assert_close(found, by_turn)


@pytest.mark.parametrize("targets", ["mixed", "replay"])
def test_supervised_tokens_are_not_lost_beside_rows_of_a_student(targets):
    method = steps.method(targets=targets, response_capacity=8, sampling=Sampling(eos_ids=(EOS,)))
    replay = empty_replay(4, 12) if targets == "replay" else None
    with pytest.raises(ValueError, match="a row for each turn of the assistant"):
        targets_of(method, conversation(), replay)


def test_supervised_tokens_are_cut_with_their_rows():
    rows = truncate(conversation(), 9)
    assert rows.supervised.shape == rows.tokens.shape == (4, 9)
    assert conversation().num_supervised.tolist() == [7, 4, 0, 5]


def targets_of(method, rows: Batch, replay):
    """The rows of a step, and the buffer after it."""
    return jit(functools.partial(targets.target_rows, method, steps.STUDENT))(
        steps.random_params(steps.STUDENT.config, 1),
        jax.tree.map(jnp.asarray, rows),
        replay,
        jax.random.key(0),
        step=jnp.zeros((), jnp.int32),
        teacher=None,
    )


# Rows that are written at once

QWEN = {  # 7B: few keys and values beside its weights, which weigh as much as 466 of these rows
    "model_type": "qwen2",
    "vocab_size": 8,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
ENDS = {"sampling": Sampling(eos_ids=(EOS,))}


def long(**fields) -> Method:
    return steps.method(
        targets="student", prompt_capacity=256, response_capacity=256, **ENDS | fields
    )


@pytest.mark.parametrize(
    ("rows", "row_parts", "fields", "at_once"),
    [
        (256, 1, {}, 256),
        (1024, 1, {}, 512),
        (1024, 2, {}, 1024),  # 512 on each device
        (8192, 8, {}, 4096),
        (2 * 1023, 2, {}, 2 * 1023),
        (3 * 1025, 3, {}, 3 * 1025),  # halves of which do not lie evenly
        (1024, 1, dict(max_concurrent_rollouts=1024), 1024),
        (1024, 1, dict(max_concurrent_rollouts=256), 256),
        (16, 1, dict(max_concurrent_rollouts=256), 16),
        (1024, 1, dict(rollouts_per_prompt=4), 1024),  # a prompt is read once for four rows
        (1024, 1, dict(sampling=Sampling()), 1024),  # no row ends early
    ],
)
def test_half_of_many_rows_are_written_at_once(rows, row_parts, fields, at_once):
    assert targets.rows_at_once(long(**fields), steps.STUDENT, rows, row_parts) == at_once


def test_all_rows_are_written_at_once_where_weights_weigh_much_beside_them():
    qwen = Decoder(from_hugging_face(QWEN))
    config = qwen.config
    of_row = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 512  # bytes
    least = 6 * 2 * matrix_parameters(config) / of_row
    assert 2000 < least < 3000
    assert targets.rows_at_once(long(), qwen, 2000, 1) == 2000
    assert targets.rows_at_once(long(), qwen, 3000, 1) == 1500
    functions = LanguageModel(qwen.hidden_states, qwen.output_head, qwen.input_embeddings)
    assert targets.rows_at_once(long(), functions, 3000, 1) == 3000  # nobody knows its weights


def test_all_rows_are_written_at_once_on_a_mesh_of_somebody_else(monkeypatch):
    monkeypatch.setattr(targets, "mesh_is_external", lambda: True)
    assert targets.rows_at_once(long(), steps.STUDENT, 1024, 1) == 1024


def test_a_step_writes_half_of_many_rows_at_once_and_the_same_ones(monkeypatch):
    method = steps.method(targets="student", response_capacity=8, **ENDS)
    asked, plain = [], targets.sample

    def sample(*inputs, **how):
        asked.append(how["slots"])
        return plain(*inputs, **how)

    monkeypatch.setattr(targets, "sample", sample)
    whole, _ = targets_of(method, steps.batch(), None)
    monkeypatch.setattr(targets, "MANY_ROWS", 4)
    monkeypatch.setattr(targets, "MANY_READINGS", 0)
    halves, _ = targets_of(method, steps.batch(), None)
    assert asked == [4, 2]
    jax.tree.map(np.testing.assert_array_equal, halves, whole)


# A source of one's own, by CONTRIBUTING's recipe


def test_a_new_source_is_an_entry_and_a_function(monkeypatch):
    """Every second row is written by the student, the others are the data's."""

    def every_second(method, write, batch, replay, coin, step):
        own = jnp.arange(batch.lengths.shape[0]) % 2 == 1
        rows, ended = write(active=own)
        return targets.TargetBatch(choose_rows(own, rows, batch), own, ended), replay

    with pytest.raises(ValueError, match="targets: 'every_second' is not one of 'gold'"):
        steps.method(targets="every_second")
    source = TargetSource("every second row is the student's", on_policy=True, reads_responses=True)
    monkeypatch.setitem(TARGETS, "every_second", source)
    monkeypatch.setitem(targets.WRITERS, "every_second", every_second)
    method = steps.method(
        targets="every_second", response_capacity=8, sampling=Sampling(eos_ids=(EOS,))
    )
    rows = steps.batch()
    written, replay = targets_of(method, rows, None)
    assert written.is_student.tolist() == [False, True, False, True] and replay is None
    for row in (0, 2):
        assert written.rows.tokens[row, :12].tolist() == rows.tokens[row].tolist()
    assert written.rows.prompt_lengths.tolist() == rows.prompt_lengths.tolist()
    assert "on_policy_share" in targets.row_statistics(method, written, None)
    assert "'every_second'" in str(declared(Method)["targets"].metadata["spec"])
