"""OPT 13B into OPT 1.3B, 2.7B or 6.7B on Dolly.

`configs/opt.py:student=1.3b` (or 2.7b, 6.7b) is PromptKD as published; `,method=NAME` as in
`configs/gpt2.py`. The published prompt is tokenised with special tokens, so that it starts with
`</s>` and loses its full stop.
"""

from ml_collections import ConfigDict

from promptkd_jax.training.recipes import PaperSize, paper_config

TEACHER = ("MiniLLM/teacher-OPT-13B", "facebook/opt-13b", 1e-5, 10)


def _size(name: str, hub_name: str, supervised: float) -> PaperSize:
    return PaperSize(
        start=f"MiniLLM/init-OPT-{hub_name}",
        pretrained=f"facebook/opt-{name}",
        supervised=(supervised, 10),
        on_policy=(64, 1, 5e-6, 10),
        distillm=("skew_reverse_kl(0.1)", 5e-5, 10),
    )


SIZES = {
    "1.3b": _size("1.3b", "1.3B", 5e-5),
    "2.7b": _size("2.7b", "2.7B", 5e-5),
    "6.7b": _size("6.7b", "6.7B", 1e-5),
}


def get_config(arg: str = "") -> ConfigDict:
    """The recipe for `student=1.3b|2.7b|6.7b,method=NAME`."""
    config = paper_config(TEACHER, SIZES, arg)
    config.soft_prompt.add_special_tokens = True
    config.mesh.update(data=1, fsdp=-1)  # whole on one device they do not fit: docs/plan.md
    return config
