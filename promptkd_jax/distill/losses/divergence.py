"""Divergences as functions that configs can name, and the logarithms that all are made of.

A divergence is a function `(target, learner) -> [...]` of logits `[..., V]`. `declare` puts it into
`DIVERGENCES`, with the ranges of its parameters, and `divergence` reads what a config says, such as
"reverse_kl", "alpha_beta(0.2, 0.7)" or "mixed_learner(reverse_kl, alpha=-1)".

V vocabulary.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from promptkd_jax.infra import specs

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Logits = Float[Array, "*B V"]
    PerPosition = Float[Array, "*B"]

Divergence = Callable[[jax.Array, jax.Array], jax.Array]

DIVERGENCES: dict[str, Divergence] = {}  # by name, as `declare` puts them there
PARAMETERS: dict[str, dict[str, Any]] = {}  # of each, with what their values may be


class _Share(specs.Float):
    """A number between 0 and 1."""

    def fault(self, value: Any) -> str:
        fault = super().fault(value)
        return fault and f"{fault}: its limits are forward_kl and reverse_kl, by name"


SHARE = _Share(low=0.0, high=1.0, open_low=True, open_high=True)


@dataclasses.dataclass(frozen=True)
class DivergenceName:
    """The spec of a name from `DIVERGENCES`, with parameters where it takes them."""

    def __str__(self) -> str:
        return "a divergence such as 'reverse_kl' or 'alpha_beta(0.2, 0.7)'"

    def fault(self, value: Any) -> str:
        if not isinstance(value, str):
            return str(self)
        try:
            divergence(value)
        except ValueError as error:
            return f"{self} ({error})"
        return ""


def declare(
    *, whole: bool | Callable[..., bool] = False, **parameters: Any
) -> Callable[[Divergence], Divergence]:
    """Makes a function a divergence that configs can name, "function" or "function(value, …)".

    Args:
      whole: whether it needs every probability of its target, see `needs_whole`; or a function that
        says so of its parameters.
      parameters: those of the function behind its two logits, in order, each a spec of what it may
        be: a number, one of a few words, or another divergence (`DivergenceName`).
    """

    def declared(function: Divergence) -> Divergence:
        DIVERGENCES[function.__name__] = function
        PARAMETERS[function.__name__] = parameters
        function.needs_whole = whole
        return function

    return declared


@functools.cache
def divergence(text: str) -> Divergence:
    """Returns the divergence that a config names, such as "reverse_kl" or "alpha_beta(0.2, 0.7)".

    Equal texts give the identical function, so that it can be a static argument of `jax.jit`.

    Raises:
      ValueError: an unknown name or parameters that cannot be read.
    """
    name, bracket, _ = text.partition("(")
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {text!r}; there are: {', '.join(DIVERGENCES)}")
    if not bracket:
        return DIVERGENCES[name]
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call):
            raise SyntaxError("it is more than one call")
        given = tuple(map(_value, call.args))
        return _with_parameters(name, given, {x.arg: _value(x.value) for x in call.keywords})
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"divergence {text!r}: expected {name}(number, …): {error}") from error


def _value(node: ast.expr) -> Any:
    """A parameter as written: a constant, or the text of a word or of another divergence."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Call) else ast.literal_eval(node)


def _with_parameters(name: str, given: tuple, named: dict[str, Any]) -> Divergence:
    """The divergence of that name at these parameters: the first of those it has, and by name."""
    # zip stops at the shorter: too many are found by their count, and one that is given twice too.
    parameters = PARAMETERS[name]
    chosen = dict(zip(parameters, given)) | named
    count = len(given) + len(named)
    if not 0 < count == len(chosen) or not chosen.keys() <= parameters.keys():
        found = given if not named else f"{given} and {named}"
        raise TypeError(f"its parameters are ({', '.join(parameters)}), got {found}")
    for parameter, value in chosen.items():
        spec = parameters[parameter]
        if fault := spec.fault(value):
            raise ValueError(f"{parameter}: {value!r} is not {fault}")
        if isinstance(spec, DivergenceName):
            chosen[parameter] = divergence(value)
    return functools.partial(DIVERGENCES[name], **chosen)


def needs_whole(function: Divergence) -> bool:
    """Whether `function` needs every probability of its target, and so means nothing where those of
    the tail are known only as a sum: no coarser distribution has a value that bounds its own."""
    partial = isinstance(function, functools.partial)
    whole = getattr(function.func if partial else function, "needs_whole", False)
    return whole(**(function.keywords if partial else {})) if callable(whole) else whole


def mark_needs_whole(function: Divergence) -> Divergence:
    """Marks a divergence for `needs_whole`."""
    function.needs_whole = True
    return function


# Logarithms of probabilities


def log_probs(logits: Logits) -> Logits:
    """Log-softmax in float32 over the last axis."""
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def log_pair(target: Logits, learner: Logits) -> tuple[jax.Array, jax.Array]:
    """The log-probabilities of both. Raises ValueError for different vocabularies."""
    if target.shape[-1] != learner.shape[-1]:
        raise ValueError(
            f"a target {list(target.shape)} and a learner {list(learner.shape)}: of "
            f"{target.shape[-1]} and {learner.shape[-1]} tokens; expected logits of the tokens "
            "that both share, without the padding of either: [..., :vocab_size]"
        )
    return log_probs(target), log_probs(learner)


def finite_log(log_p: jax.Array) -> jax.Array:
    """0 for the logarithm of 0. NaN stays: a broken model must not look like a finite loss."""
    return jnp.where(jnp.isneginf(log_p), 0.0, log_p)


def log_ratio(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """log(p / q), where the logarithm of 0 counts as 0."""
    return finite_log(log_p) - finite_log(log_q)


def expected(p: jax.Array, x: jax.Array) -> jax.Array:
    """sum_v p_v x_v: a product of vectors, which XLA's CPU compiler can do 20 times as fast as it
    adds up what is multiplied."""
    return jnp.einsum("...v,...v->...", p, x, precision="highest")


def log_mixture(
    log_p: jax.Array, log_q: jax.Array, share: float | jax.Array, alpha: float = -1
) -> jax.Array:
    """The logarithm of the alpha-mixture of p and q, up to a constant unless alpha is -1.

    (share p^e + (1 - share) q^e)^(1/e) with e = (1 - alpha) / 2: arithmetic at alpha = -1,
    geometric at 1, harmonic at 3. For alpha < 1 a token is possible where it is for either, from 1
    on where it is for both; one of both that has no share says nothing. AMiD (arXiv 2510.15982);
    its code takes the geometric mixture for every alpha from 1 on.

    Args:
      log_p, log_q: log-probabilities `[..., V]`.
      share: of p, between 0 and 1.
    """
    # With e = (1 - alpha) / 2 the powers are p^e and q^e; e < 0 where alpha > 1.
    # In logarithms throughout: p and q themselves are 0 in float32 from log-probability -104 on.
    e = (1 - alpha) / 2
    impossible = jnp.isneginf(log_p), jnp.isneginf(log_q)
    if e > 0:
        empty = impossible[0] & impossible[1]
    else:
        empty = (impossible[0] & (share > 0)) | (impossible[1] & (share < 1))
        log_p, log_q = finite_log(log_p), finite_log(log_q)  # where not empty, without a share
    # Where the mixture is 0, the gradients of what follows are NaN.
    log_p, log_q = jnp.where(empty, 0.0, log_p), jnp.where(empty, 0.0, log_q)
    if e == 0:
        mixed = share * log_p + (1 - share) * log_q
    elif abs(e) < 0.1:
        # The logarithm of the mixture is small here, and 1 / e would make its rounding large: so it
        # is taken of the quotient by the larger power, 1 + (share of the other) (e^-|d| - 1).
        d = e * (log_p - log_q)
        larger, other = jnp.where(d > 0, log_p, log_q), jnp.where(d > 0, 1 - share, share)
        mixed = larger + jnp.log1p(other * jnp.expm1(jnp.where(d > 0, -d, d))) / e
    else:
        left, right = e * log_p + jnp.log(share), e * log_q + jnp.log1p(-share)
        mixed = jnp.logaddexp(left, right) / e
    return jnp.where(empty, -jnp.inf, mixed)


def kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """sum_v p_v log(p_v / q_v)."""
    return expected(jnp.exp(log_p), log_ratio(log_p, log_q))
