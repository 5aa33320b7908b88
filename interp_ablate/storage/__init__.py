"""Files: written whole or not at all, JSON-lines logs, safetensors in and out, bundled data.

May import: errors. To add a file format that several wings read: one file here.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
