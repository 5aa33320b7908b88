"""Two sets of prompts: read, split, checked, and rendered through a chat template.

May import: errors, storage. To add a file layout of prompts: a reader in `readers.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
