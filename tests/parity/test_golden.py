"""The published implementation's numbers, reproduced with the `faithful` preset.

The cases lie in `golden` and are dispatched on `kind`. Tolerances are some times the rounding of
float32, and at most those that the cases' README suggests.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import golden_cases
from helpers.golden import assert_close
from safetensors.numpy import load_file

from promptkd_jax.data.batch import Batch
from promptkd_jax.distill import optimizer
from promptkd_jax.distill.losses import losses
from promptkd_jax.distill.methods.method import PRESETS, Method
from promptkd_jax.distill.methods.method_fields import Execution
from promptkd_jax.distill.soft_prompt import init_soft_prompt
from promptkd_jax.distill.state import Optimizers, init_state
from promptkd_jax.distill.step import train_step
from promptkd_jax.distill.teacher import Models
from promptkd_jax.models.decoder import head
from promptkd_jax.models.families.registry import FAMILIES
from promptkd_jax.models.io.export import to_hugging_face
from promptkd_jax.models.load import load_model

FAITHFUL = PRESETS["faithful"]


class Training:
    """One training case, set up as the published loop runs it."""

    def __init__(self, folder: pathlib.Path, case: dict):
        self.case, self.hyper = case, case["hyper"]
        path = {name: folder / relative for name, relative in case["paths"].items() if relative}
        self.path = path
        self.expected = np.load(path["expected"])
        self.initial = np.load(path["initial"])
        self.arrays = np.load(path["batch"])
        self.teacher = load_model(str(path["teacher"]))
        self.student = load_model(str(path["student"]))
        self.parts = self.hyper["gradient_accumulation_steps"]
        self.batch = self._batch()
        self.models = Models(self.student.decoder, self.teacher.decoder)
        self.gradients = {"student": {}, "prompt": {}}  # by update, before clipping
        self.optimizers = Optimizers(
            optax.chain(self._recorder("student"), self._optimizer("student_lr", self._decayed())),
            optax.chain(self._recorder("prompt"), self._optimizer("prompt_lr", None)),
        )
        ids = case["prompt"]["init_token_ids"]
        ids = [case["batch"]["pad_token_id"]] if ids == "PAD" else ids
        self.soft_prompt = init_soft_prompt(
            self.teacher.decoder, self.teacher.params, ids, case["prompt"]["prompt_len"]
        )
        self.method = self._method()

    def _batch(self) -> Batch:
        """Rows from lengths: request, then everything up to the last supervised token."""
        tokens, mask = self.arrays["input_ids"], self.arrays["attention_mask"]
        lengths = mask.sum(axis=1).astype(np.int32) + 1  # the last token is only ever a target
        rows = np.arange(len(tokens))
        tokens = tokens.astype(np.int32)
        tokens[rows, lengths - 1] = self.arrays["label"][rows, lengths - 2]
        return Batch(tokens, self.arrays["prompt_len"].astype(np.int32), lengths)

    def _decayed(self):
        decay_norms = FAITHFUL.decay_norms and FAMILIES[self.case["family"]].decays_norms
        return optimizer.decay_mask(self.student.params, decay_norms=decay_norms)

    def _optimizer(self, rate: str, mask):
        rates = optimizer.schedule(
            self.hyper["lr_decay_style"],
            self.hyper[rate],
            total_steps=self.hyper["total_iters"],
            warmup_steps=self.hyper["warmup_iters"],
            min_lr=self.hyper["lr_min"],
            cosine_ignores_warmup=FAITHFUL.cosine_ignores_warmup,
        )
        return optimizer.adamw(
            rates,
            weight_decay=self.hyper["weight_decay"],
            max_grad_norm=self.hyper["clip_grad_norm"],
            decay_mask=mask,
        )

    def _recorder(self, name: str) -> optax.GradientTransformation:
        """Passes gradients on and keeps a copy of that of each update, by its number: one that is
        written twice, for the student to see its result, is one."""

        def keep(number, gradient):
            self.gradients[name][int(number)] = gradient

        def update(gradient, number, params=None):
            jax.debug.callback(keep, number, gradient, ordered=True)
            return gradient, number + 1

        return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)

    def _method(self) -> Method:
        names = {"reverse": "reverse_kl", "forward": "forward_kl"}
        return Method(
            targets="gold",
            student_terms=(("reverse_kl", 1.0),),
            total_steps=self.hyper["total_iters"],
            response_capacity=self.batch.tokens.shape[1] - 1,
            prompt_capacity=self.case["batch"]["max_prompt_length"],
            vocab_size=self.case["batch"]["vocab"],
            teacher_view="prompted",
            prompt_divergence=names[self.hyper["teacher_kld_type"]],
            prompt_regularizer=names[self.hyper["base_kld_type"]],
            regularization=self.hyper["base_coef"],
            execution=Execution(gradient_accumulation_steps=self.parts),
            conventions=FAITHFUL,
        )

    def run(self):
        """Every update of the case: states and metrics, micro-batches being copies of the batch."""
        step = jax.jit(
            functools.partial(
                train_step, method=self.method, models=self.models, optimizers=self.optimizers
            )
        )
        batch = jax.tree.map(lambda x: np.repeat(x, self.parts, axis=0), self.batch)
        params = {"student": self.student.params, "soft_prompt": self.soft_prompt}
        state = init_state(params, self.optimizers, jax.random.key(0))
        states, metrics = [state], []
        for _ in range(-(-self.hyper["iterations"] // self.parts)):
            state, measured = step(state, self.teacher.params, batch)
            states.append(state)
            metrics.append(measured)
        jax.effects_barrier()
        return states, metrics

    def logits(self, model, params, soft_prompt=None):
        forward = jax.jit(lambda p, s: model.decoder.apply({"params": p}, tokens, prefix=s))
        tokens = self.batch.tokens
        return forward(params, soft_prompt) @ head(params).T


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("folder, case", golden_cases("promptkd_training"))
def test_training(folder, case):
    training = Training(folder, case)
    expected, initial, parts = training.expected, training.initial, training.parts
    real = training.arrays["attention_mask"].astype(bool)

    assert_close(training.soft_prompt, initial["prompt_init"], 1e-6, "prompt_init")
    teacher, student = training.teacher, training.student
    for name, found in (
        ("base_teacher_logits", training.logits(teacher, teacher.params)),
        (
            "prompted_teacher_logits_before",
            training.logits(teacher, teacher.params, training.soft_prompt),
        ),
        ("student_logits_before", training.logits(student, student.params)),
    ):
        assert_close(found[real], initial[name][real], 5e-5, name)

    states, metrics = training.run()
    iterations = training.hyper["iterations"]
    every = [m.sums | {f"{who}_loss": loss for who, loss in m.losses.items()} for m in metrics]
    sums = {
        name: np.concatenate([e[name] / m.counts for e, m in zip(every, metrics)])[:iterations]
        for name in every[0]
    }
    named = {
        "teacher_distil_loss": "prompt_kd",
        "base_distil_loss": "prompt_regularizer",
        "teacher_loss": "prompt_loss",
        "student_loss": "student_loss",
    }
    for theirs, ours in named.items():
        if ours in sums:
            # Of a window that is cut short, the last micro-batch is not its last for us.
            assert_close(sums[ours], expected[theirs], 5e-6, theirs)
        else:
            assert np.isnan(expected[theirs]).all()

    whole = iterations // parts
    for update in range(whole):
        at = (update + 1) * parts - 1
        for ours in ("prompt", "student"):
            theirs = f"{ours}_grad_norm"
            assert_close(metrics[update].grad_norms[ours], expected[theirs][at], 1e-5, theirs)
        after = states[update + 1]
        assert_close(after.soft_prompt, expected["prompt_after"][at], 2e-6, "prompt_after")
        gradient = training.gradients["prompt"][update]
        assert_close(gradient, expected["prompt_grad"][at], 2e-6, "prompt_grad")
    assert np.flatnonzero(expected["optimizer_step_taken"]).tolist() == [
        (update + 1) * parts - 1 for update in range(whole)
    ]

    last = states[whole]
    prompted = training.logits(teacher, teacher.params, last.soft_prompt)
    name = "prompted_teacher_logits_after"
    assert_close(prompted[real], expected[name][real], 5e-5, name)
    name = "student_logits_after"
    assert_close(training.logits(student, last.student)[real], expected[name][real], 5e-5, name)
    assert_final_student(training, last.student)
    if "student_grad_iter0" in training.path:
        assert_first_student_gradient(training)


def assert_first_student_gradient(training: Training) -> None:
    expected = load_file(training.path["student_grad_iter0"])
    found = to_hugging_face(training.gradients["student"][0], training.student.decoder.config)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], 5e-5, name)


def assert_final_student(training: Training, params) -> None:
    """Every parameter but those whose true gradient is zero (biases of the key projection)."""
    expected = load_file(training.path["student_final"])
    found = to_hugging_face(params, training.student.decoder.config)
    prefix = next(iter(found)).split(".")[0] + "."
    strip = {name.removeprefix(prefix): name for name in found}
    zero = set(training.case["zero_gradient_parameters"])
    compared = 0
    for name, array in expected.items():
        ours = found[strip[name.removeprefix(prefix)]]
        if name in zero:
            if array.ndim != 1 or array.size != 3 * training.student.decoder.config.width:
                continue
            keys = np.arange(array.size) // (array.size // 3) == 1
            array, ours = array[~keys], ours[~keys]
        assert_close(ours, array, 5e-5, name)
        compared += 1
    assert compared > 3


@pytest.mark.parametrize("folder, case", golden_cases("kl_unit"))
def test_kl(folder, case):
    arrays = np.load(folder / "kl.npz")
    mask = arrays["label"] != -100
    for name in case["cases"]:
        learner, target = arrays[f"{name}_learner_logits"], arrays[f"{name}_target_logits"]
        for kind, function in (
            ("reverse", losses.reverse_kl),
            ("forward", losses.soft_cross_entropy),
        ):
            per_token = function(target, learner)
            assert_close(per_token, arrays[f"{name}_{kind}_per_token"], 1e-5, f"{name} {kind}")

            def mean(learner, function=function, target=target):
                return (function(target, learner) * mask).sum() / mask.sum()

            value, gradient = jax.value_and_grad(mean)(jnp.asarray(learner))
            assert_close(value, arrays[f"{name}_{kind}_masked_mean"], 1e-5, f"{name} {kind}")
            assert np.isfinite(gradient).all(), f"{name} {kind}: gradient is not finite"
            if f"{name}_{kind}_grad_learner_logits" in arrays:
                expected = arrays[f"{name}_{kind}_grad_learner_logits"]
                assert_close(gradient, expected, 1e-5, f"{name} {kind} gradient")
        student = (losses.reverse_kl(target, learner) * mask).sum() / mask.sum()
        assert_close(student, arrays[f"{name}_student_call_masked_mean"], 1e-5, name)


@pytest.mark.parametrize("folder, case", golden_cases("lr_schedule_unit"))
def test_lr_schedule(folder, case):
    for one in case["schedules"]:
        rates = optimizer.schedule(
            one["style"],
            one["lr"],
            total_steps=one["total_iters"],
            warmup_steps=one["warmup"],
            min_lr=one["lr_min"],
            cosine_ignores_warmup=FAITHFUL.cosine_ignores_warmup,
        )
        expected = one["lr_at_optimizer_step"]
        found = [float(rates(step)) for step in range(len(expected))]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)
