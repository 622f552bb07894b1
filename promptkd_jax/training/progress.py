"""The progress of a run in the terminal."""

from collections.abc import Mapping

from rich.console import Console

from promptkd_jax.infra.terminal import ProgressBar

PROGRESS_FIGURES = {
    "loss": "loss",
    "kl_plain": "KL plain",
    "kl_prompted": "KL prompted",
    "tokens_per_second": "tokens/s",
}


class TrainingProgress(ProgressBar):
    """The steps of a run, with the metrics named in `PROGRESS_FIGURES` that an update has."""

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        console: Console | None = None,
    ):
        super().__init__(
            total_steps,
            "",
            unit="step",
            first=first_step,
            plain_seconds=0.0,
            console=console,
        )

    def update(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        """Shows that `step` steps are done, with the metrics of the last one and its stage."""
        labels = PROGRESS_FIGURES.items()
        figures = {label: metrics[name] for name, label in labels if name in metrics}
        super().update(step, figures, stage)
