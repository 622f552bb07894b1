"""Choices of a method that mean nothing together."""

from promptkd_jax.distill.losses.divergence import divergence, needs_whole
from promptkd_jax.distill.methods.method_fields import (
    CROSS_ENTROPY,
    POLICY_GRADIENT,
    TARGETS,
    TRANSPORT,
    Execution,
    Objective,
)
from promptkd_jax.infra.specs import declared
from promptkd_jax.models.sampling_rules import Sampling


def contradictions(method: Objective, execution: Execution, sampling: Sampling) -> list[str]:
    """Returns a message for each contradiction, which begins with the field that it is about."""
    names = [name for name, _ in method.student_terms]
    # All are collected: whoever corrects a config wants to read them at once.
    messages = []
    if len(set(names)) < len(names):
        messages.append(f"student_terms: {', '.join(names)}: expected each name once")
    if CROSS_ENTROPY in names and method.source.on_policy and not method.others_write:
        messages.append(
            f"student_terms: {CROSS_ENTROPY} counts rows that the student did not write, and "
            f"targets = {method.targets!r} has none; name a divergence instead, or other targets"
        )
    if not any(weight > 0 for _, weight in method.student_terms):
        messages.append("student_terms: all weights are 0; expected one above 0")
    for terms in ("off_policy_terms", "teacher_terms", "corpus_terms"):
        others = [name for name, _ in getattr(method, terms)]
        if len(set(others)) < len(others):
            messages.append(f"{terms}: {', '.join(others)}: expected each name once")
    adapts = method.regularization_schedule == "adaptive"
    if adapts and method.prompt_regularizer == "soft_cross_entropy":
        messages.append(
            "prompt_regularizer: soft_cross_entropy does not fall to 0, so that no coefficient "
            "brings it to target_kl; expected forward_kl, which has the same gradient"
        )
    if set(names) <= {CROSS_ENTROPY} and not method.hidden_terms and method.teacher_view != "plain":
        messages.append(
            f"teacher_view: {method.teacher_view!r} is of no use where neither student_terms nor "
            "hidden_terms look at the teacher; name a divergence there"
        )
    messages += _about_rows(method, names)
    if method.teacher_share and method.teacher_top_k:
        messages.append(
            f"teacher_top_k: {method.teacher_top_k} draws from the teacher in one way and "
            f"teacher_share = {method.teacher_share:g} in another; expected one of them to be 0"
        )
    if method.rollouts_per_prompt > 1 and (sampling.temperature == 0 or sampling.top_k == 1):
        messages.append(
            f"rollouts_per_prompt: {method.rollouts_per_prompt} responses to a prompt are all the "
            f"same with sampling.temperature = {sampling.temperature:g} and sampling.top_k = "
            f"{sampling.top_k}; expected 1, or a sampling that draws"
        )
    if method.interpolation.schedule == "adaptive" and method.interpolation.start > (
        end := method.interpolation.end
    ):
        messages.append(
            f"interpolation.start: {method.interpolation.start:g} is above end = {end:g}; expected "
            "a share that rises"
        )
    messages += _about_soft_prompt(method, execution)
    if not method.source.on_policy:
        messages += _without_rollouts(method, execution)
    if method.prompt_lag:
        messages += _about_prompt_lag(method, names)
    if execution.packed_rows:
        messages += _about_packing(method)
    if POLICY_GRADIENT in names:
        messages += _about_policy_gradient(method, execution, sampling)
    if method.teacher_view == "cached":
        messages += _about_cache(method, names)
    return messages


def _about_rows(method: Objective, names: list[str]) -> list[str]:
    messages, of_rows = [], {*names, *(name for name, _ in method.off_policy_terms)}
    if method.off_policy_terms and not (method.source.on_policy and method.others_write):
        messages.append(
            f"off_policy_terms: tell rows that the student wrote from others, and targets = "
            f"{method.targets!r} has one kind alone; expected 'mixed', 'replay' or "
            "'teacher_and_student', or no off_policy_terms"
        )
    if method.row_weights != "even" and not method.off_policy_terms:
        messages.append(
            f"row_weights: {method.row_weights!r} weighs student_terms against off_policy_terms, "
            "of which there are none; expected 'even'"
        )
    if method.off_policy_terms and CROSS_ENTROPY in names:
        messages.append(
            f"student_terms: {CROSS_ENTROPY} counts rows that the student did not write; expected "
            "it among off_policy_terms, where there are any"
        )
    if method.rollouts_per_prompt > 1 and method.targets != "student":
        messages.append(
            f"rollouts_per_prompt: {method.rollouts_per_prompt} responses to a prompt are written "
            f"in a step, but with targets = {method.targets!r} its rows are not all the student's; "
            "expected 1, or 'student' as targets"
        )
    if method.interpolation.schedule != "none" and method.needs_token_kernel:
        messages.append(
            f"interpolation.schedule: {method.interpolation.schedule!r} mixes teacher and student "
            f"by steps, {TRANSPORT} by transport.share; expected 'none'"
        )
    # These have targets of their own, which do not move.
    own_targets = {CROSS_ENTROPY, POLICY_GRADIENT, TRANSPORT}
    if method.interpolation.schedule != "none" and not of_rows - own_targets:
        messages.append(
            f"interpolation.schedule: {method.interpolation.schedule!r} moves the target of "
            f"divergences, and {', '.join(names)} is none; expected 'none', or a divergence"
        )
    # Which change what a divergence says of a position, and nothing else.
    for name, default in (("token_weighting", "uniform"), ("temperature", 1.0)):
        if (chosen := getattr(method, name)) != default and of_rows == {CROSS_ENTROPY}:
            messages.append(
                f"{name}: {chosen!r} is of divergences from the teacher, and student_terms have "
                f"{CROSS_ENTROPY} alone; expected {default!r}"
            )
    return messages


def _about_soft_prompt(method: Objective, execution: Execution) -> list[str]:
    # Each rule has a default with which the prompt's update is the published one.
    messages = []
    rules = dict(prompt_updates=1, prompt_warmup_steps=0, prompt_fallback=False)
    for name, default in rules.items():
        if (chosen := getattr(method, name)) != default and method.teacher_view != "prompted":
            messages.append(
                f"{name}: {chosen!r} is for a soft prompt, but teacher_view = "
                f"{method.teacher_view!r}; expected {default!r}, or 'prompted'"
            )
        elif chosen != default and method.prompt_lag:
            messages.append(
                f"{name}: {chosen!r}, but with prompt_lag = 1 the student's loss has the forward "
                f"of the prompt's own update; expected {default!r}, or prompt_lag = 0"
            )
    if method.prompt_warmup_steps and not method.regularization:
        messages.append(
            "prompt_warmup_steps: the soft prompt warms up on L_reg, but regularization = 0 leaves "
            "that out; expected 0, or another regularization"
        )
    if method.prompt_fallback and (method.source.keeps_replay or execution.one_step_off_policy):
        name = "targets = 'replay'" if method.source.keeps_replay else "one_step_off_policy"
        messages.append(
            "prompt_fallback: compares the two teachers on the data's responses to the prompts of "
            f"a step, but with {name} its rows are of other prompts; expected False"
        )
    if method.prompt_fallback and method.rollouts_per_prompt > 1:
        messages.append(
            "prompt_fallback: compares the two teachers on one response of the data to each row's "
            f"prompt, and there are {method.rollouts_per_prompt} rows of each; expected False, or "
            "rollouts_per_prompt = 1"
        )
    if method.prompt_fallback and method.source.teacher_writes:
        messages.append(
            "prompt_fallback: compares the two teachers on the data's responses, but with targets "
            f"= {method.targets!r} those of its rows are the teacher's; expected False, or 'gold', "
            "'student' or 'mixed' as targets"
        )
    if method.prompt_fallback and execution.packed_rows:
        messages.append(
            "prompt_fallback: chooses the teacher of a row, and packed_rows = "
            f"{execution.packed_rows} has several rows of the data in one; expected False, or 0"
        )
    return messages


def _without_rollouts(method: Objective, execution: Execution) -> list[str]:
    # All of these say how rows are written in a step, and here none are.
    messages = []
    if execution.max_concurrent_rollouts:
        messages.append(
            f"max_concurrent_rollouts: {execution.max_concurrent_rollouts} rows are to be written "
            f"at once, but targets = {method.targets!r} has none that are written during training; "
            "expected 0"
        )
    if execution.rollout_quantize != "none":
        messages.append(
            f"rollout_quantize: {execution.rollout_quantize!r} is for rows that are written during "
            f"training, but targets = {method.targets!r} has none; expected 'none'"
        )
    if method.teacher_share:
        messages.append(
            f"teacher_share: {method.teacher_share:g} mixes the teacher into rollouts, but "
            f"targets = {method.targets!r} has none; expected targets = 'student'"
        )
    if method.teacher_top_k:
        messages.append(
            f"teacher_top_k: {method.teacher_top_k} has the teacher write along in rollouts, but "
            f"targets = {method.targets!r} has none; expected targets = 'student'"
        )
    if execution.one_step_off_policy:
        on_policy = [name for name, source in TARGETS.items() if source.on_policy]
        messages.append(
            f"one_step_off_policy: rows are written a step ahead, but targets = "
            f"{method.targets!r} has none that are written during training; expected False, or one "
            f"of {', '.join(on_policy)}"
        )
    return messages


def _about_prompt_lag(method: Objective, names: list[str]) -> list[str]:
    # What the lag saves is the teacher's forward behind the prompt's update, once a step.
    messages = []
    if method.teacher_view != "prompted":
        messages.append(
            f"prompt_lag: {method.prompt_lag}, but teacher_view = {method.teacher_view!r} has no "
            "soft prompt; expected 0, or 'prompted'"
        )
    if method.minibatches * method.passes > 1:
        messages.append(
            f"prompt_lag: saves a forward of the teacher where a step has one update, and has "
            f"{method.minibatches * method.passes}; expected 0, or minibatches = passes = 1"
        )
    if POLICY_GRADIENT in names:
        messages.append(
            f"prompt_lag: {POLICY_GRADIENT} values all rows of a step by the teacher before the "
            "update, so that no forward is saved; expected 0"
        )
    return messages


def _about_packing(method: Objective) -> list[str]:
    # A packed row is several rows of the data: what is drawn, weighed or compared by the row has
    # no such unit there.
    messages = []
    if method.source.on_policy:
        messages.append(
            "packed_rows: rows are packed when their lengths are known, before a step, and targets "
            f"= {method.targets!r} has rows that are written in it; expected 0, or 'gold' or "
            "'teacher' as targets"
        )
    if method.minibatches > 1:
        messages.append(
            f"packed_rows: packed by their lengths, other rows would be in each of "
            f"{method.minibatches} minibatches, each with an update of its own; expected 0, or "
            "minibatches = 1"
        )
    if any(term.kind == "relation" for term in method.hidden_terms):
        messages.append(
            "packed_rows: a 'relation' of hidden_terms compares a token with all before it in its "
            "row, packed ones of other rows too; expected 0, or terms 'cosine' and 'mse'"
        )
    return messages


def _about_policy_gradient(
    method: Objective, execution: Execution, sampling: Sampling
) -> list[str]:
    # Its mean is the gradient only over rows drawn from the very distribution that it weighs.
    messages = []
    if method.targets != "student":
        messages.append(
            f"student_terms: {POLICY_GRADIENT} rewards what the student wrote; expected targets = "
            f"'student', found {method.targets!r}"
        )
    if execution.one_step_off_policy:
        messages.append(
            f"one_step_off_policy: {POLICY_GRADIENT} needs rows that the student wrote as it is; "
            "those written a step ahead are of the student before its last update; expected False"
        )
    if execution.rollout_quantize != "none":
        messages.append(
            f"rollout_quantize: {execution.rollout_quantize!r} draws tokens from a rounded "
            f"student, which {POLICY_GRADIENT} takes to be of the student as it is; expected 'none'"
        )
    if method.token_weighting != "uniform":
        messages.append(f"token_weighting: {method.token_weighting!r} is not for {POLICY_GRADIENT}")
    # The defaults of all options of sampling are the model's own distribution.
    for name, option in declared(type(sampling)).items():
        if (chosen := getattr(sampling, name)) != option.default:
            messages.append(
                f"sampling.{name}: {chosen!r}, but {POLICY_GRADIENT} values tokens as drawn from "
                f"the models as they are; expected {option.default!r}"
            )
    if method.teacher_top_k:
        messages.append(
            f"teacher_top_k: {method.teacher_top_k}, but {POLICY_GRADIENT} has weights for tokens "
            "of a mixture alone; expected teacher_share, or 0"
        )
    if method.teacher_share and method.teacher_view != "plain":
        messages.append(
            f"teacher_share: {method.teacher_share:g} mixes the plain teacher into rollouts, of "
            f"which {POLICY_GRADIENT} would need the weights; expected teacher_view = 'plain', or 0"
        )
    return messages


def _about_cache(method: Objective, names: list[str]) -> list[str]:
    # Of a cached teacher there are k log-probabilities a token, of rows that were there before, and
    # the mass of all others as one number.
    messages = []
    if method.source.on_policy:
        messages.append(
            f"targets: {method.targets!r} makes rows during training, but a cached teacher knows "
            "only the rows that it was written for; expected 'gold' or 'teacher'"
        )
    if method.hidden_terms:
        messages.append(
            "hidden_terms: a cached teacher has log-probabilities but no hidden states; expected "
            "another teacher_view, or no hidden_terms"
        )
    for name in ("temperature", "student_temperature"):
        if (temperature := getattr(method, name)) not in (0, 1):
            messages.append(
                f"{name}: {temperature:g} needs the whole distribution, a cached teacher keeps the "
                "largest log-probabilities; expected 1"
            )
    for name in set(names) - {CROSS_ENTROPY, POLICY_GRADIENT}:
        if name == TRANSPORT or needs_whole(divergence(name)):
            messages.append(
                f"student_terms: {name} needs the whole distribution, a cached teacher keeps the "
                "largest log-probabilities; expected a divergence that is a sum over tokens of "
                "their two probabilities, such as reverse_kl or mixed_learner(…, alpha=-1)"
            )
    if method.interpolation.schedule != "none":
        messages.append(
            f"interpolation.schedule: {method.interpolation.schedule!r} mixes whole distributions, "
            "a cached teacher keeps the largest log-probabilities; expected 'none'"
        )
    if method.token_weighting != "uniform":
        messages.append(
            f"token_weighting: {method.token_weighting!r} needs whole distributions, a cached "
            "teacher keeps the largest log-probabilities; expected 'uniform'"
        )
    if any(name != CROSS_ENTROPY for name, _ in method.corpus_terms):
        messages.append(
            "corpus_terms: a cached teacher has not seen the corpus; expected cross_entropy alone"
        )
    return messages
