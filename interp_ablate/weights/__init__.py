"""A plan as exact changes of weight tensors.

May import: errors, sites, edits, models. A new edit needs nothing here: it is read through its
affine map. To make another plan exact: `weight_form.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
