"""Helpers of several tests: a tokenizer, random models as folders, a short config, equations."""

import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from ml_collections import ConfigDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.model import Model
from promptkd_jax.training.recipes import base_config, method_stage, sampling_config, stage_config

WORDS = (
    *("red", "blue", "green", "say", "a", "the", "colour", "of", "sky", "grass"),
    *("fire", "is", "and", "or", "two", "three", "name", "one"),
)


def tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Words and bytes as tokens; `<end>` is 0 and both EOS and padding."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = ["<end>", *sorted(alphabet), *(f"Ġ{word}" for word in WORDS), *extra]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", bos_token="<end>"
    )


def llama_config(*, width: int, depth: int, vocab_size: int) -> dict:
    """A Llama's config.json with grouped heads."""
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def write_model(
    folder: pathlib.Path,
    *,
    width: int,
    depth: int,
    seed: int,
    pad: int = 0,
    extra: tuple[str, ...] = (),
    words: PreTrainedTokenizerFast | None = None,
) -> str:
    """A random Llama as a folder with its tokenizer, `words` or that of `tokenizer(extra)`; `pad`
    unused rows end its vocabulary."""
    words = words or tokenizer(extra)
    hf_config = llama_config(width=width, depth=depth, vocab_size=len(words) + pad)
    decoder = Decoder(from_hugging_face(hf_config))

    @jax.jit  # one program, not one of each operation
    def random_params(key):
        params = decoder.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
        return jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)  # not too uniform

    params = random_params(jax.random.key(seed))
    save_model(folder, Model(str(folder), decoder, params, hf_config, words, (0,)))
    return str(folder)


def write_data(file: pathlib.Path, rows: int) -> str:
    """JSON lines with answers."""
    lines = [
        {"instruction": f"say {WORDS[i % 7]} {WORDS[i % 5]}", "output": f"the {WORDS[i % 11]}"}
        for i in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def short_config(folder: pathlib.Path, *, pad: int = 0) -> ConfigDict:
    """A warm-up of 3 updates and 4 of PromptKD, on files in `folder` (made where absent)."""
    if not folder.exists():
        folder.mkdir(parents=True)
        write_model(folder / "teacher", width=32, depth=3, seed=0, pad=pad)
        write_model(folder / "student", width=16, depth=2, seed=1, pad=pad)
        write_data(folder / "train.jsonl", 12)
        write_data(folder / "dev.jsonl", 5)
    config = base_config()
    config.title = "tiny"
    config.teacher.path = str(folder / "teacher")
    config.student.path = str(folder / "student")
    config.teacher.remat = config.student.remat = "auto"
    config.data.train = str(folder / "train.jsonl")
    config.data.dev = str(folder / "dev.jsonl")
    config.data.template = "plain"
    config.data.max_prompt_length = 16
    config.data.max_length = 24
    config.teacher_responses.update(batch_size=4, sampling=sampling_config())
    config.evaluation.update(every=2, batch_size=4, samples=2)
    config.checkpoint.every = 1
    config.stages = (
        stage_config(
            "warmup",
            steps=3,
            targets="teacher",
            student_terms=(("forward_kl", 0.5), ("cross_entropy", 0.5)),
            batch_size=4,
            learning_rate=1e-3,
        ),
        method_stage(
            "promptkd", steps=4, batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-3
        ),
    )
    return config


def equations(jaxpr: Jaxpr | ClosedJaxpr, times: int = 1) -> Iterator[tuple[JaxprEqn, int]]:
    """(equation, how often it runs) for a jaxpr and everything inside of it."""
    for equation in jaxpr.eqns:
        yield equation, times
        rounds = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from equations(value, times * rounds)


def _is_jaxpr(value: object) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)
