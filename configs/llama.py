"""Llama 13B into Llama 7B on Dolly (Llama 1, as in the paper).

`configs/llama.py:student=7b` is PromptKD as published; `,method=NAME` as in `configs/gpt2.py`.
"""

from ml_collections import ConfigDict

from promptkd_jax.training.recipes import PaperSize, paper_config

TEACHER = ("MiniLLM/teacher-Llama-13B", "huggyllama/llama-13b", 1e-5, 10)
SIZES = {
    "7b": PaperSize(
        start="MiniLLM/init-Llama-7B",
        pretrained="huggyllama/llama-7b",
        supervised=(1e-5, 10),
        on_policy=(64, 1, 5e-6, 10),
        distillm=("skew_reverse_kl(0.1)", 5e-5, 10),  # that of OPT: none is published
    )
}


def get_config(arg: str = "") -> ConfigDict:
    """The recipe for `student=7b,method=NAME`."""
    config = paper_config(TEACHER, SIZES, arg)
    config.soft_prompt.add_special_tokens = True
    config.mesh.update(data=1, fsdp=-1)  # whole on one device they do not fit: docs/plan.md
    return config
