"""The errors this package raises on purpose.

Knows: the one base class that the command line turns into exit status 2 and a single message.
Does not know: what any stage does. Every message says what came, what is accepted and what to do.
"""

from __future__ import annotations


class InterpAblateError(ValueError):
    """Base of every deliberate error: bad input, a missing part, a result that cannot be trusted."""


class PromptError(InterpAblateError):
    """Prompts that cannot be read, split or rendered."""


class ModelError(InterpAblateError):
    """A model that cannot be loaded, wrapped or hooked."""


class OutOfMemoryError(ModelError):
    """Memory that ran out although batches were halved: the same work may fit another time, or elsewhere."""


class NotFiniteError(InterpAblateError):
    """NaN or infinity in what a model gives: a plan broke it, or its dtype did."""


class PlanError(InterpAblateError):
    """A plan that is malformed, does not fit the model, or was never applied."""


class DirectionError(InterpAblateError):
    """A direction that cannot be estimated, loaded or used."""


class ExportError(InterpAblateError):
    """An edit that has no exact weight form, or an artefact that failed its certificate."""


class RunError(InterpAblateError):
    """A run folder that is corrupt, unwritable, or holds another configuration."""
