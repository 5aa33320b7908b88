from .bars import Bars as Bars
from .bars import Progress as Progress
from .bars import bar as bar
from .bars import quiet_libraries as quiet_libraries
from .bars import with_bar as with_bar
from .executors import Executor as Executor
from .ray_executor import RayExecutor as RayExecutor
from .ray_executor import RaySettings as RaySettings
