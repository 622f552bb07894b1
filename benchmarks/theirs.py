"""The other side: PromptKD in PyTorch, see `torch_promptkd`."""

import itertools
import pathlib
import tempfile

import torch
from cases import RATE, STEPS, Case
from torch_promptkd import IGNORED, Rows, Settings, TorchPromptKD
from transformers import AutoModelForCausalLM


class Side:
    """The parts of the work, as in `ours`."""

    def __init__(self, case: Case, models: dict[str, str], *, dtype: str = "", **changes):
        self._case, self._batches = case, itertools.count()
        own = {"micro_batches": case.micro_batches} | changes
        settings = Settings(
            student_learning_rate=RATE,
            prompt_learning_rate=RATE,
            warmup_steps=0,
            total_steps=STEPS,
            prompt_ids=tuple(range(case.soft_prompt)),
            prompt_length=case.soft_prompt,
            max_prompt_length=case.request,
            max_length=case.columns,
            device="cuda" if torch.cuda.is_available() else "cpu",
            autocast=(dtype or case.dtype) == "bfloat16",
            **own,
        )
        teacher, student = (
            AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
            for name in ("teacher", "student")
        )
        self._loop = TorchPromptKD(teacher, student, settings)
        self._dtype = torch.bfloat16 if settings.autocast else torch.float32
        self._factors = {}
        self._rows = rows_of(case, self._loop)

    def rollout(self) -> int:
        """Writes the answers of a batch; returns their tokens."""
        rows = self._loop.rollout(self._requests(), **self._how)
        self._wait()
        return int(rows.mask.sum())

    def update(self) -> None:
        """Soft prompt and student, on rows that are there."""
        self._loop.update_prompt(self._rows)
        self.student_update()

    def student_update(self) -> None:
        """The student alone, on rows that are there."""
        self._loop.update_student(self._rows)
        self._wait()

    def iteration(self) -> int:
        """Rollout and update; returns the tokens of the answers."""
        metrics = self._loop.iteration(self._requests(), **self._how)
        self._wait()
        return int(metrics["tokens"])

    def checkpoint(self) -> None:
        """Saves what is trained, and reads it back."""
        loop = self._loop
        state = {
            "student": loop.student.state_dict(),
            "soft_prompt": loop.soft_prompt,
            "optimizers": [o.state_dict() for o in (loop.student_optimizer, loop.prompt_optimizer)],
        }
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "state.pt"
            torch.save(state, file)
            torch.load(file, map_location=loop.device, weights_only=True)

    def matmul(self) -> float:
        """A large product in the dtype of computation; returns its operations."""
        return self._product(*self._case.square)

    def stream(self) -> float:
        """A product of as many rows as a batch has; returns the bytes of its matrix."""
        self._product(*self._case.skinny)
        _, inner, outer = self._case.skinny
        return inner * outer * self._dtype.itemsize

    def _product(self, rows: int, inner: int, outer: int) -> float:
        if (rows, inner, outer) not in self._factors:
            shapes = (rows, inner), (inner, outer)
            self._factors[rows, inner, outer] = [
                torch.ones(shape, dtype=self._dtype, device=self._loop.device) for shape in shapes
            ]
        torch.matmul(*self._factors[rows, inner, outer])
        self._wait()
        return 2.0 * rows * inner * outer

    def device_peak_bytes(self) -> int | None:
        """The most memory so far of a device that has its own."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None

    @property
    def _how(self) -> dict:
        case = self._case
        pad_id = case.student["vocab_size"] - 1
        return {"max_new_tokens": case.response, "eos_id": case.eos_id, "pad_id": pad_id}

    def _requests(self) -> list[list[int]]:
        return self._case.requests(next(self._batches))

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def rows_of(case: Case, loop: TorchPromptKD) -> Rows:
    """The case's own rows, padded to the longest, or to all columns where shapes are fixed."""
    requests, answers = case.requests(0), case.answers(0)
    longest = max(len(x) + len(y) for x, y in zip(requests, answers))
    columns = case.columns if loop.settings.fixed_shapes else longest
    rows = [[*x, *y] for x, y in zip(requests, answers)]
    labels = [[IGNORED] * len(x) + y for x, y in zip(requests, answers)]

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        filled = [row + [filler] * (columns - len(row)) for row in rows]
        return torch.tensor(filled, device=loop.device)

    return Rows(
        input_ids=padded(rows, case.student["vocab_size"] - 1)[:, :-1],
        attention_mask=padded([[1] * len(row) for row in rows], 0)[:, 1:],
        labels=padded(labels, IGNORED)[:, 1:],
        first=min(map(len, requests)) - 1,
    )
