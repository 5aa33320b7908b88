"""Text in, 0 to 100 out: expressions, lexicons, classifiers, judges. No model of ours.

May import: errors, storage, prompts. To add a scorer: a file here and a line in `registry.py`, or the entry point `interp_ablate.scorers`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
