"""A distillation method as data: where target rows come from, how the teacher is seen, what is
minimised. SFT, KD, SeqKD, GKD, MiniLLM, DistiLLM, ABKD and PromptKD are values of `Method`.
"""

import dataclasses

from promptkd_jax.distill import losses
from promptkd_jax.distill.hidden_loss import HiddenTerm
from promptkd_jax.distill.policy_gradient import PolicyGradient
from promptkd_jax.models.sampler import Sampling

CROSS_ENTROPY = "cross_entropy"  # the student term that looks at the tokens instead of the teacher
POLICY_GRADIENT = "policy_gradient"  # the one that looks at both

TARGETS = {
    "gold": "the data's own answers",
    "teacher": "answers that the teacher wrote before training",
    "student": "the student's own answers, written for each update",
    "mixed": "a row is the student's with probability on_policy_share, else the data's",
    "replay": "the data's, the student's, or what it wrote before, by DistiLLM's schedule",
}
ON_POLICY = ("student", "mixed", "replay")
VIEWS = {
    "plain": "as it is",
    "prompted": "behind the soft prompt, which is trained as well",
    "in_context": "with demonstrations before the request, which the student does not see",
    "cached": "its k largest log-probabilities, written down beforehand",
    "online": "as it is, and it learns from the student in turn",
}
REGULARISATIONS = ("linear", "constant", "adaptive")
MINIMUMS = dict(rollout_slots=0, micro_batches=1, length_buckets=1, minibatches=1, passes=1)

Terms = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Conventions:
    """Where the published code and its paper, or good practice, differ.

    Attributes:
      mean_of_means: average each micro-batch over its tokens, then the micro-batches; otherwise
        one mean over all tokens of the update, which does not depend on how it was cut.
      stale_prompt: only the last micro-batch of an update sees the just-updated prompt.
      early_clock: the regularisation coefficient moves on one micro-batch before the update does.
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


@dataclasses.dataclass(frozen=True)
class Method:
    """A distillation method; hashable, a static argument of `jax.jit`.

    Attributes:
      targets: where rows come from, one of `TARGETS`.
      student_terms: ((name, weight), …): "cross_entropy" is on the tokens of rows that the student
        did not write itself, "policy_gradient" MiniLLM's, all others are divergences from the
        teacher. See `losses.divergence` for the names.
      total_steps: K, of the schedules of the regularisation and of the replay.
      response_capacity: R, the most response tokens of a row.
      prompt_capacity: columns of the longest request.
      vocab_size: what teacher and student share.
      max_new_tokens: of a rollout; None for `response_capacity`.
      rollout_slots: rows that a rollout writes at once, see `sampler.sample`; 0: all of a step.
      stale_rollouts: the rows of a step are written during the step before, by the student as it is
        before that step's update: writing and updating do not wait for each other.
      on_policy_share: lambda of GKD, for "mixed" targets.
      teacher_share: the teacher's share in the mixture that rollouts are drawn from (MiniLLM).
      teacher_view: how the teacher is seen, one of `VIEWS`.
      demonstrations: token ids that "in_context" puts before every row.
      teacher_terms: what an "online" teacher minimises, against the student and the tokens.
      prompt_divergence: L_kd, of the prompted teacher from the student (paper eq. 1).
      prompt_regulariser: L_reg, of the prompted teacher from the plain one (eq. 2).
      regularisation: coefficient of L_reg; 0 drops the plain forward.
      regularisation_schedule: "linear": times (K - k) / K (eq. 3); "constant"; "adaptive": raised
        or lowered from update to update so that L_reg comes to `target_kl` nats per token.
      temperature: of both distributions in the student's divergences, see `losses.tempered`.
      token_weighting: of the student's divergences, "uniform" or one of `losses.WEIGHTINGS`.
      policy_gradient: see `PolicyGradient`.
      hidden_terms: losses on hidden states, see `HiddenTerm`.
      corpus_terms: ((name, weight), …) on rows of plain text, beside the others.
      micro_batches: G; rows are dealt out to micro-batches in turn.
      length_buckets: lengths that an update is compiled for, up to that of a whole row in even
        steps; a micro-batch takes the least that its longest row fits into, and micro-batches have
        rows of like length. So do rollouts, for their requests. More of them compile longer, and
        the soft prompt's update makes a forward of the student of its own. What is computed is the
        same, up to rounding.
      minibatches, passes: a step's rows serve `passes` times `minibatches` updates of the student,
        each on its part of them (MiniLLM: 4 passes).

    Raises:
      ValueError: a combination that means nothing; says why.
    """

    targets: str
    student_terms: Terms
    total_steps: int
    response_capacity: int
    prompt_capacity: int
    vocab_size: int
    max_new_tokens: int | None = None
    rollout_slots: int = 0
    stale_rollouts: bool = False
    on_policy_share: float = 0.5
    teacher_share: float = 0.0
    teacher_view: str = "plain"
    demonstrations: tuple[int, ...] = ()
    teacher_terms: Terms = ((CROSS_ENTROPY, 1.0), ("forward_kl", 1.0))
    prompt_divergence: str = "reverse_kl"
    prompt_regulariser: str = "reverse_kl"
    regularisation: float = 1.0
    regularisation_schedule: str = "linear"
    target_kl: float = 0.01
    temperature: float = 1.0
    token_weighting: str = "uniform"
    policy_gradient: PolicyGradient = PolicyGradient()
    hidden_terms: tuple[HiddenTerm, ...] = ()
    corpus_terms: Terms = ()
    sampling: Sampling = Sampling()
    micro_batches: int = 1
    length_buckets: int = 1
    minibatches: int = 1
    passes: int = 1
    conventions: Conventions = Conventions()

    def __post_init__(self):
        mistakes = [
            f"{field}: {getattr(self, field)}; expected at least {least}"
            for field, least in MINIMUMS.items()
            if getattr(self, field) < least
        ]
        mistakes += contradictions(self)
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
        return self.micro_batches * self.minibatches

    @property
    def sorts_rows(self) -> bool:
        """Whether rows of like length go into one micro-batch, where that changes no number."""
        by = self.conventions
        parts_differ = by.mean_of_means or by.stale_prompt or by.early_clock
        alike = not parts_differ and self.minibatches == 1
        return alike and self.length_buckets > 1 and self.micro_batches > 1

    @property
    def updates(self) -> int:
        """How often a step updates the student."""
        return self.minibatches * self.passes


def reads_answers(method) -> bool:
    """Whether rows may be the data's own answers, for a `Method`, or the config of a stage."""
    mixed = method.targets == "mixed" and method.on_policy_share < 1
    return mixed or method.targets in ("gold", "replay")


def needs_teacher(method) -> bool:
    """For a `Method`, or the config of a stage, which has its fields."""
    if method.teacher_view == "cached":
        return False
    terms = (*method.student_terms, *method.corpus_terms)
    return (
        method.teacher_view in ("prompted", "online")
        or method.teacher_share > 0
        or bool(method.hidden_terms)
        or any(name != CROSS_ENTROPY for name, _ in terms)
    )


def contradictions(method) -> list[str]:
    """What means nothing in a `Method`, or in the config of a stage, which has its fields.

    Each message begins with the field that it is about.
    """
    names = [name for name, _ in method.student_terms]
    found = [
        f"{field}: {getattr(method, field)!r} is not one of {', '.join(choices)}"
        for field, choices in (
            ("targets", TARGETS),
            ("teacher_view", VIEWS),
            ("regularisation_schedule", REGULARISATIONS),
            ("token_weighting", ("uniform", *losses.WEIGHTINGS)),
        )
        if getattr(method, field) not in choices
    ]
    if not names:
        found.append("student_terms: are none; expected at least one")
    if len(set(names)) < len(names):
        found.append(f"student_terms: {', '.join(names)}: expected each name once")
    if CROSS_ENTROPY in names and method.targets in ON_POLICY and not reads_answers(method):
        found.append(
            f"student_terms: {CROSS_ENTROPY} counts rows that the student did not write, and "
            f"targets = {method.targets!r} has none; name a divergence instead, or other targets"
        )
    if names and not any(weight > 0 for _, weight in method.student_terms):
        found.append("student_terms: all weights are 0; expected one above 0")
    for field in ("teacher_terms", "corpus_terms"):
        others = [name for name, _ in getattr(method, field)]
        if len(set(others)) < len(others):
            found.append(f"{field}: {', '.join(others)}: expected each name once")
    adapts = method.regularisation_schedule == "adaptive"
    if adapts and method.prompt_regulariser == "soft_cross_entropy":
        found.append(
            "prompt_regulariser: soft_cross_entropy does not fall to 0, so that no coefficient "
            "brings it to target_kl; expected forward_kl, which has the same gradient"
        )
    if set(names) <= {CROSS_ENTROPY} and not method.hidden_terms and method.teacher_view != "plain":
        found.append(
            f"teacher_view: {method.teacher_view!r} is of no use where no term of student_terms "
            "looks at the teacher; name a divergence there"
        )
    if method.targets not in ON_POLICY:
        found += _without_rollouts(method)
    if POLICY_GRADIENT in names:
        found += _about_policy(method)
    if method.teacher_view == "cached":
        found += _about_cache(method, names)
    return found


def _without_rollouts(method) -> list[str]:
    found = []
    if method.rollout_slots:
        found.append(
            f"rollout_slots: {method.rollout_slots} rows are to be written at once, but targets = "
            f"{method.targets!r} has none that are written during training; expected 0"
        )
    if method.teacher_share:
        found.append(
            f"teacher_share: {method.teacher_share:g} mixes the teacher into rollouts, but "
            f"targets = {method.targets!r} has none; expected targets = 'student'"
        )
    if method.stale_rollouts:
        found.append(
            f"stale_rollouts: rows are written a step ahead, but targets = {method.targets!r} has "
            f"none that are written during training; expected False, or one of "
            f"{', '.join(ON_POLICY)}"
        )
    return found


def _about_policy(method) -> list[str]:
    found = []
    if method.targets != "student":
        found.append(
            f"student_terms: {POLICY_GRADIENT} rewards what the student wrote; expected targets = "
            f"'student', found {method.targets!r}"
        )
    if method.stale_rollouts:
        found.append(
            f"stale_rollouts: {POLICY_GRADIENT} needs rows that the student wrote as it is; those "
            "written a step ahead are of the student before its last update; expected False"
        )
    if method.token_weighting != "uniform":
        found.append(f"token_weighting: {method.token_weighting!r} is not for {POLICY_GRADIENT}")
    plain = dict(temperature=1.0, top_k=0, top_p=1.0, no_repeat_ngram_size=0)
    for field, value in plain.items():
        if (chosen := getattr(method.sampling, field)) != value:
            found.append(
                f"sampling.{field}: {chosen!r}, but {POLICY_GRADIENT} values tokens as drawn from "
                f"the models as they are; expected {value!r}"
            )
    if method.teacher_share and method.teacher_view != "plain":
        found.append(
            f"teacher_share: {method.teacher_share:g} mixes the plain teacher into rollouts, of "
            f"which {POLICY_GRADIENT} would need the weights; expected teacher_view = 'plain', or 0"
        )
    return found


def _about_cache(method, names: list[str]) -> list[str]:
    found = []
    if method.targets in ON_POLICY:
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
