"""``python -m precond``: what is installed, what it can run on, and verified steps on each backend and device.

Exits with an error where a step is wrong. ``.ci/gpu`` runs it under compute-sanitizer: plain kernels, formats, norms and tails.
"""

from __future__ import annotations

import platform
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from . import SGD, AdamW, PrecisionWarning, __version__, master_weights
from ._core import backend as _backend
from ._core.backend import _C, BACKENDS, why_not, why_not_on

#: Tails after full vectors and chunks, rows of whole groups of 64 for codes, and tensors that are too small for either.
SHAPES = ((10_001,), (65, 192), (7, 5), (1,))
LR = 0.01
#: Largest error of float32 parameters: a few roundings of values up to 5. A wrong formula is off by about ``LR``.
LIMIT = 2e-6


class WrongResult(Exception):
    """A step ran and gave what it must not."""


def devices(backend: str) -> list[str]:
    """Where a backend updates tensors in this process."""
    on_host = {"cpu": True, "cuda": _backend.cuda_on_host(), "triton": _backend.interpreting()}
    if on_host.get(backend, False):
        return ["cpu"]
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu", *cuda] if backend == "reference" else cuda


def trained(cls: Any, backend: str, device: str, dtype: torch.dtype, steps: int, **options: Any) -> tuple[Any, Any]:
    """A list of parameters and their optimizer after some steps, on the same random values for every backend and dtype."""
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return values.to(torch.bfloat16 if "weight_format" in options else values.dtype)

    given = options if dtype != torch.float64 else {k: v for k, v in options.items() if not k.endswith("_format")}
    params = torch.nn.ParameterList(torch.nn.Parameter(random(shape).to(device, dtype)) for shape in SHAPES)
    optimizer = cls(params, lr=LR, backend=backend, **given)
    for _ in range(steps):
        for p in params:
            p.grad = random(p.shape).to(device, dtype)
        optimizer.step()
    return params, optimizer


def against_float64(found: list[Tensor], exact: list[Tensor], relative: float = 0.0) -> float:
    """The largest error, which must be within ``LIMIT`` or a part of the value."""
    worst = 0.0
    for p, q in zip(found, exact, strict=True):
        error = (p.detach().cpu().double() - q.detach()).abs()
        wrong = ~(error <= LIMIT + relative * q.detach().abs())  # a NaN is wrong
        if wrong.any():
            raise WrongResult(
                f"{int(wrong.sum())} of the {p.numel()} elements of shape {tuple(p.shape)} differ from float64, "
                f"by up to {error[wrong].max().item():.1e}"
            )
        worst = max(worst, error.max().item())
    return worst


def fused(backend: str, device: str) -> str:
    """AdamW with L1 decay in float32."""
    found, _ = trained(AdamW, backend, device, torch.float32, 2, l1_decay=0.1)
    exact, _ = trained(AdamW, "reference", "cpu", torch.float64, 2, l1_decay=0.1)
    return f"error {against_float64(list(found), list(exact)):.1e}"


def clipped(backend: str, device: str) -> str:
    """SGD, whose step is as long as the gradient, clipped by the norm of all gradients."""
    options = {"momentum": 0.9, "max_grad_norm": 1.0}
    found, optimizer = trained(SGD, backend, device, torch.float32, 2, **options)
    exact, reference = trained(SGD, "reference", "cpu", torch.float64, 2, **options)
    norm, expected = optimizer.grad_norm.item(), reference.grad_norm.item()
    if not abs(norm / expected - 1) < 1e-5:
        raise WrongResult(f"the norm of all gradients is {norm}, must be {expected}")
    return f"error {against_float64(list(found), list(exact)):.1e}"


def formats(backend: str, device: str) -> str:
    """AdamW on bfloat16 with 24-bit weights and 8-bit states."""
    options = {"weight_format": "split24", "state_format": "int8"}

    def weights(steps: int) -> tuple[list[Tensor], list[Tensor], Any]:
        params, optimizer = trained(AdamW, backend, device, torch.bfloat16, steps, **options)
        exact, _ = trained(AdamW, "reference", "cpu", torch.float64, steps, **options)
        return list(master_weights(optimizer, params).values()), list(exact), optimizer

    # The first step reads no codes: exact but for the weights' 16 bits of mantissa, rounded at random by less than one.
    found, exact, _ = weights(1)
    error = against_float64(found, exact, relative=2.0**-15)
    found, exact, optimizer = weights(2)
    # The second does: single steps of elements with small moments may be far off, the mean is not.
    off = max((p.cpu() - q.detach()).abs().mean().item() / LR for p, q in zip(found, exact, strict=True))
    if not off < 0.1:
        raise WrongResult(f"a step from 8-bit states differs by {off:.2f} of its size from float64 on average")
    # Triton's interpreter and the reference round other intermediate results.
    if backend == "reference" or why_not("cpu") or (backend == "triton" and _backend.interpreting()):
        return f"error {error:.1e}"
    _, host = trained(AdamW, "cpu", "cpu", torch.bfloat16, 2, **options)
    for p, q in zip(*(o.param_groups[0]["params"] for o in (optimizer, host)), strict=True):
        pairs = {"p": (p.detach(), q.detach())}
        pairs |= {key: (value, host.state[q][key]) for key, value in optimizer.state[p].items()}
        for name, (a, b) in pairs.items():
            if isinstance(a, Tensor) and not torch.equal(a.cpu(), b):
                raise WrongResult(f"{name} of shape {tuple(a.shape)} differs from the cpu backend")
    return f"error {error:.1e}" if backend == "cpu" else f"error {error:.1e}, same bits as the cpu backend"


#: What is verified on each backend and device.
CHECKS = {"fp32": fused, "bf16 split24 + int8": formats, "clipped": clipped}


def verify(check: str, backend: str, device: str) -> tuple[bool, str]:
    """Whether a check passes, and what it found."""
    try:
        return True, CHECKS[check](backend, device)
    except WrongResult as error:
        return False, str(error)
    except Exception as error:  # a kernel that does not launch, say: the other checks still run
        return False, f"{type(error).__name__}: {error}"


def main() -> None:
    """Print the report; exit with an error if a step is wrong or no compiled backend works."""
    warnings.simplefilter("ignore", PrecisionWarning)  # 8-bit states are among what is verified
    print(f"precond {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    if _C is not None:
        print(
            f"extension: {_C.compiler}, instruction set {_C.selected_isa()} of {', '.join(_C.available_isas())} "
            f"(PRECOND_ISA overrides), {_C.openmp_threads()} OpenMP threads, addresses through "
            f"{'DLPack' if _backend.reader().uses_exchange else 'tensor methods'}"
        )
    wrong = []
    for backend in BACKENDS:
        if reason := why_not(backend):
            print(f"backend {backend:9}  not available: {reason}")
            continue
        for device in devices(backend):
            where = device if device == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
            if backend == "cuda" and (reason := why_not_on(torch.device(device).index or 0)):
                print(f"backend {backend:9}  not available on {where}: {reason}")
                continue
            found = {check: verify(check, backend, device) for check in CHECKS}
            if good := [f"{check} ({what})" for check, (passed, what) in found.items() if passed]:
                print(f"backend {backend:9}  one verified step each on {where}: {'; '.join(good)}", flush=True)
            for check, (passed, what) in found.items():
                if not passed:
                    print(f"backend {backend:9}  WRONG on {where}: {check}: {what}", flush=True)
                    wrong.append(f"{check} on {backend}, {device}")
    if wrong:
        sys.exit(f"precond: wrong steps: {'; '.join(wrong)}")
    if why_not("cpu"):
        sys.exit("precond: only slow backends work here")


if __name__ == "__main__":
    main()
