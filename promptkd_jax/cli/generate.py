"""Talk to an exported student, or any model: `promptkd generate --model FOLDER`.

Responds to `--request`, or to every line typed until an empty one.
"""

import argparse
import functools
import sys
from collections.abc import Sequence

import jax

from promptkd_jax.cli import flags
from promptkd_jax.data.reading.records import user_record
from promptkd_jax.data.rows import tokenize
from promptkd_jax.inference.generate import decode, generate_responses, with_turn_end
from promptkd_jax.infra import distributed
from promptkd_jax.infra.specs import SEED, Int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_asking(parser, temperature=0.0, no_repeat_ngram_size=0)
    parser.add_argument("--request", help="respond to this prompt and stop")
    count, seed = flags.of(Int(low=1)), flags.of(SEED)
    parser.add_argument("--max-new-tokens", type=count, default=128, help="tokens (default: 128)")
    parser.add_argument("--seed", type=seed, default=10, help="of what is sampled (default: 10)")
    flags.add_processes(parser)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    with jax.set_mesh(flags.mesh_of(options)):
        distributed.assert_same_options(options)
        _respond_to_all(options)


def _respond_to_all(options: argparse.Namespace) -> None:
    load = functools.cache(functools.partial(flags.load, options, options.model))
    data, why = flags.data_config(options.model, options, load)
    prompt_format, capacity = data.prompt_format("default"), data.max_prompt_length
    model = with_turn_end(load(), prompt_format)
    if distributed.is_primary():  # beside the responses, which may go into a file
        print(f"template {data.template} ({why})", file=sys.stderr, flush=True)
    typed = iter(lambda: distributed.run_on_primary(_typed), "")
    for number, prompt in enumerate(typed if options.request is None else [options.request]):
        rows = tokenize(
            [user_record(prompt)],
            model.tokenizer,
            prompt_format,
            max_prompt_length=capacity,
            max_length=capacity + options.max_new_tokens,
            eos_id=model.eos_ids[0],
            vocab_size=model.vocab_size,
        )
        responses = generate_responses(
            model,
            rows,
            sampling=flags.sampling_of(options, model.eos_ids),
            prompt_capacity=capacity,
            max_new_tokens=options.max_new_tokens,
            batch_size=1,
            vocab_size=model.vocab_size,
            key=jax.random.fold_in(jax.random.key(options.seed), number),
        )
        print(decode(model.tokenizer, next(responses)), flush=True)


def _typed() -> str:
    """The next line, "" at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
