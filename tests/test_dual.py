"""DualDescent against the formulas of docs/theory.md, B.2: every kernel of every magnitude.

Over 400 lines: all of it is one class, on the same table of kernels and granularities.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import multipass
from support.cases import BACKEND, bits_equal
from support.multipass import BF16, F32, F64, assert_close, give, params_of, train

import precond
from precond.dual import GRANULARITIES
from precond.reference import KERNELS

# h'(r) with c and an exponent q - 1, in plain math.
SLOPES = {
    "identity": lambda r, c, e: r,
    "normalize": lambda r, c, e: 1.0 if r > 0 else 0.0,
    "smoothed": lambda r, c, e: r / math.hypot(r, c),
    "adam": lambda r, c, e: r / (r + c),
    "clip": lambda r, c, e: min(r, c),
    "rational": lambda r, c, e: r / (1 + r / c),
    "asinh": lambda r, c, e: c * math.asinh(r / c),
    "log": lambda r, c, e: c * math.log1p(r / c),
    "power": lambda r, c, e: c * (r / c) ** e,
}
WHOLE = [name for name in GRANULARITIES if name != "entry"]
kernels = pytest.mark.parametrize("kernel", SLOPES)
granularities = pytest.mark.parametrize("granularity", GRANULARITIES)


def scaled(v, slope):
    """h'(|v|) v / |v| of a vector."""
    r = math.sqrt(sum(x * x for x in v.flatten().tolist()))
    return v * (slope(r) / r) if r > 0 else v


def slope_of(gradients, granularity, kernel, c, e):
    """grad K, by the definition of each granularity."""

    def slope(r):
        return SLOPES[kernel](r, c, e)

    if granularity == "global":
        r = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        return [g * (slope(r) / r) if r > 0 else g for g in gradients]
    if granularity == "tensor":
        return [scaled(g, slope) for g in gradients]
    if granularity == "entry":
        return [g.sign() * g.clone().apply_(lambda x: slope(abs(x))) for g in gradients]
    matrices = [g.reshape(g.shape[0] if g.dim() else 1, -1) for g in gradients]
    if granularity == "unit":
        mapped = [torch.stack([scaled(row, slope) for row in m]) for m in matrices]
    else:
        mapped = []
        for m in matrices:
            # By the eigenvectors of G^T G instead of a decomposition of G.
            values, v = torch.linalg.eigh(m.mT @ m if m.shape[0] >= m.shape[1] else m @ m.mT)
            s = values.clamp(min=0).sqrt()
            ratio = torch.tensor([slope(x) / x if x > 1e-6 else 0.0 for x in s.tolist()], dtype=F64)
            f = (v * ratio) @ v.mT
            mapped.append(m @ f if m.shape[0] >= m.shape[1] else f @ m)
    return [m.reshape(g.shape) for m, g in zip(mapped, gradients, strict=True)]


class Text:
    """The whole step in float64."""

    def __init__(
        self, params, lr, granularity, kernel, c=1.0, e=0.5, mu=0.0, nesterov=False, decay=0.0, maximize=False
    ):
        self.p = [p.detach().double() for p in params]
        self.m = [torch.zeros_like(p) for p in self.p]
        self.lr, self.kind, self.mu, self.nesterov, self.decay = lr, (granularity, kernel, c, e), mu, nesterov, decay
        self.sign = -1.0 if maximize else 1.0

    def step(self, gradients):
        gradients = [g.double() for g in gradients]
        self.m = [self.mu * m + (1 - self.mu) * g for m, g in zip(self.m, gradients, strict=True)]
        u = self.m
        if self.nesterov:
            u = [self.mu * m + (1 - self.mu) * g for m, g in zip(self.m, gradients, strict=True)]
        d = slope_of(u, *self.kind)
        self.p = [p - self.lr * self.decay * p - self.sign * self.lr * x for p, x in zip(self.p, d, strict=True)]


def compare(dtype, granularity, kernel, rtol, atol, steps=4, **options):
    params = params_of(dtype=dtype)
    names = dict(c="scale", e="exponent", mu="momentum", decay="weight_decay")
    kwargs = {names.get(k, k): v for k, v in options.items()}
    optimizer = precond.DualDescent(params, kernel=kernel, granularity=granularity, **kwargs)
    text = Text(params, options.pop("lr"), granularity, kernel, **options)
    for i in range(steps):
        give(params, i)
        text.step([p.grad for p in params])
        optimizer.step()
        assert_close(params, text.p, rtol, atol)
    return params, optimizer


@kernels
@granularities
@pytest.mark.parametrize(
    "options",
    [
        dict(lr=0.1, c=0.7, e=0.3),
        dict(lr=0.1, c=2.0, e=1.7, mu=0.8, decay=0.05, maximize=True),
        dict(lr=0.1, c=0.3, e=0.5, mu=0.6, nesterov=True, decay=0.05),
    ],
    ids=["plain", "momentum", "nesterov"],
)
def test_every_kernel_and_granularity_is_its_formula(kernel, granularity, options):
    compare(F64, granularity, kernel, 1e-10, 1e-11, **options)
    if granularity != "spectral" or kernel != "normalize":
        compare(F32, granularity, kernel, 1e-5, 1e-5, **options)


def test_the_kernels_here_are_all_there_are():
    assert SLOPES.keys() == KERNELS.keys()


EXTREMES = [
    0.0,
    -0.0,
    1e-45,
    1e-40,
    -1e-40,
    1e-38,
    1e-30,
    -1e-20,
    1e-10,
    1e-3,
    -0.5,
    0.7,
    1.0,
    3.0,
    1e3,
    -1e7,
    1e12,
    1e15,
]


@kernels
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_entries_of_any_magnitude_are_a_few_ulp_from_the_formula(kernel, scale, momentum):
    """Of the compiled backend in float32, at p = 0 and lr = 1, where nothing hides an error."""
    values = torch.tensor(EXTREMES * 3)
    p = torch.nn.Parameter(torch.zeros_like(values))
    options = dict(lr=1.0, kernel=kernel, granularity="entry", scale=scale, exponent=0.5, momentum=momentum)
    optimizer = precond.DualDescent([p], **options, backend=BACKEND)
    p.grad = values.clone()
    optimizer.step()
    of = values.double() * (1.0 - momentum)
    expected = -torch.tensor([math.copysign(SLOPES[kernel](abs(x), scale, 0.5), x) for x in of.tolist()], dtype=F64)
    error = (p.detach().double() - expected).abs()
    # Halving the smallest denormals rounds; what they are mapped to is as far off.
    normal = values.abs() >= 1e-37
    few = 16 * torch.finfo(F32).eps * expected.abs() + 1e-44
    assert (error <= few)[normal].all(), (values[error > few], p[error > few], expected[error > few])
    coarse = values.abs() >= 1e-39
    assert (error <= 1e-3 * expected.abs() + 1e-44)[coarse].all()
    assert (p[values == 0] == 0).all()
    assert torch.isfinite(p).all()


@kernels
def test_nan_stays_nan_and_its_neighbours_live(kernel):
    for backend in (BACKEND, "reference"):
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = precond.DualDescent([p], lr=0.1, kernel=kernel, granularity="entry", backend=backend)
        p.grad = torch.tensor([math.nan, 1.0, 0.0, -1.0, math.nan])
        optimizer.step()
        assert p.isnan().tolist() == [True, False, False, False, True]


@kernels
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-22, 1e22, 1e30])
@pytest.mark.parametrize("granularity", ["tensor", "unit"])
def test_norms_beyond_float32s_squares_are_seen(kernel, granularity, size):
    g = torch.tensor([[3.0, 4.0], [0.0, 0.0]]) * size
    p = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = precond.DualDescent([p], lr=1.0, kernel=kernel, granularity=granularity)
    p.grad = g.clone()
    optimizer.step()
    r = float(g.double().norm())
    expected = -g.double() * (SLOPES[kernel](r, 1.0, 0.5) / r)
    assert torch.isfinite(p).all()
    if size > 1e-38:
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-40)
    assert (p[1] == 0).all()


@granularities
def test_a_zero_gradient_leaves_the_decay(granularity):
    for kernel in SLOPES:
        params = params_of()
        before = [p.detach().clone() for p in params]
        optimizer = precond.DualDescent(params, lr=0.5, kernel=kernel, granularity=granularity, weight_decay=0.1)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p, q in zip(params, before, strict=True):
            torch.testing.assert_close(p.detach(), 0.95 * q, rtol=1e-6, atol=0)


def test_a_zero_row_is_no_nan():
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    precond.DualDescent([p], lr=1.0, kernel="normalize", granularity="unit").step()
    torch.testing.assert_close(p.detach(), torch.tensor([[1.0, 1.0, 1.0], [0.4, 1.0, 0.2]]))


def test_the_global_norm_is_that_of_all_groups_that_say_so():
    a, b, c = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 3, 2))
    groups = [
        {"params": [a], "lr": 1.0},
        {"params": [b], "lr": 0.5, "scale": 2.0},
        {"params": [c], "granularity": "tensor", "lr": 1.0},
    ]
    optimizer = precond.DualDescent(groups, kernel="clip", granularity="global")
    a.grad, b.grad, c.grad = torch.tensor([6.0, 0.0]), torch.tensor([0.0, 8.0, 0.0]), torch.tensor([0.0, 40.0])
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.tensor([-0.6, 0.0]))
    torch.testing.assert_close(b.detach(), torch.tensor([0.0, -0.8, 0.0]))  # norm 10, clipped to 2, lr 0.5
    torch.testing.assert_close(c.detach(), torch.tensor([0.0, -1.0]))


def test_groups_with_another_kernel_share_no_global_norm():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = precond.DualDescent(
        [{"params": [a]}, {"params": [b], "kernel": "smoothed"}], lr=1.0, kernel="normalize", granularity="global"
    )
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()
    assert a.item() == pytest.approx(-1.0)
    assert b.item() == pytest.approx(-4.0 / math.hypot(4.0, 1.0))


def test_global_clipping_is_torchs_followed_by_sgd():
    ours, theirs = params_of(), params_of()
    a = precond.DualDescent(ours, lr=0.1, kernel="clip", granularity="global", scale=0.5)
    b = torch.optim.SGD(theirs, lr=0.1)
    for i in range(3):
        give(ours, i)
        give(theirs, i)
        a.step()
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        b.step()
    assert_close(ours, theirs, 1e-5, 1e-6)


def test_mixed_granularities_in_one_optimizer_are_as_alone():
    shapes = ((4, 6), (5,), (3, 2, 2, 2))
    together = [p for _ in GRANULARITIES for p in params_of(shapes)]
    groups = [
        {"params": together[3 * i : 3 * i + 3], "granularity": name, "kernel": kernel}
        for i, (name, kernel) in enumerate(
            zip(GRANULARITIES, ("clip", "adam", "asinh", "log", "smoothed"), strict=True)
        )
    ]
    options = dict(lr=0.1, momentum=0.7, weight_decay=0.1)
    mixed = precond.DualDescent(groups, **options)
    alone = [params_of(shapes) for _ in GRANULARITIES]
    singles = [
        precond.DualDescent(ps, **options, granularity=group["granularity"], kernel=group["kernel"])
        for ps, group in zip(alone, groups, strict=True)
    ]
    for i in range(4):
        for k, (params, single) in enumerate(zip(alone, singles, strict=True)):
            give(params, i)
            for p, q in zip(together[3 * k : 3 * k + 3], params, strict=True):
                p.grad = q.grad.clone()
            single.step()
        mixed.step()
    for p, q in zip(together, (q for params in alone for q in params), strict=True):
        assert bits_equal(p.detach(), q.detach())


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_gradient_of_deficient_rank_moves_in_its_own_span(rank):
    torch.manual_seed(3)
    g = torch.randn(6, rank) @ torch.randn(rank, 9)
    p = torch.nn.Parameter(torch.zeros(6, 9))
    optimizer = precond.DualDescent([p], lr=1.0, kernel="normalize", granularity="spectral")
    p.grad = g
    optimizer.step()
    s = torch.linalg.svdvals(p.detach())
    torch.testing.assert_close(s, torch.tensor([1.0] * rank + [0.0] * (6 - rank)), rtol=1e-5, atol=1e-5)
    assert (p.detach() * g).sum() == pytest.approx(-torch.linalg.svdvals(g).sum().item(), rel=1e-5, abs=1e-6)


def test_muons_exact_counterpart_is_the_spectral_sign():
    """A few orthogonal steps of Newton and Schulz's cubic iteration come to the same direction."""
    (p,), (q,) = params_of(((6, 9),)), params_of(((6, 9),))
    a = precond.DualDescent([p], lr=0.1, kernel="normalize", granularity="spectral", momentum=0.9, nesterov=True)
    b = precond.Muon([q], lr=0.1, momentum=0.9, weight_decay=0.0, ns_coefficients=(1.5, -0.5, 0.0), ns_steps=25)
    for i in range(3):
        give([p], i)
        give([q], i)
        a.step()
        b.step()
    torch.testing.assert_close(p, q, rtol=0, atol=0.01)


def test_memory_formats_change_nothing():
    values, grads = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    for granularity in GRANULARITIES:
        found = []
        for layout in (torch.contiguous_format, torch.channels_last):
            p = torch.nn.Parameter(values.clone(memory_format=layout))
            optimizer = precond.DualDescent([p], lr=0.1, granularity=granularity, momentum=0.5)
            for other in (torch.contiguous_format, torch.channels_last):
                p.grad = grads.clone(memory_format=other)
                optimizer.step()
            found.append(p.detach().contiguous())
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@granularities
@pytest.mark.parametrize("weight_format", [None, "stochastic", "split24", "split32"])
def test_bfloat16_weights_stay_near_their_float32_run(granularity, weight_format):
    shapes = ((64, 64), (33, 7), (5,))
    short, wide = params_of(shapes, BF16), params_of(shapes, BF16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in wide]
    options = dict(lr=0.003, kernel="adam", granularity=granularity, momentum=0.5, weight_decay=0.1)
    a = precond.DualDescent(short, **options, weight_format=weight_format, state_format="fp32")
    b = precond.DualDescent(wide, **options)
    start = [p.detach().clone() for p in wide]
    for i in range(20):
        give(short, i)
        for p, q in zip(short, wide, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
    for p, q, before in zip(short, wide, start, strict=True):
        rounding = torch.finfo(BF16).eps * q.detach().norm()
        if weight_format is not None:
            # Stochastic rounding is a walk of 20 steps: about 0.9 of this on average, and five elements are no average.
            few = 2 if weight_format == "stochastic" and p.numel() < 64 else 1
            assert (p.float() - q).norm() <= few * rounding + 0.05 * (q - before).norm()
        else:
            assert (p.float() - q).norm() <= 4 * rounding


RESUMED = [
    (F32, dict(granularity="entry")),
    (F32, dict(granularity="entry", momentum=0.9, state_format="int8")),
    (F32, dict(granularity="global", momentum=0.9, nesterov=True)),
    (F32, dict(granularity="tensor", momentum=0.9, state_format="int8")),
    (BF16, dict(granularity="unit", momentum=0.9, weight_format="stochastic", state_format="int8")),
    (BF16, dict(granularity="spectral", momentum=0.9, weight_format="split24")),
    (BF16, dict(granularity="entry", weight_format="stochastic")),
    (F64, dict(granularity="unit", momentum=0.5)),
]


@pytest.mark.parametrize(("dtype", "options"), RESUMED, ids=str)
def test_a_resumed_run_has_the_same_bits(dtype, options):
    shapes = ((64, 64), (5,), (3, 2, 2, 2))
    multipass.check_resumes(lambda ps: precond.DualDescent(ps, lr=0.05, kernel="log", **options), shapes, dtype, 3, 6)


def test_no_two_draws_of_a_mixed_optimizer_are_alike():
    """Two groups, one of a single pass: parameters of one shape, moved alike, are rounded by bits of their own."""
    params = [torch.nn.Parameter(torch.ones(4096, dtype=BF16)) for _ in range(2)]
    groups = [{"params": params[:1], "granularity": "unit"}, {"params": params[1:], "granularity": "entry"}]
    optimizer = precond.DualDescent(groups, lr=1e-3, kernel="identity", weight_format="stochastic")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    keys = [optimizer.state[p]["key"] for p in params]
    assert keys[0] != keys[1]
    assert not torch.equal(*params)


@granularities
@pytest.mark.parametrize("dtype", [F32, F64])
def test_it_is_an_optimizer(granularity, dtype):
    multipass.check_is_an_optimizer(
        lambda ps: precond.DualDescent(ps, lr=0.1, granularity=granularity, momentum=0.5), dtype
    )


@granularities
def test_complex_parameters(granularity):
    """Norms and singular values are those of complex numbers; per entry the real and the imaginary part are two entries."""
    p = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64))
    g = torch.randn(3, 4, dtype=torch.complex64)
    p.grad = g.clone()
    precond.DualDescent([p], lr=1.0, kernel="normalize", granularity=granularity).step()
    d = -p.detach()
    if granularity in ("global", "tensor"):
        torch.testing.assert_close(d, g / g.norm())
    elif granularity == "unit":
        torch.testing.assert_close(d, g / g.abs().square().sum(1, keepdim=True).sqrt())
    elif granularity == "entry":
        torch.testing.assert_close(torch.view_as_real(d), torch.view_as_real(g).sign())
    else:
        torch.testing.assert_close(d @ d.mH, torch.eye(3, dtype=torch.complex64), rtol=0, atol=1e-5)


@granularities
def test_a_scaler_unscales_before_the_step(granularity):
    ours, theirs = params_of(), params_of()
    options = dict(lr=0.1, granularity=granularity, momentum=0.5)
    a, b = precond.DualDescent(ours, **options), precond.DualDescent(theirs, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.ones(()))
    for i in range(3):
        give(ours, i, 256.0)
        give(theirs, i)
        if i == 1:
            ours[0].grad[0, 0] = math.inf  # this step is left out
        scaler.step(a)
        scaler.update(256.0)
        if i != 1:
            b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert bits_equal(p.detach(), q.detach())


def test_a_fused_scaler_leaves_unscaling_to_a_single_pass():
    ours, theirs = params_of(), params_of()
    a = precond.DualDescent(ours, lr=0.1, granularity="entry", fused=True)
    b = precond.DualDescent(theirs, lr=0.1, granularity="entry")
    give(ours, 0, 256.0)
    give(theirs, 0)
    a.grad_scale, a.found_inf = torch.tensor(256.0), torch.tensor(0.0)
    a.step()
    b.step()
    assert_close(ours, theirs, 1e-6, 1e-7)


def test_norms_of_all_gradients_clip_single_passes():
    ours, theirs = params_of(), params_of()
    a = precond.DualDescent(ours, lr=0.1, kernel="identity", granularity="entry", max_grad_norm=0.5)
    b = torch.optim.SGD(theirs, lr=0.1)
    give(ours, 0)
    give(theirs, 0)
    a.step()
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    b.step()
    assert_close(ours, theirs, 1e-5, 1e-6)
    assert a.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)


def test_a_differentiable_step_is_refused_when_built_and_before_anything_moves():
    params = params_of(((2, 2), (2, 2)))
    before = [p.detach().clone() for p in params]
    groups = [{"params": params[:1], "granularity": "entry"}, {"params": params[1:], "granularity": "unit"}]
    message = "differentiable must be False unless granularity is 'entry'"
    with pytest.raises(RuntimeError, match=message):
        precond.DualDescent(groups, differentiable=True)
    optimizer = precond.DualDescent(groups[:1], differentiable=True)
    with pytest.raises(RuntimeError, match=message):
        optimizer.add_param_group(groups[1])
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group(groups[1] | {"granularity": "entry"})
    optimizer.param_groups[1]["granularity"] = "unit"
    give(params, 0)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert len(optimizer.param_groups) == 2


@granularities
def test_a_scheduler_and_a_tensor_learning_rate_give_the_same_steps(granularity):
    runs = []
    for lr in (0.1, torch.tensor(0.1)):
        params = params_of()
        optimizer = precond.DualDescent(params, lr=lr, granularity=granularity, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for i in range(4):
            give(params, i)
            optimizer.step()
            scheduler.step()
        runs.append(params)
    assert_close(*runs, 1e-6, 1e-7)
    text = params_of()
    by_hand = precond.DualDescent(text, lr=0.1, granularity=granularity, weight_decay=0.1)
    for i in range(4):
        by_hand.param_groups[0]["lr"] = 0.1 * 0.5**i
        give(text, i)
        by_hand.step()
    assert_close(runs[0], text, 1e-6, 1e-7)


@pytest.mark.parametrize("kernel", [name for name in SLOPES if name != "normalize"])
def test_autograd_sees_a_step_by_entries(kernel):
    def stepped(values, gradient):
        p = values.clone()
        optimizer = precond.DualDescent(
            [p], lr=0.1, kernel=kernel, granularity="entry", momentum=0.5, weight_decay=0.1, differentiable=True
        )
        p.grad = gradient
        optimizer.step()
        return p

    values = torch.tensor([0.7, -1.3, 0.4], dtype=F64, requires_grad=True)
    gradient = torch.tensor([0.45, -0.16, 3.2], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(stepped, (values, gradient))
    (p,) = params_of(((2, 2),))
    give([p], 0)
    with pytest.raises(RuntimeError, match="differentiable must be False unless granularity is 'entry'"):
        precond.DualDescent([p], granularity="unit", differentiable=True).step()


def test_two_steps_in_dual_space_end_where_the_kernel_says():
    """Descent in any of them finds the minimum of a quadratic; with identity it is gradient descent bit for bit."""
    for granularity in GRANULARITIES:
        ours, theirs = params_of(), params_of()
        a = precond.DualDescent(ours, lr=0.1, kernel="identity", granularity=granularity)
        b = precond.SGDW(theirs, lr=0.1, weight_decay=0.0)
        train(ours, a, 0, 3)
        train(theirs, b, 0, 3)
        assert_close(ours, theirs, 1e-6, 2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr=-1.0), "Invalid learning rate: -1.0"),
        (dict(weight_decay=-1.0), "Invalid weight_decay value: -1.0"),
        (dict(kernel="huber"), "kernel must be one of identity, .*, got 'huber'"),
        (dict(granularity="row"), "granularity must be one of global, .*, got 'row'"),
        (dict(scale=0.0), r"scale must be in \[1e-18, 1e18\], got 0.0"),
        (dict(scale=math.nan), "scale must be in"),
        (dict(scale=math.inf), "scale must be in"),
        (dict(exponent=0.0), r"exponent must be in \(0, 16\], got 0.0"),
        (dict(exponent=17), "exponent must be in"),
        (dict(momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (dict(nesterov=True), "nesterov needs a momentum > 0, got 0"),
        (dict(state_format="fp4"), "state_format must be"),
        (dict(weight_format="split"), "weight_format must be"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        precond.DualDescent(params_of(((2, 2),)), **options)
    if "lr" in options or "weight_decay" in options:
        return
    optimizer = precond.DualDescent(params_of(((2, 2),)))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params_of(((2, 2),)), **options})
    optimizer.param_groups[0].update(options)  # as a checkpoint would
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@granularities
def test_sparse_gradients_are_refused(granularity):
    (p,) = params_of(((3, 3),))
    p.grad = torch.ones(3, 3).to_sparse()
    with pytest.raises(RuntimeError, match="DualDescent does not support sparse gradients"):
        precond.DualDescent([p], granularity=granularity).step()


def test_a_spectral_step_refuses_a_nan():
    (p,) = params_of(((3, 3),))
    p.grad = torch.full((3, 3), math.nan)
    with pytest.raises(torch.linalg.LinAlgError):
        precond.DualDescent([p], granularity="spectral").step()


@granularities
def test_states_may_be_made_before_the_first_step(granularity):
    multipass.check_states_may_be_made_first(lambda ps: precond.DualDescent(ps, granularity=granularity, momentum=0.5))


@granularities
def test_over_parameterised_models_end_at_the_nearest_solution_but_for_entries(granularity):
    """docs/theory.md, B.4: X W = Y with more unknowns than equations; nearest to the start is W0 + X^+ (Y - X W0)."""
    torch.manual_seed(0)
    x, goal = torch.randn(8, 16, dtype=F64), torch.randn(16, 3, dtype=F64)
    w = torch.nn.Parameter(0.1 * torch.randn(3, 16, dtype=F64))  # as a linear layer has it
    y = x @ goal
    nearest = w.detach() + (torch.linalg.pinv(x) @ (y - x @ w.detach().T)).T
    largest = torch.linalg.matrix_norm(x, 2).item() ** 2
    optimizer = precond.DualDescent([w], lr=1.0 / largest, kernel="asinh", granularity=granularity)
    for _ in range(3000):
        residual = x @ w.detach().T - y
        w.grad = (x.T @ residual).T
        optimizer.step()
    assert residual.norm() < 1e-9 * y.norm()
    far = (w.detach() - nearest).norm() / (nearest.norm())
    assert (far > 0.02) if granularity == "entry" else (far < 1e-9)


@granularities
def test_every_backend_takes_the_same_steps(granularity, triton_interpreter):
    multipass.check_backends(
        lambda ps, b: precond.DualDescent(ps, lr=0.1, kernel="log", granularity=granularity, momentum=0.5, backend=b)
    )
