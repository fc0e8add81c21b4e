"""State dicts: lossless for ourselves, interchangeable with torch.optim in mid-training, both ways."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from families import CLASSES, DROP_INS, OPTIMIZERS, WITH_PEER
from support.cases import bits_equal
from support.training import assert_close, model, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import precond

rows = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
peers = pytest.mark.parametrize("row", WITH_PEER, ids=str)
#: Class, arguments and torch's class, those of the methods of several passes too.
EVERY_CLASS = [
    *((row.cls, row.kwargs, row.peer) for row in CLASSES),
    (precond.Muon, {}, torch.optim.Muon),
    *((cls, {}, None) for cls in (precond.SOAP, precond.DualDescent, precond.Sophia)),
    (precond.GaussNewton, {"clip": 0.05}, None),
]
every_class = pytest.mark.parametrize(("cls", "kwargs", "peer"), EVERY_CLASS, ids=lambda x: getattr(x, "__name__", ""))


@peers
@pytest.mark.parametrize("direction", ["torch to precond", "precond to torch"])
def test_training_goes_on_in_the_other_library(row, direction):
    first, second = (row.peer, row.cls) if direction == "torch to precond" else (row.cls, row.peer)
    net, straight = model(), model()
    a = first(net.parameters(), **row.kwargs)
    train(net, a, 4)
    b = second(net.parameters(), lr=123.0, **{k: v for k, v in row.kwargs.items() if k != "lr"})
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    train(net, b, 4, start=4)
    train(straight, row.peer(straight.parameters(), **row.kwargs), 8)
    assert_close(net, straight)


@rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_format", [None, "fp32", "bf16"])
def test_a_resumed_run_has_the_same_bits(row, dtype, state_format):
    def start():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (3, 400)]
        return params, row.cls(params, **row.kwargs, state_format=state_format)

    def steps(params, optimizer, begin, end):
        for i in range(begin, end):
            torch.manual_seed(i)
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step()

    straight, optimizer = start()
    steps(straight, optimizer, 0, 6)

    params, optimizer = start()
    steps(params, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), params), file)
    file.seek(0)
    saved, loaded = torch.load(file, weights_only=False)
    resumed = row.cls(loaded, **row.kwargs, state_format=state_format)
    resumed.load_state_dict(saved)
    steps(loaded, resumed, 3, 6)
    assert all(bits_equal(p, q) for p, q in zip(straight, loaded, strict=True))


@rows
def test_states_keep_their_dtype_and_their_own_memory(row):
    """torch casts states to the parameter's dtype and aliases the loaded tensors (pytorch#146542)."""
    p = torch.nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
    a = row.cls([p], **row.kwargs, state_format="fp32")
    p.grad = torch.randn_like(p)
    a.step()
    saved = a.state_dict()
    b = row.cls([p], **row.kwargs)
    b.load_state_dict(saved)
    for key, value in a.state.get(p, {}).items():
        assert b.state[p][key].dtype == value.dtype == (torch.float64 if key == "weight_sum" else torch.float32)
        assert torch.equal(b.state[p][key], value)
        assert b.state[p][key].data_ptr() != value.data_ptr()


def test_a_plain_checkpoint_loads_with_weights_only():
    net = model()
    optimizer = precond.AdamW(net.parameters())
    train(net, optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["param_groups"] == torch.optim.AdamW(model().parameters()).state_dict()["param_groups"]


def test_old_checkpoints_with_python_steps_load():
    net = model()
    optimizer = precond.AdamW(net.parameters())
    train(net, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    for group in saved["param_groups"]:
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "amsgrad"):
            del group[key]
    again = copy.deepcopy(net)
    resumed = precond.AdamW(again.parameters())
    resumed.load_state_dict(saved)
    train(net, optimizer, 2, start=2)
    train(again, resumed, 2, start=2)
    assert all(bits_equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))


def test_prefilled_moments_of_another_dtype_are_used():
    """As torchtitan's hook does: bf16 moments put into an empty state before the first step."""
    p = torch.nn.Parameter(torch.randn(64))
    optimizer = precond.AdamW([p])
    optimizer.state[p] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros(64, dtype=torch.bfloat16),
        "exp_avg_sq": torch.zeros(64, dtype=torch.bfloat16),
    }
    p.grad = torch.randn(64)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[p]["exp_avg"].any()
    assert optimizer.state[p]["step"].item() == 1.0


def matrices(seed=0):
    """A network of matrices alone, which Muon takes too."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7, bias=False), torch.nn.ReLU(), torch.nn.Linear(7, 3, bias=False))


def unpickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def loaded(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def set_again(optimizer):
    """A copy by hand, as some wrappers make it."""
    other = type(optimizer).__new__(type(optimizer))
    other.__setstate__(optimizer.__getstate__())
    return other


@every_class
@pytest.mark.parametrize(
    "ways", [[copy.deepcopy], [unpickled], [loaded], [set_again], [copy.deepcopy, unpickled, loaded]]
)
def test_groups_have_the_same_keys_after_a_copy_or_a_load(cls, kwargs, peer, ways):
    """A drop-in's are those of torch's class, but for options that torch does not have and that are not at their default."""
    net = matrices()
    first, second = ([p] for p in net.parameters())
    kwargs = {name: value for name, value in kwargs.items() if name not in cls._group_options}
    groups = [{"params": first}, {"params": second, "lr": 0.3}]
    optimizer = cls([dict(group) for group in groups], **kwargs)
    expected = set(optimizer.param_groups[0])
    if peer is not None:
        assert expected == set(peer(groups, **kwargs).param_groups[0])
        assert optimizer.defaults.keys() == peer(groups, **kwargs).defaults.keys()
    for way in ways:
        optimizer = way(optimizer)
        assert [set(group) for group in optimizer.param_groups] == [expected, expected]
        assert list(optimizer.state_dict()["param_groups"][0].keys() ^ expected) == []
    # An option of ours is there where it is not at its default, and only there.
    own = [dict(group, weight_format=form) for group, form in zip(groups, (None, "split32"), strict=True)]
    optimizer = cls(own, **kwargs)
    for way in ways:
        optimizer = way(optimizer)
        assert [set(group) for group in optimizer.param_groups] == [expected, expected | {"weight_format"}]


DIRECTIONS = [
    pytest.param(kwargs, first, second, id=f"{first.__module__}.{first.__name__} to {second.__module__}")
    for cls, kwargs, peer in EVERY_CLASS
    for first, second in [(cls, cls), *([] if peer is None else [(cls, peer), (peer, cls)])]
]


@pytest.mark.parametrize(("kwargs", "first", "second"), DIRECTIONS)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_distributed_checkpoints_go_both_ways(kwargs, first, second, flat, copied):
    """torch.distributed.checkpoint looks up each group key of the optimizer that loads: one more is a KeyError."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def start(cls):
        net = matrices()
        pair = net, cls(net.parameters(), **kwargs)
        return copy.deepcopy(pair) if copied else pair

    straight = start(first)
    train(*straight, 6)
    net, optimizer = start(first)
    train(net, optimizer, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    other, resumed = start(second)
    other.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    train(other, resumed, 3, start=3)
    # Muon's products of bfloat16 differ from torch's in the order of their sums.
    rtol, atol = (0.0, 2e-3) if first.__name__ == "Muon" else (1e-5, 1e-6)
    for p, q in zip(other.parameters(), straight[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


@pytest.mark.parametrize("row", DROP_INS, ids=lambda row: row.cls.__name__)
def test_options_that_older_checkpoints_lack_have_torchs_values(row):
    ours, theirs = model(), model()
    a, b = row.cls(ours.parameters(), **row.kwargs), row.peer(theirs.parameters(), **row.kwargs)
    train(theirs, b, 2)
    train(ours, a, 2)
    for name in ("foreach", "fused", "maximize", "differentiable", "capturable", "amsgrad", "nesterov", "centered"):
        saved = copy.deepcopy(b.state_dict())
        for group in saved["param_groups"]:
            group.pop(name, None)
        a.load_state_dict(saved)
        b.load_state_dict(saved)
        assert {k: v for k, v in a.param_groups[0].items() if k != "params"} == {
            k: v for k, v in b.param_groups[0].items() if k != "params"
        }
