"""Directions from two sets of activations, and their files.

May import: errors, sites, stats, storage. To add an estimator: a file here and a line in
`ESTIMATORS` of `estimators.py`, or the entry point `interp_ablate.estimators`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
