"""The rows of GaussNewton, which Sophia runs too."""

from __future__ import annotations

import torch

import precond

from .row import intrinsic


class Curved(precond.GaussNewton):
    """With a curvature that nobody estimated, so that a step may come first."""

    def __init__(self, params, **kwargs) -> None:
        super().__init__(params, **kwargs)
        for group in self.param_groups:
            for p in group["params"]:
                self._init_state(p, group, self._row(group))
                # An estimate of a Hessian's diagonal may be negative, a mean of squares not.
                lowest = 0.0 if group["curvature"] == "gradient" else -0.1
                values = torch.linspace(lowest, 2.0, p.numel(), device=p.device).view(p.shape)
                h = self.state[p]["curvature"]
                h.copy_(torch.complex(values, values) if h.is_complex() else values)
                self.state[p]["curvature_step"] = 1


_GN = dict(lr=0.05, betas=(0.9, 0.95), eps=1e-3, clip=2.0, weight_decay=0.1)

ROWS = [
    *intrinsic("gauss_newton", Curved, _GN, (5.0, 2.0, 2.0), "", True, l1_decay=0.6),
    *intrinsic("gauss_newton", Curved, _GN | dict(power=-0.5), (5.0, 2.0, 2.0), "_root", True, l1_decay=0.6),
    *intrinsic("gauss_newton", Curved, _GN | dict(curvature="gradient"), (5.0, 2.0, 2.0), "_own", True, l1_decay=0.6),
    *intrinsic(
        "gauss_newton",
        Curved,
        _GN | dict(curvature="gradient", power=-0.5),
        (5.0, 2.0, 2.0),
        "_own_root",
        True,
        l1_decay=0.6,
    ),
]
