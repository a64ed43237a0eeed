"""What a test of code that takes a device runs on: the CPU, and a GPU where there is one."""

from typing import Any

import pytest
import torch

_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, _NO_GPU))]


def on_gpu(test: Any) -> Any:
    """Mark a test that says nothing on a CPU."""
    return pytest.mark.gpu(_NO_GPU(test))
