from .controls import Controls as Controls
from .server import explorer_app as explorer_app
from .session import ExplorerSession as ExplorerSession
