"""`promptkd generate --model FOLDER`: talk to an exported student, or any model."""

import argparse
import sys
from collections.abc import Iterator, Sequence

import jax

from promptkd_jax import build, hosts, sharding
from promptkd_jax.config import ConfigError
from promptkd_jax.data import TEMPLATES, DataError, Record, tokenize
from promptkd_jax.evaluate import decode, write_answers
from promptkd_jax.hosts import HostsError
from promptkd_jax.models.config import ModelError
from promptkd_jax.models.load import load_with_tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Answers `--request`, or every line typed until an empty one."""
    options = _parser().parse_args(argv)
    with hosts.together(options):
        try:
            with jax.set_mesh(sharding.make_mesh(sharding.parse_sizes(options.mesh))):
                hosts.agree_on_options(options)
                _answer_all(options)
        except (ConfigError, DataError, ModelError, HostsError) as error:
            sys.exit(f"promptkd generate: {error}")


def _answer_all(options: argparse.Namespace) -> None:
    model = load_with_tokenizer(options.model, dtype=options.dtype)
    chosen = build.sampling(options, model.eos_ids)
    for number, request in enumerate(_requests(options.request)):
        rows = tokenize(
            [Record(request, "", ())],
            model.tokenizer,
            template=options.template,
            max_prompt_length=options.max_prompt_length,
            max_length=options.max_prompt_length + options.max_new_tokens,
            eos_id=model.eos_ids[0],
        )
        answers = write_answers(
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
    while line := hosts.on_first(_typed):
        yield line


def _typed() -> str:
    """The next line, "" at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="promptkd generate", description=main.__doc__)
    parser.add_argument("--model", required=True, help="folder, .gguf file, or hub id")
    parser.add_argument("--request", help="answer this and stop")
    template = "that of the training (default: chat)"
    parser.add_argument("--template", default="chat", choices=sorted(TEMPLATES), help=template)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--no-repeat-ngram-size", type=int, default=0)
    parser.add_argument("--max-prompt-length", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    hosts.add_mesh_argument(parser)
    hosts.add_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
