"""Sharded by other libraries on two ranks: DeepSpeed's ZeRO, torchtitan's optimizers and Accelerate's FSDP2."""

from __future__ import annotations

import pytest
import torch
from families import CLASSES
from integrations.two_ranks import IMPLEMENTATIONS, SHARDABLE, ZERO, model_of
from support.ranks import call_on_ranks


@pytest.fixture(scope="module")
def run(library, tmp_path_factory):
    """What a library's ranks found, once for all tests."""
    found = {}

    def results(name, key):
        library(name)
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            call_on_ranks(2, "integrations.two_ranks", f"run_{name}", folder)
            found[name] = torch.load(folder / "results.pt")
        return found[name][key]

    return results


def check(result):
    assert "error" not in result, result["error"]
    assert all(value.isfinite().all() for value in result["ours"])
    if result["theirs"] is not None:
        torch.testing.assert_close(result["ours"], result["theirs"], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(result["ours"], result["resumed"], strict=True))
    assert not torch.equal(result["ours"][0], model_of(0)[0].weight)


@pytest.mark.parametrize(("method", "stage"), ZERO, ids=str)
def test_zero_trains_and_resumes(run, method, stage):
    check(run("deepspeed", f"{method}-{stage}"))


@pytest.mark.parametrize("row", CLASSES, ids=str)
def test_torchtitan_trains_and_resumes(run, row):
    check(run("torchtitan", f"{row}-for-loop"))


def test_torchtitan_trains_several_methods_in_one_optimizer(run):
    check(run("torchtitan", "grouped"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_torchtitan_chooses_an_implementation(run, implementation):
    result = run("torchtitan", f"adamw-{implementation}")
    check(result)
    dtype = torch.bfloat16 if implementation == "fused_opt_states_bf16" else torch.float32
    # Four parameters; the means of the first one come next.
    assert [t.dtype for t in result["ours"][4:6]] == [dtype, dtype]


@pytest.mark.parametrize("method", SHARDABLE, ids=str)
def test_fsdp2_of_accelerate_trains_and_resumes(run, method):
    check(run("accelerate", str(method)))
