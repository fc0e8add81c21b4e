"""Being a torch optimizer: signatures, groups, closures, hooks, schedulers, copies, AMP."""

from __future__ import annotations

import collections
import copy
import fractions
import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch
from families import CLASSES, DROP_INS, OPTIMIZERS, WITH_PEER, stock
from support.cases import BACKEND, bits_equal
from support.training import assert_close, backward, model, train, with_values

import precond

rows = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
peers = pytest.mark.parametrize("row", WITH_PEER, ids=str)
drop_ins = pytest.mark.parametrize("row", DROP_INS, ids=lambda row: row.cls.__name__)
classes = pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)


@peers
def test_it_trains_like_torch(row):
    ours, theirs = model(), model()
    train(ours, row.cls(ours.parameters(), **row.kwargs))
    train(theirs, row.peer(theirs.parameters(), **row.kwargs))
    assert_close(ours, theirs)


@drop_ins
def test_the_signature_begins_with_torchs(row):
    ours = list(inspect.signature(row.cls.__init__).parameters.values())
    theirs = list(inspect.signature(row.peer.__init__).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    own = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    assert all(p.kind in own for p in ours[len(theirs) :])


@drop_ins
def test_a_drop_in_is_an_instance_of_torchs_class(row):
    assert isinstance(row.cls(model().parameters()), row.peer)


@pytest.mark.parametrize(
    ("ours", "coupled"),
    [
        (getattr(precond, f"{row.cls.__name__}W"), row.cls)
        for row in CLASSES
        if row.cls is not precond.Adam and hasattr(precond, f"{row.cls.__name__}W")
    ],
)
def test_a_decoupled_class_takes_what_the_coupled_one_takes(ours, coupled):
    parameters = inspect.signature(ours.__init__).parameters
    # AdamW's, but where lr is 1 what AdamW's removes of a parameter at its lr of 1e-3.
    weight_decay = 0.01 if parameters["lr"].default < 1.0 else 1e-5
    expected = dict(inspect.signature(coupled.__init__).parameters)
    expected.pop("decoupled_weight_decay", None)  # which is what the class is
    for name, parameter in expected.items():
        assert parameters[name].kind == parameter.kind
        assert parameters[name].default == (weight_decay if name == "weight_decay" else parameter.default)


@peers
def test_groups_and_states_have_torchs_keys(row):
    ours, theirs = model(), model()
    a, b = row.cls(ours.parameters(), **row.kwargs), row.peer(theirs.parameters(), **row.kwargs)
    train(ours, a)
    train(theirs, b)
    assert set(a.param_groups[0]) == set(b.param_groups[0])
    assert a.defaults.keys() == b.defaults.keys()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert list(a.state.get(p, {})) == list(b.state.get(q, {}))
        for key, value in a.state.get(p, {}).items():
            assert value.dtype == b.state[q][key].dtype
            assert value.shape == b.state[q][key].shape


@classes
def test_a_closure_runs_once_with_gradients_enabled(row):
    net = model()
    optimizer = row.cls(net.parameters(), **row.kwargs)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return backward(net)

    before = [p.detach().clone() for p in net.parameters()]
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == pytest.approx(backward(with_values(model(), before)).item())
    assert optimizer.step() is None


@classes
def test_hooks_fire_once(row):
    net = model()
    optimizer = row.cls(net.parameters(), **row.kwargs)
    torch.optim.AdamW(net.parameters())  # torch patches its own class then
    if row.peer:
        row.peer(net.parameters(), **row.kwargs)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    train(net, optimizer, steps=1)
    assert fired == ["pre", "post"]


@classes
def test_the_step_bumps_versions_and_leaves_gradients_alone(row):
    net = model()
    optimizer = row.cls(net.parameters(), **row.kwargs)
    backward(net)
    versions = [p._version for p in net.parameters()]
    grads = [(p.grad, p.grad.clone(), p.grad._version) for p in net.parameters()]
    optimizer.step()
    assert all(p._version > v for p, v in zip(net.parameters(), versions, strict=True))
    for p, (g, values, version) in zip(net.parameters(), grads, strict=True):
        assert p.grad is g
        assert torch.equal(g, values)
        assert g._version == version


@classes
def test_backward_through_a_stepped_parameter_is_an_error(row):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = row.cls([p], **row.kwargs)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@classes
def test_named_parameters_and_groups(row):
    net = model()
    optimizer = row.cls(net.named_parameters(), **row.kwargs)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]
    params = list(net.parameters())
    optimizer = row.cls([{"params": params[:2], "lr": 0.0}, {"params": []}, {"params": params[2:]}], **row.kwargs)
    before = [p.detach().clone() for p in params]
    train(net, optimizer, steps=1)
    changed = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert changed == [False, False, True, True]


@classes
def test_a_group_added_later_is_updated(row):
    net = model()
    params = list(net.parameters())
    optimizer = row.cls(params[:2], **row.kwargs)
    train(net, optimizer, steps=2)
    optimizer.add_param_group({"params": params[2:], "lr": 1e-3})
    before = params[3].detach().clone()
    train(net, optimizer, steps=1)
    assert not torch.equal(params[3], before)


@peers
def test_late_and_missing_gradients(row):
    """A parameter without a gradient has no state and counts no step; it may come and go."""
    ours, theirs = model(), model()
    a, b = row.cls(ours.parameters(), **row.kwargs), row.peer(theirs.parameters(), **row.kwargs)
    for i in range(6):
        for net, optimizer in ((ours, a), (theirs, b)):
            backward(net, i)
            if i in (0, 1, 4):
                net[0].weight.grad = None
            if i == 5:
                for p in net.parameters():
                    p.grad = None
            optimizer.step()
            if i == 0:
                # Adagrad's exists from the constructor on.
                state = optimizer.state.get(net[0].weight, {})
                assert not state or (isinstance(optimizer, torch.optim.Adagrad) and state["step"] == 0)
    assert_close(ours, theirs)


@classes
@pytest.mark.parametrize("make", ["lambda", "onecycle"])
def test_schedulers(row, make):
    ours, theirs = model(), model()
    for net, cls in ((ours, row.cls), (theirs, stock(row))):
        optimizer = cls(net.parameters(), **row.kwargs)
        if make == "lambda":
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        else:
            cycles = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=0.1, total_steps=10, cycle_momentum=cycles
            )
        for i in range(6):
            backward(net, i)
            optimizer.step()
            scheduler.step()
    assert_close(ours, theirs)


@classes
def test_a_tensor_lr_is_read_at_each_step_and_survives_loading(row):
    ours, theirs = model(), model()
    lr = torch.tensor(0.05)
    kwargs = {k: v for k, v in row.kwargs.items() if k != "lr"}
    a, b = row.cls(ours.parameters(), lr=lr, **kwargs), row.cls(theirs.parameters(), lr=0.05, **kwargs)
    for value in (0.05, 0.01, 0.2):
        lr.fill_(value)
        b.param_groups[0]["lr"] = lr.item()
        train(ours, a, 2)
        train(theirs, b, 2)
    assert all(bits_equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    state = copy.deepcopy(a.state_dict())
    lr.fill_(7.0)
    a.load_state_dict(state)
    assert a.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.2)


@rows
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_as_the_original(row, how):
    net = model()
    optimizer = row.cls(net.parameters(), **row.kwargs, fused=True, backend=BACKEND)
    train(net, optimizer, 3)
    pair = copy.deepcopy((net, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((net, optimizer)))
    train(net, optimizer, 2, start=3)
    train(*pair, 2, start=3)
    assert all(bits_equal(p, q) for p, q in zip(net.parameters(), pair[0].parameters(), strict=True))
    assert pair[1]._own == optimizer._own
    assert pair[1]._step_supports_amp_scaling


@classes
def test_public_attributes_survive_a_deepcopy(row):
    optimizer = row.cls(model().parameters(), **row.kwargs)
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    assert public == {"defaults", "param_groups", "state"}


def scaled(net, optimizer, scaler, i, overflow=False):
    torch.manual_seed(i)
    net.zero_grad()
    scaler.scale(net(torch.randn(11, 5)).square().mean()).backward()
    if overflow:
        net[0].weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()


@rows
def test_loss_scaling_is_undone_in_the_pass_and_an_overflow_changes_nothing(row):
    ours, theirs = model(), model()
    a = row.cls(ours.parameters(), **row.kwargs, fused=True)
    b = row.cls(theirs.parameters(), **row.kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(a.state_dict())
    scaled(ours, a, scaler, 0, overflow=True)
    torch.testing.assert_close(a.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert_close(ours, model())
    for i in range(4):
        scaled(ours, a, scaler, i)
        backward(theirs, i)
        b.step()
        before = [p.detach().clone() for p in ours.parameters()]
        state = copy.deepcopy(a.state_dict()["state"])
        scaled(ours, a, scaler, i, overflow=True)
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), before, strict=True))
        for key, values in a.state_dict()["state"].items():
            assert all(torch.equal(value, state[key][name]) for name, value in values.items())
    # 1 / scale is a power of two, so unscaling inside the pass is exact.
    assert all(bits_equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_first_sgd_step_that_overflows_leaves_no_momentum_behind():
    """torch's fused SGD keeps uninitialised momentum then, and the next step drives parameters to 1e25."""
    net = model()
    optimizer = precond.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaled(net, optimizer, scaler, 0, overflow=True)
    scaled(net, optimizer, scaler, 1)
    assert max(p.abs().max().item() for p in net.parameters()) < 10


@classes
def test_without_fused_the_scaler_does_its_own_work(row):
    optimizer = row.cls(model().parameters(), **row.kwargs)
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


#: Values of options, and the kinds in which configuration files, arrays and schedulers hand them over.
VALUES = dict(
    lr=0.25, betas=(0.5, 0.75), eps=0.125, weight_decay=0.25, momentum=0.5, lr_decay=0.25, initial_accumulator_value=0.5,
    alpha=0.5, momentum_decay=0.25, rho=0.5, ns_coefficients=(3.5, -4.75, 2.0), dampening=0.0,
)  # fmt: skip
NUMBERS = {
    "int": int, "float64": np.float64, "float32": np.float32, "array": np.array, "array of one": lambda v: np.array([v]),
    "fraction": fractions.Fraction, "tensor": torch.tensor, "tensor of one": lambda v: torch.tensor([[v]]),
    "double tensor": lambda v: torch.tensor(v, dtype=torch.float64), "parameter": lambda v: torch.nn.Parameter(torch.tensor(v)),
}  # fmt: skip
SEQUENCES = {
    "list": list, "list of a configuration": collections.UserList, "deque": collections.deque, "array": np.array,
    "tensor": torch.tensor, "float32 array": lambda v: np.array(v, np.float32), "tensors": lambda v: [*map(torch.tensor, v)],
    "tensors of one": lambda v: [torch.tensor([x]) for x in v], "iterator": iter,
}  # fmt: skip
#: Options, each of some of torch's classes; the others ignore it in a group.
FLAGS = ("fused", "foreach", "capturable", "differentiable", "amsgrad", "nesterov", "centered", "decoupled_weight_decay",
         "dampening", "lr_decay", "another library's")  # fmt: skip
TORCHS = [(row.cls, row.peer) for row in DROP_INS] + [(precond.Muon, torch.optim.Muon)]
torchs = pytest.mark.parametrize(("ours", "theirs"), TORCHS, ids=lambda cls: cls.__name__)


def after_two_steps(cls, options, in_group=False):
    """The weight after two steps, or what was raised instead of one."""
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(4, 3, generator=generator))
    try:
        optimizer = cls([{"params": [w], **options}]) if in_group else cls([w], **options)
        for _ in range(2):
            w.grad = torch.randn(4, 3, generator=generator)
            optimizer.step()
    except (TypeError, ValueError, RuntimeError, AssertionError, Warning) as error:
        return error
    return w.detach()


def close(cls, a, b):
    # Muon's products of bfloat16 differ from torch's in the order of their sums.
    return torch.allclose(a, b, rtol=1e-4, atol=2e-2 if cls is precond.Muon else 1e-5)


@torchs
@pytest.mark.parametrize("in_group", [False, True])
def test_an_option_is_taken_in_every_kind_that_torch_takes(ours, theirs, in_group):
    taken = 0
    for name in VALUES.keys() & inspect.signature(theirs.__init__).parameters.keys():
        value = VALUES[name]
        plain = after_two_steps(ours, {name: value}, in_group)
        for kind, convert in (SEQUENCES if isinstance(value, tuple) else NUMBERS).items():
            expected = after_two_steps(theirs, {name: convert(value)}, in_group)
            if isinstance(expected, Exception):
                continue
            found = after_two_steps(ours, {name: convert(value)}, in_group)
            assert isinstance(found, torch.Tensor), (name, kind, found)
            # An Adagrad of torch ignores its initial value in a group.
            assert close(ours, found, plain if in_group and kind != "int" else expected), (name, kind)
            taken += 1
    assert taken >= 15


@torchs
def test_an_option_of_a_group_that_torchs_class_ignores_is_ignored(ours, theirs):
    plain = after_two_steps(ours, {})
    for name in FLAGS:
        expected = after_two_steps(theirs, {name: True}, in_group=True)
        if isinstance(expected, Exception):
            assert name in inspect.signature(theirs.__init__).parameters
            continue
        found = after_two_steps(ours, {name: True}, in_group=True)
        assert isinstance(found, torch.Tensor), (name, found)
        assert close(ours, found, expected), name
        if name not in inspect.signature(theirs.__init__).parameters:
            assert bits_equal(found, plain), name


@pytest.mark.parametrize("cls", [precond.SOAP, precond.DualDescent, precond.GaussNewton, precond.Sophia, precond.Lion])
@pytest.mark.parametrize("name", ["fused", "foreach", "capturable", "another library's"])
def test_a_class_that_torch_does_not_have_ignores_them_too(cls, name):
    """torchtitan sets fused and foreach in every group, whatever the class."""
    kwargs = {"clip": 0.05} if cls is precond.GaussNewton else {}
    w, u = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    a, b = cls([{"params": [w], name: True}], **kwargs), cls([u], **kwargs)
    for _ in range(2):
        w.grad = u.grad = torch.eye(4)
        a.step()
        b.step()
    assert bits_equal(w.detach(), u.detach())


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.9, 0.9), 0.9, None, {"a": 0.9, "b": 0.9}])
@pytest.mark.parametrize(
    "cls", [precond.AdamW, precond.NAdam, precond.RAdam, precond.Adamax, precond.Lion, precond.SOAP]
)
def test_betas_that_are_no_pair_are_an_error(cls, betas):
    with pytest.raises(ValueError, match="betas must be a pair of numbers, got"):
        cls([torch.nn.Parameter(torch.ones(2, 2))], betas=betas)


def test_own_options_stay_out_of_plain_groups():
    p = torch.nn.Parameter(torch.zeros(1))
    assert set(precond.AdamW([p]).param_groups[0]) == set(torch.optim.AdamW([p]).param_groups[0])
    assert set(precond.SGD([p]).param_groups[0]) == set(torch.optim.SGD([p]).param_groups[0])
    group = precond.AdamW([{"params": [p], "l1_decay": 0.3}]).param_groups[0]
    assert group["l1_decay"] == 0.3
    assert precond.AdamW([p], l1_decay=0.2, state_format="fp32").param_groups[0]["state_format"] == "fp32"


def test_a_bf16_second_moment_that_cannot_decay_warns_once():
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.warns(precond.PrecisionWarning, match="state_format='fp32'") as caught:
        precond.AdamW(params).step()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precond.AdamW(params, betas=(0.9, 0.99)).step()
        optimizer = precond.AdamW(params, state_format="fp32")
        optimizer.step()
    assert optimizer.state[params[0]]["exp_avg_sq"].dtype == torch.float32
