"""Diagnostics: known spectra, every optimizer's preconditioner from its states, the tables of docs/theory.md, A.1 and A.3.6."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import precond
from precond import diagnostics

pytest.importorskip("scipy")
F64 = torch.float64


def basis(d, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=F64))[0]


def quadratic(values, seed=0):
    """A matrix of these eigenvalues, a parameter in two tensors, and p^T H p / 2 + a linear term."""
    u = basis(len(values), seed)
    h = (u * values) @ u.T
    h = (h + h.T) / 2
    first = 3 * (len(values) // 4)
    params = [torch.ones(3, first // 3, dtype=F64, requires_grad=True)]
    params += [torch.ones(len(values) - first, dtype=F64, requires_grad=True)]

    def loss():
        p = torch.cat([t.reshape(-1) for t in params])
        return p @ h @ p / 2 + p.sum()

    return h, params, loss


# The operator.


def test_an_operator_is_the_hessian():
    h, params, loss = quadratic(torch.linspace(-1, 3, 12, dtype=F64))
    for given in (loss, loss()):
        operator = diagnostics.hessian_operator(given, params)
        assert operator.shape == (12, 12)
        assert operator.dtype == "float64"
        torch.testing.assert_close(diagnostics.dense(operator), h, rtol=0, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(diagnostics.dense(diagnostics.hessian_operator(loss, params)), h, rtol=0, atol=1e-14)
    u = torch.randn(12, 2, dtype=F64)
    torch.testing.assert_close(torch.from_numpy(operator @ u.numpy()), h @ u, rtol=0, atol=1e-13)
    assert all(p.grad is None for p in params)


def test_an_operator_of_a_network_is_its_hessian():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    x, y = torch.randn(8, 4, dtype=F64), torch.randn(8, 2, dtype=F64)
    params = dict(model.named_parameters())

    def of(*tensors):
        f = torch.func.functional_call(model, dict(zip(params, tensors, strict=True)), x)
        return (f - y).square().mean()

    blocks = torch.autograd.functional.hessian(of, tuple(params.values()))
    rows = [
        torch.cat([b.reshape(p.numel(), -1) for b in row], 1) for row, p in zip(blocks, params.values(), strict=True)
    ]
    operator = diagnostics.hessian_operator(lambda: (model(x) - y).square().mean(), model.parameters())
    torch.testing.assert_close(diagnostics.dense(operator), torch.cat(rows), rtol=0, atol=1e-14)


def test_an_operator_of_gauss_newton_is_semidefinite_where_the_hessian_is_not():
    """Least squares with f = w^2: the Hessian is J^T J + diag(2 (f - y)), far from the targets negative."""
    w = torch.tensor([0.5, 1.0, 2.0], dtype=F64, requires_grad=True)
    y, p = torch.tensor([9.0, 9.0, 9.0], dtype=F64), torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    f = w**2

    def loss_fn(z):
        return (z - y).square().sum() / 2

    gauss_newton = diagnostics.dense(diagnostics.gauss_newton_operator(f, loss_fn, [w], [p]))
    torch.testing.assert_close(gauss_newton, (4 * w.detach() ** 2 * p**2).diag(), rtol=0, atol=1e-14)
    operator = diagnostics.hessian_operator(loss_fn(f), [w], [p])
    expected = (p**2 * (4 * w**2 + 2 * (f - y))).detach().diag()
    torch.testing.assert_close(diagnostics.dense(operator), expected, rtol=0, atol=1e-14)
    assert diagnostics.condition_number(operator) == math.inf


def mapped(params, p):
    """A full matrix P, and its transpose, as functions of lists."""

    def times(matrix):
        def apply(vectors):
            flat = matrix @ torch.cat([v.reshape(-1) for v in vectors])
            parts = flat.split([t.numel() for t in params])
            return [part.view(t.shape) for part, t in zip(parts, params, strict=True)]

        return apply

    return times(p), times(p.T)


def test_a_preconditioner_is_applied_from_both_sides():
    h, params, loss = quadratic(torch.linspace(1, 3, 12, dtype=F64))
    scales = [torch.rand(t.shape, dtype=F64) + 0.1 for t in params]
    d = torch.cat([s.reshape(-1) for s in scales])
    expected = d[:, None] * h * d
    for given in (scales, tuple(scales), dict(zip(params, scales, strict=True))):
        got = diagnostics.dense(diagnostics.hessian_operator(loss, params, given))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    p = torch.randn(12, 12, dtype=F64)  # not symmetric
    got = diagnostics.dense(diagnostics.hessian_operator(loss, params, mapped(params, p)))
    torch.testing.assert_close(got, p.T @ h @ p, rtol=0, atol=1e-12)


def test_wrong_preconditioners_raise():
    _, params, loss = quadratic(torch.ones(12, dtype=F64))
    with pytest.raises(ValueError, match=r"must have the parameters' shapes .*\(3, 3\), \(3,\).*, got .*\(3,\)"):
        diagnostics.hessian_operator(loss, params, [torch.ones(3), torch.ones(3)])
    with pytest.raises(ValueError, match="must be finite"):
        diagnostics.hessian_operator(loss, params, [torch.full_like(p, math.inf) for p in params])
    with pytest.raises(ValueError, match="must have every parameter, got none for 1 of 2"):
        diagnostics.hessian_operator(loss, params, {params[0]: torch.ones(3, 3)})
    for bad in ("P", [1.0, 2.0], (lambda v: v,)):
        with pytest.raises(TypeError, match="must be None, an optimizer, a mapping or sequence of tensors"):
            diagnostics.hessian_operator(loss, params, bad)
    with pytest.raises(ValueError, match="params must be real"):
        diagnostics.hessian_operator(loss, [torch.ones(2, dtype=torch.complex64)])
    with pytest.raises(TypeError, match="loss must be a scalar tensor"):
        diagnostics.hessian_operator(params[0], params)


# The table of docs/theory.md, A.1.

OPTIMIZERS = [
    (cls, options)
    for names, options in [
        (("Adam", "AdamW"), dict(betas=(0.5, 0.9), eps=1e-3)),
        (("Adam", "AdamW"), dict(betas=(0.5, 0.9), eps=1e-3, amsgrad=True)),
        (("Adagrad",), dict(eps=1e-3, initial_accumulator_value=0.1)),
        (("RMSprop",), dict(alpha=0.9, eps=1e-3)),
        (("RMSprop",), dict(alpha=0.9, eps=1e-3, centered=True, momentum=0.5)),
        (("SGD",), dict(lr=0.1, momentum=0.9)),
    ]
    for name in names
    for cls in (getattr(torch.optim, name), getattr(precond, name), getattr(precond, name.removesuffix("W") + "W"))
]


def expected_den(name, options, gradients):
    """As docs/theory.md, A.1 has it, from the gradients."""
    v = torch.zeros_like(gradients[0]) + options.get("initial_accumulator_value", 0.0)
    mean, largest = torch.zeros_like(v), torch.zeros_like(v)
    for g in gradients:
        if name == "Adagrad":
            v = v + g**2
            continue
        b = options["betas"][1] if name == "Adam" else options["alpha"]
        v = b * v + (1 - b) * g**2
        mean = b * mean + (1 - b) * g
        largest = torch.maximum(largest, v)
    if name == "Adam":
        v = (largest if options.get("amsgrad") else v) / (1 - options["betas"][1] ** len(gradients))
    if options.get("centered"):
        v = v - mean**2
    return v.sqrt() + options["eps"]


@pytest.mark.parametrize(
    ("cls", "options"), OPTIMIZERS, ids=lambda o: f"{o.__module__}.{o.__name__}" if isinstance(o, type) else None
)
def test_an_optimizers_preconditioner_is_that_of_its_states(cls, options):
    p, idle = (torch.nn.Parameter(torch.ones(3, 5, dtype=F64)) for _ in range(2))
    optimizer = cls([p, idle], **options, weight_decay=0.0)
    gradients = [torch.randn(3, 5, dtype=F64) * 0.5**i for i in range(4)]
    for g in gradients:
        p.grad = g
        optimizer.step()
    found = diagnostics.preconditioner_of(optimizer)
    assert not found[p].requires_grad
    name = cls.__name__.removesuffix("W")
    if name == "SGD":
        assert found.keys() == {p, idle}
        assert torch.equal(found[p], torch.ones_like(p))
        return
    assert found.keys() == {p}  # the other one was never stepped
    torch.testing.assert_close(found[p], expected_den(name, options, gradients) ** -0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "dtype", "error"),
    [
        (dict(state_format="int8"), torch.float32, 0.02),
        (dict(state_format="int4"), torch.float32, 0.25),
        (dict(state_format="bf16"), torch.float32, 0.01),
        (dict(weight_format="split32", state_format="int8"), torch.bfloat16, 0.02),
    ],
    ids=str,
)
def test_short_states_are_decoded(options, dtype, error):
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
    optimizer = precond.AdamW([p], betas=(0.9, 0.99), eps=1e-8, **options)
    p.grad = (torch.rand(64, 64) + 0.5).to(dtype)
    optimizer.step()
    found = diagnostics.preconditioner_of(optimizer)[p]
    assert found.dtype == torch.float32
    assert ((found * p.grad.float().sqrt() - 1).abs() <= error).all()  # after one step den = |g|
    assert found.unique().numel() > 4


def test_groups_have_preconditioners_of_their_own():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.RMSprop([dict(params=[p], alpha=0.0), dict(params=[q], alpha=0.75)], eps=0.0)
    for t in (p, q):
        t.grad = torch.full((2,), 4.0)
    optimizer.step()
    found = diagnostics.preconditioner_of(optimizer)
    torch.testing.assert_close(found[p], torch.full((2,), 0.5))
    torch.testing.assert_close(found[q], torch.full((2,), 0.5**0.5))


def test_before_a_step_there_is_no_preconditioner():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="got none for 1 of 1: an optimizer has one after a step"):
        diagnostics.report(lambda: (p**2).sum(), precond.Adam([p]))


# Spectra.


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [12, 300])
def test_extreme_eigenvalues_are_right_to_1e_8(n, k, monkeypatch):
    monkeypatch.setattr(diagnostics.spectra, "_SMALL", 64)
    values = torch.linspace(0.5, 100, n, dtype=F64)
    _, params, loss = quadratic(values)
    smallest, largest = diagnostics.extreme_eigenvalues(diagnostics.hessian_operator(loss, params), k)
    torch.testing.assert_close(smallest, values[:k], rtol=1e-8, atol=0)
    torch.testing.assert_close(largest, values[-k:], rtol=1e-8, atol=0)


def test_a_large_operator_is_never_made_dense(monkeypatch):
    _, params, loss = quadratic(torch.linspace(1, 1000, 1200, dtype=F64))
    monkeypatch.setattr(diagnostics.spectra, "dense", None)
    kappa = diagnostics.condition_number(diagnostics.hessian_operator(loss, params))
    assert kappa == pytest.approx(1000, rel=1e-8)


def test_an_iteration_that_does_not_converge_is_replaced_or_raises(monkeypatch):
    monkeypatch.setattr(diagnostics.spectra, "_SMALL", 64)
    _, params, loss = quadratic(torch.logspace(0, 6, 300, dtype=F64))
    operator = diagnostics.hessian_operator(loss, params)
    assert diagnostics.condition_number(operator) == pytest.approx(1e6, rel=1e-8)
    monkeypatch.setattr(diagnostics.spectra, "_DENSE", 299)
    with pytest.raises(RuntimeError, match="No convergence"):
        diagnostics.condition_number(operator)


def test_condition_numbers_of_semidefinite_and_indefinite_losses():
    def kappa(values, **options):
        _, params, loss = quadratic(torch.tensor(values, dtype=F64))
        return diagnostics.condition_number(diagnostics.hessian_operator(loss, params), **options)

    assert kappa([1.0, 2.0, 3.0, 8.0]) == pytest.approx(8, rel=1e-12)
    assert kappa([0.0, 2.0, 3.0, 8.0], nonzero=True) == pytest.approx(4, rel=1e-12)
    assert kappa([0.0, 2.0, 3.0, 8.0]) > 1e14
    assert kappa([0.1, 2.0, 3.0, 8.0], nonzero=True, rtol=0.05) == pytest.approx(4, rel=1e-12)
    assert kappa([-1.0, 2.0, 3.0, 8.0]) == math.inf
    assert kappa([-1.0, 2.0, 3.0, 8.0], nonzero=True) == math.inf
    assert kappa([0.0] * 4, nonzero=True) == math.inf


def test_arguments_out_of_range_raise():
    from scipy.sparse.linalg import aslinearoperator

    operator = aslinearoperator(torch.eye(3).numpy())
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k must be from 1 to n = 3, got {k}"):
            diagnostics.extreme_eigenvalues(operator, k)
    for name in ("probes", "steps", "points"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            diagnostics.spectral_density(operator, **{name: 0})
    with pytest.raises(ValueError, match=r"sigma must be None or > 0, got 0\.0"):
        diagnostics.spectral_density(operator, sigma=0.0)
    with pytest.raises(ValueError, match="nonzero must be False above n = 4096, got n = 5000"):
        diagnostics.condition_number(diagnostics.hessian_operator(*flat_loss(5000)), nonzero=True)


def flat_loss(n):
    p = torch.ones(n, requires_grad=True)
    return (p**2).sum(), [p]


def test_a_density_has_the_moments_of_the_spectrum():
    values = torch.cat([torch.linspace(1, 2, 150, dtype=F64), torch.linspace(9, 10, 50, dtype=F64)])
    _, params, loss = quadratic(values)
    operator = diagnostics.hessian_operator(loss, params)
    probes = 40
    found = diagnostics.spectral_density(operator, probes=probes, steps=30, sigma=0.1)
    grid, density, nodes, weights = found
    assert (density >= 0).all()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-9)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    for power in (1, 2):
        # A unit Gaussian vector's v^T A v has variance 2 var(lambda) / (n + 2).
        error = 5 * math.sqrt(2 * (values**power).var().item() / 202 / probes)
        assert weights @ nodes**power == pytest.approx((values**power).mean().item(), abs=error)
    assert torch.trapezoid(density * grid, grid).item() == pytest.approx((weights @ nodes).item(), abs=1e-6)
    beyond = grid > 5
    assert torch.trapezoid(density[beyond], grid[beyond]).item() == pytest.approx(0.25, abs=0.02)
    between = (grid > 3) & (grid < 8)
    assert density[between].max() <= 0.02
    # The exact curve, smoothed alike.
    exact = torch.exp(-0.5 * ((grid[:, None] - values) / 0.1) ** 2).mean(1) / (0.1 * math.sqrt(2 * math.pi))
    assert torch.trapezoid((density - exact).abs(), grid).item() <= 0.1


def test_a_quadrature_is_exact_when_it_runs_to_its_end():
    """As many steps as eigenvalues, or fewer where there are fewer different ones; more are not made."""
    for values, nodes in (
        (torch.linspace(1, 5, 20, dtype=F64), 20),
        (torch.tensor([1.0, 4.0], dtype=F64).repeat(10), 2),
    ):
        _, params, loss = quadratic(values)
        found = diagnostics.spectral_density(diagnostics.hessian_operator(loss, params), probes=1, steps=50)
        assert len(found.nodes) == nodes
        torch.testing.assert_close(found.nodes, values.unique(), rtol=0, atol=1e-10)
    _, params, loss = quadratic(torch.zeros(20, dtype=F64))
    found = diagnostics.spectral_density(diagnostics.hessian_operator(loss, params))
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1, abs=1e-9)


def test_full_orthogonalisation_counts_no_eigenvalue_twice():
    """An isolated eigenvalue of 1e6 has weight 1 / 100 on average; without orthogonalisation ghosts of it appear."""
    values = torch.cat([torch.linspace(1, 2, 99, dtype=F64), torch.tensor([1e6], dtype=F64)])
    _, params, loss = quadratic(values)
    found = diagnostics.spectral_density(diagnostics.hessian_operator(loss, params), probes=1, steps=100)
    assert (found.nodes > 10).sum() == 1


# Comparisons.


def test_a_report_shows_what_a_preconditioner_does():
    """Badly scaled coordinates: a diagonal P takes kappa from 1e6 to about what is left without the scales."""
    u = basis(30, 1)
    scales = torch.logspace(-1.5, 1.5, 30, dtype=F64)
    h = scales[:, None] * (u * torch.linspace(1, 3, 30, dtype=F64)) @ u.T * scales
    p = torch.nn.Parameter(torch.zeros(30, dtype=F64))
    optimizer = precond.Adam([p], lr=1e-12, betas=(0.9, 0.999))

    def loss():
        return p @ h @ p / 2

    for _ in range(
        300
    ):  # docs/theory.md, A.1: E[g_i^2] is the squared norm of a row of H where p - p* has covariance I
        p.grad = h @ torch.randn(30, dtype=F64)
        optimizer.step()
    found = diagnostics.report(loss, optimizer)
    values = torch.linalg.eigvalsh(h)
    assert found["identity"].condition == pytest.approx((values[-1] / values[0]).item(), rel=1e-6)
    assert found["identity"].condition > 5e5
    assert found["Adam"].condition < 1e4
    d = diagnostics.preconditioner_of(optimizer)[p]
    values = torch.linalg.eigvalsh(d[:, None] * h * d)
    assert found["Adam"].smallest == pytest.approx(values[0].item(), rel=1e-6)
    assert found["Adam"].largest == pytest.approx(values[-1].item(), rel=1e-6)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines] == ["smallest", "identity", "Adam"]


def inputs_of_the_table(correlated=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 20, generator=generator, dtype=F64)
    if correlated:
        mix = torch.randn(20, 20, generator=generator, dtype=F64)
        x = x @ (torch.eye(20, dtype=F64) + 0.5 * mix / math.sqrt(20))
    sigma = torch.logspace(-2, 2, 20, dtype=F64)
    return x * sigma + torch.linspace(-5, 5, 20, dtype=F64) * sigma


def test_the_table_of_bnp_is_reproduced():
    """docs/theory.md, A.3.6: 5.9e4, 9.7e3 and 1.304 for independent inputs; correlated ones have more left after scaling."""
    found = diagnostics.layer_conditions(inputs_of_the_table(), eps1=0.0, eps2=0.0, eps=0.0)
    assert found["inputs"] == pytest.approx(5.9e4, rel=0.1)
    assert found["centred"] == pytest.approx(9.7e3, rel=0.1)
    assert found["bnp"] == pytest.approx(1.304, rel=0.05)
    assert found["standardized"] == pytest.approx(found["bnp"], rel=1e-9)
    assert found["batch_norm"] == pytest.approx(found["bnp"], rel=1e-9)
    assert found["layer_norm"] > 100  # it mixes features of different size: no cure for this
    assert math.isfinite(found["layer_norm"])
    regular = diagnostics.layer_conditions(inputs_of_the_table())
    assert regular["bnp"] > 100  # eps1 = 1e-2 of the largest variance, which is 1e8 times the smallest
    correlated = diagnostics.layer_conditions(inputs_of_the_table(correlated=True), eps1=0.0, eps2=0.0)
    for name, kappa in (("inputs", 9.5e4), ("centred", 1.9e4), ("bnp", 4.40)):
        assert kappa / 2 < correlated[name] < kappa * 2  # another draw of the mixing matrix
    small = diagnostics.layer_conditions(inputs_of_the_table(), batch_size=5)
    assert small["batch_norm"] != regular["batch_norm"]


def test_bnps_preconditioner_takes_the_hessian_from_3_5e9_to_1_70():
    """docs/theory.md, A.3.6: U D as a pair of functions, on least squares with a dense layer."""
    x = inputs_of_the_table()
    layer = torch.nn.Linear(20, 1, dtype=F64)
    _, mu, sigma = diagnostics.standardize(x)

    def into(z):
        w = z[0] / sigma
        return [w, z[1] - w @ mu]

    def transposed(g):
        return [(g[0] - g[1][:, None] * mu) / sigma, g[1]]

    def loss():
        return layer(x).square().mean() / 2

    found = diagnostics.compare(loss, layer.parameters(), {"plain": None, "BNP": (into, transposed)})
    assert found["plain"].condition == pytest.approx(3.5e9, rel=0.2)
    assert found["BNP"].condition == pytest.approx(1.70, rel=0.05)
    kappa = diagnostics.layer_conditions(x, eps1=0.0, eps2=0.0)
    assert found["BNP"].condition == pytest.approx(kappa["bnp"] ** 2, rel=1e-6)


def test_standardized_inputs_have_mean_0_and_variance_1():
    x = torch.randn(4, 50, 3) * torch.tensor([1e-3, 1.0, 1e3]) + torch.tensor([5.0, 0.0, -5.0])
    x[..., 1] = 0.1  # constant, and its mean is not exact
    values, mean, scale = diagnostics.standardize(x)
    assert values.shape == x.shape
    assert (values[..., 1] == 0).all()
    assert scale[1] == 1
    rows = values.view(-1, 3).double()
    torch.testing.assert_close(rows.mean(0), torch.zeros(3, dtype=F64), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        rows.var(0, correction=0), torch.tensor([1.0, 0.0, 1.0], dtype=F64), rtol=1e-3, atol=1e-12
    )
    torch.testing.assert_close((x - mean) / scale, values)
    assert diagnostics.standardize(x.half()).values.dtype == torch.float32


def test_wrong_inputs_raise():
    for bad in (torch.zeros(0, 3), torch.tensor(1.0), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="inputs must be real floats"):
            diagnostics.standardize(bad)
    for name in ("eps1", "eps2", "eps"):
        with pytest.raises(ValueError, match=f"{name} must be >= 0, got -1"):
            diagnostics.layer_conditions(torch.randn(9, 2), **{name: -1})
    with pytest.raises(ValueError, match="batch_size must be None or >= 1, got 0"):
        diagnostics.layer_conditions(torch.randn(9, 2), batch_size=0)


def test_densities_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    _, params, loss = quadratic(torch.linspace(1, 5, 20, dtype=F64))
    found = diagnostics.spectral_density(diagnostics.hessian_operator(loss, params))
    diagnostics.plot({"H": found, "P^T H P": found}, tmp_path / "two.png", title="spectra")
    diagnostics.plot(found, tmp_path / "one.png")
    for name in ("one", "two"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "two.png").stat().st_size > (tmp_path / "one.png").stat().st_size


def test_what_is_missing_is_named(monkeypatch):
    _, params, loss = quadratic(torch.ones(12, dtype=F64))
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r"an operator needs scipy: pip install 'precond\[diagnostics\]'"):
        diagnostics.hessian_operator(loss, params)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"a plot needs matplotlib: pip install 'precond\[diagnostics\]'"):
        diagnostics.plot({}, "nowhere.png")


def test_importing_precond_imports_none_of_it():
    late = ["scipy", "matplotlib", "precond.diagnostics", "precond.curvature"]
    code = f"import sys, precond; print([name for name in {late} if name in sys.modules]); precond.diagnostics.Density"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
