"""PromptKD in PyTorch as one writes it with transformers and PEFT: our opponent in benchmarks.

Models are Hugging Face's, the soft prompt is PEFT's prompt tuning, rollouts are `generate`'s,
both optimisers AdamW. Dropout is off throughout.

B rows, T columns, K columns from the first that is supervised in any row, V vocabulary, M
soft-prompt tokens, D width of the teacher.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

IGNORED = -100  # the label of what is not supervised


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyper-parameters, by default those of the paper's GPT-2 base, and how to compute.

    Attributes:
      total_steps: K of the coefficient (K - k) / K of L_reg.
      warmup_steps: of both learning rates, linear from 0; constant thereafter.
      no_decay: parameters whose names contain one of these have no weight decay.
      prompt_ids: whose embeddings the soft prompt starts from, repeated and cut to `prompt_length`.
      regularisation: coefficient of L_reg; 0 drops the plain teacher's forward.
      max_prompt_length: the most tokens of a request.
      max_length: the most tokens of a row, request and response.
      micro_batches: that the rows of an update are dealt out to, their gradients added up.
      autocast: bfloat16, in which the frozen teacher is then held as well.
      compile: the forward and backward passes of both updates.
      static_cache: of `generate`, which transformers then compiles where it runs on a GPU.
      padding_mask: give the models the mask of real tokens. Rows are padded on the right and
        attention is causal, so that it changes no loss, but with it there is no flash attention.
    """

    student_learning_rate: float = 5e-5
    prompt_learning_rate: float = 5e-5
    warmup_steps: int = 100
    total_steps: int = 880
    clip: float = 1.0
    weight_decay: float = 1e-2
    no_decay: tuple[str, ...] = ("bias", "ln_1.weight", "ln_2.weight", "ln_f.weight")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    prompt_ids: tuple[int, ...] = (15979, 577, 345, 389, 257, 3710, 13)  # of GPT-2's tokenizer
    prompt_length: int = 7
    regularisation: float = 1.0
    max_prompt_length: int = 256
    max_length: int = 512
    micro_batches: int = 1
    device: str = "cpu"
    autocast: bool = False
    compile: bool = False
    static_cache: bool = False
    padding_mask: bool = False

    @property
    def fixed_shapes(self) -> bool:
        """Whether rows are padded to the lengths above, not to the longest of the batch."""
        return self.compile or self.static_cache


class Rows(NamedTuple):
    """Requests and responses, padded on the right; `[B, T]` each.

    `labels` are the next tokens where these are of the response, elsewhere `IGNORED`. No label is
    left of the column `first`.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    first: int = 0

    @property
    def mask(self) -> torch.Tensor:
        """1 where supervised, `[B, K]`."""
        return (self.labels[:, self.first :] != IGNORED).float()


class TorchPromptKD:
    """Algorithm 1 of the paper. Both models are changed in place.

    Metrics are tensors on the device, so that no step waits for them.
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, settings: Settings):
        self.settings = settings
        self.device = torch.device(settings.device)
        self.step = 0
        for model in (teacher, student):
            model.set_attn_implementation("sdpa")
        self.student = student.to(self.device).eval()
        teacher = teacher.to(self.device, torch.bfloat16 if settings.autocast else None)
        self.teacher = _with_prompt(teacher, settings).eval()
        self.student_optimizer = self._adamw(
            _decay_groups(self.student, settings), settings.student_learning_rate
        )
        self.prompt_optimizer = self._adamw([self.soft_prompt], settings.prompt_learning_rate)
        self.schedules = {
            optimizer: LambdaLR(optimizer, self._warmup)
            for optimizer in (self.student_optimizer, self.prompt_optimizer)
        }
        if settings.compile:
            self._prompt_losses = torch.compile(self._prompt_losses)
            self._student_loss = torch.compile(self._student_loss)

    @property
    def soft_prompt(self) -> torch.nn.Parameter:
        """P, `[M, D]`."""
        return self.teacher.prompt_encoder["default"].embedding.weight

    def iteration(
        self,
        requests: Sequence[list[int]],
        max_new_tokens: int,
        *,
        eos_id: int | None = None,
        pad_id: int = 0,
    ) -> dict[str, torch.Tensor]:
        """y ~ q(.|x), then the prompt's update, then the student's with the prompt just updated."""
        rows = self.rollout(requests, max_new_tokens, eos_id=eos_id, pad_id=pad_id)
        metrics = self.update_prompt(rows) | self.update_student(rows)
        return metrics | {"tokens": rows.mask.sum()}

    def rollout(
        self,
        requests: Sequence[list[int]],
        max_new_tokens: int,
        *,
        eos_id: int | None = None,
        pad_id: int = 0,
    ) -> Rows:
        """Answers that the student samples, up to and including the first EOS.

        Without `eos_id` all run to `max_new_tokens`.

        Raises:
          ValueError: a request is empty or too long, or its row may become so.
        """
        settings = self.settings
        lengths = [len(request) for request in requests]
        if min(lengths) < 1 or max(lengths) > settings.max_prompt_length:
            raise ValueError(
                f"requests have {min(lengths)} to {max(lengths)} tokens; expected 1 to "
                f"max_prompt_length = {settings.max_prompt_length}"
            )
        if max(lengths) + max_new_tokens > settings.max_length:
            raise ValueError(
                f"a request of {max(lengths)} and max_new_tokens = {max_new_tokens} make a row "
                f"longer than max_length = {settings.max_length}"
            )
        width = settings.max_prompt_length if settings.fixed_shapes else max(lengths)
        padding = [width - length for length in lengths]
        input_ids = [[pad_id] * n + list(request) for n, request in zip(padding, requests)]
        attention_mask = [[0] * n + [1] * (width - n) for n in padding]
        with torch.inference_mode(), self._autocast():
            written = self.student.generate(
                input_ids=torch.tensor(input_ids, device=self.device),
                attention_mask=torch.tensor(attention_mask, device=self.device),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=eos_id,
                pad_token_id=pad_id,
                cache_implementation="static" if settings.static_cache else None,
            )
        columns = settings.max_length if settings.fixed_shapes else written.shape[1]
        padding = torch.tensor(padding, device=self.device)
        return _training_rows(written, padding, width, columns, eos_id, pad_id, min(lengths) - 1)

    def update_prompt(self, rows: Rows) -> dict[str, torch.Tensor]:
        """P <- P - eta grad [KL(p_P || q) + (K - k) / K KL(p_P || p)]."""
        settings = self.settings
        self.step += 1
        weight = settings.regularisation * max(0.0, 1 - self.step / settings.total_steps)
        found = torch.zeros(2, device=self.device)
        for part, share in self._parts(rows):
            with self._autocast():
                distillation, regulariser = self._prompt_losses(part)
            (share * (distillation + weight * regulariser)).backward()
            found += share * torch.stack([distillation.detach(), regulariser.detach()])
        distillation, regulariser = found
        return {
            "prompt_kd": distillation,
            "prompt_regulariser": regulariser,
            "prompt_loss": distillation + weight * regulariser,
            "prompt_grad_norm": self._descend(self.prompt_optimizer),
        }

    def update_student(self, rows: Rows) -> dict[str, torch.Tensor]:
        """theta <- theta - eta grad KL(q || p_P)."""
        found = torch.zeros((), device=self.device)
        for part, share in self._parts(rows):
            with self._autocast():
                loss = self._student_loss(part)
            (share * loss).backward()
            found += share * loss.detach()
        norm = self._descend(self.student_optimizer)
        return {"student_loss": found, "student_grad_norm": norm}

    def _parts(self, rows: Rows) -> Iterator[tuple[Rows, torch.Tensor]]:
        """Micro-batches, each with its share of the tokens."""
        for part in zip(*(x.chunk(self.settings.micro_batches) for x in rows[:3])):
            part = Rows(*part, rows.first)
            yield part, part.mask.sum() / rows.mask.sum()

    def _prompt_losses(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """L_kd and L_reg."""
        with torch.no_grad():
            student = self._log_probs(self.student, rows)
        prompted = self._log_probs(self.teacher, rows)
        distillation = _mean_kl(prompted, student, rows.mask)
        if not self.settings.regularisation:
            return distillation, torch.zeros_like(distillation)
        with torch.no_grad():
            plain = self._log_probs(self.teacher.get_base_model(), rows)
        return distillation, _mean_kl(prompted, plain, rows.mask)

    def _student_loss(self, rows: Rows) -> torch.Tensor:
        with torch.no_grad():
            prompted = self._log_probs(self.teacher, rows)
        return _mean_kl(self._log_probs(self.student, rows), prompted, rows.mask)

    def _log_probs(self, model: torch.nn.Module, rows: Rows) -> torch.Tensor:
        """`[B, K, V]`. Columns are counted from the right: PEFT's prompt is to the left of them."""
        logits = model(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask if self.settings.padding_mask else None,
            use_cache=False,
            logits_to_keep=rows.input_ids.shape[1] - rows.first,
        ).logits
        return logits.float().log_softmax(dim=-1)

    def _descend(self, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """One update; the gradient's norm before clipping."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = clip_grad_norm_(parameters, self.settings.clip)
        optimizer.step()
        self.schedules[optimizer].step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _adamw(self, parameters: Iterable, learning_rate: float) -> torch.optim.AdamW:
        settings = self.settings
        return torch.optim.AdamW(
            parameters,
            lr=learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=self.device.type == "cuda",
        )

    def _warmup(self, step: int) -> float:
        return min(1.0, step / self.settings.warmup_steps) if self.settings.warmup_steps else 1.0

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.autocast)


def _with_prompt(teacher: PreTrainedModel, settings: Settings):
    """The teacher, frozen, behind a soft prompt that starts from the embeddings of tokens."""
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        prompt_tuning_init=PromptTuningInit.RANDOM,
        num_virtual_tokens=settings.prompt_length,
    )
    model = get_peft_model(teacher, config)
    numbers = torch.arange(settings.prompt_length) % len(settings.prompt_ids)
    embeddings = teacher.get_input_embeddings().weight
    start = embeddings[torch.tensor(settings.prompt_ids)[numbers].to(embeddings.device)]
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(start)
    return model


def _decay_groups(model: PreTrainedModel, settings: Settings) -> list[dict]:
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        exempt = any(part in name for part in settings.no_decay)
        (others if exempt else decayed).append(parameter)
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def _training_rows(
    written: torch.Tensor,
    padding: torch.Tensor,
    width: int,
    columns: int,
    eos_id: int | None,
    pad_id: int,
    first: int,
) -> Rows:
    """What `generate` wrote behind left-padded requests, shifted to the left by their padding.

    Args:
      written: the requests in `width` columns, then the responses.
      padding: columns on the left of each request, `[B]`.
      columns: of the rows, where the last token is only ever a label.
    """
    response = written[:, width:]
    ends = response == eos_id if eos_id is not None else torch.zeros_like(response, dtype=bool)
    lengths = (ends.cumsum(dim=1) - ends.long() == 0).sum(dim=1)  # up to and with the first EOS
    starts = width - padding[:, None]
    column = torch.arange(columns, device=written.device)
    tokens = written.gather(1, (column + padding[:, None]).clamp(max=written.shape[1] - 1))
    real = column < starts + lengths[:, None]
    followed = real[:, 1:]
    return Rows(
        input_ids=torch.where(followed, tokens[:, :-1], pad_id),
        attention_mask=followed.long(),
        labels=torch.where(real & (column >= starts), tokens, IGNORED)[:, 1:],
        first=first,
    )


def _mean_kl(log_p: torch.Tensor, log_q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(p || q), the mean over tokens where `mask` is 1."""
    per_token = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    return (per_token * mask).sum() / mask.sum()
