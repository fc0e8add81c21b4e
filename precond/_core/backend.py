"""Which backends this installation has, why the others are missing, which one updates a tensor, and rows as the extension takes
them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .rows import Row
from .sharding import local, slots_of

# torch first: its libgomp then serves the extension too, so that both share one pool of threads.
_C: ModuleType | None
try:
    from .. import _C

    _why_no_cpu = ""
except ImportError as error:
    _C = None
    _why_no_cpu = f"the compiled extension is missing: {error}"

if _C is not None:
    # A wrong PRECOND_ISA is an error here and now, not a silent fallback.
    _C.select_isa(os.environ.get("PRECOND_ISA", ""))

BACKENDS = ("cpu", "cuda", "triton", "reference")
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
#: Dimensions that the plans take; kMaxDims in csrc/plan/layout.h counts those that cannot be merged.
MAX_DIMS = 16
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


@functools.cache
def reader():  # type: ignore[no-untyped-def]
    """Reads addresses for the plans. ``PRECOND_DLPACK=0`` avoids DLPack's exchange table."""
    assert _C is not None
    use_exchange = os.environ.get("PRECOND_DLPACK", "1") != "0"
    return _C.Reader((torch.Tensor, torch.nn.Parameter), slots_of, local, use_exchange)


def interpreting() -> bool:
    """True where Triton kernels run in its interpreter, and so on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def cuda_on_host() -> bool:
    """True in the tests' build, where the CUDA backend's sources run on the CPU and update CPU tensors."""
    return _C is not None and bool(_C.cuda_on_host)


@functools.cache
def why_not(backend: str) -> str:
    """Why a backend cannot be used in this process; empty if it can."""
    if backend == "cpu":
        return _why_no_cpu
    if backend == "cuda":
        return _why_no_cpu or str(_C.why_no_cuda())  # type: ignore[union-attr]
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not interpreting() and not torch.cuda.is_available():
            return "no GPU; TRITON_INTERPRET=1 interprets the kernels on the CPU"
    return ""


@functools.cache
def why_not_on(index: int) -> str:
    """Why the CUDA backend cannot use this device: no GPU, or none that the extension has code for. Empty if it can."""
    if reason := why_not("cuda"):
        return reason
    assert _C is not None
    with current(torch.device("cuda", index)):
        return str(_C.why_not_on(index))


def on_device(value: object) -> bool:
    """True for a tensor that must not be read by the host, because that would wait for the device."""
    return isinstance(value, Tensor) and (value.device.type != "cpu" or cuda_on_host())


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream on a device."""
    return 0 if cuda_on_host() else int(torch.cuda.current_stream(device).cuda_stream)


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a CUDA device current, and then the one before, on which torch makes no context for that."""
    return contextlib.nullcontext() if cuda_on_host() else torch.cuda.device(device)


def is_side_stream(device: torch.device, stream: int) -> bool:
    """True where a step runs on another stream than the device's default one, and is not being captured."""
    if cuda_on_host() or stream == torch.cuda.default_stream(device).cuda_stream:
        return False
    return not torch.cuda.is_current_stream_capturing()


def check(backend: str | None) -> str | None:
    """Resolve the ``backend`` argument and ``PRECOND_BACKEND``; raise where it cannot run."""
    backend = backend or os.environ.get("PRECOND_BACKEND") or None
    if backend is None:
        return None
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_not(backend)
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot run here: {reason}")
    return backend


def has_plain_memory(tensor: Tensor) -> bool:
    """True where the values lie at ``data_ptr()`` as strides say: no subclass that dispatches, no lazy negation, no zeros
    without storage; and in few enough dimensions.
    """
    kind = type(tensor)
    return (
        (kind in _PLAIN_TYPES or getattr(kind, "__torch_dispatch__", None) is torch.Tensor.__torch_dispatch__)
        and tensor.layout == torch.strided
        and not tensor.is_neg()
        and not tensor.is_conj()
        and (tensor.numel() == 0 or (not tensor._is_zerotensor() and tensor.data_ptr() != 0))
        and tensor.dim() + tensor.is_complex() <= MAX_DIMS
    )


def known(backend: str | None, tensors: list[Tensor]) -> str | None:
    """The compiled backend that updates plain tensors of one device and shape: a parameter, its gradient and its states. None
    where each of them must be looked at.
    """
    if _C is None or not reader().alike(tensors):
        return None
    p = tensors[0]
    home = home_of(backend, -1 if p.is_cpu else p.device.index) if p.is_cpu or p.is_cuda else None
    return None if home is None else home[0]


def home_of(backend: str | None, index: int) -> tuple[str, torch.device] | None:
    """The compiled backend that updates plain tensors of a device, by its index among CUDA's or -1 for the CPU; None where
    another one was asked for, or none can.
    """
    if index < 0:
        return ("cpu", torch.device("cpu")) if backend in (None, "cpu") else None
    return ("cuda", torch.device("cuda", index)) if backend in (None, "cuda") and not why_not_on(index) else None


def choose(backend: str | None, tensors: list[Tensor], name: str = "a parameter") -> str:
    """The backend that updates these tensors: a parameter, which errors call so, its gradient and its states."""
    device = tensors[0].device.type
    unfit = next((t for t in tensors if t.dtype not in FUSED_DTYPES or not has_plain_memory(t)), None)
    if backend is None:
        if unfit is None and device == "cpu" and not why_not("cpu"):
            return "cpu"
        if unfit is None and device == "cuda":
            if not why_not_on(tensors[0].device.index):
                return "cuda"
            return "triton" if not why_not("triton") else "reference"
        return "reference"
    wanted = {"cpu": "cpu", "cuda": "cpu" if cuda_on_host() else "cuda", "triton": "cpu" if interpreting() else "cuda"}
    if backend in wanted and (unfit is not None or device != wanted[backend]):
        bad = tensors[0] if unfit is None else unfit
        raise RuntimeError(
            f"backend={backend!r} must get float32, bfloat16, float16 or complex64 tensors on {wanted[backend]} "
            f"that lie in memory as their strides say, got a {type(bad).__name__} of {bad.dtype} on {bad.device} "
            f"for {name}; backend=None or 'reference' takes it"
        )
    if backend == "cuda" and (reason := why_not_on(tensors[0].device.index or 0)):
        raise RuntimeError(f"backend='cuda' cannot run here: {reason}; backend=None or 'triton' can")
    return backend


def table_of(rows: list[Row], device: torch.device | None) -> tuple[list[Any], list[Tensor]]:
    """Rows as a compiled plan takes them. For a plan on a device tensors become addresses, else numbers; also returned are the
    tensors at these addresses: copies of those that are on another device.
    """
    assert _C is not None
    table: list[Any] = []
    used: list[Tensor] = []
    for rule, sign, hyper in rows:
        number, names = number_and_hyper(rule)
        values, on_device = [], []
        for index, name in enumerate(names):
            value = hyper[name]
            if device is not None and isinstance(value, Tensor):
                if value.dtype not in (torch.float32, torch.float64):
                    raise TypeError(f"{name} must be a float32 or float64 tensor, got {value.dtype}")
                used.append(value.to(device, non_blocking=True))
                on_device.append((index, used[-1].data_ptr(), value.dtype == torch.float64))
                values.append(0.0)
            else:
                values.append(float(value))
        table.append(_C.Row(rule=number, sign=sign, hyper=values))
        for where in on_device:
            table[-1].read_from(*where)
    return table, used


@functools.cache
def number_and_hyper(rule: str) -> tuple[int, tuple[str, ...]]:
    """Of a rule of the extension, whose properties are made anew each time that they are read."""
    assert _C is not None
    name, _, parts = rule.partition("+")
    known = (_C.rules_with_parts[parts] if parts else _C.rules)[name]
    return known.number, known.hyper
