"""Llama-3.1 8B into Llama-3.2 1B on Dolly, on one consumer GPU; nobody has published this run.

`configs/llama32.py:student=1b,gpu=24gb` is PromptKD, its prompt behind gates; `method=NAME` as in
`configs/gpt2.py`. The teacher is the Instruct model as it is, its kernels in 8 bits; the student
starts as the base model of the same family. With `gpu=24gb` all of the student is trained, in
bfloat16 with stochastic rounding and moments in 8 bits; with `gpu=16gb` an adapter. Such GPUs hold
`student=1b` by all methods but `minillm`, whose 256 rows are written at once, and `teacher`; what
others need, and what would make them fit, says `promptkd plan --device`. The hyper-parameters are
not tuned.
"""

from ml_collections import ConfigDict

from promptkd_jax.training.recipes import (
    DOLLY_ROWS,
    PaperSize,
    behind_gates,
    paper_choices,
    paper_config,
    read_arguments,
)

TEACHER = ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B", 1e-5, 10)
SIZES = {
    name: PaperSize(
        start=f"meta-llama/Llama-3.2-{name.upper()}",
        pretrained=f"meta-llama/Llama-3.2-{name.upper()}",
        supervised=(1e-5, 10),
        on_policy=(8, 1, 5e-6, 3),
        distillm=("skew_reverse_kl(0.1)", 5e-5, 10),  # that of OPT
    )
    for name in ("1b", "3b")
}
GPUS = {"gpu": ("24gb", ("24gb", "16gb"))}


def get_config(arg: str = "") -> ConfigDict:
    """The recipe for `student=1b,method=NAME,gpu=24gb`."""
    gpu = read_arguments(arg, **paper_choices(SIZES), **GPUS)["gpu"]
    config = paper_config(TEACHER, SIZES, arg, **GPUS)
    config.soft_prompt.add_special_tokens = True
    config.teacher.quantize = "int8" if config.teacher.path else "none"
    config.student.param_dtype = "bfloat16"
    config.evaluation.batch_size = 8
    (stage,) = config.stages
    stage.dropout = False  # Llama has none
    if stage.minibatches == 1:  # MiniLLM has updates of 8 of 256 rollouts
        stage.batch_size = 8
        config.evaluation.every = DOLLY_ROWS // stage.batch_size
    if gpu == "24gb":
        stage.optimizer = "adamw_8bit"
    else:
        config.student.lora.update(rank=16, alpha=32.0)
        stage.learning_rate = 1e-4
    return behind_gates(config)
