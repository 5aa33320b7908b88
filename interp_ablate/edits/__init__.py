"""Edits of the residual stream as data, and their algebra.

May import: errors, sites, storage, directions. To add an edit: a class in `kinds.py`; hooks and weights read its affine map. To
add a rule that places edits: a function in `plan.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
