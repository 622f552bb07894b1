"""Host memory of processes that load one model together, each under a limit below its size.

python benchmarks/load_memory.py [--gigabytes 2] [--processes 4] [--limit 1.2]

Writes a random Llama in bfloat16 as a safetensors folder. P processes of one CPU device, mesh
fsdp=P, load it, each limited to so many GB of anonymous memory (RLIMIT_DATA; the pages of mapped
files do not count). Then one process tries the same alone. Prints one JSON object, GB are 10**9
bytes. Needs twice the model's size on disk and in memory.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from promptkd_jax.infra import sharding
from promptkd_jax.models.config import DecoderConfig
from promptkd_jax.models.families.base import sizes
from promptkd_jax.models.families.registry import FAMILIES, from_hugging_face
from promptkd_jax.models.io.params import load_params, stored_names
from promptkd_jax.models.io.safetensors import SafetensorsFolder

GB = 10**9
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
FILES = 4


def main() -> None:
    """Prints one JSON object."""
    options = _parser().parse_args()
    if options.folder is not None:
        print(json.dumps(_load(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.where) as name:
        folder = pathlib.Path(name)
        sizes = _write(folder, options.gigabytes)
        together = _run(folder, options, options.processes)
        alone = _run(folder, options, 1)
    result = {
        "jax": jax.__version__,
        "settings": {k: vars(options)[k] for k in ("gigabytes", "processes", "limit")},
        "model_gb": sum(sizes.values()) / GB,
        "largest_stored_tensor_gb": max(sizes.values()) / GB,
        "together": together,
        "alone": alone,
    }
    print(json.dumps(result, indent=2))


def _write(folder: pathlib.Path, gigabytes: float) -> dict[str, int]:
    """A random model of about this size; the bytes of each tensor."""
    shapes = _shapes(_config(1))
    first = sum(map(np.prod, shapes.values()))
    layer = sum(np.prod(x) for name, x in shapes.items() if ".layers.0." in name)
    depth = max(1, round((gigabytes * GB / 2 - first + layer) / layer))
    (folder / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": depth}))
    shapes = _shapes(_config(depth))
    noise = np.random.default_rng(0).normal(size=2**20).astype(ml_dtypes.bfloat16)
    weight_map = {}
    for number, names in enumerate(np.array_split(list(shapes), FILES)):
        file = f"model-{number + 1:05}-of-{FILES:05}.safetensors"
        save_file({str(name): np.resize(noise, shapes[name]) for name in names}, folder / file)
        weight_map |= {str(name): file for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}


def _config(depth: int) -> DecoderConfig:
    return from_hugging_face(LLAMA | {"num_hidden_layers": depth}).replace(param_dtype="bfloat16")


def _shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    family, letters = FAMILIES[config.family], sizes(config)
    return {
        name: row.stored_shape(letters)
        for row in family.tensors(config)
        for name in stored_names(row, config, family.prefix)
    }


def _run(folder: pathlib.Path, options: argparse.Namespace, processes: int) -> list[dict]:
    """What each process reports, or how it ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [f"--folder={folder}", f"--limit={options.limit}", f"--processes={processes}"]
    flags.append(f"--coordinator=localhost:{port}")
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *flags, f"--process={process}"],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    return [_result(process) for process in started]


def _result(process: subprocess.Popen) -> dict:
    out, errors = process.communicate()
    if process.returncode == 0:
        return json.loads(out)
    says = [line for line in errors.splitlines() if re.match(r"[\w.]+Error", line)]
    return {"exit_code": process.returncode, "says": says[-1:]}


class Counting(SafetensorsFolder):
    """Counts the bytes that are asked of its files."""

    bytes_read = 0

    def read(self, name, index=None):
        found = super().read(name, index)
        self.bytes_read += found.nbytes
        return found


def _load(options: argparse.Namespace) -> dict:
    """One process: loads its part and reports."""
    limit = int(options.limit * GB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if options.processes > 1:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    mesh = sharding.make_mesh({"data": 1, "fsdp": options.processes, "tensor": 1})
    source = Counting(options.folder)
    config = from_hugging_face(source.config).replace(param_dtype="bfloat16")
    watch = AnonymousMemory()
    start = time.perf_counter()
    params = load_params(source, config, lambda tree: sharding.shardings(tree, mesh))
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    parts = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params)]
    held, above = sum(parts), watch.stop()
    return {
        "arrays_gb": held / GB,
        "anonymous_before_gb": watch.before / GB,
        "peak_above_before_gb": above / GB,
        "peak_beyond_arrays_gb": (above - held) / GB,
        "bytes_read_gb": source.bytes_read / GB,
        "seconds": seconds,
    }


class AnonymousMemory:
    """Watches the resident anonymous memory of this process."""

    def __init__(self):
        self.before = self.peak = _anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self):
        while not self._over.wait(0.001):
            self.peak = max(self.peak, _anonymous())

    def stop(self) -> int:
        """The most bytes above those at the start."""
        self._over.set()
        self._thread.join()
        return self.peak - self.before


def _anonymous() -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon; this needs Linux")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the model")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--limit", type=float, default=1.2, help="GB of each process")
    parser.add_argument("--where", type=pathlib.Path, help="folder for the temporary model")
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
