"""GaussNewton against its formulas (docs/theory.md, C), in the coordinates and in every basis.

Over 400 lines: all of it is one class, against the same text in float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import multipass
from support.cases import BACKEND, bits_equal
from support.multipass import BF16, F32, F64, assert_close, eigenvectors, give, params_of

import precond
from precond import bases, curvature

KRONECKER = ((4, 6), (5,), (3, 2, 2, 2), ())


def orthogonal(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))[0]


class Text:
    """One parameter in float64, as a flat vector in an orthogonal basis U that may change."""

    def __init__(self, p, lr, b1=0.9, b2=0.99, eps=1e-8, power=-1.0, clip=math.inf, decay=0.0, own=False, l1=0.0):
        self.p = p.detach().double().clone().reshape(-1)
        self.u = torch.eye(len(self.p), dtype=F64)
        self.m, self.h = torch.zeros_like(self.p), torch.zeros_like(self.p)
        self.t = self.updates = 0
        self.lr, self.b1, self.b2, self.eps, self.power, self.clip = lr, b1, b2, eps, power, clip
        self.decay, self.own, self.l1 = decay, own, l1

    def update(self, estimate):
        """Debiased: the mean of all estimates with weights b2^k (1 - b2), normalised."""
        self.updates += 1
        self.raw = self.b2 * getattr(self, "raw", 0.0) + (1 - self.b2) * estimate
        self.h = self.raw / (1 - self.b2**self.updates)

    def bartlett(self, g, batch):
        self.update(batch * (self.u.T @ g.double().reshape(-1)) ** 2)

    def step(self, g):
        g = self.u.T @ g.double().reshape(-1)
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        if self.own:
            self.update(g * g)
        damped = self.h.clamp(min=0) + self.eps
        den = damped**-self.power
        u = (self.m / (1 - self.b1**self.t) / den).clamp(-self.clip, self.clip)
        if self.l1 == 0.0:
            self.p = self.p - self.lr * (self.u @ u) - self.lr * self.decay * self.p
            return
        # docs/theory.md, A.2.2: P = U den^(-1/2); the threshold is on z's coordinates.
        q = self.u.T @ self.p
        q = q - self.lr * u - self.lr * self.decay * q
        threshold = torch.where(self.h == 0, 0.0, self.lr * (self.l1 / den.sqrt()).clamp(max=10.0))
        self.p = self.u @ (q.sign() * (q.abs() - threshold).clamp(min=0))


def run(params, optimizer, texts, steps=8, batch=3.0, every=3, own=False, rtol=1e-9, atol=1e-10):
    """Steps of both, with a curvature update before each third one."""
    for i in range(steps):
        if not own and i % every == 0:
            give(params, 500 + i)
            optimizer.update_curvature(batch_size=batch)
            for text, p in zip(texts, params, strict=True):
                text.bartlett(p.grad, batch)
        give(params, i)
        for text, p in zip(texts, params, strict=True):
            text.step(p.grad)
        optimizer.step()
        assert_close(params, [text.p.view(p.shape) for text, p in zip(texts, params, strict=True)], rtol, atol)


@pytest.mark.parametrize("power", [-1.0, -0.5])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("dtype", "backend"), [(F64, None), (F32, BACKEND), (F32, "reference")], ids=["f64", "fused", "f32"]
)
def test_in_the_coordinates_it_is_its_formula(power, clip, own, dtype, backend):
    params = params_of(dtype=dtype)
    options = dict(lr=0.01, eps=1e-3, power=power)
    kind = {"curvature": "gradient"} if own else {}
    optimizer = precond.GaussNewton(
        params, **options, clip=clip, weight_decay=0.1, betas=(0.8, 0.9), **kind, backend=backend
    )
    limit = math.inf if clip is None else clip
    texts = [Text(p, **options, clip=limit, decay=0.1, own=own, b1=0.8, b2=0.9) for p in params]
    tolerance = (1e-10, 1e-11) if dtype == F64 else (2e-5, 2e-5)
    run(params, optimizer, texts, own=own, rtol=tolerance[0], atol=tolerance[1])


def test_squared_gradients_and_the_root_are_adam_with_eps_inside():
    ours, theirs = params_of(dtype=F64), params_of(dtype=F64)
    options = dict(lr=0.01, weight_decay=0.1)
    a = precond.GaussNewton(ours, curvature="gradient", power=-0.5, betas=(0.9, 0.999), eps=0.0, **options)
    b = torch.optim.AdamW(theirs, eps=0.0, **options)
    multipass.train(ours, a, 0, 6)
    multipass.train(theirs, b, 0, 6)
    assert_close(ours, theirs, 1e-11, 1e-12)
    # And with a large eps, where inside and beside differ.
    (p,) = params_of(((4,),), F64)
    before = p.detach().clone()
    optimizer = precond.GaussNewton([p], lr=1.0, curvature="gradient", power=-0.5, eps=4.0)
    give([p], 0)
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - p.grad / (p.grad.square() + 4.0).sqrt())


def test_the_curvature_is_a_mean_from_its_first_update_on():
    (p,) = params_of(((3,),))
    optimizer = precond.GaussNewton([p], betas=(0.9, 0.9), curvature="hutchinson")
    seen = torch.tensor([[1.0, 2.0, -3.0], [5.0, 0.0, 1.0], [-2.0, 1.0, 1.0]])
    raw = torch.zeros(3, dtype=F64)
    for t, estimate in enumerate(seen, 1):
        optimizer.update_curvature(estimates=[estimate])
        raw = 0.9 * raw + 0.1 * estimate.double()
        torch.testing.assert_close(optimizer.state[p]["curvature"].double(), raw / (1 - 0.9**t), rtol=1e-6, atol=1e-6)
    assert optimizer.state[p]["curvature_step"] == 3


@pytest.mark.parametrize("basis", ["identity", "kronecker"])
@pytest.mark.parametrize("power", [-1.0, -0.5])
def test_damping_raises_the_curvature_by_its_mean_in_every_basis(basis, power):
    """theory.md, C.2: h + delta mean(h) of the undamped run, whose size no basis changes and which scales with the loss."""
    delta, curvatures = 0.3, {}
    for damping, scale in ((0.0, 1.0), (delta, 1.0), (delta, 2.0**13)):
        p = params_of([(4, 6)], F64)
        options = dict(basis=basis, power=power, eps=0.0, betas=(0.0, 0.8), basis_frequency=10**6)
        optimizer = precond.GaussNewton(p, lr=0.5, damping=damping, **options)
        for i in range(5):
            give(p, i)
            p[0].grad.mul_(scale)
            optimizer.update_curvature(batch_size=3)
        curvatures[damping, scale] = h = optimizer.state[p[0]]["curvature"].clone()
        give(p, 9)
        p[0].grad.mul_(scale)
        start = p[0].detach().clone()
        optimizer.step()
        moved = p[0].detach() - start
        if scale == 1.0:
            unscaled = moved
    plain, raised = curvatures[0.0, 1.0], curvatures[delta, 1.0]
    torch.testing.assert_close(raised, plain + delta * plain.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(h, 2.0**26 * raised, rtol=1e-12, atol=0)
    # c is a power of 2, which changes no rounding. Squared gradients scale by c^2, not by c as a curvature does.
    torch.testing.assert_close(moved, unscaled * 2.0 ** (13 * (1 + 2 * power)), rtol=1e-7, atol=0)
    assert raised.max() / raised.min() <= 1 + raised.numel() / delta
    # The mean, and so the raise, is that of the squares of the gradients, whatever the basis.
    squares = [params_of([(4, 6)], F64) for _ in range(5)]
    total = torch.zeros((), dtype=F64)
    for i, p in enumerate(squares):
        give(p, i)
        total = 0.8 * total + 0.2 * 3 * p[0].grad.square().mean()
    torch.testing.assert_close(plain.mean(), total / (1 - 0.8**5), rtol=1e-12, atol=0)


def test_damping_by_a_negative_mean_is_none():
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = precond.GaussNewton([w], curvature="hutchinson", damping=1.0)
    for estimate, expected in (([-3.0, 1.0], [-3.0, 1.0]), ([1.0, 3.0], [3.0, 5.0])):
        optimizer.state[w].pop("curvature_step", None)
        optimizer.update_curvature(estimates=[torch.tensor(estimate)])
        assert optimizer.state[w]["curvature"].tolist() == expected


def test_a_checkpoint_from_before_damping_loads():
    """Its groups lack the key, as those of an optimizer without damping do; the option that was asked for stays."""
    w = torch.nn.Parameter(torch.ones(2))
    old = precond.GaussNewton([w])
    assert "damping" not in old.param_groups[0]
    resumed = precond.GaussNewton([w], damping=0.3)
    resumed.load_state_dict(old.state_dict())
    w.grad = torch.tensor([1.0, 3.0])
    resumed.update_curvature()
    assert resumed.state[w]["curvature"].tolist() == pytest.approx([2.5, 10.5])


def test_negative_curvature_counts_as_none():
    for power, clip in ((-1.0, 1.0), (-0.5, None)):
        p = torch.nn.Parameter(torch.zeros(3))
        optimizer = precond.GaussNewton(
            [p], lr=1.0, betas=(0.0, 0.9), eps=0.25, power=power, clip=clip, curvature="hutchinson"
        )
        optimizer.update_curvature(estimates=[torch.tensor([-5.0, 0.0, 0.75])])
        assert optimizer.state[p]["curvature"].tolist() == [-5.0, 0.0, 0.75]
        p.grad = torch.full((3,), 0.1)
        optimizer.step()
        den = torch.tensor([0.25, 0.25, 1.0]) ** -power
        torch.testing.assert_close(p.detach(), -0.1 / den)
        assert optimizer.state[p]["curvature"].tolist() == [-5.0, 0.0, 0.75]


@pytest.mark.parametrize("power", [-1.0, -0.5])
@pytest.mark.parametrize("l1", [0.0, 0.05])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["matrix", "pair"])
def test_a_given_basis_is_the_product_with_its_matrix(kind, power, l1, own):
    params = params_of(((4, 6), (4, 6)), F64)
    left, right = orthogonal(4, 1), orthogonal(6, 2)
    u = orthogonal(24, 3) if kind == "matrix" else torch.kron(left, right)
    basis = u if kind == "matrix" else (left, right)
    options = dict(lr=0.01, eps=1e-3, power=power)
    curvature = "gradient" if own else "gnb"
    optimizer = precond.GaussNewton(
        params, **options, weight_decay=0.1, basis=basis, clip=2.0, l1_decay=l1, curvature=curvature
    )
    texts = [Text(p, **options, decay=0.1, clip=2.0, own=own, l1=l1) for p in params]
    for text in texts:
        text.u = u
    run(params, optimizer, texts, own=own)


def test_the_subgradient_of_l1_in_a_basis():
    (p,) = params_of(((2, 3),), F64)
    u = orthogonal(6)
    options = dict(lr=0.1, betas=(0.0, 0.5), eps=0.0, power=-0.5, basis=u, curvature="gradient")
    optimizer = precond.GaussNewton([p], **options, l1_decay=0.2, l1_form="subgradient")
    give([p], 0)
    q, g = u.T @ p.detach().reshape(-1), u.T @ p.grad.reshape(-1)
    optimizer.step()
    den = g.abs()
    expected = q - 0.1 * g / den - 0.1 * (0.2 / den.sqrt()).clamp(max=10.0) * q.sign()
    torch.testing.assert_close(p.detach().reshape(-1), u @ expected)


class KroneckerText(Text):
    """In the eigenvectors of means of G G^T and G^T G, refreshed by the functions of precond.bases (their signs are free)."""

    def __init__(self, p, frequency, beta, **options):
        super().__init__(p, **options)
        self.shape = (p.shape[0], p[0].numel())
        self.a = [torch.zeros(n, n, dtype=F64) for n in self.shape]
        self.q = [torch.eye(n, dtype=F64) for n in self.shape]
        self.fed, self.frequency, self.beta = 0, frequency, beta

    def feed(self, g, state):
        """After the optimizer's, with what that has for the parameter."""
        g = g.double().reshape(self.shape)
        for a, square in zip(self.a, (g @ g.T, g.T @ g), strict=True):
            a.lerp_(square, 1 - self.beta)
        if self.fed % self.frequency == 0:
            old, h = torch.kron(*self.q), self.h.view(self.shape)
            if self.fed == 0:
                self.q = [
                    eigenvectors(a, state[f"basis_{side}_0"]) for a, side in zip(self.a, ("left", "right"), strict=True)
                ]
            else:
                (self.q[0], rows), (self.q[1], columns) = (
                    bases.refreshed(q, a) for q, a in zip(self.q, self.a, strict=True)
                )
                h = h[rows][:, columns]
                if self.updates:
                    self.raw = self.raw.view(self.shape)[rows][:, columns].reshape(-1)
            self.h = h.reshape(-1)
            self.u = torch.kron(*self.q)
            self.m = self.u.T @ (old @ self.m)
        self.fed += 1


@pytest.mark.parametrize("power", [-1.0, -0.5])
@pytest.mark.parametrize("curvature", ["gradient", "gnb", "hutchinson"])
@pytest.mark.parametrize("frequency", [1, 3])
def test_a_kronecker_basis_is_the_product_with_its_factors(power, curvature, frequency):
    # Two gradients have full rank on both sides: rounding decides nothing from the first refresh on.
    params = params_of(((4, 6), (4, 2, 2, 2)), F64)
    options = dict(lr=0.01, eps=1e-3, power=power, clip=2.0)
    optimizer = precond.GaussNewton(
        params, **options, basis="kronecker", basis_frequency=frequency, basis_beta=0.8, curvature=curvature
    )
    own = curvature == "gradient"
    texts = [KroneckerText(p, frequency, 0.8, own=own, **options) for p in params]
    for i in range(12):
        if i % 2 == 1 and not own:  # after a first step in the coordinates
            give(params, 500 + i)
            if curvature == "gnb":
                optimizer.update_curvature(batch_size=2.0)
                for text, p in zip(texts, params, strict=True):
                    text.feed(p.grad, optimizer.state[p])
                    text.bartlett(p.grad, 2.0)
            else:
                estimates = [p.grad.abs() for p in params]
                optimizer.update_curvature(estimates=estimates)
                for text, estimate in zip(texts, estimates, strict=True):
                    text.update(estimate.reshape(-1))
        give(params, i)
        optimizer.step()
        for text, p in zip(texts, params, strict=True):
            if curvature != "gnb":
                text.feed(p.grad, optimizer.state[p])
            text.step(p.grad)
        assert_close(params, [text.p.view(p.shape) for text, p in zip(texts, params, strict=True)], 1e-8, 1e-9)
    for name in ("basis_left_0", "basis_right_0"):
        q = optimizer.state[params[0]][name]
        torch.testing.assert_close(q.T @ q, torch.eye(len(q), dtype=F64))


def test_blocks_of_a_kronecker_basis_are_parameters_of_their_own():
    (whole,) = params_of(((5, 8),), F64)
    parts = [torch.nn.Parameter(whole.detach()[block].clone()) for block in bases.blocks((5, 8), 3)]
    options = dict(lr=0.01, basis="kronecker", curvature="gradient", basis_frequency=2, max_size=3)
    a, b = precond.GaussNewton([whole], **options), precond.GaussNewton(parts, **options)
    for i in range(6):
        give([whole], i)
        for part, block in zip(parts, bases.blocks((5, 8), 3), strict=True):
            part.grad = whole.grad[block].clone()
        a.step()
        b.step()
    for part, block in zip(parts, bases.blocks((5, 8), 3), strict=True):
        torch.testing.assert_close(whole.detach()[block], part.detach(), rtol=1e-10, atol=1e-12)


def test_vectors_and_scalars_have_no_kronecker_basis():
    shapes = ((5,), (), (6, 1))
    turned, plain = params_of(shapes), params_of(shapes)
    a = precond.GaussNewton(turned, curvature="gradient", basis="kronecker")
    b = precond.GaussNewton(plain, curvature="gradient")
    multipass.train(turned, a, 0, 4)
    multipass.train(plain, b, 0, 4)
    assert_close(turned, plain, 1e-6, 1e-7)
    assert a.state[turned[0]].keys() == b.state[plain[0]].keys()


def test_mixed_bases_in_one_optimizer_are_as_alone():
    shapes = ((4, 6),)
    settings = [{}, {"basis": "kronecker"}, {"basis": (orthogonal(4), orthogonal(6))}, {"power": -0.5}]
    together = [params_of(shapes)[0] for _ in settings]
    alone = [params_of(shapes)[0] for _ in settings]
    options = dict(lr=0.01, curvature="gradient", weight_decay=0.1)
    mixed = precond.GaussNewton([{"params": [p], **s} for p, s in zip(together, settings, strict=True)], **options)
    singles = [precond.GaussNewton([p], **options, **s) for p, s in zip(alone, settings, strict=True)]
    for i in range(4):
        for p, q, single in zip(together, alone, singles, strict=True):
            give([q], i)
            p.grad = q.grad.clone()
            single.step()
        mixed.step()
    for p, q in zip(together, alone, strict=True):
        assert bits_equal(p.detach(), q.detach())
    assert not bits_equal(together[0].detach(), together[1].detach())


def test_a_basis_of_the_gauss_newton_matrix_solves_a_quadratic_at_once():
    """GN^-1 in the eigenbasis of the Hessian is Newton's step."""
    torch.manual_seed(1)
    a = torch.randn(6, 6, dtype=F64)
    hessian, target = a @ a.T + torch.eye(6, dtype=F64), torch.randn(6, dtype=F64)
    values, u = torch.linalg.eigh(hessian)
    p = torch.nn.Parameter(torch.zeros(6, dtype=F64))
    optimizer = precond.GaussNewton([p], lr=1.0, betas=(0.0, 0.9), eps=0.0, basis=u, curvature="hutchinson")
    optimizer.update_curvature(estimates=[values])
    p.grad = hessian @ (p.detach() - target)
    optimizer.step()
    torch.testing.assert_close(p.detach(), target)


def check_curvature(optimizer):
    optimizer.update_curvature(batch_size=2.0)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (F32, {}),
        (F32, dict(power=-0.5, state_format="int8")),
        (F32, dict(curvature="gradient", power=-0.5, state_format="int8")),
        (F32, dict(basis="kronecker", basis_frequency=2)),
        (F32, dict(basis="kronecker", curvature="gradient", basis_frequency=3, l1_decay=0.01)),
        (BF16, dict(basis="kronecker", curvature="gradient", weight_format="stochastic", state_format="bf16")),
        (BF16, dict(basis="kronecker", basis_frequency=2, weight_format="split24", state_format="fp32")),
        (BF16, dict(weight_format="split24", state_format="int8")),
        (F64, dict(basis="kronecker", basis_frequency=2)),
    ],
    ids=str,
)
def test_a_resumed_run_has_the_same_bits(dtype, options):
    feeds = None if options.get("curvature") == "gradient" else check_curvature

    def make(params):
        return precond.GaussNewton(params, lr=0.01, clip=1.0, **options)

    multipass.check_resumes(make, ((64, 64), (5,), (3, 2, 2, 2)), dtype, 4, 8, feeds)


def test_a_stochastic_weight_in_a_basis_counts_one_step_per_step():
    """The second pass draws too; were it counted, every bias correction would be that of twice as many steps."""
    (p,) = params_of(((64, 64),), BF16)
    q = torch.nn.Parameter(p.detach().float())
    options = dict(lr=0.01, curvature="gradient", power=-0.5, basis="kronecker", state_format="fp32", betas=(0.9, 0.9))
    a = precond.GaussNewton([p], **options, weight_format="stochastic")
    b = precond.GaussNewton([q], **options)
    for i in range(3):
        give([p], i)
        q.grad = p.grad.float()
        a.step()
        b.step()
        assert a.state[p]["step"] == i + 1
    torch.testing.assert_close(a.state[p]["exp_avg"], b.state[q]["exp_avg"], rtol=1e-5, atol=1e-6)
    # Unbiased: over many elements errors of rounding cancel.
    error = p.float() - q
    assert error.abs().max() <= 3 * torch.finfo(BF16).eps * q.abs().max()
    assert error.mean().abs() < 1e-4


def test_codes_are_for_what_every_step_feeds():
    params = params_of(((64, 64),))
    for source, dtype in (("gradient", torch.uint8), ("gnb", F32)):
        optimizer = precond.GaussNewton(params, state_format="int8", curvature=source, clip=1.0)
        give(params, 0)
        optimizer.step()
        assert optimizer.state[params[0]]["exp_avg"].dtype == torch.int8
        assert optimizer.state[params[0]]["curvature"].dtype == dtype


def test_a_coded_curvature_of_gradients_trains_like_a_wide_one():
    (p,), (q,) = params_of(((64, 64),)), params_of(((64, 64),))
    before = p.detach().clone()
    options = dict(lr=0.01, curvature="gradient", power=-0.5, eps=1e-8)
    a, b = precond.GaussNewton([p], **options, state_format="int8"), precond.GaussNewton([q], **options)
    multipass.train([p], a, 0, 10)
    multipass.train([q], b, 0, 10)
    assert (p - q).norm() <= 0.1 * (q - before).norm()


def test_a_16_bit_curvature_is_averaged_in_float32():
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = precond.GaussNewton([p], curvature="gnb", clip=1.0, state_format="fp32")
    p.grad = torch.tensor([1e-3, 300.0], dtype=torch.float16)
    optimizer.update_curvature(batch_size=4.0)
    torch.testing.assert_close(optimizer.state[p]["curvature"], 4.0 * p.grad.float().square())
    with pytest.warns(precond.PrecisionWarning, match="a torch.float16 curvature is 0 for gradients below"):
        precond.GaussNewton([p], curvature="gnb", clip=1.0).update_curvature()
    q = torch.nn.Parameter(torch.ones(2, dtype=BF16))
    q.grad = torch.ones_like(q)
    with pytest.warns(precond.PrecisionWarning, match="a torch.bfloat16 curvature stands still"):
        precond.GaussNewton([q], betas=(0.9, 0.999), curvature="gradient").step()


@pytest.mark.parametrize("basis", ["identity", "kronecker"])
@pytest.mark.parametrize("curvature", ["gnb", "gradient"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_it_is_an_optimizer(basis, curvature, dtype):
    feeds = None if curvature == "gradient" else check_curvature
    multipass.check_is_an_optimizer(
        lambda ps: precond.GaussNewton(ps, lr=0.01, curvature=curvature, basis=basis, eps=1e-2), dtype, feeds
    )


@pytest.mark.parametrize("basis", ["identity", "kronecker"])
def test_a_tensor_learning_rate_and_maximize(basis):
    runs = []
    for lr, sign in ((0.01, 1.0), (torch.tensor(0.01), -1.0)):
        params = params_of(KRONECKER)
        optimizer = precond.GaussNewton(
            params, lr=lr, basis=basis, curvature="gradient", maximize=sign < 0, weight_decay=0.1
        )
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for i in range(5):
            give(params, i, sign)
            optimizer.step()
            scheduler.step()
        runs.append(params)
    assert_close(*runs, 1e-5, 1e-6)


def test_norms_of_all_gradients_clip_single_passes():
    ours, theirs = params_of(), params_of()
    options = dict(lr=0.01, curvature="gradient")
    a = precond.GaussNewton(ours, **options, max_grad_norm=0.5)
    b = precond.GaussNewton(theirs, **options)
    for i in range(2):
        give(ours, i)
        give(theirs, i)
        a.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        b.step()
        assert a.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert_close(ours, theirs, 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr=-1.0), "Invalid learning rate: -1.0"),
        (dict(betas=(0.9, 1.0)), "Invalid beta parameter at index 1: 1.0"),
        (dict(eps=-1.0), "Invalid epsilon value: -1.0"),
        (dict(power=-2.0), "power must be -1 or -0.5, got -2.0"),
        (dict(clip=0.0), "clip must be None or > 0, got 0.0"),
        (dict(curvature="fisher"), "curvature must be one of gnb, hutchinson, gradient, got 'fisher'"),
        (dict(basis="svd"), "basis must be 'identity', 'kronecker' or matrices, got 'svd'"),
        (dict(basis=(torch.eye(2),) * 3), "basis must be a matrix or a pair of them, got 3"),
        (dict(basis_beta=1.0), r"basis_beta must be None or in \[0, 1\), got 1.0"),
        (dict(basis_frequency=0), "basis_frequency must be >= 1, got 0"),
        (dict(damping=-0.1), "damping must be >= 0 and finite, got -0.1"),
        (dict(damping=0.1, curvature="gradient"), "damping must be 0 with curvature='gradient', got 0.1"),
        (dict(max_size=0), "max_size must be >= 1, got 0"),
        (dict(basis="kronecker", state_format="int8"), "state_format must not have codes with a basis, got 'int8'"),
        (dict(l1_decay=-1.0), "l1_decay"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        precond.GaussNewton(params_of(((2, 2),)), **options)


def test_wrong_uses_are_named():
    params = params_of(((2, 3), (2, 3)))
    give(params, 0)
    with pytest.raises(RuntimeError, match="update_curvature must be called before the first step, or clip be given"):
        precond.GaussNewton(params).step()
    with pytest.raises(RuntimeError, match="curvature must be 'gnb' or 'hutchinson' for update_curvature"):
        precond.GaussNewton(params, curvature="gradient").update_curvature()
    optimizer = precond.GaussNewton(params, curvature="hutchinson")
    with pytest.raises(RuntimeError, match="estimates must be given with curvature='hutchinson', got None"):
        optimizer.update_curvature()
    with pytest.raises(ValueError, match="estimates must be one per parameter, 2, got 1"):
        optimizer.update_curvature(estimates=[torch.ones(2, 3)])
    with pytest.raises(
        RuntimeError, match=r"an estimate must have shape \(2, 3\) for parameter 1 of group 0, got \(3, 2\)"
    ):
        optimizer.update_curvature(estimates=[None, torch.ones(3, 2)])
    for basis, message in (
        (torch.eye(4), r"basis must have shape \(6, 6\) for parameter 0 of group 0, got \(4, 4\)"),
        ((torch.eye(3), torch.eye(2)), "basis must be matrices of 2 and 3 for parameter 0 of group 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            precond.GaussNewton(params, basis=basis, curvature="gradient").step()
    turned = precond.GaussNewton(params, basis="kronecker", curvature="hutchinson", clip=1.0)
    estimates = [torch.ones(2, 3)] * 2
    with pytest.raises(
        RuntimeError, match="a step must come before estimates of parameter 0 of group 0, to make their basis"
    ):
        turned.update_curvature(estimates=estimates)
    turned.step()
    turned.update_curvature(estimates=estimates)
    c = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    c.grad = torch.ones_like(c)
    with pytest.raises(RuntimeError, match=r"must be real to have a basis, got torch\.complex64"):
        precond.GaussNewton([c], basis="kronecker", curvature="gradient").step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(basis="kronecker"),
        dict(basis="kronecker", curvature="gradient"),
        dict(curvature="gradient", power=-0.5),
    ],
    ids=str,
)
def test_states_may_be_made_before_the_first_step(options):
    feed = None if options.get("curvature") == "gradient" else check_curvature
    multipass.check_states_may_be_made_first(lambda ps: precond.GaussNewton(ps, **options), feed)


@pytest.mark.parametrize("basis", ["identity", "kronecker"])
def test_every_backend_takes_the_same_steps(basis, triton_interpreter):
    def make(params, backend):
        return precond.GaussNewton(params, eps=1e-3, power=-0.5, basis=basis, backend=backend)

    multipass.check_backends(make, check_curvature)


def test_autograd_sees_a_step_in_the_coordinates():
    def stepped(values, gradient):
        p = values.clone()
        optimizer = precond.GaussNewton(
            [p], lr=0.1, eps=0.1, curvature="gradient", weight_decay=0.1, differentiable=True
        )
        p.grad = gradient
        optimizer.step()
        return p

    values = torch.tensor([0.7, -1.3, 0.4], dtype=F64, requires_grad=True)
    gradient = torch.tensor([0.45, -0.16, 3.2], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(stepped, (values, gradient))
    (p,) = params_of(((2, 2),))
    give([p], 0)
    with pytest.raises(RuntimeError, match="differentiable must be False with a basis"):
        precond.GaussNewton([p], basis="kronecker", curvature="gradient", differentiable=True).step()


def test_l1_in_the_coordinates_makes_zeros():
    params = params_of(((40,), (6, 7)))
    options = dict(lr=0.01, eps=1e-3, power=-0.5)
    optimizer = precond.GaussNewton(params, **options, l1_decay=0.5, weight_decay=0.1, betas=(0.9, 0.9))
    texts = [Text(p, **options, l1=0.5, decay=0.1, b2=0.9) for p in params]
    run(params, optimizer, texts, rtol=1e-4, atol=1e-5)
    zeros = sum(int((p == 0).sum()) for p in params)
    assert 0 < zeros < 82
    assert zeros == sum(int((text.p == 0).sum()) for text in texts)


def test_complex_parameters_have_no_sampled_curvature():
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 must be real for update_curvature"):
        precond.GaussNewton([p]).update_curvature()


def test_it_takes_what_the_curvature_functions_give():
    torch.manual_seed(0)
    model, twin = (torch.nn.Linear(5, 4, dtype=F64) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(16, 5, dtype=F64)
    by_gradient, by_estimate = precond.GaussNewton(model.parameters()), precond.GaussNewton(twin.parameters())
    for seed in range(3):
        outputs = model(x)
        by_gradient.zero_grad()
        curvature.sampled_label_loss(outputs, generator=torch.Generator().manual_seed(seed)).backward()
        by_gradient.update_curvature(batch_size=curvature.batch_size_of(outputs))
        generator = torch.Generator().manual_seed(seed)
        found = curvature.gauss_newton_bartlett(twin(x), twin.parameters(), generator=generator)
        by_estimate.update_curvature(estimates=found)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(by_gradient.state[p]["curvature"], by_estimate.state[q]["curvature"])


def test_probes_in_a_kronecker_basis_make_newtons_step():
    """A loss that is diagonal in the basis of its own gradients: Hutchinson's estimates in it are exact."""
    left, right = orthogonal(3, 1), orthogonal(4, 2)
    scales = torch.linspace(1.0, 9.0, 12, dtype=F64).view(3, 4)
    w = torch.nn.Parameter(left @ (torch.eye(3, 4, dtype=F64) / scales * torch.tensor([[3.0], [2.0], [1.0]])) @ right.T)
    optimizer = precond.GaussNewton(
        [w], betas=(0.0, 0.9), eps=1e-14, basis="kronecker", curvature="hutchinson", clip=1e6, basis_frequency=100
    )

    def loss():
        return 0.5 * (scales * (left.T @ w @ right) ** 2).sum()

    for lr in (0.0, 1.0):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss().backward()
        if lr > 0.0:
            basis = tuple(optimizer.state[w][f"basis_{side}_0"] for side in ("left", "right"))
            optimizer.update_curvature(estimates=curvature.hutchinson(loss(), [w], bases=[basis]))
        optimizer.step()
    assert loss() < 1e-20
