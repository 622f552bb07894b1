"""What is measured: a pair of models with random weights, and the shape of the work."""

import dataclasses
import hashlib
import json
import math
import pathlib

import jax
import numpy as np

from promptkd_jax.models.config import from_hugging_face
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.export import save_model
from promptkd_jax.models.load import Model
from promptkd_jax.models.streaming import abstract_params
from promptkd_jax.plan import roofline

RATE = 5e-5  # of learning, of both optimizers
STEPS = 1000  # K of the coefficient of L_reg


@dataclasses.dataclass(frozen=True)
class Case:
    """One size of the problem, the same for both sides.

    Attributes:
      teacher, student: their `config.json`.
      rows: of a batch.
      request, response: the most tokens of each in a row.
      soft_prompt: its vectors.
      mean_response: about how many tokens an answer has before it ends by itself; None: all answers
        run to their limit, and all requests are of full length.
      dtype: what is computed in; the student's parameters are float32.
      micro_batches, length_buckets, remat: ours, see `Method` and `decoder.REMAT`. Theirs pads to
        the longest row.
    """

    name: str
    teacher: dict
    student: dict
    rows: int = 4
    request: int = 128
    response: int = 128
    soft_prompt: int = 7
    mean_response: int | None = None
    dtype: str = "float32"
    micro_batches: int = 1
    length_buckets: int = 1
    remat: str = "none"

    @property
    def columns(self) -> int:
        """Of a row."""
        return self.request + self.response

    @property
    def square(self) -> tuple[int, int, int]:
        """A product that shows what the machine computes: (rows, inner, outer)."""
        size = 2048 if self.dtype == "float32" else 8192
        return size, size, size

    @property
    def skinny(self) -> tuple[int, int, int]:
        """One that shows how fast it reads a matrix, of a quarter of a gigabyte in float32."""
        return self.rows, 4096, 16384

    @property
    def eos_id(self) -> int | None:
        """The last token of the vocabulary, where answers end."""
        return None if self.mean_response is None else self.student["vocab_size"] - 1

    def requests(self, batch: int) -> list[list[int]]:
        """The `batch`-th batch of requests, of random tokens."""
        rng = np.random.default_rng(batch)
        shortest = self.request if self.mean_response is None else max(1, self.request // 8)
        lengths = rng.integers(shortest, self.request, self.rows, endpoint=True)
        vocabulary = self.student["vocab_size"] - 1
        return [rng.integers(0, vocabulary, length).tolist() for length in lengths]


def gpt2(width: int, depth: int, heads: int, *, vocab_size: int = 50257, columns: int = 1024):
    """The config.json of a GPT-2."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_positions": columns,
        "n_embd": width,
        "n_layer": depth,
        "n_head": heads,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": vocab_size - 1,
        "eos_token_id": vocab_size - 1,
    }


def llama(width: int, depth: int, heads: int, kv_heads: int, mlp: int, *, vocab_size: int = 128256):
    """The config.json of a Llama 3."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": width < 4096,
        "bos_token_id": 0,
        "eos_token_id": vocab_size - 1,
    }


GPT2_45M = gpt2(512, 6, 8)
GPT2_BASE = gpt2(768, 12, 12)
GPT2_XL = gpt2(1600, 48, 25)
LLAMA_1B = llama(2048, 16, 32, 8, 8192)
LLAMA_3B = llama(3072, 28, 24, 8, 8192)
LLAMA_8B = llama(4096, 32, 32, 8, 14336)

CPU = (
    Case("GPT-2 124M into 45M", GPT2_BASE, GPT2_45M, remat="dots"),
    Case(
        "GPT-2 124M into 45M, answers that end",
        GPT2_BASE,
        GPT2_45M,
        rows=16,
        mean_response=32,
        micro_batches=4,
        length_buckets=4,
        remat="dots",
    ),
)
GPU = (
    Case(
        "GPT-2 XL into base",
        GPT2_XL,
        GPT2_BASE,
        rows=64,
        request=256,
        response=256,
        dtype="bfloat16",
    ),
    Case(
        "Llama 3B into 1B",
        LLAMA_3B,
        LLAMA_1B,
        rows=64,
        request=256,
        response=256,
        dtype="bfloat16",
    ),
    Case(
        "Llama 8B into 1B",
        LLAMA_8B,
        LLAMA_1B,
        rows=64,
        request=256,
        response=256,
        dtype="bfloat16",
    ),
)
CASES = {"cpu": CPU, "gpu": GPU}


def write_models(case: Case, folder: pathlib.Path) -> dict[str, str]:
    """Folders of the case's teacher and student in `folder`, written where they are not yet."""
    return {
        "teacher": str(_write_model(folder, case.teacher, 0)),
        "student": str(_write_model(folder, case.student, 1, case.mean_response)),
    }


def _write_model(
    folder: pathlib.Path, hf_config: dict, seed: int, mean_response: int | None = None
) -> pathlib.Path:
    """A random model under a name that says all about it; a `mean_response` is GPT-2's alone."""
    described = json.dumps([hf_config, seed, mean_response], sort_keys=True)
    path = folder / hashlib.sha256(described.encode()).hexdigest()[:16]
    if (path / "model.safetensors").exists():
        return path
    config, rng = from_hugging_face(hf_config), np.random.default_rng(seed)

    def draw(name, leaf):
        if name[-1].key in ("scale", "bias"):
            return np.full(leaf.shape, name[-1].key == "scale", np.float32)
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)

    params = jax.tree.map_with_path(draw, abstract_params(config))
    if mean_response is not None:
        # The final bias gives the last token of the vocabulary the probability 1 / mean_response.
        wanted = math.log(hf_config["vocab_size"] / mean_response)
        end = params["embed"]["embedding"][-1]
        params["final_norm"]["bias"] += wanted * end / np.sum(end**2)
    save_model(path, Model(str(path), Decoder(config), params, hf_config, None, ()))
    return path


def work(case: Case) -> dict[str, float]:
    """Operations of the matrix products that Algorithm 1 needs, on full rows; a product counts 2.

    The rollout's are those of its tokens. Both teachers and the student are multiplied out at the
    response positions alone; the teacher's backward pass makes no gradient of weights.
    """
    teacher, student = map(from_hugging_face, (case.teacher, case.student))
    rows, columns, behind = case.rows, case.columns, case.columns + case.soft_prompt

    def head(config):
        return roofline.head_flops(config, rows, case.response)

    seen = roofline.forward_flops(teacher, rows, behind) + head(teacher)
    learns = roofline.forward_flops(student, rows, columns) + 3 * head(student)
    learns += roofline.backward_flops(student, rows, columns, weights=True)
    prompt = 2 * roofline.forward_flops(teacher, rows, behind) + 3 * head(teacher)
    prompt += roofline.backward_flops(teacher, rows, behind, weights=False)
    return {"student_update": seen + learns, "update": prompt + seen + learns}


def decode_bytes(case: Case) -> float:
    """That a rollout to the limit reads at least: for each token the student's matrices, once for
    all rows, and the keys and values so far."""
    config = from_hugging_face(case.student)
    size = 4 if case.dtype == "float32" else 2
    matrices = roofline.matrix_parameters(config) + config.vocab_size * config.width
    column = 2 * config.depth * case.rows * config.kv_heads * config.head_width
    cached = column * (case.request + case.response / 2)
    return case.response * size * (matrices + cached)
