"""Calls of a student's module: their arguments, whether one changes a later one, and the gradients of its result."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minillama.grading.gradients import directions, weights_of_outputs
from minillama.grading.kit_setups import OFF
from minillama.grading.parts import Arrays


def rule_arguments(generate: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, float]:
    """The keyword arguments that tell a student's `generate` which sampling rule applies.

    One that knows several rules gets the rule's number, and the others that it names are switched off. One that knows
    a single rule gets this number only if it is the rule asked for: a solution of another variant must fail.
    """
    found = inspect.signature(generate).parameters
    rule, named = settings["sampling"], [name for name in OFF if name in found]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in found.values())
    own = {rule: settings[rule]} if rule in OFF and (rule in named or takes_any) else {}
    return own | ({name: OFF[name] for name in named if name != rule} if takes_any or len(named) > 1 else {})


class KeptBetweenCalls(ValueError):
    """A call changes the result of a later one."""


def called(call: Callable[..., Any], *inputs: Tensor) -> Any:
    """The result of a call. Raises KeptBetweenCalls if it changes a later one, or one with other values changes it."""
    try:
        fresh = copy.deepcopy(call)
    except Exception:  # a module may hold what cannot be copied
        fresh = call
    first = call(*(one.clone() for one in inputs))
    after = call(*(one.flip(1) for one in inputs))
    again = call(*(one.clone() for one in inputs))
    if not is_near(first, again) or not is_near(after, fresh(*(one.flip(1) for one in inputs))):
        raise KeptBetweenCalls("a second call gives another result than a first one with the same input")
    return first


def is_near(found: Any, other: Any) -> bool:
    """Whether two results of a call are equal but for noise."""
    return all(
        one.shape == two.shape and torch.allclose(one, two, 1e-3, 1e-5, equal_nan=True)
        for one, two in zip(parts_of(found), parts_of(other), strict=False)
        if isinstance(one, Tensor) and isinstance(two, Tensor)
    )


def parts_of(found: Any) -> tuple[Any, ...]:
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def gradients_of(
    settings: Mapping[str, Any], names: tuple[str, ...], call: Callable[..., Any], *inputs: Tensor, **more: Any
) -> Arrays:
    """The derivatives of `gradients.derivatives` for the arrays in settings["gradients"], by backpropagation.

    names: of the results of the call. more: the tensors that these arrays are; an input of the call, or a parameter.
    """
    wanted = settings.get("gradients", ())
    leaves = {name: more[name] if isinstance(more[name], nn.Parameter) else more[name].clone() for name in wanted}
    if not leaves:
        return {}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    same = {id(more[name]): leaf for name, leaf in leaves.items()}
    with torch.enable_grad():
        found = call(*(same[id(one)] * 1.0 if id(one) in same else one for one in inputs))
        results = {name: one for name, one in zip(names, parts_of(found), strict=False) if name}
        numbers = weights_of_outputs({name: tuple(one.shape) for name, one in results.items()})
        total = sum((one.double() * torch.from_numpy(numbers[name])).sum() for name, one in results.items())
    reached: Any = [None] * len(leaves)
    if isinstance(total, Tensor) and total.requires_grad and bool(total.isfinite()):
        reached = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    slopes = {}
    for (name, leaf), slope in zip(leaves.items(), reached, strict=True):
        ways = torch.from_numpy(directions(name, tuple(leaf.shape)))
        along = ways.new_zeros(len(ways)) if slope is None else (ways * slope.double()).flatten(1).sum(1)
        slopes[f"gradient_of_{name}"] = along.numpy()
    return slopes
