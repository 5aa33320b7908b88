from .architectures import ARCHITECTURES as ARCHITECTURES
from .architectures import Architecture as Architecture
from .architectures import architecture_of as architecture_of
from .backends.hooked_to_hf import hooked_to_hf as hooked_to_hf
from .generation import Generation as Generation
from .load import from_hf as from_hf
from .load import load_model as load_model
from .model import Model as Model
