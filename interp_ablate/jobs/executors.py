"""What does jobs elsewhere: the members that an executor has.

Knows: jobs go out, results come back. Does not know: what a job means, or where the workers are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Protocol, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result", covariant=True)


class Executor(Protocol[Job, Result]):
    """Does jobs. A context manager: what it holds (processes, models) is released when the block ends."""

    def __enter__(self) -> Executor[Job, Result]: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    @property
    def n_workers(self) -> int:
        """How many jobs are done at once."""
        ...

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
        """Every job with its result, in the order they finish.

        `jobs` is read only as far as there are workers free to start one, so that it may depend on
        results that came before. Workers outlive a run that ends well: the next one builds nothing.
        """
        ...
