"""Where the tests find their data, and how they compile."""

import gc
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable

import pytest

ROOT = pathlib.Path(__file__).parents[1]

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling is most of the work here. Unoptimised machine code of the same HLO compiles 3 times as
# fast, in one module a tenth faster than in 32, and without the new emitters of fusions twice as
# fast again; jax 0.12 crashes without them.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
QUICK += " --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jax").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
WITHOUT_TORCH = ROOT / "tests" / "helpers" / "without_torch"


def folder(variable: str, default: str) -> pathlib.Path:
    """The folder that an environment variable names, or `default` beside the repository."""
    return pathlib.Path(os.environ.get(variable, ROOT / ".." / "shared" / default))


def devices(number: int) -> str:
    """The XLA_FLAGS of another process that has so many virtual devices, which wait for each other
    however busy the machine is: by default XLA ends the process after 40 seconds."""
    wait = "--xla_cpu_collective_call_terminate_timeout_seconds=900"
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={number} {wait}"


def environment(**changes: str) -> dict[str, str]:
    """The variables of another Python process, which imports this checkout and not torch."""
    path = os.pathsep.join(map(str, (WITHOUT_TORCH, ROOT, ROOT / "tests")))
    return os.environ | {"PYTHONPATH": path} | changes


# The published implementation's numbers; the variable names another set of the same layout.
GOLDEN = pathlib.Path(os.environ.get("PROMPTKD_GOLDEN", ROOT / "tests" / "golden"))
DATA = folder("PROMPTKD_DATA", "data")
TOKENIZERS = folder("PROMPTKD_TOKENIZERS", "tokenizers")


def golden_cases(kind: str, wanted: Callable[[dict], bool] = lambda case: True) -> list:
    """(folder, case) of each golden case of a kind that is wanted, as pytest parameters."""
    found = []
    for file in sorted(GOLDEN.glob("**/case.json")):
        case = json.loads(file.read_text(encoding="utf-8"))
        if case["kind"] == kind and wanted(case):
            found.append(pytest.param(file.parent, case, id=str(file.parent.relative_to(GOLDEN))))
    if not found and "PROMPTKD_GOLDEN" not in os.environ:
        raise FileNotFoundError(f"no {kind} case under {GOLDEN}, which is part of the repository")
    return found


# Files of tests that take more than 20 seconds of CPU, the longest first.
LONGEST = (
    *("processes", "recipes", "readme", "sharding", "step", "train", "teacher", "sampler"),
    *("stopped", "conversations", "benchmarks", "language_model", "run_data", "dropout"),
    *("compare", "hidden_loss", "plan", "vocabularies", "golden", "methods", "models"),
    *("launch", "reproduce", "experiment", "checkpoint", "params", "losses", "evaluate"),
    *("adapters", "gpus", "quantization", "quantized", "preconditioners", "adapter", "offload"),
)


@pytest.fixture
def no_report(monkeypatch):
    """Drawing it takes a third of a run, and other tests do."""
    monkeypatch.setattr("promptkd_jax.training.run.write_report", lambda *_, **__: None)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """Every compiled program holds memory maps, of which Linux grants a process 65,530: where XLA
    gets no more, it dies. One file takes up to 37,000 of them."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left with one of them when all else is done."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish():
    """Tracing makes so many objects that collecting garbage took a tenth of the time. The packages
    that were imported stay to the end, and need not be looked through."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
