"""float64 that is: a float64 model computes in float64 throughout, also where its code casts down to float32.

transformers' norms, rotary tables, routers and many a softmax name float32, which is up from the bfloat16 that they
were written for, and down from float64. A rounding of 1e-7 in one norm is then all that "float64" is worth. So within
the forward of such a model, float32 and narrower types are read as float64, wherever they are named.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from mrd_ray.mrd.first_order import GROUPED_MM, grouped_mm

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
_BY_NAME = frozenset({torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16})
_BITS = frozenset({torch.Tensor.view, torch.frombuffer})  # read bits as numbers of the type that they name


class Float64(TorchFunctionMode):
    """Within this block, whatever asks for a floating-point type gets float64.

    Models are to be built in it too, whose rotary frequencies are then float64 numbers, not float32 ones made longer.
    """

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BY_NAME:
            return args[0].double()
        if func in _BITS:
            return func(*args, **kwargs)
        if func is GROUPED_MM and kwargs.get("bias") is None and args[0].dtype == torch.float64:
            return grouped_mm(*args, **kwargs)  # torch's own has no float64
        return func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def keep_float64(model: PreTrainedModel) -> None:
    """Have a float64 model compute in float64 throughout, from now on; any other is left as it is.

    Its hooks are plain functions, which copies and pickles of the model take along.
    """
    if model.dtype != torch.float64:
        return
    for buffer in model.buffers():
        if buffer.dtype in _NARROW:
            buffer.data = buffer.double()
    for module in {model, model.base_model}:
        module.register_forward_pre_hook(_enter, prepend=True)
        module.register_forward_hook(_leave, always_call=True)


class _Entered(threading.local):
    """Modes of the forwards that this thread is in the middle of."""

    def __init__(self) -> None:
        self.modes: list[Float64] = []


_entered = _Entered()


def _enter(module: torch.nn.Module, args: Any) -> None:
    _entered.modes.append(Float64())
    _entered.modes[-1].__enter__()


def _leave(module: torch.nn.Module, args: Any, output: Any) -> None:
    _entered.modes.pop().__exit__(None, None, None)


def as_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which computes in float64 throughout if it is made within a forward that does.

    A backward may recompute a part of a forward long after it, and on a thread of its own.
    """
    return functools.partial(_in_float64, function) if _entered.modes else function


def _in_float64(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with Float64():
        return function(*args, **kwargs)
