"""States in the host's memory: the bits of the device backend, copies that overlap, and what else touches states.

On a GPU (``.ci/gpu``), and on every push on the emulated device, by test_cuda_on_host.py.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from families import CLASSES, OPTIMIZERS
from support import device
from support.cases import LAYOUTS, bits_equal, gradient, guarded, random_values
from support.released import backward
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import precond
from precond import _C
from precond._core import twins

CUDA = device.device()
if CUDA is None:
    pytest.skip("needs a CUDA device: run by tests/test_cuda_on_host.py and .ci/gpu", allow_module_level=True)
emulated = pytest.mark.skipif(not CUDA.emulated, reason="looks into the emulated runtime")
pytestmark = pytest.mark.filterwarnings("ignore::precond.PrecisionWarning")
rows = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
SHAPES = [(3, 5), (0,), (), (70, 128), (513,), (33_001,)]
STEPS = 4
FORMATS = {"state_format": "int8", "weight_format": "split24"}
#: How each parameter's states move in a run, by the step before which they do.
MOVES = {1: "cuda", 2: "cpu", 3: "cuda"}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """A tensor comes in several of them, and rings go round."""
    monkeypatch.setattr(twins, "_SLOT", 32768)


def parameters(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(1)
    return [nn.Parameter(random_values(shape, dtype).to(CUDA.name)) for shape in shapes]


def give(params, step, dtype=None):
    torch.manual_seed(100 + step)
    for p in params:
        p.grad_dtype = dtype or p.dtype
        p.grad = random_values(p.shape, p.grad_dtype).to(CUDA.name)


def train(make, dtype=torch.float32, moves=None, steps=range(STEPS), params=None, gradients=None):
    params = parameters(dtype) if params is None else params
    optimizer = make(params)
    for step in steps:
        if moves and step in moves:
            for p in params:
                optimizer.move(p, moves[step])
        give(params, step, gradients)
        optimizer.step()
    optimizer.wait()
    return params, optimizer


def found(params, optimizer):
    every = {}
    for i, p in enumerate(params):
        every[str(i)] = p.detach().cpu()
        for key, value in optimizer.state.get(p, {}).items():
            every[f"{i} {key}"] = torch.as_tensor(value).detach().cpu()
    return every


def assert_same(ours, theirs):
    a, b = found(*ours), found(*theirs)
    assert a.keys() == b.keys()
    assert not [name for name in a if not bits_equal(a[name], b[name])]


def on_host(optimizer, p):
    """Whether a parameter's states are in pinned memory."""
    states = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor) and t.dim() and t.numel()]
    return bool(states) and all(_C.Pinned.has(t.data_ptr()) for t in states)


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
        params = parameters()
        optimizer = precond.AdamW(params, **options, offload=offload)
        for step in range(STEPS):
            if moves and step in moves:
                optimizer.move(params[3], moves[step])
            give(params, step)
            optimizer.step()
        optimizer.wait()
        runs.append((params, optimizer))
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


# What overlaps.


@emulated
def test_nobody_waits_for_a_busy_device_and_four_bytes_a_bfloat16_parameter_pass():
    params, optimizer = train(lambda params: precond.AdamW(params, **FORMATS, offload="cpu"), torch.bfloat16, steps=[0])
    joins = []
    optimizer._engine.offload.join, join = lambda: joins.append(0), optimizer._engine.offload.join
    give(params, 1)
    with CUDA.traced() as trace:
        with CUDA.busy():
            optimizer.step()  # returns
            assert optimizer.state[params[3]]["step"].item() == 1
        join()
        optimizer.wait()
    assert joins
    assert optimizer.state[params[3]]["step"].item() == 2
    elements = sum(p.numel() for p in params)
    moved = {kind: sum(item.value for item in trace if item.kind == kind) for kind in ("download", "upload")}
    assert moved == {"download": 2 * elements, "upload": 2 * elements}


@emulated
def test_a_backward_pass_goes_on_while_copies_and_updates_of_its_gradients_run():
    """Of the stream of the backward pass the copies need one thing: that it says when a gradient is there."""
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    optimizer = precond.AdamW(net.parameters(), max_grad_norm=1.0, offload="cpu")
    precond.release_gradients(net, optimizer, clip="previous")
    net(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    optimizer.wait()
    with CUDA.traced() as trace, CUDA.busy():
        net(torch.ones(2, 64)).sum().backward()  # returns, with all gradients on their way
        assert all(optimizer.state[p]["step"].item() == 1 for p in net.parameters())
    assert all(p.grad is None for p in net.parameters())
    own = [item.kind for item in trace if not item.apart and item.kind != "upload"]
    assert own.count("record") >= 8
    assert "wait for event" not in own
    with CUDA.traced() as trace:
        optimizer.step()
    assert [item.kind for item in trace if not item.apart and item.kind == "wait for event"] == ["wait for event"]
    optimizer.wait()
    assert all(optimizer.state[p]["step"].item() == 2 for p in net.parameters())


@emulated
def test_an_error_changes_nothing_and_leaves_nobody_waiting():
    """Of what stays on the device, before anything of the host is enqueued; the counters of a step that was not are as before."""
    a, b = parameters(shapes=[(300,), (40, 2)])
    optimizer = precond.SGD([a, b], momentum=0.9)
    optimizer.move(a, "cpu")
    give([a, b], 0)
    optimizer.step()
    optimizer.wait()
    before = found([a, b], optimizer)
    b.grad = b.grad.to_sparse()
    for p in (b, a):
        p.requires_grad_(True)
    with pytest.raises(RuntimeError, match="sparse gradients"):
        precond.AdamW([a, b]).step()
    adam = precond.AdamW([a, b])
    adam.move(a, "cpu")
    with CUDA.traced() as trace, pytest.raises(RuntimeError, match="sparse gradients"):
        adam.step()
    assert not trace
    assert not adam.state.get(a)
    assert all(bits_equal(x, y) for x, y in zip(before.values(), found([a, b], optimizer).values(), strict=True))
    give([a, b], 1)
    adam.step()
    adam.wait()
    give([a, b], 2)
    with CUDA.failing(700), pytest.raises(RuntimeError, match="error 700"):
        adam.step()
    assert adam.state[a]["step"].item() == 1


@emulated
def test_states_of_a_step_live_until_it_is_done():
    params, optimizer = train(lambda params: precond.AdamW(params, offload="cpu"), steps=[0])
    optimizer._engine.offload.join = lambda: None
    state = optimizer.state[params[5]]
    moments = weakref.ref(state["exp_avg"])
    give(params, 1)
    with CUDA.busy():
        optimizer.step()
        state["exp_avg"] = torch.zeros_like(state["exp_avg"])
        assert moments() is not None
    optimizer.wait()
    assert moments() is None


@emulated
def test_what_goes_wrong_there_is_raised_by_the_next_call():
    params, optimizer = train(lambda params: precond.AdamW(params, offload="cpu"), steps=[0])
    optimizer._engine.offload.join = lambda: None
    give(params, 1)
    with CUDA.busy():
        optimizer.step()
        with CUDA.failing(700), pytest.raises(RuntimeError, match="cudaStreamQuery: error 700"):
            optimizer.step()


def test_bytes_of_the_host():
    """As docs/offload.md has them: a twin of bfloat16, and the states."""
    n = 1024 * 64
    for options, expected in (({"state_format": "fp32"}, 10.0), ({"state_format": "int8"}, 4.06), (FORMATS, 5.06)):
        (p,), optimizer = train(
            lambda params, options=options: precond.AdamW(params, **options, offload="cpu"),
            torch.bfloat16,
            params=[nn.Parameter(torch.ones(1024, 64, device=CUDA.name, dtype=torch.bfloat16))],
        )
        states = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor) and t.dim()]
        twin = optimizer._engine.offload.twins.get(p).host
        assert sum(t.numel() * t.itemsize for t in (*states, twin)) / n == pytest.approx(expected, abs=0.005)
        assert _C.Pinned.has(twin.data_ptr())


def test_shards_have_their_states_there(tmp_path):
    mesh_of = [None]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh_of.append(init_device_mesh(CUDA.name, (1,)))
        runs = []
        for mesh in mesh_of:
            params = parameters(torch.bfloat16, [(70, 128), (64,), (33, 64)])
            if mesh is not None:
                params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params]
            optimizer = precond.AdamW(params, **FORMATS, max_grad_norm=0.1, statistics=True, offload="cpu")
            for step in range(3):
                torch.manual_seed(step)
                for p in params:
                    g = random_values(p.shape, p.dtype).to(CUDA.name)
                    p.grad = g if mesh is None else distribute_tensor(g, mesh, [Shard(0)])
                optimizer.step()
            optimizer.wait()
            made = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
            assert all(hasattr(t, "placements") == (mesh is not None) for t in made if t.dim())
            plain = [t.to_local() if hasattr(t, "placements") else t for t in (*params, *made)]
            runs.append([t.detach().cpu() for t in plain] + [optimizer.statistics.values.cpu()])
        assert all(map(bits_equal, *runs))
    finally:
        dist.destroy_process_group()


# What is refused, and what is let go.


def test_what_takes_several_passes_is_refused():
    w = nn.Parameter(torch.ones(8, 8, device=CUDA.name))
    b = nn.Parameter(torch.ones(8, device=CUDA.name))
    with pytest.raises(
        RuntimeError, match="offload must be None: a step of several passes has its states on the device for Muon"
    ):
        precond.Muon([w], offload="cpu")
    groups = [dict(params=[w], optimizer=precond.Muon), dict(params=[b], optimizer=precond.AdamW)]
    with pytest.raises(RuntimeError, match="offload must be None: a step of several passes"):
        precond.Grouped(groups, offload="cpu")
    optimizer = precond.Grouped(groups)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 must keep its states on"):
        optimizer.move(w, "cpu")
    optimizer.move(b, "cpu")
    w.grad, b.grad = torch.ones_like(w), torch.ones_like(b)
    optimizer.step()
    optimizer.wait()
    assert on_host(optimizer, b)
    assert not on_host(optimizer, w)


def test_errors():
    w = nn.Parameter(torch.ones(8, device=CUDA.name))
    with pytest.raises(ValueError, match="offload must be None or 'cpu', got 'nvme'"):
        precond.AdamW([w], offload="nvme")
    optimizer = precond.AdamW([("w", w)], offload="cpu")
    with pytest.raises(ValueError, match="p must be a parameter of this optimizer"):
        optimizer.move(torch.ones(8), "cpu")
    with pytest.raises(
        ValueError, match=r"to must be 'cpu' or 'cuda.*', the device of parameter 0 of group 0 \('w'\), got 'meta'"
    ):
        optimizer.move(w, "meta")
    wide = precond.SGD([nn.Parameter(torch.ones(8, device=CUDA.name, dtype=torch.float64))], offload="cpu")
    wide.param_groups[0]["params"][0].grad = torch.ones(8, device=CUDA.name, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match="offload must be None for parameter 0 of group 0: the host updates float32, "
    ):
        wide.step()
    with pytest.raises(
        RuntimeError, match=r"parameter 0 of group 0 must keep its states on .* alone, got torch.float64"
    ):
        wide.move(wide.param_groups[0]["params"][0], "cpu")
    w.grad_dtype = torch.float64
    w.grad = torch.ones(8, device=CUDA.name, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="offload must get float32, bfloat16, float16 or complex64 tensors"):
        optimizer.step()
    w.grad = w.grad_dtype = None
    rows = nn.Parameter(torch.ones(4, 2, device=CUDA.name))
    sparse = precond.SGD([rows], offload="cpu")
    rows.grad = torch.ones(4, 2, device=CUDA.name).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        sparse.step()


@pytest.mark.parametrize("row", CLASSES[:1], ids=str)
def test_a_step_must_not_be_captured(row):
    params, optimizer = train(
        lambda params: precond.AdamW(params, capturable=CUDA.emulated is False, offload="cpu"), steps=[0]
    )
    give(params, 1)
    with (
        pytest.warns(UserWarning, match="The CUDA Graph is empty"),
        pytest.raises(RuntimeError, match="offload must be None for a step that is captured"),
    ):
        CUDA.capture(optimizer.step)


def test_nothing_is_kept_alive():
    params, optimizer = train(lambda params: precond.AdamW(params, **FORMATS, offload="cpu"), torch.bfloat16)
    moments = weakref.ref(optimizer.state[params[5]]["exp_avg"])
    gone = weakref.ref(optimizer)
    give(params, 9)
    optimizer.step()
    gc.disable()  # it is no cycle
    del optimizer  # while its last step may run
    gc.enable()
    assert gone() is None
    assert moments() is None
