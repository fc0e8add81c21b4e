"""Grouped: an optimizer whose groups name their methods. One class, a third of it docstrings."""

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
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.parts import OPTIONS
from ._core.rows import Row
from ._core.settings import DEFAULTS, Settings
from ._core.states import Recipe
from ._methods.exchange import Agreements
from ._methods.multipass import MultiPass
from ._wrappers.wrapper import Wrapper
from .adagrad import Adagrad
from .sgd import SGD

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
    _sparse_rules = SGD._sparse_rules | Adagrad._sparse_rules

    #: The classes of the groups.
    _methods: Methods
    #: An instance of each class, which says what its groups need and steps those that need several passes.
    _parts: dict[type[FusedOptimizer], FusedOptimizer]

    def __init__(self, params: ParamsT, **options: Any) -> None:
        settings = Settings(**{name: options.pop(name) for name in DEFAULTS if name in options})  # type: ignore[typeddict-item]
        self._methods, self._parts, self._shared = Methods(), {}, options
        groups: list[Any] = list(params)
        if not any(isinstance(group, dict) for group in groups) and "optimizer" in options:
            groups = [{"params": groups}]
        if any(not isinstance(group, dict) for group in groups):
            raise TypeError("params must be groups, dictionaries with 'params' and 'optimizer', got a parameter")
        super().__init__(groups, {}, settings=settings)
        for name in options.keys() - {"optimizer", "fused"}:
            if not any(name in _arguments(cls) for cls in self._methods.known.values()):
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
            weight_decay: of what is decayed, where ``matrices`` or ``rest`` do not say otherwise (default None: their classes').
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
        for name, given in (("matrices", of_matrices), ("rest", of_rest)):
            if "params" in given:
                raise ValueError(f"{name} must be options of a group without 'params', got 'params' among them")
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        of_matrices = {"optimizer": options.get("optimizer"), **decay, **of_matrices}
        groups = []
        for group in param_groups(model, None, no_decay, matrices=of_matrices, head=head):
            if "optimizer" in group:
                groups.extend(_by_dimensions(group, model))
            else:  # what is not decayed says so
                groups.append({**decay, **of_rest, **group})
        return cls(groups, **options)

    # Groups and their classes.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its ``optimizer``."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        given = dict(param_group)
        cls = self._methods.named(given.pop("optimizer", self._shared.get("optimizer")))
        known = _arguments(cls)
        for name in [name for name in given if name in DEFAULTS and name not in known]:
            # ZeroRedundancyOptimizer repeats in groups what it gives to the whole.
            if given.pop(name) != self._own[name]:
                raise TypeError(f"{name} concerns the whole step: give it to Grouped, not to a group")
        given = {**{name: value for name, value in self._shared.items() if name in known}, **given}
        if given.get("differentiable"):
            raise RuntimeError("differentiable must be False in a group of Grouped, got True")
        # The class itself checks and completes the group.
        own = {name: given.pop(name) for name in known & given.keys()}
        made: Any = cls.__new__(cls)
        made._groups_before = len(self.param_groups)
        made.__init__([given], backend=self._own["backend"], **own)
        (group,) = made.param_groups
        group["optimizer"] = cls.__name__
        if self._own["offload"] is not None and (reason := made._why_not_away(group)):
            raise RuntimeError(f"offload must be None: {reason}")
        torch.optim.Optimizer.add_param_group(self, group)
        self._scaled_once = False
        self._methods.known[cls.__name__] = cls

    def part_of(self, group: dict[str, Any]) -> FusedOptimizer:
        """An instance of a group's class, which has the groups of that class and the states of all."""
        return self._up_to_date(self._part(group))

    def _part(self, group: dict[str, Any]) -> FusedOptimizer:
        cls = self._methods.of(group)
        part = self._parts.get(cls)
        if part is None:
            make: Any = cls
            part = self._parts[cls] = make([{"params": []}], backend=self._own["backend"])
            part._owner, part.engine.captured = weakref.ref(self), self.engine.captured
            if isinstance(part, MultiPass):
                part.agreements = self._agreed.setdefault(cls, part.agreements)
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

    def _recipe(self) -> Recipe:
        of = self._methods.of
        return Recipe(
            lambda p, group: of(group)._initial(p, group),
            lambda name, group: of(group)._format_of(name, group),
            lambda group: of(group)._numbers(group),
            lambda group: {**of(group)._options_of(group), "optimizer": None},
        )

    def _is_fused(self) -> bool:
        return bool(self._shared.get("fused"))

    def _why_not_away(self, group: dict[str, Any]) -> str:
        """Why the states of a group's parameters cannot be the host's; empty if they can."""
        return self._part(group)._why_not_away(group)

    def why_not_alone(self, group: dict[str, Any]) -> str:
        """Why a parameter of a group cannot be stepped before the others have gradients; empty if it can."""
        return self._part(group).why_not_alone(group)

    def _row(self, group: dict[str, Any]) -> Row:
        return self._part(group)._row(group)

    def _checked_row(self, group: dict[str, Any]) -> Row:
        return self._part(group)._checked_row(group)

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        return self.part_of(group)._metric(p, group)

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
        used = {self._methods.of(group) for group in self.param_groups}
        self._parts = {cls: part for cls, part in self._parts.items() if cls in used}
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
        groups = [group for group in self.param_groups if group.get("curvature", "gradient") != "gradient"]
        parts: list[Any] = [part for part in self._in_passes() if any(self._part(group) is part for group in groups)]
        if not groups:
            raise RuntimeError(
                "update_curvature needs a group of Sophia, or of GaussNewton that has no curvature='gradient'"
            )
        if estimates is None and any(group["curvature"] == "hutchinson" for group in groups):
            raise RuntimeError("estimates must be given with curvature='hutchinson', got None")
        total = sum(len(group["params"]) for group in groups)
        if estimates is not None and len(estimates) != total:
            raise ValueError(f"estimates must be one per parameter of those groups, {total}, got {len(estimates)}")
        left = iter(estimates or ())
        of = {} if estimates is None else {id(group): [next(left) for _ in group["params"]] for group in groups}
        for part in parts:
            of_part = [group for group in groups if self._part(group) is part]
            own = None if estimates is None else [e for group in of_part for e in of[id(group)]]
            part.update_groups(of_part, batch_size, own)

    # Methods whose parameters are other values in evaluation.

    def eval(self) -> None:
        """Call ``eval`` of the methods that have it, such as :class:`precond.ScheduleFreeAdamW`."""
        self._call("eval")

    def train(self) -> None:
        """Call ``train`` of the methods that have it."""
        self._call("train")

    def _call(self, mode: str) -> None:
        for part in dict.fromkeys(self._part(group) for group in self.param_groups):
            if (switch := getattr(part, mode, None)) is not None:
                self._up_to_date(part)
                switch()

    # Copies and checkpoints.

    def _rebuild(self) -> None:
        self._parts = {}
        # New parts go on with what ranks have agreed on: the others do not ask again where one alone loads a checkpoint.
        self._agreed: dict[type[FusedOptimizer], Agreements] = self.__dict__.get("_agreed") or {}
        super()._rebuild()

    def _prepare_to_save(self) -> None:
        for group in self.param_groups:
            group["optimizer"] = self._methods.of(group).__name__
        super()._prepare_to_save()

    def _states_to_save(self) -> dict[Tensor, dict[str, Any]]:
        return {p: state for part in self._in_passes() for p, state in part._states_to_save().items()}

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep: also the classes of the groups, and what they share."""
        return {**super().__getstate__(), "_methods": self._methods, "_shared": self._shared}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, whose groups have the same methods."""
        for index, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            name = self._methods.of(group).__name__
            if saved.get("optimizer", name) not in (name, self._methods.of(group)):
                raise ValueError(f"group {index} must be of {name} in the checkpoint too, got {saved['optimizer']!r}")
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, had in zip(self.param_groups, before, strict=True):  # one of an older version lacks what came later
            options = self.states.recipe.options(group)
            group.update({name: value for name, value in had.items() if name not in group and name not in options})


class Methods:
    """The classes that groups name."""

    def __init__(self) -> None:
        #: By their names.
        self.known: dict[str, type[FusedOptimizer]] = {}

    def of(self, group: dict[str, Any]) -> type[FusedOptimizer]:
        """The class of a group."""
        name = group.get("optimizer")
        known = self.known.get(name) if isinstance(name, str) else None
        return self.named(name) if known is None else known

    def named(self, given: Any) -> type[FusedOptimizer]:
        """A class, given as itself or by its name: ZeroRedundancyOptimizer puts the class into groups, at every step."""
        package = importlib.import_module(__package__)
        cls = self.known.get(given, getattr(package, given, None)) if isinstance(given, str) else given
        if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a class of precond in each group, or the name of one, got {given!r}")
        if issubclass(cls, (Grouped, Wrapper)):
            raise TypeError(f"optimizer must be a method, got {cls.__name__}, which goes around an optimizer")
        if not issubclass(cls, FusedOptimizer):
            ours = f": use precond.{cls.__name__}" if hasattr(package, cls.__name__) else ""
            raise TypeError(
                f"optimizer must be a class of precond, got {cls.__module__}.{cls.__name__}, which cannot share a norm, a plan "
                f"and a decision to skip with other groups{ours}"
            )
        if cls._row is FusedOptimizer._row:
            raise TypeError(f"optimizer must be a method, got the base class {cls.__name__}")
        if inspect.unwrap(cls.step) is not inspect.unwrap(FusedOptimizer.step):  # torch wraps it in each class
            raise TypeError(f"optimizer must not have a step of its own, got {cls.__name__}: Grouped steps all groups")
        if self.known.get(cls.__name__, cls) is not cls:
            raise TypeError(f"optimizer must have a name of its own among the groups, got two classes {cls.__name__}")
        return cls


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
    return {p.name for p in found if p.kind is not p.VAR_KEYWORD} - {"self", "params"} | OPTIONS.keys()
