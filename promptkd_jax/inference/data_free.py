"""Distillation without data: the teacher writes the prompts itself, steered by a topic policy.

A policy over a bank of topic prompts ("write one short question about …"; see `topic_policy`) draws
topics, the teacher writes a prompt to each, and the policy is reinforced towards topics whose
prompts are fluent, new, and answered by the student least like the teacher. What comes out are
records without outputs, on which any method then trains.

Published (PromptDFD; Ma, Wang, Fang, Shen, Lu; IJCAI 2022; for text classifiers): a pre-trained
language model is the prior that keeps synthetic text fluent, a topic prompter chooses the hard
prompts that steer it and is reinforced towards text that is on topic and difficult, and the student
is trained on that text. Its code was never found, and its reward is not reproduced here.

Ours: the port to decoders (generator and teacher are one model, and what it writes are prompts),
the reward below, the novelty term, the entropy bonus, and the bank. Their weights are not tuned.
It takes a teacher that follows instructions: a weak one (135M parameters) often answers a topic
prompt instead of asking, and its prompts are then mere statements on the topic.

The reward of prompt x, in nats:

    mean_t KL(p || q) over the teacher's own response to x, y ~ p(.|x)
    - novelty_weight * (largest share of word pairs that x has in common with an earlier prompt)
    - fluency_weight * (-log p(x | its topic prompt) / number of tokens of x)

A prompt that is empty, a single word, longer than a prompt may be, or written before is dropped
and counted. Its reward is the least that any of its round could have got: no disagreement, nothing
new, as unlikely as the least fluent one.

N prompts of a round.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from promptkd_jax.data.reading.records import Record, user_record
from promptkd_jax.data.rows import Rows, select_rows, tokenize, with_responses
from promptkd_jax.data.special_tokens import encode
from promptkd_jax.data.templates import PromptFormat, render_prompt
from promptkd_jax.distill.losses.losses import Divergence, cross_entropy, forward_kl
from promptkd_jax.inference import topic_policy
from promptkd_jax.inference.generate import decode, generate_responses
from promptkd_jax.inference.response_values import response_values
from promptkd_jax.infra import provenance, sharding
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import AppendOnlyFile, Path
from promptkd_jax.infra.specs import SEED, Float, Int, field, validate
from promptkd_jax.infra.terminal import ProgressBar
from promptkd_jax.models.io import identity
from promptkd_jax.models.model import Model, check_positions
from promptkd_jax.models.sampling_rules import Sampling

PATIENCE = 5  # rounds in a row without a single new prompt
_FORMAT = 2  # of the file; the first one had the policy after every round


@dataclasses.dataclass(frozen=True)
class DataFree:
    """How prompts are written and the policy is reinforced.

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


class _Task(NamedTuple):
    """The two models, what a row of theirs looks like, and how prompts are written."""

    teacher: Model
    student: Model
    settings: DataFree
    prompt_format: PromptFormat
    prompt_capacity: int
    batch_size: int
    vocab_size: int


class _Candidate(NamedTuple):
    """A line of the file; the parts of the reward are None if it was dropped for its `fault`."""

    topic: str
    prompt: str
    fault: str
    kl: float | None
    similarity: float | None
    surprise: float | None
    reward: float


def generate_prompts(
    teacher: Model,
    student: Model,
    file: epath.Path,
    settings: DataFree,
    prompt_format: PromptFormat,
    *,
    prompt_capacity: int,
    batch_size: int,
    vocab_size: int,
) -> list[Record]:
    """Prompts for the student to learn on, in the teacher's own words.

    Every round is appended to `file`: a line per prompt with the parts of its reward (what was
    dropped says why in "fault"). A call that was stopped continues after the last whole round and
    gives the same prompts; more `requests` continue as well. What made the file stands beside it in
    `<name>.manifest.json`. All processes of a run take part; the first one reads and writes the
    file.

    Args:
      teacher, student: with one tokenizer; generation ends at any of the teacher's `eos_ids`.
      prompt_format: of topic prompts and of prompts.
      prompt_capacity: the most tokens of a rendered topic prompt or prompt.
      batch_size: rows per forward; part of what decides the result to the last bit.
      vocab_size: what teacher and student share.

    Returns:
      `settings.requests` records with an instruction and no outputs.

    Raises:
      DataError: the bank cannot be used, the file is of other models or settings, or the teacher
        writes nothing new any more, or a log-probability is not finite.
    """
    task = _Task(teacher, student, settings, prompt_format, prompt_capacity, batch_size, vocab_size)
    check_positions(student, prompt_capacity + settings.max_new_tokens)
    bank = _bank_rows(task)
    size, wanted = settings.round_size, settings.requests
    lines = provenance.resume_lines(file, _made_from(task, bank), teacher.name, batch_size=size)
    candidates = [_Candidate(**line) for line in lines]
    policy = topic_policy.init_policy(len(bank.tokens), settings.learning_rate)
    for start in range(0, len(candidates), size):
        policy = _reinforced(policy, task, bank, candidates[start : start + size])
    prompts = _kept(candidates)
    bar = ProgressBar(wanted, "prompts by the teacher", unit="prompt", first=len(prompts))
    with AppendOnlyFile(file) as out, bar:
        while len(prompts) < wanted:
            rounds = len(candidates) // size
            if rounds >= PATIENCE and not _kept(candidates[-PATIENCE * size :]):
                raise DataError(
                    f"{_account(file, candidates, rounds)}; {wanted} are wanted, but the last "
                    f"{PATIENCE} rounds brought none: take a higher temperature, a larger bank or "
                    "fewer requests"
                )
            key = jax.random.fold_in(jax.random.key(settings.seed), rounds)
            written = _write_round(task, bank, policy, prompts, key)
            policy = _reinforced(policy, task, bank, written)
            out.append("".join(json.dumps(one._asdict()) + "\n" for one in written))
            candidates += written
            prompts += _kept(written)
            bar.update(min(len(prompts), wanted))
    print(_account(file, candidates, len(candidates) // size))
    return [user_record(text) for text in prompts[:wanted]]


def _kept(candidates: Sequence[_Candidate]) -> list[str]:
    return [one.prompt for one in candidates if not one.fault]


def _account(file: epath.Path, candidates: Sequence[_Candidate], rounds: int) -> str:
    """Says how many were kept, and dropped for what."""
    faults = collections.Counter(one.fault for one in candidates)
    kept = faults.pop("", 0)
    dropped = ", ".join(f"{count} {why}" for why, count in sorted(faults.items())) or "none"
    return f"{file}: {kept} prompts in {rounds} rounds, dropped: {dropped}"


def _reinforced(
    policy: topic_policy.Policy, task: _Task, bank: Rows, candidates: Sequence[_Candidate]
) -> topic_policy.Policy:
    """The policy after a round, whose lines have all that decides it."""
    numbers = {record.prompt_text: number for number, record in enumerate(bank.records)}
    return topic_policy.reinforce(
        policy,
        jnp.array([numbers[one.topic] for one in candidates]),
        [one.reward for one in candidates],
        task.settings.learning_rate,
        task.settings.entropy_weight,
    )


# A round


def _bank_rows(task: _Task) -> Rows:
    source = task.settings.bank
    rows = _rows(task, topic_policy.read_bank(source))
    if rows.dropped:
        raise DataError(
            f"{source}: {rows.dropped} topic prompts are longer than the {task.prompt_capacity} "
            "tokens of a prompt; make them shorter or max_prompt_length larger"
        )
    return rows


def _rows(task: _Task, records: Sequence[Record]) -> Rows:
    return tokenize(
        records,
        task.teacher.tokenizer,
        task.prompt_format,
        max_prompt_length=task.prompt_capacity,
        max_length=task.prompt_capacity,
        eos_id=task.teacher.eos_ids[0],
        vocab_size=task.vocab_size,
    )


def _write_round(
    task: _Task, bank: Rows, policy: topic_policy.Policy, earlier: list[str], key: jax.Array
) -> list[_Candidate]:
    """N prompts, each to a topic that the policy draws, with their rewards."""
    settings, tokenizer = task.settings, task.teacher.tokenizer
    drawing, writing, answering = jax.random.split(key, 3)
    drawn = jax.random.categorical(drawing, policy.logits, shape=(settings.round_size,))
    topics = select_rows(bank, np.asarray(drawn))
    written = _responses(task, topics, settings.max_request_tokens, settings.temperature, writing)
    texts = [topic_policy.clean_prompt(decode(tokenizer, tokens)) for tokens in written]

    def fits(text: str) -> bool:
        tokens = render_prompt(user_record(text), task.prompt_format, tokenizer)
        return len(tokens) <= task.prompt_capacity

    faults = topic_policy.faults(texts, earlier, fits)
    kept = [i for i, fault in enumerate(faults) if not fault]
    prompts = [texts[i] for i in kept]
    parts = zip(
        _disagreements(task, prompts, answering),
        topic_policy.similarities(prompts, earlier),
        _surprises(task, select_rows(topics, kept), prompts),
    )
    scored = dict(zip(kept, parts))
    floor = reward(settings, 0.0, 1.0, max((part[2] for part in scored.values()), default=0.0))
    return [
        _Candidate(
            topics.records[i].prompt_text,
            texts[i],
            faults[i],
            *scored.get(i, (None, None, None)),
            reward=reward(settings, *scored[i]) if i in scored else floor,
        )
        for i in range(settings.round_size)
    ]


def reward(settings: DataFree, kl: float, similarity: float, surprise: float) -> float:
    """The reward of a prompt, in nats; see the module."""
    return kl - settings.novelty_weight * similarity - settings.fluency_weight * surprise


def _responses(task: _Task, rows: Rows, most: int, temperature: float, key: jax.Array):
    return generate_responses(
        task.teacher,
        rows,
        sampling=Sampling(temperature=temperature, eos_ids=task.teacher.eos_ids),
        prompt_capacity=task.prompt_capacity,
        max_new_tokens=most,
        batch_size=task.batch_size,
        key=key,
        vocab_size=task.vocab_size,
    )


def _disagreements(task: _Task, prompts: list[str], key: jax.Array) -> list[float]:
    """KL(teacher || student) in nats per token of the teacher's own response to each prompt."""
    if not prompts:
        return []
    rows = _rows(task, [user_record(text) for text in prompts])
    most = task.settings.max_new_tokens
    rows = with_responses(rows, _responses(task, rows, most, 1.0, key))
    return _means(task, forward_kl, (task.teacher, task.student), rows, most)


def _surprises(task: _Task, topics: Rows, prompts: list[str]) -> list[float]:
    """-log p(prompt | its topic prompt) under the teacher, in nats per token (of the first
    `max_request_tokens`, should the cleaned text encode into more)."""
    if not prompts:
        return []
    most = task.settings.max_request_tokens
    encoded = encode(prompts, task.teacher.tokenizer)
    rows = with_responses(topics, [ids[:most] for ids in encoded])
    return _means(task, cross_entropy, (task.teacher,), rows, most)


def _means(
    task: _Task, function: Divergence, models: tuple[Model, ...], rows: Rows, most: int
) -> list[float]:
    """Means over the responses, of at most `most` tokens: of the last model compared with the one
    before it, or with the tokens themselves."""
    batches = response_values(
        function,
        models,
        rows,
        batch_size=task.batch_size,
        length=task.prompt_capacity + most,
        capacity=most,
        vocab_size=task.vocab_size,
    )
    values = [mean for values in batches for mean in values.mean(axis=1).filled(np.nan).tolist()]
    if not np.isfinite(values).all():
        raise DataError(
            f"teacher {task.teacher.name} or student {task.student.name}: a log-probability of "
            "what the teacher wrote is not finite; try dtype float32"
        )
    return values


# The file


def _made_from(task: _Task, bank: Rows) -> dict[str, Any]:
    """What decides the prompts; how many are wanted does not."""
    chosen = dataclasses.asdict(task.settings)
    del chosen["requests"]
    return {
        "format": _FORMAT,
        "what": "requests",
        **identity.model_identity(task.teacher),
        "student": _parameters(task.student),
        "tokenizer": identity.tokenizer_digest(task.teacher.tokenizer),
        "topics": provenance.fingerprint_rows(bank.tokens),
        **chosen,
        **task.prompt_format.identity,
        "prompt_capacity": task.prompt_capacity,
        "batch_size": task.batch_size,
        "vocab_size": task.vocab_size,
    }


def _parameters(model: Model) -> str:
    """Of every array: a student made of a teacher's layers has no files of its own."""
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(model.params):
        whole.update(sharding.to_host(leaf).tobytes())
    return f"sha256 {whole.hexdigest()}"
