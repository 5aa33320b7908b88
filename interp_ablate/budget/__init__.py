"""Memory and time of a run by arithmetic, before it starts.

May import: errors, storage, search, models, weights, training. To add a stage: `stages.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
