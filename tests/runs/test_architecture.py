"""The rooms of the package: arrows point down, the core is pure, and a name has one place."""

import ast
import collections
import importlib
import pathlib
import subprocess
import sys

import pytest
from conftest import environment

import promptkd_jax

PACKAGE = pathlib.Path(__file__).parents[2] / "promptkd_jax"
# From the ground up; two rooms on one floor do not know each other.
FLOORS = (
    {"infra"},
    {"data", "models"},
    {"distill"},
    {"inference"},
    {"evaluation"},
    {"training"},
    {"studies", "plan"},
    {"cli"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join((PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts)): file
    for file in PACKAGE.rglob("*.py")
    if file.name not in ("__init__.py", "__main__.py")
}
COMMANDS = {"main", "add_arguments", "run"}  # what every command defines


def imported(file: pathlib.Path) -> set[str]:
    """The modules of the package that a file imports, also inside of functions."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in MODULES else node.module for name in names}
    return modules


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_is_in_a_room():
    assert {room(module) for module in MODULES} == set(FLOOR_OF)


def test_a_folder_is_taken_in_at_a_glance():
    """At most a dozen files, but where each is a command or a family of models."""
    for folder, files in collections.Counter(file.parent for file in MODULES.values()).items():
        assert files <= 12 or folder.name in ("cli", "families"), folder


def test_imports_point_down():
    wrong = [
        f"{module} imports {other}"
        for module, file in MODULES.items()
        for other in imported(file)
        if other == PACKAGE.name
        or (room(other) != room(module) and FLOOR_OF[room(other)] >= FLOOR_OF[room(module)])
    ]
    assert not wrong


def test_no_import_goes_round_in_a_circle():
    below = {module: imported(file) & MODULES.keys() for module, file in MODULES.items()}
    while leaves := {module for module, others in below.items() if not others}:
        below = {m: others - leaves for m, others in below.items() if m not in leaves}
    assert not below


def test_a_public_name_is_defined_in_one_module():
    places = collections.defaultdict(set)
    for module, file in MODULES.items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].add(module)
    assert {name: found for name, found in places.items() if len(found) > 1}.keys() <= COMMANDS


def test_files_and_functions_are_read_in_one_go():
    for file in MODULES.values():
        text = file.read_text()
        assert text.count("\n") <= 450, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 70, (file, node.name)


CORE = sorted(
    module
    for module in MODULES
    if room(module) == "distill"
    or module.endswith(("models.decoder", "models.layers.attention", "models.sampler"))
)
SHELL = {"cli", "training", "evaluation", "inference", "studies", "plan"}
IMPURE = {"promptkd_jax.infra.files", "promptkd_jax.infra.distributed", "orbax", "ml_collections"}


def test_the_core_knows_nothing_of_files_flags_hosts_and_configs():
    code = f"""
import importlib, sys
for module in {CORE}:
    importlib.import_module(module)
print(*sys.modules)
"""
    how = dict(env=environment(), capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert set(CORE) <= loaded and not loaded & IMPURE
    assert not {m for m in loaded if m.startswith("promptkd_jax.") and room(m) in SHELL}


def test_the_public_names_are_those_that_type_checkers_see():
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    typed = {
        alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(typed) == promptkd_jax.__all__
    for name, module in typed.items():
        found = getattr(promptkd_jax, name)
        assert found is getattr(importlib.import_module(module), name), name
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = promptkd_jax.absent


def test_importing_the_package_imports_no_other():
    code = "import sys, promptkd_jax; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert [name for name in loaded if name.startswith("promptkd_jax")] == ["promptkd_jax"]
    assert not {"jax", "numpy", "transformers", "orbax"} & set(loaded)
