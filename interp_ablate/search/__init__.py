"""Which plan? The space of edits, proposers, trials, rules of choice, the gradient fit.

May import: errors, sites, storage, jobs, stats, prompts, scoring, directions, edits, models, activations, evaluation.
To add a selection rule: `selection.py`. To add a proposer: a file here like `grid.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
