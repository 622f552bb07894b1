"""Tokenizers with more tokens than rows, or other special tokens: only their use is refused."""

import json

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.files import write_lines
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from promptkd_jax.cli.main import main
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError, DataError, ModelError
from promptkd_jax.infra.files import to_path
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.load import load_model, load_with_tokenizer, load_without_weights
from promptkd_jax.models.model import Model
from promptkd_jax.plan.remat import with_chosen_remat
from promptkd_jax.training import run as training
from promptkd_jax.training.config.checks import checked
from promptkd_jax.training.config.config_file import as_json
from promptkd_jax.training.prepare import prepare
from promptkd_jax.training.recipes import method_stage, stage_config
from promptkd_jax.training.run_data import load_data
from promptkd_jax.training.run_models import ended_alike, shared_vocabulary

pytestmark = pytest.mark.usefixtures("no_report")

VOCABULARY = len(tiny.tokenizer())


def with_special(*tokens: str) -> PreTrainedTokenizerFast:
    words = tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": list(tokens)})
    return words


def write(folder, *tokens: str, pad: int = 0, width: int = 16) -> str:
    """A model whose tokenizer has these special tokens behind the others."""
    return tiny.write_model(
        folder, width=width, depth=2, seed=width, words=with_special(*tokens), pad=pad
    )


@pytest.fixture
def config(tmp_path):
    """Of one stage, in which student and teacher are looked at."""
    config = tiny.short_config(tmp_path / "inputs")
    config.stages = (stage_config("kd", steps=2, batch_size=4, learning_rate=1e-3),)
    config.evaluation.every = 0
    return config


def run(config, workdir):
    return training.run(checked(config), workdir, with_chosen_remat)


def cut(path: str, folder) -> str:
    """The model without the rows and the tokens behind those of `tiny.tokenizer()`."""
    model = load_model(path)
    rows = model.decoder.config.vocab_size
    params = jax.tree.map(lambda x: x[:VOCABULARY] if len(x) == rows else x, model.params)
    decoder = Decoder(model.decoder.config.replace(vocab_size=VOCABULARY))
    hf_config, words = {**model.hf_config, "vocab_size": VOCABULARY}, tiny.tokenizer()
    save_model(folder, Model(str(folder), decoder, params, hf_config, words, (0,)))
    return str(folder)


def test_what_only_one_of_them_has_is_cut_off(config, tmp_path, capsys):
    """Differing special tokens and padding change no number of a run: what the teacher writes, both
    updates and the measures are those of models without them."""
    config.teacher.path = write(tmp_path / "teacher", "<think>", "</think>", pad=5, width=32)
    config.student.path = write(tmp_path / "student", "<tool>", pad=2)
    terms = (("forward_kl", 1.0),)
    how = dict(targets="teacher", teacher_view="prompted", student_terms=terms)
    config.stages = (stage_config("kd", steps=1, batch_size=4, learning_rate=1e-2, **how),)
    summary = run(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"share the tokens 0 to {VOCABULARY - 1}; special tokens behind them are cut" in said
    assert said.count(f"{VOCABULARY} (<think> of the teacher, <tool> of the student)") == 1
    written = load_model(str(tmp_path / "run" / "student"))
    assert "<tool>" in written.tokenizer.get_vocab()
    for name in ("teacher", "student"):
        config[name].path = cut(config[name].path, tmp_path / f"{name}_cut")
    plain = run(config, tmp_path / "plain")
    assert "share the tokens" not in capsys.readouterr().out
    assert summary["kl_after"] == pytest.approx(plain["kl_after"], rel=1e-5)
    other = load_model(str(tmp_path / "plain" / "student"))
    norms = (m.params["layers"]["attention"] for m in (written, other))
    for found, expected in zip(*map(jax.tree.leaves, norms)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_cached_log_probs_are_over_what_both_have(config, tmp_path):
    config.teacher.path = write(tmp_path / "teacher", "<think>", width=32)
    config.student.path = write(tmp_path / "student", "<tool>", "<call>", pad=2)
    config.evaluation.teacher = False
    config.stages[0].update(teacher_view="cached", student_terms=(("forward_kl", 1.0),))
    config.cache.update(path=str(tmp_path / "cache"), top_k=4)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"config": as_json(config)}))
    main(["cache", f"--config={file}", "--output", config.cache.path, "--top-k=4"])
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    with jax.set_mesh(mesh):
        made = prepare(checked(config), to_path(tmp_path / "run"), mesh)
    assert made.teacher is None and made.vocab_size == VOCABULARY


def test_a_token_without_a_row_is_refused_where_it_is_used(config, tmp_path, capsys):
    """As the padding token that was added to many a tokenizer, and not to its model."""
    path = tiny.write_model(
        tmp_path / "model", width=16, depth=2, seed=0, extra=("Ġpurple",), pad=-1
    )
    model = load_with_tokenizer(path, dtype="float32")
    assert model.vocab_size == VOCABULARY == model.tokenizer.get_vocab()["Ġpurple"]
    ask = ["generate", f"--model={path}", "--template=plain", "--max-new-tokens=2"]
    main([*ask, "--request=say red"])
    fault = rf"token 'Ġpurple' has the id {VOCABULARY}, but .* are 0 to {VOCABULARY - 1}"
    with pytest.raises(SystemExit, match=fault):
        main([*ask, "--request=say purple"])
    config.teacher.path = config.student.path = path
    student = load_without_weights(path)
    rows = load_data(checked(config), student).train
    lines = [{"instruction": "say red", "output": f"the {x}"} for x in ("red", "purple")]
    config.data.train = write_lines(tmp_path / "purple.jsonl", *lines)
    with pytest.raises(DataError, match=rf"purple\.jsonl:2: {fault}"):
        load_data(checked(config), student)
    assert max(map(max, rows.tokens)) < VOCABULARY
    (tmp_path / "corpus.txt").write_text("the red\n" * 20 + "the purple sky\n")
    config.data.update(train=config.data.dev, corpus=str(tmp_path / "corpus.txt"))
    config.stages[0].corpus_terms = (("cross_entropy", 1.0),)
    with pytest.raises(DataError, match=f"document that begins 'the purple sky': {fault}"):
        load_data(checked(config), student)
    ended = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    ended = json.dumps(ended | {"eos_token_id": VOCABULARY})
    (tmp_path / "model" / "generation_config.json").write_text(ended)
    with pytest.raises(ModelError, match=f"eos_token_id {VOCABULARY} is no token"):
        load_with_tokenizer(path, dtype="float32")


def test_a_soft_prompt_starts_at_a_token_that_the_teacher_has(config, tmp_path):
    words = with_special("<pad>")
    words.pad_token = "<pad>"
    teacher = tiny.write_model(tmp_path / "teacher", width=16, depth=2, seed=0, words=words, pad=-1)
    config.teacher.path, config.soft_prompt.init = teacher, "pad"
    config.stages = (method_stage("promptkd", steps=1, batch_size=4),)
    with pytest.raises(ConfigError, match=r"soft_prompt.init: 'pad': token '<pad>' has the id"):
        run(config, tmp_path / "run")


def models(*words: PreTrainedTokenizerFast) -> list[Model]:
    """Teacher and student with these tokenizers, without parameters."""
    config = tiny.llama_config(width=16, depth=1, vocab_size=VOCABULARY + 8)
    decoder = Decoder(from_hugging_face(config))
    names = ("teacher", "student")
    return [Model(name, decoder, None, config, x, (0,)) for name, x in zip(names, words)]


def test_a_special_token_of_one_of_them_is_refused_in_rows(config, tmp_path):
    config.data.update(template="chat", max_prompt_length=32, max_length=40)
    student = with_special("[turn]", "<tool>")
    student.chat_template = (
        "{% for m in messages %}[turn]{{ m.role }} {{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}[turn]assistant {% endif %}"
    )
    pair = ended_alike(checked(config), *models(with_special("<think>", "<tool>"), student))
    assert [m.vocab_size for m in pair] == [VOCABULARY, VOCABULARY]
    with pytest.raises(
        DataError, match=rf"train.jsonl:1, 2, .*: token '.turn.' has the id {VOCABULARY}"
    ):
        load_data(checked(config), pair[1])
    student.chat_template = student.chat_template.replace("<end>", "[turn]")
    with pytest.raises(ModelError, match=r"rows end with '.turn.' .*share only the tokens 0 to"):
        ended_alike(checked(config), *models(with_special("<think>"), student))


def test_tokenizers_that_differ_elsewhere_are_refused():
    teacher, student = models(with_special("<a>", "<b>"), with_special("<a>", "<c>"))
    assert shared_vocabulary(teacher, student) == VOCABULARY + 1  # <a> is of both
    alike = models(with_special("<a>"), with_special("<a>"))
    assert shared_vocabulary(*alike) == VOCABULARY + 1
    plain = models(tiny.tokenizer(("Ġpurple",)), tiny.tokenizer(("Ġpink",)))
    listed = rf"1 of {VOCABULARY + 1} ids are other tokens, such as {VOCABULARY} \(Ġpurple of the"
    with pytest.raises(ModelError, match=listed):
        shared_vocabulary(*plain)
    first = tiny.tokenizer()
    state = json.loads(first.backend_tokenizer.to_str().replace("<end>", "<eos>"))
    renamed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<eos>"
    )
    with pytest.raises(ModelError, match=r"such as 0 \(<end> of the teacher, <eos> of the stud"):
        shared_vocabulary(*models(first, renamed))
