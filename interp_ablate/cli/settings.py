"""Flags, TOML keys and help from one source: the fields of settings classes.

Knows: how a field becomes a flag and how given flags become an object. Does not know: any command.
"""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from interp_ablate.errors import RunError
from interp_ablate.settings import suggestion
from interp_ablate.storage.incoming_files import incoming_text, shortened

T = TypeVar("T")
_TYPES = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}  # of TOML
_NUMBERS = {"int": int, "float": float}
_OPTIONS = ("choices", "metavar", "nargs")  # that argparse takes as they are


def adding(*classes: type | tuple[type, tuple[str, ...]]) -> Callable[[ArgumentParser], None]:
    """The `add` of a command: it declares the flags of settings classes, or of some fields of one."""
    return lambda parser: flags_from(parser, *classes)


def flags_from(parser: ArgumentParser, *classes: type | tuple[type, tuple[str, ...]]) -> None:
    """Add a flag for every field made with `setting`; a flag that is there already is shared."""
    flags: dict[str, type] = parser.get_default("flags") or {}
    for each in classes:
        cls, only = each if isinstance(each, tuple) else (each, ())
        for field in _settings_of(cls):
            if field.name not in flags and (not only or field.name in only):
                _add_flag(parser, field)
                flags[field.name] = cls
    parser.set_defaults(flags=flags)


def settings_from(args: Namespace, cls: type[T], *, under: Mapping[str, Any] | None = None) -> T:
    """The object that the given flags make, over the settings `under` them.

    Raises:
        RunError: a value that cannot be read; whatever the class refuses.
    """
    try:
        return cls(**{**(under or {}), **given_flags(args, cls)})
    except TypeError as error:
        raise RunError(f"a setting has the wrong type: {error}") from error


def given_flags(args: Namespace, cls: type) -> dict[str, Any]:
    """The flags of a class that were given, by field."""
    return {
        field.name: _value(field, getattr(args, field.name))
        for field in _settings_of(cls)
        if hasattr(args, field.name)
    }


def read_toml(path: str, cls: type) -> dict[str, Any]:
    """The settings of a TOML file; its keys are the flags or the fields of a class.

    Raises:
        RunError: a file that cannot be read, a key that the class does not have.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table = tomllib.loads(incoming_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read --config {path}: {error}") from error
    accepted = {name: field for field in _settings_of(cls) for name in _keys(field)}
    for key, value in table.items():
        if key not in accepted:
            raise RunError(
                f"unknown setting {key!r} in {path}{suggestion(key, accepted)}: accepted are "
                f"{', '.join(sorted({field.name for field in accepted.values()}))}"
            )
        kind = _kind(accepted[key])
        if kind in _TYPES and type(value) not in _TYPES[kind]:
            raise RunError(
                f"{key} = {shortened(value)} in {path} is of the wrong type: expected {kind}"
            )
        _check(accepted[key], value)
    return {accepted[key].name: value for key, value in table.items()}


def _settings_of(cls: type) -> list[Field[Any]]:
    return [field for field in fields(cls) if "help" in field.metadata]  # type: ignore[arg-type]


def _keys(field: Field[Any]) -> tuple[str, ...]:
    return field.name, field.name.replace("_", "-"), _flag(field).removeprefix("--")


def _flag(field: Field[Any]) -> str:
    name = field.metadata.get("flag", field.name).replace("_", "-")
    return f"--no-{name}" if field.default is True else f"--{name}"


def _add_flag(parser: ArgumentParser, field: Field[Any]) -> None:
    metadata = field.metadata
    options: dict[str, Any] = {key: metadata[key] for key in _OPTIONS if key in metadata}
    if "bool" in str(field.type):
        options["action"] = "store_false" if field.default is True else "store_true"
    elif _kind(field) in _NUMBERS:
        options["type"] = _NUMBERS[_kind(field)]
    if metadata.get("repeat"):
        options["action"] = "extend" if "nargs" in metadata else "append"
    text = metadata["help"].replace("%", "%%") + _default_text(field)
    if metadata.get("positional"):
        if field.default is not MISSING:
            options.setdefault("nargs", "?")
        parser.add_argument(field.name, help=text, default=argparse.SUPPRESS, **options)
        return
    if field.default is MISSING:
        options["required"] = True
    options.update(dest=field.name, help=text, default=argparse.SUPPRESS)
    parser.add_argument(_flag(field), **options)


def _default_text(field: Field[Any]) -> str:
    if field.default in (MISSING, None, True, False, (), ""):
        return ""
    default = field.default
    if isinstance(default, tuple):
        default = ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in default)
    elif isinstance(default, float) and default >= 1e6:
        default = f"{default:g}".replace("e+", "e")
    return f" (default {default})"


def _kind(field: Field[Any]) -> str:
    return str(field.type).removesuffix(" | None")


def _check(field: Field[Any], value: Any) -> None:
    """Refuse what no setting of that kind can be.

    Raises:
        RunError: nothing at all, most often a shell variable that is not set; a number too small, or no seed.
    """
    nothing = value == "" or (isinstance(value, list) and "" in value)
    if nothing and field.default != "" and not field.metadata.get("empty"):
        name = field.name if field.metadata.get("positional") else _flag(field)
        raise RunError(f"{name} is empty: give it a value, or leave it out")
    if field.name.endswith("seed") and not 0 <= value < 1 << 32:  # what every generator takes
        raise RunError(f"{_flag(field)} is a number from 0 to 2^32 - 1; got {shortened(value)}")
    least = field.metadata.get("least")
    if least is not None and value is not None and not value >= least:
        raise RunError(f"{_flag(field)} is at least {least}; got {value}")


def _value(field: Field[Any], value: Any) -> Any:
    """What a flag's text stands for: a tuple is written with commas, a range of layers A-B.

    Raises:
        RunError: numbers that are none; see `_check`.
    """
    _check(field, value)
    kind = _kind(field)
    if not kind.startswith("tuple"):
        return value
    if not isinstance(value, str):
        return tuple(value)
    if kind == "tuple[int, int]":
        first, _, last = value.partition("-")
        try:
            return int(first), int(last or first)
        except ValueError as error:
            raise RunError(f"{_flag(field)} takes A-B, such as 8-20; got {value!r}") from error
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if "float" not in kind:
        return tuple(parts)
    try:
        return tuple(float(part) for part in parts)
    except ValueError as error:
        raise RunError(
            f"{_flag(field)} takes numbers between commas, such as 0.5,1,2; got {value!r}"
        ) from error
