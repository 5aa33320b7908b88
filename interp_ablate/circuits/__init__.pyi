from .attribution import Attribution as Attribution
from .attribution import attribute as attribute
from .written_parts import Term as Term
