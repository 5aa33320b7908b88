from .costs import Machine as Machine
from .costs import Workload as Workload
from .sizes import Dimensions as Dimensions
from .sizes import Layer as Layer
from .sizes import dimensions_of as dimensions_of
from .stages import budget as budget
