"""Chat data: read, filtered, screened, written.

May import: errors, storage, stats, prompts, scoring, directions, activations, persona. To add a layout of chat data: `conversations.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
