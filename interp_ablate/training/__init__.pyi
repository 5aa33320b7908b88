from .healing.healing_run import heal as heal
from .merging import certify_merged as certify_merged
from .merging import merge as merge
from .preventative.prevention import prevent as prevent
from .recipe import LoraRecipe as LoraRecipe
from .trainable_model import load_base as load_base
from .trainer import sft as sft
from .trainer import train as train
