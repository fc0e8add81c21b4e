"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import L1_OPTIONS, arguments, check_nonnegative, number
from ._core.formats import StateFormat
from ._core.metric import Metric
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.passes import plain_step
from ._core.rows import Row
from ._core.settings import Settings
from ._core.sharding import like, local
from ._methods.kronecker import Rotation, as_matrix, is_matrix
from ._methods.newton_schulz import NS_COEFFICIENTS, orthogonalized, scale_of
from ._methods.rotated import Rotated
from ._methods.share import HELD, Work


class SOAP(Rotated):
    r"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, the running means of G G^T and G^T G.

    .. math::
        G' = Q_L^T G\, Q_R, \qquad m = \beta_1 m + (1-\beta_1) G', \quad v = \beta_2 v + (1-\beta_2) G'^2, \qquad
        W = (1-\gamma\lambda)\Big(W - \gamma\frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
        Q_L \frac{m}{\sqrt{v} + \epsilon + \epsilon_r\,\lVert G \rVert} Q_R^T\Big)

    The first step of a matrix only builds its bases and moves nothing. Every ``precondition_frequency`` steps, after the update,
    one step of QR refreshes them: m is transformed to the new basis, while v only has its columns reordered. Rotations are
    matrix products; Adam and the step are one fused pass each.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. A tensor of more dimensions is a matrix of
            dimension 0 by all others; vectors get Adam from the first step on. float64 runs on the reference backend.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 3e-3).
        betas: decay rates of the moments, each in [0, 1) (default (0.95, 0.95)).
        shampoo_beta: decay rate of the means behind the bases, in [0, 1); None (default) or -1 takes betas[1].
        eps: >= 0, added to the root of v before the bias correction, as published (default 1e-8).
        relative_eps: >= 0, added likewise after multiplication with the rms of the gradients' Frobenius norms (default 3e-6). A
            rank-deficient gradient leaves coordinates that hold only rounding errors. A tiny eps alone would normalise these to
            full steps, and the weights would drift. Rotations in float32 make errors in proportion to the norm: at 3e-6 the
            drift is a quarter of what a gradient of rank 1 moves; 1e-4 times the rms of its entries instead leaves 2.5 times
            as much, for 512 x 512. Use 0 for float64.
        weight_decay: lambda >= 0, decoupled (default 0.01).
        precondition_frequency: steps between refreshes of the bases (default 10).
        max_precond_dim: matrices with a longer side are cut into blocks, each with its own bases (default 10000).
        one_sided: True keeps the factor and the basis of the shorter side alone, of the rows in a square: less memory and fewer
            operations for wide matrices, at some loss per step (default False).
        orthogonalize: None (default), or SOAP-Muon: the direction D = Q_L (m / den) Q_R^T of a matrix is orthogonalised by Muon's
            Newton-Schulz iteration and takes Muon's scale, "original": sqrt(max(1, rows / columns)), or "match_rms_adamw":
            0.2 sqrt(max(rows, columns)). The iteration commutes with rotations, so that this is the orthogonalisation of m / den
            in the basis. It runs in bfloat16, for float64 parameters in float64. Vectors keep Adam's step.
        ns_coefficients, ns_steps: of that iteration, as for :class:`precond.Muon`.
        maximize: ascend instead of descend (default False).
        fused: True makes ``torch.amp.GradScaler`` leave unscaling and skipping to the step (default None).
        l1_decay, l1_form, l1_cap: intrinsic L1 in the eigenbasis, with P = Q diag(den^-1/2); otherwise as for
            :class:`precond.AdamW`. With it the weight decay is applied in AdamW's order too.
        state_format: as for :class:`precond.AdamW`, except "int8" and "int4".
        weight_format: as for :class:`precond.AdamW`.
        **settings: :class:`precond.Settings`.

    Raises:
        ValueError: an argument is out of range, ``l1_decay`` is used with ``orthogonalize``, or lr * weight_decay is 1.
        RuntimeError: at the step, for a sparse gradient or a complex matrix, and on all ranks where sharded matrices differ.

    State: ``step``, ``exp_avg``, ``exp_avg_sq`` (in the basis), ``basis_step``; ``factor_...`` and ``basis_...`` of blocks. Of a
    sharded matrix its owner has them (docs/scaling.md), and ``state_dict`` is called on all ranks.

    Source: Vyas et al., arXiv 2409.11321, in the order of the published code (docs/theory.md, C.6), with its one-sided variant.
    orthogonalize: Vyas, SOAP-Muon (nikhilvyas.github.io/SOAP_Muon.pdf), as modded-nanogpt's pull requests 278 and 321 summarise
    it; m is Adam's mean here, not Nesterov's momentum. relative_eps and blocks are this project's, as is that m is kept in the
    basis.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.ones(2, 2))
        >>> opt = precond.SOAP([w], lr=0.1, weight_decay=0.0)
        >>> for _ in range(2):
        ...     w.grad = torch.eye(2)
        ...     opt.step()
        >>> [[round(x, 3) for x in row] for row in w.tolist()]
        [[0.9, 1.0], [1.0, 0.9]]
    """

    _in_basis = ("exp_avg", "exp_avg_sq")
    _basis_options = ("shampoo_beta", "precondition_frequency", "max_precond_dim")
    _why_not_one_pass = "for SOAP"
    _group_options = {
        **FusedOptimizer._group_options,
        **L1_OPTIONS,
        "l1_cap": 10.0,
        "one_sided": False,
        "orthogonalize": None,
        "ns_coefficients": NS_COEFFICIENTS,
        "ns_steps": 5,
        "fused": None,
    }
    _older_options = {"maximize": False, "differentiable": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        *,
        relative_eps: float = 3e-6,
        one_sided: bool = False,
        orthogonalize: str | None = None,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        ns_steps: int = 5,
        maximize: bool = False,
        fused: bool | None = None,
        l1_decay: float = 0.0,
        l1_form: str = "proximal",
        l1_cap: float = 10.0,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals()) | {"differentiable": False}
        super().__init__(params, defaults, settings=settings)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_nonnegative("relative epsilon value", "relative_eps", group["relative_eps"])
        if group["shampoo_beta"] not in (None, -1) and not 0.0 <= group["shampoo_beta"] < 1.0:
            raise ValueError(f"shampoo_beta must be None, -1 or in [0, 1), got {group['shampoo_beta']}")

        kind = _option(group, "orthogonalize")
        if kind not in (None, "original", "match_rms_adamw"):
            raise ValueError(f"orthogonalize must be None, 'original' or 'match_rms_adamw', got {kind!r}")
        if kind is not None and float(_option(group, "l1_decay")) != 0.0:
            raise ValueError(f"l1_decay must be 0 with orthogonalize, got {group['l1_decay']}")
        if not 0 <= _option(group, "ns_steps") < 100:
            raise ValueError(f"ns_steps must be in [0, 100), got {group['ns_steps']}")
        if len(_option(group, "ns_coefficients")) != 3:
            raise ValueError(f"ns_coefficients must be 3 values, got {group['ns_coefficients']!r}")

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        if _option(group, "orthogonalize") is not None and is_matrix(p):
            return Metric(why_not="it takes all singular values to 1")
        if self._is_shared(p, group):
            return Metric(why_not=HELD)
        step = self._steps(p)
        if not step:
            return None
        basis = self._basis_of_metric(p, group)
        correction = 1.0 - float(group["betas"][1]) ** step
        eps = self._eps(group, basis) / correction**0.5
        return Metric(self._decoded(p, group, "exp_avg_sq"), 1.0 / correction, float(eps), basis)

    def _row(self, group: dict[str, Any]) -> Row:
        hyper = self._hyper(group, "eps")
        hyper["beta1"], hyper["beta2"] = map(number, group["betas"])
        lr, decay = hyper["lr"], hyper["weight_decay"]
        if (
            isinstance(lr, float)
            and isinstance(decay, float)
            and lr * decay == 1.0
            and not self.decays_coordinates(group)
            and not _decays_as_adamw(group)
        ):
            raise ValueError(f"lr * weight_decay must not be 1, which leaves nothing of weights, got {lr} * {decay}")
        return Row(self._decayed("adamw", group), -1.0 if group["maximize"] else 1.0, hyper)

    def _before(self, work: list[Work], group: dict[str, Any], row: Row) -> list[Work]:
        """The first gradient of a matrix only builds its bases."""
        first = [item for item in work if not self.moves(item.basis)]
        self._feed(first, group)
        for item in first:
            self._init_state(item.p, group, row, item.name)
        begun = {id(item.p) for item in first}
        return [item for item in work if id(item.p) not in begun]

    def moves(self, basis: Rotation) -> bool:
        """True unless the step only builds the basis."""
        return basis.kronecker is None or basis.kronecker.ready

    def after(self, work: list[Work], group: dict[str, Any]) -> None:
        """Feed the bases, and refresh them where that is due."""
        self._feed(work, group)

    def _directions(self, work: list[Work], directions: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        kind = _option(group, "orthogonalize")
        if kind is None:
            return directions
        alike: dict[tuple[Any, ...], list[int]] = {}
        for i, (_, p, _, basis, _) in enumerate(work):
            if basis.kronecker is not None:
                alike.setdefault((basis.kronecker.shape, directions[i].dtype, p.device), []).append(i)
        out = list(directions)
        for indices in alike.values():
            stack = torch.stack([as_matrix(local(directions[i])) for i in indices])
            scale = scale_of(kind, *stack.shape[-2:])
            for i, turned in zip(indices, _orthogonalized(stack, group), strict=True):
                whole = turned.to(stack.dtype).mul(scale).reshape(directions[i].shape)
                out[i] = like(directions[i], whole.contiguous())
        return out

    def _hyper_in_basis(self, p: Tensor, basis: Rotation, group: dict[str, Any], row: Row) -> dict[str, float | Tensor]:
        """The rule adds eps to the corrected root, the published order to the uncorrected one: eps is divided as the root is."""
        correction = 1.0 - float(group["betas"][1]) ** (float(self.state[p]["step"]) + 1.0)
        return {**row.hyper, "eps": number(self._eps(group, basis) / correction**0.5)}

    def _eps(self, group: dict[str, Any], basis: Rotation | None) -> float | Tensor:
        """What is added to the uncorrected root, from the gradients before the step."""
        eps, relative = float(group["eps"]), float(group["relative_eps"])
        if basis is None or basis.kronecker is None or not relative > 0.0:
            return eps
        norm = basis.kronecker.mean_square_norm()
        return eps if norm is None else norm.double().sqrt() * relative + eps

    def _plain_hyper(self, row: Row, group: dict[str, Any]) -> dict[str, float | Tensor]:
        """The published order: the decay takes the new weight. AdamW's with parts that tell update and decay apart."""
        lr, decay = row.hyper["lr"], row.hyper["weight_decay"]
        if _decays_as_adamw(group):
            return plain_step(lr, decay)
        kept = 1.0 - lr * decay  # not 0: _row says so
        return plain_step(lr * kept, decay / kept)


def _decays_as_adamw(group: dict[str, Any]) -> bool:
    return group.get("cautious") in ("decay", "both") or group.get("max_update_rms") is not None


def _option(group: dict[str, Any], name: str) -> Any:
    """An option that groups have only where it differs from its default."""
    return group.get(name, SOAP._group_options[name])


def _orthogonalized(u: Tensor, group: dict[str, Any]) -> Tensor:
    """A batch of matrices by Muon's iteration."""
    working = torch.float64 if u.dtype == torch.float64 else torch.bfloat16
    options = {name: _option(group, name) for name in ("ns_coefficients", "ns_steps")}
    return orthogonalized(u.to(working), {**options, "eps": 1e-7})
