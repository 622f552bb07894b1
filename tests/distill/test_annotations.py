"""The shapes in signatures are those of the arrays: jaxtyping's annotations, held against calls."""

import ast
import collections.abc
import inspect
import itertools
import sys
import types
import typing
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.steps import STUDENT, TEACHER, VOCABULARY, batch, random_params, teacher_params

import promptkd_jax as pkd
from promptkd_jax.distill.losses import losses
from promptkd_jax.distill.losses.divergence import DIVERGENCES

jaxtyping = pytest.importorskip("jaxtyping")


def names_for_type_checkers(module) -> dict[str, Any]:
    """What a module imports and defines for those who read its annotations alone."""
    names: dict[str, Any] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), module.__file__, "exec"), names)
    return names


def hints(thing) -> dict[str, Any]:
    module = sys.modules[thing.__module__]
    return typing.get_type_hints(thing, {**vars(module), **names_for_type_checkers(module)})


def fits(value, hint) -> bool:
    """Whether `value` is what `hint` says; dimensions are bound by `jaxtyping.jaxtyped`."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return isinstance(value, hint)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        with jaxtyping.jaxtyped("context"):  # with dimensions of its own
            return all(fits(getattr(value, name), x) for name, x in hints(type(value)).items())
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(fits(value, x) for x in arguments)
    if typing.get_origin(hint) is tuple:
        each = itertools.repeat(arguments[0]) if arguments[-1] is ... else arguments
        return all(map(fits, value, each))
    return value is None if hint is type(None) else True


def assert_as_annotated(function, *arguments, **named) -> Any:
    """Calls `function`; what goes in and comes out has the dimensions of its signature."""
    bound = inspect.signature(function).bind(*arguments, **named).arguments
    result = function(*arguments, **named)
    of = hints(function)
    with jaxtyping.jaxtyped("context"):
        for name, value in [*bound.items(), ("return", result)]:
            assert fits(value, of[name]), (function.__name__, name, of[name], jnp.shape(value))
    return result


def test_losses():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    for divergence in DIVERGENCES.values():
        assert_as_annotated(divergence, logits, 2 * logits)
    assert_as_annotated(losses.cross_entropy, jnp.zeros((2, 3), jnp.int32), logits)
    assert_as_annotated(losses.entropy, logits)


def test_from_models_to_chunked_losses():
    rows = jax.tree.map(jnp.asarray, batch())
    where = assert_as_annotated(pkd.responses, rows, 11)
    prefix = assert_as_annotated(pkd.init_soft_prompt, TEACHER, teacher_params(), [7, 8], 3)
    p = assert_as_annotated(
        pkd.lazy_logits, TEACHER, teacher_params(), rows, where, VOCABULARY, prefix
    )
    q = pkd.lazy_logits(STUDENT, random_params(STUDENT.config, 1), rows, where, VOCABULARY)
    few = assert_as_annotated(pkd.top_k, p, 4)
    terms, weights = [losses.reverse_kl, losses.forward_kl], jnp.ones(2)
    assert_as_annotated(pkd.linear_loss, terms, q, [p, few], where.mask, weights)
    assert_as_annotated(pkd.linear_values, terms, q, [p, few])
    hidden = TEACHER.hidden_states(teacher_params(), rows.tokens)
    assert_as_annotated(pkd.gather, hidden, where)


def test_sampling():
    keys = assert_as_annotated(pkd.row_keys, jax.random.key(0), jnp.arange(4))
    prompts, lengths = jnp.asarray(batch().tokens[:, :4]), jnp.asarray(batch().prompt_lengths)
    assert_as_annotated(
        pkd.sample, TEACHER, teacher_params(), prompts, lengths, keys, max_new_tokens=2
    )


def test_a_wrong_shape_is_found():
    """So that the tests above can fail."""
    with pytest.raises(AssertionError, match="learner"):
        assert_as_annotated(losses.agreement, jnp.ones((2, 3)), jnp.ones((1, 3)))


# One array each, or as many as there are groups, rows or layers.
OF_NO_SHAPE = {"Metrics", "Replay", "TrainState", "adamw", "hidden_loss", "init_state"}
OF_NO_SHAPE |= {"lazy_logits_and_states", "schedule"}


def has_bare_array(hint) -> bool:
    if typing.get_origin(hint) is collections.abc.Callable:  # of any function that is a divergence
        return False
    return hint is jax.Array or any(map(has_bare_array, typing.get_args(hint)))


@pytest.mark.parametrize("name", [name for name in pkd.__all__ if name not in OF_NO_SHAPE])
def test_public_arrays_have_dimensions(name):
    """Annotations can be evaluated, and none is an array without dimensions."""
    thing = getattr(pkd, name)
    if inspect.isfunction(thing) or inspect.isclass(thing):
        assert not [part for part, hint in hints(thing).items() if has_bare_array(hint)]
