"""ROUGE-L and exact match of a model, on any number of sets and seeds: `promptkd evaluate --model
FOLDER --data FILE …`.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from promptkd_jax.cli import flags
from promptkd_jax.data.reading import read_records
from promptkd_jax.data.rows import Rows, tokenize
from promptkd_jax.data.templates import TEMPLATES, PromptFormat, read_chat_template
from promptkd_jax.evaluation.bootstrap import mean_and_std
from promptkd_jax.evaluation.student_metrics import generation_metrics
from promptkd_jax.evaluation.tables import Table, markdown, mean_and_deviation
from promptkd_jax.evaluation.text_metrics import COLUMNS
from promptkd_jax.inference.generate import with_turn_end
from promptkd_jax.infra import distributed, provenance
from promptkd_jax.infra.errors import ConfigError, DataError, ModelError
from promptkd_jax.infra.files import check_writable, write_json, write_text
from promptkd_jax.infra.specs import Int, declared
from promptkd_jax.models.load import RECORD, RECORDED, load_with_tokenizer, training_record
from promptkd_jax.models.model import Model
from promptkd_jax.models.sampler import Sampling
from promptkd_jax.training.fields import DataConfig

FORMAT = ("system", "chat_template_kwargs", "add_bos")  # of how a model is asked, beside a template
# What decides the scores, as it is written beside them.
SETTINGS = (
    *("model", "data", "split", "format", "columns", "template", *FORMAT, "chat_template"),
    *("seeds", *declared(Sampling), "max_prompt_length", "max_length", "long_prompts"),
    *("batch_size", "dtype"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_asking(parser, temperature=1.0, no_repeat_ngram_size=6)  # as published
    text = "files, folders, patterns or hub ids"
    parser.add_argument("--data", required=True, nargs="+", type=flags.source, help=text)
    parser.add_argument("--split", default="test", help="of a hub data set")
    flags.add_reading(parser)
    parser.add_argument("--output", required=True, type=flags.path, help="folder for the results")
    flags.add_seeds(parser, (10, 20, 30, 40, 50))
    text = "tokens of prompt and response (default: that of the training, else 512)"
    parser.add_argument("--max-length", type=flags.of(Int(low=2)), help=text)
    text = "rows that are answered at once (default: 16)"
    parser.add_argument("--batch-size", type=flags.of(Int(low=1)), default=16, help=text)
    flags.add_processes(parser)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    with flags.naming("--output", options.output), jax.set_mesh(flags.mesh_of(options)):
        distributed.assert_same_options(options)
        scores = evaluate_sets(options)
    print(markdown(_table(scores, len(options.seeds))))
    print(f"written to {options.output}/evaluation.json, the responses beside it")


def evaluate_sets(options: argparse.Namespace) -> dict[str, Any]:
    """Scores by set, written to `options.output`. Raises ConfigError, DataError, ModelError."""
    check_writable(options.output)
    record = recorded(options.model)
    options.max_prompt_length = options.max_prompt_length or record.get("max_prompt_length", 256)
    options.max_length = options.max_length or record.get("max_length", 512)
    options.long_prompts = options.long_prompts or record.get("long_prompts", "drop")
    if options.max_length <= options.max_prompt_length:
        raise ConfigError(
            f"--max-length {options.max_length} leaves no room for a response beside "
            f"--max-prompt-length {options.max_prompt_length}"
        )
    model, prompt_format, why = load_to_ask(options, record)
    options.template = prompt_format.template
    print(f"template {options.template} ({why})", flush=True)
    output, found = options.output, {}
    reading = dict(split=options.split, format=options.format, columns=options.columns)
    for source in options.data:
        name = pathlib.Path(source.removeprefix("package:")).stem
        if name in found:
            raise DataError(f"--data: two sets are called {name!r}; rename one of the files")
        rows = tokenize(
            read_records(source, need_output=True, **reading),
            model.tokenizer,
            prompt_format,
            max_prompt_length=options.max_prompt_length,
            max_length=options.max_length,
            eos_id=model.eos_ids[0],
            long_prompts=options.long_prompts,
        )
        distributed.assert_same(f"the data ({source})", provenance.fingerprint_rows(rows.tokens))
        seeds = {}
        for seed in options.seeds:
            seeds[str(seed)], texts = generation_metrics(
                model,
                rows,
                sampling=flags.sampling_of(options, model.eos_ids),
                prompt_capacity=options.max_prompt_length,
                max_new_tokens=options.max_length - options.max_prompt_length,
                batch_size=options.batch_size,
                seed=seed,
                vocab_size=model.vocab_size,
            )
            _write_samples(output / f"{name}-seed{seed}.jsonl", rows, texts)
        counts = {"rows": len(rows.tokens), "dropped": rows.dropped}
        found[name] = counts | {"seeds": seeds} | _over_seeds([*seeds.values()])
    settings = {name: value for name, value in vars(options).items() if name in SETTINGS}
    settings["chat_template"] = options.chat_template and str(options.chat_template)
    write_json(output / "evaluation.json", {"settings": settings, "sets": found})
    return found


def recorded(model: str, *, weights: bool = True) -> dict[str, Any]:
    """Reads and checks how a model was asked while it was trained, see `load.training_record`.

    Raises:
      ModelError: it says what cannot be.
    """
    said, data = training_record(model, weights=weights), declared(DataConfig)
    record = {name: said[name] for name in RECORDED if name in said}
    for name, value in record.items():
        if fault := data[name].metadata["spec"].fault(value):
            raise ModelError(f"{model}: {RECORD}: {name}: {value!r} is not {fault}")
    return record


def load_to_ask(
    options: argparse.Namespace, record: dict[str, Any]
) -> tuple[Model, PromptFormat, str]:
    """Loads the model of the flags, with its chat template and ended as that ends a turn.

    Returns:
      The model, and what `prompt_format_for` says of it.

    Raises:
      ConfigError, ModelError: no such model, or nothing tells how to ask it.
      DataError: a chat template that cannot be read or rendered.
    """
    model = load_with_tokenizer(options.model, dtype=options.dtype)
    if options.chat_template is not None:
        model.tokenizer.chat_template = read_chat_template(options.chat_template)
    prompt_format, why = prompt_format_for(model, options, record)
    return with_turn_end(model, prompt_format), prompt_format, why


def prompt_format_for(
    model: Model, options: argparse.Namespace, record: dict[str, Any]
) -> tuple[PromptFormat, str]:
    """Chooses how to ask a model: what the user gave, else as in its training, else by its
    tokenizer's own chat template. Returns that, and why this template.

    Raises:
      ConfigError: nothing tells which template.
    """
    template, why = _template_for(model, options, record)
    given = {name: getattr(options, name) for name in FORMAT if getattr(options, name) is not None}
    chosen = {name: record[name] for name in (*FORMAT, "date") if name in record} | given
    chosen["chat_template_kwargs"] = dict(chosen.get("chat_template_kwargs", ()))
    return PromptFormat(template, **chosen), why


def _template_for(
    model: Model, options: argparse.Namespace, record: dict[str, Any]
) -> tuple[str, str]:
    given = options.template
    if given is not None:
        return given, "as given"
    if options.chat_template is not None:
        return "chat", f"that of {options.chat_template}"
    if "template" in record:
        return record["template"], "that of the training"
    if model.tokenizer.chat_template:
        return "chat", f"the tokenizer's own, since no {RECORD} says how the model was trained"
    raise ConfigError(
        f"--template: {model.name} does not say which one it was trained with (it has no "
        f"{RECORD}), and its tokenizer has no chat template; give one of {', '.join(TEMPLATES)}"
    )


def _over_seeds(scores: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and deviation of each score."""
    return {name: mean_and_std([one[name] for one in scores])._asdict() for name in scores[0]}


def _write_samples(file: epath.Path, rows: Rows, texts: Sequence[str]) -> None:
    asked = ({"messages": one.prompt, "references": one.references} for one in rows.records)
    lines = (one | {"answer": text} for one, text in zip(asked, texts))
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _table(found: dict[str, Any], seeds: int) -> Table:
    rows = [
        (
            name,
            str(scores["rows"]),
            *(mean_and_deviation(scores[key], seeds) for key in COLUMNS),
        )
        for name, scores in found.items()
    ]
    return Table(("set", "rows", *COLUMNS.values()), rows)
