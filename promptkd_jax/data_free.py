"""Distillation without data: the teacher writes the requests itself, steered by a topic policy.

A bank of topic prompts ("write one short question about …") is a bandit: a softmax policy with one
logit per topic draws topics, the teacher writes a request to each, and the policy is reinforced
towards topics whose requests are fluent, new, and answered by the student least like the teacher.
What comes out are records without outputs, on which any method then trains.

Published (PromptDFD; Ma, Wang, Fang, Shen, Lu; IJCAI 2022; for text classifiers): a pre-trained
language model is the prior that keeps synthetic text fluent, a topic prompter chooses the hard
prompts that steer it and is reinforced towards text that is on topic and difficult, and the student
is trained on that text. Its code was never found, and its reward is not reproduced here.

Ours: the port to decoders (generator and teacher are one model, and what it writes are requests),
the reward below, the novelty term, the entropy bonus, and the bank. Their weights are not tuned.
It takes a teacher that follows instructions: a weak one (135M parameters) often answers a topic
prompt instead of asking, and its requests are then mere statements on the topic.

The reward of request x, in nats:

    mean_t KL(p || q) over the teacher's own answer to x, y ~ p(.|x)
    - novelty_weight * (largest share of word pairs that x has in common with an earlier request)
    - fluency_weight * (-log p(x | its topic prompt) / number of tokens of x)

A request that is empty, a single word, longer than a prompt may be, or written before is dropped
and counted. Its reward is the least that any of its round could have got: no disagreement, nothing
new, as unlikely as the least fluent one.

K topics, N requests of a round, B batch, R response positions.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from promptkd_jax import manifest as manifests
from promptkd_jax.batch import Batch, responses
from promptkd_jax.data import (
    DataError,
    Record,
    Rows,
    eval_batches,
    read_records,
    render_prompt,
    tokenize,
)
from promptkd_jax.evaluate import decode, write_answers
from promptkd_jax.files import write_json
from promptkd_jax.losses import cross_entropy, entropy, forward_kl, linear_values
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.load import Model
from promptkd_jax.sampler import Sampling
from promptkd_jax.teacher import view

PATIENCE = 5  # rounds in a row without a single new request


@dataclasses.dataclass(frozen=True)
class DataFree:
    """How requests are written and the policy is reinforced.

    Attributes:
      requests: how many are wanted.
      round_size: requests between two updates of the policy, at least 2.
      max_request_tokens: where the teacher is cut off while it writes a request.
      max_new_tokens: of the answer on which teacher and student are compared.
      learning_rate: of Adam on the policy's logits.
      novelty_weight, fluency_weight: of the reward, in nats; see the module.
      entropy_weight: of the bonus that keeps the policy from collapsing onto one topic. Where its
        objective is largest, a topic's probability is proportional to
        exp(its mean normalised reward / entropy_weight).
      temperature: at which requests are written; their answers are sampled at 1.
      seed: of topics, requests and answers.
      bank: JSON lines of topic prompts, as `read_bank` takes them.
    """

    requests: int = 1000
    round_size: int = 64
    max_request_tokens: int = 48
    max_new_tokens: int = 64
    learning_rate: float = 0.2
    novelty_weight: float = 1.0
    fluency_weight: float = 0.2
    entropy_weight: float = 0.5
    temperature: float = 1.0
    seed: int = 10
    bank: str = "package:topics.jsonl"

    def __post_init__(self):
        if self.round_size < 2:
            raise ValueError(
                f"round_size: {self.round_size}; rewards are normalised within a round, "
                "which takes at least 2"
            )


def write_requests(
    teacher: Model,
    student: Model,
    file: pathlib.Path,
    settings: DataFree,
    *,
    template: str,
    prompt_capacity: int,
    batch_size: int,
    vocab_size: int,
) -> list[Record]:
    """Requests for the student to learn on, in the teacher's own words.

    Every round is appended to `file`: a line per request with the parts of its reward (what was
    dropped says why in "fault"), then a line with the policy. A call that was stopped continues
    after the last whole round and gives the same requests; more `requests` continue as well. What
    made the file stands beside it in `<name>.manifest.json`.

    Args:
      teacher, student: with one tokenizer; generation ends at any of the teacher's `eos_ids`.
      template: of topic prompts and of requests; see `data.TEMPLATES`.
      prompt_capacity: the most tokens of a rendered topic prompt or request.
      batch_size: rows per forward; part of what decides the result to the last bit.
      vocab_size: what teacher and student share.

    Returns:
      `settings.requests` records with an instruction and no outputs.

    Raises:
      DataError: the bank cannot be used, the file is of other models or settings, or the teacher
        writes nothing new any more, or a log-probability is not finite.
    """
    pair = _Pair(teacher, student, template, prompt_capacity, batch_size, vocab_size)
    bank = _bank_rows(pair, settings.bank)
    _claim(file, pair, settings, bank)
    policy = init_policy(len(bank.tokens), settings.learning_rate)
    rounds, policy = _read_rounds(file, policy)
    found = _kept(rounds)
    while len(found) < settings.requests:
        _check_patience(rounds, file, settings)
        key = jax.random.fold_in(jax.random.key(settings.seed), len(rounds))
        drawn, requests = _write_round(pair, settings, bank, policy, found, key)
        policy = reinforce(policy, drawn, [request.reward for request in requests], settings)
        _append_round(file, len(rounds), requests, policy)
        rounds.append(requests)
        found = _kept(rounds)
    print(_account(file, rounds))
    return [Record(text, "", ()) for text in found[: settings.requests]]


# The policy over the bank


class Policy(NamedTuple):
    """One logit per topic, `[K]` float32, and the state of Adam."""

    logits: jax.Array
    optimizer: optax.OptState


def init_policy(topics: int, learning_rate: float) -> Policy:
    """Every topic is equally likely."""
    logits = jnp.zeros(topics, jnp.float32)
    return Policy(logits, _adam(learning_rate).init(logits))


def _adam(learning_rate: float) -> optax.GradientTransformation:
    # A topic that was not drawn has no gradient but rounding errors: the usual eps of 1e-8 would
    # blow them up to whole steps. Those of drawn topics are about 1 / round_size.
    return optax.adam(learning_rate, eps=1e-4)


@jax.jit
def policy_gradient(
    logits: jax.Array, drawn: jax.Array, advantages: jax.Array, entropy_weight: float = 0.0
) -> jax.Array:
    """Which way to move the logits `[K]`: REINFORCE (Williams 1992) for a categorical.

    Args:
      logits: of the policy pi from which the topics `drawn` `[N]` were drawn.
      advantages: `[N]`, of each draw.
      entropy_weight: of the policy's entropy.

    Returns:
      The gradient of mean_n advantages[n] log pi(drawn[n]) + entropy_weight * entropy(pi), whose
      expectation over the draws is that of the expected advantage plus the bonus.
    """

    def objective(logits):
        chosen = jnp.asarray(advantages) * jax.nn.log_softmax(logits)[drawn]
        return jnp.mean(chosen) + entropy_weight * entropy(logits)

    return jax.grad(objective)(logits)


def reinforce(
    policy: Policy, drawn: jax.Array, rewards: Sequence[float], settings: DataFree
) -> Policy:
    """The policy after one step of Adam towards a round's better topics."""
    gradient = policy_gradient(
        policy.logits, drawn, normalised(rewards), float(settings.entropy_weight)
    )
    descent, optimizer = _adam(settings.learning_rate).update(-gradient, policy.optimizer)
    return Policy(optax.apply_updates(policy.logits, descent), optimizer)


def normalised(rewards: Sequence[float]) -> np.ndarray:
    """Mean 0 and standard deviation 1 within the round; 0 where all are the same."""
    rewards = np.asarray(rewards, np.float64)
    spread = rewards.std()
    if spread < 1e-6:  # rounding errors, which Adam would blow up
        return np.zeros(len(rewards), np.float32)
    return ((rewards - rewards.mean()) / spread).astype(np.float32)


def reward(settings: DataFree, kl: float, similarity: float, surprise: float) -> float:
    """Of a request, in nats; see the module."""
    return kl - settings.novelty_weight * similarity - settings.fluency_weight * surprise


# The bank and the texts


def read_bank(source: str) -> list[Record]:
    """Topic prompts: JSON lines whose "instruction" has one request written, as `data` reads them.

    Raises:
      DataError: a line cannot be read, there is only one, or two are the same.
    """
    bank = read_records(source, need_output=False)
    counts = collections.Counter(record.instruction for record in bank)
    if repeated := [text for text, count in counts.items() if count > 1]:
        raise DataError(f"{source}: expected distinct topic prompts, found twice: {repeated[0]!r}")
    if len(bank) == 1:
        raise DataError(f"{source}: one topic prompt leaves nothing to choose; give at least two")
    return bank


_ANNOUNCEMENT = re.compile(r"(sure|here|certainly|of course)\b.*:", re.IGNORECASE)
_NUMBER = r"[-*•]\s+|\(?\d+[.):]\s+"
_NAME = r"(question|instruction|request|q)(\s*\d+)?\s*:"
_LABEL = re.compile(rf"({_NUMBER}|{_NAME}|\*\*{_NAME}\*\*)\s*", re.IGNORECASE)
_MARKS = (("**", "**"), ("*", "*"), ("`", "`"), ('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"))


def clean_request(text: str) -> str:
    """The request within what the teacher wrote: its first line that says anything.

    A line that only announces it ("Here is a question:") is passed over; list markers, numbers,
    labels ("Question:") and quotation or emphasis marks around the whole line are removed.
    """
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if len(lines) > 1 and _ANNOUNCEMENT.fullmatch(lines[0]):
        lines = lines[1:]
    line, before = "".join(lines[:1]), None
    while line != before:
        before = line
        line = _LABEL.sub("", _unquoted(line), count=1) if _LABEL.match(line) else _unquoted(line)
    return line


def _unquoted(line: str) -> str:
    """Without a pair of marks around all of it, or an opening one that is never closed."""
    for opening, closing in _MARKS:
        inner = line.removeprefix(opening)
        if inner != line and closing not in inner.removesuffix(closing):
            return inner.removesuffix(closing).strip()
    return line


def words(text: str) -> tuple[str, ...]:
    """Runs of letters and digits, lower-cased: requests with the same words are the same."""
    return tuple(re.findall(r"\w+", text.lower()))


def similarity(text: str, earlier: Collection[frozenset]) -> float:
    """The largest overlap (intersection over union) of its word pairs with those of another, in
    [0, 1]; `earlier` are theirs, as `word_pairs` gives them."""
    pairs = word_pairs(text)
    return max((len(pairs & other) / len(pairs | other) for other in earlier), default=0.0)


def word_pairs(text: str) -> frozenset[tuple[str, str]]:
    """Every two neighbouring words of a text of at least two."""
    found = words(text)
    return frozenset(zip(found, found[1:]))


def fault(text: str, earlier: Collection[tuple[str, ...]]) -> str:
    """Why a text is no new request, "" where it is one; `earlier` holds the words of others."""
    found = words(text)
    if len(found) < 2:
        return "one word" if found else "empty"
    return "duplicate" if found in earlier else ""


# A round


class _Pair(NamedTuple):
    """The two models, and what a row of theirs looks like."""

    teacher: Model
    student: Model
    template: str
    prompt_capacity: int
    batch_size: int
    vocab_size: int


class _Request(NamedTuple):
    """A line of the file; the parts of the reward are None where it was dropped for its `fault`."""

    topic: str
    request: str
    fault: str
    kl: float | None
    similarity: float | None
    surprise: float | None
    reward: float


def _bank_rows(pair: _Pair, source: str) -> Rows:
    rows = _rows(pair, read_bank(source))
    if rows.dropped:
        raise DataError(
            f"{source}: {rows.dropped} topic prompts are longer than the {pair.prompt_capacity} "
            "tokens of a prompt; make them shorter or max_prompt_length larger"
        )
    return rows


def _rows(pair: _Pair, records: Sequence[Record]) -> Rows:
    return tokenize(
        records,
        pair.teacher.tokenizer,
        template=pair.template,
        max_prompt_length=pair.prompt_capacity,
        max_length=pair.prompt_capacity,
        eos_id=pair.teacher.eos_ids[0],
    )


def _write_round(
    pair: _Pair, settings: DataFree, bank: Rows, policy: Policy, earlier: list[str], key: jax.Array
) -> tuple[jax.Array, list[_Request]]:
    """The topics drawn `[N]` and the requests written to them, with their rewards."""
    drawing, writing, answering = jax.random.split(key, 3)
    drawn = jax.random.categorical(drawing, policy.logits, shape=(settings.round_size,))
    prompts = _select(bank, np.asarray(drawn))
    texts = _write(pair, settings, prompts, writing)
    faults = _faults(pair, texts, earlier)
    kept = [i for i, found in enumerate(faults) if not found]
    requests = [texts[i] for i in kept]
    parts = zip(
        _disagreements(pair, settings, requests, answering),
        _similarities(requests, earlier),
        _surprises(pair, settings, _select(prompts, kept), requests),
    )
    scored = dict(zip(kept, parts))
    floor = reward(settings, 0.0, 1.0, max((part[2] for part in scored.values()), default=0.0))
    return drawn, [
        _Request(
            prompts.records[i].instruction,
            texts[i],
            faults[i],
            *scored.get(i, (None, None, None)),
            reward=reward(settings, *scored[i]) if i in scored else floor,
        )
        for i in range(settings.round_size)
    ]


def _write(pair: _Pair, settings: DataFree, prompts: Rows, key: jax.Array) -> list[str]:
    """What the teacher writes to each topic prompt, cleaned."""
    written = _answers(pair, prompts, settings.max_request_tokens, settings.temperature, key)
    return [clean_request(decode(pair.teacher.tokenizer, tokens)) for tokens in written]


def _answers(pair: _Pair, rows: Rows, most: int, temperature: float, key: jax.Array):
    return write_answers(
        pair.teacher,
        rows,
        sampling=Sampling(temperature=temperature, eos_ids=pair.teacher.eos_ids),
        prompt_capacity=pair.prompt_capacity,
        max_new_tokens=most,
        batch_size=pair.batch_size,
        key=key,
        vocab_size=pair.vocab_size,
    )


def _faults(pair: _Pair, texts: list[str], earlier: list[str]) -> list[str]:
    """Of each text, the ones before it counted as earlier ones."""
    known, faults = set(map(words, earlier)), []
    for text in texts:
        found = fault(text, known)
        if not found:
            tokens = render_prompt(Record(text, "", ()), pair.template, pair.teacher.tokenizer)
            found = "too long" if len(tokens) > pair.prompt_capacity else ""
        if not found:
            known.add(words(text))
        faults.append(found)
    return faults


def _similarities(requests: list[str], earlier: list[str]) -> list[float]:
    """Of each request, the ones before it counted as earlier ones."""
    pairs = [word_pairs(text) for text in earlier + requests]
    first = len(earlier)
    return [similarity(text, pairs[: first + i]) for i, text in enumerate(requests)]


def _disagreements(
    pair: _Pair, settings: DataFree, requests: list[str], key: jax.Array
) -> list[float]:
    """KL(teacher || student) in nats per token of the teacher's own answer to each request."""
    if not requests:
        return []
    rows = _rows(pair, [Record(text, "", ()) for text in requests])
    answers = _answers(pair, rows, settings.max_new_tokens, 1.0, key)
    compare = _kl_means(
        pair.teacher.decoder, pair.student.decoder, settings.max_new_tokens, pair.vocab_size
    )
    params = pair.teacher.params, pair.student.params
    rows = _with_responses(rows, list(answers))
    return _by_row(pair, functools.partial(compare, params), rows, settings.max_new_tokens)


def _surprises(pair: _Pair, settings: DataFree, prompts: Rows, requests: list[str]) -> list[float]:
    """-log p(request | its topic prompt) under the teacher, in nats per token (of the first
    `max_request_tokens`, should the cleaned text encode into more)."""
    if not requests:
        return []
    most = settings.max_request_tokens
    encoded = pair.teacher.tokenizer(requests, add_special_tokens=False)["input_ids"]
    rows = _with_responses(prompts, [ids[:most] for ids in encoded])
    measure = _surprise_means(pair.teacher.decoder, most, pair.vocab_size)
    return _by_row(pair, functools.partial(measure, pair.teacher.params), rows, most)


def _by_row(pair: _Pair, measure: Any, rows: Rows, most: int) -> list[float]:
    """`measure(batch)` `[B]` of all rows, whose responses have at most `most` tokens."""
    values = []
    length = pair.prompt_capacity + most
    for batch, real in eval_batches(rows, batch_size=pair.batch_size, length=length):
        values += jax.device_get(measure(batch))[:real].tolist()
    if not np.isfinite(values).all():
        raise DataError(
            f"teacher {pair.teacher.name} or student {pair.student.name}: a log-probability of "
            "what the teacher wrote is not finite; try dtype float32"
        )
    return values


@functools.lru_cache(maxsize=8)
def _kl_means(teacher: Decoder, student: Decoder, capacity: int, vocab_size: int):
    @jax.jit
    def measure(params, batch: Batch):
        where = responses(batch, capacity)
        target = view(teacher, params[0], batch, where, vocab_size)
        learner = view(student, params[1], batch, where, vocab_size)
        (values,) = linear_values((forward_kl,), learner, (target,))
        return jnp.sum(values * where.mask, axis=1) / jnp.sum(where.mask, axis=1)

    return measure


@functools.lru_cache(maxsize=8)
def _surprise_means(teacher: Decoder, capacity: int, vocab_size: int):
    @jax.jit
    def measure(params, batch: Batch):
        where = responses(batch, capacity)
        learner = view(teacher, params, batch, where, vocab_size)
        (values,) = linear_values((cross_entropy,), learner, (where.labels,))
        return jnp.sum(values * where.mask, axis=1) / jnp.sum(where.mask, axis=1)

    return measure


def _select(rows: Rows, indices: Sequence[int]) -> Rows:
    return Rows(
        tokens=[rows.tokens[i] for i in indices],
        prompt_lengths=rows.prompt_lengths[np.asarray(indices, np.int32)],
        records=[rows.records[i] for i in indices],
        dropped=0,
    )


def _with_responses(prompts: Rows, written: Sequence[Sequence[int]]) -> Rows:
    pairs = zip(prompts.tokens, written, strict=True)
    return prompts._replace(
        tokens=[np.concatenate([prompt, np.asarray(tokens, np.int32)]) for prompt, tokens in pairs]
    )


# The file


def _claim(file: pathlib.Path, pair: _Pair, settings: DataFree, bank: Rows) -> None:
    """Writes the manifest, or compares with the one that is there."""
    made_from = _made_from(pair, settings, bank)
    manifest = file.with_suffix(".manifest.json")
    if manifest.exists():
        manifests.compare(manifest, made_from)
    elif file.exists():
        raise DataError(f"{file}: {manifest.name}, which says what made it, is missing; remove it")
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(manifest, made_from | manifests.made_by(pair.teacher))


def _made_from(pair: _Pair, settings: DataFree, bank: Rows) -> dict[str, Any]:
    """What decides the requests; how many are wanted does not."""
    chosen = dataclasses.asdict(settings)
    del chosen["requests"]
    return {
        "format": manifests.FORMAT,
        "what": "requests",
        **manifests.of_model(pair.teacher),
        "student": _parameters(pair.student),
        "tokenizer": manifests.of_tokenizer(pair.teacher.tokenizer),
        "topics": manifests.of_rows(bank.tokens),
        **chosen,
        "template": pair.template,
        "prompt_capacity": pair.prompt_capacity,
        "batch_size": pair.batch_size,
        "vocab_size": pair.vocab_size,
    }


def _parameters(model: Model) -> str:
    """Of every array: a student made of a teacher's layers has no files of its own."""
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(model.params):
        whole.update(np.asarray(jax.device_get(leaf)).tobytes())
    return f"sha256 {whole.hexdigest()}"


def _read_rounds(file: pathlib.Path, policy: Policy) -> tuple[list[list[_Request]], Policy]:
    """The whole rounds of the file and the policy after them (`policy` where there is none).

    What a stopped run left of the round after them is cut off.
    """
    rounds, pending, position, end = [], [], 0, 0
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines, start=1):
        position += len(line)  # the file is ASCII
        if not line.endswith("\n"):
            break
        fields = _parse(line, f"{file}:{number}")
        if "logits" not in fields:
            pending.append(_Request(**fields))
            continue
        policy = _restored(policy, [fields["logits"], *fields["optimizer"]])
        rounds.append(pending)
        pending, end = [], position
    if position > end:
        os.truncate(file, end)
    return rounds, policy


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON ({error.msg}); take another file") from error


def _restored(policy: Policy, leaves: list) -> Policy:
    like, structure = jax.tree.flatten(policy)
    return structure.unflatten(jnp.asarray(x, y.dtype) for x, y in zip(leaves, like, strict=True))


def _append_round(
    file: pathlib.Path, number: int, requests: list[_Request], policy: Policy
) -> None:
    logits, *optimizer = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(policy)]
    lines = [request._asdict() for request in requests]
    lines.append({"round": number, "logits": logits, "optimizer": optimizer})
    with file.open("a") as out:
        out.write("".join(json.dumps(line) + "\n" for line in lines))


def _kept(rounds: list[list[_Request]]) -> list[str]:
    return [one.request for requests in rounds for one in requests if not one.fault]


def _check_patience(rounds: list[list[_Request]], file: pathlib.Path, settings: DataFree) -> None:
    if len(rounds) >= PATIENCE and not _kept(rounds[-PATIENCE:]):
        raise DataError(
            f"{_account(file, rounds)}; {settings.requests} are wanted, but the last {PATIENCE} "
            "rounds brought none: take a higher temperature, a larger bank or fewer requests"
        )


def _account(file: pathlib.Path, rounds: list[list[_Request]]) -> str:
    """How many were kept, and dropped for what."""
    faults = collections.Counter(one.fault for requests in rounds for one in requests)
    kept = faults.pop("", 0)
    dropped = ", ".join(f"{count} {why}" for why, count in sorted(faults.items())) or "none"
    return f"{file}: {kept} requests in {len(rounds)} rounds, dropped: {dropped}"
