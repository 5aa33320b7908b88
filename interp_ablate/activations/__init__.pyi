from .activations import Activations as Activations
from .activations import Moments as Moments
from .collection import collect as collect
from .collection import collect_moments as collect_moments
from .pooling import pooled as pooled
from .pooling import project_responses as project_responses
from .pooling import response_activations as response_activations
