"""Residual activations: collected, averaged, pooled, projected.

May import: errors, sites, storage, prompts, directions, models. To add a position: `collection.py`;
a pooling: `pooling.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
