"""A device that is none: it computes on the CPU and writes down what crosses to and from it.

On a real one, whatever the host reads of a tensor makes it wait until all work before is done.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map

HOST, DEVICE = torch.device("cpu"), torch.device("meta")
READ_BY_THE_HOST = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
}


class _Held(torch.Tensor):
    """A tensor on the stand-in device; `inner` has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "_Held":
        held = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            inner.stride(),
            inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        held.inner = inner
        return held

    def __repr__(self) -> str:
        return f"_Held({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, *_arguments: Any) -> Any:
        raise AssertionError("a tensor of the stand-in device is used outside of it")


class StandInDevice(TorchDispatchMode):
    """While it is entered, `hold` puts tensors on the device, and results stay on it.

    crossings: "to device" and "to host" for each copy, or the name of an operation for which the
    host waits, in the order in which they happened.
    """

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[str] = []

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` on the device, as if it had been there before."""
        return _Held(tensor)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device")
        reads_held = tree_any(lambda a: isinstance(a, _Held), (args, kwargs))
        if function is torch.ops.aten.copy_.default:
            # What the result is written to decides where it is.
            on_device = isinstance(args[0], _Held)
            if on_device != isinstance(args[1], _Held):
                self.crossings.append("to device" if on_device else "to host")
        else:
            on_device = target == DEVICE if target is not None else reads_held
            if reads_held and not on_device:
                self.crossings.append("to host")
            elif on_device and not reads_held and function is torch.ops.aten._to_copy.default:
                self.crossings.append("to device")
        if reads_held and (function in READ_BY_THE_HOST or _is_index_by_mask(function, args)):
            self.crossings.append(function.name())
        if target is not None:
            kwargs = {**kwargs, "device": HOST}
        if tree_any(_is_meta, (args, kwargs)):
            # `torch.tensor(…, device=…)` makes one where no mode can see its copy.
            raise AssertionError(f"{function.name()}: a tensor came to the device unseen")
        args, kwargs = tree_map(lambda a: a.inner if isinstance(a, _Held) else a, (args, kwargs))
        result = function(*args, **kwargs)
        if not on_device:
            return result
        return tree_map(lambda r: _Held(r) if isinstance(r, torch.Tensor) else r, result)


def _is_index_by_mask(function: Any, args: Any) -> bool:
    """Whether the host must learn how many elements a mask selects."""
    return function is torch.ops.aten.index.Tensor and any(
        index is not None and index.dtype == torch.bool for index in args[1]
    )


def _is_meta(value: Any) -> bool:
    is_tensor = isinstance(value, torch.Tensor) and not isinstance(value, _Held)
    return is_tensor and value.device == DEVICE
