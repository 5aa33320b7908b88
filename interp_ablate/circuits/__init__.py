"""Circuits: what writes a direction into the residual stream, what reads it, and what it says.

May import: errors, sites, stats, storage, prompts, directions, edits, models, activations, evaluation.
To add a measure of a direction's role in a model: one file here.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
