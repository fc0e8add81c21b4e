"""Estimates of curvature: means that docs/theory.md, C.2 and C.3 derive, products against explicit matrices, variances."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import precond
from precond import bases, curvature

F64 = torch.float64
N, CLASSES, INPUTS = 10, 3, 4
DRAWS = 50_000


@functools.cache
def linear_softmax():
    """Inputs x, weights W (classes x inputs) and the whole Gauss-Newton matrix, which is also the Hessian."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, INPUTS, generator=generator, dtype=F64)
    w = torch.randn(CLASSES, INPUTS, generator=generator, dtype=F64)
    p = (x @ w.T).softmax(-1)
    bend = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    gn = torch.einsum("na,nb,nkl->kalb", x, x, bend).reshape(CLASSES * INPUTS, -1) / N
    closed_form = torch.einsum("na,nk->ka", x**2, p * (1 - p)) / N
    torch.testing.assert_close(gn.diagonal(), closed_form.reshape(-1))
    return x, w, gn


def random_basis(d, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=F64))[0]


LEFT, RIGHT = random_basis(CLASSES, 2), random_basis(INPUTS, 3)


def expected_diagonal(rotated):
    gn = linear_softmax()[2]
    u = torch.kron(LEFT, RIGHT) if rotated else torch.eye(len(gn), dtype=F64)
    return (u.T @ gn @ u).diagonal().reshape(CLASSES, INPUTS)


def many_at_once(draws=DRAWS):
    """As many copies of the weights as draws: one call estimates each from labels or probes of its own."""
    x, w, _ = linear_softmax()
    copies = w.expand(draws, CLASSES, INPUTS).clone().requires_grad_()
    return copies, torch.einsum("na,dka->dnk", x, copies)


def estimates(method, rotated=False):
    """An estimate per draw, (draws, classes, inputs)."""
    torch.manual_seed(11)
    copies, outputs = many_at_once()
    basis = [(LEFT, RIGHT)] if rotated else None
    if method == "gnb":
        # The mean is over draws * N samples: h is (draws N) (ghat / draws)^2 for what is N ghat^2 in a call of its own.
        (h,) = curvature.gauss_newton_bartlett(outputs, [copies], bases=basis)
        return h * DRAWS
    product, probe = method
    labels = torch.arange(N) % CLASSES

    def loss_fn(z):
        return torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.repeat(DRAWS)) * DRAWS

    given = dict(loss=loss_fn, outputs=outputs) if product == "gauss_newton" else dict(loss=loss_fn(outputs))
    (h,) = curvature.hutchinson(params=[copies], product=product, probe=probe, bases=basis, **given)
    return h


def assert_unbiased(h, expected):
    mean = h.mean(0)
    assert (mean - expected).norm() <= 0.02 * expected.norm()
    errors = h.std(0) / math.sqrt(len(h))
    assert ((mean - expected).abs() <= 5 * errors).all()
    assert (errors > 0).all()  # an estimate, not the number itself


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    "method", ["gnb", ("hessian", "rademacher"), ("hessian", "gaussian"), ("gauss_newton", "rademacher")], ids=str
)
def test_estimates_of_the_softmax_diagonal_are_unbiased(method, rotated):
    """Within 2 % at 5e4 draws, and within 5 standard errors everywhere."""
    assert_unbiased(estimates(method, rotated), expected_diagonal(rotated))


@pytest.mark.parametrize("rotated", [False, True])
def test_a_call_averages_its_draws(rotated):
    x, w, _ = linear_softmax()
    basis = [(LEFT, RIGHT)] if rotated else None
    spread = estimates("gnb", rotated).std(0)
    w = w.clone().requires_grad_()
    (h,) = curvature.gauss_newton_bartlett(x @ w.T, [w], bases=basis, draws=400)
    assert ((h - expected_diagonal(rotated)).abs() <= 5 * spread / 20).all()
    loss = torch.nn.functional.cross_entropy(x @ w.T, torch.arange(N) % CLASSES)
    spread = estimates(("hessian", "rademacher"), rotated).std(0)
    (h,) = curvature.hutchinson(loss, [w], bases=basis, draws=400)
    assert ((h - expected_diagonal(rotated)).abs() <= 5 * spread / 20).all()


def small_net(dtype=F64):
    """A net with a hidden layer, its parameters, and its outputs as a function of them."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, INPUTS, generator=generator, dtype=F64).to(dtype)
    shapes = ((5, INPUTS), (5,), (CLASSES, 5))
    params = [torch.randn(s, generator=generator, dtype=F64).to(dtype).requires_grad_() for s in shapes]

    def outputs(w1, b1, w2):
        return torch.tanh(x @ w1.T + b1) @ w2.T

    return params, outputs


def jacobian(params, outputs):
    parts = torch.autograd.functional.jacobian(outputs, tuple(params))
    return torch.cat([part.reshape(-1, p.numel()) for part, p in zip(parts, params, strict=True)], dim=1)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def test_squared_loss_has_the_diagonal_of_its_jacobian():
    params, outputs = small_net()
    j = jacobian(params, outputs)
    expected = j.square().sum(0) / 6  # six samples in two leading dimensions
    h = flat(curvature.gauss_newton_bartlett(outputs(*params), params, loss="squared", draws=4000))
    # The gradient is Gaussian: the variance of its square is known.
    assert ((h - expected).abs() <= 5 * expected * math.sqrt(2 / 4000)).all()
    assert (h - expected).norm() <= 0.05 * expected.norm()


def unflat(vector, like):
    parts = vector.split([p.numel() for p in like])
    return [part.view(p.shape) for part, p in zip(parts, like, strict=True)]


def curved(z):
    return torch.nn.functional.cross_entropy(z.flatten(0, -2), torch.arange(6) % CLASSES) + (z**4).mean()


def test_products_are_those_of_the_explicit_matrices():
    params, outputs = small_net()
    f = outputs(*params)
    j = jacobian(params, outputs)
    bend = torch.autograd.functional.hessian(curved, f.detach()).reshape(f.numel(), -1)
    gn = j.T @ bend @ j
    whole = torch.autograd.functional.hessian(
        lambda theta: curved(outputs(*unflat(theta, params))), flat(params).detach()
    )
    assert (whole - gn).norm() > 0.01 * gn.norm()  # the net is curved: the two matrices differ
    for u in torch.randn(3, len(gn), dtype=F64):
        got = flat(curvature.gauss_newton_product(f, curved, params, unflat(u, params)))
        torch.testing.assert_close(got, gn @ u, rtol=1e-12, atol=1e-13)
        got = flat(curvature.hessian_product(curved(f), params, unflat(u, params)))
        torch.testing.assert_close(got, whole @ u, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_the_variance_of_a_probe_is_known(probe):
    """docs/theory.md, C.2: the sum of G_ij^2 over j != i, and for Gaussian probes 2 G_ii^2 more."""
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(6, 6, generator=generator, dtype=F64)
    g = a @ a.T
    theta = torch.zeros(200_000, 6, dtype=F64, requires_grad=True)
    (h,) = curvature.hutchinson((theta @ g * theta).sum() / 2, [theta], probe=probe)
    expected = g.square().sum(1) - g.diagonal() ** 2 + (2 * g.diagonal() ** 2 if probe == "gaussian" else 0)
    torch.testing.assert_close(h.var(0), expected, rtol=0.03, atol=0)
    torch.testing.assert_close(h.mean(0), g.diagonal(), rtol=0, atol=5 * expected.max().sqrt().item() / 447)


def test_gnb_is_the_squared_gradient_on_sampled_labels_times_the_batch():
    """docs/theory.md, C.2: GN^-1/2 is Adam fed with these gradients, up to sqrt(B)."""
    params, outputs = small_net()
    h = curvature.gauss_newton_bartlett(outputs(*params), params, generator=torch.Generator().manual_seed(6))
    assert all(p.grad is None for p in params)
    f = outputs(*params)
    curvature.sampled_label_loss(f, generator=torch.Generator().manual_seed(6)).backward()
    for p, h_p in zip(params, h, strict=True):
        torch.testing.assert_close(h_p, curvature.batch_size_of(f) * p.grad**2)
    assert curvature.batch_size_of(f) == 6


def test_labels_are_drawn_from_the_last_dimension():
    f = torch.zeros(2, 50, 4)
    f[..., 3] = 100.0  # all labels are 3
    assert curvature.sampled_label_loss(f).item() == 0.0
    f = torch.tensor([0.2, 0.3, 0.5], dtype=F64).log().expand(100_000, 3).clone().requires_grad_()
    (grad,) = torch.autograd.grad(curvature.sampled_label_loss(f), f)
    drawn = (grad < 0).double().mean(0)
    torch.testing.assert_close(drawn, torch.tensor([0.2, 0.3, 0.5], dtype=F64), rtol=0, atol=5 * 0.5 / 316)


def test_a_graph_is_kept_on_request():
    params, outputs = small_net()
    f = outputs(*params)
    curvature.gauss_newton_bartlett(f, params, draws=2, retain_graph=True)
    curvature.hutchinson(curved, params, product="gauss_newton", outputs=f)
    curvature.hutchinson(curved(f), params, draws=2)
    curvature.gauss_newton_bartlett(f, params)
    with pytest.raises(RuntimeError, match="second time"):
        curvature.gauss_newton_bartlett(f, params)
    assert all(p.grad is None for p in params)


def test_parameters_come_as_a_model_gives_them():
    model = torch.nn.Linear(4, 3)
    h = curvature.gauss_newton_bartlett(model(torch.randn(5, 4)), model.parameters())
    assert [t.shape for t in h] == [p.shape for p in model.parameters()]
    loss = model(torch.randn(5, 4)).square().sum()
    assert curvature.hutchinson(loss, model.parameters(), draws=2)[1].shape == (3,)
    image = curvature.hessian_product(loss, model.parameters(), [torch.zeros(3, 4), torch.ones(3)])
    torch.testing.assert_close(image[1], torch.full((3,), 10.0))


def test_estimates_work_where_autograd_is_off():
    params, outputs = small_net()
    f = outputs(*params)
    loss = curved(f)
    with torch.no_grad():
        curvature.gauss_newton_bartlett(f, params, retain_graph=True)
        h = curvature.hutchinson(curved, params, product="gauss_newton", outputs=f)
        assert not any(t.requires_grad for t in h)
        assert not any(t.requires_grad for t in curvature.hutchinson(loss, params))


def test_a_parameter_without_influence_has_no_curvature():
    params, outputs = small_net()
    idle = torch.ones(2, 2, dtype=F64, requires_grad=True)
    f = outputs(*params)
    for h in (
        curvature.gauss_newton_bartlett(f, [idle, *params], retain_graph=True),
        curvature.hutchinson(curved(f), [idle, *params]),
        curvature.hutchinson(curved, [idle, *params], product="gauss_newton", outputs=f),
    ):
        assert torch.equal(h[0], torch.zeros(2, 2, dtype=F64))
        assert all(t.abs().max() > 0 for t in h[1:])
    assert torch.equal(curvature.hutchinson((idle * 3).sum(), [idle])[0], torch.zeros(2, 2, dtype=F64))  # linear
    assert torch.equal(
        curvature.gauss_newton_product(f, lambda z: z.sum(), params, params)[0], torch.zeros_like(params[0])
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_curvature_of_halves_is_float32(dtype):
    """1e-4 is a gradient of float16, its square is not."""
    w = torch.full((4,), 1e-4, dtype=dtype, requires_grad=True)
    (h,) = curvature.gauss_newton_bartlett((torch.stack([w, -w], dim=-1) * 1e-4), [w], draws=2)
    assert h.dtype == torch.float32
    assert (h > 0).all()
    (h,) = curvature.hutchinson((w.float() ** 2).sum(), [w])
    assert h.dtype == torch.float32
    assert h.tolist() == [2.0] * 4


def test_wrong_arguments_raise():
    params, outputs = small_net()
    f = outputs(*params)
    with pytest.raises(ValueError, match="loss must be 'cross_entropy' or 'squared', got 'hinge'"):
        curvature.sampled_label_loss(f, "hinge")
    with pytest.raises(ValueError, match=r"at least one sample, got \(0, 3\)"):
        curvature.batch_size_of(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"at least one sample, got \(\)"):
        curvature.sampled_label_loss(f.sum())
    with pytest.raises(ValueError, match="draws must be >= 1, got 0"):
        curvature.gauss_newton_bartlett(f, params, draws=0)
    with pytest.raises(ValueError, match="bases must be one per parameter, 3, got 1"):
        curvature.gauss_newton_bartlett(f, params, bases=[None])
    with pytest.raises(ValueError, match=r"left must have shape \(5, 5\)"):
        curvature.gauss_newton_bartlett(f, params, bases=[(LEFT, None), None, None], retain_graph=True)
    with pytest.raises(ValueError, match="probe must be 'rademacher' or 'gaussian', got 'cauchy'"):
        curvature.hutchinson(curved(f), params, probe="cauchy")
    with pytest.raises(ValueError, match="product must be 'hessian' or 'gauss_newton', got 'fisher'"):
        curvature.hutchinson(curved(f), params, product="fisher")
    with pytest.raises(TypeError, match=r"loss must be a scalar tensor, got one of shape \(2, 3, 3\)"):
        curvature.hutchinson(f, params)
    with pytest.raises(TypeError, match="outputs must be a tensor with a graph, got a NoneType"):
        curvature.hutchinson(curved, params, product="gauss_newton")
    with pytest.raises(TypeError, match=r"loss must be a function of outputs, got one of shape \(\)"):
        curvature.hutchinson(curved(f), params, product="gauss_newton", outputs=f)
    with pytest.raises(TypeError, match=r"loss must give a scalar tensor, got one of shape \(2, 3, 3\)"):
        curvature.gauss_newton_product(f, lambda z: z * 2, params, params)
    with pytest.raises(ValueError, match="vectors must have the parameters' shapes"):
        curvature.hessian_product(curved(f), params, params[:2])
    with pytest.raises(ValueError, match=r"params must be real, got one of torch\.complex64"):
        curvature.hutchinson(curved(f), [torch.zeros(2, dtype=torch.complex64)])


# What Adam's second moment is for linear regression on Gaussian data.

D = 6


@functools.cache
def gaussian_regression(rotated):
    """The factor, covariance and error of the identity's x ~ N(0, Sigma), y = x theta* + noise, in a basis."""
    generator = torch.Generator().manual_seed(7)
    a = torch.randn(D, D, generator=generator, dtype=F64)
    sigma = a @ torch.logspace(-2, 0, D, dtype=F64).diag() @ a.T
    delta = torch.randn(D, generator=generator, dtype=F64)
    basis = bases.eigenbasis(sigma) if rotated else torch.eye(D, dtype=F64)
    sigma, delta = basis.T @ sigma @ basis, basis.T @ delta
    return torch.linalg.cholesky(sigma + 1e-12 * torch.eye(D, dtype=F64)), sigma, delta


def squared_gradients(rotated, batch, samples, noise=0.1):
    """E[g_i^2] of the mean loss over a batch, and E[h_i] of Gauss-Newton-Bartlett, measured."""
    factor, sigma, delta = gaussian_regression(rotated)
    x = torch.randn(samples, D, dtype=F64) @ factor.T
    residual = x @ delta + math.sqrt(noise) * torch.randn(samples, dtype=F64)
    g = (x * residual[:, None]).view(-1, batch, D).mean(1)
    theta = torch.zeros(samples // batch, D, dtype=F64, requires_grad=True)
    outputs = torch.einsum("nbd,nd->nb", x.view(-1, batch, D), theta)[..., None]
    (h,) = curvature.gauss_newton_bartlett(outputs, [theta], loss="squared")
    power = delta @ sigma @ delta + noise
    return g.square().mean(0), h.sum(0), power, sigma, delta


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("batch", "samples"), [(1, 2_000_000), (4, 2_000_000)])
def test_squared_gradients_follow_the_gaussian_identity(batch, samples, rotated):
    torch.manual_seed(21)
    squares, h, power, sigma, delta = squared_gradients(rotated, batch, samples)
    expected = power * sigma.diagonal() / batch + (1 + 1 / batch) * (sigma @ delta) ** 2
    torch.testing.assert_close(squares, expected, rtol=0.01, atol=0)
    torch.testing.assert_close(h, sigma.diagonal(), rtol=0.01, atol=0)  # the Gauss-Newton diagonal
    ratio = batch * squares / (power * h)
    assert (ratio >= 1 - 0.02).all()
    assert (ratio <= batch + 2).all()
    assert ratio.max() > 1.05  # not just GN


def test_adam_and_the_root_of_gauss_newton_point_the_same_way():
    """docs/theory.md, C.3.3: the ratio is in [1, B + 2], and at B = 1 the angle's cosine at least 0.9634, on random problems."""
    generator = torch.Generator().manual_seed(8)
    a = torch.randn(20_000, D, D, generator=generator, dtype=F64)
    sigma = a @ a.mT
    delta = torch.randn(20_000, D, 1, generator=generator, dtype=F64)
    gradient = (sigma @ delta).squeeze(-1)
    noise = torch.logspace(-4, 1, 20_000, dtype=F64)
    power = (delta.mT @ sigma @ delta).flatten() + noise
    diagonal = sigma.diagonal(dim1=-2, dim2=-1)
    for batch in (1, 8, 64):
        squares = power[:, None] * diagonal / batch + (1 + 1 / batch) * gradient**2
        ratio = batch * squares / (power[:, None] * diagonal)
        assert ratio.min() >= 1
        assert ratio.max() <= batch + 2
        assert ratio.max() > (batch + 2) * 0.9
        if batch == 1:
            adam, root = gradient / squares.sqrt(), gradient / diagonal.sqrt()
            cosine = torch.nn.functional.cosine_similarity(adam, root, dim=-1)
            assert cosine.min() >= 2 * 3**-0.25 / (1 + 3**-0.5) - 1e-12
            assert cosine.min() <= 0.98


def test_the_module_is_imported_when_it_is_used():
    assert precond.curvature is curvature
    with pytest.raises(AttributeError, match="has no attribute 'no_such_module'"):
        _ = precond.no_such_module
