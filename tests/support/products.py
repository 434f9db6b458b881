"""Products of cases, of which the quick ones have every value of each factor."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def in_turns(every: int, *factors: Iterable[Any]) -> list[Any]:
    """The product of all factors; along each of them, one case of `every` is quick, others deep.

    With `every` = 2, quick cases have every pair of values of three or more factors.
    """
    cases = []
    for case in itertools.product(*map(enumerate, factors)):
        places, values = zip(*case, strict=True)
        marks = [] if sum(places) % every == 0 else pytest.mark.deep
        cases.append(pytest.param(*values, marks=marks))
    return cases
