"""Tasks of lm-eval on our model: its numbers are those of lm-eval's own backend `hf`."""

import json
import shutil

import pytest
from helpers import tiny

from promptkd_jax.cli.main import main
from promptkd_jax.evaluation import benchmarks
from promptkd_jax.models.load import load_model

lm_eval = pytest.importorskip("lm_eval")

CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TEXTS = """
task: tiny_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.json}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""
ANSWERS = """
task: tiny_answers
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [" a", "e"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
"""
TASKS = ["tiny_choices", "tiny_texts", "tiny_answers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and three tasks from local files."""
    folder = tmp_path_factory.mktemp("benchmarks")
    tiny.write_model(folder / "model", width=32, depth=2, seed=0)
    words = tiny.WORDS
    questions = [
        {
            "question": f"say {' '.join(words[: 1 + i])} and",
            "choices": [f" {words[i]}", f" {words[i + 3]} {words[i + 1]}", " the sky"],
            "answer": i % 3,
        }
        for i in range(11)
    ]
    (folder / "choices.json").write_text(json.dumps(questions))
    texts = [{"text": " ".join(words[i % 18] for i in range(n))} for n in (1, 30, 127, 128, 300)]
    (folder / "texts.json").write_text(json.dumps(texts))
    for name, text in zip(TASKS, (CHOICES, TEXTS, ANSWERS)):
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("DISABLE_MULTIPROC", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def theirs(folder):
    """The tasks by lm-eval's backend `hf`, and that backend."""
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(pretrained=str(folder / "model"), device="cpu", batch_size=3, dtype="float32")
    manager = benchmarks.find_tasks(TASKS, str(folder))
    found = lm_eval.simple_evaluate(backend, tasks=TASKS, task_manager=manager, log_samples=False)
    return backend, found["results"]


def numbers(results) -> dict[tuple[str, str], float]:
    return {
        (task, name): value
        for task, metrics in results.items()
        for name, value in metrics.items()
        if isinstance(value, float)
    }


def test_scores_are_those_of_the_backend_hf(folder, theirs):
    model = load_model(str(folder / "model"))
    manager = benchmarks.find_tasks(TASKS, str(folder))
    found = benchmarks.run_tasks(model, TASKS, manager, batch_size=4)
    expected = numbers(theirs[1])
    assert {task for task, _ in expected} == set(TASKS) and len(expected) >= 6
    assert numbers(found) == pytest.approx(expected, rel=1e-5)


def test_each_request_is_answered_as_by_the_backend_hf(folder, theirs):
    """Log-likelihoods to rounding, and texts word by word; of contexts that are empty or too long,
    too."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

    ours = type("Ours", (benchmarks._Backend, TemplateLM), {})(
        load_model(str(folder / "model")), 4, 128, {}
    )

    def requests(kind, *arguments):
        return [Instance(kind, {}, one, 0) for one in arguments]

    long = " ".join(tiny.WORDS[i % 18] for i in range(200))
    pairs = [("say red", " blue"), ("", "the sky"), (long, " is green"), ("say ", "two names")]
    asked = requests("loglikelihood", *pairs, ("a" * 140, " fire"))
    for mine, other in zip(ours.loglikelihood(asked), theirs[0].loglikelihood(asked)):
        assert mine[0] == pytest.approx(other[0], rel=1e-5) and mine[1] == other[1]
    contexts = "say red", long, "the colour of", "name one"
    asked = requests(
        "generate_until",
        *((text, {"until": ["q"], "max_gen_toks": 20}) for text in contexts),
        *((text, {"until": " ", "max_gen_toks": 7, "do_sample": False}) for text in contexts),
    )
    assert ours.generate_until(asked) == theirs[0].generate_until(asked)
    context = ours.tok_encode("say red")
    tokens = [(("", str(token)), context, [token]) for token in range(ours._vocab_size)]
    values = ours._loglikelihood_tokens(tokens)
    assert sum(greedy for _, greedy in values) == 1
    assert [x[1] for x in theirs[0]._loglikelihood_tokens(tokens)] == [x[1] for x in values]


def test_requests_are_put_into_the_chat_template(folder):
    from lm_eval.api.model import TemplateLM

    model = load_model(str(folder / "model"))
    template = "{% for m in messages %}{{ m['role'] }} {{ mood }}: {{ m['content'] }}{% endfor %}"
    model.tokenizer.chat_template = template
    backend = type("Ours", (benchmarks._Backend, TemplateLM), {})(model, 4, 128, {"mood": "glad"})
    asked = backend.apply_chat_template([{"role": "user", "content": "say red"}])
    assert asked == "user glad: say red" and backend.chat_template(True) == template


def arguments(folder, output, *more: str) -> list[str]:
    return [
        *(f"--model={folder / 'model'}", f"--output={output}", "--batch-size=4"),
        *("--tasks=tiny_choices,tiny_texts,tiny_answers", f"--task-folder={folder}", *more),
    ]


def test_the_command_writes_every_task_and_goes_on(folder, tmp_path, theirs, capsys, monkeypatch):
    main(["evaluate", *arguments(folder, tmp_path)])
    printed = capsys.readouterr().out
    assert "| tiny_choices | model | acc " in printed and "ROUGE-L" not in printed
    text = (tmp_path / "evaluation.json").read_text()
    found = json.loads(text)["models"]["model"]["tasks"]
    assert numbers(found) == pytest.approx(numbers(theirs[1]), rel=1e-5)
    monkeypatch.setattr(benchmarks, "_scorer", None)  # all of it is there
    monkeypatch.setattr(benchmarks, "generate_responses", None)
    main(["evaluate", *arguments(folder, tmp_path)])
    assert (tmp_path / "evaluation.json").read_text() == text
    with pytest.raises(SystemExit, match="config.max_length: there None, now 100"):
        main(["evaluate", *arguments(folder, tmp_path, "--max-length=100")])
    others = shutil.copytree(folder, tmp_path / "others", ignore=lambda *_: ["model"])
    some = next(others.glob("*.yaml"))
    some.write_text(some.read_text() + "# other\n")
    with pytest.raises(SystemExit, match="config.task_folder: there"):
        main(["evaluate", *arguments(folder, tmp_path, f"--task-folder={others}")])
    with pytest.raises(
        SystemExit, match="config.chat_template_kwargs.mood: there None, now 'glad'"
    ):
        main(["evaluate", *arguments(folder, tmp_path, '--chat-template-kwargs={"mood": "glad"}')])
    with pytest.raises(SystemExit, match="--system: is for --data"):
        main(["evaluate", *arguments(folder, tmp_path, "--system=Be kind.")])


def test_tasks_that_there_are_not(folder, tmp_path):
    with pytest.raises(SystemExit, match="--tasks: lm-eval has no tiny_choice, poems"):
        main(["evaluate", *arguments(folder, tmp_path, "--tasks=tiny_choice,tiny_texts,poems")])
