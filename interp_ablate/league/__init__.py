"""The league: every method of removing and inducing a behaviour, at one budget, on one split, with intervals.

May import: every wing but explorer and cli. To add a method: a file in `methods/` and a line in `registry.py`, or
the entry point `interp_ablate.league_methods`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
