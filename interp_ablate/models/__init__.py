"""Load a model, run it, hook it; `backends/` alone knows TransformerLens.

`load.py` makes a `Model` (`model.py`), whose parts are `backends/backend.py` (which sites it has), `applied_plans.py` (plans as
hooks), `forward.py` (passes in batches), `generation.py` (answers) and `residual_cache.py` (passes that start late).

May import: errors, sites, settings, storage, prompts, directions, edits. To add an architecture: an entry in `architectures.py`, or
an entry point `interp_ablate.architectures` of your package; a backend: a file in `backends/`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
