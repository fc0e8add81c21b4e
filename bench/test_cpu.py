"""The CPU steps as pytest-benchmark entries: ``pytest bench --benchmark-enable``."""

from __future__ import annotations

import pytest
import torch
from families import CLASSES
from support.cases import random_values
from support.parity import worst_error

from bench import matrices, methods

SIZES = {"1M": [1 << 20], "200 x 500": [500] * 200}


@pytest.mark.parametrize("census", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("row", CLASSES, ids=str)
def test_step(benchmark, row, dtype, census):
    worst_error(row, [(70_001,)], dtype, dtype, None)  # not timed if it is wrong
    params = [torch.nn.Parameter(random_values((n,), dtype)) for n in SIZES[census]]
    for p in params:
        p.grad = random_values(p.shape, dtype)
    optimizer = row.cls(params, **row.kwargs, backend="cpu")
    benchmark.pedantic(optimizer.step, rounds=15, iterations=1, warmup_rounds=3)
    assert all(torch.isfinite(p).all() for p in params)


def test_what_measures_each_method_runs(monkeypatch):
    monkeypatch.setattr(methods, "QUICK_SIDE", 16)
    for name, measure in methods.cases(seconds=0.01, quick=True).items():
        assert all(ms > 0 for ms in measure()["ms"].values()), name


def test_what_measures_matrix_methods_runs(monkeypatch):
    monkeypatch.setattr(matrices, "QUICK", 16)
    for name, measure in matrices.cases(seconds=0.01, quick=True).items():
        result = measure()
        assert all(ms > 0 for ms in result["ms"].values()), name
        assert all(flop > 0 for of, flop in result["gflop"].items() if "AdamW" not in of), name
        assert matrices.line(result)
