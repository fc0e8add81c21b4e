"""What rides along in the last pass of methods of several passes: statistics, averages, masks."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.cases import BACKEND, bits_equal
from support.methods import KRONECKER

import precond

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.filterwarnings("ignore::precond.PrecisionWarning")
#: Of each a class and its options.
METHODS = {
    "muon": (precond.Muon, dict(weight_decay=0.3)),
    "soap": (precond.SOAP, dict(precondition_frequency=2, weight_decay=0.3)),
    "soap_l1": (precond.SOAP, dict(precondition_frequency=2, l1_decay=0.3)),
    "gauss_newton": (precond.GaussNewton, {**KRONECKER, "weight_decay": 0.3, "maximize": True}),
    "dual_tensor": (precond.DualDescent, dict(granularity="tensor", weight_decay=0.3)),
    "dual_global": (precond.DualDescent, dict(granularity="global", momentum=0.9, weight_decay=0.3, maximize=True)),
    "dual_unit": (precond.DualDescent, dict(granularity="unit", momentum=0.9, weight_decay=0.3)),
    "dual_spectral": (precond.DualDescent, dict(granularity="spectral", weight_decay=0.3)),
}
FORMATS = [(F32, None, None), (BF16, "stochastic", "bf16"), (BF16, "split24", None), (F16, None, None)]
methods = pytest.mark.parametrize("name", METHODS)


def called(case) -> str:
    return case if isinstance(case, str) else "-".join(map(str, case)).replace("torch.", "").lower()


in_formats = pytest.mark.parametrize("formats", FORMATS, ids=called)
SHAPES = [(12, 20), (20, 12), (12, 20)]


def made(name, formats=FORMATS[0], backend=BACKEND, **options):
    dtype, weight_format, state_format = formats
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    group = {"params": params, "weight_format": weight_format, "state_format": state_format}
    cls, own = METHODS[name]
    return params, cls([group], **{"lr": 0.05, **own, **options}, backend=backend)


def train(params, optimizer, steps=4, start=0):
    for step in range(start, start + steps):
        torch.manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer.step()


def run(name, formats=FORMATS[0], backend=BACKEND, steps=4, **options):
    params, optimizer = made(name, formats, backend, **options)
    train(params, optimizer, steps)
    return params, optimizer


def everything(params, optimizer, without=("ema",)):
    found = {(i, "p"): p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        states = optimizer.state[p].items()
        found |= {(i, k): v.clone() for k, v in states if isinstance(v, torch.Tensor) and k not in without}
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not bits_equal(a[key], b[key])] == []


@pytest.mark.parametrize("parts", [{}, {"ema_decay": 0.5, "ema_format": "bf16"}], ids=["alone", "averaged"])
@in_formats
@methods
def test_statistics_change_nothing_else(name, formats, parts):
    found = (everything(*run(name, formats, statistics=every, **parts), without=()) for every in (False, 2))
    assert_same(*found)


@pytest.mark.parametrize(
    ("name", "kind"), [("dual_tensor", "conjugated"), *itertools.product(METHODS, ("negated", "wide"))]
)
def test_statistics_change_nothing_whatever_the_gradients_are(name, kind):
    """Lazily negated or conjugated, or of more bits than the parameter: what a kernel does not take."""
    found = []
    for statistics in (False, True):
        params, optimizer = made(name, backend=None, statistics=statistics)
        if kind == "conjugated":
            params = [torch.nn.Parameter(torch.complex(p.data, p.data.flip(0))) for p in params]
            optimizer = precond.DualDescent(params, lr=0.05, momentum=0.9, **METHODS[name][1], statistics=statistics)
        for step in range(3):
            torch.manual_seed(step)
            for p in params:
                g = torch.randn_like(p.detach())
                if kind == "wide":
                    p.grad_dtype = torch.float64
                p.grad = {"negated": torch._neg_view, "conjugated": torch.conj, "wide": torch.Tensor.double}[kind](g)
            optimizer.step()
        found.append(everything(params, optimizer))
    assert_same(*found)


@methods
def test_statistics_are_of_the_gradient_and_of_the_whole_update(name):
    """Also clipped, and of a decay in the coordinates of a basis."""
    params, optimizer = made(name, statistics=True, clip_grad_value=0.7)
    train(params, optimizer, 3)
    before = [p.detach().double() for p in params]
    train(params, optimizer, 1, 3)
    sign = -1.0 if optimizer.param_groups[0].get("maximize") else 1.0
    for p, old, row in zip(params, before, optimizer.statistics.values, strict=True):
        g, u = sign * p.grad.double().clamp(-0.7, 0.7), old - p.detach().double()
        rms = [t.square().mean().sqrt() for t in (g, old, u)]
        cosine = (g * u).sum() / (g.norm() * u.norm())
        found = dict(zip(optimizer.statistics.columns, row.tolist(), strict=True))
        assert [found["grad_rms"], found["param_rms"]] == pytest.approx([x.item() for x in rms[:2]], rel=1e-6)
        assert [found["update_rms"], found["cosine"]] == pytest.approx([rms[2].item(), cosine.item()], rel=1e-4)
        assert found["largest_update"] == pytest.approx(u.abs().max().item(), rel=1e-4)
        assert (found["nonfinite"], found["lost"]) == (0.0, 0.0)
        assert found["arrived"] == pytest.approx(1.0, abs=1e-4)


#: Few, since Triton's interpreter is slow: each method, and each kind of format once.
BOTH = [(name, FORMATS[0]) for name in METHODS]
BOTH += zip(("soap", "muon", "dual_unit"), FORMATS[1:], strict=True)


@pytest.mark.parametrize(("name", "formats"), BOTH, ids=called)
def test_sums_have_the_same_bits_on_each_backend(name, formats, triton_interpreter):
    options = dict(cautious=mask(name), ema_decay=0.5, ema_format="bf16", statistics=True)
    if name in ("soap", "gauss_newton"):
        options |= dict(cautious_rescale=True, max_update_rms=0.5)
    found = [run(name, formats, backend, steps=3, **options) for backend in (BACKEND, "triton")]
    assert_same(*(everything(*each, without=()) for each in found))
    assert bits_equal(*(optimizer.engine.report.sums for _, optimizer in found))


@pytest.mark.parametrize("name", ["muon", "dual_tensor", "dual_global", "dual_unit"])
def test_gradients_that_are_not_finite_are_counted(name):
    """Bases and singular values raise for them."""
    params, optimizer = made(name, statistics=True)
    train(params, optimizer, 2)
    for p in params:
        p.grad[0, :3] = float("inf")
    optimizer.step()
    assert optimizer.statistics.values[:, optimizer.statistics.columns.index("nonfinite")].tolist() == [3.0] * 3


def mask(name):
    return None if name.endswith("_l1") else "both"


@in_formats
@methods
def test_an_average_is_of_the_weights_and_changes_nothing_else(name, formats):
    """But for random bits where nothing else counts: then each pass that draws counts the step, and with an average one does."""
    params, optimizer = made(name, formats, ema_decay=0.75, ema_start=1)
    expected = None
    for step in range(5):
        train(params, optimizer, 1, step)
        if not optimizer.state[params[0]].get("step", 0):
            continue  # SOAP has its bases, and has not moved
        count = int(optimizer.state[params[0]]["step"])
        weights = [w.float() for w in precond.master_weights(optimizer, torch.nn.ParameterList(params)).values()]
        expected = weights if count <= 2 else [0.75 * e + 0.25 * w for e, w in zip(expected, weights, strict=True)]
    assert count == 5 - name.startswith("soap")
    # It takes weights before they are rounded.
    near = {None: 1e-5 if formats[0] is F32 else 4e-3, "split24": 1e-4, "stochastic": 0.03}[formats[1]]
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(
            optimizer.averages(p, optimizer.param_groups[0]).float(), value, rtol=near, atol=near
        )
    if formats[1] is None or name.startswith(("soap", "gauss")):
        alone = everything(*run(name, formats, steps=5), without=("ema", "step"))
        assert_same(alone, everything(params, optimizer, without=("ema", "step")))
    old = everything(params, optimizer)
    with optimizer.averaged():
        assert not bits_equal(params[0].detach(), old[0, "p"])
    assert_same(everything(params, optimizer), old)


@pytest.mark.parametrize("name", ["muon", "dual_unit", "soap"])
def test_random_bits_go_on_without_an_average(name):
    """As those of a resumed run, and with a counter that counts."""
    params, optimizer = run(name, FORMATS[1], ema_decay=0.5)
    optimizer.param_groups[0]["ema_decay"] = None
    train(params, optimizer, 2, 4)
    others, other = made(name, FORMATS[1])
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    before = int(optimizer.state[params[0]]["step"])
    train(params, optimizer, 3, 6)
    train(others, other, 3, 6)
    assert_same(everything(params, optimizer), everything(others, other))
    assert int(optimizer.state[params[0]]["step"]) >= before + 3


@methods
def test_a_step_that_only_makes_states_is_none_of_the_average(name):
    """That of torch.distributed.checkpoint, with gradients of zeros at lr 0."""
    params, optimizer = made(name, ema_decay="equal", statistics=True, lr=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 0 and "ema" in optimizer.state[p] for p in params)
    assert optimizer.statistics is None


def test_an_average_is_resumed():
    for name, formats in itertools.product(METHODS, FORMATS[:3]):
        params, optimizer = run(name, formats, ema_decay=0.5, ema_format="bf16")
        others, other = made(name, formats, ema_decay=0.5, ema_format="bf16")
        other.load_state_dict(optimizer.state_dict())
        for p, q in zip(params, others, strict=True):
            q.data.copy_(p.data)
        train(params, optimizer, 3, 4)
        train(others, other, 3, 4)
        assert_same(everything(params, optimizer, ()), everything(others, other, ()))


@methods
def test_masks_are_by_the_gradient_and_by_the_direction(name):
    """Of a step without a decay, which has the direction."""
    params, optimizer = made(name)
    options = METHODS[name][1]
    if options.get("l1_decay"):
        with pytest.raises(RuntimeError, match=r"cautious must be None with l1_decay .*, got 'decay'"):
            made(name, cautious="decay")
        return
    train(params, optimizer, 3)
    state = optimizer.state_dict()
    start = [p.detach().clone() for p in params]
    found = {}
    for cautious, decay in ((None, 0.0), ("update", 0.0), ("decay", 0.3), ("both", 0.3)):
        after, other = made(name, cautious=cautious, weight_decay=decay)
        other.load_state_dict(state)
        other.param_groups[0].update(weight_decay=decay, **({} if cautious is None else {"cautious": cautious}))
        for p, value in zip(after, start, strict=True):
            p.data.copy_(value)
        train(after, other, 1, 3)
        found[cautious] = [p.detach() for p in after]
    sign = -1.0 if options.get("maximize") else 1.0
    lr_decay = optimizer.param_groups[0]["lr"] * 0.3
    for i, p in enumerate(start):
        taken, g = p - found[None][i], sign * after[i].grad
        masked = torch.where(taken * g > 0, taken, 0.0)
        torch.testing.assert_close(found["update"][i], p - masked, rtol=1e-5, atol=1e-5)
        for kind, update in (("decay", taken), ("both", masked)):
            expected = p - update - torch.where(update * p >= 0, lr_decay * p, 0.0)
            torch.testing.assert_close(found[kind][i], expected, rtol=1e-5, atol=1e-5)
    assert any((a != b).any() for a, b in zip(found[None], found["decay"], strict=True))


@pytest.mark.parametrize("name", ["soap", "gauss_newton"])
def test_updates_are_scaled_by_what_all_of_them_come_to(name):
    params, optimizer = made(name)
    train(params, optimizer, 3)
    state, start = optimizer.state_dict(), [p.detach().clone() for p in params]
    found = {}
    for rescale, most in ((False, None), (True, None), (True, 0.3), (True, 1e6)):
        after, other = made(name, cautious="update")
        other.load_state_dict(state)
        other.param_groups[0].update(weight_decay=0.0, cautious="update", cautious_rescale=rescale, max_update_rms=most)
        for p, value in zip(after, start, strict=True):
            p.data.copy_(value)
        train(after, other, 1, 3)
        found[rescale, most] = [value - p.detach() for p, value in zip(after, start, strict=True)]
    for plain, rescaled, limited in zip(*(found[key] for key in list(found)[:3]), strict=True):
        torch.testing.assert_close(rescaled, plain / (plain != 0).float().mean(), rtol=1e-4, atol=1e-6)
        most = 0.3 * optimizer.param_groups[0]["lr"]
        factor = most / rescaled.square().mean().sqrt()
        assert factor < 1.0
        torch.testing.assert_close(limited, rescaled * factor, rtol=1e-4, atol=1e-6)
    assert all(map(torch.equal, found[True, None], found[True, 1e6]))


def test_a_limit_keeps_its_sign_where_soap_overshoots():
    """Its published order multiplies an update by 1 - lr * weight_decay."""
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = precond.SOAP([p], lr=1.0, weight_decay=2.0, max_update_rms=0.5, backend=BACKEND)
    p.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 1.0 - 0.5 - 2.0))


@pytest.mark.parametrize("name", ["muon", "dual_tensor", "soap_l1"])
def test_what_has_no_scale_says_so(name):
    with pytest.raises(RuntimeError, match=r"max_update_rms must be None .*, got 0\.5"):
        made(name, max_update_rms=0.5)


def test_a_skipped_step_has_none_and_groups_have_their_rows():
    """A device decides that a step is skipped. A group of one pass beside Muon, and a parameter without a gradient."""
    matrix, free, vector = (torch.ones(shape, requires_grad=True) for shape in ((4, 4), (3, 3), (5,)))
    groups = [
        {"params": [("vector", vector)], "optimizer": precond.AdamW, "fused": True},
        {"params": [("matrix", matrix), ("free", free)], "optimizer": precond.Muon},
    ]
    options = dict(lr=0.1, statistics=True, max_grad_norm=1e9, nonfinite="skip")
    optimizer = precond.Grouped(groups, **options, backend=BACKEND)
    for scale, expected in ((2.0, 1.0), (float("nan"), 1.0), (4.0, 2.0)):
        matrix.grad, vector.grad = scale * torch.eye(4), torch.ones(5)
        optimizer.step()
        found = optimizer.statistics
        assert found.params == ("vector", "matrix", "free")
        assert found.values[:2, 0].tolist() == [1.0, expected]
        assert found.values[2].isnan().all()
    assert optimizer.skipped_steps == 1
