"""How good a student is: ROUGE-L and exact match of its answers, closeness to its teacher.

`promptkd evaluate --model FOLDER --data FILE …` scores an exported student on any number of sets
and seeds.
"""

import argparse
import collections
import functools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from promptkd_jax import flags
from promptkd_jax.data.batch import Batch, responses
from promptkd_jax.data.records import (
    TEMPLATES,
    DataError,
    Rows,
    eval_batches,
    read_records,
    tokenize,
)
from promptkd_jax.distill import losses
from promptkd_jax.distill.chunked_loss import linear_loss
from promptkd_jax.distill.teacher import view
from promptkd_jax.evaluation.bootstrap import spread
from promptkd_jax.evaluation.text_metrics import answer_statistics, text_scores
from promptkd_jax.infra import distributed, provenance, sharding
from promptkd_jax.infra.distributed import HostsError
from promptkd_jax.infra.files import check_writable, failures, write_json, write_text
from promptkd_jax.models.config import ModelError
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.load import (
    RECORD,
    RECORDED,
    Model,
    check_positions,
    load_with_tokenizer,
    training_record,
)
from promptkd_jax.models.sampler import Sampling, row_keys, sample
from promptkd_jax.training import build, fields
from promptkd_jax.training.config import ConfigError, Int

# What decides the scores, as it is written beside them.
SETTINGS = (
    *("model", "data", "split", "template", "seeds", "temperature", "top_k", "top_p"),
    *("no_repeat_ngram_size", "max_prompt_length", "max_length", "batch_size", "dtype"),
)


def write_answers(
    model: Model,
    rows: Rows,
    *,
    sampling: Sampling,
    prompt_capacity: int,
    max_new_tokens: int,
    batch_size: int,
    key: jax.Array,
    vocab_size: int | None = None,
    first: int = 0,
    soft_prompt: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """The model's answer to every row's request from row `first` on, in order.

    Yields:
      Response tokens, an EOS included where the answer ended with one. Row i's answer depends on
      `key`, i and its request only.
    """
    prefix = 0 if soft_prompt is None else len(soft_prompt)
    check_positions(model, prefix + prompt_capacity + max_new_tokens)
    batch_size = dealt_out(batch_size)
    compiled = _sampler(model.decoder, sampling, max_new_tokens, vocab_size)
    rest = rows._replace(tokens=rows.tokens[first:], prompt_lengths=rows.prompt_lengths[first:])
    length = max(map(len, rows.tokens))
    for index, (batch, real) in enumerate(
        eval_batches(rest, batch_size=batch_size, length=max(length, prompt_capacity))
    ):
        numbers = np.arange(batch_size, dtype=np.int32) + first + index * batch_size
        requests = batch.tokens[:, :prompt_capacity], batch.prompt_lengths, numbers
        out = compiled(model.params, *sharding.place_rows(requests), key, soft_prompt)
        tokens, lengths = sharding.to_host((out.tokens, out.lengths))
        for row in range(real):
            yield tokens[row, batch.prompt_lengths[row] : lengths[row]]


@functools.lru_cache(maxsize=8)
def _sampler(decoder: Decoder, sampling: Sampling, max_new_tokens: int, vocab_size: int | None):
    """One compilation for all sets and seeds."""

    @jax.jit
    def compiled(params, requests, lengths, numbers, key, prefix):
        return sample(
            decoder,
            params,
            requests,
            lengths,
            row_keys(key, numbers),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            prefix=prefix,
            vocab_size=vocab_size,
        )

    return compiled


def dealt_out(batch_size: int) -> int:
    """So many rows, or a few more, that each device has as many."""
    devices = sharding.parts(sharding.ROWS)
    return -(-batch_size // devices) * devices


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of an answer, without special tokens and outer white space."""
    return tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=True).strip()


def closeness(
    teacher: Model | None,
    student: Model,
    rows: Rows,
    *,
    batch_size: int,
    length: int,
    vocab_size: int,
    soft_prompt: jax.Array | None = None,
) -> dict[str, float]:
    """How far the student is from the rows' answers, and from its teacher on them, per token.

    Returns:
      `loss`: the cross-entropy of the answers, in nats; with a teacher also `kl`: KL(teacher ||
      student) in nats, and `agreement`: the share of positions at which both put their largest
      probability on the same token; with a soft prompt also `kl_prompted`: KL(prompted teacher ||
      student).
    """
    capacity = max(len(t) - p for t, p in zip(rows.tokens, rows.prompt_lengths))
    decoder = teacher and teacher.decoder
    compare = _comparison(decoder, student.decoder, int(capacity), vocab_size)
    total: dict[str, float] = collections.Counter()
    batch_size = dealt_out(batch_size)
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
        learner = view(student, student_params, batch, where, vocab_size)
        terms = {"loss": (losses.cross_entropy, where.labels)}
        if teacher is not None:
            plain = view(teacher, teacher_params, batch, where, vocab_size)
            terms |= {"kl": (losses.forward_kl, plain), "agreement": (losses.agreement, plain)}
        if soft_prompt is not None:
            prompted = view(teacher, teacher_params, batch, where, vocab_size, soft_prompt)
            terms["kl_prompted"] = (losses.forward_kl, prompted)
        functions, targets = zip(*terms.values())
        _, sums = linear_loss(functions, learner, targets, mask)
        return dict(zip(terms, sums)) | {"tokens": mask.sum()}

    return compare


def score(
    model: Model,
    rows: Rows,
    *,
    sampling: Sampling,
    prompt_capacity: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    vocab_size: int | None = None,
    soft_prompt: jax.Array | None = None,
) -> tuple[dict[str, float], list[str]]:
    """ROUGE-L and exact match (in percent) of one answer to every row, and the answers.

    Beside them what the answers are like: see `text_metrics.answer_statistics`.

    Raises:
      DataError: a row without reference answers (see `read_records(need_output=True)`).
    """
    answers = write_answers(
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
    answers = list(answers)
    texts = [decode(model.tokenizer, answer) for answer in answers]
    scores = text_scores(texts, [record.outputs for record in rows.records])
    return scores | answer_statistics(answers, sampling.eos_ids), texts


def main(argv: Sequence[str] | None = None) -> None:
    """`promptkd evaluate`: every set with every seed; a table, `evaluation.json`, the samples."""
    options = _parser().parse_args(argv)
    with distributed.together(options):
        try:
            with jax.set_mesh(flags.mesh_of(options)):
                distributed.agree_on_options(options)
                found = evaluate(options)
        except (ConfigError, DataError, ModelError, HostsError) as error:
            sys.exit(f"promptkd evaluate: {error}")
        except failures(options.output) as error:
            sys.exit(f"promptkd evaluate: --output {options.output}: {error}")
        Console().print(_table(found))
        print(f"written to {options.output}/evaluation.json, the answers beside it")


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Scores by set, written to `options.output`. Raises ConfigError, DataError, ModelError."""
    check_writable(options.output)
    record = recorded(options.model)
    lengths = {"max_prompt_length": 256, "max_length": 512} | record
    for name in ("max_prompt_length", "max_length"):
        if getattr(options, name) is None:
            setattr(options, name, lengths[name])
    if options.max_length <= options.max_prompt_length:
        raise ConfigError(
            f"--max-length {options.max_length} leaves no room for an answer beside "
            f"--max-prompt-length {options.max_prompt_length}"
        )
    model = load_with_tokenizer(options.model, dtype=options.dtype)
    options.template, why = template_for(model, options.template, record)
    print(f"template {options.template} ({why})", flush=True)
    output, found = options.output, {}
    for source in options.data:
        name = pathlib.Path(source.removeprefix("package:")).stem
        if name in found:
            raise DataError(f"--data: two sets are called {name!r}; rename one of the files")
        rows = tokenize(
            read_records(source, split=options.split, need_output=True),
            model.tokenizer,
            template=options.template,
            max_prompt_length=options.max_prompt_length,
            max_length=options.max_length,
            eos_id=model.eos_ids[0],
            date=record.get("date", ""),
        )
        distributed.agree(f"the data ({source})", provenance.of_rows(rows.tokens))
        seeds = {}
        for seed in options.seeds:
            seeds[str(seed)], texts = _score_set(model, rows, options, seed)
            _write_samples(output / f"{name}-seed{seed}.jsonl", rows, texts)
        counts = {"rows": len(rows.tokens), "dropped": rows.dropped}
        found[name] = counts | {"seeds": seeds} | _over_seeds([*seeds.values()])
    settings = {name: value for name, value in vars(options).items() if name in SETTINGS}
    write_json(output / "evaluation.json", {"settings": settings, "sets": found})
    return found


def recorded(model: str) -> dict[str, Any]:
    """Reads and checks how a model was asked while it was trained, see `load.training_record`.

    Raises:
      ModelError: it says what cannot be.
    """
    record = training_record(model)
    fields = {name: fields.SCHEMA["data"][name] for name in RECORDED if name in record}
    for name, spec in fields.items():
        if fault := spec.fault(record[name]):
            raise ModelError(f"{model}: {RECORD}: {name}: {record[name]!r} is not {fault}")
    return {name: record[name] for name in fields}


def template_for(model: Model, given: str | None, record: dict[str, Any]) -> tuple[str, str]:
    """Chooses the template to ask a model with: what the user gave, else that of its training,
    else its tokenizer's own. Returns its name, and why this one.

    Raises:
      ConfigError: nothing tells which.
    """
    if given is not None:
        return given, "as given"
    if "template" in record:
        return record["template"], "that of the training"
    if model.tokenizer.chat_template:
        return "chat", f"the tokenizer's own, since no {RECORD} says how the model was trained"
    raise ConfigError(
        f"--template: {model.name} does not say which one it was trained with (it has no "
        f"{RECORD}), and its tokenizer has no chat template; give one of {', '.join(TEMPLATES)}"
    )


def _score_set(model: Model, rows: Rows, options: argparse.Namespace, seed: int):
    return score(
        model,
        rows,
        sampling=build.sampling(options, model.eos_ids),
        prompt_capacity=options.max_prompt_length,
        max_new_tokens=options.max_length - options.max_prompt_length,
        batch_size=options.batch_size,
        seed=seed,
        vocab_size=model.vocab_size,
    )


def _over_seeds(scores: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and deviation of each score."""
    return {name: spread([one[name] for one in scores])._asdict() for name in scores[0]}


def _write_samples(file: epath.Path, rows: Rows, texts: Sequence[str]) -> None:
    lines = [
        {
            "instruction": record.instruction,
            "input": record.input,
            "references": record.outputs,
            "answer": text,
        }
        for record, text in zip(rows.records, texts)
    ]
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _table(found: dict[str, Any]) -> Table:
    table = Table("set", "rows", "ROUGE-L", "exact match")
    for name, one in found.items():
        columns = [
            f"{one[key]['mean']:.2f} ± {one[key]['std']:.2f}" for key in ("rougeL", "exact_match")
        ]
        table.add_row(name, str(one["rows"]), *columns)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="promptkd evaluate", description=main.__doc__)
    flags.add_model(parser)
    data = "JSON lines files or hub ids"
    parser.add_argument("--data", required=True, nargs="+", type=flags.source, help=data)
    parser.add_argument("--split", default="test", help="of a hub data set")
    parser.add_argument("--output", required=True, type=flags.path, help="folder for the results")
    flags.add_template(parser)
    flags.add_seeds(parser, (10, 20, 30, 40, 50))
    flags.add_sampling(parser, temperature=1.0, no_repeat_ngram_size=6)  # as published
    for name, default in (("max_prompt_length", 256), ("max_length", 512)):
        text = f"tokens (default: that of the training, else {default})"
        flag, limit = f"--{name.replace('_', '-')}", flags.of(fields.SCHEMA["data"][name])
        parser.add_argument(flag, type=limit, help=text)
    parser.add_argument("--batch-size", type=flags.of(Int(low=1)), default=16)
    flags.add_processes(parser)
    return parser


if __name__ == "__main__":
    main()
