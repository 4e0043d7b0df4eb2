"""Other people's checkpoints: reading them without running anything in them, and fitting them.

`read` takes a file (safetensors, or what ``torch.save`` wrote: a state dict, bare or under
"state_dict", "model", "params" and the like, with or without ``module.`` before all names) or a
folder of the Hugging Face kind (whole or in shards). `assign` makes the tensors those of a model,
`check_fit` only compares; both list everything that does not fit. `write` and `write_folder` write
what the original code and Hugging Face read. `load_published` tells by names and shapes which of
some published configs a checkpoint fits, or takes the one that `save_published` left in the file.
All raise `BrtError`; what does not fit a model is a
`CheckpointError`, whose ``complaints`` are all there are.
"""

from brt.errors import CheckpointError
from brt_models.checkpoints.fitting import assign, check_fit, refuse
from brt_models.checkpoints.published import load_published, nearest, num_classes, save_published
from brt_models.checkpoints.reading import read, read_beside, read_config
from brt_models.checkpoints.writing import write, write_folder

__all__ = [
    "CheckpointError",
    "assign",
    "check_fit",
    "load_published",
    "nearest",
    "num_classes",
    "read",
    "read_beside",
    "read_config",
    "refuse",
    "save_published",
    "write",
    "write_folder",
]
