"""The console command `promptkd`: its first word chooses a module of this folder.

Such a module has a docstring, which `--help` shows, `add_arguments(parser)`, and
`run(options, rest)`: `rest` are the arguments of a config, where the module says USAGE, and with
TAKES_COMMAND what stands behind `--` is in `options.launched`. What a user can mend is a
`UserError` below, and becomes a message here.
"""

import argparse
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence

COMMANDS = {
    "data": "what a model sees of data, before anything is trained: counts, lengths, rows, overlap",
    "convert": "pytorch_model.bin, FP8, MXFP4 or a LoRA adapter, as a folder of safetensors",
    "init": "a student that starts as some of its teacher's layers",
    "train": "distil: models and data to a student and a report",
    "evaluate": "scores of models on any sets and seeds, and standard benchmarks",
    "generate": "talk to a model from the terminal",
    "cache": "the teacher's top-k log-probabilities, written once for later runs",
    "compare": "several methods from one student within one budget, in one table and report",
    "plan": "what a run needs of TPUs or GPUs: memory, time and cost, counted without one",
    "reproduce": "the paper's pipeline, and its table beside the published one",
    "export": "a checkpoint of a run as a transformers folder, a GGUF file, or an adapter",
}

# What to do where a device has no memory left, command by command; `train` says it of its run.
LESS_MEMORY = {
    "init": "the teacher and its responses take it: try --dtype=bfloat16, fewer --rows than 16, "
    "fewer --max-new-tokens, or a --mesh that cuts the teacher (--mesh=1,-1,1)",
    "evaluate": "try a smaller --batch-size, --dtype=bfloat16, --quantize=int8, or a --mesh that "
    "cuts the model (--mesh=1,-1,1)",
    "generate": "the model takes it, and keys and values of its prompt and response: try "
    "--dtype=bfloat16, --quantize=int8 or int4, fewer --max-new-tokens, or a --mesh that cuts the "
    "model (--mesh=1,-1,1)",
    "cache": "try a smaller --batch-size, config.teacher.dtype and param_dtype = 'bfloat16', "
    "config.teacher.quantize = 'int8', or more devices (config.mesh.fsdp)",
    "compare": "a training is a process of its own, and says in its log what to set; measuring all "
    "of them took it: go on with more devices (config.run.mesh.fsdp), or begin in another "
    "--workdir with a smaller config.test.batch_size",
    "reproduce": "go on with config.teacher.remat = config.student.remat = 'full' or more devices "
    "(config.mesh.fsdp); or begin in another --workdir with a larger "
    "config.stages[0].gradient_accumulation_steps, config.teacher.quantize = 'int8' or a smaller "
    "config.evaluation.batch_size (`promptkd plan --device=here` of the config.json of a run in "
    "--workdir says what makes its training fit)",
    "plan": "the step that is compiled for this machine's devices takes it: --no-compile gives the "
    "estimate alone, and --device=24GB that of such a GPU",
    "export": "the student's parameters take it, with --adapter the adapter's alone: try a --mesh "
    "that cuts them (--mesh=1,-1,1), or JAX_PLATFORMS=cpu, which has the machine's memory",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `promptkd COMMAND …`.

    Raises:
      SystemExit: always if something is wrong, with the message or the exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:  # no tokenizer, config or manifest could have it
            sys.exit(
                f"promptkd: the argument {ascii(argument)} is not UTF-8; expected text that is"
            )
    # "PyTorch was not found": it is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        try:
            _run((argv[:1] or [""])[0], argv[1:])
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:  # while modules are imported; after that, see `infra.signals`
        sys.exit(130)
    except BrokenPipeError:  # nobody reads on, as in `promptkd … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        sys.exit(128 + signal.SIGPIPE)


def parse(name: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options of a command, and the arguments of its config.

    Raises:
      SystemExit: an argument that the command does not know.
    """
    parser, takes_config = parser_of(name)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, rest = parser.parse_known_args(arguments[:end])
    if hasattr(sys.modules[f"promptkd_jax.cli.{name}"], "TAKES_COMMAND"):
        options.launched = None if end == len(arguments) else list(arguments[end + 1 :])
    else:
        rest += arguments[end:]
    if rest and not takes_config:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options, rest


def parser_of(name: str) -> tuple[argparse.ArgumentParser, bool]:
    """Returns the parser of a command, and whether the command takes a config, too."""
    command = importlib.import_module(f"promptkd_jax.cli.{name}")
    usage = getattr(command, "USAGE", None)
    parser = argparse.ArgumentParser(
        prog=f"promptkd {name}",
        description=command.__doc__,
        usage=usage and f"%(prog)s {usage}",
        epilog=usage
        and "--config names a Python file with get_config, or the config.json of a run; "
        "--config.a.b=VALUE sets any field of it (docs/config.md).",
        allow_abbrev=not usage,
    )
    command.add_arguments(parser)
    return parser, bool(usage)


def _run(name: str, arguments: Sequence[str]) -> None:
    if name not in COMMANDS:
        lines = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
        print(f"usage: promptkd COMMAND …\n{lines}\n'promptkd COMMAND --help' says more.")
        sys.exit(0 if name in ("", "-h", "--help") else f"promptkd: no command {name!r}")
    options, rest = parse(name, arguments)
    from promptkd_jax.infra import distributed, signals  # which `promptkd --help` need not import
    from promptkd_jax.infra.compile_cache import (
        keep_compiled_programs,
        return_memory_of_compiling,
    )
    from promptkd_jax.infra.errors import UserError

    many = "coordinator" in options
    with distributed.session(options) if many else signals.answered():
        try:
            keep_compiled_programs()
            return_memory_of_compiling()
            importlib.import_module(f"promptkd_jax.cli.{name}").run(options, rest)
        except UserError as error:
            sys.exit(f"promptkd {name}: {error}")
        except RuntimeError as error:  # JAX's, of XLA
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            first = str(error).splitlines()[0]
            advice = LESS_MEMORY.get(name, "take a device or a machine with more")
            sys.exit(f"promptkd {name}: no memory left ({first}); {advice}")
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            sys.exit(f"promptkd {name}: {error}; what was saved is good: make room, run it again")
