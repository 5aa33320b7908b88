"""Fields of settings classes: a default, its choices, and the sentence that a command line shows.

A settings class is a frozen dataclass; each field that a user may set is made with `setting`. The command line
makes its flags, its help and the keys of its TOML file from these fields, so that each stands in one place.

Knows: what a field says of itself. Does not know: any command, or what a setting means.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, field
from difflib import get_close_matches
from typing import Any, Literal

FloatDtype = Literal["float32", "bfloat16", "float16", "float64"]
MAX_NEW_TOKENS = 32  # of an answer, at most, where nobody asks for another number
MAX_THOUGHT_TOKENS = 512  # of a thought before the answer, likewise
SPLIT_SIZES = {"n_train": 64, "n_validation": 32, "n_test": 32}  # prompts a side of a split's parts
MAX_KL = 0.1  # first-token KL budget of a plan, in nats
RIDGE = 0.01  # of SRA, for unit vectors: one protected concept keeps 1% of its part in a direction
# How one of the plans within the limits is chosen (`search.rules`), and what does it where nobody says.
RULE_NAMES = ("strongest", "cheapest", "knee")
DEFAULT_RULE = "strongest"
# More rows a batch bring nothing: forward passes are bound by arithmetic, and wide batches pad more;
# decoding gains until the weights' reading is shared by some hundred rows.
STREAM_ROWS, DECODED_ROWS = 32, 96
STEP_ROWS = 16  # of each kind that a gradient step sees; half as many passages, of them up to half late ones


def setting(default: Any = MISSING, help: str = "", **options: Any) -> Any:
    """A dataclass field that a command line can set; without a default it is required.

    Args:
        help: what the setting does. The default is added to it by whoever shows it.
        options: `flag`, the flag's name where it is not the field's; `choices`, the values accepted; `metavar`
            and `nargs` as in argparse; `positional=True` for an argument without a flag; `repeat=True` for a flag
            that may be given again; `empty=True` where a text without a character is a value; `least`,
            the smallest number accepted.
    """
    return field(default=default, kw_only=True, metadata={"help": help, **options})


def suggestion(word: str, accepted: Iterable[str]) -> str:
    """ "; did you mean X?" where one of the accepted words is close to `word`, else nothing."""
    close = get_close_matches(word, list(accepted), n=1)
    return f"; did you mean {close[0]}?" if close else ""
