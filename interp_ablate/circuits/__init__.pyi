from .attribution import Attribution as Attribution
from .attribution import attribute as attribute
from .independence import representational_independence as representational_independence
from .lens import LogitLens as LogitLens
from .lens import logit_lens as logit_lens
from .reading import path_patching as path_patching
from .reading import reading_weights as reading_weights
from .written_parts import Term as Term
