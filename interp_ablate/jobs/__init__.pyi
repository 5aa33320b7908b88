from .executors import Executor as Executor
from .progress import NoProgress as NoProgress
from .progress import Progress as Progress
from .ray_executor import RayExecutor as RayExecutor
from .ray_executor import RaySettings as RaySettings
