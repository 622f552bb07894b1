"""The choices that make a method, each a field with its range and its help: where target rows come
from, how the teacher is seen, what is minimized, and how a step is computed.
"""

import dataclasses
from typing import Any

from promptkd_jax.distill.losses import losses
from promptkd_jax.distill.losses.divergence import DivergenceName
from promptkd_jax.distill.losses.hidden_loss import HiddenTerm
from promptkd_jax.distill.losses.policy_gradient import PolicyGradient
from promptkd_jax.distill.losses.transport import Transport
from promptkd_jax.distill.methods.curriculum import ROW_WEIGHTS, Interpolation
from promptkd_jax.infra.specs import Bool, Choice, Float, Group, Int, ListOf, field, group

CROSS_ENTROPY = "cross_entropy"  # the student term that looks at the tokens instead of the teacher
POLICY_GRADIENT = "policy_gradient"  # the one that looks at both
TRANSPORT = "transport"  # the one that looks at tokens that are near each other, too


@dataclasses.dataclass(frozen=True)
class TargetSource:
    """A source of target rows: the facts that the checks, the loop and the plan need of it.

    A source that is `on_policy` has a function in `targets.WRITERS`, which makes its rows in every
    step; the rows of all others are the batch itself.

    Attributes:
      help: a sentence, for the page of fields.
      on_policy: the student writes rows during training.
      reads_responses: rows may be the data's own responses.
      teacher_writes: the teacher writes the responses before training.
      keeps_replay: rows go into a replay buffer, and come out of it.
    """

    help: str
    on_policy: bool = False
    reads_responses: bool = False
    teacher_writes: bool = False
    keeps_replay: bool = False

    def __str__(self) -> str:
        return self.help


TARGETS = {
    "gold": TargetSource("the data's own responses", reads_responses=True),
    "teacher": TargetSource(
        "responses that the teacher wrote before training", teacher_writes=True
    ),
    "student": TargetSource("the student's own responses, written for each update", on_policy=True),
    "mixed": TargetSource(
        "a row is the student's with probability on_policy_share, else the data's",
        on_policy=True,
        reads_responses=True,
    ),
    "teacher_and_student": TargetSource(
        "a row is the student's with probability on_policy_share, else what the teacher wrote "
        "before training",
        on_policy=True,
        teacher_writes=True,
    ),
    "replay": TargetSource(
        "the data's, the student's, or what it wrote before, by DistiLLM's schedule",
        on_policy=True,
        reads_responses=True,
        keeps_replay=True,
    ),
}
VIEWS = {
    "plain": "as it is",
    "prompted": "behind the soft prompt, which is trained as well",
    "in_context": "with demonstrations before the prompt, which the student does not see",
    "cached": "its k largest log-probabilities, written down beforehand",
    "online": "as it is, and it learns from the student in turn",
}
REGULARIZATIONS = {
    "linear": "times (K - k) / K in update k of K (eq. 3)",
    "constant": "the same in all updates",
    "adaptive": "raised or lowered from update to update so that L_reg comes to target_kl",
}

WeightedNames = tuple[tuple[str, float], ...]  # of the terms of a loss


@dataclasses.dataclass(frozen=True)
class WeightedName:
    """The spec of a pair (name, weight): the name of a divergence, or one of `others`."""

    others: tuple[str, ...] = (CROSS_ENTROPY,)

    def __str__(self) -> str:
        return "a pair (divergence, weight) such as ('reverse_kl', 1.0)"

    def fault(self, value: Any) -> str:
        if not isinstance(value, list | tuple) or len(value) != 2:
            return str(self)
        name, weight = value
        if fault := Float(low=0.0).fault(weight):
            return fault
        fault = "" if name in self.others else DivergenceName().fault(name)
        return fault and f"{fault}, or {' or '.join(map(repr, self.others))}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The fields that a `Method` and a stage of a run's config share: which rows are learned from,
    how the teacher is seen, and which loss is minimized."""

    targets: str = field("gold", Choice(TARGETS), "where the rows of a step come from")
    student_terms: WeightedNames = field(
        ((CROSS_ENTROPY, 1.0),),
        ListOf(WeightedName((CROSS_ENTROPY, POLICY_GRADIENT, TRANSPORT)), nonempty=True),
        "the sum that the student minimizes: divergences from the teacher with their weights, "
        f"'{CROSS_ENTROPY}' on tokens that it did not write, '{POLICY_GRADIENT}' MiniLLM's, "
        f"'{TRANSPORT}' WASD's",
    )
    off_policy_terms: WeightedNames = field(
        (),
        ListOf(WeightedName()),
        "the same on rows that the student did not write; where there are any, student_terms are "
        "of the student's own rows alone",
    )
    row_weights: str = field("even", Choice(ROW_WEIGHTS), "of student_terms and off_policy_terms")
    interpolation: Interpolation = group(Interpolation, "TAID's moving target")
    transport: Transport = group(Transport, "WASD's settings")
    teacher_view: str = field("plain", Choice(VIEWS), "how the teacher is seen")
    on_policy_share: float = field(
        0.5, Float(low=0.0, high=1.0), "lambda of GKD, for 'mixed' targets"
    )
    rollouts_per_prompt: int = field(
        1,
        Int(low=1),
        "responses of the student to each prompt of a step, for 'student' targets; batch_size "
        "counts the responses",
    )
    teacher_share: float = field(
        0.0,
        Float(low=0.0, high=0.99),
        "share of the teacher in the mixture that rollouts are drawn from (MiniLLM)",
    )
    teacher_top_k: int = field(
        0,
        Int(low=0),
        "tokens of a rollout that are not among so many likeliest ones of the teacher are drawn "
        "from the teacher instead (speculative KD: 25); 0: none",
    )
    temperature: float = field(
        1.0,
        Float(low=0.0, open_low=True),
        "of both distributions in the student's divergences, see losses.tempered",
    )
    student_temperature: float = field(
        0.0,
        Float(low=0.0),
        "of the student's distribution there, and relative to temperature in L_kd of the prompt; "
        "0: the same",
    )
    token_weighting: str = field(
        "uniform", Choice("uniform", *losses.WEIGHTINGS), "of the student's divergences"
    )
    prompt_divergence: str = field(
        "reverse_kl", DivergenceName(), "L_kd, of the prompted teacher from the student (eq. 1)"
    )
    prompt_regularizer: str = field(
        "reverse_kl", DivergenceName(), "L_reg, of the prompted teacher from the plain one (eq. 2)"
    )
    regularization: float = field(
        1.0, Float(low=0.0), "coefficient of L_reg; 0 drops the forward of the plain teacher"
    )
    regularization_schedule: str = field(
        "linear", Choice(REGULARIZATIONS), "of the coefficient of L_reg"
    )
    target_kl: float = field(
        0.01, Float(low=0.0, open_low=True), "of the 'adaptive' schedule, nats a token"
    )
    prompt_lag: int = field(
        0,
        Int(low=0, high=1),
        "updates that the soft prompt of the student's loss is behind: 0: it was just updated (the "
        "paper); 1: it is that before, for which the teacher's forward is there already",
    )
    prompt_updates: int = field(
        1, Int(low=1), "updates of the soft prompt in a step, all on the same rows"
    )
    prompt_warmup_steps: int = field(
        0,
        Int(low=0),
        "steps in the beginning in which the soft prompt learns from L_reg alone, and the student "
        "from the plain teacher; the regularization's schedule begins behind them",
    )
    prompt_fallback: bool = field(
        False,
        Bool(),
        "whether the student learns a row from the plain teacher where the prompted one finds the "
        "data's own response to its prompt less likely",
    )
    teacher_terms: WeightedNames = field(
        ((CROSS_ENTROPY, 1.0), ("forward_kl", 1.0)),
        ListOf(WeightedName(), nonempty=True),
        "what an 'online' teacher minimizes, against the student and the tokens",
    )
    policy_gradient: PolicyGradient = group(PolicyGradient, "MiniLLM's settings")
    hidden_terms: tuple[HiddenTerm, ...] = field(
        (), ListOf(Group(HiddenTerm)), "losses on hidden states, each made by recipes.hidden_term"
    )
    corpus_terms: WeightedNames = field(
        (), ListOf(WeightedName()), "terms on rows of plain text, data.corpus, beside the others"
    )
    router_balance: float = field(
        0.0,
        Float(low=0.0),
        "weight of the load balancing of a student that is a mixture of experts, over the tokens "
        "of a micro-batch, see hidden_loss.load_balancing (transformers' router_aux_loss_coef)",
    )
    dropout: bool = field(
        False,
        Bool(),
        "whether the student has the dropout of its config.json in its own update; it is seen by "
        "the soft prompt, and writes, without",
    )
    minibatches: int = field(
        1, Int(low=1), "updates of the student that the rows of a step are divided among"
    )
    passes: int = field(
        1, Int(low=1), "times that the rows of a step are gone through (MiniLLM: 4)"
    )

    @property
    def source(self) -> TargetSource:
        """The source of target rows."""
        return TARGETS[self.targets]

    @property
    def reads_responses(self) -> bool:
        """Whether rows may be the data's own responses."""
        never = self.targets == "mixed" and self.on_policy_share == 1
        return self.source.reads_responses and not never

    @property
    def needs_responses(self) -> bool:
        """Whether the data's own responses are looked at: as rows, or by `prompt_fallback`."""
        return self.reads_responses or self.prompt_fallback

    @property
    def others_write(self) -> bool:
        """Whether rows may be of another than the student."""
        return self.reads_responses or self.source.teacher_writes

    @property
    def teacher_writes_along(self) -> bool:
        """Whether rollouts are of student and teacher together."""
        return self.teacher_share > 0 or self.teacher_top_k > 0

    @property
    def needs_token_kernel(self) -> bool:
        """Whether the costs between the teacher's tokens are looked at."""
        return any(name == TRANSPORT for name, _ in self.student_terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's parameters are looked at in an update."""
        if self.teacher_view == "cached":
            return False
        terms = (*self.student_terms, *self.off_policy_terms, *self.corpus_terms)
        return (
            self.teacher_view in ("prompted", "online")
            or self.teacher_writes_along
            or bool(self.hidden_terms)
            or any(name != CROSS_ENTROPY for name, _ in terms)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """The execution of a step: its speed and memory, not its result.

    The result is the same up to rounding, except with `one_step_off_policy` and
    `rollout_quantize`, with those published conventions that make micro-batches differ, and for the
    draws of dropout in packed rows, which are of their columns. `Method` checks the values.
    """

    gradient_accumulation_steps: int = field(
        1, Int(low=1), "micro-batches (G) of an update; rows are dealt out to them in turn"
    )
    length_buckets: int = field(
        1,
        Int(low=1, high=16),
        "lengths that an update, and the prompts of a rollout, are compiled for, up to a whole row "
        "in even steps; micro-batches get rows of like length, and take the least that fits",
    )
    packed_rows: int = field(
        0,
        Int(low=0),
        "rows of data.max_length tokens that the batch_size rows of a step are packed into, some "
        "in each, none seeing another; for targets that no student writes; 0: rows are not packed",
    )
    max_concurrent_rollouts: int = field(
        0,
        Int(low=0),
        "rows that are written at once, others follow where some end; 0: all of a step, but half "
        "where a device has at least 1,024 whose keys and values take at least six times the bytes "
        "of the student's weights; batch_size: always all",
    )
    rollout_quantize: str = field(
        "none",
        Choice("none", "int8"),
        "what the student's kernels are rounded to while it writes rows: less to read for every "
        "token, which is drawn from the distribution of the rounded student",
    )
    one_step_off_policy: bool = field(
        False,
        Bool(),
        "the rows of a step are written during the step before, by the student as it is before "
        "that step's update: writing and updating do not wait for each other",
    )
