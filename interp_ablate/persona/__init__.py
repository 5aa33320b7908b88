"""Persona vectors: traits, rollouts, extraction, steering, monitoring.

May import: every wing in the rows below it. To add a trait: a file in `data/traits/`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
