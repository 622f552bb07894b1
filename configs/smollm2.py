"""SmolLM2 1.7B into SmolLM2 360M or 135M on Dolly; nobody has published these runs.

`configs/smollm2.py:student=360m` (or 135m) is PromptKD, its prompt behind gates; `,method=NAME` as
in `configs/gpt2.py`. The hyper-parameters of the student are those of the GPT-2 recipes of about
the same size, not tuned.
"""

from ml_collections import ConfigDict

from promptkd_jax.training.recipes import PaperSize, behind_gates, paper_config

TEACHER = (
    "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    5e-5,
    10,
)
SIZES = {
    "360m": PaperSize(
        start="HuggingFaceTB/SmolLM2-360M-Instruct",
        pretrained="HuggingFaceTB/SmolLM2-360M-Instruct",
        supervised=(1e-4, 20),
        on_policy=(64, 4, 1e-5, 20),
        distillm=("skew_reverse_kl(0.1)", 5e-4, 20),
    ),
    "135m": PaperSize(
        start="HuggingFaceTB/SmolLM2-135M-Instruct",
        pretrained="HuggingFaceTB/SmolLM2-135M-Instruct",
        supervised=(5e-4, 20),
        on_policy=(256, 16, 5e-5, 20),
        distillm=("skew_forward_kl(0.1)", 5e-4, 20),
    ),
}


def get_config(arg: str = "") -> ConfigDict:
    """The recipe for `student=360m|135m,method=NAME`."""
    config = paper_config(TEACHER, SIZES, arg)
    config.data.template = "chat"
    return behind_gates(config)
