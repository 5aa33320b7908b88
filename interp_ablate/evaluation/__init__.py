"""A model's outputs on prompts and texts, and how a plan changes them.

May import: errors, storage, stats, prompts, scoring, edits, models. To add a metric of outputs: `metrics.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
