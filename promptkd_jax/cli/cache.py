"""The teacher's log-probabilities, written once: `promptkd cache --config FILE[:arg] --output DIR`.

A run whose teacher view is "cached" then reads them instead of calling the teacher. The same
command goes on where it was stopped, and does nothing where all is written.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence

import jax
from etils import epath

from promptkd_jax.cli import flags
from promptkd_jax.data.logprobs import on_a_file_system
from promptkd_jax.inference.logprob_cache import write_cache
from promptkd_jax.infra import distributed, sharding
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.infra.files import check_shared, make_folder
from promptkd_jax.infra.specs import Int
from promptkd_jax.models.model import check_positions
from promptkd_jax.training.config.checks import read_run
from promptkd_jax.training.config.config_file import as_json
from promptkd_jax.training.config.fields import RunConfig
from promptkd_jax.training.prepare import with_date
from promptkd_jax.training.run_data import training_rows
from promptkd_jax.training.run_models import load_models

USAGE = "--config FILE[:arg] --output DIR [--top-k 64] [--batch-size 8] [--config.a.b=VALUE …]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count = flags.of(Int(low=1))
    parser.add_argument("--output", required=True, type=flags.disk_path, help="not in a bucket")
    parser.add_argument("--top-k", type=count, default=64, help="tokens kept at every position")
    parser.add_argument("--batch-size", type=count, default=8, help="rows in one call")
    flags.add_processes(parser)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    config = read_run(rest)
    cache(config, options.output, top_k=options.top_k, batch_size=options.batch_size)


def cache(config: RunConfig, folder: epath.PathLike, *, top_k: int, batch_size: int) -> None:
    """Writes the teacher's view of the run's gold training rows into `folder`.

    Raises:
      ConfigError, DataError, ModelError: a config without teacher, models or data that cannot be
        used, or a folder that something else made, or in a bucket.
      HostsError: processes that have different configs, or do not see the same folder.
    """
    folder = on_a_file_system(folder)
    distributed.assert_same("the config", json.dumps(as_json(config), sort_keys=True))
    if not config.teacher.path:
        raise ConfigError("config.teacher.path: is empty, but the cache is the teacher's")
    with flags.naming("--output", folder):
        make_folder(folder)
        check_shared(folder)
    mesh, data = sharding.make_mesh(config.mesh.sizes), config.data
    with jax.set_mesh(mesh):
        # Also where the stages of the run see it through the cache alone.
        seen = dataclasses.replace(config.evaluation, teacher=True)
        teacher, student = load_models(dataclasses.replace(config, evaluation=seen), mesh)
        check_positions(teacher, data.max_length)
        student = student.replace(params=None)  # tokenizes; its weights are not needed
        rows = training_rows(with_date(config, folder), student, None)
        cached = write_cache(
            teacher,
            rows,
            folder,
            top_k=top_k,
            batch_size=batch_size,
            length=data.max_length,
            vocab_size=student.vocab_size,
            tokenizer=student.tokenizer,
        )
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{folder}: the {top_k} largest log-probabilities at {cached.offsets[-1]} response tokens "
        f"of {len(rows.tokens)} rows, {size / 1e6:.1f} MB"
    )
