"""A progress bar for work of more than two seconds, in a terminal and in a notebook.

Knows: tqdm. Does not know: what is done meanwhile.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
DELAY = 2.0  # seconds before a bar is shown


def with_bar(items: Iterable[Item], what: str, *, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar once they take more than two seconds; TQDM_DISABLE=1 shows none.

    The command line sets it, because it has bars of its own.
    """
    with (
        warnings.catch_warnings()
    ):  # a notebook without widgets gets the bar as text, and no advice
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    yield from tqdm(items, desc=what, total=total, delay=DELAY, leave=False)
