"""Muon's iteration: singular values, distance from the polar factor, rounding, operations: docs/newton_schulz.md."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from precond._methods.newton_schulz import (
    METHODS,
    NS_COEFFICIENTS,
    blocks_of,
    coefficients,
    operations,
    orthogonalized,
    share,
    strip,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLAT = (
    "one entry",
    "one row",
    "all ones",
    "4 equal entries",
    "12 equal entries",
    "12 orthonormal rows",
    "2 equal rows",
)
SPECTRA = ("normal", "1e1", "1e3", "1e6", "half the rank", "16 loud rows", *FLAT)
#: How much further from exact arithmetic than 1.5 times torch's a result in bfloat16 may be: a part of its norm.
MORE = {None: 0.02, "gram": 0.4}
NAMES = {None: "default", "gram": "gram", "polar_express": "polar_express"}


def group(method: str | None = None, **options: Any) -> dict[str, Any]:
    return {"ns_coefficients": NS_COEFFICIENTS, "ns_steps": 5, "eps": 1e-7, "method": method, **options}


def matrix(m: int, n: int, spectrum: str, seed: int = 0) -> Tensor:
    """A float64 matrix: normal numbers, a condition number with singular values evenly spaced in their logarithm, and others."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if spectrum == "normal":
        return normal(m, n)
    if spectrum in FLAT:
        result = torch.zeros(m, n, dtype=torch.float64)
        count = int(spectrum.split()[0]) if spectrum[0].isdigit() else 1
        if spectrum == "all ones":
            result += 1
        elif spectrum == "2 equal rows":
            result[:2] = normal(n)
        elif spectrum.endswith("orthonormal rows"):
            result[:count] = torch.linalg.qr(normal(n, count))[0].mT
        elif spectrum == "one row":
            result[0] = normal(n)
        else:
            result[:count, :count] = torch.eye(count)
        return result
    left, right = torch.linalg.qr(normal(m, m))[0], torch.linalg.qr(normal(n, m))[0]
    decades = {"half the rank": 1, "16 loud rows": 3}.get(spectrum) or len(f"{float(spectrum):.0f}") - 1
    values = torch.logspace(0, -decades, m, dtype=torch.float64)
    if spectrum == "half the rank":
        values[m // 2 :] = 0
    result = (left * values) @ right.mT
    if spectrum == "16 loud rows":
        result[16:] *= 0.01
    return result


def expected(u: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the iteration gives in exact arithmetic, and the polar factor of the singular values that are not 0."""
    left, values, right = torch.linalg.svd(u.double(), full_matrices=False)
    there = values > values[0] * 1e-12
    values = torch.where(there, values, 0.0) / values.norm()
    for a, b, c in coefficients(options):
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right, left[:, there] @ right[there]


def torchs(u: Tensor, options: dict[str, Any]) -> Tensor:
    from torch.optim._muon import _zeropower_via_newtonschulz

    return _zeropower_via_newtonschulz(u.clone(), options["ns_coefficients"], options["ns_steps"], options["eps"])


def rounding(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def run(arguments: argparse.Namespace) -> None:
    m = arguments.rows
    cases = [(aspect, spectrum) for aspect in arguments.aspects for spectrum in SPECTRA]
    print(
        "Singular values of the result in float64, without those that are 0, and its distance from the polar factor\n"
    )
    print("| aspect | spectrum | default | distance | polar_express | distance |\n|---|---|---|---|---|---|")
    for aspect, spectrum in cases:
        cells = []
        for method in (None, "polar_express"):
            u = matrix(m, m * aspect, spectrum)
            exact, polar = expected(u, group(method))
            values = torch.linalg.svdvals(exact)[: round(polar.square().sum().item())]
            cells += [f"{values[-1]:.2g} to {values[0]:.2f}", f"{rounding(exact, polar):.2f}"]
        print(f"| {aspect} | {spectrum} | {' | '.join(cells)} |")
    columns = [(method, dtype) for method in METHODS for dtype in DTYPES]
    print("\nRounding: distance from the same iteration in exact arithmetic\n")
    print(
        f"| aspect | spectrum | torch, bf16 | {' | '.join(f'{NAMES[method]}, {dtype}' for method, dtype in columns)} |"
    )
    print("|---|---|---" + "|---" * len(columns) + "|")
    for aspect, spectrum in cases:
        cells = []
        for method, name in [("torch", "bf16"), *columns]:
            u = matrix(m, m * aspect, spectrum).to(DTYPES[name])
            options = group(None if method == "torch" else method)
            found = torchs(u, options) if method == "torch" else orthogonalized(u[None], options)[0]
            cells.append(f"{rounding(found, expected(u, options)[0]):.2g}")
        print(f"| {aspect} | {spectrum} | {' | '.join(cells)} |")
    print("\nOperations over torch's 5 (4 m^2 n + 2 m^3), and steps from one Gram matrix, in bfloat16\n")
    print("| m x n | method | steps | counted | with half of each symmetric product |\n|---|---|---|---|---|")
    for rows, aspect in ((512, 1), (1024, 1), (4096, 1), (512, 4), (1024, 4), (1024, 16), (4096, 4)):
        whole = operations(rows, rows * aspect, [1] * 5)
        for method in (None, "gram"):
            part = share(rows, strip(rows))
            coefs = coefficients(group(method))
            steps = blocks_of(rows, rows * aspect, coefs, torch.bfloat16, method, part)
            counts = [operations(rows, rows * aspect, steps, each) / whole for each in (part, 0.5)]
            blocks = " + ".join(map(str, steps))
            print(f"| {rows} x {rows * aspect} | {NAMES[method]} | {blocks} | {counts[0]:.2f} | {counts[1]:.2f} |")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=256, help="of the matrices (default 256)")
    parser.add_argument("--aspects", type=int, nargs="*", default=[1, 4, 16, 64], help="columns over rows (1 4 16 64)")
