from .costs import ConfigTraits as ConfigTraits
from .costs import Dimensions as Dimensions
from .costs import Machine as Machine
from .costs import Workload as Workload
from .costs import dimensions_of as dimensions_of
from .stages import budget as budget
