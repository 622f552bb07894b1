"""Llama-3.1 70B into Llama-3.1 8B on Dolly, for a pod; nobody has published this run.

`configs/llama31.py` is PromptKD, its prompt behind gates; `:method=NAME` as in `configs/gpt2.py`.
The hyper-parameters of the student are those of Llama 1 in the paper, not tuned. The teacher is the
Instruct model as it is; the student starts as the base model of the same family. Which slice holds
it: `promptkd plan`.
"""

from ml_collections import ConfigDict

from promptkd_jax.training.recipes import PaperSize, behind_gates, paper_config

TEACHER = (
    "meta-llama/Llama-3.1-70B-Instruct",
    "meta-llama/Llama-3.1-70B",
    1e-5,
    10,
)
SIZES = {
    "8b": PaperSize(
        start="meta-llama/Llama-3.1-8B",
        pretrained="meta-llama/Llama-3.1-8B",
        supervised=(1e-5, 10),
        on_policy=(64, 1, 5e-6, 10),
        distillm=("skew_reverse_kl(0.1)", 5e-5, 10),  # that of OPT
    )
}


def get_config(arg: str = "") -> ConfigDict:
    """The recipe for `student=8b,method=NAME`."""
    config = paper_config(TEACHER, SIZES, arg)
    config.soft_prompt.add_special_tokens = True
    config.mesh.update(data=1, fsdp=-1)  # whole on one device they do not fit: docs/plan.md
    return behind_gates(config)
