"""A distillation method as data: where target rows come from, how the teacher is seen, what is
minimized. SFT, KD, SeqKD, GKD, MiniLLM, DistiLLM, ABKD and PromptKD are values of `Method`.
"""

import dataclasses
from typing import Any

from promptkd_jax.distill import losses
from promptkd_jax.distill.hidden_loss import HiddenTerm
from promptkd_jax.distill.policy_gradient import PolicyGradient
from promptkd_jax.infra.specs import Bool, Choice, Float, Group, Int, ListOf, field, group, validate
from promptkd_jax.models.sampler import Sampling

CROSS_ENTROPY = "cross_entropy"  # the student term that looks at the tokens instead of the teacher
POLICY_GRADIENT = "policy_gradient"  # the one that looks at both


@dataclasses.dataclass(frozen=True)
class TargetSource:
    """Where target rows come from: what the checks, the loop and the plan have to know of it. How
    the rows are made is a function of `targets.WRITERS`.

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

Terms = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Conventions:
    """Where the published code and its paper, or good practice, differ.

    Attributes:
      mean_of_means: average each micro-batch over its tokens, then the micro-batches; otherwise
        one mean over all tokens of the update, which does not depend on how it was cut.
      stale_prompt: only the last micro-batch of an update sees the just-updated prompt.
      early_clock: the regularization coefficient moves on one micro-batch before the update does.
      force_eos: a rollout that ran to its limit gets its last token overwritten by EOS.
      decay_norms: weight decay on norm scales, except GPT-2's.
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


PRESETS = {"default": Conventions(), "faithful": Conventions(*[True] * 7)}


class DivergenceName:
    """The spec of a name from `losses.DIVERGENCES`, with numbers where it takes them."""

    def __str__(self) -> str:
        return "a divergence such as 'reverse_kl' or 'alpha_beta(0.2, 0.7)'"

    def fault(self, value: Any) -> str:
        if not isinstance(value, str):
            return str(self)
        try:
            losses.divergence(value)
        except ValueError as error:
            return f"{self} ({error})"
        return ""


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
    """What is learned, from which rows, and how the teacher is seen: the fields that a `Method` and
    a stage of a run's config share."""

    targets: str = field("gold", Choice(TARGETS), "where the rows of a step come from")
    student_terms: Terms = field(
        ((CROSS_ENTROPY, 1.0),),
        ListOf(WeightedName((CROSS_ENTROPY, POLICY_GRADIENT)), nonempty=True),
        "the sum that the student minimizes: divergences from the teacher with their weights, "
        f"'{CROSS_ENTROPY}' on tokens that it did not write, '{POLICY_GRADIENT}' MiniLLM's",
    )
    teacher_view: str = field("plain", Choice(VIEWS), "how the teacher is seen")
    on_policy_share: float = field(
        0.5, Float(low=0.0, high=1.0), "lambda of GKD, for 'mixed' targets"
    )
    teacher_share: float = field(
        0.0,
        Float(low=0.0, high=0.99),
        "share of the teacher in the mixture that rollouts are drawn from (MiniLLM)",
    )
    temperature: float = field(
        1.0,
        Float(low=0.0, open_low=True),
        "of both distributions in the student's divergences, see losses.tempered",
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
    teacher_terms: Terms = field(
        ((CROSS_ENTROPY, 1.0), ("forward_kl", 1.0)),
        ListOf(WeightedName(), nonempty=True),
        "what an 'online' teacher minimizes, against the student and the tokens",
    )
    policy_gradient: PolicyGradient = group(PolicyGradient, "MiniLLM's settings")
    hidden_terms: tuple[HiddenTerm, ...] = field(
        (), ListOf(Group(HiddenTerm)), "losses on hidden states, each made by recipes.hidden_term"
    )
    corpus_terms: Terms = field(
        (), ListOf(WeightedName()), "terms on rows of plain text, data.corpus, beside the others"
    )
    minibatches: int = field(
        1, Int(low=1), "updates of the student that the rows of a step are divided among"
    )
    passes: int = field(
        1, Int(low=1), "times that the rows of a step are gone through (MiniLLM: 4)"
    )

    @property
    def source(self) -> TargetSource:
        """Where the rows come from."""
        return TARGETS[self.targets]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a step is computed: its speed and memory. What is computed is the same, up to rounding,
    but for `one_step_off_policy`; and with published conventions for micro-batches. `Method` checks
    its values.
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
    max_concurrent_rollouts: int = field(
        0,
        Int(low=0),
        "rows that are written at once, others follow where some end; 0: all of a step",
    )
    one_step_off_policy: bool = field(
        False,
        Bool(),
        "the rows of a step are written during the step before, by the student as it is before "
        "that step's update: writing and updating do not wait for each other",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Objective):
    """A distillation method on rows of a certain size; hashable, a static argument of `jax.jit`.

    Attributes:
      total_steps: K, of the schedules of the regularization and of the replay.
      response_capacity: R, the most response tokens of a row.
      prompt_capacity: columns of the longest prompt.
      vocab_size: words that teacher and student share.
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
        if mistakes:
            raise ValueError("; ".join(mistakes))

    @property
    def prompted(self) -> bool:
        """Whether the teacher is seen behind a soft prompt."""
        return self.teacher_view == "prompted"

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's parameters are looked at in an update."""
        return needs_teacher(self)

    @property
    def needs_view(self) -> bool:
        """Whether the student's update looks at the teacher, on the rows themselves."""
        return bool(self.hidden_terms) or any(
            name != CROSS_ENTROPY for name, _ in self.student_terms
        )

    @property
    def rollout_length(self) -> int:
        """The most new tokens of a rollout."""
        return self.max_new_tokens or self.response_capacity

    @property
    def parts(self) -> int:
        """Micro-batches that a step's rows are dealt out to."""
        return self.execution.gradient_accumulation_steps * self.minibatches

    @property
    def sorts_rows(self) -> bool:
        """Whether rows of like length go into one micro-batch, where that changes no number."""
        by, how = self.conventions, self.execution
        parts_differ = by.mean_of_means or by.stale_prompt or by.early_clock
        alike = not parts_differ and self.minibatches == 1
        return alike and how.length_buckets > 1 and how.gradient_accumulation_steps > 1

    @property
    def updates(self) -> int:
        """How often a step updates the student."""
        return self.minibatches * self.passes


def reads_answers(method: Objective) -> bool:
    """Whether rows may be the data's own responses."""
    never = method.targets == "mixed" and method.on_policy_share == 1
    return method.source.reads_responses and not never


def needs_teacher(method: Objective) -> bool:
    """Whether the teacher's parameters are looked at in an update."""
    if method.teacher_view == "cached":
        return False
    terms = (*method.student_terms, *method.corpus_terms)
    return (
        method.teacher_view in ("prompted", "online")
        or method.teacher_share > 0
        or bool(method.hidden_terms)
        or any(name != CROSS_ENTROPY for name, _ in terms)
    )


def contradictions(method: Objective, execution: Execution, sampling: Sampling) -> list[str]:
    """Returns what means nothing together; each message begins with the field that it is about."""
    names = [name for name, _ in method.student_terms]
    found = []
    if len(set(names)) < len(names):
        found.append(f"student_terms: {', '.join(names)}: expected each name once")
    if CROSS_ENTROPY in names and method.source.on_policy and not reads_answers(method):
        found.append(
            f"student_terms: {CROSS_ENTROPY} counts rows that the student did not write, and "
            f"targets = {method.targets!r} has none; name a divergence instead, or other targets"
        )
    if not any(weight > 0 for _, weight in method.student_terms):
        found.append("student_terms: all weights are 0; expected one above 0")
    for terms in ("teacher_terms", "corpus_terms"):
        others = [name for name, _ in getattr(method, terms)]
        if len(set(others)) < len(others):
            found.append(f"{terms}: {', '.join(others)}: expected each name once")
    adapts = method.regularization_schedule == "adaptive"
    if adapts and method.prompt_regularizer == "soft_cross_entropy":
        found.append(
            "prompt_regularizer: soft_cross_entropy does not fall to 0, so that no coefficient "
            "brings it to target_kl; expected forward_kl, which has the same gradient"
        )
    if set(names) <= {CROSS_ENTROPY} and not method.hidden_terms and method.teacher_view != "plain":
        found.append(
            f"teacher_view: {method.teacher_view!r} is of no use where neither student_terms nor "
            "hidden_terms look at the teacher; name a divergence there"
        )
    if not method.source.on_policy:
        found += _without_rollouts(method, execution)
    if POLICY_GRADIENT in names:
        found += _about_policy(method, execution, sampling)
    if method.teacher_view == "cached":
        found += _about_cache(method, names)
    return found


def _without_rollouts(method: Objective, execution: Execution) -> list[str]:
    found = []
    if execution.max_concurrent_rollouts:
        found.append(
            f"max_concurrent_rollouts: {execution.max_concurrent_rollouts} rows are to be written "
            f"at once, but targets = {method.targets!r} has none that are written during training; "
            "expected 0"
        )
    if method.teacher_share:
        found.append(
            f"teacher_share: {method.teacher_share:g} mixes the teacher into rollouts, but "
            f"targets = {method.targets!r} has none; expected targets = 'student'"
        )
    if execution.one_step_off_policy:
        written = [name for name, source in TARGETS.items() if source.on_policy]
        found.append(
            f"one_step_off_policy: rows are written a step ahead, but targets = "
            f"{method.targets!r} has none that are written during training; expected False, or one "
            f"of {', '.join(written)}"
        )
    return found


def _about_policy(method: Objective, execution: Execution, sampling: Sampling) -> list[str]:
    found = []
    if method.targets != "student":
        found.append(
            f"student_terms: {POLICY_GRADIENT} rewards what the student wrote; expected targets = "
            f"'student', found {method.targets!r}"
        )
    if execution.one_step_off_policy:
        found.append(
            f"one_step_off_policy: {POLICY_GRADIENT} needs rows that the student wrote as it is; "
            "those written a step ahead are of the student before its last update; expected False"
        )
    if method.token_weighting != "uniform":
        found.append(f"token_weighting: {method.token_weighting!r} is not for {POLICY_GRADIENT}")
    plain = dict(temperature=1.0, top_k=0, top_p=1.0, no_repeat_ngram_size=0)
    for name, value in plain.items():
        if (chosen := getattr(sampling, name)) != value:
            found.append(
                f"sampling.{name}: {chosen!r}, but {POLICY_GRADIENT} values tokens as drawn from "
                f"the models as they are; expected {value!r}"
            )
    if method.teacher_share and method.teacher_view != "plain":
        found.append(
            f"teacher_share: {method.teacher_share:g} mixes the plain teacher into rollouts, of "
            f"which {POLICY_GRADIENT} would need the weights; expected teacher_view = 'plain', or 0"
        )
    return found


def _about_cache(method: Objective, names: list[str]) -> list[str]:
    found = []
    if method.source.on_policy:
        found.append(
            f"targets: {method.targets!r} makes rows during training, but a cached teacher knows "
            "only the rows that it was written for; expected 'gold' or 'teacher'"
        )
    if method.hidden_terms:
        found.append(
            "hidden_terms: a cached teacher has log-probabilities but no hidden states; expected "
            "another teacher_view, or no hidden_terms"
        )
    if method.temperature != 1:
        found.append(
            f"temperature: {method.temperature:g} needs the whole distribution, a cached teacher "
            "keeps the largest log-probabilities; expected 1"
        )
    if method.token_weighting != "uniform":
        found.append(
            f"token_weighting: {method.token_weighting!r} needs whole distributions, a cached "
            "teacher keeps the largest log-probabilities; expected 'uniform'"
        )
    if any(name != CROSS_ENTROPY for name, _ in method.corpus_terms):
        found.append(
            "corpus_terms: a cached teacher has not seen the corpus; expected cross_entropy alone"
        )
    return found
