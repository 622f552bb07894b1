"""What is measured: a pair of models and the shape of the work.

Imports neither JAX nor PyTorch: both sides read it, and neither may pay for the other's.
"""

import dataclasses

import numpy as np

RATE = 1e-9  # of learning, of both optimizers: so small that answers stay as long as they are
STEPS = 1000  # K of the coefficient of L_reg
# The peak of memory is that of iterations alone, so they come first.
STEP = ("iteration", "rollout", "update", "student_update")
PARTS = ("starts", *STEP, "checkpoint", "matmul", "stream")  # in this order


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
      micro_batches: of an update, of both sides.
      length_buckets, rollout_slots, rollout_quantize, remat: ours, see `Execution` and
        `decoder.REMAT`. Theirs pads to the longest row.
      sides, parts: that are measured unless others are asked for, see `bench.SIDES`, `bench.PARTS`.
      cut: divides the sizes of `square` and `skinny`.
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
    rollout_slots: int = 0
    rollout_quantize: str = "none"
    remat: str = "none"
    sides: tuple[str, ...] = ("ours", "theirs")
    parts: tuple[str, ...] = PARTS
    cut: int = 1

    @property
    def columns(self) -> int:
        """Of a row."""
        return self.request + self.response

    @property
    def square(self) -> tuple[int, int, int]:
        """A product that shows what the machine computes: (rows, inner, outer)."""
        size = (2048 if self.dtype == "float32" else 8192) // self.cut
        return size, size, size

    @property
    def skinny(self) -> tuple[int, int, int]:
        """One that shows how fast it reads a matrix: a quarter of a gigabyte in float32, two in
        bfloat16, which a GPU reads in much more time than it takes to start."""
        inner, outer = (4096, 16384) if self.dtype == "float32" else (16384, 65536)
        return self.rows, inner // self.cut, outer // self.cut

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

    def answers(self, batch: int) -> list[list[int]]:
        """Answers to these requests that are as long as the student's: for updates of both sides on
        the same rows."""
        rng = np.random.default_rng((batch, 1))
        lengths = np.full(self.rows, self.response)
        if self.mean_response is not None:
            lengths = np.minimum(rng.geometric(1 / self.mean_response, self.rows), self.response)
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


def llama(
    width: int, depth: int, heads: int, num_kv_heads: int, mlp: int, *, vocab_size: int = 128256
):
    """The config.json of a Llama 3."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": num_kv_heads,
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


def _on_gpu(name: str, teacher: dict, student: dict, rows: int = 64, **changes) -> Case:
    """At the paper's 512 columns, in bfloat16.

    In micro-batches of 16 rows theirs fits into 80 GB: for its backward pass transformers keeps,
    of a row of 519 columns, about 2.9 GB of GPT-2 XL and 1.4 GB of Llama 3B.
    """
    default = dict(micro_batches=rows // 16, sides=("ours", "theirs", "theirs, torch.compile"))
    return Case(
        name,
        teacher,
        student,
        rows=rows,
        request=256,
        response=256,
        dtype="bfloat16",
        **(default | changes),
    )


def _written(rows: int) -> Case:
    """A rollout alone, with what reading its weights costs."""
    return _on_gpu(
        f"GPT-2 base writes {rows} rows",
        GPT2_BASE,
        GPT2_BASE,
        rows,
        micro_batches=1,
        sides=("ours", "theirs"),
        parts=("rollout", "stream"),
    )


def _rehearsed(case: Case) -> Case:
    """The same with small models and few rows, which a CPU does in seconds."""
    sizes = {
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "llama": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "intermediate_size": 128},
    }
    ids = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 511}

    def small(hf_config: dict) -> dict:
        return hf_config | sizes[hf_config["model_type"]] | ids

    return dataclasses.replace(
        case,
        name=f"rehearsal of {case.name}",
        teacher=small(case.teacher),
        student=small(case.student),
        rows=case.rows // 16,
        request=8,
        response=8,
        cut=16,
    )


CPU = (
    Case(
        "GPT-2 124M into 45M",
        GPT2_BASE,
        GPT2_45M,
        remat="dots",
        sides=(
            "ours",
            "ours, full remat",
            "theirs",
            "theirs, torch.compile",
            "theirs, bfloat16",
        ),
    ),
    Case(
        "GPT-2 124M into 45M, answers that end",
        GPT2_BASE,
        GPT2_45M,
        rows=8,
        mean_response=32,
        micro_batches=4,
        length_buckets=4,
        remat="dots",
        sides=("ours", "ours, whole rows", "ours, in slots", "theirs"),
    ),
)
GPU = (
    _on_gpu("GPT-2 XL into base", GPT2_XL, GPT2_BASE, remat="dots"),
    _on_gpu("GPT-2 XL into base, the paper's 256 rows", GPT2_XL, GPT2_BASE, rows=256, remat="dots"),
    _on_gpu("Llama 3B into 1B", LLAMA_3B, LLAMA_1B, remat="dots"),
    _on_gpu("Llama 8B into 1B", LLAMA_8B, LLAMA_1B, remat="dots"),
    _written(256),
    _written(64),
)
CASES = {"cpu": CPU, "gpu": GPU, "rehearsal": tuple(map(_rehearsed, GPU))}


@dataclasses.dataclass(frozen=True)
class Growth:
    """A base case, and by axis what differs from it in that one quantity; see `work.sizes`."""

    base: Case
    axes: dict[str, tuple[Case, ...]]


def growth(
    base: Case,
    *,
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    vocabulary: tuple[int, ...],
    soft_prompt: tuple[int, ...],
    models: dict[str, tuple[dict, dict]],
) -> Growth:
    """Cases around `base`; half of the columns are the answer's, `models` are (teacher, student)
    by name."""

    def other(name: str, **changes) -> Case:
        return dataclasses.replace(base, name=name, **changes)

    def speaking(size: int) -> dict[str, dict]:
        ids = {"vocab_size": size, "bos_token_id": size - 1, "eos_token_id": size - 1}
        return {"teacher": base.teacher | ids, "student": base.student | ids}

    axes = {
        "rows": [other(f"{n} rows", rows=n) for n in rows],
        "columns": [other(f"{n} columns", request=n // 2, response=n // 2) for n in columns],
        "vocabulary": [other(f"vocabulary of {n}", **speaking(n)) for n in vocabulary],
        "soft_prompt": [other(f"{n} soft-prompt vectors", soft_prompt=n) for n in soft_prompt],
        "parameters": [other(name, teacher=t, student=s) for name, (t, s) in models.items()],
    }
    return Growth(base, {axis: tuple(cases) for axis, cases in axes.items()})


def _gpt2(width: int, depth: int, heads: int) -> dict:
    """With 32k words and room for long rows behind a soft prompt."""
    return gpt2(width, depth, heads, vocab_size=32768, columns=2048)


GROWTH = {
    "cpu": growth(
        Case(
            "GPT-2 512x6 into 256x4",
            _gpt2(512, 6, 8),
            _gpt2(256, 4, 4),
            request=32,
            response=32,
            soft_prompt=8,
            remat="dots",
        ),
        rows=(1, 8),
        columns=(32, 256),
        vocabulary=(131072, 262144),
        soft_prompt=(32, 128),
        models={
            "GPT-2 256x4 into 128x2": (_gpt2(256, 4, 4), _gpt2(128, 2, 2)),
            "GPT-2 768x12 into 512x6": (_gpt2(768, 12, 12), _gpt2(512, 6, 8)),
        },
    ),
    "gpu": growth(
        Case(
            "GPT-2 1600x48 into 768x12",
            _gpt2(1600, 48, 25),
            _gpt2(768, 12, 12),
            rows=32,
            request=256,
            response=256,
            soft_prompt=8,
            dtype="bfloat16",
            remat="dots",
        ),
        rows=(8, 16, 64),
        columns=(128, 256, 1024),
        vocabulary=(65536, 131072, 262144),
        soft_prompt=(1, 64, 256),
        models={
            "GPT-2 768x12 into 512x6": (_gpt2(768, 12, 12), _gpt2(512, 6, 8)),
            "GPT-2 1024x24 into 768x12": (_gpt2(1024, 24, 16), _gpt2(768, 12, 12)),
            "GPT-2 1280x36 into 768x12": (_gpt2(1280, 36, 20), _gpt2(768, 12, 12)),
        },
    ),
}
