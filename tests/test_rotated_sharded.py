"""SOAP, GaussNewton with a basis and spectral DualDescent on shards: the unsharded bits, bytes, owners, checkpoints."""

from __future__ import annotations

import pytest
from support.cases import BACKEND
from support.ranks import Results
from support.rotated_training import scenario

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="gloo ranks are CPU processes")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return Results("support.rotated_training", tmp_path_factory.mktemp("rotated"))


@pytest.mark.parametrize(("name", "ranks"), scenario.cases)
def test_rotated_methods_on_shards(name, ranks, results):
    results.check(name, ranks)
