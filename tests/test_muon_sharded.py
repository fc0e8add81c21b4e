"""Muon on shards: the unsharded run bit for bit, the bytes that it sends, and what would make ranks wait for each other."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.builds import ROOT
from support.cases import BACKEND
from support.muon_training import scenario
from support.ranks import Results, call_on_ranks

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="gloo ranks are CPU processes")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return Results("support.muon_training", tmp_path_factory.mktemp("muon"))


@pytest.mark.parametrize(("name", "ranks"), scenario.cases)
def test_muon_on_shards(name, ranks, results):
    results.check(name, ranks)


@pytest.mark.source
@pytest.mark.parametrize("ranks", [3, 4])
def test_a_step_on_paper_sends_what_a_step_sends(ranks, tmp_path):
    call_on_ranks(ranks, "support.muon_training", "simulated", tmp_path)


@pytest.mark.source
def test_the_page_has_the_figures_of_the_plan():
    command = [sys.executable, "-m", "bench", "scaling"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert table.count("\n") > 10
    assert table in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
