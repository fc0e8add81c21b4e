"""States in the host's memory: the bits of the device backend, whatever else touches states.

On a GPU (``.ci/gpu``), and on every push on the emulated device, by test_cuda_on_host.py.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import OPTIMIZERS
from support.cases import LAYOUTS, bits_equal, gradient, guarded, random_values
from support.offloaded import CUDA, FORMATS, STEPS, assert_same, give, on_host, parameters, train
from support.released import backward
from torch import nn

import precond
from precond import _C

if CUDA is None:
    pytest.skip("needs a CUDA device: run by tests/test_cuda_on_host.py and .ci/gpu", allow_module_level=True)
pytestmark = [pytest.mark.filterwarnings("ignore::precond.PrecisionWarning"), pytest.mark.usefixtures("small_pieces")]
rows = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
#: How each parameter's states move in a run, by the step before which they do.
MOVES = {1: "cuda", 2: "cpu", 3: "cuda"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@rows
def test_the_bits_are_those_of_the_device_wherever_states_move(row, dtype):
    def make(**options):
        return lambda params: row.cls(params, **row.kwargs, **options)

    formats = FORMATS if dtype == torch.bfloat16 and "state_format" not in row.kwargs else {}
    device_alone = train(make(**formats), dtype)
    hosts = train(make(**formats, offload="cpu"), dtype)
    assert_same(device_alone, hosts)
    assert_same(device_alone, train(make(**formats, offload="cpu"), dtype, moves=MOVES))
    assert_same(device_alone, train(make(**formats), dtype, moves={2: "cpu"}))


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_may_have_another_dtype(gradients):
    runs = [
        train(
            lambda params, offload=offload: precond.AdamW(params, offload=offload), torch.bfloat16, gradients=gradients
        )
        for offload in (None, "cpu")
    ]
    assert_same(*runs)


@pytest.mark.parametrize("options", [{}, FORMATS], ids=["plain", "formats"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, options):
    runs = []
    for offload in (None, "cpu"):
        torch.manual_seed(0)
        values = random_values((3, 8, 5, 16), torch.bfloat16)
        # Memory of one's own: the sentinels around it are the host's.
        held = guarded(values, layout)
        p = nn.Parameter(held.tensor.to(CUDA.name) if not CUDA.emulated else held.tensor)
        optimizer = precond.AdamW([p], **options, offload=offload)
        for step in range(3):
            torch.manual_seed(step)
            p.grad = gradient(random_values(p.shape, torch.bfloat16), "transposed" if step == 1 else "same", p).to(
                CUDA.name
            )
            optimizer.step()
        optimizer.wait()
        held.check()
        runs.append(([p], optimizer))
    assert_same(*runs)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_by_a_norm(norm_type, nonfinite):
    """Measured on the device; nobody waits for it there."""
    settings = dict(max_grad_norm=0.5, norm_type=norm_type, nonfinite=nonfinite, fused=True)
    runs = []
    for offload in (None, "cpu"):
        params = parameters(torch.bfloat16)
        optimizer = precond.AdamW(params, **settings, **FORMATS, offload=offload)
        norms = []
        for step in range(4):
            give(params, step)
            if step == 2:
                params[4].grad[7] = float("nan")
            optimizer.step()
            norms += [optimizer.grad_norm.item(), optimizer.clip_coef.item()]
        assert optimizer.skipped_steps.item() == (nonfinite == "skip")
        optimizer.wait()
        runs.append((params, optimizer, norms))
    assert_same(*(run[:2] for run in runs))
    assert repr(runs[0][2]) == repr(runs[1][2])
    steps = 3 if nonfinite == "skip" else 4
    assert runs[1][1].state[runs[1][0][3]]["step"].item() == steps


def test_a_loss_scaler_on_the_device_skips():
    runs = []
    for offload in (None, "cpu"):
        params = parameters(torch.float16)
        optimizer = precond.AdamW(params, fused=True, offload=offload)
        for step in range(3):
            give(params, step)
            optimizer.grad_scale = torch.tensor(64.0, device=CUDA.name)
            optimizer.found_inf = torch.tensor(float(step == 1), device=CUDA.name)
            optimizer.step()
        optimizer.wait()
        assert optimizer.skipped_steps.item() == 1
        runs.append((params, optimizer))
    assert_same(*runs)


@pytest.mark.parametrize(
    "options",
    [{"statistics": True}, {"max_update_rms": 0.1, "statistics": 2}, {"cautious": "both", "cautious_rescale": True}],
    ids=str,
)
def test_what_rides_along(options):
    runs = []
    for offload, moves in ((None, None), ("cpu", None), ("cpu", {2: "cuda"})):

        def made(params, offload=offload):
            return precond.AdamW(params, **options, offload=offload)

        runs.append(train(made, moves=moves, moving=slice(3, 4)))
    for run in runs[1:]:
        assert_same(runs[0], run)
        if options.get("statistics"):
            ours, theirs = run[1].statistics, runs[0][1].statistics
            assert ours.params == theirs.params
            assert bits_equal(ours.values.cpu(), theirs.values.cpu())


def test_averages_are_shown_and_begin_with_the_weights():
    runs = []
    for offload in (None, "cpu"):
        params, optimizer = train(
            lambda params, offload=offload: precond.AdamW(
                params, ema_decay=0.5, **FORMATS, ema_format="int8", offload=offload
            ),
            torch.bfloat16,
        )
        with optimizer.averaged():
            shown = [p.detach().cpu() for p in params]
        give(params, 9)
        optimizer.step()
        optimizer.wait()
        runs.append((params, optimizer, shown))
    assert_same(*(run[:2] for run in runs))
    assert all(map(bits_equal, runs[0][2], runs[1][2]))


def test_schedule_free_changes_between_its_weights():
    runs = []
    for offload in (None, "cpu"):
        params = parameters(torch.bfloat16)
        optimizer = precond.ScheduleFreeAdamW(params, **FORMATS, offload=offload)
        for step in range(STEPS):
            optimizer.train()
            give(params, step)
            optimizer.step()
            optimizer.eval()
        runs.append((params, optimizer))
    assert_same(*runs)


@pytest.mark.parametrize("how", ["checkpoint", "copy", "pickle"])
def test_a_run_goes_on(how):
    def make(params, offload="cpu"):
        return precond.AdamW(params, **FORMATS, offload=offload)

    params, optimizer = train(make, torch.bfloat16, steps=range(2))
    optimizer.move(params[3], "cuda")
    if how == "checkpoint":
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = make(others)
        saved = optimizer.state_dict()
        other.load_state_dict(saved)
        stays = others[3]
        assert other.state[stays]["exp_avg"].data_ptr() != optimizer.state[params[3]]["exp_avg"].data_ptr()
    else:
        other = copy.deepcopy(optimizer) if how == "copy" else pickle.loads(pickle.dumps(optimizer))
        others = [p for group in other.param_groups for p in group["params"]]
    runs = []
    for these, its in ((params, optimizer), (others, other)):
        for step in (2, 3):
            give(these, step)
            its.step()
        its.wait()
        runs.append((these, its))
    assert_same(*runs)
    assert [on_host(other, p) for p in others[3:]] == [how == "checkpoint", True, True]
    if not CUDA.emulated:
        assert other.state[others[4]]["exp_avg"].device.type == "cpu"
    device_alone = train(lambda params: make(params, None), torch.bfloat16)
    assert_same(device_alone, runs[1])


def test_what_converts_states_reads_the_hosts():
    made = {}
    for offload in (None, "cpu"):
        net = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 4)).to(CUDA.name, torch.bfloat16)
        for p in net.parameters():
            nn.init.constant_(p, 0.3)
        optimizer = precond.AdamW(net.parameters(), **FORMATS, offload=offload)
        give(list(net.parameters()), 0)
        optimizer.step()
        masters = precond.master_weights(optimizer, net)
        plain = precond.to_torch_state_dict(optimizer)
        made[offload] = [*masters.values(), *(t for state in plain["state"].values() for t in state.values())]
        assert all(m.device == p.device for m, p in zip(masters.values(), net.parameters(), strict=True))
        torch.optim.AdamW(net.parameters()).load_state_dict(plain)
    assert all(bits_equal(a.cpu(), b.cpu()) for a, b in zip(*made.values(), strict=True))


def test_entries_of_others_stay_where_they_are():
    """A wrapper's, and a user's, among the states of a parameter."""
    p = nn.Parameter(random_values((64, 64)).to(CUDA.name))
    optimizer = precond.AdamW([p], offload="cpu")
    given = optimizer.state[p]["mine"] = torch.ones(64, 64, device=CUDA.name)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.move(p, "cuda")
    optimizer.move(p, "cpu")
    assert optimizer.state[p]["mine"] is given
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.step()
    optimizer.wait()
    assert not _C.Pinned.has(optimizer.state[p]["mine"].data_ptr())
    assert all(_C.Pinned.has(optimizer.state[p][name].data_ptr()) for name in ("exp_avg", "exp_avg_sq"))


def test_a_step_per_group_keeps_the_twins_of_the_others():
    """As DeepSpeed steps."""
    params = parameters()
    optimizer = precond.AdamW([{"params": params[:3]}, {"params": params[3:]}], offload="cpu")
    kept = []
    for step in range(3):
        give(params, step)
        groups = optimizer.param_groups
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups
        kept.append([optimizer._engine.offload.twins.get(p) for p in params])
    assert None not in kept[0]
    assert kept[0] == kept[1] == kept[2]


def test_groups_and_gradients_that_come_and_go():
    runs = []
    for offload in (None, "cpu"):
        params = parameters()
        optimizer = precond.AdamW([{"params": params[:2]}, {"params": params[2:4], "lr": 0.1}], offload=offload)
        for step in range(5):
            if step == 2:
                optimizer.add_param_group({"params": params[4:], "weight_decay": 0.5})
            give(params, step)
            for p in params[step % 3 :: 3]:
                p.grad = None
            optimizer.step()
        optimizer.wait()
        runs.append((params, optimizer))
    assert_same(*runs)


@pytest.mark.parametrize("clip", [None, "previous"])
def test_released_gradients(clip):
    """Also of a parameter whose order is not its twin's, to which ``step`` brings what has arrived."""
    runs = []
    for offload in (None, "cpu"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)).to(CUDA.name)
        net[2].weight = nn.Parameter(net[2].weight.detach().t().contiguous().t())
        norm = None if clip is None else 0.1
        optimizer = precond.AdamW(net.parameters(), max_grad_norm=norm, state_format="int8", offload=offload)
        precond.release_gradients(net, optimizer, clip=clip)
        for step in range(STEPS):
            if CUDA.emulated:
                backward(net, step)
            else:
                net(
                    torch.randn(4, 8, device=CUDA.name, generator=torch.Generator(CUDA.name).manual_seed(step))
                ).square().mean().backward()
            assert all(p.grad is None for p in net.parameters())
            optimizer.step()
        optimizer.wait()
        runs.append((list(net.parameters()), optimizer))
    assert_same(*runs)


def test_after_wait_parameters_whose_gradients_were_released_are_anybodys():
    """Before ``step``, in their own order and in another."""
    runs = []
    for offload in (None, "cpu"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8)).to(CUDA.name)
        net[1].weight = nn.Parameter(net[1].weight.detach().t().contiguous().t())
        optimizer = precond.AdamW(net.parameters(), offload=offload)
        precond.release_gradients(net, optimizer)
        seen = []
        for _ in range(STEPS):
            net(torch.ones(4, 8, device=CUDA.name)).square().mean().backward()
            optimizer.wait()
            with torch.no_grad():
                for p in net.parameters():
                    seen.append(p.cpu().clone())
                    p.mul_(0.5)
            optimizer.step()
        optimizer.wait()
        runs.append([*seen, *(p.detach().cpu() for p in net.parameters())])
    assert all(map(bits_equal, *runs))
