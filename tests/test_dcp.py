"""torch.distributed.checkpoint over every optimizer and wrapper: plain, flat, and saved on two ranks for three and for one."""

from __future__ import annotations

import pytest
import torch
from support.cases import BACKEND
from support.dcp_training import STEPS, load, model_of, save, straight, train, weights
from support.methods import ALL, AROUND_STATES
from support.ranks import call_on_ranks

import precond

pytestmark = [
    pytest.mark.skipif(BACKEND != "cpu", reason="gloo ranks are CPU processes"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Ranks have one each, and torch's matrix products have other bits with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def differing(found, expected):
    """The names of weights that differ in a bit. NaN would compare as different."""
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


@pytest.mark.parametrize("form", ["plain", "flat"])
@pytest.mark.parametrize("method", [*ALL, *AROUND_STATES], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(method, form, tmp_path):
    model = model_of(method)
    optimizer = method.make(model)
    train(method, model, optimizer, 0)
    save(model, optimizer, tmp_path, form == "flat")
    model = model_of(method, seed=99)
    optimizer = method.make(model)
    load(model, optimizer, tmp_path, form == "flat")
    train(method, model, optimizer, STEPS)
    assert not differing(weights(model, optimizer), straight(method))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The results of FSDP2 on two ranks, and of the runs that continue it on one and on three."""
    folder = tmp_path_factory.mktemp("dcp")
    for ranks in (2, 1, 3):
        call_on_ranks(ranks, "support.dcp_training", "run", folder)
    return {ranks: torch.load(folder / f"{ranks}.pt") for ranks in (2, 1, 3)}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("method", [method for method in ALL if not method.whole], ids=str)
def test_a_resharded_run_is_the_one_that_was_never_sharded(method, ranks, sharded):
    assert not isinstance(sharded[2][str(method)], str), sharded[2][str(method)]
    assert not isinstance(sharded[ranks][str(method)], str), sharded[ranks][str(method)]
    expected = straight(method)
    for form, found in sharded[ranks][str(method)].items():
        if method.exact:
            assert not differing(found, expected), form
        else:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [precond.Adagrad, precond.AdagradW])
def test_states_of_the_constructor_follow_parameters_that_a_trainer_replaces(cls):
    """As Accelerate's FSDP2 does: DCP takes a state that is not empty for a complete one."""
    p, shard = (torch.nn.Parameter(torch.zeros(n)) for n in (4, 2))
    optimizer = cls([p], initial_accumulator_value=0.5)
    optimizer.param_groups[0]["params"] = [shard]
    (state,) = optimizer.state_dict()["state"].values()
    assert state["sum"].tolist() == [0.5, 0.5]
    assert list(optimizer.state) == [shard]


@pytest.mark.parametrize("method", ALL, ids=str)
def test_trained_parameters_can_be_swapped(method):
    """``model.to`` swaps FSDP2's parameters, and all where it is asked to: those with weak references cannot be."""
    model = model_of(method)
    optimizer = method.make(model)
    train(method, model, optimizer, 0)
    before = weights(model, optimizer)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().to(method.dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert not differing(weights(model, optimizer), before)
    train(method, model, optimizer, STEPS)
