"""State dicts: lossless for ourselves, interchangeable with torch.optim in mid-training, both ways."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from families import OPTIMIZERS, WITH_PEER
from support.cases import bits_equal
from support.training import assert_close, model, train

import precond

rows = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
peers = pytest.mark.parametrize("row", WITH_PEER, ids=str)


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
        assert b.state[p][key].dtype == torch.float32
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
