"""Parameters on CUDA devices that this machine does not have: fake tensors say where a step would wait for a device, or hand the
memory of one to another. The emulated runtime says what a step does on a device that the build has no code for.
"""

from __future__ import annotations

import contextlib
import math
import types

import pytest
import torch
from families import CLASSES
from support import device
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import precond
from precond._core import backend as _backend
from precond._core import formats as _formats
from precond._core.backend import table_of
from precond._core.counters import make_counter
from precond._core.rows import Row

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
emulated = pytest.mark.skipif(not _backend.cuda_on_host(), reason="run by tests/test_cuda_on_host.py")


@pytest.fixture
def fake(monkeypatch):
    """Tensors on any device, without memory."""
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: id(self))
    # Arithmetic on the device; torch without CUDA does not index its tensors, not even fake ones.
    monkeypatch.setattr(_formats, "fill", lambda *args: None)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)
@pytest.mark.parametrize("formats", [(None, None), ("split24", "int8"), ("stochastic", "int4")], ids=str)
def test_states_are_made_without_waiting_for_the_device(fake, row, formats):
    p = torch.nn.Parameter(torch.empty(100, 640, dtype=torch.bfloat16, device=FIRST))
    group = {"params": [p], "weight_format": formats[0], "state_format": formats[1]}
    with device.HostReads():
        optimizer = row.cls([group], **{**row.kwargs, "fused": True})
        group = optimizer.param_groups[0]
        optimizer.states.ensure("p", p, group, optimizer._row(group))
    made = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    assert all(t.device == FIRST for t in made)


def test_a_loaded_counter_that_cannot_count_is_converted_on_its_device(fake):
    p = torch.nn.Parameter(torch.empty(10, device=FIRST))
    optimizer = precond.AdamW([p], fused=True)
    loaded = torch.zeros((), device=FIRST, dtype=torch.bfloat16)
    optimizer.state[p]["step"] = loaded
    with device.HostReads():
        make_counter("p", p, optimizer.state[p], optimizer.param_groups[0])
    step = optimizer.state[p]["step"]
    assert (step.dtype, step.device, step.shape) == (torch.float32, FIRST, ())
    assert step is not loaded


def test_each_device_reads_its_own_copy_of_a_tensor_lr(fake):
    hyper = dict.fromkeys(_backend._C.rules["adamw"].hyper, 0.5) | {"lr": torch.zeros((), device=FIRST)}
    rows = [Row("adamw", 1.0, hyper)]
    for where in (FIRST, SECOND):
        with device.HostReads():
            (row,), used = table_of(rows, where)
        assert [t.device for t in used] == [where]
        assert row.addresses == {0: used[0].data_ptr()}
        assert math.isnan(row.hyper[0]), "a number would be read instead"
    assert used[0] is not hyper["lr"]


def test_each_stream_has_its_own_tables_of_triton(monkeypatch):
    tables = pytest.importorskip("precond.triton_kernels.tables")
    sent, stream = [], types.SimpleNamespace(cuda_stream=1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: stream)
    monkeypatch.setattr(tables, "sent", lambda host, where: sent.append(where) or host)

    def table():
        return tables.table("a test", [1, 2], torch.tensor, FIRST)

    first = table()
    stream.cuda_stream = 2
    second = table()
    assert second is not first
    stream.cuda_stream = 1
    assert table() is first
    assert sent == [FIRST, FIRST]


@pytest.mark.parametrize(
    ("cuda", "triton", "chosen"), [("", "", "cuda"), ("no code", "", "triton"), ("no code", "none", "reference")]
)
def test_a_device_without_code_for_it_falls_back(monkeypatch, cuda, triton, chosen):
    monkeypatch.setattr(_backend, "has_plain_memory", lambda tensor: True)
    monkeypatch.setattr(_backend, "why_not", lambda name: triton if name == "triton" else "")
    monkeypatch.setattr(_backend, "why_not_on", lambda index: cuda if index == 1 else "")
    tensors = [types.SimpleNamespace(dtype=torch.float32, device=SECOND)]
    assert _backend.choose(None, tensors) == chosen
    tensors[0].device = FIRST
    assert _backend.choose(None, tensors) == "cuda"


@emulated
def test_backend_cuda_says_that_the_build_has_no_code_for_the_device():
    CUDA = device.EmulatedDevice()
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    CUDA.hooks.hook_set_no_code(0, 1)
    _backend.why_not_on.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"nothing that device 0 can run: .*backend=None or 'triton' can"):
            precond.AdamW([p], backend="cuda").step()
    finally:
        CUDA.hooks.hook_set_no_code(0, 0)
        _backend.why_not_on.cache_clear()
    assert p.tolist() == [1.0] * 5
    precond.AdamW([p], backend="cuda").step()
    assert p[0].item() < 1.0


@emulated
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1.0, "nonfinite": "raise"}], ids=str)
def test_the_device_of_a_plan_is_current_while_it_runs(monkeypatch, options):
    """A fresh thread's current device is GPU 0, whatever its process works on."""
    hooks = device.EmulatedDevice().hooks

    @contextlib.contextmanager
    def current(where):
        hooks.hook_set_device(0)
        yield
        hooks.hook_set_device(1)

    monkeypatch.setattr(_backend, "current", current)
    hooks.hook_set_device(1)
    try:
        p = torch.nn.Parameter(torch.ones(5000))
        p.grad = torch.ones(5000)
        precond.AdamW([p], backend="cuda", **options).step()
    finally:
        hooks.hook_set_device(0)
    assert p[0].item() < 1.0


@emulated
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"capturable": True}], ids=str)
def test_a_step_sets_no_device_and_leaves_no_error(options):
    CUDA = device.EmulatedDevice()
    sets = CUDA.hooks.hook_device_sets()
    p = torch.nn.Parameter(torch.ones(5000))
    optimizer = precond.AdamW([p], backend="cuda", **options)
    for _ in range(3):
        p.grad = torch.ones(5000)
        optimizer.step()
        assert CUDA.hooks.hook_take_last_error() == 0
    assert CUDA.hooks.hook_device_sets() == sets
