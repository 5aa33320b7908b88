"""The explorer: a page in the browser over one model, its directions and a run folder.

May import: every wing but league and cli. To add a view: a function in `views.py`, a route in `server.py`, a part of
the page in `data/templates/explorer.html.j2`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
