from .configuration import Configuration as Configuration
from .run_folder import STAGES as STAGES
from .run_folder import Run as Run
from .run_folder import read_run as read_run
from .search_run import run_search as run_search
from .search_settings import SearchSettings as SearchSettings
from .stages import do_stage as do_stage
