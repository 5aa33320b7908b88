from .bundled_data import bundled as bundled
from .jsonl_log import JsonlLog as JsonlLog
from .output_folder import StreamedFolder as StreamedFolder
from .safetensors_header import TensorFile as TensorFile
