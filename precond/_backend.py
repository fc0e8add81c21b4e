"""Which backends this installation has, why the others are missing, and which one updates a tensor."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from ._sharding import local

# torch first: its libgomp then serves the extension too, so that both share one pool of threads.
_C: ModuleType | None
try:
    from . import _C

    _why_no_cpu = ""
except ImportError as error:
    _C = None
    _why_no_cpu = f"the compiled extension is missing: {error}"

if _C is not None:
    # A wrong PRECOND_ISA is an error here and now, not a silent fallback.
    _C.select_isa(os.environ.get("PRECOND_ISA", ""))

BACKENDS = ("cpu", "triton", "reference")
FUSED_DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def reader():  # type: ignore[no-untyped-def]
    """Reads addresses for the plans. ``PRECOND_DLPACK=0`` avoids DLPack's exchange table."""
    assert _C is not None
    use_exchange = os.environ.get("PRECOND_DLPACK", "1") != "0"
    return _C.Reader((torch.Tensor, torch.nn.Parameter), local, use_exchange)


def interpreting() -> bool:
    """True where Triton kernels run in its interpreter, and so on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(backend: str) -> str:
    """Why a backend cannot be used in this process; empty if it can."""
    if backend == "cpu":
        return _why_no_cpu
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not interpreting():
            return "compiled Triton kernels are not connected yet; set TRITON_INTERPRET=1 to interpret them on the CPU"
    return ""


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


def choose(backend: str | None, tensors: list[Tensor]) -> str:
    """The backend that updates these tensors: a parameter, its gradient and its states."""
    unfit = next((t for t in tensors if t.device.type != "cpu" or t.dtype not in FUSED_DTYPES), None)
    if backend in ("cpu", "triton") and unfit is not None:
        raise RuntimeError(
            f"backend={backend!r} must get float32 or bfloat16 tensors on the CPU, "
            f"got {unfit.dtype} on {unfit.device}; backend=None or 'reference' takes it"
        )
    if backend is not None:
        return backend
    return "cpu" if unfit is None and not _why_no_cpu else "reference"
