"""Dual space preconditioning: DualDescent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import reference
from ._core import backend as _backend
from ._core.arguments import arguments, check_lr, check_nonnegative
from ._core.clipping import Begun
from ._core.formats import StateFormat
from ._core.metric import Metric
from ._core.norm import sharder_among_callers
from ._core.optimizer import ParamsT
from ._core.passes import Job, plain_step
from ._core.rows import Row
from ._core.settings import Settings
from ._core.sharding import like, local
from ._methods.exchange import Exchanges, Member
from ._methods.last_pass import Move, without_parts
from ._methods.multipass import MultiPass
from ._methods.owners import Unit
from ._methods.placed import check_placements
from ._methods.units import matrices_of, view, wide_of

#: A group, its row, and of a parameter what errors call it, itself and its gradient.
_Work = tuple[dict[str, Any], Row, str, Tensor, Tensor]
GRANULARITIES = ("global", "tensor", "unit", "entry", "spectral")
#: Kernels h'(r) = r / (offset + slope r): both numbers, from the scale.
_RATIOS: dict[str, Callable[[float], tuple[float, float]]] = {
    "identity": lambda scale: (1.0, 0.0),
    "normalize": lambda scale: (0.0, 1.0),
    "adam": lambda scale: (scale, 1.0),
    "rational": lambda scale: (1.0, 1.0 / scale),
}


class DualDescent(MultiPass):
    r"""Dual space preconditioning: steps along the gradient of a convex function K, taken at the loss's gradient.

    .. math::
        m_t = \mu m_{t-1} + (1-\mu) g_t, \qquad p_t = p_{t-1} - \gamma\,(\nabla K(m_t) + \lambda p_{t-1}), \qquad
        \nabla K(m) = h'(|m|)\,\frac{m}{|m|}

    where ``granularity`` says what |m| is: a norm, an entry or a singular value. ``kernel`` chooses h'(r), with c = ``scale``:

    ==========  ==============================  =====================================================
    identity    r                               gradient descent
    normalize   1                               normalised descent; per entry the sign; spectral: U V^T
    smoothed    r / sqrt(r^2 + c^2)             the same, smooth at 0
    adam        r / (r + c)                     per entry Adam without its means, c its eps
    clip        min(r, c)                       clipping by norm, by value, of singular values
    rational    r / (1 + r / c)                 bounded by c
    asinh       c asinh(r / c)                  grows like a logarithm
    log         c log(1 + r / c)                the same
    power       c (r / c)^exponent              K is a power of a norm, with q - 1 = exponent
    ==========  ==============================  =====================================================

    With "entry" a step is one pass, momentum included. "global" and "tensor" first measure norms, without synchronising with the
    device. "unit" rescales a copy of the gradient. "spectral" computes a singular value decomposition per matrix.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. All options may differ between groups;
            "global" takes the norm over all groups that say so with the same kernel.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-3).
        kernel: one of the table (default "clip").
        granularity: "global" (default): one norm of all parameters; "tensor": one per parameter; "unit": one per output unit,
            dimension 0; "entry"; "spectral": singular values of a matrix, of dimension 0 by all others.
        scale: c in [1e-18, 1e18] (default 1).
        exponent: > 0, at most 16, of "power" alone (default 0.5).
        momentum: mu in [0, 1), decay rate of the mean of gradients that is mapped (default 0: no state).
        nesterov: map m + (1 - mu)(g - m) instead, as Muon does (default False).
        weight_decay: lambda >= 0, decoupled (default 0).
        maximize: ascend instead of descend (default False).
        foreach: accepted and ignored.
        differentiable: autograd records the step, which then runs on the reference backend; "entry" only (default False).
        fused: True makes ``torch.amp.GradScaler`` leave unscaling to the step.
        state_format, weight_format: as for :class:`precond.AdamW`, of the momentum and of 16-bit parameters.
        **settings: :class:`precond.Settings`.

    Raises:
        ValueError: an argument is out of range or not one of its names.
        RuntimeError: when built and at the step, for a sharded parameter where a whole row is needed, or ``differentiable``
            without "entry"; at the step, for a sparse gradient, and on all ranks where sharded matrices differ.

    State: ``momentum_buffer`` where there is a momentum.

    Source: Maddison, Paulin, Teh and Doucet, arXiv 1902.02257; Ghane, Akhtiamov and Hassibi, arXiv 2603.10485. The kernels and
    their derivations: docs/theory.md, B.2; momentum and defaults are this project's.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = precond.DualDescent([w], lr=1.0, kernel="clip", granularity="tensor")
        >>> w.grad = torch.tensor([30.0, 40.0])
        >>> opt.step()
        >>> [round(x, 4) for x in w.tolist()]
        [2.4, 3.2]
    """

    _why_not_one_pass = "unless granularity is 'entry'"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        kernel: str = "clip",
        granularity: str = "global",
        scale: float = 1.0,
        exponent: float = 0.5,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        super().__init__(params, defaults, settings=settings)

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        check_lr(defaults["lr"])
        check_nonnegative("weight_decay value", "weight_decay", defaults["weight_decay"])

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["kernel"] not in reference.KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(reference.KERNELS)}, got {group['kernel']!r}")
        if group["granularity"] not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {group['granularity']!r}")
        if not 1e-18 <= group["scale"] <= 1e18:  # its square is a float32
            raise ValueError(f"scale must be in [1e-18, 1e18], got {group['scale']}")
        if not 0.0 < group["exponent"] <= 16.0:
            raise ValueError(f"exponent must be in (0, 16], got {group['exponent']}")
        if not 0.0 <= group["momentum"] < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")
        if group["nesterov"] and group["momentum"] == 0.0:
            raise ValueError("nesterov needs a momentum > 0, got 0")

    def _needs_passes(self, group: dict[str, Any]) -> bool:
        return bool(group["granularity"] != "entry")

    def why_not_alone(self, group: dict[str, Any]) -> str:
        """Why a parameter of a group cannot be stepped before the others have gradients; empty if it can."""
        if group["granularity"] == "global":
            return "where granularity is 'global': one norm is of all gradients"
        return super().why_not_alone(group)

    def _check_whole(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        if group["granularity"] == "spectral":
            check_placements(name, p)
        for placement in getattr(p, "placements", ()) if group["granularity"] == "unit" else ():
            if not placement.is_replicate() and not placement.is_shard(0):
                raise RuntimeError(f"{name} must have placements Shard(0) or Replicate for 'unit', got {placement}")

    def _maps(self, p: Tensor, group: dict[str, Any]) -> bool:
        return bool(group["granularity"] == "spectral")

    def _member(self, key: str, name: str, p: Tensor, group: dict[str, Any], kind: int) -> Member:
        return Member(key, name, p, group, matrices_of(tuple(p.shape), True, None, name), True, kind, wide_of(p))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does."""
        super().add_param_group(param_group)
        if self.param_groups[-1]["granularity"] == "global" and (owner := sharder_among_callers()) is not None:
            del self.param_groups[-1]
            raise RuntimeError(
                f"granularity must not be 'global' inside {type(owner).__name__}, where other processes have the rest of the "
                "parameters and of their norm, got 'global'"
            )

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        if group["kernel"] == "identity":
            return Metric()
        return Metric(why_not=f"the kernel {group['kernel']!r} is no linear map")

    def _row(self, group: dict[str, Any]) -> Row:
        hyper = self._hyper(group, "momentum", "scale", "exponent")
        hyper["lookahead"] = 1.0 - float(group["momentum"]) if group["nesterov"] else 0.0
        name = group["kernel"]
        hyper["offset"], hyper["slope"] = _RATIOS[name](group["scale"]) if name in _RATIOS else (0.0, 0.0)
        name = "ratio" if name in _RATIOS else name
        suffix = "" if group["momentum"] == 0.0 else "_momentum"
        return Row(f"dual_{name}{suffix}", -1.0 if group["maximize"] else 1.0, hyper)

    def _prepare(self, groups: list[dict[str, Any]], rows: list[Row]) -> tuple[list[_Work], Exchanges]:
        work = [
            (group, row, *item) for group, row in zip(groups, rows, strict=True) for item in self._gradients(group, row)
        ]
        return work, self.agreements.exchanges(self._members(groups))

    def _step_in_passes(
        self, groups: list[dict[str, Any]], rows: list[Row], work: tuple[list[_Work], Exchanges], begun: Begun
    ) -> None:
        found, exchanges = work
        for group, row, name, p, _ in found:
            self._init_state(p, group, row, name)
        directions = self._averaged([(without_parts(row), name, p, begun.applied(g)) for _, row, name, p, g in found])
        of_shards = self._mapped_by_owners(exchanges, {p: u for (*_, p, _), u in zip(found, directions, strict=True)})
        jobs = []
        for (group, row, name, p, _), u in zip(found, directions, strict=True):
            if p in of_shards:
                u = of_shards[p]
            elif group["granularity"] in ("unit", "spectral"):
                u = mapped(name, u, group)
            step = plain_step(row.hyper["lr"], row.hyper["weight_decay"])
            jobs.append(self._job(name, p, p, u, ("remainder",), step, row.sign, group.get("weight_format")))
        self._scale_by_norms([group for group, *_ in found], jobs)
        moves = [Move(group, row, job, g) for (group, row, _, _, g), job in zip(found, jobs, strict=True)]
        self._last_pass(moves, begun, may_only_make_states=True)

    def _averaged(self, found: list[tuple[Row, str, Tensor, Tensor]]) -> list[Tensor]:
        """What K's gradient is taken of: gradients, or their means, or points between the two."""
        jobs = []
        for row, name, p, g in found:
            if row.rule.endswith("_momentum"):
                names = ("momentum_buffer", "momentum_buffer_scale")
                jobs.append(self._job(name, p, self._buffer(p, p.dtype), g, names, row.hyper))
        self._pass("average", ("momentum_buffer",)).run(jobs)
        means = iter(jobs)
        return [next(means).p if row.rule.endswith("_momentum") else g for row, _, _, g in found]

    def _mapped_by_owners(self, exchanges: Exchanges, directions: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The shards of what owners make of matrices. A missing gradient counts as zeros; who misses one moves nothing."""
        found = {}
        failed: list[Exception] = []
        for members, exchange in exchanges:
            own = [directions.get(m.p) for m in members]
            wide, results = members[0].dtype, [None if u is None else _zeros(u, members[0].dtype) for u in own]

            def piece_of(i: int, own: list[Tensor | None] = own, wide: torch.dtype = wide) -> Tensor | None:
                u = own[i]
                return None if u is None else view(local(u).to(wide), True)

            def work(units: list[Unit], stack: Tensor, members: list[Member] = members) -> Tensor:
                of = [members[unit.param] for unit in units]
                try:
                    return torch.stack([mapped(m.name, u, m.group) for m, u in zip(of, stack, strict=True)])
                except Exception as wrong:  # whatever it is, the other ranks wait for a result
                    failed.append(wrong)
                    return stack

            def put(
                unit: Unit, where: tuple[slice, ...], values: Tensor, results: list[Tensor | None] = results
            ) -> None:
                if (target := results[unit.param]) is not None:
                    view(target, True)[where].copy_(values)

            exchange.run(piece_of, work, put, wide, local(members[0].p).device)
            found.update({m.p: like(m.p, u) for m, u in zip(members, results, strict=True) if u is not None})
        error = failed[0] if failed else None
        for members, exchange in exchanges:
            error = exchange.together(error, local(members[0].p).device) or error
        if error is not None:
            raise error
        return found

    def _scale_by_norms(self, groups: list[dict[str, Any]], jobs: list[Job]) -> None:
        """Scale the steps of tensors that share a norm, or have one each, to steps along K's gradient, on their device."""
        of = [i for i, group in enumerate(groups) if group["granularity"] in ("global", "tensor")]
        if not of:
            return
        names = [groups[i]["kernel"] if groups[i]["granularity"] == "global" else i for i in of]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        # The plan that steps, unless it has others too.
        measuring = self._pass("sgdw", of=0 if len(of) == len(jobs) else 1)
        squares = measuring.squared_norms([jobs[i] for i in of], [numbers[name] for name in names])
        alike: dict[int, list[int]] = {}
        for k, i in enumerate(of):
            alike.setdefault(id(groups[i]), []).append(k)
        for members in alike.values():
            first = of[members[0]]
            coef = coefficients(torch.stack([squares[k] for k in members]).sqrt(), groups[first])
            lr, decay = jobs[first].hyper["lr"] * coef, jobs[first].hyper["weight_decay"] / coef
            # Numbers where the host may read them: a thousand small tensors would be slower.
            steps = [t.unbind() if _backend.on_device(t) else t.tolist() for t in (lr, decay)]
            for k, *step in zip(members, *steps, strict=True):
                jobs[of[k]].hyper["lr"], jobs[of[k]].hyper["weight_decay"] = step


def coefficients(r: Tensor, group: dict[str, Any]) -> Tensor:
    """h'(r) / r, the factor of a vector of length r: 1 at 0; below float32's smallest normal number that number's factor."""
    held = r.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(r == 0, torch.ones_like(r), reference.KERNELS[group["kernel"]](held, group) / held)


def mapped(name: str, u: Tensor, group: dict[str, Any]) -> Tensor:
    """K's gradient in the norms of rows, or in the singular values."""
    if local(u) is not u:
        return like(u, mapped(name, local(u), group).contiguous())
    if u.numel() == 0:
        return u
    rows = u.reshape(u.shape[0] if u.dim() > 0 else 1, -1).to(wide_of(u))
    if group["granularity"] != "spectral":
        # In float64 no square overflows or underflows.
        wide = torch.promote_types(rows.dtype, torch.float64)
        r = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide)
        return (rows * coefficients(r, group)).to(rows.dtype).view(u.shape)
    try:
        left, s, right = torch.linalg.svd(rows, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise torch.linalg.LinAlgError(f"the direction of {name} has no singular values: {error}") from error  # type: ignore[attr-defined]
    # A singular value of 0 is rounded to a tiny one, whose vectors are noise.
    s = torch.where(s > s.amax() * max(rows.shape) * torch.finfo(s.dtype).eps, s, 0.0)
    found: Tensor = (left * reference.KERNELS[group["kernel"]](s, group)) @ right
    return found.view(u.shape)


def _zeros(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous local tensor of the shape of a shard."""
    return torch.zeros(local(t).shape, dtype=dtype, device=t.device)
