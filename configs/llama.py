"""Llama 13B into Llama 7B on Dolly (Llama 1, as in the paper).

`configs/llama.py:student=7b` is PromptKD as published; `,method=sft` or `,method=kd` are baselines.
Batch sizes are global.
"""

from ml_collections import ConfigDict

from promptkd_jax.recipe import paper_config

TEACHER = "MiniLLM/teacher-Llama-13B"
STUDENTS = {"7b": ("MiniLLM/init-Llama-7B", 64, 1, 5e-6, 10, "huggyllama/llama-7b", 1e-5, 10)}


def get_config(arg: str = "student=7b") -> ConfigDict:
    """The recipe for `student=7b[,method=promptkd|sft|kd]`."""
    config = paper_config("Llama", TEACHER, STUDENTS, arg, default="7b")
    config.soft_prompt.add_special_tokens = True
    return config
