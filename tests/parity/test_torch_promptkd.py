"""The PyTorch opponent of the benchmarks does what the published implementation does.

Cases are those of `test_golden` that have Algorithm 1's losses (both reverse) and no accumulation;
tolerances are those that the cases' README suggests for float32.
"""

import importlib.util

import numpy as np
import pytest
from conftest import ROOT, golden_cases
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def load_opponent():
    """`benchmarks` is not a package."""
    file = ROOT / "benchmarks" / "torch_promptkd.py"
    specification = importlib.util.spec_from_file_location("torch_promptkd", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


opponent = load_opponent()


def is_algorithm_1(case: dict) -> bool:
    hyper = case["hyper"]
    reverse = hyper["teacher_kld_type"] == "reverse"
    regulariser = hyper["base_kld_type"] == "reverse" or hyper["base_coef"] == 0
    return reverse and regulariser and hyper["gradient_accumulation_steps"] == 1


def assert_close(found, expected, tolerance: float, what: str) -> None:
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
    difference = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    assert difference.max() <= tolerance, f"{what}: off by {difference.max():.3g} > {tolerance}"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Training:
    """One golden case, set up."""

    def __init__(self, folder, case: dict, **others):
        self.case, self.hyper = case, case["hyper"]
        self.path = {name: folder / path for name, path in case["paths"].items() if path}
        self.expected = np.load(self.path["expected"])
        self.initial = np.load(self.path["initial"])
        ids = case["prompt"]["init_token_ids"]
        settings = opponent.Settings(
            student_learning_rate=self.hyper["student_lr"],
            prompt_learning_rate=self.hyper["prompt_lr"],
            warmup_steps=self.hyper["warmup_iters"],
            total_steps=self.hyper["total_iters"],
            clip=self.hyper["clip_grad_norm"],
            weight_decay=self.hyper["weight_decay"],
            betas=tuple(self.hyper["adam_betas"]),
            eps=self.hyper["adam_eps"],
            prompt_ids=(case["batch"]["pad_token_id"],) if ids == "PAD" else tuple(ids),
            prompt_length=case["prompt"]["prompt_len"],
            regularisation=self.hyper["base_coef"],
            **others,
        )
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.promptkd = opponent.TorchPromptKD(
            load(self.path["teacher"]), load(self.path["student"]), settings
        )
        arrays = np.load(self.path["batch"])
        self.rows = opponent.Rows(
            torch.tensor(arrays["input_ids"]),
            torch.tensor(arrays["attention_mask"]).long(),
            torch.tensor(arrays["label"]),
            first=int(arrays["prompt_len"].min()) - 1,
        )

    def run(self) -> list[dict]:
        """The metrics of every iteration, and the prompt after it."""
        promptkd, found = self.promptkd, []
        for at in range(self.hyper["iterations"]):
            if self.hyper["lr_decay_style"] != "constant":  # the opponent has no other schedule
                for optimizer in promptkd.schedules:
                    name = "prompt" if optimizer is promptkd.prompt_optimizer else "student"
                    for group in optimizer.param_groups:
                        group["lr"] = float(self.expected[f"{name}_lr"][at])
            metrics = promptkd.update_prompt(self.rows) | promptkd.update_student(self.rows)
            found.append(metrics | {"prompt": promptkd.soft_prompt.detach().clone()})
        return found

    def assert_logits(self, model, name: str, tolerance: float, *, of) -> None:
        """Of real tokens; the prompt's own positions are the first."""
        columns = self.rows.input_ids.shape[1]
        with torch.no_grad():
            logits = model(input_ids=self.rows.input_ids, logits_to_keep=columns).logits
        real = self.rows.attention_mask.bool().numpy()
        assert_close(logits[real], of[name][real], tolerance, name)


@pytest.mark.parametrize(
    "settings", [{}, {"padding_mask": True}, {"micro_batches": 2}], ids=lambda s: "".join(s) or "-"
)
@pytest.mark.parametrize("folder, case", golden_cases("promptkd_training", is_algorithm_1))
def test_training(folder, case, settings):
    training = Training(folder, case, **settings)
    promptkd, expected, initial = training.promptkd, training.expected, training.initial
    teacher, student = promptkd.teacher, promptkd.student
    assert_close(promptkd.soft_prompt, initial["prompt_init"], 1e-6, "prompt_init")
    plain, prompted = "base_teacher_logits", "prompted_teacher_logits_before"
    training.assert_logits(teacher.get_base_model(), plain, 5e-5, of=initial)
    training.assert_logits(teacher, prompted, 5e-5, of=initial)

    frozen = {name: p.clone() for name, p in teacher.get_base_model().state_dict().items()}
    for at, found in enumerate(training.run()):
        named = {
            "prompt_kd": ("teacher_distil_loss", 1e-5),
            "prompt_regulariser": ("base_distil_loss", 1e-5),
            "prompt_loss": ("teacher_loss", 1e-5),
            "student_loss": ("student_loss", 1e-5),
            "prompt_grad_norm": ("prompt_grad_norm", 5e-5),
            "student_grad_norm": ("student_grad_norm", 5e-5),
            "prompt": ("prompt_after", 1e-5),
        }
        if not training.hyper["base_coef"]:
            del named["prompt_regulariser"]
        for ours, (theirs, tolerance) in named.items():
            assert_close(found[ours], expected[theirs][at], tolerance, f"{theirs} of {at}")

    training.assert_logits(teacher, "prompted_teacher_logits_after", 1e-4, of=expected)
    training.assert_logits(student, "student_logits_after", 1e-4, of=expected)
    for name, parameter in teacher.get_base_model().state_dict().items():
        assert torch.equal(parameter, frozen[name]), name
    assert_final_student(training)


def assert_final_student(training: Training) -> None:
    """Every parameter but those whose true gradient is zero (biases of the key projection)."""
    found = training.promptkd.student.state_dict()
    zero = set(training.case["zero_gradient_parameters"])
    compared = 0
    for name, array in load_file(training.path["student_final"]).items():
        if name not in zero:
            assert_close(found[name], array, 2e-4, name)
            compared += 1
    assert compared > 3


VOCABULARY = 23
REQUESTS = [[3, 4, 5, 6], [7], [8, 9]]


def tiny_model(seed: int, *, sharpness: float = 0.3):
    """A random GPT-2; the sharper, the less chance there is in sampling."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, eos_token_id=0
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if ".h." in name else sharpness if "ln_f" in name else 1.0
            parameter.copy_(scale * torch.randn_like(parameter))
        model.transformer.ln_f.bias.zero_()  # or it would always choose the same token
    return model


def tiny_promptkd(*, sharpness: float = 0.3, **others):
    settings = opponent.Settings(
        prompt_ids=(1, 2),
        prompt_length=3,
        total_steps=4,
        warmup_steps=0,
        max_prompt_length=6,
        max_length=16,
        **others,
    )
    return opponent.TorchPromptKD(tiny_model(0), tiny_model(1, sharpness=sharpness), settings)


def rollout(promptkd, **others):
    torch.manual_seed(5)
    return promptkd.rollout(REQUESTS, 8, **others)


def row_of(rows, at: int) -> tuple[list[int], int]:
    """A row's tokens, its last label among them, and the length of its request."""
    length = int(rows.attention_mask[at].sum())
    labels = rows.labels[at].tolist()
    tokens = [*rows.input_ids[at, :length].tolist(), labels[length - 1]]
    supervised = [i for i, label in enumerate(labels) if label != opponent.IGNORED]
    assert supervised == list(range(supervised[0], length)), "labels end with the row"
    assert [labels[i] for i in supervised] == tokens[supervised[0] + 1 :]
    return tokens, supervised[0] + 1


@pytest.mark.parametrize("static_cache", [False, True])
def test_rollout_cuts_after_the_first_eos(static_cache):
    promptkd = tiny_promptkd(static_cache=static_cache)
    free = rollout(promptkd, pad_id=22)
    columns = 15 if static_cache else 11
    assert free.input_ids.shape == free.attention_mask.shape == free.labels.shape == (3, columns)
    assert free.first == 0 and free.mask.sum() == 3 * 8
    written = []
    for at, request in enumerate(REQUESTS):
        tokens, start = row_of(free, at)
        assert tokens[:start] == request and len(tokens) == start + 8
        written.append(tokens[start:])
    assert len({tuple(response) for response in written}) == 3

    # The same numbers are drawn again, and now one of them ends a row, but not every row.
    eos = next(token for token in written[0][1:] if not all(token in other for other in written))
    rows = rollout(promptkd, pad_id=22, eos_id=eos)
    ended = 0
    for at, (request, response) in enumerate(zip(REQUESTS, written)):
        if eos in response:
            response, ended = response[: response.index(eos) + 1], ended + 1
        tokens, start = row_of(rows, at)
        assert tokens == request + response and start == len(request)
        assert (rows.input_ids[at, len(tokens) - 1 :] == 22).all()
    assert 0 < ended < 3
    same = rollout(promptkd, pad_id=eos, eos_id=eos)
    assert torch.equal(same.labels, rows.labels), "padding with EOS hides no EOS"
    assert torch.equal(same.attention_mask, rows.attention_mask)


def test_rollout_is_of_the_student_as_it_is_trained():
    """Where sampling leaves nothing to chance, labels are the most likely of the training pass."""
    promptkd = tiny_promptkd(sharpness=1e4)
    rows = rollout(promptkd)
    with torch.no_grad():
        likeliest = promptkd.student(input_ids=rows.input_ids).logits.argmax(dim=-1)
    supervised = rows.labels != opponent.IGNORED
    assert supervised.sum() == 3 * 8
    assert len(rows.labels[supervised].unique()) > 4
    assert torch.equal(likeliest[supervised], rows.labels[supervised])


def test_rollout_says_what_is_too_long():
    promptkd = tiny_promptkd()
    with pytest.raises(ValueError, match="0 to 7 tokens; expected 1 to max_prompt_length = 6"):
        promptkd.rollout([[], [1] * 7], 2)
    with pytest.raises(ValueError, match="longer than max_length = 16"):
        promptkd.rollout([[1] * 6], 11)


@pytest.mark.parametrize("autocast", [False, True])
def test_iteration_changes_prompt_and_student_alone(autocast):
    promptkd = tiny_promptkd(autocast=autocast)
    before = {name: p.clone() for name, p in promptkd.teacher.named_parameters()}
    student = [p.clone() for p in promptkd.student.parameters()]
    metrics = promptkd.iteration(REQUESTS, 8, eos_id=0)
    assert all(torch.isfinite(value) for value in metrics.values())
    after = dict(promptkd.teacher.named_parameters())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 1 and after[changed[0]] is promptkd.soft_prompt
    assert all(not torch.equal(*pair) for pair in zip(student, promptkd.student.parameters()))
    trained = [promptkd.soft_prompt, *promptkd.student.parameters()]
    assert {p.dtype for p in trained} == {torch.float32}, "masters stay in full precision"
    assert {p.grad for p in trained} == {None}
