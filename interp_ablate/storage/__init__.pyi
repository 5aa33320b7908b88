from .bundled_data import bundled as bundled
from .entry_points import RegisteredEntry as RegisteredEntry
from .entry_points import entry_points_of as entry_points_of
from .jsonl_log import JsonlLog as JsonlLog
from .output_folder import StreamedFolder as StreamedFolder
from .safetensors_header import TensorFile as TensorFile
