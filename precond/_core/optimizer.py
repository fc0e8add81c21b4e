"""What every optimizer of precond shares: being a ``torch.optim.Optimizer`` whose step is one fused pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol, overload

import torch
from torch import Tensor

from .. import reference
from . import backend as _backend
from . import formats, parts
from .amp import control_of
from .arguments import number
from .averages import ShowsAverages
from .checks import Checks, check_capturable, check_defaults, check_numbers, check_options
from .engine import Engine
from .formats import StateFormat
from .metric import Metric
from .moves import MovesStates
from .norm import group_of_sharder, sharder_among_callers
from .precision import at_stated_precision
from .rows import PartOfStep, Row, Step
from .saved import Saved, drop_settings
from .scales import KEPT, SCALES, l1_decay_of, remember_lr, scale, warned_if_scaled
from .settings import DEFAULTS, Settings, own_settings
from .states import ParamStates, Recipe
from .states import PrecisionWarning as PrecisionWarning
from .statistics import Statistics, made_of

#: What an optimizer's class says, in the errors of one that does not.
_DECLARATIONS = {
    "_row": "the rule and the hyper-parameters of a group",
    "_check_defaults": "the errors for arguments that are out of range",
    "_why_not_one_pass": "why the settings that need one pass are refused, such as 'for Muon'",
}


class Releases(Protocol):
    """What updates parameters one by one, while gradients come."""

    def finish(self) -> None:
        """The rest of a step."""


ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class FusedOptimizer(ShowsAverages, MovesStates, Saved):
    """Base class. A subclass says, per group and step, which rule runs with which numbers, and what its states are like.

    Everything is read from ``param_groups`` and ``state`` at each step; the engine only caches checks on them. Settings that
    torch does not have sit in ``_own``, which ``__getstate__`` returns and ``state_dict`` does not, or, where they are per
    group, in the group only when they are not the default.
    """

    #: Rules that take sparse gradients: those that torch gives them to.
    _sparse_rules: ClassVar[frozenset[str]] = frozenset()
    #: Group options that torch does not have, with their defaults.
    _group_options: ClassVar[dict[str, Any]] = {
        "state_format": None,
        "weight_format": None,
        **SCALES,
        **parts.OPTIONS,
    }
    #: Required in every subclass, unless it is declared with ``abstract=True``.
    _must_declare: ClassVar[tuple[str, ...]] = ("_row", "_check_defaults")

    _engine: Engine
    #: The optimizer that this one is a part of: it has the states and all of the groups, and steps this one's.
    _owner: weakref.ref[FusedOptimizer] | None = None
    #: False until it is known that nothing else multiplies lr by ``lr_scale``.
    _scaled_once: bool
    #: How many steps have begun, whether this one takes statistics, and whether all of its groups have rules with parts.
    _steps_begun: int = 0
    _measures: bool = False
    #: While single parameters are stepped: what all of their step share.
    _partial: PartOfStep | None = None
    #: What steps parameters as soon as they have their gradients, and finishes the step.
    _releases: Releases | None = None
    _all_have_parts: bool = False
    #: How many groups are before this one's where it only checks and completes some.
    _groups_before: int = 0

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in () if abstract else cls._must_declare:
            if getattr(cls, name, None) in (None, getattr(FusedOptimizer, name, None)):
                raise TypeError(f"{cls.__name__} must declare {name}: {_DECLARATIONS[name]}")
        if unknown := cls._sparse_rules - reference.RULES.keys():
            raise TypeError(f"{cls.__name__}._sparse_rules must be rules of precond.reference, got {sorted(unknown)}")
        if missing := FusedOptimizer._group_options.keys() - cls._group_options.keys():
            raise TypeError(f"{cls.__name__}._group_options must have {', '.join(sorted(missing))}")

    def __init__(self, params: ParamsT, defaults: dict[str, Any], *, settings: Settings) -> None:
        # Options of groups that all classes have come along with the settings.
        defaults.update({name: value for name, value in settings.items() if name in parts.OPTIONS})
        self._own = own_settings(type(self).__name__, settings)
        self._own["backend"] = _backend.check(self._own["backend"])
        self._join_sharder()
        self._check_defaults(defaults)
        check_defaults(defaults, self._own["backend"])
        for name, default in self._group_options.items():
            if name in defaults and defaults[name] == default:
                del defaults[name]
        # Not super(): a drop-in is also an instance of torch's class, whose constructor would do all of this again.
        torch.optim.Optimizer.__init__(self, params, defaults)
        self._rebuild()

    def _join_sharder(self) -> None:
        """Where another optimizer shards whole parameters and makes this one for its share, add norms up over its processes."""
        if self._own["max_grad_norm"] is None and self._own["norm_process_group"] is None:
            return
        owner = sharder_among_callers()
        if owner is None:
            return
        if self._own["norm_process_group"] is None:
            self._own["norm_process_group"] = group_of_sharder(owner)
        # It takes all of our arguments for options of its groups; a process group among them would fail each save.
        for options in (owner.defaults, *owner.param_groups):
            for name in DEFAULTS:
                options.pop(name, None)

    # What a subclass declares.

    def _row(self, group: dict[str, Any]) -> Row:
        """The rule and the hyper-parameters of a group in this step."""
        raise NotImplementedError

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        """Raise torch's errors for arguments that are out of range."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise if an option that torch does not have is out of range."""
        check_options(group, self._group_options, type(self))
        parts.check(group, type(self))

    @classmethod
    def _options_of(cls, group: dict[str, Any]) -> Mapping[str, Any]:
        """The options of a group that torch does not have, with their defaults."""
        return cls._group_options

    @classmethod
    def _initial(cls, p: Tensor, group: dict[str, Any]) -> complex:
        """What a new state is filled with."""
        return 0.0

    @classmethod
    def _format_of_state(cls, name: str, group: dict[str, Any]) -> StateFormat:
        """What a group asks for a state to be stored in."""
        asked: StateFormat = group.get("state_format")
        return asked

    @classmethod
    def _format_of(cls, name: str, group: dict[str, Any]) -> StateFormat:
        """The same for every state, also those of parts."""
        if name == formats.EMA:
            asked: StateFormat = group.get("ema_format")
            return asked
        return cls._format_of_state(name, group)

    @classmethod
    def _numbers(cls, group: dict[str, Any]) -> dict[str, int]:
        """Numbers that stand among a parameter's states, as they are before the first step."""
        return {}

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        """P P^T of a parameter; None where no step has made it yet."""
        return Metric(why_not="it does not say what it multiplies a gradient with")

    # What a subclass declares it with.

    def _decayed(self, rule: str, group: dict[str, Any], suffix: str = "") -> str:
        """The name of a rule with the intrinsic decay that a group asks for."""
        if l1_decay_of(group) == 0.0:
            return rule + suffix
        return rule + ("_l1" if group.get("l1_form", "proximal") == "proximal" else "_l1_subgradient") + suffix

    def _hyper(self, group: dict[str, Any], *names: str) -> dict[str, float | Tensor]:
        """The hyper-parameters that every rule has, and those of ``names``, as the rules take them: lr and decays are scaled."""
        hyper = {name: number(group[name]) for name in ("lr", "weight_decay", *names)}
        hyper |= {"l1_decay": float(group.get("l1_decay", 0.0)), "l1_cap": float(group.get("l1_cap", 10.0))}
        scale(hyper, group)
        return hyper

    def _steps(self, p: Tensor) -> float:
        """How many steps a parameter has taken."""
        return float(self.state[p].get("step", 0)) if p in self.state else 0.0

    def _decoded(self, p: Tensor, group: dict[str, Any], name: str) -> Tensor:
        """A state that a parameter has: itself, or decoded where it consists of codes."""
        return self.states.decoded(p, group, self._row(group).rule, name)

    # The step.

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step; with a closure, evaluate it first and return its value."""
        self._check_may_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            if self._releases is None:
                self._update_at_stated_precision()
            else:
                self._releases.finish()
        return loss

    def _check_may_step(self) -> None:
        """Raise where no step may be taken now, before a closure is evaluated. A compiler traces it: what reads groups must be
        hidden from it, or a new lr compiles the step again.
        """
        self._check_shows_weights("step() must not be called")

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @at_stated_precision
    def _update_at_stated_precision(self) -> None:
        self._begin_step()
        try:
            self._update()
        finally:
            self._join()  # also of what an error has left half enqueued
        self._forget_strangers()

    def _begin_step(self) -> None:
        """What is decided once for a step of all parameters."""
        if not self._scaled_once:
            self._scaled_once = warned_if_scaled(self.param_groups)
        every = self._own["statistics"]
        self._measures = bool(every) and self._steps_begun % every == 0
        self._all_have_parts = self._measures or any(map(parts.is_scaled, self.param_groups))
        self._steps_begun += 1

    def _forget_strangers(self) -> None:
        """Drop what is kept about parameters that this optimizer no longer has."""
        self._whole()._states.keep(self.param_groups)
        self._keep_on_host()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _update(self) -> None:
        self._step_in_one_pass(self.param_groups)

    def _step_in_one_pass(self, groups: list[dict[str, Any]]) -> None:
        """The step of some or all groups."""
        part = self._partial or PartOfStep(
            control_of(getattr(self, "found_inf", None), getattr(self, "grad_scale", None), self._own)
        )
        if part.control is None:
            self.skipped_steps.add_(1)
            return
        rows = [self._checked_row(group) for group in groups]
        scaled = parts.scaled(groups)
        self._engine.run(
            Step(groups, self.state, {}, rows, part.control, part.clip, None, self._measures, scaled, part.into),
            partial=self._partial is not None,
        )

    def _checked_row(self, group: dict[str, Any]) -> Row:
        self._check_group(group)  # a scheduler or a checkpoint may have changed it
        if "capturable" in self.defaults:  # other classes ignore it, as torch's do
            check_capturable(group, fused=bool("fused" in self.defaults and group.get("fused")))
        row = parts.with_parts(self._row(group), group, self._whole()._all_have_parts and self._has_one_pass(group))
        check_numbers(row, group)
        return row

    def _has_one_pass(self, group: dict[str, Any]) -> bool:
        """True for a group that the engine steps."""
        return True

    def why_not_alone(self, group: dict[str, Any]) -> str:
        """Why a parameter of a group cannot be stepped before the others have gradients; empty if it can."""
        return ""

    def _whole(self) -> FusedOptimizer:
        """The optimizer that this one is a part of; itself where it stands alone."""
        owner = None if self._owner is None else self._owner()
        return self if owner is None else owner

    # What others ask.

    @property
    def engine(self) -> Engine:
        """What runs the steps: plans, report and settings."""
        return self._engine

    @property
    def states(self) -> ParamStates:
        """What makes, reads and converts the states of parameters; ``state`` has them. Waits for the host's part of steps."""
        if (owner := self._whole()) is not self:
            return owner.states
        self.wait()
        self._states.bind(self.state, self.param_groups)
        return self._states

    def part_of(self, group: dict[str, Any]) -> FusedOptimizer:
        """The optimizer whose class says how a group is stepped."""
        return self

    def metric_of(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        """P P^T of a parameter, by which a step multiplies its gradient; None where no step has made it yet."""
        return self._metric(p, group)

    def rule_of(self, group: dict[str, Any]) -> str:
        """The name of the rule that a group's options ask for."""
        return self._row(group).rule

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's gradients: float32, on the device of the parameters. None before the first step and
        without ``max_grad_norm``. The next step writes the same tensor.
        """
        return self._engine.report.grad_norm

    @property
    def clip_coef(self) -> Tensor | None:
        """What the last step multiplied its gradients with to clip them, at most 1; as ``grad_norm``."""
        return self._engine.report.clip_coef

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps changed nothing, because of a loss scaler or ``nonfinite="skip"``: int64, on the device of the
        parameters. A copy counts from 0.
        """
        return self._engine.report.skipped_steps(self.param_groups)

    @property
    def statistics(self) -> Statistics | None:
        """What the last step that took statistics found out about each parameter; :class:`precond.Statistics`. None before it and
        without the setting ``statistics``. A step that is skipped takes none.
        """
        report = self._engine.report
        return None if report.sums is None else made_of(report.sums, report.labels)

    @property
    def norm_process_group(self) -> Any:
        """The process group that the norms of flat shards are added up over; :class:`precond.Settings`."""
        return self._own["norm_process_group"]

    @norm_process_group.setter
    def norm_process_group(self, group: Any) -> None:
        self._own["norm_process_group"] = group
        self._engine.forget_plans()

    # Being a torch optimizer: groups, pickling, checkpoints.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; options that torch does not have are checked here."""
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        drop_settings(group, self.defaults)
        for name, default in self._options_of(group).items():
            if name in group and group[name] == default and name not in KEPT:
                del group[name]  # as in torch's groups, or a flat checkpoint does not go both ways
        remember_lr(group)
        self._scaled_once = False

    def _rebuild(self) -> None:
        """Everything private that follows from the public state."""
        self._scaled_once = False
        before: Engine | None = self.__dict__.get("_engine")
        written = self.__dict__.pop("_written", None)
        if before is not None:
            self.wait()
        if written is None and "_states" in self.__dict__:
            written = self._states.written(self._all_params())
        self._states = ParamStates(self._recipe(), self._own["seed"], written or ())
        self._engine = Engine(
            self._states,
            Checks(type(self), self._sparse_rules, self._own),
            None if before is None else before.report,
            None if before is None else before.captured,
            may_only_make_states=True,
        )
        self._take_over_moves(written or ())
        # GradScaler then leaves unscaling and skipping to the step. Only on request: Lightning refuses to clip otherwise.
        if self._is_fused():
            self._step_supports_amp_scaling = True

    def _recipe(self) -> Recipe:
        """It must not keep this optimizer alive."""
        return Recipe(self._initial, self._format_of, self._numbers, self._options_of)

    def _is_fused(self) -> bool:
        """True where ``fused=True`` was asked for, of the whole optimizer."""
        return bool(self.defaults.get("fused"))
