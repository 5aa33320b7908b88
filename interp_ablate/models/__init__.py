"""Load a model, run it, hook it. `backends/` alone knows TransformerLens.

May import: errors, sites, prompts, directions, edits. To add an architecture: an entry in `architectures.py`; a backend: a file in `backends/`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
