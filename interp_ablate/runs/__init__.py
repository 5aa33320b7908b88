"""A run folder: stages, search, final test, report.

May import: every wing but explorer, league and cli. To add a stage: `stages.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
