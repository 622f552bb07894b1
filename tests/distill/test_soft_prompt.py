"""The soft prompt stands where its tokens would stand, for us and for PEFT."""

import json
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, TOKENIZERS
from helpers import bucket
from helpers.models import LENGTHS, PREFIX, TOKENS, WIDTH, logits, make_pair, random_model
from packaging.version import Version
from safetensors.numpy import load_file, save_file

from promptkd_jax.distill.soft_prompt import init_soft_prompt, pooled_soft_prompt
from promptkd_jax.infra import distributed
from promptkd_jax.infra.errors import ModelError
from promptkd_jax.models.io.peft import load_soft_prompt, save_soft_prompt
from promptkd_jax.models.language_model import LanguageModel
from promptkd_jax.models.layers.gated_prefix import GatedPrefix
from promptkd_jax.models.sampler import row_keys, sample
from promptkd_jax.models.sampling_rules import Sampling

STUDENT = [15979, 577, 345, 389, 257, 3710, 13]  # "Suppose you are a student." for GPT-2
needs_adapters = pytest.mark.parametrize(
    "folder",
    [
        pytest.param(folder, id=str(folder.relative_to(GOLDEN)))
        for folder in sorted(GOLDEN.glob("**/teacher_prompt_adapter"))
    ],
)


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def pair(request, tmp_path_factory):
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def adapted(pair, tmp_path_factory):
    """The teacher of `pair` behind our prompt, as PEFT loads it."""
    peft = pytest.importorskip("peft", reason="adapters are checked against PEFT")
    folder = tmp_path_factory.mktemp("adapter")
    hf_config = pair.model.hf_config
    save_soft_prompt(folder, PREFIX, teacher=str(pair.folder), hf_config=hf_config)
    return peft.PeftModel.from_pretrained(pair.reference, folder).eval()


@pytest.fixture
def adapter(tmp_path):
    """A saved prompt."""
    hf_config = random_model("gpt2").hf_config
    save_soft_prompt(tmp_path, jnp.asarray(PREFIX), teacher="teacher", hf_config=hf_config)
    return tmp_path


# Where it starts.


@pytest.mark.parametrize("length", [1, 3, 7, 8, 20])
def test_the_first_prompt_repeats_and_cuts_its_tokens(length):
    model = random_model("gpt2")
    params = model.params
    ids = [9, 2, 44, 2, 17, 3, 100]
    found = init_soft_prompt(model.decoder, params, ids, length)
    expected = params["embed"]["embedding"][[ids[i % 7] for i in range(length)]]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


def test_the_first_prompt_of_a_half_precision_teacher_is_float32():
    model = random_model("gpt2")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    found = init_soft_prompt(model.decoder, params, [4, 5], 3)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, params["embed"]["embedding"][[4, 5, 4]])


def test_no_tokens_to_start_from():
    with pytest.raises(ValueError, match="at least one token"):
        model = random_model("gpt2")
        init_soft_prompt(model.decoder, model.params, [], 5)


def test_the_published_text_in_gpt2_tokens():
    folder = TOKENIZERS / "gpt2"
    if not folder.exists():
        pytest.skip(f"no GPT-2 tokenizer under {TOKENIZERS} (set PROMPTKD_TOKENIZERS)")
    from transformers import GPT2TokenizerFast

    tokenizer = GPT2TokenizerFast.from_pretrained(folder)
    ids = tokenizer("Suppose you are a student.", add_special_tokens=False).input_ids
    assert ids == STUDENT


# Where it stands.


@pytest.mark.parametrize("name", ["gpt2", "opt", "mistral"])
def test_a_prompt_of_real_tokens_is_their_text(name):
    """Learned positions, with and without offset, rotary ones, and a window that slides past it."""
    model = random_model(name)
    text = [9, 2, 44, 17, 30]
    soft = logits(model, prefix=init_soft_prompt(model.decoder, model.params, text, 5))
    hard = logits(model, np.concatenate([np.tile(np.int32(text), (3, 1)), TOKENS], axis=1))
    np.testing.assert_allclose(soft, hard[:, 5:], rtol=0, atol=1e-5)
    assert np.abs(soft - logits(model)).max() > 0.5


# Files.


def test_load_after_save_is_bit_equal(adapter):
    found = load_soft_prompt(adapter)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, PREFIX)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["num_virtual_tokens"], config["token_dim"]) == PREFIX.shape
    assert (config["num_layers"], config["num_attention_heads"]) == (3, 4)
    assert config["base_model_name_or_path"] == "teacher"


def test_half_precision_is_saved_as_float32(tmp_path):
    half = jnp.asarray(PREFIX, jnp.bfloat16)
    save_soft_prompt(tmp_path, half, teacher="teacher", hf_config=random_model("opt").hf_config)
    stored = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(load_soft_prompt(tmp_path), half.astype(jnp.float32))


def test_a_gated_prompt_is_no_adapter_of_peft(tmp_path):
    prefix = GatedPrefix(PREFIX, np.float32([[0.0, 0.5, 0.25, 1.0]] * 3))
    hf_config = random_model("opt").hf_config
    save_soft_prompt(tmp_path, prefix, teacher="teacher", hf_config=hf_config)
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "gated_prompt.safetensors"}
    assert "Not a PEFT adapter" in (tmp_path / "README.md").read_text()
    found = load_soft_prompt(tmp_path)
    np.testing.assert_array_equal(found.vectors, prefix.vectors)
    np.testing.assert_array_equal(found.gates, prefix.gates)
    # Either form takes the place of the other.
    save_soft_prompt(tmp_path, prefix.vectors, teacher="teacher", hf_config=hf_config)
    np.testing.assert_array_equal(load_soft_prompt(tmp_path), prefix.vectors)
    assert not (tmp_path / "gated_prompt.safetensors").exists()
    outside = prefix.replace(gates=prefix.gates * 2)
    save_soft_prompt(tmp_path, outside, teacher="teacher", hf_config=hf_config)
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "gated_prompt.safetensors"}
    with pytest.raises(ModelError, match=r"safetensors: gates from 0 to 2; expected 0 to 1"):
        load_soft_prompt(tmp_path)


@needs_adapters
def test_adapters_that_peft_wrote_are_read(folder):
    found = load_soft_prompt(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert found.shape == (config["num_virtual_tokens"], config["token_dim"])
    expected = np.load(folder.parent / "expected.npz")["prompt_after"]
    np.testing.assert_allclose(found, expected[-1], rtol=0, atol=1e-6)


def test_adapters_of_another_kind(adapter):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelError, match=f"{file}: peft_type is 'LORA'; only PROMPT_TUNING"):
        load_soft_prompt(adapter)


def test_adapters_with_other_tensors(adapter):
    save_file({"base_model.lora_A": PREFIX}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"prompt_embeddings, found \['base_model.lora_A'\]"):
        load_soft_prompt(adapter)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (np.where(np.arange(WIDTH) == 3, np.nan, PREFIX), "prompt_embeddings is not finite"),
        (PREFIX.astype(np.int8), r"prompt_embeddings is int8 .*; expected floating point"),
        (PREFIX[0], r"prompt_embeddings is float32 \[48\]; expected .* \[tokens, width\]"),
    ],
    ids=["nan", "integers", "one row"],
)
def test_vectors_that_are_no_prompt(adapter, tensor, message):
    save_file({"prompt_embeddings": tensor}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=message):
        load_soft_prompt(adapter)


def test_a_damaged_adapter(adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"{file}: damaged or truncated"):
        load_soft_prompt(adapter)
    file.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    with pytest.raises(ModelError, match=f"{file}: is a Git LFS pointer"):
        load_soft_prompt(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="adapter_config.json:1: not JSON"):
        load_soft_prompt(adapter)


@pytest.mark.parametrize(
    ("teacher", "base", "revision"),
    [("owner/name@v1", "owner/name", "v1"), ("owner/name", "owner/name", None)],
)
def test_an_adapter_names_the_revision_of_its_teacher(tmp_path, teacher, base, revision):
    """In the fields from which PEFT loads it."""
    hf_config = random_model("gpt2").hf_config
    save_soft_prompt(tmp_path, jnp.asarray(PREFIX), teacher=teacher, hf_config=hf_config)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (base, revision)


def test_an_adapter_of_a_run_names_the_folder_of_its_student(tmp_path):
    """Which PEFT can open."""
    for folder, content in (("run", {"fingerprint": "x"}), ("run/student", {})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(content))
    hf_config, teacher = random_model("gpt2").hf_config, str(tmp_path / "run")
    save_soft_prompt(tmp_path / "out", jnp.asarray(PREFIX), teacher=teacher, hf_config=hf_config)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "run/student")
    assert config["revision"] is None


def test_missing_files(adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=f"{weights}: no such file"):
        load_soft_prompt(adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=f"{adapter}/adapter_config.json: no such file"):
        load_soft_prompt(adapter)


# With PEFT.


def peft_logits(adapted, **inputs) -> np.ndarray:
    import torch

    with torch.no_grad():
        inputs = {name: torch.tensor(array) for name, array in inputs.items()}
        return adapted(**inputs, use_cache=False).logits[:, len(PREFIX) :].numpy()


def test_peft_computes_the_logits_of_our_prompted_teacher(pair, adapted):
    """The prompt takes the positions 0 to M - 1 there too."""
    found = peft_logits(adapted, input_ids=TOKENS)
    np.testing.assert_allclose(found, logits(pair.model, prefix=PREFIX), rtol=0, atol=1e-4)


def test_peft_with_padding_behind_the_rows(pair, adapted):
    """OPT counts positions by its mask: rows that start at column 0 keep theirs."""
    real = np.arange(TOKENS.shape[1]) < LENGTHS[:, None]
    found = peft_logits(adapted, input_ids=TOKENS, attention_mask=real.astype(np.int64))
    expected = logits(pair.model, prefix=PREFIX)
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=1e-4)


def test_peft_drops_positions_that_do_not_count_the_prompt(adapted):
    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape).copy()
    with pytest.warns(UserWarning, match="[Pp]osition ids are not supported"):
        found = peft_logits(adapted, input_ids=TOKENS, position_ids=positions)
    np.testing.assert_array_equal(found, peft_logits(adapted, input_ids=TOKENS))


def cache_is_not_found() -> bool:
    """Whether PEFT takes every step for the first, as the adapter's card warns."""
    version = {name: Version(metadata.version(name)) for name in ("peft", "transformers")}
    return version["peft"] <= Version("0.21.2") and version["transformers"] >= Version("5.24")


@pytest.mark.parametrize("use_cache", [True, False])
def test_peft_generates_what_we_sample_behind_the_prompt(request, pair, adapted, use_cache):
    import torch

    if use_cache and cache_is_not_found():
        request.applymarker(pytest.mark.xfail(strict=True, reason="PEFT does not find the cache"))

    model = pair.model
    row = TOKENS[:1, :6]
    out = jax.jit(
        lambda params, prefix: sample(
            model.decoder,
            params,
            row,
            np.int32([6]),
            row_keys(jax.random.key(0), np.arange(1)),
            max_new_tokens=16,
            sampling=Sampling(temperature=0.0),
            prefix=prefix,
        )
    )(model.params, PREFIX)
    found = adapted.generate(
        input_ids=torch.tensor(row),
        attention_mask=torch.ones(row.shape, dtype=torch.long),
        max_new_tokens=16,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=None,
    )
    assert found[0].tolist() == out.tokens[0].tolist()


def test_a_long_text_is_pooled():
    params = {"embed": {"embedding": jax.random.normal(jax.random.key(0), (14, 3))}}
    model = LanguageModel(None, None, lambda params, tokens: params["embed"]["embedding"][tokens])
    ids = np.arange(14)
    pairs = np.asarray(init_soft_prompt(model, params, ids, 14)).reshape(7, 2, -1)
    pooled = pooled_soft_prompt(model, params, ids, 7)
    np.testing.assert_allclose(pooled, pairs.mean(axis=1), rtol=1e-6)
    exact = init_soft_prompt(model, params, ids[:7], 7)
    np.testing.assert_array_equal(pooled_soft_prompt(model, params, ids[:7], 7), exact)
    np.testing.assert_array_equal(
        pooled_soft_prompt(model, params, ids[:3], 7),
        init_soft_prompt(model, params, ids[:3], 7),
    )


def test_the_card_says_which_versions_generate_the_right_text(adapter):
    front, card = (adapter / "README.md").read_text().removeprefix("---\n").split("\n---\n")
    assert "library_name: peft" in front
    assert f"{len(PREFIX)} tokens" in card
    assert "5.24.0" in card and "use_cache=False" in card


# Buckets, and other processes.


def test_an_adapter_in_a_bucket_is_bit_equal(monkeypatch):
    folder, _ = bucket.make(monkeypatch)
    config = random_model("opt").hf_config
    save_soft_prompt(folder / "soft_prompt", PREFIX, teacher="teacher", hf_config=config)
    np.testing.assert_array_equal(load_soft_prompt(f"{folder}/soft_prompt"), PREFIX)


def test_other_processes_write_no_adapter(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    config = random_model("opt").hf_config
    save_soft_prompt(tmp_path / "new", PREFIX, teacher="teacher", hf_config=config)
    assert list(tmp_path.iterdir()) == []
