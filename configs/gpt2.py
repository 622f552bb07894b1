"""GPT-2 XL into GPT-2 base, medium or large on Dolly: the paper's main experiment.

`configs/gpt2.py:student=base` (or medium, large) is PromptKD as published; `,method=NAME` is any
other of `recipes.METHODS`, with its published hyper-parameters where there are such, and what comes
before: `teacher` (the teacher's SFT) and `init` (the student's 3 epochs). `promptkd reproduce` runs
all of it. Batch sizes are global. Sources: PromptKD (arXiv 2402.12842) section 4.1 and the
published scripts of PromptKD, MiniLLM, DistiLLM and the newer methods (docs/methods.md). The models
that are the defaults here are those that MiniLLM published; point `--config.teacher.path` and
`--config.student.path` at your own.
"""

from ml_collections import ConfigDict

from promptkd_jax.training.recipes import PaperSize, paper_config

TEACHER = ("MiniLLM/teacher-gpt2-1.5B", "openai-community/gpt2-xl", 5e-5, 10)
SKEW_FORWARD, SKEW_REVERSE = "skew_forward_kl(0.1)", "skew_reverse_kl(0.1)"
SIZES = {
    "base": PaperSize(
        start="MiniLLM/init-gpt2-120M",
        pretrained="openai-community/gpt2",
        supervised=(5e-4, 20),
        on_policy=(256, 16, 5e-5, 20),
        distillm=(SKEW_FORWARD, 5e-4, 20),
        of_their_own={"amid": (1e-4, 20), "wasd": (1e-4, 20)},
    ),
    "medium": PaperSize(
        start="MiniLLM/init-gpt2-340M",
        pretrained="openai-community/gpt2-medium",
        supervised=(1e-4, 20),
        on_policy=(64, 4, 1e-5, 20),
        distillm=(SKEW_REVERSE, 5e-4, 20),
        of_their_own={"amid": (5e-4, 20), "wasd": (1e-4, 20)},
    ),
    "large": PaperSize(
        start="MiniLLM/init-gpt2-760M",
        pretrained="openai-community/gpt2-large",
        supervised=(1e-4, 10),
        on_policy=(64, 4, 5e-6, 15),
        distillm=(SKEW_REVERSE, 1e-4, 10),
        of_their_own={"amid": (5e-4, 10), "wasd": (1e-4, 20)},
    ),
}


def get_config(arg: str = "") -> ConfigDict:
    """The recipe for `student=base|medium|large,method=NAME`."""
    return paper_config(TEACHER, SIZES, arg)
