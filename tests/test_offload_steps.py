"""Steps of the host: what overlaps, what lives how long, what goes wrong and what is refused.

On a GPU (``.ci/gpu``), and on every push on the emulated device, by test_cuda_on_host.py.
"""

from __future__ import annotations

import concurrent.futures
import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.cases import bits_equal, random_values
from support.offloaded import CUDA, FORMATS, found, give, on_host, parameters, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import precond
from precond import _C

if CUDA is None:
    pytest.skip("needs a CUDA device: run by tests/test_cuda_on_host.py and .ci/gpu", allow_module_level=True)
emulated = pytest.mark.skipif(not CUDA.emulated, reason="looks into the emulated runtime")
pytestmark = [pytest.mark.filterwarnings("ignore::precond.PrecisionWarning"), pytest.mark.usefixtures("small_pieces")]


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


@emulated
def test_two_ranks_of_fsdp2(tmp_path):
    # Not by support.ranks, whose server has imported the installed extension.
    program = (
        "import sys; from support import device; device.stand_in_extension(); from support.offloaded_ranks import main; "
        "main(int(sys.argv[1]), sys.argv[2])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    commands = [[sys.executable, "-c", program, str(rank), f"{tmp_path}/store"] for rank in range(2)]
    ranks = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)


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


def test_a_step_must_not_be_captured():
    params, optimizer = train(
        lambda params: precond.AdamW(params, capturable=CUDA.emulated is False, offload="cpu"), steps=[0]
    )
    give(params, 1)
    with (
        pytest.warns(UserWarning, match="The CUDA Graph is empty"),
        pytest.raises(RuntimeError, match="offload must be None for a step that is captured"),
    ):
        CUDA.capture(optimizer.step)


def test_parameters_that_share_memory_are_refused():
    """Their twins share none. Nothing changes, however often it is tried."""
    both = torch.ones(6, device=CUDA.name)
    for params, message in (
        ([nn.Parameter(torch.ones(1, 5, device=CUDA.name).expand(3, 5))], "0 of group 0 must not overlap itself"),
        (
            [nn.Parameter(both[:4]), nn.Parameter(both[2:])],
            "0 of group 0 and parameter 1 of group 0 must not share memory",
        ),
    ):
        optimizer = precond.AdamW(params, offload="cpu")
        for _ in range(2):
            give(params, 0)
            with pytest.raises(RuntimeError, match=f"parameter {message}"):
                optimizer.step()
        assert not any(optimizer.state.values())
    here, there = parameters(shapes=[(6,), (6,)])
    optimizer = precond.AdamW([here, there])
    optimizer.move(there, "cpu")
    give([here, there], 0)
    optimizer.step()
    here.data = there.data[:]
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 and parameter 1 of group 0 must not share memory"):
        optimizer.step()


def test_twins_that_no_longer_fit_are_let_go():
    net = nn.Linear(64, 64).to(CUDA.name)
    optimizer = precond.AdamW(net.parameters(), **FORMATS, offload="cpu")
    offload = optimizer._engine.offload
    for step in range(6):
        net.to([torch.bfloat16, torch.float16][step % 2])
        train(lambda _: optimizer, params=[*net.parameters()], steps=[step])
        with torch.no_grad():
            net.weight.clamp_(-1, 1)
        if step % 3 == 0:
            optimizer.move(net.weight, CUDA.name if not CUDA.emulated else "cuda")
            assert len(offload.states.own) == len(offload.states.remainders) == 1
            optimizer.move(net.weight, "cpu")
    assert len(offload.states.own) == len(offload.states.remainders) == 2


def test_a_wrapper_waits_and_moves_as_what_is_inside():
    w = nn.Parameter(torch.ones(8, 8, device=CUDA.name))
    base = precond.AdamW([w])
    optimizer = precond.GradientRegularizer(base, rho=0.1)
    optimizer.move(w, "cpu")
    optimizer.step(lambda: (w.square().sum().backward(), w.sum())[1])
    optimizer.wait()
    assert on_host(base, w)
    other = precond.FOP(torch.optim.SGD([w], lr=0.1), hyper_lr=0.1)
    other.wait()
    with pytest.raises(RuntimeError, match=r"move\(\) needs an optimizer of precond inside, got SGD"):
        other.move(w, "cpu")


def test_another_thread_may_wait():
    runs = []
    interval = sys.getswitchinterval()
    for waits in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6))).to(CUDA.name)
        for layer in net:
            layer.weight.data = layer.weight.data.t().contiguous().t()
        optimizer = precond.AdamW(net.parameters(), offload="cpu")
        precond.release_gradients(net, optimizer)
        done = threading.Event()

        def wait(optimizer=optimizer, done=done):
            while not done.is_set():
                optimizer.wait()

        with concurrent.futures.ThreadPoolExecutor() as pool:
            sys.setswitchinterval(1e-5)
            waiting = pool.submit(wait) if waits else None
            try:
                for _ in range(30):
                    net(torch.ones(4, 32, device=CUDA.name)).square().mean().backward()
                    optimizer.step()
            finally:
                done.set()
                sys.setswitchinterval(interval)
            if waiting is not None:
                waiting.result()
        optimizer.wait()
        runs.append([p.detach().cpu() for p in net.parameters()])
    assert all(map(bits_equal, *runs))


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
