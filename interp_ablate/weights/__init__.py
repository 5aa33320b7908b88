"""A plan as exact changes of weight tensors.

May import: errors, sites, edits, models. To add nothing: a new edit is read through its affine map.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
