"""Qwen3 30B-A3B, a mixture of experts, into Qwen3 1.7B on Dolly; nobody has published this run.

`configs/qwen3.py` is PromptKD, its prompt behind gates; `:method=NAME` as in `configs/gpt2.py`. The
hyper-parameters of the student are those of Llama 1 in the paper, not tuned. The teacher is the
chat model as it is; which slice holds it: `promptkd plan`.
"""

from ml_collections import ConfigDict

from promptkd_jax.training.recipes import PaperSize, behind_gates, paper_config

TEACHER = ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-Base", 1e-5, 10)
SIZES = {
    "1.7b": PaperSize(
        start="Qwen/Qwen3-1.7B",
        pretrained="Qwen/Qwen3-1.7B-Base",
        supervised=(1e-5, 10),
        on_policy=(64, 1, 5e-6, 10),
        distillm=("skew_reverse_kl(0.1)", 5e-5, 10),  # that of OPT
    )
}


def get_config(arg: str = "") -> ConfigDict:
    """The recipe for `student=1.7b,method=NAME`."""
    config = paper_config(TEACHER, SIZES, arg)
    config.data.template = "chat"
    config.mesh.update(data=1, fsdp=-1)  # whole on one device they do not fit: docs/plan.md
    return behind_gates(config)
