"""OPT 13B into OPT 1.3B, 2.7B or 6.7B on Dolly.

`configs/opt.py:student=1.3b` (or 2.7b, 6.7b) is PromptKD as published; `,method=sft` or
`,method=kd` are baselines. Batch sizes are global. The published prompt is tokenised with special
tokens, so that it starts with `</s>` and loses its full stop.
"""

from ml_collections import ConfigDict

from promptkd_jax.recipe import paper_config

TEACHER = "MiniLLM/teacher-OPT-13B"
STUDENTS = {
    "1.3b": ("MiniLLM/init-OPT-1.3B", 64, 1, 5e-6, 10, "facebook/opt-1.3b", 5e-5, 10),
    "2.7b": ("MiniLLM/init-OPT-2.7B", 64, 1, 5e-6, 10, "facebook/opt-2.7b", 5e-5, 10),
    "6.7b": ("MiniLLM/init-OPT-6.7B", 64, 1, 5e-6, 10, "facebook/opt-6.7b", 1e-5, 10),
}


def get_config(arg: str = "student=1.3b") -> ConfigDict:
    """The recipe for `student=1.3b|2.7b|6.7b[,method=promptkd|sft|kd]`."""
    config = paper_config("OPT", TEACHER, STUDENTS, arg, default="1.3b")
    config.soft_prompt.add_special_tokens = True
    return config
