"""Models on many workers: threads of this process, or Ray actors on any number of machines."""

from .data_parallel import DataParallel, best_setting
from .ray_data import map_batches
from .ray_parts import Pipeline, TensorParallel
from .service import Limits
from .serving import start_server, stop_server

__all__ = [
    "DataParallel",
    "Limits",
    "Pipeline",
    "TensorParallel",
    "best_setting",
    "map_batches",
    "start_server",
    "stop_server",
]
