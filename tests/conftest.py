"""Where the tests find data that is not part of the repository, and how they compile."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling is most of the work here: unoptimised machine code of the same HLO compiles 3x faster.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def folder(variable: str, default: str) -> pathlib.Path:
    """The folder that an environment variable names, or `default` beside the repository."""
    return pathlib.Path(os.environ.get(variable, ROOT / ".." / "shared" / default))


GOLDEN = folder("PROMPTKD_GOLDEN", "golden")
DATA = folder("PROMPTKD_DATA", "data")
TOKENIZERS = folder("PROMPTKD_TOKENIZERS", "tokenizers")

LONGEST = ("test_processes", "test_recipes", "test_sharding", "test_train", "test_compare")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left with one of them when all else is done."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
