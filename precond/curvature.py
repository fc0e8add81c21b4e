"""Unbiased estimates of the diagonal of the Gauss-Newton matrix or the Hessian, in the parameters' own coordinates or in a
Kronecker basis. A training loop calls them every few steps; none of them touches ``.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ._core.precision import at_stated_precision, stated_precision
from .bases import rotate, rotate_back

#: Left and right factor of a Kronecker basis, the basis vectors as columns; None is the identity.
Basis = tuple[Tensor | None, Tensor | None] | None
Product = Callable[[Sequence[Tensor]], list[Tensor]]

_LOSSES = ("cross_entropy", "squared")


@at_stated_precision
def sampled_label_loss(
    outputs: Tensor, loss: str = "cross_entropy", *, generator: torch.Generator | None = None
) -> Tensor:
    r"""The mean loss on labels drawn from the model: the squares of its gradients estimate the Gauss-Newton diagonal.

    .. math::
        y_n \sim \mathrm{softmax}(f(x_n)), \quad L = -\frac1B \sum_n \log p_{n y_n}
        \qquad\text{or}\qquad
        y_n \sim N(f(x_n), I), \quad L = \frac1{2B} \sum_n \lVert f(x_n) - y_n \rVert^2

    Labels are constants. In a loop that calls ``backward`` itself, or reduces gradients over processes, use
    ``h = batch_size_of(outputs) * p.grad**2``, where a gradient averaged over processes counts the samples of all of them.

    Args:
        outputs: f (..., C): the last dimension holds the logits, or the outputs of a regression; all others are samples. With
            one output per sample the shape is (B, 1), not (B,). Leave out padding by ``outputs[mask]``. 16-bit outputs are
            widened to float32.
        loss: "cross_entropy" (default) or "squared", summed over outputs and with the factor 1/2.
        generator: draws the labels, on the device of outputs; None (default) is torch's default generator.

    Returns:
        A scalar to differentiate.

    Raises:
        ValueError: loss has another name, or outputs have no samples or no dimension.

    Source: Gauss-Newton-Bartlett as in Sophia's public code (Liu et al., arXiv 2305.14342); squared loss: docs/theory.md, C.2.

    Example:
        >>> import torch
        >>> from precond import curvature
        >>> f = torch.tensor([[0.0, 0.0], [200.0, 0.0]], requires_grad=True)
        >>> curvature.sampled_label_loss(f).backward()
        >>> (curvature.batch_size_of(f) * f.grad**2).tolist()  # a sure class has no curvature
        [[0.125, 0.125], [0.0, 0.0]]
    """
    _check_loss(loss)
    batch_size_of(outputs)
    f = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).reshape(-1, outputs.shape[-1])
    if loss == "squared":
        noise = torch.randn(f.shape, dtype=f.dtype, device=f.device, generator=generator)
        return (f - (f.detach() + noise)).square().sum(-1).mean() / 2
    labels = torch.multinomial(f.detach().softmax(-1), 1, generator=generator).squeeze(-1)
    return torch.nn.functional.cross_entropy(f, labels)


def batch_size_of(outputs: Tensor) -> int:
    """The number of samples B in a model's outputs (..., C): the factor of a squared gradient of their mean loss.

    Raises:
        ValueError: outputs have no dimension or no samples.

    Source: docs/theory.md, C.2.

    Example:
        >>> import torch
        >>> from precond import curvature
        >>> curvature.batch_size_of(torch.zeros(8, 128, 50257))  # a language model: every token is a sample
        1024
    """
    if outputs.ndim == 0 or outputs.numel() == 0:
        raise ValueError(f"outputs must have shape (..., C) with at least one sample, got {tuple(outputs.shape)}")
    return outputs.numel() // outputs.shape[-1]


@at_stated_precision
def gauss_newton_bartlett(
    outputs: Tensor,
    params: Iterable[Tensor],
    *,
    loss: str = "cross_entropy",
    bases: Sequence[Basis] | None = None,
    draws: int = 1,
    generator: torch.Generator | None = None,
    retain_graph: bool = False,
) -> list[Tensor]:
    r"""The diagonal of the Gauss-Newton matrix of the mean loss, from gradients on labels that the model draws.

    .. math::
        h = B\, \hat g \circ \hat g, \quad E[h] = \mathrm{diag}(G), \quad
        G = \frac1B \sum_n J_n^T \nabla^2_z \ell_n J_n; \qquad h = B\, (U^T \hat g)^2 \text{ in a basis}

    It takes one backward pass per draw, is never negative and needs no labels.

    Args:
        outputs: f (..., C) with the graph that leads to params: :func:`sampled_label_loss`.
        params: real tensors that require a gradient. Those that outputs do not depend on get zeros.
        loss: "cross_entropy" (default) or "squared".
        bases: per parameter None, or for a matrix a pair (left, right): h is then that of the rotated gradient, left^T g right.
            None (default): the parameters' own coordinates.
        draws: how often labels are drawn, >= 1 (default 1); the results are averaged.
        generator: draws the labels; None (default) is torch's default generator.
        retain_graph: keep the graph of outputs for another backward pass (default False).

    Returns:
        An h of each parameter's shape and dtype; float32 for 16-bit ones, whose squares would underflow.

    Raises:
        ValueError: loss has another name, there is no sample, draws < 1, a parameter is complex, or bases do not fit.

    Source: Sophia's public code (Liu et al., arXiv 2305.14342), whose factor B stands in its step; rotated: docs/theory.md, C.2.

    Example:
        >>> import torch
        >>> from precond import curvature
        >>> w, x = torch.zeros(2, 3, requires_grad=True), torch.tensor([[1.0, 2.0, 4.0]])
        >>> (h,) = curvature.gauss_newton_bartlett(x @ w.T, [w])
        >>> h.tolist()  # x^2 p (1 - p), with p = 1/2 whatever label was drawn
        [[0.25, 1.0, 4.0], [0.25, 1.0, 4.0]]
    """
    params, spread = _checked(params, bases, draws)
    count = batch_size_of(outputs)
    total: list[Tensor] = []
    for draw in range(draws):
        with torch.enable_grad():
            value = sampled_label_loss(outputs, loss, generator=generator)
        keep = retain_graph or draw + 1 < draws
        grads = torch.autograd.grad(value, params, retain_graph=keep, materialize_grads=True)
        new = [_in_basis(g, basis).square() * count for g, basis in zip(grads, spread, strict=True)]
        total = _sum(total, new)
    return [h / draws for h in total]


def hutchinson(
    loss: Tensor | Callable[[Tensor], Tensor],
    params: Iterable[Tensor],
    *,
    product: str = "hessian",
    outputs: Tensor | None = None,
    probe: str = "rademacher",
    bases: Sequence[Basis] | None = None,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    r"""The diagonal of the Hessian or of the Gauss-Newton matrix of any loss, from products with random vectors.

    .. math::
        h = u \circ (H u), \quad E[h] = \mathrm{diag}(H); \qquad h = u \circ (U^T H U u) \text{ in a basis}

    With Rademacher probes the variance of h_i is the sum of H_ij^2 over j != i; Gaussian ones add 2 H_ii^2. h can be negative,
    and where the Hessian is indefinite its mean can be too: methods take ``h.abs()`` (AdaHessian) or ``h.clamp(min=0)`` (Sophia).

    Args:
        loss: for "hessian" the scalar, with its graph; for "gauss_newton" the function of outputs that gives it.
        params: real tensors that require a gradient. Those that the loss does not depend on get zeros.
        product: "hessian" (default) or "gauss_newton".
        outputs: for "gauss_newton" the model's outputs, with their graph.
        probe: "rademacher" (default), random signs, or "gaussian".
        bases: per parameter None, or for a matrix a pair (left, right): h is then that of left^T W right. None (default): the
            parameters' own coordinates.
        draws: number of probes, >= 1 (default 1); the results are averaged.
        generator: draws the probes, on the parameters' device; None (default) is torch's default generator.

    Returns:
        An h of each parameter's shape and dtype; float32 for 16-bit ones. The graph is kept.

    Raises:
        ValueError: product or probe has another name, draws < 1, a parameter is complex, or bases do not fit.
        TypeError: loss is not what the product takes.
        RuntimeError: an operation of the model has no second derivative in torch (fused attention).

    Source: AdaHessian (Yao et al., arXiv 2006.00719) and Sophia-H (arXiv 2305.14342); variances: docs/theory.md, C.2.

    Example:
        >>> import torch
        >>> from precond import curvature
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> curvature.hutchinson((w**4).sum(), [w])[0].tolist()  # without mixed derivatives it is exact
        [12.0, 48.0]
    """
    params, spread = _checked(params, bases, draws)
    if probe not in ("rademacher", "gaussian"):
        raise ValueError(f"probe must be 'rademacher' or 'gaussian', got {probe!r}")
    if product == "hessian":
        times = hessian_of(loss, params)
    elif product == "gauss_newton":
        times = gauss_newton_of(outputs, loss, params)
    else:
        raise ValueError(f"product must be 'hessian' or 'gauss_newton', got {product!r}")
    return _of_probes(times, params, probe, spread, draws, generator)


@at_stated_precision
def _of_probes(
    times: Product,
    params: list[Tensor],
    probe: str,
    spread: Sequence[Basis],
    draws: int,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """The mean of u (P u) over random vectors u, in bases, where ``times`` multiplies by P."""
    total: list[Tensor] = []
    for _ in range(draws):
        probes = [_probe(p, probe, generator) for p in params]
        turned = [u if basis is None else rotate_back(u, *basis) for u, basis in zip(probes, spread, strict=True)]
        images = times(turned)
        new = [u * _in_basis(x, basis) for u, x, basis in zip(probes, images, spread, strict=True)]
        total = _sum(total, new)
    return [h / draws for h in total]


def hessian_product(loss: Tensor, params: Iterable[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """The Hessian times a vector, H u, by differentiating the gradient along u.

    Args:
        loss: a scalar with its graph, which is kept.
        params: real tensors that require a gradient.
        vectors: u, one tensor per parameter, of its shape.

    Returns:
        A tensor per parameter.

    Raises:
        ValueError: a parameter is complex, or a vector has another shape.
        TypeError: loss is not a scalar tensor.
        RuntimeError: an operation has no second derivative in torch (fused attention).

    Source: Pearlmutter 1994.

    Example:
        >>> import torch
        >>> from precond import curvature
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> curvature.hessian_product(w[0] ** 2 * w[1], [w], [torch.tensor([1.0, 0.0])])[0].tolist()
        [4.0, 2.0]
    """
    return hessian_of(loss, _real(params))(vectors)


def gauss_newton_product(
    outputs: Tensor, loss_fn: Callable[[Tensor], Tensor], params: Iterable[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    r"""The Gauss-Newton matrix times a vector, G u = J^T (d^2 loss / d outputs^2) J u.

    G is positive semidefinite wherever the loss is convex in the outputs. J u is computed by differentiating J^T w, which is
    linear in w, along u.

    Args:
        outputs: the model's outputs, of any shape, with their graph, which is kept.
        loss_fn: maps outputs to a scalar; called once, on a detached copy.
        params: real tensors that require a gradient.
        vectors: u, one tensor per parameter, of its shape.

    Returns:
        A tensor per parameter.

    Raises:
        ValueError: a parameter is complex, or a vector has another shape.
        TypeError: outputs are not a tensor with a graph, or loss_fn does not return a scalar.
        RuntimeError: an operation has no second derivative in torch (fused attention).

    Source: Schraudolph 2002; J u by two backward passes: docs/theory.md, C.2.

    Example:
        >>> import torch
        >>> from precond import curvature
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> f = w**2  # J = diag(2 w), and the loss below has Hessian 2
        >>> curvature.gauss_newton_product(f, lambda z: (z**2).sum(), [w], [torch.ones(2)])[0].tolist()
        [8.0, 32.0]
    """
    return gauss_newton_of(outputs, loss_fn, _real(params))(vectors)


@at_stated_precision
def hessian_of(loss: object, params: list[Tensor]) -> Product:
    """u -> H u; the graph of the gradient is built once."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"loss must be a scalar tensor, got {_described(loss)}")
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    return at_stated_precision(lambda vectors: _slopes(grads, _aligned(params, vectors), params))


def gauss_newton_of(outputs: object, loss_fn: object, params: list[Tensor]) -> Product:
    """u -> G u; the graphs are built once."""
    if not isinstance(outputs, Tensor) or not outputs.requires_grad:
        raise TypeError(f"outputs must be a tensor with a graph, got {_described(outputs)}")
    if not callable(loss_fn):
        raise TypeError(f"loss must be a function of outputs, got {_described(loss_fn)}")
    # The caller's function runs in the caller's modes, but for those that make no graph.
    with torch.inference_mode(False), torch.enable_grad():
        w = torch.zeros_like(outputs, requires_grad=True)
        z = outputs.detach().requires_grad_()
        loss = loss_fn(z)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"loss must give a scalar tensor, got {_described(loss)}")
    with stated_precision():
        back = torch.autograd.grad(outputs, params, w, create_graph=True, materialize_grads=True)
        slope = torch.autograd.grad(loss, (z,), create_graph=True, materialize_grads=True)

    @at_stated_precision
    def times(vectors: Sequence[Tensor]) -> list[Tensor]:
        forward = _slopes(back, _aligned(params, vectors), [w])
        (bent,) = _slopes(slope, forward, [z])
        return list(torch.autograd.grad(outputs, params, bent, retain_graph=True, materialize_grads=True))

    return times


def _slopes(values: Sequence[Tensor], vectors: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The derivative of the inner product of values and vectors; where values are constant it is 0."""
    live = [(value, vector) for value, vector in zip(values, vectors, strict=True) if value.requires_grad]
    if not live:
        return [torch.zeros_like(t) for t in inputs]
    moving, along = zip(*live, strict=True)
    return list(torch.autograd.grad(moving, inputs, along, retain_graph=True, materialize_grads=True))


def _aligned(params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    shapes = [tuple(p.shape) for p in params], [tuple(u.shape) for u in vectors]
    if shapes[0] != shapes[1]:
        raise ValueError(f"vectors must have the parameters' shapes {shapes[0]}, got {shapes[1]}")
    return [u.to(p) for p, u in zip(params, vectors, strict=True)]


def _described(value: object) -> str:
    return f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _checked(
    params: Iterable[Tensor], bases: Sequence[Basis] | None, draws: int
) -> tuple[list[Tensor], Sequence[Basis]]:
    params = _real(params)
    spread = [None] * len(params) if bases is None else bases
    if len(spread) != len(params):
        raise ValueError(f"bases must be one per parameter, {len(params)}, got {len(spread)}")
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    return params, spread


def _real(params: Iterable[Tensor]) -> list[Tensor]:
    params = list(params)
    for position, p in enumerate(params):
        if p.is_complex():
            raise ValueError(f"params must be real, got one of {p.dtype} at position {position}")
    return params


def _check_loss(loss: str) -> None:
    if loss not in _LOSSES:
        raise ValueError(f"loss must be {' or '.join(map(repr, _LOSSES))}, got {loss!r}")


def _in_basis(g: Tensor, basis: Basis) -> Tensor:
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    return g if basis is None else rotate(g, *basis)


def _probe(p: Tensor, probe: str, generator: torch.Generator | None) -> Tensor:
    dtype = torch.promote_types(p.dtype, torch.float32)
    if probe == "gaussian":
        return torch.randn(p.shape, dtype=dtype, device=p.device, generator=generator)
    signs = torch.randint(0, 2, p.shape, device=p.device, generator=generator)
    return (2 * signs - 1).to(dtype)


def _sum(total: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    return [a.add_(b) for a, b in zip(total, new, strict=True)] if total else new
