"""Rules for the soft prompt against the same method without one: does PromptKD ever harm?

    PYTHONPATH=. .venv/bin/python benchmarks/studies/prompt_rules.py runs/prompt_rules \
        --rules published gated fallback --seeds 10 20 30 40 50

`--pair small`: the models and data of `configs/compare.py:small`, for so long that GKD (lambda = 1,
reverse KL) gains clearly; with `--pretraining-seed N` both models are others, in a WORKDIR of their
own. `--pair quickstart`: its models, after its warm-up. Each rule is PromptKD
with the changes of `RULES`, from the same student, on the same rows, paired with GKD by seed. A
training is done once and kept in WORKDIR/PAIR/RULE-seedN.json: the same command continues, and
`--only-train` ends before the table, so that several calls can share the work. Then
WORKDIR/PAIR.md: ROUGE-L of the students' responses and KL(p || q) to the plain teacher, each less
GKD's with a 95 % interval (Student's t over seeds), the teacher's own ROUGE-L behind the prompt,
and, update by update, KL(p_P || p), KL(q || p_P) and KL(q || p).
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from scipy import stats

from configs import compare, quickstart
from promptkd_jax.data.batches import stream
from promptkd_jax.data.rows import Rows
from promptkd_jax.distill.state import summarize
from promptkd_jax.infra import compile_cache, sharding
from promptkd_jax.infra.files import load_or_compute, make_folder, write_text
from promptkd_jax.models.language_model import LanguageModel
from promptkd_jax.studies.comparison import plan_comparison
from promptkd_jax.studies.runs import Run, train_all, train_apart
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.config.fields import RunConfig, StageConfig
from promptkd_jax.training.experiment import Experiment
from promptkd_jax.training.loop import dev_generation_metrics, evaluate_student
from promptkd_jax.training.prepare import prepare
from promptkd_jax.training.recipes import METHODS

GKD = "gkd"
BEHIND_OPENING = "behind_opening"
_RATE = dict(prompt_learning_rate=1e-2)
_CONSTANT = dict(_RATE, regularization_schedule="constant")
# By name: changes of PromptKD's stage, and of the soft prompt.
RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    GKD: ({}, {}),
    # The start: rate, coefficient of L_reg, first values, length.
    "published": ({}, {}),  # the prompt's rate is the student's
    "rate": (_RATE, {}),
    "high_rate": (dict(prompt_learning_rate=3e-2), {}),
    "constant": (_CONSTANT, {}),
    "adaptive": (dict(_RATE, regularization_schedule="adaptive"), {}),
    "strong": (dict(_CONSTANT, regularization=10.0), {}),
    "pad": (_RATE, dict(init="pad")),
    "vocabulary": (_RATE, dict(init="vocabulary")),
    "random": (_RATE, dict(init="random")),
    "one_vector": (_RATE, dict(length=1)),
    "twenty_vectors": (_RATE, dict(length=20)),
    BEHIND_OPENING: (_RATE, {}),  # "rate" at another place, see `behind_opening`
    # Rules that keep the prompt from harm.
    "warmup": (dict(_RATE, prompt_warmup_steps=30), {}),
    "three_updates": (dict(_RATE, prompt_updates=3), {}),
    "fallback": (dict(_RATE, prompt_fallback=True), {}),
    "gated": (_RATE, dict(gated=True)),
    "gated_low_rate": (dict(prompt_learning_rate=1e-3), dict(gated=True)),
    "gated_constant": (_CONSTANT, dict(gated=True)),
    "gated_pad": (_CONSTANT, dict(gated=True, init="pad")),
    "gated_vocabulary": (_CONSTANT, dict(gated=True, init="vocabulary")),
    "gated_random": (_CONSTANT, dict(gated=True, init="random")),
    "gated_one_vector": (_CONSTANT, dict(gated=True, length=1)),
    "gated_twenty_vectors": (_CONSTANT, dict(gated=True, length=20)),
    "gated_fallback": (dict(_RATE, prompt_fallback=True), dict(gated=True)),
    "gated_strong": (dict(_CONSTANT, regularization=3.0), dict(gated=True)),
    "gated_strongest": (dict(_CONSTANT, regularization=10.0), dict(gated=True)),
    "gated_adaptive": (dict(_RATE, regularization_schedule="adaptive"), dict(gated=True)),
    "gated_high_rate": (
        dict(prompt_learning_rate=3e-2, regularization_schedule="constant"),
        dict(gated=True),
    ),
    "gated_high_rate_strong": (
        dict(prompt_learning_rate=3e-2, regularization_schedule="constant", regularization=3.0),
        dict(gated=True),
    ),
    "gated_constant_fallback": (dict(_CONSTANT, prompt_fallback=True), dict(gated=True)),
}
# Of an update: heading and name of the metric, of the prompt before the update.
CURVES = (
    ("KL(p_P ‖ p)", "prompt_regularizer"),
    ("KL(q ‖ p_P)", "kl_prompted"),
    ("KL(q ‖ p)", "kl_plain"),
)
SHOWN_UPDATES = (1, 5, 10, 20)
SAMPLES = 4  # responses to each held-out request, of which ROUGE-L is a mean


def base_of(
    pair: str, workdir: pathlib.Path, steps: int, pretraining_seed: int
) -> tuple[list[Run], RunConfig]:
    """The trainings that all rules begin from, and the run of GKD."""
    if pair == "small":
        config = compare.small()
        for each in config.pretraining.values():
            each.seed = pretraining_seed
        config.methods, config.seeds, config.budget.steps = (GKD,), (10,), steps
        config.run.data.dev = "synthetic:test"
        made = plan_comparison(config, workdir)
        return list(made.pretraining.values()), made.a_run
    config = quickstart.get_config()
    warmup, promptkd = config.stages
    config.stages = (warmup,)
    before = Run("warm-up", checked(config), epath.Path(workdir / "warmup"))
    base = dataclasses.replace(
        before.config,
        teacher_responses=dataclasses.replace(
            before.config.teacher_responses, path=str(before.folder)
        ),
        student=dataclasses.replace(before.config.student, path=before.student, layers=0),
    )
    stage = StageConfig(name=GKD, steps=steps, learning_rate=promptkd.learning_rate)
    return [before], dataclasses.replace(base, stages=(dataclasses.replace(stage, **METHODS[GKD]),))


def with_rule(config: RunConfig, name: str, seed: int) -> RunConfig:
    """GKD's run with PromptKD in its place, by the rule of this name."""
    config = dataclasses.replace(config, seed=seed)
    if name == GKD:
        return config
    of_stage, of_prompt = RULES[name]
    (stage,) = config.stages
    stage = dataclasses.replace(stage, name="promptkd", **METHODS["promptkd"] | of_stage)
    soft_prompt = dataclasses.replace(config.soft_prompt, **dict(gated=False) | of_prompt)
    return dataclasses.replace(config, stages=(stage,), soft_prompt=soft_prompt)


def train(config: RunConfig, rule: str, folder: pathlib.Path) -> dict[str, Any]:
    """Trains one run and measures it: its last figures, and `CURVES` by update.

    Args:
      folder: for the rows of the data, of which all runs have the same.
    """
    mesh = sharding.make_mesh(config.mesh.sizes)
    with jax.set_mesh(mesh):
        experiment = prepare(config, epath.Path(folder), mesh)
        (stage,) = experiment.stages
        seen, prefix_of, dev = experiment, lambda soft_prompt: soft_prompt, experiment.dev
        if rule == BEHIND_OPENING:
            seen, prefix_of, dev = behind_opening(experiment)
        state, step = seen.start(stage, None), seen.jitted_step(stage)
        updates, behind = [], {}
        for number, batch in enumerate(itertools.islice(stream(stage.batches, 0), stage.steps), 1):
            rows = sharding.place_rows((batch, None))
            state, metrics = step(state, experiment.teacher.params, *rows, None)
            updates.append(summarize(metrics))
            if state.soft_prompt is not None and number in (*SHOWN_UPDATES, stage.steps):
                prompted = dataclasses.replace(experiment, dev=dev)
                prefix = prefix_of(state.soft_prompt)
                behind[number] = _rouge(prompted, experiment.teacher, prefix, samples=1)
        found = evaluate_student(experiment, state.student)
        figures = {name: found[name] for name in ("kl", "agreement", "loss")}
        figures["rougeL"] = _rouge(experiment, experiment.trained_student(state.student))
        figures["teacher_rougeL"] = _rouge(experiment, experiment.teacher)
        names = [name for _, name in CURVES] + ["plain_share", "prompt_gate"]
        curves = {n: [update[n] for update in updates] for n in names if n in updates[0]}
        return {"figures": figures, "curves": curves, "behind": behind}


def behind_opening(experiment: Experiment) -> tuple[Experiment, Callable, Rows]:
    """The soft prompt behind what all prompts begin with (BOS, the system turn), not before it.

    Rows keep those O tokens, since the student needs them. For the teacher they become the first
    columns of its prefix, [E(opening); P], so that its hidden states are those of the rest of a
    row, and zeros in the O columns before, none of which predicts a token of a response.

    Returns:
      The experiment whose teacher sees P there; the prefix `[O + M, D]` of a soft prompt `[M, D]`;
      the held-out rows without their opening, to be put behind that prefix.

    Raises:
      ValueError: the prompts of this data have no opening in common.
    """
    teacher, dev = experiment.teacher, experiment.dev
    prompts = [
        tokens[:length]
        for rows in (*experiment.train, dev)
        for tokens, length in zip(rows.tokens, rows.prompt_lengths)
    ]
    opening = np.asarray(os.path.commonprefix([list(map(int, prompt)) for prompt in prompts]))
    if not len(opening):
        raise ValueError(f"{BEHIND_OPENING}: the prompts of this data begin with different tokens")
    print(f"opening: {teacher.tokenizer.decode(opening)!r}", flush=True)

    def prefix_of(soft_prompt: jax.Array, params: Any = teacher.params) -> jax.Array:
        before = teacher.decoder.input_embeddings(params, opening)
        return jnp.concatenate([before.astype(soft_prompt.dtype), soft_prompt])

    def hidden_states(params: Any, tokens: jax.Array, prefix: jax.Array | None) -> jax.Array:
        if prefix is None:
            return teacher.decoder.hidden_states(params, tokens)
        rest = tokens[:, len(opening) :]
        hidden = teacher.decoder.hidden_states(params, rest, prefix_of(prefix, params))
        return jnp.pad(hidden, ((0, 0), (len(opening), 0), (0, 0)))

    model = LanguageModel(hidden_states, teacher.decoder.output_head)
    seen = dataclasses.replace(experiment, teacher=teacher.replace(decoder=model))
    without = dev._replace(
        tokens=[tokens[len(opening) :] for tokens in dev.tokens],
        prompt_lengths=dev.prompt_lengths - len(opening),
    )
    return seen, prefix_of, without


def _rouge(experiment, model, soft_prompt=None, samples: int = SAMPLES) -> float:
    """ROUGE-L over several responses to each held-out request."""
    found = []
    for sample in range(samples):
        config = dataclasses.replace(experiment.config, seed=1000 + sample)
        one = dataclasses.replace(experiment, config=config)
        found.append(dev_generation_metrics(one, model, soft_prompt)[0]["rougeL"])
    return float(np.mean(found))


def interval(differences: Sequence[float]) -> str:
    """Mean and 95 % interval of paired differences, Student's t over seeds."""
    mean, count = np.mean(differences), len(differences)
    if count < 2:
        return f"{mean:+.3f}"
    half = stats.t.ppf(0.975, count - 1) * np.std(differences, ddof=1) / count**0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def table(found: Mapping[str, Mapping[int, Any]]) -> str:
    """All rules in Markdown, one a line, over the seeds that a rule and GKD have."""
    updates = ", ".join(map(str, SHOWN_UPDATES))
    heads = ["rule", "seeds", "ROUGE-L", "less GKD's", "KL(p ‖ q)", "less GKD's"]
    heads += [f"teacher's ROUGE-L behind P, updates {updates}, last"]
    heads += [f"{head}, updates {updates}, last" for head, _ in CURVES]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, runs in found.items():
        seeds = [seed for seed in runs if seed in found[GKD]]
        cells = [name, str(len(seeds))]
        for key, digits in (("rougeL", 2), ("kl", 4)):
            ours, theirs = ([by[s]["figures"][key] for s in seeds] for by in (runs, found[GKD]))
            cells.append(f"{np.mean(ours):.{digits}f}")
            cells.append("" if name == GKD else interval(np.subtract(ours, theirs)))
        plain = np.mean([runs[seed]["figures"]["teacher_rougeL"] for seed in seeds])
        behind = [list(runs[seed]["behind"].values()) for seed in seeds]
        shown = ", ".join(f"{x:.1f}" for x in np.mean(behind, axis=0))
        cells.append(shown or f"{plain:.1f} without")
        for _, metric in CURVES:
            curves = [runs[seed]["curves"].get(metric, []) for seed in seeds]
            places = [n - 1 for n in SHOWN_UPDATES if n < len(curves[0])] + [-1]
            means = [np.mean([curve[i] for curve in curves]) for i in places if curves[0]]
            cells.append(", ".join(f"{x:.3f}" for x in means))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains what is missing, and writes the table of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--pair", choices=("small", "quickstart"), default="small")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 20, 30, 40, 50])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pretraining-seed", type=int, default=compare.small().run.seed)
    parser.add_argument("--only-train", action="store_true")
    chosen = parser.parse_args()
    workdir = chosen.workdir.resolve()
    compile_cache.keep_compiled_programs()
    folder = workdir / f"{chosen.pair}-{chosen.steps}"
    make_folder(epath.Path(folder))
    before, base = base_of(chosen.pair, workdir, chosen.steps, chosen.pretraining_seed)
    train_all(before, train_apart)
    for seed, rule in itertools.product(chosen.seeds, chosen.rules):
        file, run = folder / f"{rule}-seed{seed}.json", with_rule(base, rule, seed)
        one = load_or_compute(
            epath.Path(file), functools.partial(train, run, rule, folder / "rows")
        )
        print(rule, seed, {k: round(x, 4) for k, x in one["figures"].items()}, flush=True)
    if chosen.only_train:
        return
    found: dict[str, dict[int, Any]] = {}
    for rule in RULES:
        for file in sorted(folder.glob(f"{rule}-seed*.json")):
            seed = int(file.stem.rpartition("seed")[2])
            found.setdefault(rule, {})[seed] = json.loads(file.read_text())
    write_text(epath.Path(workdir / f"{folder.name}.md"), table(found))
    print(table(found))


if __name__ == "__main__":
    main()
