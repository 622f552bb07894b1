"""GPT-2 XL into GPT-2 base, medium or large on Dolly: the paper's main experiment.

`configs/gpt2.py:student=base` (or medium, large) is PromptKD as published; `,method=sft` or
`,method=kd` are baselines. Batch sizes are global. Hyper-parameters: PromptKD (arXiv 2402.12842)
section 4.1 and the published scripts. Before it, the paper fine-tunes the teacher (20 epochs) and
the student (3 epochs, chosen by validation loss) on Dolly; point `--config.teacher.path` and
`--config.student.path` at your own, or use the published ones that are the defaults here.
"""

from ml_collections import ConfigDict

from promptkd_jax.recipe import paper_config

TEACHER = "MiniLLM/teacher-gpt2-1.5B"
# size: hub id of the student after its 3 epochs, global batch, micro-batches of 16 rows, learning
# rate, epochs; then start, learning rate and epochs of the baselines.
STUDENTS = {
    "base": ("MiniLLM/init-gpt2-120M", 256, 16, 5e-5, 20, "openai-community/gpt2", 5e-4, 20),
    "medium": ("MiniLLM/init-gpt2-340M", 64, 4, 1e-5, 20, "openai-community/gpt2-medium", 1e-4, 20),
    "large": ("MiniLLM/init-gpt2-760M", 64, 4, 5e-6, 15, "openai-community/gpt2-large", 1e-4, 10),
}


def get_config(arg: str = "student=base") -> ConfigDict:
    """The recipe for `student=base|medium|large[,method=promptkd|sft|kd]`."""
    return paper_config("GPT-2", TEACHER, STUDENTS, arg, default="base")
