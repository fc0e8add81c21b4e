"""Coordinates in which rules run: those of the parameters, or a basis of the Gauss-Newton matrix of many networks at once.

A rule in a basis is the rule on rotated variables (tests/test_theory.py). So a frame turns stacked gradients, precond's
optimizer steps on z, and the frame turns z back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import precond

Tensors = list[Tensor]


class Identity:
    """Stacked tensors are (copies, seeds, *shape), samples (copies, seeds, batch, *shape). Here nothing turns."""

    #: Whether bases are learnt from samples.
    learns = False

    def learn(self, samples: Tensors) -> None:
        """Average what the bases are the eigenvectors of: samples' outer products, summed over a batch."""

    def refresh(self) -> None:
        """Take the eigenvectors of now."""

    def turn(self, tensors: Tensors) -> Tensors:
        return tensors

    def back(self, coordinates: Tensors) -> Tensors:
        return coordinates

    def squares(self, samples: Tensors) -> Tensors:
        """Sums over the batch of the samples' squared coordinates."""
        return [s.square().sum(2) for s in samples]

    def moved(self, squares: Tensors, before: Identity) -> Tensors:
        """Squares in the frame that was ``before``, in this one, of coordinates that are taken for uncorrelated."""
        return squares


def eigenvectors(matrices: Tensor, share: float = 1.0) -> Tensor:
    """Columns, or those of the bases at ``share`` of the way from the identity. Of a network that diverged: the identity."""
    size = matrices.shape[-1]
    scaled = matrices / matrices.abs().amax((-2, -1), keepdim=True).clamp(min=1e-30)
    eye = torch.eye(size)
    whole = scaled.isfinite().all(-1).all(-1)[..., None, None]
    vectors = torch.linalg.eigh(torch.where(whole, scaled, eye)).eigenvectors.flip(-1)
    if share != 1.0:
        flat = vectors.reshape(-1, size, size)
        vectors = torch.stack([precond.interpolate_basis(eye, u, share) for u in flat]).view_as(vectors)
    return vectors


class Full(Identity):
    """One vector of all parameters, in the eigenvectors of the whole matrix."""

    learns = True

    def __init__(self, shapes: Sequence[torch.Size], beta: float, share: float = 1.0) -> None:
        self.shapes, self.beta, self.share = shapes, beta, share
        self.sizes = [shape.numel() for shape in shapes]
        self.matrix: Tensor | None = None
        self.basis: Tensor | None = None

    def learn(self, samples: Tensors) -> None:
        rows = torch.cat([s.flatten(3) for s in samples], 3)
        outer = rows.mT @ rows
        self.matrix = outer if self.matrix is None else self.matrix.lerp_(outer, 1.0 - self.beta)

    def refresh(self) -> None:
        assert self.matrix is not None
        self.basis = eigenvectors(self.matrix, self.share)

    def turn(self, tensors: Tensors) -> Tensors:
        flat = torch.cat([t.flatten(2) for t in tensors], 2)
        return [(flat[:, :, None] @ self.basis)[:, :, 0]]

    def back(self, coordinates: Tensors) -> Tensors:
        assert self.basis is not None
        flat = (coordinates[0][:, :, None] @ self.basis.mT)[:, :, 0]
        return [t.unflatten(2, shape) for t, shape in zip(flat.split(self.sizes, 2), self.shapes, strict=True)]

    def squares(self, samples: Tensors) -> Tensors:
        return [(torch.cat([s.flatten(3) for s in samples], 3) @ self.basis).square().sum(2)]

    def moved(self, squares: Tensors, before: Identity) -> Tensors:
        assert isinstance(before, Full)
        assert before.basis is not None
        overlap = (before.basis.mT @ self.basis).square()
        return [(squares[0][:, :, None] @ overlap)[:, :, 0]]


class Kronecker(Identity):
    """Every matrix in the eigenvectors of its two factors, the means of S S^T and S^T S; vectors as they are."""

    learns = True

    def __init__(self, shapes: Sequence[torch.Size], beta: float) -> None:
        self.beta = beta
        self.factors: list[tuple[Tensor, Tensor] | None] = [None] * len(shapes)
        self.bases: list[tuple[Tensor, Tensor] | None] = [None] * len(shapes)

    def learn(self, samples: Tensors) -> None:
        for i, s in enumerate(samples):
            if s.dim() != 5:
                continue
            now = (torch.einsum("csbmn,csbkn->csmk", s, s), torch.einsum("csbmn,csbmk->csnk", s, s))
            old = self.factors[i]
            self.factors[i] = (
                now if old is None else (old[0].lerp(now[0], 1 - self.beta), old[1].lerp(now[1], 1 - self.beta))
            )

    def refresh(self) -> None:
        self.bases = [of and (eigenvectors(of[0]), eigenvectors(of[1])) for of in self.factors]

    def turn(self, tensors: Tensors) -> Tensors:
        return [t if of is None else of[0].mT @ t @ of[1] for t, of in zip(tensors, self.bases, strict=True)]

    def back(self, coordinates: Tensors) -> Tensors:
        return [t if of is None else of[0] @ t @ of[1].mT for t, of in zip(coordinates, self.bases, strict=True)]

    def squares(self, samples: Tensors) -> Tensors:
        turned = (
            s if of is None else of[0].mT[:, :, None] @ s @ of[1][:, :, None]
            for s, of in zip(samples, self.bases, strict=True)
        )
        return [t.square().sum(2) for t in turned]

    def moved(self, squares: Tensors, before: Identity) -> Tensors:
        assert isinstance(before, Kronecker)
        found = []
        for t, new, old in zip(squares, self.bases, before.bases, strict=True):
            if new is None or old is None:
                found.append(t)
                continue
            left, right = ((a.mT @ b).square() for a, b in zip(new, old, strict=True))
            found.append(left @ t @ right.mT)
        return found


def frame(basis: str, shapes: Sequence[torch.Size], beta: float, share: float) -> Identity:
    if basis == "full":
        return Full(shapes, beta, share)
    return Kronecker(shapes, beta) if basis == "kronecker" else Identity()
