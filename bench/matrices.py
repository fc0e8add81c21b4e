"""Speed of the methods with matrix products on the CPU, with targets: Muon, SOAP and FOP.

Every case runs its contenders in turn in one process and reports the median of the ratios, and the operations of their matrix
products (2 a b c for an a x b matrix times a b x c one). Nothing is timed that does not compute what its peer computes.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

import precond

from . import cpu, record, timing

#: Count and shape of the matrices; ``quick`` has those of a fourth of the side.
SQUARE, WIDE, NARROW = (16, (512, 512)), (8, (1024, 4096)), (16, (512, 128))
QUICK = 4
#: Bytes per element of float32 weights that the part of Muon's step outside of products must move at least: p and the momentum
#: read and written, the gradient read, the direction read in bfloat16. And AdamW: p and two moments read and written, g read.
MUON_BYTES, ADAMW_BYTES = 4 * (2 + 2 + 1) + 2, 28

Census = tuple[int, tuple[int, int]]


def parameters(census: Census) -> list[torch.nn.Parameter]:
    """Matrices with gradients, the same at each call."""
    count, shape = census
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(shape, generator=generator)
    return params


def gflop(call: Callable[[], object]) -> float:
    """Operations of a call's products."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def summary(
    times: dict[str, list[float]], targets: list[dict[str, Any]], calls: dict[str, Callable[[], object]]
) -> dict[str, Any]:
    """A result in the form of ``python -m bench cpu``."""
    for target in targets:
        if "ratio" not in target:
            target["ratio"] = timing.ratio(times, target["of"], target["to"])
        target["met"] = target["ratio"] <= target["target"]
    return {
        "ms": {name: statistics.median(values) * 1e3 for name, values in times.items()},
        "ms_quartiles": timing.ms_quartiles(times),
        "rounds": len(next(iter(times.values()))),
        "gflop": {name: gflop(call) for name, call in calls.items()},
        "targets": targets,
    }


def check_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], start: list[torch.Tensor], limit: float) -> None:
    """Refuse to time what does not move as its peer does: the difference, in norms of the way from the start."""
    for a, b, s in zip(ours, theirs, start, strict=True):
        difference = ((a - b).norm() / (b - s).norm()).item()
        if not difference <= limit:
            raise AssertionError(
                f"the weights differ from the peer's by {difference:.1e} of the way, limit {limit:.0e}"
            )


def copies(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


# Muon.


def muon(census: Census, target: float | None, seconds: float, **options: Any) -> dict[str, Any]:
    """Against torch's."""
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError("torch.optim.Muon is of torch 2.9 and later")
    count, (rows, columns) = census
    small = count, (rows // 4, columns // 4)
    ours, theirs = parameters(small), parameters(small)
    start = copies(ours)
    mine = functools.partial(precond.Muon, **options)
    for params, make in ((ours, mine), (theirs, torch.optim.Muon)):
        optimizer = make(params, weight_decay=0.0)
        for _ in range(3):
            optimizer.step()
    check_same(copies(ours), copies(theirs), start, 0.1 if options else 0.03)  # bfloat16 products, in another order
    calls = {
        "torch": torch.optim.Muon(parameters(census), lr=1e-6).step,
        "precond": mine(parameters(census), lr=1e-6).step,
    }
    times = timing.interleaved(calls, seconds, least=5)
    targets = [] if target is None else [{"of": "precond", "to": "torch", "target": target}]
    return summary(times, targets, calls)


def outside_of_products(census: Census, seconds: float) -> dict[str, Any]:
    """A Muon step whose directions are its averages themselves, in time per byte of an AdamW step beside it: its two passes, and
    what Python does. The normalisation of matrices belongs to the products.
    """
    optimizer = precond.Muon(parameters(census), lr=1e-6)

    def step() -> None:
        with mock.patch.object(precond.muon, "orthogonalized", lambda u, group: u):
            optimizer.step()

    calls = {"outside": step, "AdamW": precond.AdamW(parameters(census), lr=1e-6).step}
    times = timing.interleaved(calls, seconds, least=15)
    ratio = timing.ratio(times, "outside", "AdamW") * ADAMW_BYTES / MUON_BYTES
    return summary(times, [{"of": "outside", "to": "AdamW, per byte", "ratio": ratio, "target": 1.3}], {})


def grouped(count: int, size: int, seconds: float) -> dict[str, Any]:
    """One optimizer with two methods against two optimizers, half of the tensors each."""

    def start() -> tuple[list[torch.nn.Parameter], list[dict[str, Any]]]:
        params = parameters((count, (1, size)))
        halves = (params[: count // 2], precond.AdamW), (params[count // 2 :], precond.Lion)
        return params, [dict(params=half, optimizer=cls, lr=1e-6) for half, cls in halves]

    (ours, groups), (theirs, others) = start(), start()
    together = precond.Grouped(groups)
    apart = [group.pop("optimizer")([group]) for group in others]

    def both() -> None:
        for optimizer in apart:
            optimizer.step()

    for _ in range(3):
        together.step()
        both()
    if not all(map(torch.equal, ours, theirs)):
        raise AssertionError("Grouped must take the steps of its optimizers apart, got others")
    calls = {"Grouped": together.step, "apart": both}
    times = timing.interleaved(calls, seconds, least=30)
    return summary(times, [{"of": "Grouped", "to": "apart", "target": 1.02}], {})


# SOAP.


def soap(census: Census, seconds: float) -> dict[str, Any]:
    """Ten steps with a refresh at each against ten with one."""

    def ten_steps(frequency: int) -> Callable[[], None]:
        optimizer = precond.SOAP(parameters(census), lr=1e-6, precondition_frequency=frequency)
        optimizer.step()

        def steps() -> None:
            for _ in range(10):
                optimizer.step()

        return steps

    calls = {"every 10": ten_steps(10), "every step": ten_steps(1)}
    times = timing.interleaved(calls, seconds, least=3)
    return summary(times, [{"of": "every step", "to": "every 10", "target": 1.5}], calls)


# What rides along in the last pass.

RIDING: dict[str, dict[str, Any]] = {"alone": {}, "statistics": {"statistics": True}, "averaged": {"ema_decay": 0.999}}


def riding(cls: type[torch.optim.Optimizer], census: Census, seconds: float) -> dict[str, Any]:
    """A method with statistics of every step, and with an average, against itself. None of them moves a weight otherwise."""
    moved, calls = {}, {}
    for name, options in RIDING.items():
        params = parameters(census)
        make: Any = cls
        optimizer = make(params, lr=1e-3, **options)
        for _ in range(2):
            optimizer.step()
        moved[name], calls[name] = copies(params), optimizer.step
    if not all(all(map(torch.equal, moved["alone"], others)) for others in moved.values()):
        raise AssertionError(f"what rides along must not change a step of {cls.__name__}")
    times = timing.interleaved(calls, seconds, least=5)
    return summary(times, [{"of": "statistics", "to": "alone", "target": 1.05}], {})


# FOP.


class PlainFOP:
    """FOP around AdamW as its formulas are written, for mode "output" and normalize "hypergradient"; the norm's bound squares
    M M^T three times at each step.
    """

    def __init__(self, params: list[torch.nn.Parameter], rho: float) -> None:
        self.params, self.rho = params, rho
        self.base = precond.AdamW(params, lr=1e-6)
        self.M = [torch.eye(len(p)) for p in params]
        self.last = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        """One step on the gradients that are there, which stay."""
        given = [p.grad for p in self.params]
        for p, M, last, G in zip(self.params, self.M, self.last, given, strict=True):
            A = G @ last.T
            rate = self.rho / torch.linalg.vector_norm(G) / torch.linalg.vector_norm(last)
            new = M + rate * ((A + A.T) @ M)
            norm = torch.linalg.vector_norm(new)
            S = new / norm
            S = S @ S.T
            for _ in range(3):
                S = S @ S
            bound = norm * S.abs().sum(1).amax() ** (1 / 16)
            M.copy_(torch.where((bound > 0.0) & (bound <= 10.0), new, M))
            last.copy_(G)
            p.grad = (M @ M.T) @ G
        self.base.step()
        for p, G in zip(self.params, given, strict=True):
            p.grad = G


def fop(census: Census, target: float | None, seconds: float) -> dict[str, Any]:
    """Around AdamW, against the formulas as they are written, and beside AdamW alone."""
    ours, theirs = parameters(census), parameters(census)
    base = precond.AdamW(ours, lr=1e-6)
    optimizer = precond.FOP(base, 1e-3, mode="output", compose="gradient")
    plain = PlainFOP(theirs, 1e-3)
    for _ in range(3):
        optimizer.step()
        plain.step()
    for p, M in zip(ours, plain.M, strict=True):
        torch.testing.assert_close(optimizer.own[p]["preconditioner"], M, rtol=1e-4, atol=1e-5)
        if torch.equal(M, torch.eye(len(M))):
            raise AssertionError("M must have moved")
    calls = {
        "formulas": plain.step,
        "precond": optimizer.step,
        "AdamW alone": precond.AdamW(parameters(census), lr=1e-6).step,
    }
    times = timing.interleaved(calls, seconds, least=7)
    targets = [] if target is None else [{"of": "precond", "to": "formulas", "target": target}]
    return summary(times, targets, calls)


# The command.


def cases(seconds: float, quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What measures each case, by its name."""

    def sized(census: Census) -> Census:
        count, (rows, columns) = census
        return (count, (rows // QUICK, columns // QUICK)) if quick else census

    def named(what: str, census: Census) -> str:
        count, (rows, columns) = census
        return f"{what}: {count} matrices of {rows} x {columns}"

    square, wide, narrow = map(sized, (SQUARE, WIDE, NARROW))
    return {
        named("Muon", square): functools.partial(muon, square, 0.6, seconds),
        named("Muon", wide): functools.partial(muon, wide, 0.5, seconds),
        f"{named('Muon', square)}, gram": functools.partial(muon, square, None, seconds, method="gram"),
        f"{named('Muon', wide)}, gram": functools.partial(muon, wide, None, seconds, method="gram"),
        named("Muon outside of products", square): functools.partial(outside_of_products, square, seconds),
        "Grouped, AdamW and Lion: 1000 tensors of 1000": functools.partial(grouped, 1000, 1000, seconds),
        "Grouped, AdamW and Lion: 2 tensors of 16M": functools.partial(grouped, 2, 1 << (16 if quick else 24), seconds),
        named("SOAP, ten steps, by refreshes", square): functools.partial(soap, square, seconds),
        named("Muon, what rides along", square): functools.partial(riding, precond.Muon, square, seconds),
        named("SOAP, what rides along", square): functools.partial(riding, precond.SOAP, square, seconds),
        named("FOP, output, around AdamW", square): functools.partial(fop, square, 0.3, seconds),
        named("FOP, output, around AdamW", narrow): functools.partial(fop, narrow, None, seconds),
    }


def line(result: dict[str, Any]) -> str:
    """A case in one line, for the log."""
    operations = ", ".join(f"{name} {value:.3g} Gflop" for name, value in result["gflop"].items() if value)
    return f"{cpu.line(result)}; {operations}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="time per case (default 10; quick 0.3)")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()), help="default 2")
    record.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    end = record.end_of(arguments)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", precond.PrecisionWarning)
    seconds = arguments.seconds or (0.3 if arguments.quick else 10.0)
    path = arguments.out / f"matrices{'-quick' if arguments.quick else ''}.json"
    settings = {"seconds": seconds, "quick": arguments.quick}
    results = record.Record(path, timing.environment(), settings, fresh=arguments.fresh)
    measures = cases(seconds, arguments.quick)
    names = record.chosen(measures, arguments.only)
    results.measure({name: measures[name] for name in names}, line, end=end)
    print(f"\n{results.run}\n\n{cpu.table(results.results(measures))}\n")
    print(f"{results.others(measures)}written to {path}")
    if failed := results.failed(names):
        raise SystemExit(f"bench matrices: failed: {'; '.join(failed)}")
