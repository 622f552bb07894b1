"""What models will see of data, before anything is trained: `promptkd data --config FILE[:arg]`, or
`promptkd data --data FILE --model MODEL`.

Shows how many records become rows and why others do not, lengths, three rows with their supervised
and special tokens, held-out prompts that stand in the training data, and warnings. Reads configs
and tokenizers of models, no weights.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import PurePath
from typing import Any

import jax

from promptkd_jax.cli import flags
from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.reading.records import Record
from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.evaluation.data_page import show_data, write_data_page
from promptkd_jax.evaluation.data_report import DataReport, Split, describe_data
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.specs import Int
from promptkd_jax.models.load import RECORDED, load_without_weights
from promptkd_jax.models.model import Model
from promptkd_jax.training.build import title
from promptkd_jax.training.config.checks import read_run
from promptkd_jax.training.config.config_file import as_json
from promptkd_jax.training.config.fields import DataConfig, RunConfig
from promptkd_jax.training.run_data import (
    load_data,
    tokenized,
    training_records,
    training_rows,
)
from promptkd_jax.training.run_models import choose_models, ended_alike

# Flags of what a config says itself.
WITH_DATA = ("model", *(name for name in RECORDED if name != "date"), "chat_template", "split")
DEFAULTS = {"format": "auto", "columns": {}}
USAGE = (
    "--config FILE[:arg] [--config.a.b=VALUE …] [options], or --data FILE --model MODEL [options]"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "file, folder, pattern or hub id to learn from, in place of a config"
    parser.add_argument("--data", type=flags.source, help=text)
    parser.add_argument("--split", help="of a hub data set (default: train)")
    text = "held-out sets, beside that of a config; of hub data sets the split 'test'"
    parser.add_argument("--test", default=[], nargs="+", type=flags.source, help=text)
    text = "a page for all that is shown, such as data.html"
    parser.add_argument("--output", type=flags.path, metavar="FILE", help=text)
    group = parser.add_argument_group("with --data")
    flags.add_model(group, required=False)
    flags.add_prompting(group)
    flags.add_reading(group)
    text = "tokens of prompt and response (default: that of the training, else 512)"
    parser.add_argument("--max-length", type=flags.of(Int(low=2)), help=text)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    jax.config.update("jax_platforms", "cpu")  # an accelerator that is here stays free
    if options.data is None:
        config, report = _of_config(options, rest)
        heading, settings = title(config), as_json(config)
    else:
        config, report = _of_file(options, rest)
        heading, settings = options.data, {"model": options.model} | as_json(config)["data"]
    show_data(report)
    if options.output:
        with flags.naming("--output", options.output):
            text = json.dumps(settings, indent=2)
            write_data_page(options.output, report, title=f"Data: {heading}", config_text=text)
        print(f"\nwritten to {options.output}")


def _of_config(options: argparse.Namespace, rest: Sequence[str]) -> tuple[RunConfig, DataReport]:
    """Describes the data of a config as its run would read them."""
    if not rest:
        raise ConfigError("give --config FILE, or --data FILE and --model MODEL")
    given = [f"--{x.replace('_', '-')}" for x in WITH_DATA if getattr(options, x) is not None]
    given += [f"--{x}" for x in ("format", "columns") if getattr(options, x) != DEFAULTS[x]]
    if given:
        raise ConfigError(f"{', '.join(given)}: are for --data; a config has fields for that")
    config = read_run(rest)
    teacher, student = ended_alike(
        config,
        *choose_models(
            config,
            load=lambda path, field: load_without_weights(path),
            keep_layers=lambda model, layers: model,  # which has none
        ),
    )
    data, notes = load_data(config, student), []
    if data.train is None:
        notes.append("Train: the teacher writes its prompts when the run begins.")
    elif names := [stage.name for stage in config.stages if not stage.reads_responses]:
        notes.append(f"No responses of the data are learned from in: {', '.join(names)}.")
    if data.corpus is not None:
        notes.append(f"Corpus: {len(data.corpus.tokens):,} rows, {config.data.max_length} tokens.")
    sources = {"train": data.train, "dev": data.dev}
    asked = config.data.prompt_format(config.preset)
    splits = {name: Split(name, rows, asked) for name, rows in sources.items() if rows is not None}
    train = [splits.pop("train")._replace(records=_records(config))] if data.train else []
    held_out = [*splits.values(), *_test_splits(options, config, student, asked, taken=sources)]
    return config, _described(config, train, held_out, student, teacher, notes)


def _of_file(options: argparse.Namespace, rest: Sequence[str]) -> tuple[RunConfig, DataReport]:
    """Describes a file as a model that is asked by the flags would read it."""
    if rest:
        raise ConfigError(f"unknown arguments beside --data: {' '.join(rest)}")
    if not options.model:
        raise ConfigError("--data: give --model, whose tokenizer the rows are made with")
    student = load_without_weights(options.model)
    data, why = flags.data_config(options.model, options, lambda: student, weights=False)
    print(f"template {data.template} ({why})")
    data = dataclasses.replace(
        data,
        train=options.data,
        train_split=options.split or "train",
        format=options.format,
        columns=options.columns,
    )
    config = RunConfig(data=data)
    asked = data.prompt_format(config.preset)
    _, student = ended_alike(config, None, student)
    train = [Split("train", training_rows(config, student, None), asked, _records(config))]
    held_out = _test_splits(options, config, student, asked, taken=("train",))
    notes, responses = [], train[0].rows.num_supervised
    if without := int((responses == 0).sum()):
        notes.append(
            f"{without} of {len(responses)} rows have no response: a run that learns from those of "
            "the data leaves them out, one that writes its own does not need them."
        )
    return config, _described(config, train, held_out, student, None, notes)


def _records(config: RunConfig) -> Iterator[Record]:
    """The training records, once more."""
    return itertools.chain.from_iterable(training_records(config, quiet=True))


def _how(config: RunConfig) -> dict[str, Any]:
    """How records are written in the data."""
    return {"format": config.data.format, "columns": config.data.columns}


def _test_splits(
    options: argparse.Namespace,
    config: RunConfig,
    student: Model,
    asked: PromptFormat,
    taken: Collection[str],
) -> list[Split]:
    """The sets of --test, by the names of their files, or all that was given where one is taken."""
    splits: dict[str, Split] = {}
    for source in options.test:
        name = PurePath(source.removeprefix("package:")).stem
        name = source if name in (*taken, *splits) else name
        records = read_records(source, split="test", **_how(config))
        splits[name] = Split(name, tokenized(config, student, source, records), asked)
    return list(splits.values())


def _described(
    config: RunConfig,
    train: Sequence[Split],
    held_out: Sequence[Split],
    student: Model,
    teacher: Model | None,
    notes: Sequence[str],
) -> DataReport:
    if not train and not held_out:
        raise ConfigError("config.data: the teacher writes all of it when the run begins")
    trained_formats = {}
    for model in filter(None, (student, teacher)):
        record = flags.recorded(model.name, weights=False)
        if "template" in record:
            trained_formats[model.name] = DataConfig(**record).prompt_format("default")
    return describe_data(
        train,
        held_out,
        student,
        teacher,
        max_prompt_length=config.data.max_prompt_length,
        max_length=config.data.max_length,
        trained_formats=trained_formats,
        notes=notes,
    )
