"""The modes of a caller that would change arithmetic: autocast, reduced precision of matrix products, inference mode.

Whatever a training loop allows for its own products, those of a method run at the precision that the method states. Default dtype
and device are not among the modes: step counters follow the default dtype, as in torch, so operations name a dtype and a device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: Where float32 products are computed; convolutions and recurrent layers are not used.
_PRODUCTS = (("cuda", "matmul"), ("mkldnn", "matmul"))
#: From torch 2.9 on a precision per backend and operation, which inherits from that of the backend and that of all backends.
_BY_OPERATION = hasattr(torch._C, "_get_fp32_precision_getter")
_IEEE = ("none", "ieee")
#: What reads and what sets whether CUDA adds up 16-bit products in 16 bits: a bool, or with whether sums may be split a pair.
#: It is held at torch's default: what Muon states is bfloat16, and torch's own runs so.
_REDUCTIONS = tuple(
    tuple(getattr(torch._C, f"_{verb}_cublas_allow_{dtype}_reduced_precision_reduction") for verb in ("get", "set"))
    for dtype in ("fp16", "bf16")
)
_DEFAULT_REDUCTION = (True, (True, True))


@contextlib.contextmanager
def stated_precision(optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """While it lasts no autocast runs, float32 products are float32, and tensors are not made for inference alone: unless
    ``optimizer`` has parameters that are, which no other mode can update. Then everything is as it was, after errors too.

    The precision of products is a setting of the process: other threads that multiply meanwhile have this one too. It is only
    written where it deviates.
    """
    with contextlib.ExitStack() as stack:
        if torch._C._is_any_autocast_enabled():
            stack.enter_context(torch._C._DisableAutocast())
        if torch.is_inference_mode_enabled() and not _updates_inference_tensors(optimizer):
            grad = torch.is_grad_enabled()
            stack.enter_context(torch.inference_mode(False))  # which enables gradients
            stack.enter_context(torch.set_grad_enabled(grad))
        for restore in _exact_products():
            stack.callback(restore)
        yield


def at_stated_precision(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorates what runs under :func:`stated_precision`; a method of an optimizer with that optimizer. Functions of the user
    that run in it run there too, so they are to be called before.
    """

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        # A compiler traces none of this; what it compiles has the caller's modes.
        if torch.compiler.is_compiling() or not _deviates():
            return function(*args, **kwargs)
        owner = args[0] if args and isinstance(args[0], torch.optim.Optimizer) else None
        with stated_precision(owner):
            return function(*args, **kwargs)

    return wrapped


def _deviates() -> bool:
    """True where a caller's mode matters; 0.5 us, paid by every step."""
    return (
        torch._C._is_any_autocast_enabled()
        or torch.is_inference_mode_enabled()
        or _reduced_products()
        or any(get() not in _DEFAULT_REDUCTION for get, _ in _REDUCTIONS)
    )


def _updates_inference_tensors(optimizer: torch.optim.Optimizer | None) -> bool:
    return optimizer is not None and any(p.is_inference() for group in optimizer.param_groups for p in group["params"])


def _exact_products() -> Iterator[Callable[[], object]]:
    """Make products exact; yields what restores each setting as soon as it was changed."""
    for get, set_ in _REDUCTIONS:
        if (before := get()) not in _DEFAULT_REDUCTION:
            set_(*_DEFAULT_REDUCTION[1] if isinstance(before, tuple) else (True,))
            yield functools.partial(set_, *before if isinstance(before, tuple) else (before,))
    if not _reduced_products():
        return
    if not _BY_OPERATION:
        precision = torch._C._get_float32_matmul_precision()
        torch._C._set_float32_matmul_precision("highest")
        yield functools.partial(torch._C._set_float32_matmul_precision, precision)
        return
    # Not by torch.set_float32_matmul_precision: reading it is an error where the caller has set precisions by operation.
    for backend, operation in _PRODUCTS:
        if _get(backend, operation) not in _IEEE:
            own = _own_precision(backend, operation)
            _set(backend, operation, "ieee")
            yield functools.partial(_set, backend, operation, own)


def _reduced_products() -> bool:
    if not _BY_OPERATION:
        return bool(torch._C._get_float32_matmul_precision() != "highest")
    return any(_get(*product) not in _IEEE for product in _PRODUCTS)


def _own_precision(backend: str, operation: str) -> str:
    """The precision that an operation has of its own: "none" where it inherits, which reading it does not tell. So what it would
    inherit is changed for a moment. Restoring the inherited value as its own would cut it off from later settings.
    """
    seen = _get(backend, operation)
    parent = ("generic", "all") if operation == "all" else (backend, "all")
    inherited = _get(*parent)
    if inherited != seen:
        return seen
    own = inherited if parent[0] == "generic" else _own_precision(*parent)
    _set(*parent, "ieee")
    try:
        return seen if _get(backend, operation) == seen else "none"
    finally:
        _set(*parent, own)


def _get(backend: str, operation: str) -> str:
    return str(torch._C._get_fp32_precision_getter(backend, operation))


def _set(backend: str, operation: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, operation, precision)
