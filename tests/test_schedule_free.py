"""ScheduleFreeAdamW and ScheduleFreeSGD: the numbers of the package ``schedulefree``, and parameters that are y in training, x in
evaluation, and y again bit for bit.

Over 400 lines: all of it is two classes of one rule, against the same package.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.cases import BACKEND, bits_equal
from support.ranks import on_two_ranks

import precond
from precond._core.swapped import Swapped

pytestmark = pytest.mark.usefixtures("triton_interpreter")
backends = pytest.mark.parametrize("backend", [BACKEND, "triton", "reference"])
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ADAMW, SGD = precond.ScheduleFreeAdamW, precond.ScheduleFreeSGD
classes = pytest.mark.parametrize("cls", [ADAMW, SGD])
LR = {ADAMW: 0.01, SGD: 0.1}
SHAPES = ((64, 64), (300,), ())
#: Dtype of the parameters, and their formats.
FORMATS = [
    (F32, {}),
    (F64, {}),
    (torch.complex64, {}),
    (BF16, dict(state_format="fp32")),
    (F16, dict(state_format="fp32")),
    (F32, dict(state_format="bf16")),
    *(
        (dtype, dict(weight_format=weight_format, state_format=state_format))
        for dtype in (BF16, F16)
        for weight_format in ("stochastic", "split24", "split32")
        for state_format in ("fp32", "int8", "int4")
    ),
]
every_format = pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=str)


def params_of(dtype=F32, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.ParameterList(
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes
    )


def step(optimizer, params, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) + 0.1 * p.detach()
        optimizer.step()


def made(cls, params, **options):
    return cls(params, **{"lr": LR[cls], "weight_decay": 0.1, "warmup_steps": 5, "backend": BACKEND} | options)


def copies(params):
    return [p.detach().clone() for p in params]


def states_of(optimizer, params):
    """Everything that training goes on from."""
    return [
        t.detach().clone()
        for p in params
        for t in (p, *(v for k, v in sorted(optimizer.state[p].items()) if isinstance(v, torch.Tensor)))
    ]


def same(found, expected):
    return len(found) == len(expected) and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.dim() else torch.equal(a, b)
        for a, b in zip(found, expected, strict=True)
    )


# The numbers.

SCHEDULES = [
    {},
    dict(warmup_steps=50, weight_decay=0.1),
    dict(r=1.0, weight_lr_power=0.0),
    dict(warmup_steps=30, r=0.5, weight_lr_power=1.3, weight_decay=0.01),
]


@pytest.fixture
def package():
    import schedulefree  # one of the tools that tests need: where it is missing they fail

    return schedulefree


def beside_the_package(package, cls, dtype, foreach, options, backend):
    """Ours and theirs over 200 steps, with an evaluation now and then; the largest differences of y, z and x."""
    theirs_cls = {ADAMW: package.AdamWScheduleFree, SGD: package.SGDScheduleFree}[cls]
    ours, theirs = params_of(dtype), params_of(dtype)
    a = cls(ours, lr=LR[cls], **options, backend=backend)
    b = theirs_cls(theirs, lr=LR[cls], **options, foreach=foreach)
    b.train()
    worst = {"y": 0.0, "z": 0.0, "x": 0.0}

    def compare(what, found, expected):
        for p, q in zip(found, expected, strict=True):
            worst[what] = max(worst[what], ((p - q).abs() / (1.0 + q.abs())).max().item())

    for i in range(200):
        generator = torch.Generator().manual_seed(i)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype) + 0.1 * p.detach()
            q.grad = p.grad.clone()  # theirs writes it
        a.step()
        b.step()
        if i % 40 == 20 or i == 199:
            compare("y", ours, theirs)
            compare("z", *([o.state[p]["z"] for p in ps] for o, ps in ((a, ours), (b, theirs))))
            a.eval()
            b.eval()
            compare("x", ours, theirs)
            a.train()
            b.train()
    weight_sum = a.state[ours[0]]["weight_sum"]
    assert weight_sum.dtype == F64
    assert float(weight_sum) == pytest.approx(b.param_groups[0]["weight_sum"], rel=1e-6)
    return worst


@classes
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_the_reference_has_the_packages_numbers_in_float64(package, cls, foreach, options):
    worst = beside_the_package(package, cls, F64, foreach, options, "reference")
    assert max(worst.values()) < 1e-13, worst


@classes
@pytest.mark.parametrize("backend", [BACKEND, "reference"])
@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_every_backend_has_the_packages_numbers_in_float32(package, cls, backend, options):
    worst = beside_the_package(package, cls, F32, False, options, backend)
    assert max(worst.values()) < 5e-6, worst


@classes
def test_a_learning_rate_that_a_scheduler_changes_counts_as_in_the_package(package, cls):
    """The weights have the largest so far."""
    theirs_cls = {ADAMW: package.AdamWScheduleFree, SGD: package.SGDScheduleFree}[cls]
    ours, theirs = params_of(F64), params_of(F64)
    a, b = cls(ours, lr=LR[cls], warmup_steps=4), theirs_cls(theirs, lr=LR[cls], warmup_steps=4)
    b.train()
    for i in range(20):
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"] = LR[cls] * (0.0 if i == 0 else 1.0 + 0.5 * (i % 7 if i > 5 else i / 5))
        step(a, ours, [i])
        step(b, theirs, [i])
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)
    assert a.param_groups[0]["lr_max"] == b.param_groups[0]["lr_max"]


@classes
def test_a_tensor_lr_gives_the_bits_of_a_number(cls):
    ours, others = params_of(), params_of()
    a, b = made(cls, ours, lr=torch.tensor(LR[cls])), made(cls, others, lr=float(torch.tensor(LR[cls])))
    step(a, ours, range(5))
    step(b, others, range(5))
    assert same(copies(ours), copies(others))


@classes
@backends
def test_a_first_step_that_is_skipped_leaves_nothing(cls, backend):
    """z starts at the first step that happens."""
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 700)) for _ in range(2))
    a = cls([p], lr=LR[cls], fused=True, max_grad_norm=1e3, nonfinite="skip", backend=backend)
    b = cls([q], lr=LR[cls], max_grad_norm=1e3, backend=backend)
    for i in range(3):
        p.grad = torch.full_like(p, torch.nan)
        a.step()
        step(a, [p], [i])
        step(b, [q], [i])
        assert bits_equal(p.detach(), q.detach())
        assert bits_equal(a.state[p]["z"], b.state[q]["z"])
    assert a.skipped_steps == 3


@classes
def test_x_is_the_weighted_average_of_z(cls):
    """By the paper's own recursion, with x kept apart."""
    (p,) = params = params_of(F64, shapes=((50,),))
    optimizer = cls(params, lr=LR[cls], warmup_steps=3, r=1.0)
    x, weights = p.detach().clone(), 0.0
    for i in range(10):
        step(optimizer, params, [i])
        weight = (i + 1) * (LR[cls] * min(1.0, (i + 1) / 3)) ** 2
        weights += weight
        x += weight / weights * (optimizer.state[p]["z"] - x)
    y = p.detach().clone()
    torch.testing.assert_close(y, 0.1 * optimizer.state[p]["z"] + 0.9 * x, rtol=1e-12, atol=1e-13)
    optimizer.eval()
    torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-13)


# The modes.


@classes
@every_format
def test_y_comes_back_bit_for_bit_and_training_goes_on_as_if_nothing_was(cls, dtype, options):
    ours, others = params_of(dtype), params_of(dtype)
    backend = "reference" if dtype == F64 else BACKEND
    a, b = (made(cls, ps, **options, backend=backend) for ps in (ours, others))
    for i in range(4):
        step(a, ours, [2 * i, 2 * i + 1])
        step(b, others, [2 * i, 2 * i + 1])
        before = states_of(a, ours)
        a.eval()
        assert not any(bits_equal(p.detach(), q.detach()) for p, q in zip(ours[:2], others[:2], strict=True))
        a.eval()  # changes nothing
        a.state_dict()
        a.train()
        assert same(states_of(a, ours), before)
        a.train()
    assert same(states_of(a, ours), states_of(b, others))
    assert not any(key.startswith("y") for p in ours for key in a.state[p])


@classes
@every_format
def test_the_weights_of_evaluation_are_x(cls, dtype, options):
    """Of the master of a split weight, and with a remainder of their own."""
    params = params_of(dtype)
    backend = "reference" if dtype == F64 else BACKEND
    optimizer = made(cls, params, **options, backend=backend)
    step(optimizer, params, range(6))
    masters = precond.master_weights(optimizer, params)
    z = [optimizer.state[p]["z"] for p in params]
    optimizer.eval()
    shown = precond.master_weights(optimizer, params)
    ulp = {"split24": 2.0**-15, "split32": 2.0**-21}.get(options.get("weight_format"))
    for i, p in enumerate(params):
        y = masters[str(i)]
        x = y + (1 - 1 / 0.9) * (z[i] - y)
        torch.testing.assert_close(p.detach(), x.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        if ulp:
            torch.testing.assert_close(shown[str(i)], x, rtol=ulp, atol=ulp)


@classes
@pytest.mark.parametrize("weight_format", [None, "split24", "split32"])
def test_weights_that_somebody_wrote_in_evaluation_are_a_new_x(cls, weight_format):
    params = params_of(BF16 if weight_format else F32)
    optimizer = made(cls, params, weight_format=weight_format, state_format="fp32")
    step(optimizer, params, range(4))
    before = copies(params)
    optimizer.eval()
    with torch.no_grad():
        params[0].fill_(0.5)
    optimizer.train()
    z = optimizer.state[params[0]]["z"]
    y = precond.master_weights(optimizer, params)["0"]
    torch.testing.assert_close(y, 0.9 * torch.full_like(z, 0.5) + 0.1 * z, rtol=2.0**-14, atol=1e-6)
    assert same(copies(params[1:]), before[1:])
    step(optimizer, params, [9])
    assert all(p.isfinite().all() for p in params)


@classes
def test_a_step_in_evaluation_raises_and_changes_nothing(cls):
    params = params_of()
    optimizer = made(cls, params)
    step(optimizer, params, range(2))
    optimizer.eval()
    before = states_of(optimizer, params)
    with pytest.raises(RuntimeError, match=rf"{cls.__name__} must be in train mode for a step.*call train\(\)"):
        step(optimizer, params, [2])
    assert same(states_of(optimizer, params), before)


@classes
def test_before_the_first_step_both_modes_are_the_same(cls):
    params = params_of()
    optimizer = made(cls, params)
    before = copies(params)
    optimizer.eval()
    assert same(copies(params), before)
    with pytest.raises(RuntimeError, match="must be in train mode"):
        step(optimizer, params, [0])
    optimizer.train()
    assert same(copies(params), before)
    assert not optimizer.state


@classes
def test_parameters_without_a_gradient_and_groups_that_come_later_take_part(cls):
    params = params_of()
    optimizer = made(cls, [params[0], params[1]])
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    optimizer.eval()
    optimizer.add_param_group({"params": [params[2]]})
    assert not optimizer.param_groups[1]["train_mode"]
    before = copies(params[1:])
    optimizer.train()
    assert same(copies(params[1:]), before)
    step(optimizer, params, [0, 1])
    y = copies(params)
    optimizer.eval()
    assert not any(torch.equal(p, q) for p, q in zip(params, y, strict=True))
    optimizer.train()
    assert same(copies(params), y)


@classes
def test_states_that_no_step_has_made_have_no_x(cls):
    """torch.distributed.checkpoint makes them by a step at lr 0 on zeros."""
    params = params_of()
    optimizer = made(cls, params)
    for p in params:
        p.grad = torch.zeros_like(p)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = rate
    assert all(optimizer.state[p]["step"] == 0 for p in params)
    before = copies(params)
    optimizer.eval()
    assert same(copies(params), before)
    optimizer.train()
    twins = params_of()
    other = made(cls, twins)
    step(optimizer, params, range(3))
    step(other, twins, range(3))
    assert same(copies(params), copies(twins))


@classes
def test_modes_may_change_in_inference_mode(cls):
    params = params_of()
    optimizer = made(cls, params)
    step(optimizer, params, range(3))
    y = copies(params)
    with torch.inference_mode():
        optimizer.eval()
    assert not same(copies(params), y)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    optimizer.train()
    assert same(copies(params), y)
    step(optimizer, params, [3])


# Checkpoints.


def reloaded(optimizer, how):
    if how == "deepcopy":
        return copy.deepcopy(optimizer.state_dict())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@classes
@every_format
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("model", ["before", "after"])
def test_a_checkpoint_of_either_mode_goes_on_bit_for_bit(cls, dtype, options, mode, model):
    """The weights of a model may come before or after the optimizer's states."""
    backend = "reference" if dtype == F64 else BACKEND
    ours, others = params_of(dtype), params_of(dtype, seed=9)
    a, b = (made(cls, ps, **options, backend=backend) for ps in (ours, others))
    step(a, ours, range(3))
    getattr(a, mode)()
    weights, saved = copy.deepcopy(ours.state_dict()), reloaded(a, "save")
    assert saved["param_groups"][0]["train_mode"] == (mode == "train")
    if model == "before":
        others.load_state_dict(weights)
    b.load_state_dict(saved)
    if model == "after":
        others.load_state_dict(weights)
    for optimizer in (a, b):
        optimizer.train()
    assert same(states_of(b, others), states_of(a, ours))
    for optimizer, params in ((a, ours), (b, others)):
        step(optimizer, params, range(3, 6))
        optimizer.eval()
    assert same(states_of(b, others), states_of(a, ours))


@classes
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("weight_format", [None, "split24"])
def test_copies_of_either_mode_go_on_as_the_original(cls, how, mode, weight_format):
    params = params_of(BF16 if weight_format else F32)
    optimizer = made(cls, params, weight_format=weight_format, state_format="fp32")
    step(optimizer, params, range(3))
    getattr(optimizer, mode)()
    pair = (params, optimizer)
    twins, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for o in (optimizer, twin):
        o.train()
    step(optimizer, params, [3])
    step(twin, twins, [3])
    assert same(states_of(twin, twins), states_of(optimizer, params))


@classes
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_checkpoints_of_the_package_are_taken(package, cls, mode):
    theirs_cls = {ADAMW: package.AdamWScheduleFree, SGD: package.SGDScheduleFree}[cls]
    theirs = params_of(F64)
    b = theirs_cls(theirs, lr=LR[cls], warmup_steps=2)
    b.train()
    step(b, theirs, range(4))
    getattr(b, mode)()
    ours = params_of(F64, seed=9)
    ours.load_state_dict(theirs.state_dict())
    a = cls(ours)
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    assert a.param_groups[0]["train_mode"] == (mode == "train")
    a.train()
    b.train()
    step(a, ours, range(4, 8))
    step(b, theirs, range(4, 8))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_a_checkpoint_without_the_bits_gives_y_from_x():
    """As one that torch.distributed.checkpoint loads into an optimizer in train mode."""
    params = params_of(F64)
    optimizer = made(ADAMW, params, backend="reference")
    step(optimizer, params, range(4))
    y = copies(params)
    optimizer.eval()
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        del state["y"]
    optimizer.load_state_dict(saved)
    optimizer.train()
    for p, q in zip(params, y, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-14, atol=1e-14)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@classes
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("weight_format", [None, "split24"])
def test_torchs_distributed_checkpoints_of_either_mode_go_on_bit_for_bit(cls, flat, mode, weight_format, tmp_path):
    """The optimizer that loads one is in the mode that saved it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    form = StateDictOptions(flatten_optimizer_state_dict=flat)
    formats = dict(weight_format=weight_format, state_format="fp32")
    ours, others = (params_of(BF16 if weight_format else F32, seed=seed) for seed in (0, 9))
    a, b = (made(cls, ps, **formats) for ps in (ours, others))
    step(a, ours, range(3))
    getattr(a, mode)()
    saved = dict(zip(("model", "optimizer"), get_state_dict(ours, a, options=form), strict=True))
    dcp.save(saved, checkpoint_id=tmp_path)
    getattr(b, mode)()
    found = dict(zip(("model", "optimizer"), get_state_dict(others, b, options=form), strict=True))
    dcp.load(found, checkpoint_id=tmp_path)
    set_state_dict(others, b, model_state_dict=found["model"], optim_state_dict=found["optimizer"], options=form)
    for optimizer in (a, b):
        optimizer.train()
    assert same(states_of(b, others), states_of(a, ours))
    step(a, ours, [3])
    step(b, others, [3])
    assert same(states_of(b, others), states_of(a, ours))


# In other company.


def test_grouped_and_wrappers_pass_the_mode_on():
    params = params_of()
    group = dict(params=params[:1], optimizer=ADAMW, lr=0.01), dict(params=params[1:], optimizer=precond.AdamW)
    for optimizer in (precond.Grouped(list(group)), precond.FOP(made(SGD, params), 0.1, compose="gradient")):
        step(optimizer, params, range(3))
        y = copies(params)
        optimizer.eval()
        assert not torch.equal(params[0], y[0])
        with pytest.raises(RuntimeError, match="must be in train mode"):
            step(optimizer, params, [3])
        assert len(optimizer.state_dict()["state"]) == len(params)
        optimizer.train()
        assert same(copies(params), y)
        step(optimizer, params, [3])
    plain = precond.FOP(precond.AdamW(params), 0.1)
    plain.eval()  # no such modes
    plain.train()


def test_shards_show_x_and_get_their_bits_back(tmp_path):
    code = """
whole = torch.randn(8, 64)
def run(dtype, **options):
    w = torch.nn.Parameter(distribute_tensor(whole.to(dtype), mesh, [Shard(0)]))
    q = torch.nn.Parameter(whole.to(dtype))
    optimizers = [precond.ScheduleFreeAdamW([p], lr=0.01, **options) for p in (w, q)]
    def step(i):
        torch.manual_seed(i)
        q.grad = torch.randn(8, 64).to(dtype)
        w.grad = distribute_tensor(q.grad.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    for i in range(3):
        step(i)
    y = w.to_local().detach().clone()
    for mode in ("eval", "train", "eval"):
        for optimizer in optimizers:
            getattr(optimizer, mode)()
        assert torch.equal(w.full_tensor(), q), mode
    kept = optimizers[0].state[w]["y"]
    assert kept.placements == w.placements and torch.equal(kept.to_local(), y)
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for optimizer in optimizers:
        optimizer.train()
    assert torch.equal(w.to_local(), y)
    step(3)
    assert torch.equal(w.full_tensor(), q)
run(torch.float32)
run(torch.bfloat16, weight_format="split24", state_format="fp32")
"""
    on_two_ranks(code, tmp_path)


# Errors.


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ADAMW, dict(betas=(0.0, 0.9)), r"Invalid beta parameter at index 0: 0.0 \(it must be in \(0, 1\)"),
        (ADAMW, dict(betas=(0.9, 1.0)), "Invalid beta parameter at index 1"),
        (ADAMW, dict(eps=-1.0), "Invalid epsilon value"),
        (SGD, dict(momentum=0.0), r"Invalid momentum value: 0.0 \(it must be in \(0, 1\)\)"),
        (SGD, dict(momentum=1.0), "Invalid momentum value"),
        *(
            (cls, {name: -1.0}, f"Invalid {what}: -1.0")
            for cls in (ADAMW, SGD)
            for name, what in (
                ("lr", "learning rate"),
                ("weight_decay", "weight_decay value"),
                ("warmup_steps", "warmup_steps value"),
                ("r", "r value"),
                ("weight_lr_power", "weight_lr_power value"),
            )
        ),
        (ADAMW, dict(r=float("inf")), "r must be finite"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_errors(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(params_of(), **options)


# What keeps the bits.


def test_swapped_shows_values_of_any_dtype_and_tells_who_wrote():
    params = params_of(BF16)
    optimizer = precond.SGD(params)
    states, swapped = optimizer.states, Swapped("kept")
    group, before = optimizer.param_groups[0], copies(params)
    assert not swapped.active(states)
    swapped.show(states, ((p, group, torch.full(p.shape, i + 0.123)) for i, p in enumerate(params)))
    assert swapped.active(states)
    assert [p.flatten()[0].item() for p in params] == [torch.tensor(i + 0.123).bfloat16().item() for i in range(3)]
    with torch.no_grad():
        params[1].zero_()
    assert swapped.restore(states) == [params[1]]
    assert not swapped.active(states)
    assert same(copies(params)[::2], before[::2])
    assert not params[1].any()
    assert not optimizer.state


def test_swapped_leaves_the_old_bits_where_it_fails(monkeypatch):
    monkeypatch.setattr("precond._core.swapped._AT_ONCE", 1)
    params = params_of()
    optimizer = made(ADAMW, params)
    step(optimizer, params, range(2))
    before = copies(params)
    optimizer.state[params[2]]["z"] = torch.ones(3, 5)
    with pytest.raises(RuntimeError):
        optimizer.eval()
    assert optimizer.param_groups[0]["train_mode"]
    assert same(copies(params), before)
    assert not any("y" in optimizer.state[p] for p in params)
