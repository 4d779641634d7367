"""True float64: a float64 model computes in float64 throughout, even where its code casts down to float32.

transformers' norms, rotary tables, routers and many softmaxes cast to float32. That is up from bfloat16, for which they
were written, but down from float64. Rounding of 1e-7 in a single norm would spoil float64's precision. So within the
forward of a float64 model, float32 and narrower types are read as float64 wherever code names them.
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
_BITS = frozenset({torch.Tensor.view, torch.frombuffer})  # reinterpret bits as the type that they name


class Float64(TorchFunctionMode):
    """Within this block, code that asks for any floating-point type gets float64.

    Build float64 models in it too: their rotary frequencies are then computed in float64, not converted from float32.
    """

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BY_NAME:
            return args[0].double()
        if func in _BITS:
            return func(*args, **kwargs)
        if func is GROUPED_MM and kwargs.get("bias") is None and args[0].dtype == torch.float64:
            return grouped_mm(*args, **kwargs)  # torch's own does not support float64
        return func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def keep_float64(model: PreTrainedModel) -> None:
    """Make a float64 model compute in float64 throughout from now on; other models stay unchanged.

    The hooks are plain functions, so that copies and pickles of the model keep them.
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
    """Modes of the forwards that this thread is currently running."""

    def __init__(self) -> None:
        self.modes: list[Float64] = []


_entered = _Entered()


def _enter(module: torch.nn.Module, args: Any) -> None:
    _entered.modes.append(Float64())
    _entered.modes[-1].__enter__()


def _leave(module: torch.nn.Module, args: Any, output: Any) -> None:
    _entered.modes.pop().__exit__(None, None, None)


def as_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, made to compute in float64 throughout if this is called within a forward that does.

    A backward may recompute a part of the forward much later, and on another thread.
    """
    return functools.partial(_in_float64, function) if _entered.modes else function


def _in_float64(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with Float64():
        return function(*args, **kwargs)
