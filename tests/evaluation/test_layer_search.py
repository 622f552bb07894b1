"""Layers are left out by what their absence costs, measured as a run measures a student."""

import itertools
import re

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.models import random_model

from promptkd_jax.cli.main import main
from promptkd_jax.data.rows import Rows
from promptkd_jax.evaluation.layer_search import leave_out_layers
from promptkd_jax.evaluation.student_metrics import teacher_metrics
from promptkd_jax.infra.errors import DataError, ModelError
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.load import load_model, load_with_tokenizer
from promptkd_jax.models.model import Model, keep_layers

ROWS = Rows([np.arange(3, 3 + n, dtype=np.int32) for n in (9, 6, 8)], np.array([4, 2, 3]), (), 0)
OUTPUTS = ("attention/out", "mlp/down")


def without_effect(model: Model, *layers: int) -> Model:
    """The model, of which these layers add nothing to the residual stream."""

    def silenced(path, x):
        name = "/".join(key.key for key in path)
        if any(part in name for part in OUTPUTS):
            x = np.array(x)
            x[list(layers)] = 0.0
        return x

    layers_params = jax.tree.map_with_path(silenced, model.params["layers"])
    return model.replace(params=model.params | {"layers": layers_params})


def test_layers_without_effect_go_first_and_cost_nothing():
    teacher = without_effect(random_model("llama", num_hidden_layers=5), 1, 3)
    (one, nothing), (other, still), (_, cost) = itertools.islice(
        leave_out_layers(teacher, ROWS, batch_size=2), 3
    )
    assert {one, other} == {1, 3}
    np.testing.assert_allclose([nothing, still], 0, atol=1e-6)
    assert cost > 0.01


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_each_is_the_least_of_those_that_a_run_would_measure(name):
    """Also where layers are of several kinds, and rows do not fill the last batch."""
    teacher = random_model(name)
    left = list(range(teacher.decoder.config.num_layers))
    for layer, kl in leave_out_layers(teacher, ROWS, batch_size=2):
        costs = {}
        for one in left:
            student = keep_layers(teacher, tuple(other for other in left if other != one))
            how = dict(batch_size=3, length=9, vocab_size=teacher.vocab_size)
            costs[one] = teacher_metrics(teacher, student, ROWS, **how)["kl"]
        assert layer == min(costs, key=costs.get)
        np.testing.assert_allclose(kl, costs[layer], rtol=1e-4)
        left.remove(layer)
    assert len(left) == 1


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return tiny.write_model(tmp_path_factory.mktemp("teacher"), width=32, depth=4, seed=0)


def init(teacher: str, *options: object) -> None:
    main(["init", "--teacher", teacher, *map(str, options)])


def test_the_command_keeps_what_the_search_leaves(teacher, tmp_path, capsys):
    data = tiny.write_data(tmp_path / "train.jsonl", 9)
    chosen = ("--layers", 2, "--data", data, "--template", "plain", "--max-new-tokens", 5)
    init(teacher, *chosen, "--rows", 3, "--max-prompt-length", 16, "--output", tmp_path / "student")
    said = capsys.readouterr().out
    left_out = [int(line.split()[2][:-1]) for line in said.splitlines() if "without layer" in line]
    assert len(left_out) == 2
    kept = tuple(layer for layer in range(4) if layer not in left_out)
    assert f"counted from 0: {', '.join(map(str, kept))}\n" in said
    # What the choice rests on, in the terminal and on the student's card.
    rests_on = re.search(r"\d+ tokens of its responses to 3 prompts of \S+train.jsonl", said)
    assert rests_on and f"{rests_on[0]}; 0 prompts dropped (over 16 tokens)" in said
    card = (tmp_path / "student" / "README.md").read_text()
    assert f"Chosen by: {rests_on[0]}\n" in card
    assert f"KL(teacher || student), nats: {re.findall('KL ([0-9.]+)', said)[-1]}\n" in card
    student = load_with_tokenizer(str(tmp_path / "student"), dtype="float32")
    expected = keep_layers(load_model(teacher), kept)
    jax.tree.map(np.testing.assert_array_equal, student.params, expected.params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers=0,2", "--data=absent.jsonl"], "--layers 0,2: --data chooses which; expected"),
        (["--layers=2", "--template=plain", "--split=dev"], "--template, --split: for --data, by"),
        (["--layers=2", "--rows=8", "--format=messages"], "--format, --rows: for --data, by which"),
        (["--layers=2", "--data=absent.jsonl", "--template=plain"], "absent.jsonl: no such file"),
        (
            ["--layers=4", "--data=absent.jsonl"],
            "--layers 4: --data leaves out some of the 4 layers",
        ),
        (["--layers=9", "--data=absent.jsonl"], "9 of 4 layers: keep at least 1 and at most 4"),
    ],
)
def test_what_does_not_go_with_data(teacher, tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"promptkd init: {message}"):
        init(teacher, *options, f"--output={tmp_path / 'student'}")
    assert not (tmp_path / "student").exists()


def test_a_folder_that_cannot_be_written_is_found_before_the_search(teacher, tmp_path, capsys):
    data = tiny.write_data(tmp_path / "train.jsonl", 3)
    with pytest.raises(SystemExit, match="init: --output .*train.jsonl/student: "):
        init(
            *(teacher, "--layers=2", f"--data={data}", "--template=plain"),
            f"--output={data}/student",
        )
    assert "without layer" not in capsys.readouterr().out


def test_what_cannot_be_searched():
    teacher = random_model("llama")
    with pytest.raises(DataError, match="rows: none has a response"):
        next(leave_out_layers(teacher, ROWS._replace(prompt_lengths=np.array([9, 6, 8]))))
    offloaded = Decoder(teacher.decoder.config.replace(offload=True))
    with pytest.raises(ModelError, match="llama: is offloaded"):
        next(leave_out_layers(teacher.replace(decoder=offloaded), ROWS))
    params = jax.tree.map(lambda x: np.full_like(x, np.nan), teacher.params)
    with pytest.raises(ModelError, match=r"llama: KL of the layers \[1, 2\] is nan; expected"):
        next(leave_out_layers(teacher.replace(params=params), ROWS))
