"""Figures: budgets compared at equal loss. A curve is {steps of a training with its own schedule: loss at its end}."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

Curve = Mapping[int, float]


@dataclass(frozen=True)
class Budget:
    """A number of steps: so many (`=`), more than the longest training (`>`), or fewer than the shortest (`<`)."""

    steps: float
    bound: str = "="

    def __str__(self) -> str:
        return f"{'' if self.bound == '=' else self.bound}{self.steps:.0f}"


def equivalent(curve: Curve, loss: float) -> Budget:
    """Return the budget with which a curve first reaches a loss, between two budgets linear in the logarithm of steps.

    Example:
        >>> str(equivalent({100: 3.0, 400: 2.0}, 2.5)), str(equivalent({100: 3.0, 400: 2.0}, 1.9))
        ('200', '>400')
    """
    budgets = sorted(budget for budget in curve if budget > 0)
    for i, budget in enumerate(budgets):
        if curve[budget] > loss:
            continue
        if curve[budget] == loss:
            return Budget(budget)
        if i == 0:
            return Budget(budget, "<")
        before = budgets[i - 1]
        share = (curve[before] - loss) / (curve[before] - curve[budget])
        return Budget(math.exp(math.log(before) + share * (math.log(budget) - math.log(before))))
    return Budget(budgets[-1], ">")


def ratio(curve: Curve, reference: Curve, budget: int) -> Budget:
    """Return how many times longer the reference trains to the loss that the curve has at a budget.

    Example:
        >>> str(ratio({100: 2.0}, {100: 3.0, 400: 2.0}, 100))
        '4'
    """
    needed = equivalent(reference, curve[budget])
    return Budget(needed.steps / budget, needed.bound)


def smallest_budget(curve: Curve, reference: Curve, multiple: int) -> int | None:
    """Return the smallest budget with which a curve reaches what the reference reaches with `multiple` times that.

    None where no budget does for which the reference was trained `multiple` times longer.

    Example:
        >>> smallest_budget({50: 3.0, 100: 2.0}, {200: 2.5, 400: 2.2}, 4)
        100
    """
    for budget in sorted(curve):
        later = reference.get(multiple * budget)
        if budget > 0 and later is not None and curve[budget] <= later:
            return budget
    return None


def has_multiple(curve: Curve, reference: Curve, multiple: int) -> bool:
    """Tell whether any budget can be compared at that multiple."""
    return any(budget > 0 and multiple * budget in reference for budget in curve)
