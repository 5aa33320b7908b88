"""A plan as exact changes of weight tensors.

May import: errors, sites, edits, models. To add an exact weight form: `weight_form.py` (a
new edit needs none: it is read through its affine map).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
