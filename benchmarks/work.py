"""What a case needs: its models on disk, with random weights, and the work that it is."""

import concurrent.futures
import hashlib
import json
import math
import pathlib

import jax
import numpy as np
from cases import Case

from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.io.params import abstract_params
from promptkd_jax.models.model import Model
from promptkd_jax.plan import costs


def write_models(case: Case, folder: pathlib.Path) -> dict[str, str]:
    """Folders of the case's teacher and student in `folder`, written where they are not yet."""
    how = case.dtype, case.mean_response
    return {
        "teacher": str(_write_model(folder, case.teacher, 0, *how)),
        "student": str(_write_model(folder, case.student, 1, *how)),
    }


def _write_model(
    folder: pathlib.Path, hf_config: dict, seed: int, dtype: str, mean_response: int | None
) -> pathlib.Path:
    """A random model in `dtype` under a name that says all about it; a `mean_response` is GPT-2's
    alone. Parameters are drawn side by side: of billions one thread draws for a minute."""
    described = json.dumps([hf_config, seed, dtype, mean_response], sort_keys=True)
    path = folder / hashlib.sha256(described.encode()).hexdigest()[:16]
    if (path / "written").exists():
        return path
    config = from_hugging_face(hf_config).replace(param_dtype=dtype)
    shapes, tree = jax.tree.flatten_with_path(abstract_params(config))

    def draw(number: int) -> np.ndarray:
        name, leaf = shapes[number]
        if name[-1].key in ("scale", "bias"):
            return np.full(leaf.shape, name[-1].key == "scale", dtype)
        rng = np.random.default_rng((seed, number))
        values = rng.standard_normal(leaf.shape, np.float32)
        values *= np.float32(0.02)
        return values.astype(dtype)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        params = jax.tree.unflatten(tree, pool.map(draw, range(len(shapes))))
    if mean_response is not None:
        # The final bias gives the last token of the vocabulary the probability 1 / mean_response.
        wanted = math.log(hf_config["vocab_size"] / mean_response)
        end = params["embed"]["embedding"][-1]
        params["final_norm"]["bias"] += wanted * end / np.sum(end**2)
    save_model(path, Model(str(path), Decoder(config), params, hf_config, None, ()))
    (path / "written").touch()  # the last: who was stopped before begins again
    return path


def sizes(case: Case) -> dict[str, int]:
    """Where a case lies on each axis of growth; parameters are those of both models."""
    models = (case.teacher, case.student)
    return {
        "rows": case.rows,
        "columns": case.columns,
        "vocabulary": case.student["vocab_size"],
        "soft_prompt": case.soft_prompt,
        "parameters": sum(_parameters(from_hugging_face(model)) for model in models),
    }


def needed(case: Case) -> dict[str, dict[str, float]] | None:
    """`flops` and `bytes` of a part of the work. None where answers end by themselves: counts are
    those of full rows."""
    if case.mean_response is not None:
        return None
    least = {"rollout": decode_bytes(case)} | update_bytes(case)
    return {part: {"flops": f, "bytes": least[part]} for part, f in operations(case).items()}


def operations(case: Case) -> dict[str, float]:
    """Operations of the matrix products that Algorithm 1 needs, on full rows; a product counts 2.

    The rollout's are those of its tokens, each with the keys before it. Both teachers and the
    student are multiplied out at the response positions alone; the teacher's backward pass makes no
    gradient of weights. Attention counts whole squares; half of them would do, some 3 % less where
    rows have 256 columns.
    """
    teacher, student = map(from_hugging_face, (case.teacher, case.student))
    rows, columns, behind = case.rows, case.columns, case.columns + case.soft_prompt

    def head(config):
        return costs.head_flops(config, rows, case.response)

    middle = case.request + case.response // 2
    rollout = costs.forward_flops(student, rows, case.request, case.request // 2)
    rollout += costs.forward_flops(student, rows, case.response, middle) + head(student)
    seen = costs.forward_flops(teacher, rows, behind) + head(teacher)
    learns = costs.forward_flops(student, rows, columns) + 3 * head(student)
    learns += costs.backward_flops(student, rows, columns, weights=True)
    prompt = costs.forward_flops(teacher, rows, behind) + 3 * head(teacher)
    prompt += costs.forward_flops(teacher, rows, columns)
    prompt += costs.backward_flops(teacher, rows, behind, weights=False)
    return {"rollout": rollout, "update": prompt + seen + learns, "student_update": seen + learns}


def decode_bytes(case: Case) -> float:
    """That a rollout to the limit reads at least: for each token the student's matrices, once for
    all rows, and the keys and values so far."""
    config, size = from_hugging_face(case.student), _size(case)
    column = 2 * config.num_layers * case.rows * config.num_kv_heads * config.head_dim
    cached = column * (case.request + case.response / 2)
    return case.response * size * (_matrix_elements(config) + cached)


def update_bytes(case: Case) -> dict[str, float]:
    """That the updates move at least, where no cache holds what is counted:

    - a pass over a model, forward or backward, reads its matrices and its head once, and reads and
      writes the hidden states of every column once in each layer;
    - a forward writes the logits of the response positions once, in float32;
    - the student's gradient is written once, and AdamW reads it, the parameters and two moments and
      writes all but the gradient, in float32.

    Nothing else is: neither attention nor what is inside a layer, no hidden state that is kept for
    the backward pass, no logit that is read again. A step that recomputes or spills moves more.
    """
    teacher, student = map(from_hugging_face, (case.teacher, case.student))
    size, behind = _size(case), case.columns + case.soft_prompt

    def passes(config: DecoderConfig, columns: int, forwards: int, backwards: int) -> float:
        hidden = 2 * config.num_layers * case.rows * columns * config.width
        one = size * (_matrix_elements(config) + hidden)
        logits = 4 * case.rows * case.response * config.vocab_size
        return (forwards + backwards) * one + forwards * logits

    learns = passes(student, case.columns, 1, 1) + (1 + 7) * 4 * _parameters(student)
    seen, prompt = passes(teacher, behind, 1, 0), passes(teacher, behind, 2, 1)
    return {"update": prompt + seen + learns, "student_update": seen + learns}


def _matrix_elements(config: DecoderConfig) -> int:
    """Of all layers and the head."""
    return costs.matrix_parameters(config) + config.vocab_size * config.width


def _parameters(config: DecoderConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def _size(case: Case) -> int:
    """Bytes of a number in the dtype of computation."""
    return 4 if case.dtype == "float32" else 2
