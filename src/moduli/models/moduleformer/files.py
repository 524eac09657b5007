"""Weights are read from safetensors only; pickled ones are refused with the way out.

Some published checkpoints have files of both kinds, some pickled ones only.
"""

from __future__ import annotations

from pathlib import Path

from moduli.errors import CheckpointError
from moduli.surgery.files import check_readable

CONVERT = """python -c "
import glob, torch
from safetensors.torch import save_file
files = sorted(glob.glob('pytorch_model*.bin'))
state = {k: v for f in files for k, v in torch.load(f, weights_only=True, mmap=True).items()}
save_file({k: v.clone() for k, v in state.items()}, 'model.safetensors', {'format': 'pt'})
\""""
"""A command that converts the files where it is run, and runs no code that is in them."""


def no_safetensors(name: str) -> CheckpointError:
    """What to say of a checkpoint of a hub that has pickled weights only.

    Args:
        name: of the checkpoint.
    """
    return CheckpointError(
        f"{name} has no safetensors, and moduli does not load pickled weights, which can run code "
        f"when they are read. Fetch it with `hf download {name} --local-dir DIRECTORY`, convert it "
        f"there by this command, and load the directory:\n{CONVERT}"
    )


def check_weights(directory: Path) -> None:
    """Raise if a directory has pickled weights only, or files that are damaged.

    Args:
        directory: of a checkpoint; anything else, such as the name of a hub, is not looked at.

    Raises:
        CheckpointError: says which files, and how to convert them.
    """
    for path in directory.glob("*.safetensors"):
        check_readable(path)
    pickled = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    if pickled and not any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{directory} has its weights as pickle only ({', '.join(pickled)}), which can run "
            "code when it is read; moduli loads safetensors. This command, run in that directory, "
            f"converts them:\n{CONVERT}"
        )
