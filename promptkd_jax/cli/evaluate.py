"""ROUGE-L, chrF and exact match of one or several models, on any number of sets and seeds, and
standard benchmarks: `promptkd evaluate --model FOLDER … --data FILE … --output FOLDER`.

Of several models the others are compared with the first. The same command goes on where it was
stopped.
"""

import argparse
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from etils import epath

from promptkd_jax.cli import flags
from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.reading.records import Record
from promptkd_jax.evaluation.benchmarks import find_tasks, run_tasks
from promptkd_jax.evaluation.bootstrap import mean_and_std
from promptkd_jax.evaluation.tables import Table, markdown, mean_and_deviation
from promptkd_jax.evaluation.text_metrics import ROUGE_TOKENIZERS, exact_match
from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.files import (
    check_writable,
    is_remote,
    load_or_compute,
    write_json,
    write_text,
)
from promptkd_jax.infra.specs import Int, declared
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.studies.answers import (
    AVERAGE,
    Contender,
    answer_sets,
    differences,
    digests,
)
from promptkd_jax.training.config.config_file import claim, fingerprint
from promptkd_jax.training.config.fields import DataConfig, EvaluationConfig, RunConfig
from promptkd_jax.training.prepare import with_date

# By model and set, what `answer_sets` returns of each seed.
Answers = dict[str, dict[str, dict[int, dict[str, Any]]]]

SCORES = {
    "rougeL": ("ROUGE-L", ".2f"),
    "chrF": ("chrF", ".2f"),
    "exact_match": ("exact match", ".2f"),
    "response_length": ("tokens", ".1f"),
    "eos_rate": ("ended", ".2f"),
    "repetition": ("repeated", ".3f"),
}
DRAWS = 2000  # of the bootstrap


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_asking(parser, several=True, temperature=1.0, no_repeat_ngram_size=6)  # as published
    text = "files, folders, patterns or hub ids"
    several = dict(nargs="+", action=flags.Different)
    parser.add_argument("--data", default=[], type=flags.source, help=text, **several)
    parser.add_argument("--split", default="test", help="of a hub data set")
    flags.add_reading(parser)
    parser.add_argument("--output", required=True, type=flags.path, help="folder for the results")
    flags.add_seeds(parser, (10, 20, 30, 40, 50))
    text = "tokens of prompt and response (default: that of the training, else 512)"
    parser.add_argument("--max-length", type=flags.of(Int(low=2)), help=text)
    text = "rows that are answered at once (default: 16)"
    parser.add_argument("--batch-size", type=flags.of(Int(low=1)), default=16, help=text)
    text = "; ".join(f"{name}: {what}" for name, what in ROUGE_TOKENIZERS.items())
    text = f"the tokens that ROUGE-L compares (default: published); {text}"
    parser.add_argument(
        "--rouge-tokenizer", default="published", choices=ROUGE_TOKENIZERS, help=text
    )
    group = parser.add_argument_group("standard benchmarks", "By lm-eval, the extra lm-eval.")
    text = "names of its tasks, such as arc_easy,gsm8k"
    group.add_argument("--tasks", default=[], type=_names, metavar="NAME,…", help=text)
    text = "folder with YAML files of other tasks, such as those of local files"
    group.add_argument("--task-folder", type=flags.disk_path, help=text)
    text = "examples in front of a request (default: as the task says)"
    group.add_argument("--num-fewshot", type=flags.of(Int(low=0)), help=text)
    text = "puts requests into the tokenizer's chat template (default: plain text)"
    group.add_argument("--apply-chat-template", action="store_true", help=text)
    flags.add_processes(parser)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    with flags.naming("--output", options.output), jax.set_mesh(flags.mesh_of(options)):
        distributed.assert_same_options(options)
        found = evaluate_sets(options)
    if options.data:
        print(markdown(_table(found, len(options.seeds))))
    if options.tasks:
        print(markdown(_task_table(found)))
    print(f"written to {options.output}/evaluation.json, the responses in folders beside it")


def evaluate_sets(options: argparse.Namespace) -> dict[str, Any]:
    """Answers what `options.output` does not hold yet, and writes the scores there.

    All sets, tasks, and how each model is asked, are read and checked before the first is answered.

    Returns:
      What `evaluation.json` says.

    Raises:
      ConfigError, DataError, ModelError: models or data that cannot be used, or the folder holds
        answers of others.
    """
    if not (options.data or options.tasks):
        raise ConfigError("neither --data nor --tasks: name what is to be answered")
    if options.system and not options.data:
        raise ConfigError("--system: is for --data; tasks have prompts of their own")
    check_writable(options.output)
    manager = find_tasks(options.tasks, options.task_folder) if options.tasks else None
    models, sets = distinct_names(options.model), distinct_names(options.data)
    reading = dict(split=options.split, format=options.format, columns=options.columns)
    records = {
        name: read_records(source, need="references", **reading) for name, source in sets.items()
    }
    load = functools.lru_cache(maxsize=1)(functools.partial(flags.load, options))
    contenders = [_contender(name, path, options, load) for name, path in models.items()]
    answers: Answers = {}
    benchmarks: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        if manager:
            benchmarks[contender.name] = _run_tasks(contender, options, manager, load)
        answers[contender.name] = answer_sets(
            contender,
            records,
            options.seeds,
            sampling=flags.sampling_of(options, ()),
            batch_size=options.batch_size,
            load=load,
            option="--output",
        )
        _write_samples(contender, records, answers[contender.name])
    settings = (*declared(Sampling), "data", *reading, "seeds", "batch_size", "rouge_tokenizer")
    settings += ("tasks", "num_fewshot", "apply_chat_template", "chat_template_kwargs")
    found = {
        "settings": {name: getattr(options, name) for name in settings},
        "models": {
            contender.name: _asked(contender)
            | {"sets": _scores(answers[contender.name])}
            | {"tasks": benchmarks.get(contender.name, {})}
            for contender in contenders
        },
        "differences": _differences(answers, records),
    }
    write_json(options.output / "evaluation.json", found)
    return found


def distinct_names(sources: Sequence[str]) -> dict[str, str]:
    """Names files, folders and hub ids by the ends of their paths, as long as tells them apart.

    Returns:
      The sources by name, in their order.

    Raises:
      ConfigError: two cannot be told apart.
    """
    ends = re.compile(r"\.(jsonl|json|csv|parquet|txt|gguf)(\.gz|\.zst)?$")
    paths = [source.removeprefix("package:") for source in sources]
    parts = [pathlib.PurePosixPath(ends.sub("", path)).parts for path in paths]
    named: dict[str, str] = {}
    for source, mine in zip(sources, parts):
        lengths = range(1, len(mine) + 1)
        own = [n for n in lengths if sum(other[-n:] == mine[-n:] for other in parts) == 1]
        name = re.sub(r"[^\w.=@+-]+", "-", "-".join(mine[-own[0] :] if own else (source,)))
        if name in named:
            raise ConfigError(f"{named[name]} and {source} would both be called {name}; rename one")
        named[name] = source
    return named


def _contender(name: str, path: str, options: argparse.Namespace, load: Callable) -> Contender:
    """A model, with how it is asked, which is said."""
    if options.data:
        data, why = flags.data_config(path, options, functools.partial(load, path))
        print(f"{name}: template {data.template} ({why})", flush=True)
    else:
        # Tasks have prompts of their own, which a chat template may be put around.
        data = DataConfig(chat_template=str(options.chat_template or ""))
    if data.max_length <= data.max_prompt_length:
        raise ConfigError(
            f"--max-length {data.max_length} leaves no room for a response beside "
            f"--max-prompt-length {data.max_prompt_length}"
        )
    scored = EvaluationConfig(rouge_tokenizer=options.rouge_tokenizer)
    config = with_date(RunConfig(data=data, evaluation=scored), options.output)
    folder = options.output / name
    return Contender(name, path, options.dtype, config, folder, options.quantize)


def _run_tasks(
    contender: Contender, options: argparse.Namespace, manager: Any, load: Callable
) -> dict[str, dict[str, Any]]:
    """Results by task, of which the folder keeps what is done."""
    folder = contender.folder / "tasks"
    decides = dict(
        model=contender.path,
        dtype=contender.dtype,
        **digests(contender),
        max_length=options.max_length,
        num_fewshot=options.num_fewshot,
        apply_chat_template=options.apply_chat_template,
        chat_template_kwargs=options.chat_template_kwargs or {},
        task_folder=_content(options.task_folder),
        lm_eval=version("lm-eval"),
    )
    claim(folder, decides, option="--output")
    keywords = dict(options.chat_template_kwargs or {}) if options.apply_chat_template else None

    def compute() -> dict[str, Any]:
        # lm-eval keeps answers in a file of one process, on a disk.
        alone = distributed.is_single_process() and not is_remote(folder)
        return run_tasks(
            load(contender.path),
            options.tasks,
            manager,
            batch_size=options.batch_size,
            max_length=options.max_length,
            num_fewshot=options.num_fewshot,
            chat_template=keywords,
            cache=folder / "answers" if alone else None,
        )

    name = f"{fingerprint(sorted(options.tasks))}.json"
    return load_or_compute(folder / name, compute)


def _content(folder: epath.Path | None) -> str:
    """A digest of a folder's YAML files, names and all; "" where there is none."""
    if folder is None:
        return ""
    whole = hashlib.sha256()
    for file in sorted(pathlib.Path(folder).rglob("*.y*ml")):
        whole.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return whole.hexdigest()


def _asked(contender: Contender) -> dict[str, Any]:
    """Where a model lies, and how it was asked."""
    data = contender.config.data
    names = ("chat_template", "max_prompt_length", "max_length", "long_prompts")
    fields = {name: getattr(data, name) for name in names}
    asked = data.prompt_format(contender.config.preset).identity
    kept = {"dtype": contender.dtype, "quantize": contender.quantize}
    return {"model": contender.path, **kept, **asked, **fields}


def _write_samples(
    contender: Contender,
    records: Mapping[str, Sequence[Record]],
    answers: Mapping[str, Mapping[int, Mapping[str, Any]]],
) -> None:
    """Writes what was asked and answered, for people."""
    for name, by_seed in answers.items():
        for seed, found in by_seed.items():
            asked = [records[name][place] for place in found["kept"]]
            lines = (
                {"messages": one.prompt, "references": one.references, "answer": text}
                for one, text in zip(asked, found["texts"])
            )
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_text(contender.folder / name / f"seed{seed}.jsonl", text)


def _scores(answers: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """By set: counts, the scores of each seed, and their mean and deviation."""
    found = {}
    for name, by_seed in answers.items():
        seeds = {str(seed): {key: one[key] for key in SCORES} for seed, one in by_seed.items()}
        first = next(iter(by_seed.values()))
        spreads = {
            key: mean_and_std([one[key] for one in seeds.values()])._asdict() for key in SCORES
        }
        found[name] = {"rows": first["rows"], "dropped": first["dropped"], "seeds": seeds} | spreads
    return found


def _differences(
    answers: Answers, records: Mapping[str, Sequence[Record]]
) -> dict[str, dict[str, Any]]:
    """By score and model, the others' differences from the first on the requests that all
    answered, in percent: see `answers.differences`."""
    first, *others = answers
    if not others:
        return {}
    scores: dict[str, dict[str, dict[str, np.ndarray]]] = {"rougeL": {}, "exact_match": {}}
    for name in records:
        kept = [set(next(iter(sets[name].values()))["kept"]) for sets in answers.values()]
        shared = set.intersection(*kept)
        if not shared:
            continue
        for model, sets in answers.items():
            for score, values in _by_row(sets[name], records[name], sorted(shared)).items():
                scores[score].setdefault(model, {})[name] = values
    return {
        score: {
            model: differences(by_model[model], by_model[first], draws=DRAWS) for model in others
        }
        for score, by_model in scores.items()
        if by_model
    }


def _by_row(
    by_seed: Mapping[int, Mapping[str, Any]], records: Sequence[Record], shared: Sequence[int]
) -> dict[str, np.ndarray]:
    """`[seeds, requests]` of each score, of the requests that all models answered."""
    rouge, exact = [], []
    for found in by_seed.values():
        place = {kept: number for number, kept in enumerate(found["kept"])}
        rouge.append([found["rougeL_by_row"][place[i]] for i in shared])
        texts = [found["texts"][place[i]] for i in shared]
        exact.append(
            [100.0 * exact_match(text, records[i].references) for i, text in zip(shared, texts)]
        )
    return {"rougeL": np.array(rouge), "exact_match": np.array(exact)}


def _table(found: Mapping[str, Any], seeds: int) -> Table:
    """Set by set, each model with its scores and its difference from the first."""
    models, apart = found["models"], found["differences"].get("rougeL", {})
    first, *others = models
    header = ["set", "model", "rows", *(title for title, _ in SCORES.values())]
    if others:
        header.insert(4, f"− {first} (95 %)")
    rows = []
    for name in next(iter(models.values()))["sets"]:
        for model in models:
            scores = models[model]["sets"][name]
            cells = [mean_and_deviation(scores[k], seeds, spec) for k, (_, spec) in SCORES.items()]
            if others:
                cells.insert(1, _interval(apart.get(model, {}).get(name)))
            rows.append((name, model, str(scores["rows"]), *cells))
    for model, by_set in apart.items():
        if len(by_set) > 2:
            blank = [""] * (len(header) - 5)
            rows.append((AVERAGE, model, "", "", _interval(by_set[AVERAGE]), *blank))
    return Table(header, rows, names=2)


def _task_table(found: Mapping[str, Any]) -> Table:
    """Each task, model and metric, with its standard error."""
    rows = []
    tasks = dict.fromkeys(task for one in found["models"].values() for task in one["tasks"])
    for task in tasks:
        for model, one in found["models"].items():
            for key, value in one["tasks"][task].items():
                metric, _, how = key.partition(",")
                if isinstance(value, float) and not metric.endswith("_stderr"):
                    error = one["tasks"][task].get(f"{metric}_stderr,{how}")
                    spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                    rows.append((task, model, metric, how, f"{value:.4f}{spread}"))
    return Table(("task", "model", "metric", "filter", "value"), rows, names=4)


def _interval(difference: Mapping[str, float] | None) -> str:
    if difference is None:
        return ""
    return "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**difference)
