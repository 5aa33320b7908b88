"""Figures: data and axes in, axes out.

May import: errors, storage, search, persona. To add a plot: a function
`(data, ax) -> ax` in a file here; for a run folder's figure also a line in `RUN_FIGURES` of `run_figures.py`, or the
entry point `interp_ablate.plots`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
