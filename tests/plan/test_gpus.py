"""What a run needs of one machine's GPUs, and what would make it fit."""

import json
import pathlib
import re
import shlex

import jax
import numpy as np
import optax
import pytest
from helpers import tiny
from ml_collections import ConfigDict

from promptkd_jax.cli.main import main
from promptkd_jax.distill import optimizer
from promptkd_jax.infra import sharding
from promptkd_jax.infra.errors import ConfigError
from promptkd_jax.models.families.registry import PUBLISHED
from promptkd_jax.plan import ahead, fit, gpus, remat, roofline, tables
from promptkd_jax.plan.abstract_run import abstract_mesh, abstract_run
from promptkd_jax.training import run as training
from promptkd_jax.training.config.checks import check_mesh, checked, contradictions_of, read_run
from promptkd_jax.training.config.config_file import fingerprint
from promptkd_jax.training.config.fields import NOT_IN_FINGERPRINT
from promptkd_jax.training.recipes import base_config, method_stage

GPU = "gpu", 9.0
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def config_of(teacher: str, student: str, **stage) -> ConfigDict:
    config = base_config()
    config.teacher.path, config.student.path = teacher, student
    config.data.update(train="synthetic:train", dev="synthetic:dev", template="plain")
    config.data.update(max_prompt_length=64, max_length=128)
    config.stages = (method_stage("promptkd", **(dict(batch_size=8, steps=10) | stage)),)
    return config


LLAMAS = config_of("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B")


def test_a_gpu_is_named_or_known_by_its_memory():
    one = gpus.parse_device("RTX4090")
    assert (one.name, one.devices, one.chip.hbm_gib) == ("rtx4090", 1, 24564 / 1024)
    assert one.chip.usable_gib == 0.92 * 24564 / 1024
    assert (gpus.parse_device("h100:8").name, gpus.parse_device("h100:8").devices) == ("h100:8", 8)
    plain = gpus.parse_device("24 GB").chip
    assert (plain.hbm_gib, plain.tflops, plain.platform) == (24, None, "gpu")
    # A card has what its driver reports, which may be less than its name says.
    has = [gpus.parse_device(name).chip.hbm_gib for name in ("l4", "a10", "l40s", "t4", "h100")]
    np.testing.assert_allclose(has, (22.49, 22.49, 44.99, 15.0, 79.65), atol=0.005)
    for spelled in ("RTX 4090", "4090", "rtx4090:1"):
        assert gpus.parse_device(spelled).chip == one.chip
    for wrong in ("rtx9090", "0GB", "24", "GB", ""):
        with pytest.raises(ConfigError, match="--device: .* names no GPU; expected its memory"):
            gpus.parse_device(wrong)
    for count in ("0", "all", "99", ""):
        with pytest.raises(ConfigError, match=f"expected 1 to 16 of 'h100', found '{count}'"):
            gpus.parse_device(f"h100:{count}")


def llama(width: int, layers: int) -> dict:
    """With heads of 64, two to a key/value head; blocks of 256 divide all widths."""
    return PUBLISHED["huggyllama/llama-7b"] | {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 128,
        "intermediate_size": 8 * width // 3 // 256 * 256,
        "vocab_size": 8192,
    }


@pytest.fixture(autouse=True)
def larger_and_smaller(monkeypatch):
    table = PUBLISHED | {"some/larger": llama(768, 8), "some/smaller": llama(512, 6)}
    table["some/odd"] = llama(768, 8) | {"intermediate_size": 101}
    monkeypatch.setattr("promptkd_jax.plan.abstract_run.PUBLISHED", table)


CASES = {
    "none": {},
    "dots": {"teacher.remat": "dots", "student.remat": "dots", "stages[0].optimizer": "adafactor"},
    "two micro-batches": {
        "stages[0].gradient_accumulation_steps": 2,
        "stages[0].optimizer": "muon",
    },
    "moments in 8 bits": {
        "teacher.remat": "dots",
        "student.remat": "dots",
        "stages[0].optimizer": "adamw_8bit",
    },
    "int8, and int4 below an adapter": {
        "teacher.quantize": "int8",
        "student.quantize": "int4",
        "student.lora.rank": 8,
        "student.remat": "dots",
    },
    "layers in the host's memory": {"teacher.offload": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_xla_says_of_the_step_on_this_machine(case):
    """About within 10 % of the program's arguments and temporaries, in float32."""
    config = checked(config_of("some/larger", "some/smaller"))
    config = fit.changed(config, CASES[case])
    mesh = sharding.make_mesh(ONE, jax.devices()[:1])
    run = abstract_run(config).on(mesh)
    program = ahead.compile_step(run)
    # Of a CPU the host's memory is the device's, and what lies there an argument as any other.
    arguments = jax.tree.leaves(run.arguments())
    hosts = [x for x in arguments if x.sharding.memory_kind == sharding.HOST_MEMORY]
    assert bool(hosts) == config.teacher.offload
    needed = program.total - program.code - sum(x.size * x.dtype.itemsize for x in hosts)
    # Of int4 below an adapter jax 0.12 needs 3 % less than 0.10, for which the estimate is made.
    assert 0.9 < roofline.needed_bytes(config, mesh, "cpu") / needed < 1.11


@pytest.mark.parametrize("slice_size", [2**20, 2**24])
def test_an_update_of_moments_in_8_bits_needs_what_xla_says_of_it(slice_size, monkeypatch):
    """Within 15 %, of the student above in slices and whole."""
    for module in (optimizer, roofline):
        monkeypatch.setattr(module, "SLICE", slice_size)
    config = checked(config_of("some/larger", "some/smaller", optimizer="adamw_8bit"))
    run = abstract_run(config)
    update, params = run.stage.optimizers.student, run.student.params

    def step(params, state, gradients):
        changes, state = update.update(gradients, state, params)
        return optax.apply_updates(params, changes), state

    shapes = params, jax.eval_shape(update.init, params), params
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*shapes).compile()
    found = compiled.memory_analysis().temp_size_in_bytes
    assert sum(roofline._optimizing(run, "cpu")) == pytest.approx(found, rel=0.15)
    # Other compilers have fewer parameters in work at a time, and nothing before the gradients.
    spared, early = roofline._optimizing(run, "gpu")
    assert spared < 0.7 * found and not early


def test_changes_that_turn_out_not_to_be_needed_are_left_out():
    """With an adapter, what came before it for the sake of the memory of a whole student."""
    config, mesh = checked(LLAMAS), abstract_mesh(ONE)
    every = fit.tried(config, mesh, GPU, 0.0)  # all that gains anything, and never enough
    adapter = next(i for i, one in enumerate(every) if "LoRA" in one.words)
    usable = every[adapter - 1].needed - 1
    *_, last, fewer = fit.tried(config, mesh, GPU, usable)
    assert "LoRA" in last.words
    assert {x.words for x in fewer.changes} < {x.words for x in last.changes}
    assert last.needed <= fewer.needed <= usable
    for change in fewer.changes[:-1]:
        without = [x for x in fewer.changes if x is not change]
        settings = {path: x for one in without for path, x in one.settings.items()}
        assert roofline.needed_bytes(fit.changed(config, settings), mesh, *GPU) > usable


def test_changes_are_tried_one_after_the_other_until_the_run_fits():
    config, mesh = checked(LLAMAS), abstract_mesh(ONE)
    as_it_is = roofline.needed_bytes(config, mesh, "gpu")
    assert fit.tried(config, mesh, GPU, as_it_is) == [fit.Fit((), as_it_is)]
    fits = fit.tried(config, mesh, GPU, 22e9)
    needed = [one.needed for one in fits]
    assert needed == sorted(needed, reverse=True) and needed[-1] <= 22e9 < needed[-2]
    # The flags, given to the command, are that run.
    flags = shlex.split(fits[-1].flags)
    settings = {}
    for flag in flags:
        path, _, value = flag.removeprefix("--config.").partition("=")
        settings[path] = int(value) if value.isdecimal() else value
    assert roofline.needed_bytes(fit.changed(config, settings), mesh, "gpu") == needed[-1]
    assert fit.tried(config, mesh, GPU, 1.0)[-1].needed > 1.0


def test_one_model_for_both_is_changed_as_one():
    """Kept alike, teacher and student are the same arrays."""
    config = config_of("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B")
    config.student.lora.rank = 4
    config.teacher.param_dtype = config.student.param_dtype = "bfloat16"
    whole = checked(config)
    fits = fit.tried(whole, mesh := abstract_mesh(ONE), GPU, 14e9)
    assert fits[-1].needed <= 14e9
    assert fits[-1].settings["teacher.quantize"] == fits[-1].settings["student.quantize"] == "int8"
    apart = fit.changed(whole, {"teacher.quantize": "int8"})
    first = fit.tried(apart, mesh, GPU, 20e9)[1]
    assert first.settings == {"student.quantize": "int8"}
    assert first.needed < fits[0].needed < roofline.needed_bytes(apart, mesh, *GPU)


def test_an_adapters_base_is_rounded_before_anything_waits_for_the_hosts_memory():
    config = fit.changed(checked(LLAMAS), {"student.lora.rank": 4})
    made = [[*change.settings] for change in fit.changes(config)]
    assert made.index(["student.quantize"]) < made.index(["teacher.offload"])


def test_a_student_that_is_kept_rounded_is_not_rounded_while_it_writes():
    settings = {"student.lora.rank": 4, "stages[0].rollout_quantize": "int8"}
    config = fit.changed(checked(LLAMAS), settings)
    assert not contradictions_of(config)
    made = {change.words: fit.changed(config, change.settings) for change in fit.changes(config)}
    of_student = [words for words in made if "student's frozen" in words]
    assert len(of_student) == 2
    assert not any(contradictions_of(made[words]) for words in of_student)


@pytest.mark.parametrize(("rows", "devices"), [(10, 1), (8, 8), (6, 2)])
def test_no_change_is_tried_that_the_run_or_its_mesh_does_not_allow(rows, devices):
    config = checked(config_of("some/larger", "some/smaller", batch_size=rows))
    mesh = abstract_mesh(ONE | {"data": devices})
    for one in fit.tried(config, mesh, GPU, 1.0):
        settings = {path: x for change in one.changes for path, x in change.settings.items()}
        made = fit.changed(config, settings)
        check_mesh(made, mesh)
        assert not contradictions_of(made)


def test_kernels_of_an_odd_number_of_inputs_are_not_tried_in_4_bits(monkeypatch, capsys):
    config = checked(config_of("some/odd", "some/smaller"))
    fits = fit.tried(config, abstract_mesh(ONE), GPU, 1.0)
    assert [one.words for one in fits if "int8" in one.words and "teacher" in one.words]
    assert not any("int4" in one.flags for one in fits)
    monkeypatch.setattr(fit, "device_bytes", lambda: 1000)
    fit.fitted(config, sharding.make_mesh(ONE, jax.devices()[:1]))
    assert "nothing that is tried" in capsys.readouterr().err


def test_an_older_gpu_needs_more_for_attention():
    config = fit.changed(
        checked(config_of("some/larger", "some/smaller")),
        {"teacher.dtype": "bfloat16", "student.dtype": "bfloat16"},
    )
    turing, hopper = (
        roofline.needed_bytes(config, abstract_mesh(ONE), "gpu", capability)
        for capability in (7.5, 9.0)
    )
    assert turing > hopper


@pytest.mark.parametrize(
    ("dtype", "capability", "models"),
    [("bfloat16", 8.9, 0), ("bfloat16", 7.5, 2), ("float32", 9, 2)],
)
def test_models_whose_attention_has_no_kernel_are_named(monkeypatch, dtype, capability, models):
    config = checked(config_of("some/larger", "some/smaller"))
    run = abstract_run(fit.changed(config, {"teacher.dtype": dtype, "student.dtype": dtype}))
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(sharding, "compute_capability", lambda: capability)
    said = list(training._without_a_kernel(run))
    assert len(said) == models
    assert all(f"here: {dtype}, heads of 64, compute capability {capability:g}" in x for x in said)


def test_a_change_replaces_fields_of_groups_and_of_stages():
    config = checked(LLAMAS)
    made = fit.changed(config, {"teacher.dtype": "bfloat16", "stages[0].batch_size": 4})
    assert (made.teacher.dtype, made.stages[0].batch_size) == ("bfloat16", 4)
    assert (config.teacher.dtype, config.stages[0].batch_size) == ("float32", 8)


def test_the_command_prints_what_would_make_it_fit(tmp_path, capsys):
    file = tmp_path / "config.py"
    teacher, student = LLAMAS.teacher.path, LLAMAS.student.path
    file.write_text(
        "from promptkd_jax.training.recipes import base_config, method_stage\n\n"
        "def get_config():\n"
        "    config = base_config()\n"
        f"    config.teacher.path, config.student.path = {teacher!r}, {student!r}\n"
        "    config.data.update(train='synthetic:train', dev='synthetic:dev', template='plain')\n"
        "    config.stages = (method_stage('promptkd', batch_size=8, steps=10),)\n"
        "    return config\n"
    )
    output = tmp_path / "plan.json"
    with pytest.raises(SystemExit) as ended:
        main(["plan", f"--config={file}", "--device=24GB", f"--output={output}"])
    assert ended.value.code == 1
    printed, written = capsys.readouterr().out, json.loads(output.read_text())
    assert "DOES NOT FIT" in printed and "at least" not in printed  # nothing is known but memory
    flags = re.search(r"^flags of the last line: (.+)$", printed, re.MULTILINE)[1]
    assert written["fits"][-1]["flags"] == flags
    assert written["fits"][-1]["needed"] <= written["memory"]["usable"]
    main(["plan", f"--config={file}", "--device=24GB", *shlex.split(flags)])
    printed = capsys.readouterr().out
    assert "FITS" in printed and "DOES NOT" not in printed and "would make it fit" not in printed
    with pytest.raises(SystemExit):
        main(["plan", f"--config={file}", "--device=h200"])
    assert re.search(r"^step: .* s by the estimate, .*\(at least ", capsys.readouterr().out, re.M)
    with pytest.raises(SystemExit):
        main(["plan", f"--config={file}", "--device=24GB:2", "--search"])
    assert "n/a" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected no --topology"):
        main(["plan", f"--config={file}", "--device=24GB", "--topology=v5e:2x2"])
    with pytest.raises(SystemExit, match="--device: '' names no GPU"):  # a variable that is not set
        main(["plan", f"--config={file}", "--device="])


def test_a_run_that_will_not_fit_is_told_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "models"
    config = checked(tiny.short_config(folder))
    mesh = sharding.make_mesh(ONE, jax.devices()[:1])
    monkeypatch.setattr(fit, "device_bytes", lambda: 1e12)
    fit.fitted(config, mesh)
    assert "estimated" not in capsys.readouterr().err
    monkeypatch.setattr(fit, "device_bytes", lambda: 1000)
    fit.fitted(config, mesh)
    said = capsys.readouterr().err
    assert re.search("warning: this run needs an estimated .* nothing that is tried", said)
    needed = roofline.needed_bytes(config, mesh, "cpu")
    monkeypatch.setattr(fit, "device_bytes", lambda: needed - 1)
    monkeypatch.setattr(fit, "memory_fraction", lambda: 0.75)
    fit.fitted(config, mesh)
    said = capsys.readouterr().err
    assert re.search("for it; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95,.*would do with .*by ", said)


def remedy_of(needed: float, share: float = 1.0, limit: float = 18.0, part: float = 0.75) -> str:
    """On a GPU of 24 bytes where teachers in int8 need 20, on the host 17, and LoRA students 10."""
    changes = [
        fit.Change("int8", {"teacher.quantize": "int8"}),
        fit.Change("host", {"teacher.offload": True}),
        fit.Change("LoRA, which wants a larger learning rate", {"student.lora.rank": 16}),
    ]
    fits = [fit.Fit(tuple(changes[: i + 1]), x) for i, x in enumerate((20.0, 17.0, 10.0))]

    def within(usable):
        return next((one for one in fits if one.needed <= usable), fits[-1])

    return fit.remedy(needed, limit, fit.most_usable(limit, part), within, share)


@pytest.mark.parametrize(
    ("said", "fraction", "flags"),
    [
        # 92 % of 24 are 22.08.
        (remedy_of(22.0), "first", ["quantize", "offload"]),
        (remedy_of(22.1), "first", ["quantize"]),  # and then fewer changes are enough
        (remedy_of(22.1, limit=22.8, part=0.95), "never", ["quantize"]),
        (remedy_of(19.0, limit=18.0, part=1.0), "never", ["quantize", "offload"]),  # a TPU
        (remedy_of(22.1, limit=12.0, part=0.5), "first", ["quantize"]),
        (remedy_of(9.0, limit=8.0, part=0.75), "first", []),
        # After a device had no memory left, whatever the estimate was.
        (remedy_of(16.0, share=0.8), "first", ["quantize", "offload", "lora"]),
        (remedy_of(30.0, share=0.8), "first", ["quantize", "offload"]),
        (remedy_of(30.0, share=0.8, limit=22.8, part=0.95), "never", ["quantize", "offload"]),
    ],
)
def test_a_larger_part_of_a_gpu_is_advised_before_another_run(said, fraction, flags):
    if fraction == "first":
        assert said.startswith("set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, with which")
    else:
        assert "FRACTION" not in said
    assert re.findall(r"--config.\w+.(\w+)", said) == flags
    assert ("another --workdir" in said) == ("quantize" in flags)  # of another config
    assert ("larger learning rate" in said) == ("lora" in flags)


@pytest.mark.parametrize(("field", "value"), [("offload", True), ("quantize", "int8")])
def test_what_may_change_between_resumes_wants_no_other_workdir(field, value):
    config = checked(LLAMAS)
    change = fit.Change("less", {f"teacher.{field}": value})
    new = fit.changed(config, change.settings)
    resumed = fingerprint(config, NOT_IN_FINGERPRINT) == fingerprint(new, NOT_IN_FINGERPRINT)
    said = fit.remedy(30.0, 22.0, 22.0, lambda usable: fit.Fit((change,), 20.0))
    assert resumed == (field == "offload")
    assert ("another --workdir" in said) != resumed


def test_the_part_of_a_gpu_is_what_the_environment_says(monkeypatch):
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert remat.memory_fraction() == 1.0  # of a CPU
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    assert remat.memory_fraction() == 0.75
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
    assert remat.memory_fraction() == 0.95


def test_no_memory_left_is_answered_by_what_to_set(tmp_path, monkeypatch):
    tiny.short_config(folder := tmp_path / "models")
    file = tmp_path / "config.py"
    file.write_text(
        "import pathlib\nfrom helpers import tiny\n\n"
        f"def get_config():\n    return tiny.short_config(pathlib.Path({str(folder)!r}))\n"
    )

    def run(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr("promptkd_jax.training.run.run", run)
    with pytest.raises(SystemExit, match="has no memory left .*9 bytes.* by .--config") as stopped:
        main(["train", f"--config={file}", f"--workdir={tmp_path / 'run'}"])
    assert "Traceback" not in str(stopped.value)


def test_a_plan_for_this_machine_says_what_more_of_its_gpu_would_do(monkeypatch, tmp_path, capsys):
    config = pathlib.Path(__file__).parents[2] / "configs/rehearsal.py"
    command = ["plan", f"--config={config}", "--device=here", "--no-compile"]
    needed = roofline.needed_bytes(read_run(command[1:2]), abstract_mesh(ONE), "cpu")
    monkeypatch.setattr("promptkd_jax.plan.command.memory_fraction", lambda: 0.75)
    for has, enough in ((needed / 1.2, True), (needed / 1.3, False)):
        monkeypatch.setattr(gpus, "device_bytes", lambda has=has: has)
        with pytest.raises(SystemExit):
            main(command)
        said = capsys.readouterr().out
        assert ("JAX: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in said) == enough
    monkeypatch.setattr(gpus, "device_bytes", lambda: needed / 0.99)  # which JAX has as it is
    main([*command, f"--output={tmp_path / 'plan.json'}"])
    tables.show(json.loads((tmp_path / "plan.json").read_text()) | {"platform": "gpu"})
    assert "FRACTION" not in capsys.readouterr().out


def test_devices_of_this_machine_are_compiled_for(capsys):
    config = pathlib.Path(__file__).parents[2] / "configs/rehearsal.py"
    main(["plan", f"--config={config}", "--device=here"])
    assert "needed (compiler)" in capsys.readouterr().out
