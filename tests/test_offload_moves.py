"""States in the host's memory that move there and back, and parameters that others write meanwhile: the bits of the device.

On a GPU (``.ci/gpu``), and on every push on the emulated device, by test_cuda_on_host.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support.offloaded import CUDA, FORMATS, assert_same, give, parameters, train

import precond

if CUDA is None:
    pytest.skip("needs a CUDA device: run by tests/test_cuda_on_host.py and .ci/gpu", allow_module_level=True)
pytestmark = [pytest.mark.filterwarnings("ignore::precond.PrecisionWarning"), pytest.mark.usefixtures("small_pieces")]


@pytest.mark.parametrize("weight_format", ["split24", "stochastic"])
def test_a_parameter_that_others_write(weight_format):
    """A clamp after each step, which leaves most elements alone: their remainders stay."""
    runs = []
    for offload, moves in ((None, {}), ("cpu", {}), ("cpu", {1: "cuda", 3: "cpu"})):
        params = parameters(torch.bfloat16)
        optimizer = precond.AdamW(params, lr=1e-3, weight_format=weight_format, offload=offload)
        for step in range(6):
            if step in moves:
                optimizer.move(params[3], moves[step])
            give(params, step)
            optimizer.step()
            with torch.no_grad():
                params[3].clamp_(-0.5, 0.5)
            if step == 3:
                optimizer = copy.deepcopy(optimizer)
                params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.state_dict()
        runs.append((params, optimizer))
    for run in runs[1:]:
        assert_same(runs[0], run)


def test_a_write_that_no_counter_shows_is_read_by_move():
    runs = []
    for offload in (None, "cpu"):
        params = parameters()
        optimizer = precond.AdamW(params, offload=offload)
        for step in range(3):
            give(params, step)
            optimizer.step()
            optimizer.wait()
            params[3].data.clamp_(-0.5, 0.5)
            if offload is not None:
                optimizer.move(params[3], "cpu")
        runs.append((params, optimizer))
    assert_same(*runs)


def test_writes_of_split_weights_are_seen_wherever_states_go():
    """Right after a move, in either direction, and after one in a copy that changes nothing."""
    runs = []
    for moves in ({}, {1: "cpu"}, {0: "cpu", 2: "cuda"}, {1: "cpu", 2: "cuda", 4: "cpu"}, {3: "cuda", 4: "cuda"}):
        params = parameters(torch.bfloat16, [(40, 32), (64,)])
        optimizer = precond.AdamW(params, lr=1e-3, **FORMATS)
        optimizer.move(params[1], "cpu")
        for step in range(6):
            if step == 3:
                params, optimizer = copy.deepcopy((params, optimizer))
            if step in moves:
                optimizer.move(params[0], moves[step])
            if step:
                with torch.no_grad():
                    params[0][::2].mul_(1.25)
            give(params, step)
            optimizer.step()
        optimizer.wait()
        runs.append((params, optimizer))
    for run in runs[1:]:
        assert_same(runs[0], run)


@pytest.mark.parametrize("first", ["both", "late", "resumed"])
@pytest.mark.parametrize(
    "options", [{"weight_format": "split24"}, {"weight_format": "stochastic"}, {"state_format": "bf16"}]
)
@pytest.mark.parametrize("moved", [0, 1])
def test_random_bits_are_named_by_places_among_all(options, moved, first):
    """Where states are moved before they exist, and where one parameter has them and another has not."""
    runs = []
    for moves in (False, True):
        params = parameters(torch.bfloat16, [(40, 3), (50,)])
        optimizer = precond.AdamW(params[:1] if first == "late" else params, **options)
        if first != "both":
            give(params[:1], 9)
            optimizer.step()
        if first == "late":
            optimizer.add_param_group({"params": params[1:]})
        if first == "resumed":
            saved = optimizer.state_dict()
            optimizer = precond.AdamW(params, **options)
            optimizer.load_state_dict(saved)
        if moves:
            optimizer.move(params[moved], "cpu")
        runs.append(train(lambda _, made=optimizer: made, params=params))
    assert_same(*runs)
