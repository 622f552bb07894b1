"""A hub id is the folder that it stands for, and nothing else of its repository is fetched."""

import json
import pathlib
import shutil

import pytest
from helpers import tiny
from helpers.models import assert_same_params
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from promptkd_jax.cli.main import main
from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.infra.files import to_path
from promptkd_jax.models.io import export, hub, identity
from promptkd_jax.models.io.convert import convert
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.load import (
    load_model,
    load_with_tokenizer,
    load_without_weights,
    training_record,
)
from promptkd_jax.plan.abstract_run import stored_config

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}>"
OTHERS = (  # what lies beside safetensors in repositories
    *("pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors", "tf_model.h5"),
    *("original/consolidated.00.pth", "onnx/model.onnx", "onnx/model.safetensors", "model.gguf"),
)


class Hub:
    """Folders as repositories, by (name, revision); remembers which files were fetched."""

    def __init__(self, cache: pathlib.Path):
        self.cache, self.repositories, self.fetched = cache, {}, set()

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None):
        source = self.repositories.get((repo_id, revision))
        if source is None:
            raise LocalEntryNotFoundError(f"404: {repo_id} at {revision}")
        files = [str(x.relative_to(source)) for x in source.rglob("*") if x.is_file()]
        snapshot = self.cache / repo_id.replace("/", "--") / (revision or "main")
        snapshot.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            self.fetched.add(name)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, snapshot / name)
        return str(snapshot)


@pytest.fixture
def repository(tmp_path):
    """A model in shards, its template in a file of its own, among other formats."""
    folder = tmp_path / "repository"
    model = load_model(tiny.write_model(tmp_path / "model", width=16, depth=2, seed=0))
    model.tokenizer.chat_template = TEMPLATE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SHARD_BYTES", 6000)
        save_model(folder, model)
    for name in OTHERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"another format")
    return folder


@pytest.fixture
def there(tmp_path, repository, monkeypatch):
    """The hub, with that repository."""
    made = Hub(tmp_path / "cache")
    made.repositories["owner/name", None] = repository
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


def test_what_is_fetched_is_the_model_with_its_template(there, repository, capsys):
    model = load_with_tokenizer("owner/name", dtype="float32")
    assert_same_params(model, load_model(str(repository)))
    assert model.tokenizer.chat_template == TEMPLATE
    assert model.card == {"base_model": "owner/name"}
    assert not there.fetched & set(OTHERS)
    shards = {x.name for x in repository.glob("model-*-of-*.safetensors")}
    assert len(shards) > 2 and shards <= there.fetched
    ask = ["--request=say red", "--max-new-tokens=4"]
    for name in ("owner/name", str(repository)):
        main(["generate", "--model", name, *ask])
    said = capsys.readouterr().out  # twice the same, of however many lines
    assert said[: len(said) // 2] == said[len(said) // 2 :]


def test_a_model_without_weights_is_fetched_without_them(there, repository):
    expected = load_model(str(repository))
    model = load_without_weights("owner/name")
    assert model.params is None and model.decoder.config == expected.decoder.config
    assert model.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert (model.eos_ids, model.card) == (expected.eos_ids, {})
    assert training_record("owner/name", weights=False) == {}
    assert there.fetched and not any(name.endswith(".safetensors") for name in there.fetched)


def test_a_single_file_is_fetched(there, repository, tmp_path):
    folder = there.repositories["owner/one", None] = tmp_path / "one"
    expected = load_model(str(repository))
    save_model(folder, expected)
    (folder / "model.fp16.safetensors").write_bytes(b"another format")
    assert_same_params(load_model("owner/one"), expected)
    assert "model.safetensors" in there.fetched and "model.fp16.safetensors" not in there.fetched


def test_a_single_file_is_fetched_before_an_index(there, repository, tmp_path):
    other = tiny.write_model(tmp_path / "other", width=16, depth=2, seed=7)
    shutil.copy(pathlib.Path(other) / "model.safetensors", repository)
    assert_same_params(load_model("owner/name"), load_model(other))
    assert not any(file.startswith("model-") for file in there.fetched)


@pytest.mark.parametrize("revision", ["v1.0", "0123abc", "refs/pr/7"])
def test_a_revision_is_another_model(there, tmp_path, revision):
    other = tiny.write_model(tmp_path / "other", width=16, depth=1, seed=3)
    there.repositories["owner/name", revision] = pathlib.Path(other)
    name = f"owner/name@{revision}"
    assert_same_params(load_model(name), load_model(other))
    assert load_model("owner/name").decoder.config.num_layers == 2
    assert stored_config(name)[0]["num_hidden_layers"] == 1
    with pytest.raises(ModelError, match="'owner/name@absent'.*revision 'absent': 404"):
        load_model("owner/name@absent")


def test_nothing_large_is_fetched_of_what_is_refused(there, repository):
    config = repository / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match="quantised .awq."):
        load_model("owner/name")
    config.write_text(json.dumps(fields | {"model_type": "mamba"}))
    with pytest.raises(ModelError, match="model_type 'mamba' is not supported"):
        load_model("owner/name")
    assert there.fetched and not any("safetensors" in x and "json" not in x for x in there.fetched)


def test_a_repository_of_pickles_is_named_with_the_remedy(there, tmp_path, repository):
    folder = there.repositories["owner/old", None] = tmp_path / "old"
    folder.mkdir()
    shutil.copy(repository / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    there.repositories["owner/old", "v1"] = folder
    with pytest.raises(
        ModelError, match=r"no such file(.|\n)*converted(.|\n)*REVISION(.|\n)*refs/pr"
    ):
        load_model("owner/old")
    for name in ("owner/old@v1", "owner/old"):
        with pytest.raises(ModelError, match=f"promptkd convert --model {name} --output converted"):
            load_model(name)
    assert "pytorch_model.bin" not in there.fetched
    with pytest.raises(ModelError, match=r"torch's loader of weights alone refuses it|torch is ne"):
        convert("owner/old", tmp_path / "converted")
    assert "pytorch_model.bin" in there.fetched


def test_short_names_are_those_of_their_owners(there, repository):
    there.repositories["openai-community/gpt2", None] = repository
    there.repositories["distilbert/distilgpt2", "v1"] = repository
    expected = load_model(str(repository))
    assert_same_params(load_model("gpt2"), expected)
    assert_same_params(load_model("distilgpt2@v1"), expected)
    with pytest.raises(
        ModelError, match="'gpt2-xl'.*the hub says of openai-community/gpt2-xl: 404"
    ):
        load_model("gpt2-xl")
    assert stored_config("gpt2-xl") == stored_config("openai-community/gpt2-xl")


@pytest.mark.parametrize("name", ["mine", "a/b/c", "owner/name@", "@v1", "owner/name@a@b", "a b/c"])
def test_names_that_are_no_hub_ids(there, name):
    with pytest.raises(ModelError, match="not a hub id: owner/name, or owner/name@revision"):
        hub.resolve_model(name)
    assert not there.fetched


def test_a_folder_comes_before_the_hub(there, repository, monkeypatch):
    monkeypatch.chdir(repository.parent)
    for name in ("gpt2", "owner/name@v1"):
        shutil.copytree(repository, repository.parent / name)
        assert load_model(name).decoder.config.num_layers == 2
    assert not there.fetched


def test_a_tilde_is_the_home_folder(tmp_path, repository, monkeypatch):
    """No shell expands that of --config.student.path=~/model."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same_params(load_model("~/repository"), load_model(str(repository)))
    assert stored_config("~/repository") == stored_config(str(repository))
    tiny.write_data(tmp_path / "data.jsonl", 3)
    assert len(read_records("~/data.jsonl", need="response")) == 3
    assert to_path("~/runs/one") == to_path(tmp_path / "runs/one")
    assert str(to_path("gs://bucket/~")) == "gs://bucket/~"


def test_a_commit_stands_for_the_content(there, repository, monkeypatch):
    """70 billion parameters are not hashed again at each start."""
    commit = "0123456789" * 4
    there.repositories["owner/name", commit] = repository
    assert identity.weights_digest("owner/name").startswith("sha256 ")  # what folder is "main"?
    monkeypatch.setattr(identity, "_file_digest", None)
    assert identity.weights_digest(f"owner/name@{commit}") == f"owner/name@{commit}"


def test_a_folder_of_models_names_them(tmp_path):
    """As `promptkd export` writes one: a student in a folder of its own."""
    for name in ("student", "teacher"):
        tiny.write_model(tmp_path / "export" / name, width=16, depth=1, seed=0)
    (tmp_path / "export" / "soft_prompt").mkdir()
    student, teacher = (tmp_path / "export" / name for name in ("student", "teacher"))
    for load in (load_model, stored_config):
        with pytest.raises(
            ModelError, match=f"is no model, but has some: give {student} or {teacher}"
        ):
            load(str(tmp_path / "export"))
