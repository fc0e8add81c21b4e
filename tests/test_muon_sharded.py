"""Muon on shards: the unsharded run bit for bit, the bytes that it sends, and what would make ranks wait for each other."""

from __future__ import annotations

import pytest
import torch
from support.cases import BACKEND
from support.muon_training import SCENARIOS
from support.ranks import call_on_ranks

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="gloo ranks are CPU processes")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank says of each scenario, by the number of ranks; all of one number share their processes."""
    folder, results = tmp_path_factory.mktemp("muon"), {}

    def of(ranks):
        if ranks not in results:
            call_on_ranks(ranks, "support.muon_training", "run", folder)
            results[ranks] = [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)]
        return results[ranks]

    return of


@pytest.mark.parametrize(
    ("name", "ranks"), [(name, number) for name, (ranks, _) in SCENARIOS.items() for number in ranks]
)
def test_muon_on_shards(name, ranks, found):
    for rank, result in enumerate(found(ranks)):
        assert not result[name], f"rank {rank}: {result[name]}"
