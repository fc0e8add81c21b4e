"""Muon: spectral descent on the momentum of a matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import arguments
from ._core.clipping import Begun
from ._core.formats import StateFormat
from ._core.metric import Metric
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.passes import plain_step
from ._core.rows import Row, name_of
from ._core.settings import Settings
from ._core.sharding import like, local
from ._methods.exchange import Exchanges, Member
from ._methods.last_pass import Move
from ._methods.multipass import MultiPass
from ._methods.newton_schulz import METHODS, NS_COEFFICIENTS, orthogonalized, scale_of
from ._methods.owners import Unit
from ._methods.placed import check_placements, is_sharded
from ._methods.units import Block, Matrices, check_flatten, is_matrices, matrices_of, normal_split, view

#: torch's, from 2.9 on.
_TorchMuon: Final[Any] = getattr(torch.optim, "Muon", torch.optim.Optimizer)


class Muon(MultiPass, _TorchMuon):  # type: ignore[misc]
    r"""Muon, a drop-in for :class:`torch.optim.Muon`: two fused passes around a Newton-Schulz iteration.

    .. math::
        m_t = \mu m_{t-1} + (1-\mu)\,g_t, \qquad u_t = m_t + (1-\mu)(g_t - m_t), \qquad
        p_t = p_{t-1} - \gamma\lambda\,p_{t-1} - \gamma\,s\,\mathrm{NS}(u_t)

    NS brings the singular values of u to about 1 (Uniform(0.5, 1.5)), and s is sqrt(max(1, rows / columns)). The result
    approximates ``DualDescent(kernel="normalize", granularity="spectral")`` by matrix products, which are batched over matrices
    of the same shape. Averaging and the step, with decay, are one fused pass each over all matrices. The step does not
    synchronise with the device.

    Args:
        params: matrices, named or in groups, as for any torch optimizer; DTensors in shards too. Give everything else (biases,
            norms, embeddings, the output layer) to another optimizer: :func:`precond.param_groups` separates them.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-3).
        weight_decay: lambda >= 0, decoupled, not scaled by s (default 0.1).
        momentum: mu in [0, 1) (default 0.95).
        nesterov: False takes u = m (default True).
        ns_coefficients: of the quintic iteration (default (3.4445, -4.775, 2.0315)).
        eps: lower bound of the norm that u is divided by before the iteration (default 1e-7).
        ns_steps: number of iterations, below 100 (default 5). They run in bfloat16.
        adjust_lr_fn: None or "original": s as above; "match_rms_adamw": s = 0.2 sqrt(max(rows, columns)).
        flatten: what parameters of more than two dimensions are. None (default): an error, as in torch. True: one matrix of
            dimension 0 by all others (convolutions). False: a batch of matrices, the last two dimensions (experts).
        split: the blocks of a matrix that are matrices of their own, each with its own NS and s: a number of equal blocks or a
            sequence of sizes along dimension 0 (QKV, gate and up projections), or a dict of dimension (0: rows, 1: columns) to
            either (heads). Of a batch the dimensions are those of each matrix. None (default): one block.
        method: None for torch's iteration, with fewer operations; "gram" for the fewest, with more rounding; "polar_express" for
            the optimal polynomials instead of ``ns_coefficients``, which bring singular values closer to 1 (default None).
            docs/newton_schulz.md compares them.
        maximize: ascend instead of descend (default False).
        fused: True makes ``torch.amp.GradScaler`` leave unscaling and skipping to the step (default None).
        state_format, weight_format: as for :class:`precond.AdamW`, of the momentum and of 16-bit parameters.
        **settings: :class:`precond.Settings`.

    Raises:
        ValueError: an argument is out of range, a parameter is not a matrix, or ``split`` does not fit one.
        RuntimeError: at the step, for a sparse or complex gradient, and on all ranks where their sharded matrices differ.

    State: ``momentum_buffer``, as torch.

    Source: Jordan et al. 2024 as torch.optim.Muon defines it; "match_rms_adamw": Liu et al., arXiv 2502.16982.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = precond.Muon([w], lr=0.1)
        >>> w.grad = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
        >>> opt.step()
        >>> [round(x, 1) for x in w.diagonal().tolist()]
        [-0.1, -0.1]
    """

    _why_not_one_pass = "for Muon"
    _host_must_know = False
    _group_options = {
        **MultiPass._group_options,
        "maximize": False,
        "flatten": None,
        "split": None,
        "method": None,
        "fused": None,
    }
    _older_options = {}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        flatten: bool | None = None,
        split: int | Sequence[int] | Mapping[int, int | Sequence[int]] | None = None,
        method: str | None = None,
        maximize: bool = False,
        fused: bool | None = None,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        FusedOptimizer.__init__(self, params, defaults, settings=settings)

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        lr = defaults["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements")
        for name, what in (("lr", "Learning rate"), ("momentum", "momentum"), ("weight_decay", "weight decay")):
            if not defaults[name] >= 0.0:
                raise ValueError(f"{what} should be >= 0 but is: {defaults[name]}")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
            raise ValueError(f"Adjust learning rate function {group['adjust_lr_fn']} is not supported")
        if group.get("method") not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {group['method']!r}")
        if not 0 <= group["ns_steps"] < 100:
            raise ValueError(
                f"Number of steps must be less than 100 for computational efficiency, got ns_steps={group['ns_steps']}"
            )
        if len(group["ns_coefficients"]) != 3:
            raise ValueError(f"Coefficients must be a tuple of exactly 3 values, got {group['ns_coefficients']!r}")
        check_flatten(group.get("flatten"))
        normal_split(group.get("split"))  # raises
        if not group["momentum"] < 1.0:
            raise ValueError(f"momentum must be < 1, got {group['momentum']}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of matrices."""
        super().add_param_group(param_group)
        group, index = self.param_groups[-1], self._groups_before + len(self.param_groups) - 1
        try:
            if group.get("split") is not None:
                group["split"] = normal_split(group["split"])
            for position, p in enumerate(group["params"]):
                self._matrices(name_of(group, index, position), p, group)
        except ValueError:
            del self.param_groups[-1]
            raise

    def _matrices(self, name: str, p: Tensor, group: dict[str, Any]) -> Matrices:
        """The matrices that a parameter consists of."""
        flatten = group.get("flatten")
        if not is_matrices(p.ndim, flatten):
            hint = "; flatten=True makes it one matrix, flatten=False a batch of them" if p.ndim > 2 else ""
            raise ValueError(
                f"Muon only supports 2D parameters whereas we found a parameter with size: {p.size()}: {name}{hint}"
            )
        return matrices_of(tuple(p.shape), flatten, normal_split(group.get("split")), name)

    def _check_whole(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        check_placements(name, p)

    def _maps(self, p: Tensor, group: dict[str, Any]) -> bool:
        return True

    def _member(self, key: str, name: str, p: Tensor, group: dict[str, Any], kind: int) -> Member:
        of = self._matrices(name, p, group)
        return Member(key, name, p, group, of, group.get("flatten"), kind, torch.bfloat16)

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        return Metric(why_not="it takes all singular values to 1")

    def _row(self, group: dict[str, Any]) -> Row:
        hyper = self._hyper(group, "momentum")
        hyper["lookahead"] = 1.0 - float(group["momentum"]) if group["nesterov"] else 0.0
        return Row("average", -1.0 if group.get("maximize") else 1.0, hyper)

    def _rebuild(self) -> None:
        super()._rebuild()
        self._stacks: dict[tuple[Any, ...], Stack] = {}

    def _prepare(self, groups: list[dict[str, Any]], rows: list[Row]) -> Prepared:
        found = []
        for group, row in zip(groups, rows, strict=True):
            for name, p, g in self._gradients(group, row):
                if p.numel() == 0:
                    continue
                if p.is_complex():
                    raise RuntimeError(f"Muon does not support complex parameters, got {p.dtype} for {name}")
                if not is_matrices(p.ndim, group.get("flatten")):
                    self._init_state(p, group, row, name)  # what is replaced by something else has states that say so
                found.append(Found(group, row, name, p, g, self._matrices(name, p, group)))
        return Prepared(found, self.agreements.exchanges(self._members(groups)))

    def _step_in_passes(self, groups: list[dict[str, Any]], rows: list[Row], work: Prepared, begun: Begun) -> None:
        found, exchanges = work
        buffers = self._buffers_of(found)
        means = []
        for (group, row, name, p, g, _), buffer in zip(found, buffers, strict=True):
            self._init_state(p, group, row, name)
            names = ("momentum_buffer", "momentum_buffer_scale")
            means.append(self._job(name, p, buffer, g, names, row.hyper, row.sign))
        self._pass("average", ("momentum_buffer",)).run(means, begun)
        directions = self._directions(found, buffers, exchanges)
        moves = []
        hypers: dict[tuple[int, float], dict[str, float | Tensor]] = {}  # one for all that a pass may take together
        for (group, row, name, p, g, of), direction in zip(found, directions, strict=True):
            scale = _one_scale(of, group["adjust_lr_fn"]) or 1.0
            step = hypers.get((id(row), scale))
            if step is None:
                step = hypers[id(row), scale] = plain_step(row.hyper["lr"] * scale, row.hyper["weight_decay"] / scale)
            job = self._job(name, p, p, direction, ("remainder",), step, 1.0, group.get("weight_format"))
            moves.append(Move(group, row, job, g))
        self._last_pass(moves, begun, may_only_make_states=True)

    def _buffers_of(self, found: list[Found]) -> list[Tensor]:
        """Where the averages go: those of equal matrices into one stack, which is multiplied as it is."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        buffers: dict[int, Tensor] = {}
        for i, (group, _, _, p, _, of) in enumerate(found):
            if is_sharded(p) or (batch := of.batch) is None:
                buffers[i] = self._own_buffer(p)
            else:
                alike.setdefault((id(group), batch[1:], p.device), []).append(i)
        stacks, self._stacks = self._stacks, {}
        for key, indices in alike.items():
            shapes = [found[i].p.shape for i in indices]
            stack = stacks.get(key)
            if stack is None or stack.shapes != shapes or not _alike(stack.views[0], found[indices[0]].p):
                stack = Stack([found[i] for i in indices])
            stack.indices = indices
            self._stacks[key] = stack
            buffers.update(zip(indices, stack.views, strict=True))
        return [buffers[i] for i in range(len(found))]

    def _own_buffer(self, p: Tensor) -> Tensor:
        """A contiguous buffer of a parameter that is in no stack."""
        made = self._buffers.get(p)
        if made is None or not _alike(made, p):
            made = like(p, torch.zeros(local(p).shape, dtype=torch.bfloat16, device=p.device))
            self._buffers.put(p, made)
        return made

    def _directions(self, found: list[Found], buffers: list[Tensor], exchanges: Exchanges) -> list[Tensor]:
        """The orthogonal factors of the averages in the buffers, scaled where the blocks of a parameter have several scales."""
        stacked = {i for stack in self._stacks.values() for i in stack.indices}
        directions = {i: each.target(buffers[i]) for i, each in enumerate(found) if i not in stacked}
        meanwhile: Callable[[], None] | None = functools.partial(self._map_own, found, buffers, directions)
        index_of = {id(each.p): i for i, each in enumerate(found)}
        for members, exchange in exchanges:
            indices = [index_of.get(id(m.p)) for m in members]
            pieces, targets = (
                [None if i is None else view(local(of[i]), found[i].group.get("flatten")) for i in indices]
                for of in (buffers, directions)
            )
            exchange.run(
                pieces.__getitem__,
                functools.partial(_orthogonalized_units, members),
                functools.partial(_put, members, targets),
                torch.bfloat16,
                local(members[0].p).device,
                meanwhile=meanwhile,
            )
            meanwhile = None
        if meanwhile is not None:
            meanwhile()
        return [directions[i] for i in range(len(found))]

    def _map_own(self, found: list[Found], buffers: list[Tensor], directions: dict[int, Tensor]) -> None:
        """The directions of the parameters that this rank has whole."""
        cut = [i for i in directions if not is_sharded(found[i].p)]
        for stack in self._stacks.values():
            turned = _turned(stack.whole, found[stack.indices[0]].group)
            for i, each in zip(stack.indices, stack.parts(turned), strict=True):
                directions[i] = like(found[i].p, each)
        alike: dict[tuple[Any, ...], list[tuple[int, Block]]] = {}
        for i in cut:
            for block in found[i].of.blocks():
                key = (id(found[i].group), found[i].p.device, block.rows, block.columns)
                alike.setdefault(key, []).append((i, block))
        for places in alike.values():
            parts = [view(local(buffers[i]), found[i].group.get("flatten"))[block.where] for i, block in places]
            turned = _turned(torch.cat(parts), found[places[0][0]].group)
            for (i, block), values in zip(places, torch.split(turned, [len(part) for part in parts]), strict=True):
                group = found[i].group
                target = view(local(directions[i]), group.get("flatten"))[block.where]
                _write(target, values, block, found[i].of, group["adjust_lr_fn"])


class Found(NamedTuple):
    """A parameter that a step updates."""

    group: dict[str, Any]
    row: Row
    name: str
    p: Tensor
    g: Tensor
    of: Matrices

    def target(self, buffer: Tensor) -> Tensor:
        """Where its directions are written to: the buffer of its average. One that has several scales needs more bits."""
        if _one_scale(self.of, self.group["adjust_lr_fn"]) is not None:
            return buffer
        return like(self.p, torch.empty(local(self.p).shape, dtype=torch.float32, device=self.p.device))


class Prepared(NamedTuple):
    """What a step updates, and what the ranks have agreed on."""

    found: list[Found]
    exchanges: Exchanges


class Stack:
    """A batch of equal matrices, and the parameters' views of it: a pass writes them, and the batch is multiplied as it is."""

    def __init__(self, found: list[Found]) -> None:
        """``found``: parameters that are batches of matrices of one shape."""
        batches = [each.of.batch or (0, 0, 0) for each in found]
        self.shapes = [each.p.shape for each in found]
        self.counts = [count for count, _, _ in batches]
        self.whole = torch.zeros(sum(self.counts), *batches[0][1:], dtype=torch.bfloat16, device=found[0].p.device)
        self._matrices = all(shape == self.whole.shape[1:] for shape in self.shapes)
        # The same tensors at every step: a pass looks at what is new.
        self.views = [like(each.p, part) for each, part in zip(found, self.parts(self.whole), strict=True)]
        #: Where the parameters stand in this step.
        self.indices: list[int] = []

    def parts(self, whole: Tensor) -> Sequence[Tensor]:
        """The parameters' views of a batch of this shape."""
        if self._matrices:
            return whole.unbind()  # a fourth of the time
        return [part.view(shape) for part, shape in zip(torch.split(whole, self.counts), self.shapes, strict=True)]


def _alike(a: Tensor, b: Tensor) -> bool:
    """True where two tensors have one shape, device and placement."""
    placed = [(t.shape, t.device, getattr(t, "device_mesh", None), getattr(t, "placements", None)) for t in (a, b)]
    return placed[0] == placed[1]


def _orthogonalized_units(members: list[Member], units: list[Unit], stack: Tensor) -> Tensor:
    return _turned(stack, members[units[0].param].group)


def _put(
    members: list[Member], targets: list[Tensor | None], unit: Unit, where: tuple[slice, ...], values: Tensor
) -> None:
    """Write what this rank gets of a result. A parameter without a gradient here has no target: others may have one."""
    target, member = targets[unit.param], members[unit.param]
    if target is not None:
        _write(target[where], values, unit.block, member.of, member.group["adjust_lr_fn"])


def _write(target: Tensor, values: Tensor, block: Block, of: Matrices, adjust_lr_fn: str | None) -> None:
    target.copy_(values)
    if _one_scale(of, adjust_lr_fn) is None:
        target.mul_(scale_of(adjust_lr_fn, block.rows, block.columns))


@functools.lru_cache(maxsize=4096)
def _one_scale(of: Matrices, adjust_lr_fn: str | None) -> float | None:
    """The scale of all blocks; None where they have several."""
    scales = {scale_of(adjust_lr_fn, rows, columns) for rows in of.rows for columns in of.columns}
    return scales.pop() if len(scales) == 1 else None


def _turned(u: Tensor, group: dict[str, Any]) -> Tensor:
    """The directions of a batch of averages. Contiguous: a pass takes longer to read transposed ones than a copy does."""
    return orthogonalized(u, group).contiguous()
