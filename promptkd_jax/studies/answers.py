"""Each model answers each test set once a seed, and what the scores of a few seeds say.

What is answered stands in files of the model's folder, so that the same command continues where it
was stopped, and with further sets or seeds does only these.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from promptkd_jax.data.reading.records import Record
from promptkd_jax.data.rows import Rows, tokenize
from promptkd_jax.data.templates import read_chat_template
from promptkd_jax.evaluation.bootstrap import mean_and_std, paired_difference
from promptkd_jax.evaluation.student_metrics import score_responses, warn_of_uncounted
from promptkd_jax.evaluation.text_metrics import rouge_l
from promptkd_jax.inference.generate import with_turn_end
from promptkd_jax.inference.teacher_responses import kept_responses
from promptkd_jax.infra import distributed, provenance
from promptkd_jax.infra.files import load_or_compute
from promptkd_jax.infra.specs import declared
from promptkd_jax.models.io import identity
from promptkd_jax.models.load import load_tokenizer
from promptkd_jax.models.model import Model
from promptkd_jax.models.sampling_rules import Sampling
from promptkd_jax.training.config.config_file import claim, fingerprint
from promptkd_jax.training.config.field_specs import TEACHER
from promptkd_jax.training.config.fields import RunConfig

AVERAGE = "average"


class Contender(NamedTuple):
    """A model that answers: its name in the tables, where it lies, the type that it computes in,
    the config that says how it is asked (`data`) and scored (`evaluation.rouge_tokenizer`), the
    folder for its answers, `SET/seedN.json`, and what its kernels are rounded to."""

    name: str
    path: str
    dtype: str
    config: RunConfig
    folder: epath.Path
    quantize: str = "none"


def answer_sets(
    contender: Contender,
    sets: Mapping[str, Sequence[Record]],
    seeds: Sequence[int],
    *,
    sampling: Sampling,
    batch_size: int,
    load: Callable[..., Model],
    tokenizer: Any = None,
    option: str = "--workdir",
) -> dict[str, dict[int, dict[str, Any]]]:
    """Answers every set once with every seed, where `contender.folder` does not hold that yet.

    All sets are tokenized before the first is answered. Responses are kept as they are written, so
    that little is lost where this is stopped.

    Args:
      sets: records with references, by name.
      batch_size: rows that are answered at once.
      load: as `load_with_tokenizer`; called if there is anything to answer.
      tokenizer: of the prompts; None: the model's own.
      option: that chooses the folder, for messages.

    Returns:
      By set and seed: the scores of `generation_metrics`, "rougeL_by_row" in percent, "texts", how
      many "rows" there are and were "dropped", and "kept": which of the records the rows are.

    Raises:
      ConfigError: what is there was answered with other settings, or by another model.
    """
    asked = contender.config.data.prompt_format(contender.config.preset)

    @functools.cache
    def model() -> Model:
        return with_turn_end(load(contender.path, dtype=contender.dtype), asked, tokenizer)

    _claim_folders(contender, sets, sampling, tokenizer, option)
    rows = functools.cache(lambda: _tokenize_all(contender, sets, model(), tokenizer))

    def answer(name: str, seed: int, unfinished: epath.Path) -> dict[str, Any]:
        how = dict(sampling=sampling, batch_size=batch_size, seed=seed)
        found = _answer(contender, model(), rows()[name], unfinished, **how)
        places = {id(record): place for place, record in enumerate(sets[name])}
        score = f"ROUGE-L {found['rougeL']:.2f} on {found['rows']} rows"
        print(f"{contender.name} answers {name}, seed {seed}: {score}", flush=True)
        return found | {"kept": [places[id(record)] for record in rows()[name].records]}

    answers: dict[str, dict[int, dict[str, Any]]] = {}
    for name in sets:
        answers[name] = {}
        for seed in seeds:
            file = contender.folder / name / f"seed{seed}.json"
            unfinished = file.with_name(f"seed{seed}.unfinished.jsonl")
            compute = functools.partial(answer, name, seed, unfinished)
            answers[name][seed] = load_or_compute(file, compute)
            distributed.run_on_primary(functools.partial(_remove, unfinished))
    return answers


def digests(contender: Contender, tokenizer: Any = None) -> dict[str, str]:
    """Digests of what answers: the model's weights, its tokenizer, and the chat template in use,
    which tell a model that has changed from the one that answered before.

    Args:
      tokenizer: of the prompts; None: the model's own.
    """
    file = contender.config.data.chat_template

    def digest() -> dict[str, str]:
        used = tokenizer or load_tokenizer(contender.path)
        template = used and used.chat_template
        if file not in ("", TEACHER):
            template = read_chat_template(file)
        rounded = "" if contender.quantize == "none" else f" in {contender.quantize}"
        return {
            "weights": identity.quick_digest(contender.path) + rounded,
            "tokenizer": used and identity.tokenizer_digest(used),
            "chat_template": hashlib.sha256(str(template).encode()).hexdigest(),
        }

    return distributed.run_on_primary(digest)


def _claim_folders(
    contender: Contender,
    sets: Mapping[str, Sequence[Record]],
    sampling: Sampling,
    tokenizer: Any,
    option: str,
) -> None:
    """Makes a folder of answers to each set that of what decides them."""
    config = contender.config
    decides = dict(
        model=contender.path,
        dtype=contender.dtype,
        **digests(contender, tokenizer),
        **config.data.prompt_format(config.preset).identity,
        long_prompts=config.data.long_prompts,
        max_prompt_length=config.data.max_prompt_length,
        max_length=config.data.max_length,
        rouge_tokenizer=config.evaluation.rouge_tokenizer,
        sampling={name: getattr(sampling, name) for name in declared(Sampling)},
    )
    for name, records in sets.items():
        said = [[record.messages, record.references, record.extra] for record in records]
        asked = decides | {"records": fingerprint({"records": said})}
        claim(contender.folder / name, asked, option=option)


def _tokenize_all(
    contender: Contender, sets: Mapping[str, Sequence[Record]], model: Model, tokenizer: Any
) -> dict[str, Rows]:
    config, found = contender.config, {}
    for name, records in sets.items():
        found[name] = tokenize(
            records,
            tokenizer or model.tokenizer,
            config.data.prompt_format(config.preset),
            max_prompt_length=config.data.max_prompt_length,
            max_length=config.data.max_length,
            eos_id=model.eos_ids[0],
            vocab_size=model.vocab_size,
            long_prompts=config.data.long_prompts,
        )
        tokens = provenance.fingerprint_rows(found[name].tokens)
        distributed.assert_same(f"the data ({name})", tokens)
        warn_of_uncounted(found[name], config.evaluation.rouge_tokenizer)
    return found


def _answer(
    contender: Contender, model: Model, rows: Rows, file: epath.Path, *, sampling: Sampling, **how
) -> dict[str, Any]:
    data, rouge_tokenizer = contender.config.data, contender.config.evaluation.rouge_tokenizer
    responses = kept_responses(
        model,
        rows,
        file,
        sampling=dataclasses.replace(sampling, eos_ids=model.eos_ids),
        prompt_capacity=data.max_prompt_length,
        max_new_tokens=data.max_length - data.max_prompt_length,
        vocab_size=model.vocab_size,
        writer=contender.name,
        **how,
    )
    scores, texts = score_responses(
        model.tokenizer, rows, responses, model.eos_ids, rouge_tokenizer
    )
    by_row = [
        100 * rouge_l(text, record.references, rouge_tokenizer)
        for text, record in zip(texts, rows.records)
    ]
    counts = {"rows": len(texts), "dropped": rows.dropped}
    return scores | counts | {"rougeL_by_row": by_row, "texts": texts}


def _remove(unfinished: epath.Path) -> None:
    """Removes the responses that have been scored, and what says what made them."""
    for file in (unfinished, unfinished.with_suffix(".manifest.json")):
        if file.exists():
            file.unlink()


def over_seeds(scores: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, Any]]:
    """Mean and deviation over the seeds of each set's score, and of their average.

    Args:
      scores: by set and seed, the same seeds in all.

    Returns:
      {"mean": …, "std": …, "seeds": the values} by set, and of `AVERAGE` where there is any set.
    """
    values = {name: [*by_seed.values()] for name, by_seed in scores.items()}
    if values:
        values[AVERAGE] = np.mean([*values.values()], axis=0).tolist()
    return {
        name: mean_and_std(by_seed)._asdict() | {"seeds": by_seed}
        for name, by_seed in values.items()
    }


def differences(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], *, draws: int
) -> dict[str, dict[str, float]]:
    """Ours minus theirs, on each set and on average, each with its bootstrap interval.

    Args:
      ours, theirs: the scores of each set, `[seeds, rows]`, of the same rows.
      draws: resamples.
    """
    pairs = {name: ([ours[name]], [theirs[name]]) for name in ours}
    pairs[AVERAGE] = (list(ours.values()), [theirs[name] for name in ours])
    return {
        name: paired_difference(*pair, draws=draws, seed=0)._asdict()
        for name, pair in pairs.items()
    }
