from .executors import Executor as Executor
from .progress import Listener as Listener
from .progress import Silent as Silent
from .ray_executor import RayExecutor as RayExecutor
from .ray_executor import executor_of as executor_of
