"""What is sampled is what the model says, row by row, and nothing else is written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import LENGTH_DEPENDENT, VOCAB, logits, make_pair, random_model

from promptkd_jax.models import sampler, sampling_rules
from promptkd_jax.models.decoder import Decoder, embed
from promptkd_jax.models.language_model import LanguageModel
from promptkd_jax.models.sampler import Rollout, row_keys, sample
from promptkd_jax.models.sampling_rules import Sampling, choose

PLAIN, GREEDY = Sampling(), Sampling(temperature=0.0)
LENGTHS = np.array([3, 8, 1, 5], np.int32)
REQUESTS = np.random.default_rng(3).integers(1, VOCAB, (4, 8), dtype=np.int32)
KEYS = row_keys(jax.random.key(11), jnp.arange(4))


@functools.cache
def _compiled(decoder, sampling, new, vocab_size):
    return jax.jit(
        functools.partial(
            sample, decoder, max_new_tokens=new, sampling=sampling, vocab_size=vocab_size
        )
    )


def run(
    model,
    tokens=REQUESTS,
    lengths=LENGTHS,
    keys=KEYS,
    *,
    new=12,
    sampling=PLAIN,
    prefix=None,
    vocab_size=None,
) -> Rollout:
    compiled = _compiled(model.decoder, sampling, new, vocab_size)
    out = compiled(model.params, tokens, lengths, keys, prefix=prefix)
    return Rollout(*map(np.asarray, out))


def written(out: Rollout, row: int) -> list[int]:
    """The new tokens of a row."""
    return out.tokens[row, LENGTHS[row] : out.lengths[row]].tolist()


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def llama():
    """Of one layer: a rollout is compiled with all of them written out."""
    return random_model("llama", seed=1, num_hidden_layers=1)


@pytest.fixture(scope="module")
def endless(llama) -> Rollout:
    """12 tokens for every row, no EOS."""
    return run(llama)


# Against transformers.


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3", "gpt_oss"])
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    """Beyond windows, and beyond lengths before rotary positions were stretched. Of every family,
    `test_models` compares all logits with transformers, and those of the cache with all."""
    assert_same_greedy_tokens(make_pair(name, tmp_path))


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_what_is_written_is_what_the_model_says_of_the_whole_row(name):
    """Where frequencies depend on a row's length: transformers changes them as it writes."""
    model = random_model(name)
    out = run(model, new=32, sampling=GREEDY)
    likeliest = logits(model, out.tokens).argmax(-1)
    for row, (start, end) in enumerate(zip(LENGTHS, out.lengths)):
        assert out.tokens[row, start:end].tolist() == likeliest[row, start - 1 : end - 1].tolist()


@pytest.mark.parametrize("ngram", [2, 3])
def test_no_repeated_ngram_as_in_transformers(pair, ngram):
    assert_same_greedy_tokens(pair, no_repeat_ngram_size=ngram)


@pytest.mark.parametrize("more", [{}, {"no_repeat_ngram_size": 2}])
def test_repetition_penalty_as_in_transformers(pair, more):
    assert_same_greedy_tokens(pair, repetition_penalty=1.3, **more)


def assert_same_greedy_tokens(pair, **chosen: float) -> None:
    """The rows of one batch here, one by one there."""
    import torch

    sampling = Sampling(temperature=0.0, **chosen)
    out = run(pair.model, new=32, sampling=sampling)
    assert out.lengths.tolist() == (LENGTHS + 32).tolist()
    for row, length in enumerate(LENGTHS):
        expected = pair.reference.generate(
            torch.tensor(REQUESTS[row : row + 1, :length]),
            attention_mask=torch.ones((1, length), dtype=torch.long),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
            **chosen,
        )
        assert out.tokens[row, : length + 32].tolist() == expected[0].tolist(), row


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_forbidden_are_the_tokens_that_complete_an_ngram_of_the_row(n):
    rng = np.random.default_rng(n)
    tokens = rng.integers(0, 3, (200, 12), dtype=np.int32)
    lengths = rng.integers(1, 13, 200, dtype=np.int32)
    logits = rng.normal(size=(200, 3)).astype(np.float32)
    found = np.asarray(
        sampling_rules.forbid_repeats(*map(jnp.asarray, (logits, tokens, lengths)), n)
    )
    for row, length, before, after in zip(tokens.tolist(), lengths, logits, found):
        row = row[:length]
        there = {tuple(row[i : i + n]) for i in range(length - n + 1)}
        tail = row[length - n + 1 :] if length >= n - 1 else None
        banned = [tail is not None and (*tail, token) in there for token in range(3)]
        np.testing.assert_array_equal(after, np.where(banned, -np.inf, before))


# Rows.


def test_a_row_does_not_depend_on_the_others(llama, endless):
    together = endless
    assert len({tuple(row) for row in together.tokens[:, 8:]}) == 4
    for row in range(4):
        keys = row_keys(jax.random.key(11), jnp.array([row]))
        alone = run(llama, REQUESTS[row : row + 1], LENGTHS[row : row + 1], keys)
        for one, all_rows in zip(alone, together):
            np.testing.assert_array_equal(one[0], all_rows[row])


def test_equal_requests_with_different_keys_differ(llama):
    same = np.repeat(REQUESTS[1:2], 4, axis=0)
    out = run(llama, same, np.full(4, 8, np.int32))
    assert len({tuple(row) for row in out.tokens}) == 4


def test_what_stands_behind_a_request_is_not_seen(llama, endless):
    behind = np.arange(8) >= LENGTHS[:, None]
    changed = run(llama, np.where(behind, 77, REQUESTS))
    jax.tree.map(np.testing.assert_array_equal, changed, endless)


def test_a_rollout_is_the_request_the_new_tokens_and_zeros(endless):
    out = endless
    assert out.tokens.shape == (4, 8 + 12)
    assert out.lengths.tolist() == (LENGTHS + 12).tolist()
    assert not out.ended.any()
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(out.tokens[row, :length], REQUESTS[row, :length])
        assert len(set(written(out, row))) > 3
        assert not out.tokens[row, length + 12 :].any()


# Ends.


def run_to_eos(model, *eos_ids: int) -> tuple[Rollout, int]:
    """The same as without an EOS up to there, and how often the model ran."""
    calls = []

    def hidden_states(params, tokens, prefix):
        jax.debug.callback(lambda: calls.append(1))
        return model.decoder.hidden_states(params, tokens, prefix)

    counted = LanguageModel(hidden_states, model.decoder.output_head)
    out = run(model.replace(decoder=counted), sampling=Sampling(eos_ids=eos_ids))
    jax.effects_barrier()
    return out, len(calls)


def cut(row: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    """A row's tokens up to its first EOS."""
    ends = [i + 1 for i, token in enumerate(row) if token in eos_ids]
    return row[: min(ends, default=len(row))]


def test_a_row_ends_with_the_first_of_several_eos(llama, endless):
    """And the loop with the last row: one prefill, then a step for every token of the longest."""
    rows = [written(endless, row) for row in range(4)]
    eos_ids = (rows[0][3], rows[1][5], rows[2][1], rows[3][0])
    out, calls = run_to_eos(llama, *eos_ids)
    expected = [cut(row, eos_ids) for row in rows]
    longest = max(map(len, expected))
    assert len({len(row) for row in expected}) > 2 and len(expected[3]) == 1 and longest < 12
    for row, length in enumerate(LENGTHS):
        assert written(out, row) == expected[row]
        assert not out.tokens[row, length + len(expected[row]) :].any()
        np.testing.assert_array_equal(out.tokens[row, :length], REQUESTS[row, :length])
    assert out.ended.all()
    assert calls == 1 + longest


def test_an_immediate_eos_in_every_row_is_one_step(llama, endless):
    first = [written(endless, row)[0] for row in range(4)]
    out, calls = run_to_eos(llama, *first)
    assert [written(out, row) for row in range(4)] == [[token] for token in first]
    assert out.ended.all()
    assert calls == 1 + 1


def test_an_eos_as_the_last_allowed_token_is_an_end_and_one_in_a_request_is_not(llama, endless):
    rows = [written(endless, row) for row in range(4)]
    last = next(row for row in range(4) if rows[row][-1] not in rows[row][:-1])
    asked = next(token for token in REQUESTS[1].tolist() if token not in sum(rows, []))
    eos_ids = (rows[last][-1], asked)
    out, calls = run_to_eos(llama, *eos_ids)
    for row in range(4):
        assert written(out, row) == cut(rows[row], eos_ids)
        assert out.ended[row] == (written(out, row)[-1] in eos_ids)
    assert out.lengths[last] == LENGTHS[last] + 12 and out.ended[last]
    assert not out.ended.all()
    assert calls == 1 + 12


# Choosing a token.


def random_logits(rows: int, vocab: int = 40) -> np.ndarray:
    return np.random.default_rng(7).normal(0, 2, (rows, vocab)).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    exponential = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return exponential / exponential.sum(axis=-1, keepdims=True)


def test_temperature_0_is_argmax():
    values = random_logits(50)
    keys = row_keys(jax.random.key(0), jnp.arange(50))
    sampling = Sampling(temperature=0.0, top_k=3, top_p=0.2)
    np.testing.assert_array_equal(choose(values, keys, sampling), values.argmax(axis=-1))


@pytest.mark.parametrize("k", [1, 3, 39, 40, 1000])
def test_top_k_keeps_the_k_largest(k):
    values = random_logits(50)
    found = np.asarray(sampling_rules._keep_top_k(jnp.asarray(values), k))
    for row, kept in zip(values, found):
        largest = sorted(np.argsort(row)[::-1][:k])
        assert np.flatnonzero(np.isfinite(kept)).tolist() == largest
        np.testing.assert_array_equal(kept[largest], row[largest])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    values = random_logits(200)
    found = np.asarray(sampling_rules.keep_top_p(jnp.asarray(values), p))
    for row, kept in zip(values, found):
        order = np.argsort(row)[::-1]
        reached = np.cumsum(softmax(row)[order])
        smallest = sorted(order[: np.searchsorted(reached, p) + 1])
        assert np.flatnonzero(np.isfinite(kept)).tolist() == smallest
        np.testing.assert_array_equal(kept[smallest], row[smallest])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 1.0])
def test_min_p_is_that_of_transformers(p):
    import torch
    from transformers import MinPLogitsWarper

    values = random_logits(200)
    expected = MinPLogitsWarper(p)(None, torch.tensor(values)).numpy()
    np.testing.assert_array_equal(sampling_rules._keep_min_p(jnp.asarray(values), p), expected)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.2])
def test_repeated_tokens_are_penalized_as_in_transformers(penalty):
    """Rows of their own lengths here, one by one there; what stands behind a row is none of it."""
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (50, 12), dtype=np.int32)
    lengths, logits = rng.integers(1, 13, 50, dtype=np.int32), random_logits(50)
    rows = map(jnp.asarray, (logits, tokens, lengths))
    found = sampling_rules.penalize_repeats(*rows, penalty)
    there = RepetitionPenaltyLogitsProcessor(penalty)
    for row, length, before, after in zip(tokens, lengths, logits, np.asarray(found)):
        seen = torch.tensor(row[None, :length], dtype=torch.long)
        expected = there(seen, torch.tensor(before[None]))[0].numpy()
        np.testing.assert_allclose(after, expected, rtol=1e-6)


def test_filters_that_are_off_change_nothing():
    values = random_logits(50)
    keys = row_keys(jax.random.key(0), jnp.arange(50))
    plain = choose(values, keys, Sampling())
    for off in (Sampling(top_k=0), Sampling(top_p=1.0), Sampling(top_k=40), Sampling(min_p=0.0)):
        np.testing.assert_array_equal(choose(values, keys, off), plain)
    assert (np.asarray(choose(values, keys, Sampling(top_k=2))) != plain).any()


def filtered(row: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What `sampling` asks for: temperature, then top-k, top-p of what is left, and min-p."""
    probability = softmax(row / sampling.temperature)
    order = np.argsort(row)[::-1]
    if sampling.top_k:
        probability[order[sampling.top_k :]] = 0
        probability /= probability.sum()
    reached = np.cumsum(probability[order])
    probability[order[np.searchsorted(reached, sampling.top_p) + 1 :]] = 0
    probability[probability < sampling.min_p * probability.max()] = 0
    return probability / probability.sum()


def assert_frequencies(tokens, probability: np.ndarray) -> None:
    """Every token within 5 standard deviations of its expected count."""
    count = np.bincount(tokens, minlength=len(probability))
    spread = np.sqrt(len(tokens) * probability * (1 - probability))
    assert (abs(count - len(tokens) * probability) <= 5 * spread).all(), (count, probability)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0),
        Sampling(top_k=3),
        Sampling(top_p=0.8),
        Sampling(temperature=1.5, top_k=4, top_p=0.7),
        Sampling(min_p=0.3),
        Sampling(temperature=1.5, top_k=4, min_p=0.4),
    ],
)
def test_frequencies_are_the_probabilities(sampling):
    row = np.float32([1.0, -0.5, 0.3, 1.7, 0.0, -2.0])
    keys = row_keys(jax.random.key(5), jnp.arange(20_000))
    tokens = choose(jnp.broadcast_to(row, (20_000, 6)), keys, sampling)
    assert_frequencies(tokens, filtered(row, sampling))


def test_a_token_without_probability_is_never_drawn():
    """Nine of 3,000 have any."""
    possible = np.array([0, 255, 256, 700, 1023, 1024, 1025, 2048, 2999])
    row = np.full(3000, -np.inf, np.float32)
    row[possible] = np.linspace(-1, 1, 9)
    rows = jnp.broadcast_to(row, (2000, 3000))
    tokens = np.asarray(choose(rows, row_keys(jax.random.key(6), jnp.arange(2000)), PLAIN))
    assert_frequencies(np.searchsorted(possible, tokens), softmax(row[possible]))
    assert set(tokens) == set(possible)


def next_probability(model, tokens, vocab: int) -> np.ndarray:
    padded = np.zeros((3, 20), np.int32)
    padded[:, : len(tokens)] = tokens
    return softmax(logits(model, padded)[0, len(tokens) - 1, :vocab])


def test_frequencies_of_a_models_tokens(llama):
    """First tokens, and second tokens given the first: the steps draw independently."""
    rows, vocab = 8192, 6
    request = REQUESTS[1:2, :2]
    keys = row_keys(jax.random.key(2), jnp.arange(rows))
    out = run(
        llama,
        np.repeat(request, rows, axis=0),
        np.full(rows, 2, np.int32),
        keys,
        new=2,
        vocab_size=vocab,
    )
    first, second = out.tokens[:, 2], out.tokens[:, 3]
    assert_frequencies(first, next_probability(llama, request[0], vocab))
    for token in np.flatnonzero(np.bincount(first) > 500):
        given = next_probability(llama, [*request[0], token], vocab)
        assert_frequencies(second[first == token], given)


def test_a_padded_vocabulary_is_cut(llama):
    out = run(llama, sampling=GREEDY, vocab_size=20)
    full = logits(llama, out.tokens[:3])
    best = full[..., :20].argmax(axis=-1)
    for row, length in enumerate(LENGTHS[:3]):
        columns = slice(length - 1, length + 11)
        assert written(out, row) == best[row, columns].tolist()
        assert (full[row, columns].argmax(axis=-1) >= 20).any()


def test_logits_of_half_precision_are_not_rounded_to_it():
    """1 and 1 + 2**-9 are one number in bfloat16."""
    head = jnp.array([[1, 0], [1, 2**-9], [1, -1]], jnp.bfloat16)
    ones = LanguageModel(
        lambda _, tokens, prefix: jnp.ones((*tokens.shape, 2), head.dtype), lambda _: head
    )
    out = sample(ones, {}, REQUESTS, LENGTHS, KEYS, max_new_tokens=1, sampling=GREEDY)
    assert np.asarray(out.tokens)[range(4), LENGTHS].tolist() == [1, 1, 1, 1]


# The soft prompt, and the whole thing.


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sampling_behind_a_soft_prompt_of_real_tokens(name):
    """Embeddings of tokens in front, or the tokens themselves: the same continuation."""
    model = random_model(name)
    text = np.int32([9, 2, 44, 17, 30])
    soft = run(model, prefix=embed(model.params, text))
    hard = run(model, np.concatenate([np.tile(text, (4, 1)), REQUESTS], axis=1), LENGTHS + 5)
    np.testing.assert_array_equal(soft.tokens, hard.tokens[:, 5:])
    np.testing.assert_array_equal(soft.lengths, hard.lengths - 5)
    assert len({tuple(row) for row in soft.tokens[:, 8:]}) == 4


# Slots: more rows than are written at once.

MANY = 13


@functools.cache
def many_rows():
    rng = np.random.default_rng(8)
    tokens = rng.integers(1, VOCAB, (MANY, 8), dtype=np.int32)
    return tokens, rng.integers(1, 9, MANY, dtype=np.int32)


def writer(model, **how):
    sampling = Sampling(eos_ids=tuple(range(1, 12)), no_repeat_ngram_size=2)
    function = functools.partial(sample, model.decoder, max_new_tokens=16, sampling=sampling, **how)

    @jax.jit
    def write(params, tokens, lengths, keys, options):
        return function(params, tokens, lengths, keys, **options)

    def write_many(**options) -> Rollout:
        keys = row_keys(jax.random.key(4), jnp.arange(MANY))
        return jax.tree.map(np.asarray, write(model.params, *many_rows(), keys, options))

    return write_many


@pytest.fixture(scope="module")
def at_once(llama):
    """Writes without slots; `in_four` in four. Each is compiled once."""
    return writer(llama)


@pytest.fixture(scope="module")
def in_four(llama):
    return writer(llama, slots=4)


@pytest.mark.parametrize("slots", [1, 4, MANY - 1, MANY, 50])
def test_slots_change_nothing(llama, at_once, slots):
    soft_prompt = embed(llama.params, np.int32([9, 2, 44]))
    expected = at_once(prefix=soft_prompt)
    assert 2 < expected.ended.sum() < MANY  # some by an EOS, some by the limit
    found = writer(llama, slots=slots)(prefix=soft_prompt)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_slots_leave_rows_alone_that_are_not_active(at_once, in_four, share):
    active = np.arange(MANY) < share * MANY
    active = np.random.default_rng(1).permutation(active)
    expected = at_once(active=active)
    assert (expected.lengths[~active] == many_rows()[1][~active]).all()
    found = in_four(active=active)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_two_models_write_in_slots(llama):
    second = dict(second=sampler.SamplingModel(llama.decoder, llama.params), second_share=0.3)
    expected, found = writer(llama, **second)(), writer(llama, slots=4, **second)()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_long_row_holds_up_no_other(llama, monkeypatch):
    """In steps: at least all tokens over the slots, and less than the longest of each four rows."""
    steps, decode = [], Decoder.decode

    def counted(*arguments):
        jax.debug.callback(lambda: steps.append(1))
        return decode(*arguments)

    monkeypatch.setattr(Decoder, "decode", counted)
    out = writer(llama, slots=4)()
    jax.effects_barrier()
    new = out.lengths - many_rows()[1]
    waiting_for_all = sum(max(new[i : i + 4]) for i in range(0, MANY, 4))
    assert new.sum() / 4 <= len(steps) < waiting_for_all


def test_prompts_are_read_in_the_smallest_compiled_width(llama, monkeypatch):
    """Prompts of at most 8 columns, in 3, 6 or 8."""
    taken, prefill = [], sampler._prefill

    def counted(writing, tokens, *arguments):
        jax.debug.callback(lambda: taken.append(tokens.shape[1]))
        return prefill(writing, tokens, *arguments)

    def write(number):
        function = functools.partial(sample, llama.decoder, max_new_tokens=4)
        compiled = jax.jit(functools.partial(function, prompt_buckets=number))
        lengths = [np.minimum(LENGTHS, longest) for longest in (8, 6, 3, 2)]
        return [compiled(llama.params, REQUESTS, each, KEYS) for each in lengths]

    expected = write(1)
    monkeypatch.setattr(sampler, "_prefill", counted)
    jax.tree.map(np.testing.assert_array_equal, write(3), expected)
    jax.effects_barrier()
    assert taken == [8, 6, 3, 3]


@pytest.mark.parametrize("how", ["at once", "in slots", "jointly", "some"])
def test_rows_of_one_prompt_are_those_of_a_prompt_each_and_it_is_read_once(llama, how, monkeypatch):
    read, prefill = [], sampler._prefill

    def counted(writing, tokens, *arguments):
        read.append(tokens.shape[0])
        return prefill(writing, tokens, *arguments)

    monkeypatch.setattr(sampler, "_prefill", counted)
    options = dict(max_new_tokens=12, sampling=Sampling(eos_ids=tuple(range(1, 12))))
    if how == "in slots":
        options["slots"] = 4
    if how == "jointly":
        options |= dict(second=sampler.SamplingModel(llama.decoder, llama.params), second_share=0.3)
    if how == "some":
        active = np.random.default_rng(2).permutation(12) < 5
        options["active"] = active & (np.arange(12) >= 3)  # none of the first prompt's
    write = jax.jit(
        functools.partial(sample, llama.decoder, **options, prompt_buckets=2),
        static_argnames="rollouts_per_prompt",
    )
    keys = row_keys(jax.random.key(4), jnp.arange(12))
    found = write(llama.params, REQUESTS, LENGTHS, keys, rollouts_per_prompt=3)
    assert {*read} == ({4, 1} if how == "in slots" else {4})  # slots let in one row at a time
    repeated = np.repeat(REQUESTS, 3, axis=0), np.repeat(LENGTHS, 3)
    expected = write(llama.params, *repeated, keys)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert len({tuple(row) for row in np.asarray(found.tokens)}) > (4 if how == "some" else 10)


@pytest.mark.parametrize("slots", [0, 2])
def test_keys_are_of_rows_and_not_of_prompts(llama, slots):
    with pytest.raises(ValueError, match="4 keys for 12 rows, 3 of each prompt; expected one for"):
        how = dict(max_new_tokens=4, rollouts_per_prompt=3, slots=slots)
        sample(llama.decoder, llama.params, REQUESTS, LENGTHS, KEYS, **how)


def test_all_in_one_call_without_the_host(llama):
    function = functools.partial(
        sample, llama.decoder, max_new_tokens=4, sampling=Sampling(top_k=3, top_p=0.9)
    )
    jaxpr = jax.make_jaxpr(function)(llama.params, REQUESTS, LENGTHS, KEYS)
    assert [x.primitive.name for x in jaxpr.eqns].count("while") == 1
    assert "callback" not in str(jaxpr)
