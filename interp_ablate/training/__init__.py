"""LoRA training: healing after an edit, preventative steering.

May import: every wing in the rows below it. To add a kind of training: a folder here.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
