"""A student made of some of its teacher's layers, to be distilled: `promptkd init --teacher MODEL
--layers 18 --output FOLDER`.

DistilBERT (Sanh et al. 2019, arXiv 1910.01108) starts as every other layer of BERT, DistilGPT2 as
the layers 0, 2, 4, 7, 9 and 11 of GPT-2's 12. A run does the same with `student.layers`; with a
folder of their own, several runs, or other tools, start from one student.
"""

import argparse
import re
from collections.abc import Sequence

import jax

from promptkd_jax.cli import flags
from promptkd_jax.evaluation.report import model_card
from promptkd_jax.infra.files import check_writable
from promptkd_jax.models.io.export import save_model
from promptkd_jax.models.load import load_model
from promptkd_jax.models.model import chosen_layers, keep_layers
from promptkd_jax.training.config.field_specs import DTYPE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "folder (also that of a run), .gguf file, or hub id"
    parser.add_argument("--teacher", required=True, type=flags.source, help=text)
    parser.add_argument(
        "--layers",
        required=True,
        type=_layers,
        help="how many, evenly spread (18); or which, counted from 0 (0,2,4,7,9,11)",
    )
    parser.add_argument("--output", required=True, type=flags.path, help="a new folder")
    parser.add_argument("--dtype", default="float32", choices=DTYPE.options)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    output, dtype = options.output, options.dtype
    with flags.naming("--output", output):
        flags.check_empty(output)
        teacher = load_model(options.teacher, dtype=dtype, param_dtype=dtype)
        depth = teacher.decoder.config.num_layers
        kept = chosen_layers(depth, options.layers)
        student = keep_layers(teacher, kept)
        check_writable(output)
        facts = [
            ("Teacher", f"{options.teacher} ({depth} layers)"),
            ("Its layers that were kept, counted from 0", ", ".join(map(str, kept))),
            ("Parameters", f"{sum(x.size for x in jax.tree.leaves(student.params)):,} in {dtype}"),
        ]
        lead = "Some of its teacher's layers, written by promptkd_jax and not trained since."
        card = model_card("A student before distillation", lead, facts)
        save_model(output, student, card=card)
    print(f"student in {output}", *(f"  {name}: {fact}" for name, fact in facts), sep="\n")


def _layers(text: str) -> int | tuple[int, ...]:
    """ "18" as a number, "0,2,4" (and "5,") as a list."""
    if not re.fullmatch(r"\d+( *, *\d+)*( *,)?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of layers (18) nor a list of them (0,2,4,7,9,11)"
        )
    if "," not in text:
        return int(text)
    listed = tuple(int(layer) for layer in text.split(",") if layer)
    if twice := sorted({layer for layer in listed if listed.count(layer) > 1}):
        raise argparse.ArgumentTypeError(f"{text!r} has layer {twice[0]} more than once")
    return listed
