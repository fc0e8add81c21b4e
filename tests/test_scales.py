"""``lr_scale``, ``decay_scale`` and ``decoupled`` of groups: the numbers of an optimizer that was given scaled ones by hand.

Over 400 lines: all of it compares with the same scaling by hand.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from families import OPTIMIZERS
from support.cases import bits_equal
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

import precond
from precond._wrappers.decays import coupled_decays

KRONECKER = dict(lr=0.01, clip=1.0, curvature="gradient", basis="kronecker", basis_frequency=2, weight_decay=0.1)
#: Class and arguments: the table, and the methods of several passes in each way to step.
METHODS = [
    *(pytest.param(row.cls, row.kwargs, id=str(row)) for row in OPTIMIZERS),
    *(
        pytest.param(cls, kwargs, id=f"{cls.__name__}-{i}")
        for i, (cls, kwargs) in enumerate(
            [
                (precond.Muon, dict(lr=0.02)),
                (precond.SOAP, dict(lr=0.01, precondition_frequency=2)),
                (precond.SOAP, dict(lr=0.01, precondition_frequency=2, l1_decay=0.1)),
                (precond.GaussNewton, KRONECKER),
                (precond.GaussNewton, KRONECKER | dict(l1_decay=0.1)),
                (precond.Sophia, dict(lr=0.01)),
                *(
                    (precond.DualDescent, dict(lr=0.1, weight_decay=0.1, momentum=0.9, granularity=granularity))
                    for granularity in ("entry", "unit", "tensor", "global", "spectral")
                ),
            ]
        )
    ),
]
methods = pytest.mark.parametrize(("cls", "kwargs"), METHODS)
SCALES = dict(lr_scale=0.65, decay_scale=1.7)


def twins(shapes=((6, 4), (4, 4), (8, 3))):
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in shapes]
    return [[torch.nn.Parameter(v.clone()) for v in values] for _ in range(2)]


def defaults(cls, kwargs):
    """A group's options, also those that the class gives it."""
    return dict(cls([torch.nn.Parameter(torch.zeros(2, 2))], **kwargs).param_groups[0])


def by_hand(cls, kwargs, lr_scale=1.0, decay_scale=1.0):
    """Scaled options."""
    group = defaults(cls, kwargs)
    scaled = {"lr": group["lr"] * lr_scale, "weight_decay": group["weight_decay"] * decay_scale}
    return scaled | ({"l1_decay": group["l1_decay"] * decay_scale} if "l1_decay" in group else {})


def steps(ours, theirs, a, b, n=4, after=None):
    for i in range(n):
        torch.manual_seed(i)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        if after is not None:
            after()
    assert all(bits_equal(p, q) for p, q in zip(ours, theirs, strict=True))


@methods
@pytest.mark.parametrize("scales", [SCALES, dict(lr_scale=0.65, decay_scale=0.0)], ids=["scaled", "no decay"])
def test_scales_are_those_of_numbers_scaled_by_hand(cls, kwargs, scales):
    ours, theirs = twins()
    a = cls([dict(params=ours[:2], **scales), dict(params=ours[2:])], **kwargs)
    b = cls([dict(params=theirs[:2], **by_hand(cls, kwargs, **scales)), dict(params=theirs[2:])], **kwargs)
    steps(ours, theirs, a, b)
    assert a.param_groups[0]["lr"] == a.param_groups[1]["lr"]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_other_backends_take_scaled_numbers(backend, triton_interpreter):
    ours, theirs = twins()
    kwargs = dict(lr=0.05, weight_decay=0.1, backend=backend)
    a = precond.AdamW([dict(params=ours, **SCALES)], **kwargs)
    b = precond.AdamW([dict(params=theirs, **by_hand(precond.AdamW, kwargs, **SCALES))], **kwargs)
    steps(ours, theirs, a, b)


def test_groups_of_grouped_have_scales():
    ours, theirs = twins()
    given = [
        (precond.Muon, dict(lr=0.02), dict(lr_scale=0.5)),
        (precond.AdamW, dict(lr=0.01, l1_decay=0.1), SCALES),
        (precond.SOAP, dict(lr=0.01, precondition_frequency=2), SCALES),
    ]
    a = precond.Grouped([
        dict(params=[p], optimizer=cls, **kwargs, **scales)
        for p, (cls, kwargs, scales) in zip(ours, given, strict=True)
    ])  # fmt: skip
    b = precond.Grouped([
        dict(params=[q], optimizer=cls, **(kwargs | by_hand(cls, kwargs, **scales)))
        for q, (cls, kwargs, scales) in zip(theirs, given, strict=True)
    ])  # fmt: skip
    steps(ours, theirs, a, b)


def test_wrappers_see_scaled_numbers():
    ours, theirs = twins()
    kwargs = dict(lr=0.05, weight_decay=0.1)
    a = precond.FOP(
        precond.SGD([dict(params=ours, **SCALES)], **kwargs), 0.1, mode="output", normalize=None, compose="gradient"
    )
    b = precond.FOP(
        precond.SGD([dict(params=theirs, **by_hand(precond.SGD, kwargs, **SCALES))], **kwargs),
        0.1,
        mode="output",
        normalize=None,
        compose="gradient",
    )
    steps(ours, theirs, a, b)
    # BNP takes the coupled decay from here. torch's classes do not know the options, and ours of intrinsic decay have none.
    assert set(coupled_decays(a).values()) == {0.1 * 1.7}
    stock = torch.optim.SGD([dict(params=ours, **SCALES)], **kwargs)
    assert set(coupled_decays(stock).values()) == {0.1}
    assert coupled_decays(precond.AdamW(ours)) == {}


def test_a_group_of_scale_0_does_not_move():
    ours, _ = twins()
    before = [p.detach().clone() for p in ours]
    optimizer = precond.AdamW([dict(params=ours[:2], lr_scale=0.0, decoupled="independent"), dict(params=ours[2:])])
    for p in ours:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [torch.equal(p, q) for p, q in zip(ours, before, strict=True)] == [True, True, False]
    # A step without a curvature is one of an unknown length, but not of a group that does not move.
    precond.GaussNewton([dict(params=ours, lr_scale=0.0)]).step()
    with pytest.raises(RuntimeError, match="update_curvature must be called"):
        precond.GaussNewton([dict(params=ours, lr_scale=0.5)]).step()


INTRINSIC = [
    (precond.AdamW, {}),
    (precond.Adam, dict(decoupled_weight_decay=True)),
    (precond.SGDW, dict(momentum=0.9)),
    (precond.Lion, dict(lr=1e-3)),
    (precond.Muon, dict(adjust_lr_fn="match_rms_adamw")),
    (precond.SOAP, {}),
    (precond.GaussNewton, KRONECKER),
    (precond.DualDescent, {}),
]


@pytest.mark.parametrize(("cls", "kwargs"), INTRINSIC, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("lr_scale", [1.0, 0.3])
def test_an_independent_decay_is_a_share_of_the_weight(cls, kwargs, lr_scale):
    """Without gradients a step only decays: p (1 - wd decay_scale lr / lr_max), whatever lr_max and lr_scale are."""
    (ours, _), wd = twins(), 0.1
    before = [p.detach().clone() for p in ours]
    group = dict(params=ours, lr_scale=lr_scale, decay_scale=0.5, decoupled="independent")
    optimizer = cls([group], **kwargs | dict(weight_decay=wd))
    lr_max = optimizer.param_groups[0]["lr"]
    factor = 1.0
    for share in (0.0, 0.25, 1.0, 0.5):
        optimizer.param_groups[0]["lr"] = lr_max * share
        for p in ours:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        # SOAP's first step, but for one at lr 0, only makes its bases.
        factor *= 1.0 - 0.5 * wd * share * (cls is not precond.SOAP or share != 0.25)
    for p, q in zip(ours, before, strict=True):
        torch.testing.assert_close(p.detach(), q * factor, rtol=1e-6, atol=0.0)


SCHEDULERS = {
    "warm-up": (lambda opt: lr_scheduler.LambdaLR(opt, lambda i: min(1.0, (i + 1) / 3)), 0.05),
    "one cycle": (lambda opt: lr_scheduler.OneCycleLR(opt, 0.4, total_steps=8, cycle_momentum=False), 0.4),
    "cyclic": (lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.2, 2, cycle_momentum=False), 0.2),
}


@pytest.mark.parametrize("name", [*SCHEDULERS])
@pytest.mark.parametrize("l1_form", ["proximal", "subgradient"])
def test_a_schedule_has_its_largest_lr_from_the_scheduler(name, l1_form):
    """A decay of wd / lr_max that follows lr; the groups of CyclicLR, which keeps the smallest lr there, say lr_max."""
    ours, theirs = twins()
    make, lr_max = SCHEDULERS[name]
    own = dict(lr_max=lr_max) if name == "cyclic" else {}
    a = precond.AdamW(
        [dict(params=ours, decoupled="independent", **own)], lr=0.05, weight_decay=0.1, l1_decay=0.02, l1_form=l1_form
    )
    factor = 1.0 / lr_max
    b = precond.AdamW(theirs, lr=0.05, weight_decay=0.1 * factor, l1_decay=0.02 * factor, l1_form=l1_form)
    schedulers = make(a), make(b)
    steps(ours, theirs, a, b, n=7, after=lambda: [scheduler.step() for scheduler in schedulers])


def test_an_independent_decay_needs_to_know_the_largest_lr():
    w = torch.nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    optimizer = precond.AdamW([w])
    optimizer.param_groups[0]["decoupled"] = "independent"
    with pytest.raises(ValueError, match=r"lr_max must be given with decoupled='independent' .* got None"):
        optimizer.step()
    optimizer = precond.AdamW([dict(params=[w], decoupled="independent")], lr=0.0)
    with pytest.raises(ValueError, match=r"lr_max must be a finite number > 0 .* got 0\.0 from added_lr"):
        optimizer.step()
    optimizer.add_param_group(dict(params=[torch.nn.Parameter(w.detach().clone())], lr=0.5, decoupled="independent"))
    assert optimizer.param_groups[1]["added_lr"] == 0.5
    assert torch.equal(w, torch.ones(2))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (precond.Adam, dict(lr_scale=-0.5), r"lr_scale must be a finite number >= 0, got -0\.5"),
        (precond.Muon, dict(lr_scale=math.nan), "lr_scale must be a finite number >= 0, got nan"),
        (precond.SGD, dict(lr_scale=torch.tensor(0.5)), r"lr_scale must be a finite number >= 0, got tensor\(0\.5"),
        (precond.SOAP, dict(decay_scale=math.inf), "decay_scale must be a finite number >= 0, got inf"),
        (precond.AdamW, dict(decay_scale="2"), "decay_scale must be a finite number >= 0, got '2'"),
        (precond.AdamW, dict(decoupled=True), "decoupled must be 'lr' or 'independent', got True"),
        (precond.Adam, dict(decoupled="lr"), "Adam must have no decoupled in a group, .* part of the gradient, got 'lr'"),
        (precond.SGD, dict(decoupled="independent"), "SGD must have no decoupled in a group, .* got 'independent'"),
        (precond.Lion, dict(decoupled="independent", lr_max=0), "lr_max must be None or a finite number > 0, got 0"),
    ],
)  # fmt: skip
def test_an_option_out_of_range_is_an_error_when_added_and_at_the_step(cls, options, message):
    w = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=message):
        cls([dict(params=[w], **options)])
    with pytest.raises(ValueError, match=message):
        precond.Grouped([dict(params=[w], optimizer=cls, **options)])
    if isinstance(options.get("lr_scale", 1.0), float):
        optimizer = cls([w])
        optimizer.param_groups[0].update(options)
        w.grad = torch.ones(2, 2)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert torch.equal(w, torch.ones(2, 2))


def as_timm(optimizer, value):
    """What timm's schedulers do with the lr of each group: from their constructor on, and at every update."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = value(group["initial_lr"]) * group.get("lr_scale", 1.0)


def layered(lrs=(0.1, 0.1, 0.1)):
    """Layer-wise decay by factors of 0.75."""
    params, _ = twins()
    for p in params:
        p.grad = torch.ones_like(p)
    groups = [
        dict(params=[p], lr=lr, lr_scale=0.75 ** (2 - i)) for i, (p, lr) in enumerate(zip(params, lrs, strict=True))
    ]
    return params, precond.AdamW(groups)


@pytest.mark.parametrize("lrs", [(0.1, 0.1, 0.1), (0.1, 0.2, 0.03)], ids=["one lr", "several"])
def test_a_scale_that_lr_already_has_is_warned_of_once(lrs):
    _, optimizer = layered(lrs)
    as_timm(optimizer, lambda lr: 0.0)  # a warm-up that begins at 0, which tells nothing
    optimizer.step()
    as_timm(optimizer, lambda lr: 0.37 * lr)
    with pytest.warns(UserWarning, match="lr_scale seems to be in lr already, and would be applied twice: lr is"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_scale_that_a_group_was_given_stays_there():
    """Loops of others read it from every group, also where it is 1."""
    group = precond.AdamW([dict(params=[torch.nn.Parameter(torch.ones(2))], lr_scale=1.0)]).param_groups[0]
    assert group["lr_scale"] == 1.0


def test_an_lr_above_lr_max_is_an_error():
    """The decay would be above what it was said to be at most."""
    w = torch.nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    optimizer = precond.AdamW([dict(params=[w], decoupled="independent", lr_max=0.1)], lr=0.2)
    with pytest.raises(ValueError, match=r"lr must be at most lr_max with decoupled='independent', got 0\.2 > 0\.1"):
        optimizer.step()


def test_a_schedule_that_comes_to_the_ratio_of_the_scales_later_is_none():
    _, optimizer = layered()
    optimizer.step()
    as_timm(optimizer, lambda lr: lr)
    optimizer.step()


def test_a_tensor_lr_stays_where_it_is():
    """On a device it is read there; a graph of autograd goes through it."""
    ours, theirs = twins()
    lr = torch.tensor(0.05)
    a = precond.AdamW([dict(params=ours, decoupled="independent", lr_max=0.2, **SCALES)], lr=lr, weight_decay=0.1)
    b = precond.AdamW(theirs, lr=1.0, weight_decay=0.1 * (1.7 / (0.2 * 0.65)))

    def change():
        lr.mul_(1.25)
        b.param_groups[0]["lr"] = lr.item() * 0.65

    b.param_groups[0]["lr"] = lr.item() * 0.65
    steps(ours, theirs, a, b, after=change)
    assert a.param_groups[0]["lr"] is lr

    slopes = []
    for lr_scale in (1.0, 0.5):
        lr = torch.tensor(0.1, requires_grad=True)
        w = torch.nn.Parameter(torch.ones(3))
        optimizer = precond.SGD([dict(params=[w], lr_scale=lr_scale)], lr=lr, differentiable=True)
        moved = w.clone()
        optimizer.param_groups[0]["params"][0] = moved
        moved.grad = torch.ones(3)
        optimizer.step()
        slopes.append(torch.autograd.grad(moved.sum(), lr)[0].item())
    assert slopes == [-3.0, -1.5]


OPTIONS = dict(lr_scale=0.65, decay_scale=1.7, decoupled="independent")


def loaded(optimizer):
    """By a fresh optimizer of other options."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = precond.AdamW([dict(params=p) for p in twins()[0]], lr=7.0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer)), loaded])
def test_options_go_into_copies_and_checkpoints(way):
    params, _ = twins()
    first = precond.AdamW([dict(params=[params[0]], **OPTIONS), dict(params=params[1]), dict(params=params[2])])
    first.param_groups[0]["lr"] = 1e-4
    for p in params:
        p.grad = torch.ones_like(p)
    first.step()
    second = way(first)
    kept = {**OPTIONS, "added_lr": 1e-3}
    expected = [kept, {}, {}]
    found = [{name: group[name] for name in (*kept, "lr_max") if name in group} for group in second.param_groups]
    assert found == expected
    ours = [group["params"][0] for group in second.param_groups]
    with torch.no_grad():
        for p, q in zip(ours, params, strict=True):
            p.copy_(q)
    steps(ours, params, second, first)


def test_a_checkpoint_without_the_options_leaves_them_and_torch_takes_one_that_has_them():
    params, _ = twins()
    ours, theirs = precond.AdamW([dict(params=params, **OPTIONS)]), torch.optim.AdamW(params, lr=0.5)
    ours.load_state_dict(theirs.state_dict())
    assert {name: ours.param_groups[0][name] for name in OPTIONS} == OPTIONS
    assert (ours.param_groups[0]["lr"], ours.param_groups[0]["added_lr"]) == (0.5, 1e-3)
    theirs.load_state_dict(ours.state_dict())
    for p in params:
        p.grad = torch.ones_like(p)
    theirs.step()
    assert not OPTIONS.keys() & precond.to_torch_state_dict(ours)["param_groups"][0].keys()


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_have_the_options(flat):
    def start():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        groups = [dict(params=net[0].parameters(), **OPTIONS), dict(params=net[1].parameters(), decay_scale=0.5)]
        return net, precond.AdamW(groups)

    def train(net, optimizer):
        optimizer.zero_grad()
        net(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()

    (net, optimizer), (other, resumed) = start(), start()
    train(net, optimizer)
    optimizer.param_groups[0]["lr"] = 1e-4
    form = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=form))
    other.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other, resumed, saved, options=form)
    train(net, optimizer)
    train(other, resumed)
    assert all(bits_equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_what_is_at_its_default_is_in_no_group():
    w = torch.nn.Parameter(torch.ones(2))
    plain = {"decoupled": "lr", "lr_max": None}
    assert (
        precond.AdamW([dict(params=[w], **plain)]).param_groups[0].keys()
        == torch.optim.AdamW([w]).param_groups[0].keys()
    )
