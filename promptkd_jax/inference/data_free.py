"""Distillation without data: the teacher writes the requests itself, steered by a topic policy.

A policy over a bank of topic prompts ("write one short question about …"; see `topic_policy`) draws
topics, the teacher writes a request to each, and the policy is reinforced towards topics whose
requests are fluent, new, and answered by the student least like the teacher. What comes out are
records without outputs, on which any method then trains.

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

N requests of a round, B batch, R response positions.
"""

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from promptkd_jax.data.batch import Batch, responses
from promptkd_jax.data.batches import eval_batches
from promptkd_jax.data.records import Record
from promptkd_jax.data.rows import Rows, select_rows, tokenize, with_responses
from promptkd_jax.data.templates import render_prompt
from promptkd_jax.distill.chunked_loss import linear_values
from promptkd_jax.distill.losses import Divergence, cross_entropy, forward_kl
from promptkd_jax.distill.teacher import lazy_logits
from promptkd_jax.inference import topic_policy
from promptkd_jax.inference.generate import decode, generate_responses
from promptkd_jax.inference.topic_policy import Policy
from promptkd_jax.infra import distributed, provenance, sharding
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import AppendOnlyFile, Path, read_text, write_text
from promptkd_jax.infra.specs import SEED, Float, Int, field, validate
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.io import identity
from promptkd_jax.models.model import Model, check_positions
from promptkd_jax.models.sampler import Sampling

PATIENCE = 5  # rounds in a row without a single new request


@dataclasses.dataclass(frozen=True)
class DataFree:
    """How requests are written and the policy is reinforced.

    `entropy_weight`: where the policy's objective is largest, a topic's probability is proportional
    to exp(its mean normalized reward / entropy_weight).

    Raises:
      ValueError: a value out of its range.
    """

    requests: int = field(1000, Int(low=1), "prompts that are wanted")
    round_size: int = field(
        64, Int(low=2), "prompts between two updates of the policy, whose rewards are normalized"
    )
    max_request_tokens: int = field(
        48, Int(low=1), "tokens after which the teacher is cut off while it writes a prompt"
    )
    max_new_tokens: int = field(
        64, Int(low=1), "tokens of the response on which teacher and student are compared"
    )
    learning_rate: float = field(
        0.2, Float(low=0.0, open_low=True), "of Adam on the policy's logits"
    )
    novelty_weight: float = field(1.0, Float(low=0.0), "of novelty in the reward, in nats")
    fluency_weight: float = field(0.2, Float(low=0.0), "of fluency in the reward, in nats")
    entropy_weight: float = field(
        0.5, Float(low=0.0), "of the bonus that keeps the policy from collapsing onto one topic"
    )
    temperature: float = field(
        1.0,
        Float(low=0.0, open_low=True),
        "at which prompts are written; their responses are sampled at 1",
    )
    seed: int = field(10, SEED, "of topics, prompts and responses")
    bank: str = field(
        "package:topics.jsonl",
        Path(nonempty=True),
        "JSON lines of topic prompts, see docs/methods.md",
    )

    def __post_init__(self):
        validate(self)


def generate_prompts(
    teacher: Model,
    student: Model,
    file: epath.Path,
    settings: DataFree,
    *,
    template: str,
    prompt_capacity: int,
    batch_size: int,
    vocab_size: int,
    date: str = "",
) -> list[Record]:
    """Requests for the student to learn on, in the teacher's own words.

    Every round is appended to `file`: a line per request with the parts of its reward (what was
    dropped says why in "fault"), then a line with the policy. A call that was stopped continues
    after the last whole round and gives the same requests; more `requests` continue as well. What
    made the file stands beside it in `<name>.manifest.json`. All processes of a run take part; the
    first one reads and writes the file.

    Args:
      teacher, student: with one tokenizer; generation ends at any of the teacher's `eos_ids`.
      template, date: of topic prompts and of requests; see `templates.render_prompt`.
      prompt_capacity: the most tokens of a rendered topic prompt or request.
      batch_size: rows per forward; part of what decides the result to the last bit.
      vocab_size: what teacher and student share.

    Returns:
      `settings.requests` records with an instruction and no outputs.

    Raises:
      DataError: the bank cannot be used, the file is of other models or settings, or the teacher
        writes nothing new any more, or a log-probability is not finite.
    """
    pair = _Pair(teacher, student, template, prompt_capacity, batch_size, vocab_size, date)
    check_positions(student, prompt_capacity + settings.max_new_tokens)
    bank = _bank_rows(pair, settings.bank)
    manifest = file.with_suffix(".manifest.json")
    provenance.verify_or_write(manifest, _made_from(pair, settings, bank), teacher.name, file=file)
    policy = topic_policy.init_policy(len(bank.tokens), settings.learning_rate)
    rounds, policy = _read_rounds(file, policy)
    found = _kept(rounds)
    with AppendOnlyFile(file) as out:
        while len(found) < settings.requests:
            _check_patience(rounds, file, settings)
            key = jax.random.fold_in(jax.random.key(settings.seed), len(rounds))
            drawn, requests = _write_round(pair, settings, bank, policy, found, key)
            rewards = [request.reward for request in requests]
            policy = topic_policy.reinforce(
                policy, drawn, rewards, settings.learning_rate, settings.entropy_weight
            )
            out.append(_round_lines(len(rounds), requests, policy))
            rounds.append(requests)
            found = _kept(rounds)
    print(_account(file, rounds))
    return [Record(text, "", ()) for text in found[: settings.requests]]


# A round


class _Pair(NamedTuple):
    """The two models, and what a row of theirs looks like."""

    teacher: Model
    student: Model
    template: str
    prompt_capacity: int
    batch_size: int
    vocab_size: int
    date: str = ""


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
    rows = _rows(pair, topic_policy.read_bank(source))
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
        date=pair.date,
    )


def _write_round(
    pair: _Pair, settings: DataFree, bank: Rows, policy: Policy, earlier: list[str], key: jax.Array
) -> tuple[jax.Array, list[_Request]]:
    """The topics drawn `[N]` and the requests written to them, with their rewards."""
    drawing, writing, answering = jax.random.split(key, 3)
    drawn = jax.random.categorical(drawing, policy.logits, shape=(settings.round_size,))
    prompts = select_rows(bank, np.asarray(drawn))
    texts = _write(pair, settings, prompts, writing)
    faults = topic_policy.faults(texts, earlier, functools.partial(_fits, pair))
    kept = [i for i, found in enumerate(faults) if not found]
    requests = [texts[i] for i in kept]
    parts = zip(
        _disagreements(pair, settings, requests, answering),
        topic_policy.similarities(requests, earlier),
        _surprises(pair, settings, select_rows(prompts, kept), requests),
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


def reward(settings: DataFree, kl: float, similarity: float, surprise: float) -> float:
    """Of a request, in nats; see the module."""
    return kl - settings.novelty_weight * similarity - settings.fluency_weight * surprise


def _write(pair: _Pair, settings: DataFree, prompts: Rows, key: jax.Array) -> list[str]:
    """What the teacher writes to each topic prompt, cleaned."""
    written = _answers(pair, prompts, settings.max_request_tokens, settings.temperature, key)
    return [
        topic_policy.clean_request(decode(pair.teacher.tokenizer, tokens)) for tokens in written
    ]


def _answers(pair: _Pair, rows: Rows, most: int, temperature: float, key: jax.Array):
    return generate_responses(
        pair.teacher,
        rows,
        sampling=Sampling(temperature=temperature, eos_ids=pair.teacher.eos_ids),
        prompt_capacity=pair.prompt_capacity,
        max_new_tokens=most,
        batch_size=pair.batch_size,
        key=key,
        vocab_size=pair.vocab_size,
    )


def _fits(pair: _Pair, text: str) -> bool:
    record = Record(text, "", ())
    tokens = render_prompt(record, pair.template, pair.teacher.tokenizer, pair.date)
    return len(tokens) <= pair.prompt_capacity


def _disagreements(
    pair: _Pair, settings: DataFree, requests: list[str], key: jax.Array
) -> list[float]:
    """KL(teacher || student) in nats per token of the teacher's own answer to each request."""
    if not requests:
        return []
    rows = _rows(pair, [Record(text, "", ()) for text in requests])
    answers = _answers(pair, rows, settings.max_new_tokens, 1.0, key)
    rows = with_responses(rows, answers)
    return _means(pair, forward_kl, (pair.teacher, pair.student), rows, settings.max_new_tokens)


def _surprises(pair: _Pair, settings: DataFree, prompts: Rows, requests: list[str]) -> list[float]:
    """-log p(request | its topic prompt) under the teacher, in nats per token (of the first
    `max_request_tokens`, should the cleaned text encode into more)."""
    if not requests:
        return []
    most = settings.max_request_tokens
    encoded = pair.teacher.tokenizer(requests, add_special_tokens=False)["input_ids"]
    rows = with_responses(prompts, [ids[:most] for ids in encoded])
    return _means(pair, cross_entropy, (pair.teacher,), rows, most)


def _means(
    pair: _Pair, function: Divergence, models: tuple[Model, ...], rows: Rows, most: int
) -> list[float]:
    """Means over the responses, of at most `most` tokens: of the last model compared with the one
    before it, or with the tokens themselves."""
    measure = _measure(function, tuple(m.decoder for m in models), most, pair.vocab_size)
    params = [model.params for model in models]
    values, length = [], pair.prompt_capacity + most
    for batch, real in eval_batches(rows, batch_size=pair.batch_size, length=length):
        found = sharding.to_host(measure(params, sharding.place_rows(batch)))
        values += found[:real].tolist()
    if not np.isfinite(values).all():
        raise DataError(
            f"teacher {pair.teacher.name} or student {pair.student.name}: a log-probability of "
            "what the teacher wrote is not finite; try dtype float32"
        )
    return values


@functools.lru_cache(maxsize=8)
def _measure(function: Divergence, decoders: tuple[Decoder, ...], capacity: int, vocab_size: int):
    @jax.jit
    def measure(params, batch: Batch):
        where = responses(batch, capacity)
        *other, learner = (
            lazy_logits(decoder, its_params, batch, where, vocab_size)
            for decoder, its_params in zip(decoders, params)
        )
        (values,) = linear_values((function,), learner, other or (where.labels,))
        counted = jnp.where(where.mask > 0, values, 0)
        return jnp.sum(counted, axis=1) / jnp.sum(where.mask, axis=1)

    return measure


# The file


def _made_from(pair: _Pair, settings: DataFree, bank: Rows) -> dict[str, Any]:
    """What decides the requests; how many are wanted does not."""
    chosen = dataclasses.asdict(settings)
    del chosen["requests"]
    return {
        "format": provenance.FORMAT,
        "what": "requests",
        **identity.model_identity(pair.teacher),
        "student": _parameters(pair.student),
        "tokenizer": identity.tokenizer_digest(pair.teacher.tokenizer),
        "topics": provenance.fingerprint_rows(bank.tokens),
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
        whole.update(sharding.to_host(leaf).tobytes())
    return f"sha256 {whole.hexdigest()}"


def _read_rounds(file: epath.Path, policy: Policy) -> tuple[list[list[_Request]], Policy]:
    """The whole rounds of the file and the policy after them (`policy` where there is none)."""
    rounds, pending = [], []
    for fields in distributed.run_on_primary(lambda: _whole_rounds(file)):
        if "logits" in fields:
            policy = topic_policy.restored_policy(fields, policy)
            rounds.append(pending)
            pending = []
        else:
            pending.append(_Request(**fields))
    return rounds, policy


def _whole_rounds(file: epath.Path) -> list[dict[str, Any]]:
    """Their lines. What a stopped run left of the round after them is cut off."""
    lines = read_text(file).splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    fields = [_parse(line, f"{file}:{number}") for number, line in enumerate(whole, start=1)]
    end = max((number for number, one in enumerate(fields, start=1) if "logits" in one), default=0)
    if end < len(lines):
        write_text(file, "".join(lines[:end]))
    return fields[:end]


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON ({error.msg}); take another file") from error


def _round_lines(number: int, requests: list[_Request], policy: Policy) -> str:
    lines = [request._asdict() for request in requests]
    lines.append({"round": number, **topic_policy.policy_fields(policy)})
    return "".join(json.dumps(line) + "\n" for line in lines)


def _kept(rounds: list[list[_Request]]) -> list[str]:
    return [one.request for requests in rounds for one in requests if not one.fault]


def _check_patience(rounds: list[list[_Request]], file: epath.Path, settings: DataFree) -> None:
    if len(rounds) >= PATIENCE and not _kept(rounds[-PATIENCE:]):
        raise DataError(
            f"{_account(file, rounds)}; {settings.requests} are wanted, but the last {PATIENCE} "
            "rounds brought none: take a higher temperature, a larger bank or fewer requests"
        )


def _account(file: epath.Path, rounds: list[list[_Request]]) -> str:
    """How many were kept, and dropped for what."""
    faults = collections.Counter(one.fault for requests in rounds for one in requests)
    kept = faults.pop("", 0)
    dropped = ", ".join(f"{count} {why}" for why, count in sorted(faults.items())) or "none"
    return f"{file}: {kept} requests in {len(rounds)} rounds, dropped: {dropped}"
