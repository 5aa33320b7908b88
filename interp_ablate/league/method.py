"""What a method of the league is: a function from a task to a fitted method, with its source.

Knows: the record of a method. Does not know: any method, or how one is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from interp_ablate.league.fitted import FittedMethod
from interp_ablate.league.task import LeagueTask

Exactness = Literal["weights", "biases", "hooks"]


@dataclass(frozen=True, eq=False)
class LeagueMethod:
    """A method by its name, with the class of its exactness and its source."""

    name: str
    fit: Callable[[LeagueTask], FittedMethod]
    """Makes detector and plans from the task's training prompts, within its budget of seconds.

    It may look at the task's validation prompts to choose among what it made. It never sees test prompts. It raises
    an `InterpAblateError` where it cannot do this task, and the league's table then says why.
    """
    exactness: Exactness
    """What can hold its removal exactly: weights, weights with biases, or only hooks on a running model."""
    source: str
    """The paper, with its address."""
    is_control: bool = False
    """True for what must not work: the noise that methods are held against."""
