"""Every optimizer and wrapper as torch's libraries use it, on gloo ranks: it trains as in one process, or says why not."""

from __future__ import annotations

import pytest
from support.cases import BACKEND
from support.ranks import Results
from support.uses import scenario

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="gloo ranks are CPU processes")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return Results("support.uses", tmp_path_factory.mktemp("uses"))


@pytest.mark.parametrize(("name", "ranks"), scenario.cases)
def test_ranks_train_as_one_process_does(name, ranks, results):
    results.check(name, ranks)
