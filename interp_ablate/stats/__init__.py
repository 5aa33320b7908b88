"""Numbers with intervals: means, rates, AUC, correlation.

May import: errors. To add a statistic: one file here.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
