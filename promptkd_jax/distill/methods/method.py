"""A distillation method as data: where target rows come from, how the teacher is seen, what is
minimized. SFT, KD, SeqKD, GKD, MiniLLM, DistiLLM, ABKD and PromptKD are values of `Method`.
"""

import dataclasses

from promptkd_jax.distill.methods.method_checks import contradictions
from promptkd_jax.distill.methods.method_fields import (
    CROSS_ENTROPY,
    POLICY_GRADIENT,
    Execution,
    Objective,
)
from promptkd_jax.infra.specs import validate
from promptkd_jax.models.sampling_rules import Sampling


@dataclasses.dataclass(frozen=True)
class Conventions:
    """Choices in which the published code differs from its paper, or from good practice.

    Attributes:
      mean_of_means: average each micro-batch over its tokens, then the micro-batches; otherwise
        one mean over all tokens of the update, which does not depend on how it was cut.
      stale_prompt: only the last micro-batch of an update sees the just-updated prompt.
      early_clock: the regularization coefficient moves on one micro-batch before the update does.
      force_eos: a rollout that ran to its limit gets its last token overwritten by EOS.
      decay_norms: weight decay on norm scales, except GPT-2's (see `Family.decays_norms`).
      entropy_free: a forward KL is reported without the target's entropy (same gradient).
      cosine_ignores_warmup: the "cosine" schedule has its whole rate from the first update.
    """

    mean_of_means: bool = False
    stale_prompt: bool = False
    early_clock: bool = False
    force_eos: bool = False
    decay_norms: bool = False
    entropy_free: bool = False
    cosine_ignores_warmup: bool = False


PRESETS = {
    "default": Conventions(),
    "faithful": Conventions(
        mean_of_means=True,
        stale_prompt=True,
        early_clock=True,
        force_eos=True,
        decay_norms=True,
        entropy_free=True,
        cosine_ignores_warmup=True,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Objective):
    """A distillation method on rows of a certain size; hashable, a static argument of `jax.jit`.

    Attributes:
      total_steps: steps of the stage, for all that changes with them: the regularization, replay,
        a moving target, the weights of rows.
      response_capacity: R, the most response tokens of a row.
      prompt_capacity: X, the most tokens of a prompt.
      vocab_size: V, tokens that teacher and student share.
      max_new_tokens: the most tokens of a rollout; None for `response_capacity`.
      demonstrations: token ids that "in_context" puts before every row.
      sampling: how rows are sampled; execution: how a step is computed.
      conventions: where published code and good practice differ.

    Raises:
      ValueError: a value out of its range, or a combination that means nothing; says why.
    """

    total_steps: int
    response_capacity: int
    prompt_capacity: int
    vocab_size: int
    max_new_tokens: int | None = None
    demonstrations: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    execution: Execution = Execution()
    conventions: Conventions = Conventions()

    def __post_init__(self):
        for name, cls in (("sampling", Sampling), ("execution", Execution)):
            if not isinstance(getattr(self, name), cls):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not a {cls.__name__}")
        validate(self)
        validate(self.execution)
        mistakes = contradictions(self, self.execution, self.sampling)
        if self.teacher_view == "in_context" and not self.demonstrations:
            mistakes.append("demonstrations: are none, but teacher_view = 'in_context' needs some")
        warmup = self.prompt_warmup_steps
        if warmup and warmup >= self.total_steps:
            mistakes.append(
                f"prompt_warmup_steps: {warmup} of {self.total_steps} steps leave none with the "
                "soft prompt; expected fewer"
            )
        if mistakes:
            raise ValueError("; ".join(mistakes))

    @property
    def prompted(self) -> bool:
        """Whether the teacher is seen behind a soft prompt."""
        return self.teacher_view == "prompted"

    @property
    def student_needs_teacher(self) -> bool:
        """Whether the student's update looks at the teacher on the target rows."""
        return bool(self.hidden_terms) or any(
            name != CROSS_ENTROPY for name, _ in (*self.student_terms, *self.off_policy_terms)
        )

    @property
    def has_policy_gradient(self) -> bool:
        """Whether the student's terms value the tokens that it sampled."""
        return any(name == POLICY_GRADIENT for name, _ in self.student_terms)

    @property
    def rollout_length(self) -> int:
        """The most new tokens of a row of a rollout."""
        return self.max_new_tokens or self.response_capacity

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that a step's rows are dealt out to."""
        return self.execution.gradient_accumulation_steps * self.minibatches

    @property
    def sorts_rows(self) -> bool:
        """Whether rows of like length go into one micro-batch: where that saves columns, and no
        number depends on which row is in which micro-batch."""
        conventions, execution = self.conventions, self.execution
        micro_batches_differ = (
            conventions.mean_of_means
            or conventions.stale_prompt
            or conventions.early_clock
            or self.minibatches > 1
        )
        saves_columns = execution.length_buckets > 1 and execution.gradient_accumulation_steps > 1
        return saves_columns and not micro_batches_differ

    @property
    def updates_per_step(self) -> int:
        """Updates of the student in a step."""
        return self.minibatches * self.passes

    @property
    def updates_together(self) -> bool:
        """Whether the teacher's and the student's gradient are of the same forward pass of the
        student: it has one update a step, and sees either the soft prompt before its update, or one
        micro-batch, whose gradient is all that the prompt's update needs."""
        at_once = self.num_micro_batches == 1 or self.prompt_lag > 0
        # All of an online teacher would be updated within the branch of a bucket.
        small = self.teacher_view != "online" or self.execution.length_buckets == 1
        # Rules for the prompt need its updates done before they say what the student sees.
        ruled = self.prompt_updates > 1 or self.prompt_warmup_steps > 0 or self.prompt_fallback
        return self.updates_per_step == 1 and at_once and small and not ruled
