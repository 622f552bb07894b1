"""The console command `promptkd`: one word chooses what it does."""

import importlib
import os
import sys

COMMANDS = {
    "init": "a student that starts as some of its teacher's layers",
    "train": "distil: models and data to a student and a report",
    "evaluate": "ROUGE-L and exact match of a model, on any sets and seeds",
    "generate": "talk to a model from the terminal",
    "cache": "the teacher's top-k log-probabilities, written once for later runs",
    "compare": "several methods from one student within one budget, in one table and report",
    "plan": "what a run needs of TPU chips: memory, time and cost, compiled without a TPU",
    "reproduce": "the paper's pipeline, and its table beside the published one",
    "export": "a checkpoint of a run as a transformers folder",
}


def main() -> None:
    """Runs `promptkd_jax.<command>` with the rest of the command line."""
    command, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if command not in COMMANDS:
        lines = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
        print(f"usage: promptkd COMMAND …\n{lines}\n'promptkd COMMAND --help' says more.")
        sys.exit(0 if command in ("", "-h", "--help") else f"promptkd: no command {command!r}")
    # "PyTorch was not found": it is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        importlib.import_module(f"promptkd_jax.{command}").main(arguments)
    except KeyboardInterrupt:  # while modules are read; after that, see `signals`
        sys.exit(130)
