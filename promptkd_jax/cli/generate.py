"""Talk to an exported student, or any model: `promptkd generate --model FOLDER`.

Answers `--request`, or every line typed until an empty one.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import jax

from promptkd_jax.cli import flags
from promptkd_jax.cli.evaluate import recorded, template_for
from promptkd_jax.data.records import Record
from promptkd_jax.data.rows import tokenize
from promptkd_jax.inference.generate import decode, generate_responses
from promptkd_jax.infra import distributed
from promptkd_jax.infra.specs import SEED, Int
from promptkd_jax.models.load import load_with_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model(parser)
    parser.add_argument("--request", help="answer this and stop")
    flags.add_template(parser)
    flags.add_sampling(parser, temperature=0.0, no_repeat_ngram_size=0)
    count = flags.of(Int(low=1))
    lengths = {"--max-prompt-length": 256, "--max-new-tokens": 128}
    for flag, default in lengths.items():
        parser.add_argument(flag, type=count, default=default, help=f"tokens (default: {default})")
    text = "of what is sampled (default: 10)"
    parser.add_argument("--seed", type=flags.of(SEED), default=10, help=text)
    flags.add_processes(parser)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Answers `--request`, or every line typed until an empty one."""
    with jax.set_mesh(flags.mesh_of(options)):
        distributed.assert_same_options(options)
        _answer_all(options)


def _answer_all(options: argparse.Namespace) -> None:
    record = recorded(options.model)
    model = load_with_tokenizer(options.model, dtype=options.dtype)
    template, why = template_for(model, options.template, record)
    if distributed.is_primary():  # beside the answers, which may go into a file
        print(f"template {template} ({why})", file=sys.stderr, flush=True)
    chosen = flags.sampling_of(options, model.eos_ids)
    for number, request in enumerate(_requests(options.request)):
        rows = tokenize(
            [Record(request, "", ())],
            model.tokenizer,
            template=template,
            max_prompt_length=options.max_prompt_length,
            max_length=options.max_prompt_length + options.max_new_tokens,
            eos_id=model.eos_ids[0],
            date=record.get("date", ""),
        )
        answers = generate_responses(
            model,
            rows,
            sampling=chosen,
            prompt_capacity=options.max_prompt_length,
            max_new_tokens=options.max_new_tokens,
            batch_size=1,
            vocab_size=model.vocab_size,
            key=jax.random.fold_in(jax.random.key(options.seed), number),
        )
        print(decode(model.tokenizer, next(answers)), flush=True)


def _requests(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
        return
    while line := distributed.run_on_primary(_typed):
        yield line


def _typed() -> str:
    """The next line, "" at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
