"""Turn pickled weights into safetensors.

``python -m dori_lightning.models.convert INPUT OUTPUT.safetensors``

Only tensors are unpickled (``weights_only=True``); a file that needs anything else is refused by
torch.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from dori_lightning.runtime.artifacts import partial_file
from dori_lightning.types import InputError


def convert(source: Path, target: Path) -> int:
    """Write the tensors of a pickled state dict as safetensors.

    Returns:
        Number of tensors written.

    Raises:
        InputError: The file is missing, holds more than tensors, or holds none.
    """
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{source} does not exist") from error
    except Exception as error:
        raise InputError(
            f"{source} is not a plain file of tensors and is refused: {error}"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {k: v.contiguous().clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise InputError(f"{source} holds no tensors")
    with partial_file(target) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(target)
    return len(tensors)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m dori_lightning.models.convert INPUT OUTPUT.safetensors")
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except InputError as problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(2)
