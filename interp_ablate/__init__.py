"""interp_ablate: from two sets of prompts to directions, plans, trials and exports.

The names of the core path, loaded when first used: importing the package does not import torch. The rest
is behind the wings' doors (`interp_ablate.persona`, `interp_ablate.export`, ...).
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
