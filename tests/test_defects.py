"""Defects that a review found, each by name: odd tensors, states and groups that once gave a wrong answer."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from families import CLASSES
from support.cases import bits_equal
from support.training import backward, model, train

import precond

classes = pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)


def stepped(p, **kwargs):
    precond.SGD([p], lr=1.0, **kwargs).step()
    return p.detach().clone()


@pytest.mark.parametrize("first", [True, False])
def test_a_lazily_negated_gradient_keeps_its_sign(first):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = precond.SGD([p], lr=1.0)
    if not first:
        p.grad = torch.zeros(3)
        optimizer.step()
    p.grad = torch.complex(torch.zeros(3), torch.full((3,), 2.0)).conj().imag
    assert p.grad.is_neg()
    optimizer.step()
    assert p.tolist() == [3.0] * 3
    p.grad = torch.ones(3)
    optimizer.step()
    assert p.tolist() == [2.0] * 3


def test_gradients_of_zeros_without_storage():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch._efficientzerotensor(2)
    assert stepped(p, weight_decay=0.5).tolist() == [0.5, 0.5]


def test_fake_and_meta_tensors_step_without_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        net = torch.nn.Linear(3, 2)
        net(torch.randn(4, 3)).sum().backward()
        precond.AdamW(net.parameters()).step()
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    q = torch.nn.Parameter(torch.empty(3, device="meta"))
    p.grad, q.grad = torch.empty_like(p), torch.empty_like(q)
    precond.SGD([p, q], lr=0.1, momentum=0.9).step()


def test_the_default_device_does_not_matter():
    torch.set_default_device("meta")
    try:
        p = torch.nn.Parameter(torch.ones(3, device="cpu"))
        p.grad = torch.ones(3, device="cpu")
        optimizer = precond.AdamW([p])
        optimizer.step()
        assert optimizer.state[p]["step"].device.type == "cpu"
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("shape", [[2] * 18, [0] * 200])
def test_many_dimensions(shape):
    p = torch.nn.Parameter(torch.ones(shape))
    p.grad = torch.ones(shape).permute(*reversed(range(len(shape))))
    assert torch.equal(stepped(p, momentum=0.9, dampening=0.5), torch.zeros(shape))


@classes
def test_load_hooks_of_the_user_are_obeyed(row):
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    saved = row.cls([("a", a), ("b", b)], **row.kwargs)
    a.grad, b.grad = torch.full((2,), 1.0), torch.full((2,), 2.0)
    saved.step()
    loaded = row.cls([("b", b), ("a", a)], **row.kwargs)

    def by_name(optimizer, state_dict):
        names = state_dict["param_groups"][0]["param_names"]
        wanted = optimizer.param_groups[0]["param_names"]
        state = {i: state_dict["state"][names.index(name)] for i, name in enumerate(wanted)}
        return {"state": state, "param_groups": state_dict["param_groups"]}

    loaded.register_load_state_dict_pre_hook(by_name)
    loaded.register_load_state_dict_post_hook(lambda o: o.state[a].update(marked=torch.ones(1)))
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    key = loaded.states.names(row.rule)[0]
    for p in (a, b):
        assert torch.equal(loaded.state[p][key], saved.state[p][key])
    assert "marked" in loaded.state[a]


def test_a_parameter_moved_to_another_group_takes_its_options():
    for dtype in (torch.float32, torch.float64):
        a, b, c = (torch.nn.Parameter(torch.zeros(1, dtype=d)) for d in (torch.float32, dtype, torch.float32))
        optimizer = precond.SGD([{"params": [a, b], "lr": 1.0}, {"params": [c], "lr": 100.0}])
        for p in (a, b, c):
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.param_groups[0]["params"] = [a]
        optimizer.param_groups[1]["params"] = [b, c]
        optimizer.step()
        assert b.item() == -101.0


def test_a_first_step_that_fails_is_tried_again_as_the_first(monkeypatch):
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = precond.SGD([a, b], lr=1.0, momentum=0.9, dampening=0.5)
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    real, calls = torch.full_like, []

    def fails_at_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room for a state")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "full_like", fails_at_second)
        with pytest.raises(MemoryError):
            optimizer.step()
    assert not optimizer.state
    optimizer.step()
    assert a.tolist() == b.tolist() == [-1.0, -1.0]


def test_overlaps_under_a_longer_stretch_are_found():
    buffer = torch.zeros(100)
    params = [t.requires_grad_() for t in (buffer[::2], buffer[1::2][:10], buffer[1::2][5:15])]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="parameter 1 of group 0 and parameter 2 of group 0 must not share memory"):
        precond.SGD(params).step()


@classes
@pytest.mark.parametrize("value", [None, 1, 5.0])
def test_states_replaced_by_plain_values_are_read_anew(row, value):
    net = model()
    optimizer = row.cls(net.parameters(), **row.kwargs)
    train(net, optimizer, 2)
    for state in optimizer.state.values():
        if row.counts_steps:
            state["step"] = 2 if value is None else value
        else:
            state["momentum_buffer"] = None
    train(net, optimizer, 1, start=2)
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize("value", [1, 5.0, torch.ones(1, dtype=torch.float64)])
def test_counters_replaced_beside_a_parameter_of_another_backend_are_read_anew(value):
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = precond.AdamW(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        # A tensor is counted in, so a copy.
        optimizer.state[params[1]]["step"] = value.clone() if isinstance(value, torch.Tensor) else value
    optimizer.step()
    assert optimizer.state[params[1]]["step"].item() == float(value) + 1.0


def test_a_gradient_that_turns_sparse_gives_our_message():
    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = precond.AdamW([p])
    p.grad = torch.ones(4, 3)
    optimizer.step()
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (4, 3), check_invariants=True)
    with pytest.raises(RuntimeError, match="AdamW does not support sparse gradients"):
        optimizer.step()


def test_inference_tensors_are_refused():
    with torch.inference_mode():
        p = torch.ones(3)
    optimizer = precond.SGD([p])
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="must not be an inference tensor"):
        optimizer.step()


def test_complex_parameters_ignore_state_format():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    optimizer = precond.AdamW([p], state_format="fp32")
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.complex64


def test_betas_must_be_a_pair():
    for betas in ((0.9,), 0.9):
        with pytest.raises(ValueError, match="betas must be a pair of numbers"):
            precond.AdamW([torch.nn.Parameter(torch.ones(1))], betas=betas)


@classes
def test_many_groups_stepped_one_at_a_time_keep_their_plans(row):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(20)]
    optimizer = row.cls([{"params": [p]} for p in params], **row.kwargs)
    groups = optimizer.param_groups
    for _ in range(2):
        for group in groups:
            group["params"][0].grad = torch.ones(3)
            optimizer.param_groups = [group]
            optimizer.step()
    assert len(optimizer.engine.plans) == 20


def test_states_replaced_by_another_thread_during_a_step_stay_alive():
    p = torch.nn.Parameter(torch.randn(1 << 20))
    optimizer = precond.AdamW([p])
    p.grad = torch.randn(1 << 20)
    optimizer.step()
    stop = threading.Event()

    def replace():
        while not stop.is_set():
            optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(60):
            optimizer.step()
    finally:
        stop.set()
        thread.join()
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("threads", [2])
def test_two_optimizers_may_step_in_two_threads(threads):
    nets = [model(i) for i in range(threads)]
    alone = copy.deepcopy(nets)
    for net in (*nets, *alone):
        backward(net)
    optimizers = [precond.AdamW(net.parameters()) for net in nets]

    def work(optimizer):
        for _ in range(50):
            optimizer.step()

    pool = [threading.Thread(target=work, args=(o,)) for o in optimizers]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    for net, other in zip(nets, alone, strict=True):
        optimizer = precond.AdamW(other.parameters())
        for _ in range(50):
            optimizer.step()
        assert all(bits_equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_options_of_ours_survive_a_checkpoint_of_torchs():
    w = torch.nn.Parameter(torch.ones(2))
    theirs = torch.optim.AdamW([w])
    w.grad = torch.ones(2)
    theirs.step()
    ours = precond.AdamW([w], l1_decay=0.1, state_format="fp32")
    ours.load_state_dict(theirs.state_dict())
    assert (ours.param_groups[0]["l1_decay"], ours.param_groups[0]["state_format"]) == (0.1, "fp32")
    w = torch.nn.Parameter(torch.ones(2))
    ours = precond.RMSprop([w], fused=True)
    ours.load_state_dict(torch.optim.RMSprop([w]).state_dict())
    assert ours.param_groups[0]["fused"] is True


@pytest.mark.parametrize("cls", [precond.SGD, precond.Adagrad, precond.RMSprop, precond.Adam])
def test_an_l1_decay_that_a_class_does_not_have_is_an_error(cls):
    w = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=rf"{cls.__name__} must have no l1_decay in a group, got 0\.1"):
        cls([{"params": [w], "l1_decay": 0.1}])


def test_options_set_later_are_checked_at_the_step():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = precond.AdamW([w], l1_decay=0.1)
    optimizer.param_groups[0]["l1_decay"] = -10.0
    w.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"Invalid l1_decay value: -10\.0"):
        optimizer.step()
    assert w.tolist() == [1.0, 1.0]


def test_a_step_after_one_that_made_states_is_checked():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = precond.Adam([a, b], lr=0.0)
    a.grad, b.grad = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    a.grad = torch.ones(2)
    b.grad = torch.sparse_coo_tensor([[0]], [1.0], (2,), dtype=torch.float64, check_invariants=True)
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        optimizer.step()


def test_a_lazily_conjugated_parameter_is_written():
    w = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]).conj())
    optimizer = precond.SGD([w], lr=0.5)
    w.grad = torch.tensor([1 + 1j, 1 - 1j])
    optimizer.step()
    assert w.tolist() == [0.5 - 2.5j, 2.5 + 1.5j]


def test_a_sparse_gradient_without_dimensions():
    w = torch.nn.Parameter(torch.tensor(1.0))
    w.grad = torch.sparse_coo_tensor(torch.zeros(0, 1, dtype=torch.int64), [2.0], (), check_invariants=True)
    precond.SGD([w], lr=0.1).step()
    assert w.item() == pytest.approx(0.8)


def test_a_complex_tensor_of_sixteen_dimensions():
    w = torch.nn.Parameter(torch.zeros([2] * 16, dtype=torch.complex64))
    w.grad = torch.ones([2] * 16, dtype=torch.complex64).permute(*reversed(range(16)))
    precond.SGD([w], lr=0.5).step()
    assert torch.equal(w, torch.full_like(w, -0.5))
