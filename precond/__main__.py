"""``python -m precond``: what is installed, what it can run on, and one verified step."""

from __future__ import annotations

import platform
import sys

import torch

from . import AdamW, __version__, _backend
from ._backend import _C, BACKENDS, why_not


def verified_step(backend: str) -> float:
    """One AdamW step on random values; the largest error against the float64 reference, or an AssertionError."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(10_001))
    exact = torch.nn.Parameter(p.detach().double())
    p.grad = torch.randn(10_001)
    exact.grad = p.grad.double()
    AdamW([p], lr=0.1, l1_decay=0.01, backend=backend).step()
    AdamW([exact], lr=0.1, l1_decay=0.01, backend="reference").step()
    error = (p.double() - exact).abs().max().item()
    assert error < 1e-6, f"a step on backend {backend!r} must be within 1e-6 of float64, got {error:.1e}"
    return error


def main() -> None:
    """Print the report; exit with an error if no compiled backend works."""
    print(f"precond {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    if _C is not None:
        print(
            f"extension: {_C.compiler}, instruction set {_C.selected_isa()} of {', '.join(_C.available_isas())} "
            f"(PRECOND_ISA overrides), {_C.openmp_threads()} OpenMP threads, addresses through "
            f"{'DLPack' if _backend.reader().uses_exchange else 'tensor methods'}"
        )
    for backend in BACKENDS:
        reason = why_not(backend)
        if reason:
            print(f"backend {backend:9}  not available: {reason}")
        else:
            print(f"backend {backend:9}  one verified step, largest error {verified_step(backend):.1e}")
    if why_not("cpu"):
        sys.exit("precond: only slow backends work here")


if __name__ == "__main__":
    main()
