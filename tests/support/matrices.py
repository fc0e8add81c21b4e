"""Matrices that tests of bases are made of."""

from __future__ import annotations

import torch

F64 = torch.float64


def random_basis(d, seed, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=F64))[0].to(dtype)


def random_psd(d, seed, rank=None, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(d, rank or d, generator=generator, dtype=F64)
    return (a @ a.T).to(dtype)


def off_identity(u):
    return (u.mT @ u - torch.eye(u.shape[-1], dtype=u.dtype)).abs().max().item()
