"""Notice where values of tensors are fetched to the host: what one waits for a GPU for."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_METHODS = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero",
    "is_nonzero", "masked_select", "unique", "equal", "allclose",
}  # fmt: skip
_KERNELS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal"}


class Fetches(TorchFunctionMode):
    """Methods that fetch values of floating and boolean tensors while open, by name.

    Whole numbers are left out: the loops keep their places as such, on the host. With ``traced``,
    only what comes of these tensors counts, not the tables that a scheduler has on the host.
    """

    def __init__(self, *traced: torch.Tensor) -> None:
        super().__init__()
        self.found: list[str] = []
        self.all = not traced
        for value in traced:
            value.traced = True  # type: ignore[attr-defined]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        own = self.all or any(
            getattr(value, "traced", False) for value in tree_leaves((args, kwargs))
        )
        if own:
            name = getattr(func, "__name__", "")
            if name in _METHODS and args and _holds_values(args[0]):
                self.found.append(name)
            for value in tree_leaves(result):
                if isinstance(value, torch.Tensor):
                    value.traced = True  # type: ignore[attr-defined]
        return result


class FetchingKernels(TorchDispatchMode):
    """The same one level below, for what C++ code fetches by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func._overloadpacket) in _KERNELS and _holds_values(args[0]):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def _holds_values(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (
        value.is_floating_point() or value.dtype is torch.bool
    )
