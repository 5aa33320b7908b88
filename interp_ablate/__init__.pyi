__version__: str

from .activations.activations import Activations as Activations
from .activations.collection import collect as collect
from .activations.token_view import token_projections as token_projections
from .directions.direction import Direction as Direction
from .directions.direction import random_direction as random_direction
from .directions.direction_set import Directions as Directions
from .directions.mean_difference import estimate_directions as estimate_directions
from .edits.kinds import Ablate as Ablate
from .edits.kinds import Add as Add
from .edits.kinds import Clamp as Clamp
from .edits.kinds import Erase as Erase
from .edits.plan import Plan as Plan
from .edits.plan import band as band
from .edits.plan import everywhere as everywhere
from .errors import InterpAblateError as InterpAblateError
from .evaluation.compare import evaluate as evaluate
from .evaluation.side_by_side import compare as compare
from .export.auditing import audit as audit
from .export.certification import certify as certify
from .export.checkpoint import export_checkpoint as export_checkpoint
from .models.load import load_model as load_model
from .models.model import Model as Model
from .prompts.contrast_set import ContrastSet as ContrastSet
from .prompts.prompt import Prompt as Prompt
from .sites import Site as Site
from .sites import sites_of as sites_of
