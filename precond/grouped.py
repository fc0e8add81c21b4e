"""Grouped: an optimizer whose groups name their methods."""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ._core.clipping import Begun
from ._core.groups import param_groups
from ._core.metric import Metric
from ._core.optimizer import FusedOptimizer
from ._core.rows import Row
from ._core.settings import DEFAULTS, Settings
from ._core.states import Recipe
from ._methods.multipass import MultiPass

#: A method's groups in a step, their rows, and what it has found about their parameters.
_Share = tuple[MultiPass, list[dict[str, Any]], list[Row], Any]


class Grouped(MultiPass):
    r"""One optimizer whose groups name their methods, such as Muon for hidden matrices and AdamW for everything else.

    .. math::
        p_t = p_{t-1} - \gamma_i\,u_i(c\,g_t), \qquad c = \min\Big(1, \frac{\text{max\_grad\_norm}}{\lVert g\rVert}\Big)

    for a parameter of group i, whose method finds u_i. There is one ``param_groups``, one ``state_dict``, one norm over the
    gradients of all groups, one loss scaler and one decision to skip a step. Groups whose method is one pass share it. The
    numbers are those of the optimizers apart.

    Args:
        params: groups, each a dictionary with ``params``, which may be named, ``optimizer``, a class of this package or its name,
            and arguments of that class. The group keeps the name, so that checkpoints can.
        **options: :class:`precond.Settings`, which concern the whole step, and arguments for every group whose class has them and
            that does not say otherwise: ``lr=1e-3``, ``weight_decay=0.1``, ``optimizer=precond.AdamW``. ``fused=True`` makes
            ``torch.amp.GradScaler`` leave unscaling and skipping to the step.

    Raises:
        TypeError: an optimizer of another package, whose step is its own; a wrapper, which goes around this class; a group
            without an optimizer; an argument that no group takes.
        ValueError: an argument is out of range; a checkpoint in which a group has another method.

    State: that of each group's class.

    Source: this project's. torch asks for an optimizer per method (pytorch#166209).

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> opt = precond.Grouped([
        ...     dict(params=[model[0].weight], optimizer=precond.Muon, lr=0.02),
        ...     dict(params=[model[0].bias, *model[2].parameters()], optimizer=precond.AdamW, lr=3e-4),
        ... ], max_grad_norm=1.0)
        >>> model(torch.ones(1, 4)).square().sum().backward()
        >>> opt.step()
        >>> [group["optimizer"] for group in opt.param_groups], bool(opt.grad_norm > 0)
        (['Muon', 'AdamW'], True)
    """

    _why_not_one_pass = "for Grouped"
    _older_options = {}
    #: Those of all classes.
    _sparse_rules = frozenset({"adagrad", "sgd", "sgd_momentum", "sgd_nesterov"})

    #: The classes of the groups by their names.
    _classes: dict[str, type[FusedOptimizer]]
    #: An instance of each class, which says what its groups need and steps those that need several passes.
    _parts: dict[type[FusedOptimizer], FusedOptimizer]

    def __init__(self, params: Iterable[dict[str, Any]], **options: Any) -> None:
        settings = Settings(**{name: options.pop(name) for name in DEFAULTS if name in options})  # type: ignore[typeddict-item]
        self._classes, self._parts = {}, {}
        groups = list(params)
        if any(not isinstance(group, dict) for group in groups):
            raise TypeError("params must be groups, dictionaries with 'params' and 'optimizer', got a parameter")
        self._shared = options
        super().__init__(groups, {}, settings=settings)
        for name in options.keys() - {"optimizer"}:
            if not any(name in _arguments(cls) for cls in self._classes.values()):
                raise TypeError(f"{type(self).__name__}.__init__() got {name!r}, which no group's optimizer takes")

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        matrices: type[FusedOptimizer] | Mapping[str, Any],
        rest: type[FusedOptimizer] | Mapping[str, Any],
        weight_decay: float | None = None,
        no_decay: Iterable[str] = ("bias", "norm"),
        head: str | None = None,
        **options: Any,
    ) -> Self:
        """An optimizer of a model: one method for hidden matrices, another for everything else.

        Which is which :func:`precond.param_groups` says: embeddings, the output head, norms and biases are the rest. Where the
        method of matrices has ``flatten``, as Muon, and is given none, convolutions are flattened, each in its group, and other
        parameters of more than two dimensions, as of experts, are batches of matrices.

        Args:
            model: a module.
            matrices, rest: a class of this package, or a group without ``params``: ``dict(optimizer=precond.Muon, lr=0.02)``.
            weight_decay: of what is decayed, in both (default None: as their groups or classes say).
            no_decay, head: as for :func:`precond.param_groups`.
            **options: as for :class:`Grouped`.

        Example:
            >>> import precond
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 50))
            >>> opt = precond.Grouped.for_model(model, matrices=dict(optimizer=precond.Muon, lr=0.02), rest=precond.AdamW)
            >>> for group in opt.param_groups:
            ...     print(group["optimizer"], group["param_names"], group["weight_decay"])
            AdamW ['0.weight', '3.weight'] 0.01
            AdamW ['1.bias', '2.weight', '2.bias', '3.bias'] 0.0
            Muon ['1.weight'] 0.1
        """
        of_matrices, of_rest = (
            dict(given) if isinstance(given, Mapping) else {"optimizer": given} for given in (matrices, rest)
        )
        of_matrices = {"optimizer": options.get("optimizer"), **of_matrices}
        groups = []
        for group in param_groups(model, weight_decay, no_decay, matrices=of_matrices, head=head):
            if "optimizer" in group:
                groups.extend(_by_dimensions(group, model))
            else:
                groups.append({**of_rest, **group})
        return cls(groups, **options)

    # Groups and their classes.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its ``optimizer``."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        given = dict(param_group)
        cls = self._class(given.pop("optimizer", self._shared.get("optimizer")))
        known = _arguments(cls)
        for name in [name for name in given if name in DEFAULTS and name not in known]:
            if (
                given.pop(name) != self._own[name]
            ):  # ZeroRedundancyOptimizer repeats in groups what it gives to the whole
                raise TypeError(f"{name} concerns the whole step: give it to Grouped, not to a group")
        given = {**{name: value for name, value in self._shared.items() if name in known}, **given}
        if given.get("differentiable"):
            raise RuntimeError("differentiable must be False in a group of Grouped, got True")
        given["params"] = [given["params"]] if isinstance(given["params"], Tensor) else list(given["params"])
        # The class itself checks and completes the group. Empty ones before it let its errors give the group's number.
        named = "param_names" in given or any(isinstance(p, tuple) for p in given["params"])
        empty: dict[str, Any] = {"params": [], "param_names": []} if named else {"params": []}
        own = {name: given.pop(name) for name in known & given.keys()}
        made: Any = cls
        before = [dict(empty) for _ in self.param_groups]
        group = made([*before, given], backend=self._own["backend"], **own).param_groups[-1]
        group["optimizer"] = cls.__name__
        torch.optim.Optimizer.add_param_group(self, group)
        self._classes[cls.__name__] = cls

    def _class(self, given: Any) -> type[FusedOptimizer]:
        """The class that a group names. ZeroRedundancyOptimizer puts the class itself into groups, at every step."""
        if isinstance(given, str) and given in self._classes:
            return self._classes[given]
        package = importlib.import_module(__package__)
        cls = getattr(package, given, None) if isinstance(given, str) else given
        if not isinstance(cls, type):
            raise TypeError(f"optimizer must be a class of precond in each group, or the name of one, got {given!r}")
        if not issubclass(cls, FusedOptimizer) or issubclass(cls, Grouped):
            if issubclass(cls, Grouped) or cls.__module__.startswith(f"{__package__}."):
                raise TypeError(f"optimizer must be a method, got {cls.__name__}, which goes around an optimizer")
            ours = f": use precond.{cls.__name__}" if hasattr(package, cls.__name__) else ""
            raise TypeError(
                f"optimizer must be a class of precond, got {cls.__module__}.{cls.__name__}, which cannot share a norm, a plan "
                f"and a decision to skip with other groups{ours}"
            )
        if self._classes.get(cls.__name__, cls) is not cls:
            raise TypeError(f"optimizer must have a name of its own among the groups, got two classes {cls.__name__}")
        return cls

    def _class_of(self, group: dict[str, Any]) -> type[FusedOptimizer]:
        return self._class(group.get("optimizer"))

    def _part(self, group: dict[str, Any]) -> FusedOptimizer:
        """What says how a group is stepped."""
        cls = self._class_of(group)
        part = self._parts.get(cls)
        if part is None:
            made: Any = cls
            part = self._parts[cls] = made([{"params": []}], backend=self._own["backend"])
            part._owner = weakref.ref(self)
        return part

    def _up_to_date(self, part: FusedOptimizer) -> FusedOptimizer:
        """A part, with the groups and states that are its own now."""
        part.state = self.state
        part.param_groups = [group for group in self.param_groups if self._part(group) is part]
        return part

    def _in_passes(self) -> list[MultiPass]:
        """The methods of several passes that groups have."""
        parts = dict.fromkeys(self._part(group) for group in self.param_groups)
        found = [part for part in parts if isinstance(part, MultiPass)]
        for part in found:
            self._up_to_date(part)
        return found

    # What the groups' classes declare.

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        """There are none: each class checks its own."""

    def _check_group(self, group: dict[str, Any]) -> None:
        self._part(group)._check_group(group)

    def _options_of(self, group: dict[str, Any]) -> Mapping[str, Any]:
        return {**self._class_of(group)._group_options, "optimizer": None}

    def _recipe(self) -> Recipe:
        return Recipe(
            lambda p, group: self._class_of(group)._initial(p, group),
            lambda name, group: self._class_of(group)._format_of_state(name, group),
            lambda group: self._class_of(group)._numbers(group),
            self._options_of,
        )

    def _is_fused(self) -> bool:
        return bool(self._shared.get("fused"))

    def _row(self, group: dict[str, Any]) -> Row:
        return self._part(group)._row(group)

    def _checked_row(self, group: dict[str, Any]) -> Row:
        return self._part(group)._checked_row(group)

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        return self._up_to_date(self._part(group))._metric(p, group)

    # The step.

    def _needs_passes(self, group: dict[str, Any]) -> bool:
        part = self._part(group)
        return isinstance(part, MultiPass) and part._needs_passes(group)

    def _check_ready(self) -> None:
        for part in self._in_passes():
            part._check_ready()

    def _prepare(self, groups: list[dict[str, Any]], rows: list[Row]) -> list[_Share]:
        shares: list[_Share] = []
        for part in self._in_passes():
            own = [
                (group, row)
                for group, row in zip(groups, rows, strict=True)
                if any(group is g for g in part.param_groups)
            ]
            if own:
                of_part, of_rows = map(list, zip(*own, strict=True))
                shares.append((part, of_part, of_rows, part._prepare(of_part, of_rows)))
        return shares

    def _decided_by_host(self, groups: list[dict[str, Any]]) -> bool:
        parts = [self._part(group) for group in groups if self._needs_passes(group)]
        return any(isinstance(part, MultiPass) and part._host_must_know for part in parts)

    def _step_in_passes(self, groups: list[dict[str, Any]], rows: list[Row], work: list[_Share], begun: Begun) -> None:
        for part, of_part, of_rows, its_work in work:
            part._step_in_passes(of_part, of_rows, its_work, begun)

    def keep_memory(self, params: list[Tensor]) -> None:
        """Forget the memory of other parameters."""
        super().keep_memory(params)
        for part in self._in_passes():
            part.keep_memory(params)

    def update_curvature(self, batch_size: float = 1.0, estimates: Sequence[Tensor | None] | None = None) -> None:
        """:meth:`precond.GaussNewton.update_curvature` of the groups whose class has one.

        Args:
            batch_size: as there.
            estimates: one for each parameter of those groups, in their order.

        Raises:
            RuntimeError: no group has such a class; and as there.
            ValueError: as there.
        """
        parts = [part for part in self._in_passes() if hasattr(part, "update_curvature")]
        if not parts:
            raise RuntimeError("update_curvature needs a group of GaussNewton or Sophia")
        groups = [group for group in self.param_groups if self._part(group) in parts]
        total = sum(len(group["params"]) for group in groups)
        if estimates is not None and len(estimates) != total:
            raise ValueError(f"estimates must be one per parameter of those groups, {total}, got {len(estimates)}")
        left = iter(estimates or ())
        of = {} if estimates is None else {id(group): [next(left) for _ in group["params"]] for group in groups}
        for part in parts:
            own = None if estimates is None else [e for group in part.param_groups for e in of[id(group)]]
            part.update_curvature(batch_size, own)

    # Copies and checkpoints.

    def _rebuild(self) -> None:
        self._parts = {}
        super()._rebuild()

    def _prepare_to_save(self) -> None:
        for group in self.param_groups:
            group["optimizer"] = self._class_of(group).__name__
        super()._prepare_to_save()

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep: also the classes of the groups, and what they share."""
        return {**super().__getstate__(), "_classes": self._classes, "_shared": self._shared}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, whose groups have the same methods."""
        for index, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            if saved.get("optimizer", group["optimizer"]) != group["optimizer"]:
                raise ValueError(
                    f"group {index} must be of {group['optimizer']} in the checkpoint too, got {saved['optimizer']!r}"
                )
        super().load_state_dict(state_dict)


def _by_dimensions(group: dict[str, Any], model: nn.Module) -> list[dict[str, Any]]:
    """A group of matrices as groups of matrices, convolutions and batches, where its method tells them apart and nobody has."""
    method = group["optimizer"]
    method = getattr(importlib.import_module(__package__), method, None) if isinstance(method, str) else method
    if "flatten" in group or not isinstance(method, type) or "flatten" not in _arguments(method):
        return [group]
    convolutions = {
        p for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters(recurse=False)
    }
    found: dict[bool | None, list[tuple[str, Tensor]]] = {}
    for name, p in group["params"]:
        found.setdefault(None if p.ndim == 2 else p in convolutions, []).append((name, p))
    return [
        {**group, "params": params} | ({} if flatten is None else {"flatten": flatten})
        for flatten, params in found.items()
    ]


def _arguments(cls: type[FusedOptimizer]) -> set[str]:
    """The arguments of a class that its groups may have."""
    found = inspect.signature(cls.__init__).parameters.values()
    return {p.name for p in found if p.kind is not p.VAR_KEYWORD} - {"self", "params"}
