"""What is measured: a pair of models and the shape of the work.

Imports neither JAX nor PyTorch: both sides read it, and neither may pay for the other's.
"""

import dataclasses

import numpy as np

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
