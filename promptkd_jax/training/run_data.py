"""The rows that a config's run learns from and is measured on, from the sources that it names."""

import collections
import dataclasses
import datetime
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from etils import epath

from promptkd_jax.data import conversations
from promptkd_jax.data.conversations import one_turn_each
from promptkd_jax.data.mapped_rows import mapped_rows
from promptkd_jax.data.reading.record_stream import Records, RecordStream, read_corpus
from promptkd_jax.data.reading.records import Record
from promptkd_jax.data.reading.sources import is_files, source_digest
from promptkd_jax.data.rows import Rows, RowSink, concatenate_rows, pack, tokenize
from promptkd_jax.data.templates import shows_date
from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import DataError
from promptkd_jax.infra.files import is_remote, to_path
from promptkd_jax.models.io import identity
from promptkd_jax.models.model import Model, text_end
from promptkd_jax.training.config.fields import RunConfig, StageConfig

_FIRST = 1000  # records of a file that are looked at before models are loaded


class RunData(NamedTuple):
    """The rows of a run; None where it has none, or the teacher has not written them yet."""

    train: Rows | None  # with the data's own responses
    turns: Rows | None  # with one turn of the assistant each, where rows of `train` have several
    answered: Rows | None  # the same prompts with responses of the teacher
    dev: Rows | None
    corpus: Rows | None

    def of(self, stage: StageConfig) -> Rows:
        """The training rows of a stage."""
        if stage.source.teacher_writes:
            return self.answered
        by_turn = stage.source.on_policy and self.turns is not None
        return self.turns if by_turn else self.train


def check_sources(config: RunConfig) -> None:
    """Raises DataError, before anything is loaded, where data of a run are not there, or the first
    records of their files cannot be used; the hub is not asked."""
    data = config.data
    streams = [] if data.train == "teacher" else [*training_records(config, first=_FIRST)]
    streams += [] if data.dev == "teacher" else [_dev_records(config, first=_FIRST)]
    corpora = data.corpus_sources if any(stage.corpus_terms for stage in config.stages) else ()

    def check() -> None:
        for stream in streams:
            if is_files(stream.source):
                collections.deque(stream, maxlen=0)
        for source, _ in corpora:
            is_files(source)  # which raises where there is none

    distributed.run_on_primary(check)


def load_data(config: RunConfig, student: Model, workdir: epath.Path | None = None) -> RunData:
    """Reads the rows that are there, without the student's parameters; what the teacher writes is
    still None. Those to learn from are mapped, see `training_rows`."""
    data, train, turns, dev, corpus = config.data, None, None, None, None
    if data.train != "teacher":
        by_turn = [stage.by_turn for stage in config.stages]
        if data.supervise == "all" and any(by_turn):
            turns = training_rows(config, student, workdir, by_turn=True)
        if turns is None or not all(by_turn):
            train = training_rows(config, student, workdir, by_turn=data.supervise == "each")
        else:
            train = turns
    if data.dev != "teacher":
        records = Records(_dev_records(config))
        dev = tokenized(config, student, data.dev, records[: data.dev_rows or None])
        dev = dev._replace(left_out=records.left_out | dict(dev.left_out))
    if any(stage.corpus_terms for stage in config.stages):
        corpus = _corpus_rows(config, student, workdir)
    return RunData(train, turns, None, dev, corpus)


def training_records(
    config: RunConfig, *, quiet: bool = False, first: int = 0
) -> Iterator[RecordStream]:
    """Yields the records of each source of the training data, to be read.

    Args:
      quiet: without a word about what reading leaves out.
      first: only as many of each, quietly; 0: all that the config wants.
    """
    data, need = config.data, "nothing"
    if any(stage.needs_responses for stage in config.stages):
        need = "response" if data.supervise == "last" else "some response"
    limit, quiet = min(filter(None, (data.train_rows, first)), default=0), quiet or bool(first)
    for source, _ in data.train_sources:
        how = dict(split=data.train_split, format=data.format, columns=data.columns)
        yield RecordStream(source, need=need, limit=limit, quiet=quiet, **how)


def _dev_records(config: RunConfig, *, first: int = 0) -> RecordStream:
    data = config.data
    need = "references" if config.evaluation.references == "gold" else "nothing"
    how = dict(split=data.dev_split, format=data.format, columns=data.columns)
    return RecordStream(data.dev, need=need, limit=first, quiet=bool(first), **how)


def training_rows(
    config: RunConfig, student: Model, workdir: epath.Path | None, *, by_turn: bool = False
) -> Rows:
    """The rows of all sources of the training data. Each source is tokenised once, into files that
    are mapped into memory: in `config.data.token_cache`, else in `workdir`, else for this process.

    Args:
      by_turn: with one turn of the assistant each.
    """
    cache = _token_cache(config, workdir)
    parts = [
        _source_rows(config, student, records, cache, by_turn)
        for records in training_records(config)
    ]
    return concatenate_rows(parts, [weight for _, weight in config.data.train_sources])


def _source_rows(
    config: RunConfig,
    student: Model,
    records: RecordStream,
    cache: pathlib.Path | None,
    by_turn: bool,
) -> Rows:
    data, how = config.data, _tokenization(config, student)
    supervise = "last" if by_turn else data.supervise
    date = data.date or datetime.date.today().isoformat()
    if not shows_date(data.template, student.tokenizer):
        date = ""  # decides nothing
    how["prompt_format"] = dataclasses.replace(how["prompt_format"], date=date)
    gold_alone = data.supervise == "each" and records.how["need"] != "nothing"
    digest = source_digest(records.source, split=data.train_split)
    made_from = {
        "what": "rows",
        "source": digest,
        "code": _code(),
        **records.how,
        **how,
        "by_turn": by_turn,
        "gold_alone": gold_alone,
        "supervise": supervise,
        "prompt_format": dataclasses.asdict(how["prompt_format"]),
        "tokenizer": identity.tokenization_digest(student.tokenizer),
    }

    written = []

    def write(into: RowSink) -> tuple[Rows, Mapping[str, int]]:
        kept = one_turn_each(records) if by_turn else records
        if gold_alone:  # a conversation that ends with another turn is no row
            kept = (record for record in kept if record.is_answered)
        rows = tokenize(kept, supervise=supervise, into=into, **how)
        _check_unchanged(records.source, data.train_split, digest)
        written.append(rows)
        return rows, records.left_out | dict(rows.left_out)

    rows = mapped_rows(cache, made_from, write)
    _say_rows(config, f"{records.source}, turn by turn" if by_turn else records.source, rows)
    # What reading has left out was said when they were read.
    _say_left_out(records.source, written[0] if written else rows)
    return rows


def _check_unchanged(source: str, split: str, digest: str) -> None:
    """Raises DataError where a source is not what it was when its digest was made."""
    if source_digest(source, split=split) != digest:
        raise DataError(f"{source}: has changed while it was read; start again when it is whole")


def _code() -> dict[str, str]:
    """What else decides the tokens of records: the code that makes them."""
    whole = hashlib.sha256()
    for file in sorted(pathlib.Path(conversations.__file__).parent.rglob("*.py")):
        whole.update(file.read_bytes())
    names = ("transformers", "tokenizers", "jinja2")
    return {"data": whole.hexdigest()[:16]} | {name: version(name) for name in names}


def _corpus_rows(config: RunConfig, student: Model, workdir: epath.Path | None) -> Rows:
    """As `training_rows`, of plain text, packed."""
    cache, sources = _token_cache(config, workdir), config.data.corpus_sources
    parts = [_packed_rows(config, student, source, cache) for source, _ in sources]
    return concatenate_rows(parts, [weight for _, weight in sources])


def _packed_rows(
    config: RunConfig, student: Model, source: str, cache: pathlib.Path | None
) -> Rows:
    data = config.data
    how = dict(length=data.max_length, eos_id=text_end(student), vocab_size=student.vocab_size)
    digest = source_digest(source, split=data.corpus_split)
    made_from = {
        "what": "corpus",
        "source": digest,
        "code": _code(),
        "columns": dict(data.columns),
        "tokenizer": identity.tokenization_digest(student.tokenizer),
        **how,
    }

    def write(into: RowSink) -> tuple[Rows, Mapping[str, int]]:
        texts = read_corpus(source, split=data.corpus_split, columns=data.columns)
        rows = pack(texts, student.tokenizer, into=into, **how)
        _check_unchanged(source, data.corpus_split, digest)
        return rows, {}

    return mapped_rows(cache, made_from, write)


def _token_cache(config: RunConfig, workdir: epath.Path | None) -> pathlib.Path | None:
    """Where rows are kept; None for a place that goes with this process."""
    if config.data.token_cache:
        return pathlib.Path(to_path(config.data.token_cache))
    return None if workdir is None or is_remote(workdir) else pathlib.Path(workdir) / "tokens"


def tokenized(
    config: RunConfig,
    model: Model,
    source: str,
    records: Sequence[Record],
    supervise: str = "last",
) -> Rows:
    """The records as rows of the config's template and lengths; says how many were dropped, and how
    many prompts and answers are cut."""
    rows = tokenize(records, supervise=supervise, **_tokenization(config, model))
    _say_rows(config, source, rows)
    _say_left_out(source, rows)
    return rows


def _tokenization(config: RunConfig, model: Model) -> dict[str, Any]:
    """How a config's records become rows."""
    return dict(
        tokenizer=model.tokenizer,
        prompt_format=config.data.prompt_format(config.preset),
        max_prompt_length=config.data.max_prompt_length,
        max_length=config.data.max_length,
        eos_id=model.eos_ids[0],
        vocab_size=model.vocab_size,
        long_prompts=config.data.long_prompts,
    )


def _say_rows(config: RunConfig, source: str, rows: Rows) -> None:
    limit, length = config.data.max_prompt_length, config.data.max_length
    shortened = f"{rows.shortened} prompts without their first turns, " if rows.shortened else ""
    print(
        f"{source}: {len(rows.tokens)} rows, {rows.dropped} dropped (over {limit} tokens), "
        f"{shortened}{rows.cut} answers cut at {length} tokens"
    )


def _say_left_out(source: str, rows: Rows) -> None:
    if rows.left_out:
        counted = ", ".join(f"{name}: {count}" for name, count in rows.left_out.items())
        distributed.warn(f"{source}: left out: {counted}")
