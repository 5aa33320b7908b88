"""Parameters of a search space.

Knows: ranges and choices. Does not know: Optuna.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from interp_ablate.errors import RunError

Scalar: TypeAlias = str | int | float | bool | None

# --------------------------------------------------------------------------------- the space


class Suggests(Protocol):
    """What a space needs of an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Scalar]) -> Scalar: ...


@dataclass(frozen=True)
class Float:
    """A number between two bounds, both included; perhaps on a logarithmic scale.

    `when`: the name of an earlier parameter and the values of it for which this one exists.
    """

    name: str
    low: float
    high: float
    log: bool = False
    when: tuple[Scalar, ...] = ()

    def __post_init__(self) -> None:
        _check_range(self)

    def suggest(self, trial: Suggests) -> float:
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def admit(self, value: Any) -> float:
        """The value as this parameter holds it.

        Raises:
            RunError: not a number, or out of range.
        """
        return _admit_number(self, float, value)


@dataclass(frozen=True)
class Int:
    """A whole number between two bounds, both included; see `Float`."""

    name: str
    low: int
    high: int
    log: bool = False
    when: tuple[Scalar, ...] = ()

    def __post_init__(self) -> None:
        _check_range(self)

    def suggest(self, trial: Suggests) -> int:
        return trial.suggest_int(self.name, self.low, self.high, log=self.log)

    def admit(self, value: Any) -> int:
        """As `Float.admit`."""
        return _admit_number(self, int, value)


@dataclass(frozen=True)
class Choice:
    """One of a few values; see `Float` for `when`."""

    name: str
    choices: tuple[Scalar, ...]
    when: tuple[Scalar, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        plain = all(isinstance(c, str | int | float | None) for c in self.choices)
        if not plain or not self.choices or len(set(self.choices)) < len(self.choices):
            raise RunError(
                f"{self.name} has the choices {list(self.choices)}: give at least one, each once "
                "(1 and True are the same), of text, numbers, True, False and None"
            )

    def suggest(self, trial: Suggests) -> Scalar:
        return trial.suggest_categorical(self.name, self.choices)

    def admit(self, value: Any) -> Scalar:
        """As `Float.admit`."""
        for choice in self.choices:
            if choice == value and isinstance(choice, bool) == isinstance(value, bool):
                return choice
        raise RunError(f"{self.name} = {value!r}: it is one of {list(self.choices)}")


Parameter: TypeAlias = Float | Int | Choice


def _check_range(parameter: Float | Int) -> None:
    low, high = parameter.low, parameter.high
    place = f"{parameter.name} from {low} to {high}"
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise RunError(f"{place}: the bounds are finite numbers, the lower one first")
    if parameter.log and low <= 0:
        raise RunError(f"{place}: a logarithmic scale starts above 0")


def _admit_number(parameter: Float | Int, kind: type, value: Any) -> Any:
    place = f"{parameter.name} = {value!r}"
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RunError(f"{place}: it is a number of type {kind.__name__}") from error
    if isinstance(value, str | bool) or number != value:
        raise RunError(f"{place}: it is a number of type {kind.__name__}")
    if not parameter.low <= number <= parameter.high:
        raise RunError(f"{place}: it lies between {parameter.low} and {parameter.high}")
    return number


@dataclass(frozen=True)
class ParameterSpace:
    """Parameters in the order they are suggested; a conditional one comes after what it depends on.

    Raises:
        RunError: a name given twice, or a condition on no earlier parameter or on no value of it.
    """

    parameters: tuple[Parameter, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))
        earlier: dict[str, Parameter] = {}
        for each in self.parameters:
            if each.name in earlier:
                raise RunError(f"two parameters are named {each.name}: give each a name of its own")
            if each.when:
                parent = earlier.get(str(each.when[0]))
                if parent is None or len(each.when) < 2:
                    raise RunError(
                        f"{each.name} exists when {each.when}: give the name of an earlier "
                        f"parameter ({', '.join(earlier) or 'there is none'}) and its values"
                    )
                for value in each.when[1:]:
                    parent.admit(value)
            earlier[each.name] = each

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.parameters)

    def suggest(self, trial: Suggests) -> dict[str, Any]:
        """Values for the parameters that exist, in order."""
        params: dict[str, Any] = {}
        for each in self.parameters:
            if _exists(each, params):
                params[each.name] = each.suggest(trial)
        return params

    def admit(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Chosen values, some or all, as the space holds them.

        Raises:
            RunError: an unknown name, a value out of range, or a parameter that does not exist beside
                the others.
        """
        unknown = sorted(set(params) - set(self.names))
        if unknown:
            raise RunError(
                f"unknown parameters: {', '.join(unknown)}. There are: {', '.join(self.names)}"
            )
        admitted: dict[str, Any] = {}
        for each in self.parameters:
            if each.name not in params:
                continue
            if not _exists(each, admitted):
                parent, *values = each.when
                raise RunError(
                    f"{each.name} exists only when {parent} is {' or '.join(map(repr, values))}: "
                    f"leave it out, or give that {parent} too"
                )
            admitted[each.name] = each.admit(params[each.name])
        return admitted


def _exists(parameter: Parameter, params: Mapping[str, Any]) -> bool:
    if not parameter.when:
        return True
    parent, *values = parameter.when
    return str(parent) in params and params[str(parent)] in values
