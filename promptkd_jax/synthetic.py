"""Requests and answers made by a small grammar, and random models that read and write them.

With these a whole comparison of methods runs in minutes on a CPU and downloads nothing. They are
for trying out and for tests: a method that does better here need not do better on language, and
nothing here ranks methods.

`read_records("synthetic:train")` gives the records (also dev, test and longer), and
`load_model("synthetic:llama-D64-L4-S0")` a randomly initialised Llama of width 64 and 4 layers.
"""

import functools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from promptkd_jax.data.records import DataError, Record
from promptkd_jax.infra import sharding
from promptkd_jax.models.config import ModelError, from_hugging_face
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.io.params import pad
from promptkd_jax.models.load import Model

PREFIX = "synthetic:"
SIZES = {"test": 96, "dev": 32, "train": 2048, "longer": 48}  # records of each split
REFERENCES = 4  # at most, of a request that has several right answers
END = "<end>"

NOUNS = {
    "fox": "foxes",
    "child": "children",
    "mouse": "mice",
    "leaf": "leaves",
    "city": "cities",
    "box": "boxes",
    "tree": "trees",
    "boat": "boats",
    "bird": "birds",
    "stone": "stones",
    "horse": "horses",
    "wolf": "wolves",
    "berry": "berries",
    "house": "houses",
    "river": "rivers",
    "dish": "dishes",
    "goose": "geese",
    "foot": "feet",
    "knife": "knives",
    "baby": "babies",
    "church": "churches",
    "road": "roads",
    "flower": "flowers",
    "tooth": "teeth",
}
COLOURS = {
    "grass": ("green",),
    "snow": ("white",),
    "coal": ("black",),
    "sky": ("blue", "grey"),
    "sea": ("blue", "green"),
    "apple": ("red", "green", "yellow"),
    "rose": ("red", "white", "yellow"),
    "lemon": ("yellow",),
    "blood": ("red",),
    "cat": ("black", "white", "grey"),
    "wine": ("red", "white"),
    "smoke": ("grey", "black"),
    "cloud": ("white", "grey"),
    "pepper": ("red", "green", "yellow", "black"),
    "milk": ("white",),
    "frog": ("green", "brown"),
    "bear": ("brown", "black", "white"),
    "carrot": ("orange",),
    "gold": ("yellow",),
    "ink": ("blue", "black"),
    "brick": ("red", "brown"),
    "plum": ("blue", "red"),
}
ADJECTIVES = (
    *("small", "old", "quick", "quiet", "brave", "young", "wild", "happy", "tired", "cold"),
    *("big", "loud", "clever", "strange", "kind", "proud", "lazy", "wet"),
)
VERBS = ("sleeps", "waits", "stands", "hides", "rests")
PLACES = ("by the river", "under a tree", "near the house", "in the city", "on a stone")
NUMBERS = tuple(map(str, range(41)))
OTHER_WORDS = (
    *("Say", "these", "words", "again", "from", "last", "to", "first", "Sort", "How", "many"),
    *("are", "What", "is", "plus", "minus", "colour", "the", "and", "plural", "of", "Write", "a"),
    *("sentence", "about", "The", "A", "by", "under", "near", "in", "on"),
)


# Tasks: each draws a request and all its right answers, the lists of words of the given lengths.

Drawn = tuple[str, str, tuple[str, ...]]  # instruction, input, answers


def _words(draw: random.Random, lengths: range) -> list[str]:
    return draw.sample(sorted(NOUNS), draw.choice(lengths))


def _repeat(draw: random.Random, lengths: range) -> Drawn:
    words = " ".join(_words(draw, lengths))
    return "Say these words again", words, (words,)


def _reverse(draw: random.Random, lengths: range) -> Drawn:
    words = _words(draw, lengths)
    return "Say these words from last to first", " ".join(words), (" ".join(reversed(words)),)


def _sort(draw: random.Random, lengths: range) -> Drawn:
    words = _words(draw, lengths)
    return "Sort these words", " ".join(words), (" ".join(sorted(words)),)


def _count(draw: random.Random, lengths: range) -> Drawn:
    words = _words(draw, lengths)
    return "How many words are these", " ".join(words), (str(len(words)),)


def _calculate(draw: random.Random, lengths: range) -> Drawn:
    one, other = draw.randrange(21), draw.randrange(21)
    sign, result = draw.choice((("plus", one + other), ("minus", one)))
    first = one + other if sign == "minus" else one
    return f"What is {first} {sign} {other}", "", (f"{first} {sign} {other} is {result}",)


def _colour(draw: random.Random, lengths: range) -> Drawn:
    one, other = draw.sample(sorted(COLOURS), 2)
    answers = tuple(
        f"The {one} is {first} and the {other} is {second}"
        for first in COLOURS[one]
        for second in COLOURS[other]
    )
    return f"What colour are the {one} and the {other}", "", answers


def _pluralise(draw: random.Random, lengths: range) -> Drawn:
    words = _words(draw, lengths)
    plurals = " and ".join(NOUNS[word] for word in words)
    return f"What is the plural of {' and '.join(words)}", "", (plurals,)


def _describe(draw: random.Random, lengths: range) -> Drawn:
    subject = f"{draw.choice(ADJECTIVES)} {draw.choice(sorted(NOUNS))}"
    answers = tuple(
        f"{article} {subject} {verb} {place}"
        for article in ("The", "A")
        for verb in VERBS
        for place in PLACES
    )
    return f"Write a sentence about the {subject}", "", answers


LISTS = (_repeat, _reverse, _sort, _count)  # their requests can be made longer
TASKS = (*LISTS, _calculate, _colour, _pluralise, _describe)


def records(name: str) -> list[Record]:
    """The records of a split: "train", "dev", "test" or "longer", the same in every call.

    No request is in two splits, or twice in one. "longer" asks about longer lists of words than
    any other split. A training record has one answer, drawn from all right ones; the others have
    up to REFERENCES of them.

    Raises:
      DataError: there is no such split.
    """
    if name not in SIZES:
        raise DataError(f"{PREFIX}{name}: there is no such split; there are {', '.join(SIZES)}")
    return list(_splits()[name])


@functools.cache
def _splits() -> dict[str, tuple[Record, ...]]:
    draw = random.Random(0)
    short, long = _requests(draw, TASKS, range(2, 5)), _requests(draw, LISTS, range(5, 7))
    sources = {"test": short, "dev": short, "train": short, "longer": long}
    return {
        name: tuple(
            _record(draw, next(source), 1 if name == "train" else REFERENCES)
            for _ in range(SIZES[name])
        )
        for name, source in sources.items()
    }


def _requests(
    draw: random.Random, tasks: tuple[Callable[[random.Random, range], Drawn], ...], lengths: range
) -> Iterator[Drawn]:
    """Endless, no request twice, the tasks in turn."""
    seen = set()
    while True:
        for task in tasks:
            drawn = task(draw, lengths)
            while drawn[:2] in seen:
                drawn = task(draw, lengths)
            seen.add(drawn[:2])
            yield drawn


def _record(draw: random.Random, drawn: Drawn, most: int) -> Record:
    instruction, words, answers = drawn
    return Record(instruction, words, tuple(draw.sample(answers, min(most, len(answers)))))


@functools.cache
def vocabulary() -> dict[str, int]:
    """Token to id: `<end>`, all bytes, and every word of the grammar, alone and after a space."""
    words = {*NOUNS, *NOUNS.values(), *COLOURS, *ADJECTIVES, *VERBS, *NUMBERS, *OTHER_WORDS}
    words |= {colour for colours in COLOURS.values() for colour in colours}
    words |= {word for place in PLACES for word in place.split()}
    whole = [f"{space}{word}" for word in sorted(words) for space in ("", "Ġ")]
    tokens = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), *whole]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the grammar, one a byte of anything else; `<end>` is EOS and padding."""
    backend = Tokenizer(models.BPE(vocabulary(), merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=END, bos_token=END
    )


def model(
    name: str,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    mesh: Mesh | None = None,
) -> Model:
    """A randomly initialised Llama with the grammar's tokenizer.

    Args:
      name: "llama-D64-L4" for width 64 and 4 layers, "llama-D64-L4-S1" for another seed than 0.
      dtype, param_dtype, remat, mesh: as `load_model` takes them.

    Raises:
      ModelError: no such name, or a width that is not a multiple of 32.
    """
    found = re.fullmatch(r"llama-D(\d+)-L(\d+)(?:-S(\d+))?", name)
    width, depth, seed = (int(size or 0) for size in found.groups()) if found else (0, 0, 0)
    if not depth or not width or width % 32:
        raise ModelError(
            f"{PREFIX}{name}: expected llama-D<width>-L<layers>[-S<seed>], such as llama-D64-L4, "
            "the width a multiple of 32"
        )
    hf_config = _hf_config(width, depth)
    config = from_hugging_face(hf_config, f"{PREFIX}{name}")
    config = config.replace(dtype=dtype, param_dtype=param_dtype, remat=remat)
    on_mesh = config.replace(tensor_parts=1 if mesh is None else mesh.shape["tensor"])

    def init():
        tokens = jnp.zeros((1, 2), jnp.int32)  # the same numbers on every mesh
        return pad(Decoder(config).init(jax.random.key(seed), tokens)["params"], on_mesh)

    placed = None if mesh is None else sharding.shardings(jax.eval_shape(init), mesh)
    params = jax.jit(init, out_shardings=placed)()
    return Model(f"{PREFIX}{name}", Decoder(on_mesh), params, hf_config, tokenizer(), (0,))


def _hf_config(width: int, depth: int) -> dict[str, Any]:
    """The config.json of a Llama with heads of 16, two to a key/value head."""
    return {
        "model_type": "llama",
        "vocab_size": len(vocabulary()),
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 32,
        "intermediate_size": 3 * width,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
