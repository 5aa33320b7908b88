from .configuration import Configuration as Configuration
from .run_folder import STAGES as STAGES
from .run_folder import Run as Run
from .run_folder import read_run as read_run
