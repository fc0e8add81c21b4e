"""FOP's arithmetic, for parameters together: how gradients change M and M changes gradients. precond/fop.py gathers them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.backend import on_device
from .._core.sharding import like
from . import spectral_norm

#: Elements of M and G that are worked on together: what is allocated meanwhile has up to nine times as many, usually four.
BATCH = 1 << 20
#: Elements of a G up to which it is copied to lie beside others of its form, for one product of all. In "spatial" mode, against
#: products one by one: 64 x 64 x 3 x 3 takes 0.9 of the time, 128 x 128 x 3 x 3 1.2 (one thread).
SMALL = 1 << 16
#: The same for an elementwise M, where copies are a larger part: 4096 elements take 0.7 of the time, 16384 1.1.
SMALL_FLAT = 1 << 13


class Rule(NamedTuple):
    """The arguments of FOP; ``max_norm`` is one that every dtype of M has."""

    rho: float
    normalize: frozenset[str]
    max_norm: float

    def largest(self, M: Tensor) -> float:
        """``max_norm``, which M's dtype may not have."""
        return min(self.max_norm, torch.finfo(M.dtype).max)

    def rate(self, lr: float | Tensor) -> float | Tensor:
        """rho gamma."""
        return self.rho * (lr.reshape(()) if isinstance(lr, Tensor) else lr)


class Work(NamedTuple):
    """A parameter with an M: local tensors, the dimensions that M mixes, none where it is elementwise, and gamma.

    M learns from ``g`` and ``previous``, is applied to ``u``, and ``u`` is the next ``previous``. In "gradient" mode u is g.
    """

    p: Tensor
    M: Tensor
    g: Tensor
    previous: Tensor
    dims: tuple[int, ...]
    lr: float | Tensor
    u: Tensor


def preconditioned(works: Iterable[Work], rule: Rule) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter with M M^T u, after M was updated by g and the u before.

    What is worked on together has one dtype of M, device and lr, and if M is a matrix, its size and the order of products. None
    of them sees another's numbers: a product of a batch has a matrix for each, and a factor is spread over its own elements.
    """
    alike: dict[object, dict[object, list[Work]]] = {}
    for work in works:
        M, g = work.M, work.g
        key: tuple[object, ...] = M.dtype, M.device, id(work.lr) if isinstance(work.lr, Tensor) else work.lr
        if work.dims:
            r, columns = len(M), g.numel() // len(M)
            key += r, 3 * columns < r, columns >= r
            form = (g.shape, g.stride(), g.dtype, work.u.stride(), work.u.dtype) if g.numel() <= SMALL else id(work.p)
        else:
            flat = g.numel() <= SMALL_FLAT and all(t.is_contiguous() for t in (M, g, work.previous, work.u))
            key += ((g.dtype, work.u.dtype) if flat else id(work.p),)
            form = None
        alike.setdefault(key, {}).setdefault(form, []).append(work)
    for forms in alike.values():
        for part in _parts(forms.values()):
            first = part[0][0]
            rate = rule.rate(first.lr)
            yield from _matrices(part, rate, rule) if first.dims else _elementwise(part[0], rate, rule)


def _parts(forms: Iterable[list[Work]]) -> Iterator[list[list[Work]]]:
    """Consecutive works of at most ``BATCH`` elements, of one at least; in lists of one form."""
    part: list[list[Work]] = []
    left = BATCH
    for works in forms:
        begin = 0
        for i, work in enumerate(works):
            size = max(work.g.numel(), work.M.numel())
            if size > left and (part or i > begin):
                yield [*part, works[begin:i]] if i > begin else part
                part, left, begin = [], BATCH, i
            left -= size
        part.append(works[begin:])
    yield part


# Elementwise M.


def _elementwise(works: list[Work], rate: float | Tensor, rule: Rule) -> Iterator[tuple[Tensor, Tensor]]:
    """M M^T u where M has a factor for every element; several as one flat tensor, one as it lies."""
    alone, sizes = len(works) == 1, [work.g.numel() for work in works]

    def whole(tensors: list[Tensor]) -> Tensor:
        return tensors[0] if alone else torch.cat(tensors)

    def cut(tensor: Tensor) -> list[Tensor]:
        return [tensor] if alone else list(torch.split_with_sizes(tensor, sizes))

    def norms(tensor: Tensor, order: float = 2.0) -> Tensor:
        """Of each parameter's elements."""
        return (
            torch.linalg.vector_norm(tensor, order) if alone else torch.stack(torch._foreach_norm(cut(tensor), order))
        )

    def spread(values: Tensor) -> Tensor:
        """A value for each parameter as one for each of its elements."""
        if alone:
            return values
        # Not by repeat_interleave, whose counts a device would have to be sent.
        out = torch.empty(sum(sizes), dtype=values.dtype, device=values.device)
        torch._foreach_copy_(cut(out), values.unbind())
        return out

    columns = [[getattr(work, name) for work in works] for name in ("M", "g", "previous", "u")]
    Ms, gs, before, us = columns if alone else [[tensor.view(-1) for tensor in column] for column in columns]
    M = whole(Ms)
    G, last = whole(gs).to(M.dtype), whole(before).to(M.dtype)
    target = G if works[0].u is works[0].g else whole(us).to(M.dtype)
    if "hypergradient" in rule.normalize:
        rate = spread(rule.rho / norms(G) / norms(last))
    new = M + 2.0 * rate * G * last * M
    if "matrix" in rule.normalize:
        factors = norms(new).reciprocal()
        torch._foreach_mul_(factors.view(-1).unbind(), [math.sqrt(size) for size in sizes])
        # The first gradient leaves M at 1, to the bit.
        new = torch.where(spread(norms(last, math.inf) != 0.0), new * spread(factors), M)
    magnitude = new.abs()
    new = torch.where((magnitude > 0.0) & (magnitude <= rule.largest(M)), new, M)
    torch._foreach_copy_(Ms, cut(new))
    torch._foreach_copy_(before, us)
    U = new * new * target
    if "step" in rule.normalize:
        U = U * spread(_scales(norms(target), norms(U), norms(new - 1.0, math.inf) == 0.0))
    if alone:
        yield works[0].p, like(works[0].p, _in_form(U[None], works[0].u)[0])
        return
    for work, u in zip(works, cut(U.to(works[0].u.dtype)), strict=True):
        yield work.p, like(work.p, u.view(work.u.shape))


# Matrices.


class _Run:
    """Parameters of one form, whose matrices are stacked: where they are in the part; G, last and target of n x r x c."""

    def __init__(self, works: list[Work], start: int) -> None:
        self.works, self.at = works, slice(start, start + len(works))
        first = self.first = works[0]
        stride = torch.empty_like(first.g).stride() if len(works) > 1 else ()

        def matrices(tensors: list[Tensor]) -> Tensor:
            return _matrix(_stacked(tensors, first.M.dtype, stride), first.dims, len(first.M))

        self.G, self.last = matrices([work.g for work in works]), matrices([work.previous for work in works])
        self.target = self.G if first.u is first.g else matrices([work.u for work in works])

    def results(self, U: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter with its U as a gradient."""
        Us = _in_form(_tensor(U, self.first.dims, self.first.u.shape), self.first.u).unbind()
        return ((work.p, like(work.p, u)) for work, u in zip(self.works, Us, strict=True))


def _matrices(forms: list[list[Work]], rate: float | Tensor, rule: Rule) -> Iterator[tuple[Tensor, Tensor]]:
    """M M^T times the targets, of matrices whose M have one size and whose G take the same order of products.

    Each of G's r x c elements takes part in 2 r operations of a product. With S = A + A^T, the order is that of the fewest:
    S M from A, or as [G, last] ([last, G]^T M), which has no product of r^3, for c < r / 3; (M M^T) times the target, or
    M (M^T target) for c < r.
    """
    works = list(itertools.chain(*forms))
    starts = itertools.accumulate(map(len, forms), initial=0)
    runs = [_Run(of, start) for of, start in zip(forms, starts, strict=False)]
    first = works[0]
    M = _stacked([work.M for work in works], first.M.dtype, torch.empty_like(first.M).stride())
    r, columns = len(first.M), first.g.numel() // len(first.M)
    wide = columns >= r
    if "hypergradient" in rule.normalize:
        norms = _norms([run.G for run in runs]), _norms([run.last for run in runs])
        rate = (rule.rho / norms[0] / norms[1])[:, None, None]
    new = torch.empty_like(M)
    if 3 * columns < r:
        for run in runs:
            other = torch.bmm(torch.cat((run.last, run.G), 2).mT, M[run.at])
            other *= rate[run.at] if isinstance(rate, Tensor) and rate.dim() else rate
            torch.baddbmm(M[run.at], torch.cat((run.G, run.last), 2), other, out=new[run.at])
    else:
        product = new
        for run in runs:
            A = torch.bmm(run.G, run.last.mT)
            product[run.at].copy_(A.mT).add_(A)
        new = torch.baddbmm(M, product.mul_(rate), M)
    if "matrix" in rule.normalize:
        scaled = new * (math.sqrt(r) / _norms([new]))[:, None, None]
        # The first gradient leaves M at I, to the bit.
        learns = torch.cat([torch.count_nonzero(run.last, dim=(1, 2)) > 0 for run in runs])
        new = torch.where(learns[:, None, None], scaled, M)
    P = spectral_norm.square(new) if wide and not on_device(new) else None
    allowed = spectral_norm.allowed(new, P, rule.largest(M))
    if on_device(new) or not bool(allowed.all()):
        new = torch.where(allowed[:, None, None], new, M)
        if P is not None:
            P[~allowed] = spectral_norm.square(new[~allowed])
    if P is None and wide:
        P = spectral_norm.square(new)
    torch._foreach_copy_([work.M for work in works], new.unbind())
    torch._foreach_copy_([work.previous for work in works], [work.u for work in works])
    if P is None:
        Us = [torch.bmm(new[run.at], torch.bmm(new[run.at].mT, run.target)) for run in runs]
    else:
        Us = [torch.bmm(P[run.at], run.target) for run in runs]
    if "step" in rule.normalize:
        ones = torch.count_nonzero(new.diagonal(dim1=1, dim2=2) == 1.0, dim=1)
        identity = (ones == r) & (torch.count_nonzero(new, dim=(1, 2)) == r)
        scales = _scales(_norms([run.target for run in runs]), _norms(Us), identity)
        for run, U in zip(runs, Us, strict=True):
            U.mul_(scales[run.at, None, None])
    for run, U in zip(runs, Us, strict=True):
        yield from run.results(U)


def _stacked(tensors: list[Tensor], dtype: torch.dtype, stride: Sequence[int]) -> Tensor:
    """Tensors of one shape as one, each in memory as ``stride`` says; a single one as it is, without a copy."""
    if len(tensors) == 1:
        return tensors[0].to(dtype).unsqueeze(0)
    return torch.stack(tensors, out=_empty(len(tensors), tensors[0], stride, dtype))


def _empty(count: int, one: Tensor, stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """So many tensors of a shape, one after another, each of these strides."""
    return torch.empty_strided((count, *one.shape), (one.numel(), *stride), dtype=dtype, device=one.device)


def _in_form(Us: Tensor, g: Tensor) -> Tensor:
    """Stacked tensors in the dtype of a gradient, each laid out in memory as it."""
    stride = torch.empty_like(g).stride()
    return Us if Us.dtype == g.dtype and Us.stride()[1:] == stride else _empty(len(Us), g, stride, g.dtype).copy_(Us)


def _matrix(tensors: Tensor, dims: tuple[int, ...], r: int) -> Tensor:
    """Stacked tensors as stacked matrices whose r rows are these dimensions of each."""
    return tensors.permute(_order(dims, tensors.dim() - 1)).reshape(len(tensors), r, -1)


def _tensor(matrices: Tensor, dims: tuple[int, ...], shape: torch.Size) -> Tensor:
    """The inverse of ``_matrix``."""
    order = _order(dims, len(shape))
    back = sorted(range(len(order)), key=order.__getitem__)
    return matrices.reshape(len(matrices), *(shape[dim - 1] for dim in order[1:])).permute(back)


def _order(dims: tuple[int, ...], count: int) -> list[int]:
    """The dimensions of stacked tensors: these of each first."""
    return [0, *(dim + 1 for dim in dims), *(dim + 1 for dim in range(count) if dim not in dims)]


def _norms(batches: list[Tensor]) -> Tensor:
    """The Frobenius norm of each matrix of some batches."""
    return torch.cat([torch.linalg.vector_norm(batch, dim=(1, 2)) for batch in batches])


def _scales(before: Tensor, after: Tensor, identity: Tensor) -> Tensor:
    """What scales U to the norm of G. Where M M^T G is G, 1: sums of squares in another order differ by the last bit."""
    return torch.where((after > 0.0) & ~identity, before / after, torch.ones_like(after))
