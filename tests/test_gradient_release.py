"""Gradient release: updates inside the backward pass are the step's, whatever the trainer around them does."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from support.cases import BACKEND, bits_equal
from support.methods import ALL
from support.ranks import Results
from support.release_training import SCENARIOS, model_of
from support.released import STEPS, assert_same, backward, batch, clip_of, everything, train
from torch import nn

import precond

pytestmark = pytest.mark.filterwarnings("ignore::precond.PrecisionWarning", "ignore::UserWarning")
#: What must see all gradients at once.
TOGETHER = {"dual_global", "bnp", "fop", "fop_direction", "gradient_regularizer"}
ALONE = [method for method in ALL if method.name not in TOGETHER]


@pytest.mark.parametrize("method", ALONE, ids=str)
def test_updates_are_the_steps_bit_for_bit_and_gradients_are_gone(method):
    """With the learning rate of a scheduler, which is read when a gradient comes."""
    runs = []
    for released in (False, True):
        net = model_of(0, method.dtype)
        optimizer = method.make(net)
        optimizer._own["max_grad_norm"] = None  # which is clipped by in tests of its own
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        if released:
            precond.release_gradients(net, optimizer)
        for step in range(STEPS):
            backward(net, step)
            assert released == all(p.grad is None for p in net.parameters())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        runs.append(everything(net, optimizer))
    assert_same(*runs)


@pytest.mark.parametrize("method", [method for method in ALL if method.name in TOGETHER], ids=str)
def test_what_needs_all_gradients_at_once_raises(method):
    net = model_of(0)
    with pytest.raises((TypeError, RuntimeError), match=r"it goes around an optimizer|one norm is of all gradients"):
        precond.release_gradients(net, method.make(net))


@pytest.mark.skipif(BACKEND != "cpu", reason="memory is measured once, on the CPU")
def test_resident_bytes_per_parameter_without_gradients():
    """Measured as what the process holds: after a step, and at most, where the gradient of one of 48 layers comes to it."""
    code = """
import torch, precond
def held(key):
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
    return 1024 * int(lines[key].split()[0])
def run(layers, width):
    make = lambda: torch.nn.Linear(width, width, bias=False, dtype=torch.bfloat16)
    model = torch.nn.Sequential(*(make() for _ in range(layers)))
    optimizer = precond.AdamW(model.parameters(), weight_format="split24", state_format="int8")
    precond.release_gradients(model, optimizer)
    for _ in range(3):
        # No matrix products: without bf16 instructions oneDNN adds up a layer's gradient in fp32 beside it.
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
    return model, optimizer
torch.set_num_threads(1)
run(2, 1024)
open("/proc/self/clear_refs", "w").write("5")  # the largest so far is what is held now
before = held("VmRSS")
kept = run(48, 1024)
elements = 48 * 1024 * 1024
print((held("VmRSS") - before) / elements, (held("VmHWM") - before) / elements)
"""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    resident, most = map(float, run.stdout.split())
    assert 4.9 < resident <= 5.13
    assert most <= resident + 1.5 * 2 / 48


# Several backward passes for a step.


def test_gradients_are_accumulated_and_released_in_the_last_pass():
    runs = []
    for released in (False, True):
        net = model_of(0)
        optimizer = precond.AdamW(net.parameters(), lr=0.01)
        if released:
            precond.release_gradients(net, optimizer, accumulation_steps=3)
        for step in range(STEPS):
            for each in range(3):
                backward(net, 3 * step + each)
                assert all((p.grad is None) == (released and each == 2) for p in net.parameters())
            optimizer.step()
            optimizer.zero_grad()
        runs.append(everything(net, optimizer))
    assert_same(*runs)


class Branches(nn.Module):
    """Of two layers a pass takes one or both, before what all passes take."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, which):
        return self.last(sum(layer(x) for layer, chosen in ((self.one, 1 & which), (self.two, 2 & which)) if chosen))


@pytest.mark.parametrize("passes", [(1, 3, 2), (2, 2, 1), (1, 1, 1), (3, 2)], ids=str)
def test_a_parameter_that_misses_a_pass_and_a_short_last_step_lose_nothing(passes):
    runs = []
    for released in (False, True):
        torch.manual_seed(0)
        net = Branches()
        optimizer = precond.AdamW(net.parameters(), lr=0.01)
        if released:
            precond.release_gradients(net, optimizer, accumulation_steps=3)
        for step in range(STEPS):
            for each, which in enumerate(passes):
                net(batch(3 * step + each), which).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(everything(net, optimizer))
    assert_same(*runs)


def test_a_second_gradient_before_the_step_raises_and_names_the_parameter():
    net = model_of(0)
    optimizer = precond.AdamW([(name, p) for name, p in net.named_parameters()], lr=0.01)
    precond.release_gradients(net, optimizer)
    backward(net, 0)
    with pytest.raises(RuntimeError, match=r"must be called after each 1 backward passes, got another .*\('4\.bias'\)"):
        backward(net, 1)
    # The gradient that was refused is not there for the step; what a failed pass has left is dropped.
    assert net[4].bias.grad is None
    optimizer.zero_grad()
    optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}
    train(net, optimizer, range(1, 2))
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


@pytest.mark.parametrize("released", [False, True])
def test_a_checkpoint_that_is_loaded_between_two_passes_counts(released):
    """Its learning rate is what the step is taken with."""
    net = model_of(0)
    optimizer = precond.SGD(net.parameters(), lr=10.0)
    saved = precond.SGD(net.parameters(), lr=0.25).state_dict()
    if released:
        precond.release_gradients(net, optimizer, accumulation_steps=2)
    before = net[4].bias.detach().clone()
    backward(net, 0)
    optimizer.load_state_dict(saved)
    backward(net, 0)
    optimizer.step()
    optimizer.zero_grad()
    moved = before - net[4].bias.detach()
    twin = model_of(0)
    backward(twin, 0)
    torch.testing.assert_close(moved, 0.25 * 2 * twin[4].bias.grad)


# What else a step does.


@pytest.mark.parametrize("name", ["adamw", "muon", "grouped_muon"])
def test_statistics_are_the_steps(name):
    (method,) = [method for method in ALL if method.name == name]
    tables = []
    for released in (False, True):
        net = model_of(0)
        optimizer = method.make(net)
        optimizer._own["statistics"] = 2
        if released:
            precond.release_gradients(net, optimizer)
        train(net, optimizer)
        tables.append(optimizer.statistics)
    assert bits_equal(tables[0].values, tables[1].values)
    assert tables[0].params == tables[1].params


def test_random_bits_are_named_by_places_among_all_parameters():
    """A second optimizer of the same kind, which never releases, resumes from the first one's checkpoint."""
    runs = []
    for first, second in ((False, False), (True, True), (True, False), (False, True)):
        net = model_of(0, torch.bfloat16)
        saved = None
        for stage, released in enumerate((first, second)):
            optimizer = precond.Adam(net.parameters(), lr=0.01, weight_format="stochastic", state_format="bf16")
            if saved is not None:
                optimizer.load_state_dict(saved)
            release = precond.release_gradients(net, optimizer) if released else None
            train(net, optimizer, range(2 * stage, 2 * stage + 2))
            saved = optimizer.state_dict()
            if release is not None:
                release.remove()
        runs.append(everything(net, optimizer))
    for run in runs[1:]:
        assert_same(runs[0], run)


def test_after_remove_the_step_updates_again():
    net = model_of(0)
    optimizer = precond.AdamW(net.parameters(), lr=0.01)
    release = precond.release_gradients(net, optimizer)
    with pytest.raises(RuntimeError, match="must not release gradients already"):
        precond.release_gradients(net, optimizer)
    train(net, optimizer, range(2))
    release.remove()
    release.remove()
    backward(net, 2)
    assert all(p.grad is not None for p in net.parameters())
    optimizer.step()
    optimizer.zero_grad()
    precond.release_gradients(net, optimizer)
    train(net, optimizer, range(3, 4))
    whole = model_of(0)
    twin = precond.AdamW(whole.parameters(), lr=0.01)
    train(whole, twin)
    assert_same(everything(net, optimizer), everything(whole, twin))


def test_parameters_that_come_and_go_are_updated_by_the_step():
    """A group that is added later and a parameter that was frozen have no hook: their gradients stay until the step."""
    runs = []
    for released in (False, True):
        net = model_of(0)
        net[2].weight.requires_grad_(False)
        optimizer = precond.AdamW(net[:3].parameters(), lr=0.01)
        if released:
            precond.release_gradients(net, optimizer)
        train(net, optimizer, range(2))
        net[2].weight.requires_grad_(True)
        optimizer.add_param_group({"params": [*net[4].parameters()], "lr": 0.02})
        train(net, optimizer, range(2, 4))
        runs.append(everything(net, optimizer))
    assert_same(*runs)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_is_an_error_that_says_so(fused):
    net = model_of(0)
    optimizer = precond.AdamW(net.parameters(), fused=fused or None)
    release = precond.release_gradients(net, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scaler.scale(net(batch(0)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"gradients must not be scaled where they are released: GradScaler"):
        scaler.step(optimizer)
    train(net, optimizer)  # without a scaler
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.scale(net(batch(0)).sum()).backward()
    off.step(optimizer)
    release.remove()
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == fused


def test_what_is_asked_for_is_checked():
    net = model_of(0)

    def made(**options):
        return precond.AdamW(net.parameters(), **options)

    for options, error, message in (
        (dict(accumulation_steps=0), ValueError, "accumulation_steps must be an integer >= 1, got 0"),
        (dict(clip="global"), ValueError, "clip must be None, 'previous' or 'measure', got 'global'"),
        (
            dict(clip="previous"),
            ValueError,
            "clip must be 'previous' or 'measure' with max_grad_norm, and None without",
        ),
        (
            dict(accumulation_steps=2, clip="measure"),
            ValueError,
            "accumulation_steps must be 1 with clip='measure', got 2",
        ),
        (dict(comm_hook=(None, print)), ValueError, "comm_hook must be None without DistributedDataParallel"),
    ):
        with pytest.raises(error, match=message):
            precond.release_gradients(net, made(), **options)
    with pytest.raises(ValueError, match=r"got None and 1\.0"):
        precond.release_gradients(net, made(max_grad_norm=1.0))
    with pytest.raises(ValueError, match="nonfinite must be 'propagate' with clip='previous', got 'skip'"):
        precond.release_gradients(net, made(max_grad_norm=1.0, nonfinite="skip"), clip="previous")
    with pytest.raises(ValueError, match="parameters of the model alone, got parameter 2 of group 0"):
        precond.release_gradients(net[0], made())
    with pytest.raises(TypeError, match=r"must be a method of precond, got torch\.optim\.adamw\.AdamW"):
        precond.release_gradients(net, torch.optim.AdamW(net.parameters()))
    release = precond.release_gradients(net, optimizer := made(max_grad_norm=1.0), clip="measure")
    with pytest.raises(RuntimeError, match=r"a backward pass within measure\(\) must come before each step's"):
        backward(net, 0)
    optimizer.zero_grad()
    backward_was_measured = release.measure()
    with backward_was_measured:
        backward(net, 0)
    backward(net, 0)
    with (
        pytest.raises(RuntimeError, match=r"measure\(\) must come before the step's first gradient"),
        release.measure(),
    ):
        pass


def test_what_cannot_be_released_is_refused():
    net = model_of(0)
    optimizer = precond.AdamW(net.parameters())
    release = precond.release_gradients(net, optimizer)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 must not be released by another optimizer too"):
        precond.release_gradients(net, precond.AdamW(net.parameters()))
    release.remove()
    precond.release_gradients(net, precond.AdamW(net.parameters())).remove()

    class FullyShardedDataParallel(nn.Sequential):
        pass

    with pytest.raises(RuntimeError, match="FSDP1's flat parameters cannot be released"):
        precond.release_gradients(FullyShardedDataParallel(net), optimizer)
    with pytest.raises(RuntimeError, match="differentiable must be False"):
        precond.release_gradients(net, precond.SGD([{"params": [*net.parameters()], "differentiable": True}], lr=0.1))


def test_a_trainers_wrapper_is_looked_through():
    class Wrapper(torch.optim.Optimizer):  # as Lightning's, whose classes are ours too
        def __init__(self, optimizer):
            self.optimizer = optimizer

    net = model_of(0)
    optimizer = precond.AdamW(net.parameters())
    precond.release_gradients(net, Wrapper(Wrapper(optimizer)))
    train(net, optimizer)
    assert optimizer.state[net[0].weight]["step"] == STEPS


def test_no_update_is_made_while_an_average_is_shown():
    net = model_of(0)
    optimizer = precond.AdamW(net.parameters(), lr=0.01, ema_decay=0.5)
    precond.release_gradients(net, optimizer)
    train(net, optimizer)
    before = {name: t.clone() for name, t in everything(net, optimizer).items()}
    with optimizer.averaged(), pytest.raises(RuntimeError, match=r"step\(\) must not be called"):
        backward(net, 0)
    optimizer.zero_grad()
    assert_same(before, everything(net, optimizer))


@pytest.mark.parametrize("options", [{"statistics": True}, {"max_grad_norm": 0.05}], ids=str)
def test_a_group_may_come_in_the_middle_of_a_step(options):
    net = model_of(0)
    optimizer = precond.AdamW(net[:3].parameters(), lr=0.01, **options)
    precond.release_gradients(net, optimizer, clip=clip_of(optimizer))
    for step in range(STEPS):
        backward(net, step)
        if step == 1:
            optimizer.add_param_group({"params": [*net[4].parameters()]})
        optimizer.step()
        optimizer.zero_grad()
    assert [int(optimizer.state[p]["step"]) for p in net.parameters()] == [STEPS] * 4 + [STEPS - 1] * 2
    assert optimizer.statistics is None or len(optimizer.statistics.params) == 6


def test_a_release_ends_with_its_optimizer():
    """As soon as nobody has the optimizer, without the garbage collector; copies are ended."""
    net = model_of(0)
    optimizer = precond.AdamW(net.parameters())
    release = precond.release_gradients(net, optimizer)
    assert copy.deepcopy(optimizer)._releases is None
    copied = pickle.loads(pickle.dumps(release))
    copied.remove()
    train(net, optimizer)
    del optimizer
    backward(net, 0)
    assert all(p.grad is not None for p in net.parameters())
    release.remove()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return Results("support.release_training", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "number"), SCENARIOS.cases)
def test_on_ranks(ranks, name, number):
    ranks.check(name, number)
