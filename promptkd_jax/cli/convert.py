"""A model in files that are not read, as a folder that is: `promptkd convert --model MODEL --output
FOLDER`.

MODEL has weights in FP8 or MXFP4, which are dequantised; or `pytorch_model.bin` files (which are
read without running what a pickle says; torch has to be installed); or it is a LoRA adapter, which
is merged into its base model.
"""

import argparse
import pathlib
from collections.abc import Sequence

from promptkd_jax.cli import flags
from promptkd_jax.infra.files import check_writable
from promptkd_jax.models.io.convert import convert
from promptkd_jax.models.io.export import STORED_IN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=flags.source, help="folder or hub id")
    text = "model that an adapter was made for (default: the one that it names)"
    parser.add_argument("--base", type=flags.source, help=text)
    text = "of the weights (default: as they are stored, dequantised ones in bfloat16)"
    parser.add_argument("--dtype", default="", choices=STORED_IN, help=text)
    text = "a new folder, on a disk"
    parser.add_argument("--output", required=True, type=flags.disk_path, help=text)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    with flags.naming("--output", options.output):
        flags.check_empty(options.output)
        check_writable(options.output)
        how = dict(base=options.base or "", dtype=options.dtype)
        said = convert(options.model, pathlib.Path(options.output), **how)
    print(f"{options.output}: {said}")
