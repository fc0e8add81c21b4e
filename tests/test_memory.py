"""Bytes of a rank by formula (bench/memory.py) against those of real optimizers, and the tables of docs/scaling.md."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch.distributed as dist
from support.builds import ROOT
from support.cases import BACKEND
from support.memory_counts import scenario
from support.ranks import Results
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench import memory, models, plans
from bench.models import Weight

pytestmark = [
    pytest.mark.source,
    pytest.mark.skipif(BACKEND != "cpu", reason="gloo ranks are CPU processes"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return Results("support.memory_counts", tmp_path_factory.mktemp("memory"))


@pytest.mark.parametrize(("name", "ranks"), scenario.cases)
def test_formulas_give_the_bytes_of_real_optimizers(name, ranks, results):
    results.check(name, ranks)


# The owners of 69,608 matrices take half a minute.
@pytest.mark.parametrize("model", ["llama-7b", "llama-70b", pytest.param("kimi-k2", marks=pytest.mark.large)])
def test_the_page_has_the_tables_of_the_formulas(model):
    command = [sys.executable, "-m", "bench", "scaling", "--memory", "--model", model]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tables = printed.split("\n\n")
    assert len(tables) == (1 if model == "kimi-k2" else 2)
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in tables:
        assert table.count("\n") >= 8
        assert table.strip() in page


def test_what_measures_plans_finds_the_shapes_of_a_rank():
    weights = [Weight("a", (130, 64), "matrix"), Weight("b", (5,), "rest"), Weight("thin", (1, 64), "matrix")]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        for kind in (memory.KINDS["AdamW, fp32"], memory.KINDS["AdamW, bf16 split24 + int8"]):
            for wrapped in (False, True):
                found = plans.compiled(weights, models.fsdp(4), kind, 2, wrapped=wrapped)
                assert found["tensors"] == 3
                assert all(ms > 0 for ms in found["ms"].values())
                # Addresses begin at multiples of 64 bytes.
                expected = sum(memory.of_ranks(weights, models.fsdp(4), kind)[0]) - 3 * memory.STEP
                assert expected <= found["reserved_bytes"] < expected + 64 * 7 * len(weights)
        found = plans.owners(weights, models.fsdp(4), 2)
        assert (found["tensors"], found["matrices"]) == (2, 2)
    finally:
        dist.destroy_process_group()
