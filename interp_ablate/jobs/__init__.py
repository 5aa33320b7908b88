"""Work in other processes, and how far it has come.

May import: errors, storage. To add an executor: a file here with the members of `Executor`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
