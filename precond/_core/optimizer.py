"""What every optimizer of precond shares: being a ``torch.optim.Optimizer`` whose step is one fused pass."""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import _get_capturable_supported_devices

from .. import reference
from . import backend as _backend
from . import formats as _formats
from .arguments import STATE_FORMATS, check_nonnegative, number
from .clipping import Report, home
from .metric import Metric
from .plan import Control, Row, StepPlan, counter_dtype, is_counter
from .settings import DEFAULTS, LOST, Settings, own_settings
from .sharding import aligned_gradients, local

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_PLANS_KEPT = 64


def _versions_of(p: Tensor) -> tuple[int, int]:
    return p._version, local(p)._version


class PrecisionWarning(UserWarning):
    """A setting is legal but loses more precision than its user may expect."""


class FusedOptimizer(torch.optim.Optimizer):
    """Base class. A subclass names its states and says, per group and step, which rule runs with which numbers.

    Everything is read from ``param_groups`` and ``state`` at each step; ``_plans`` only caches checks on them. Settings
    that torch does not have sit in ``_own``, which ``__getstate__`` returns and ``state_dict`` does not, or, where they
    are per group, in the group only when they are not the default.
    """

    #: The state that holds a mean or a sum of squares: the one that a short format harms.
    _second_moment: ClassVar[str | None] = None
    #: Rules that take sparse gradients: those that torch gives them to.
    _sparse_rules: ClassVar[frozenset[str]] = frozenset()
    #: True where torch keeps a ``step`` per parameter.
    _counts_steps: ClassVar[bool] = False
    #: Group options that torch does not have, with their defaults.
    _group_options: ClassVar[dict[str, Any]] = {"state_format": None, "weight_format": None}

    _own: dict[str, Any]
    _plans: dict[tuple[int, ...], StepPlan]
    _warned: bool
    #: What each parameter's stream of random bits is named by: its name, or its position among the parameters.
    _stream_names: dict[Tensor, str]
    #: Version counters of split weights after the last step: one that moved since was written by somebody else.
    _versions: dict[Tensor, tuple[int, int]]
    #: What a parameter is updated with where that is not its ``.grad``: a method that rotates gradients fills it for a step.
    _inputs: dict[Tensor, Tensor]
    _report: Report | None
    #: Compiled plans that graphs were captured from. A replay needs their memory, also when there is a newer plan.
    _captured: list[Any]

    def __init__(self, params: ParamsT, defaults: dict[str, Any], *, settings: Settings) -> None:
        self._own = own_settings(type(self).__name__, settings)
        self._check_defaults(defaults)
        if defaults.get("fused") and defaults["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        if defaults.get("fused") and defaults["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if defaults["differentiable"] and self._own["backend"] not in (None, "reference"):
            raise RuntimeError(f"differentiable=True needs backend=None or 'reference', got {self._own['backend']!r}")
        for name, default in self._group_options.items():
            if name in defaults and defaults[name] == default:
                del defaults[name]
        # Not super(): a drop-in is also an instance of torch's class, whose constructor would do all of this again.
        torch.optim.Optimizer.__init__(self, params, defaults)
        self._rebuild()

    def _row(self, group: dict[str, Any]) -> Row:
        """The rule and the hyper-parameters of a group in this step."""
        raise NotImplementedError

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        """Raise torch's errors for arguments that are out of range."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise if an option that torch does not have is out of range."""
        state_format = group.get("state_format")
        if state_format is not None and state_format not in STATE_FORMATS:
            raise ValueError(
                "state_format must be None, 'fp32', 'bf16', 'fp16', 'int8' or its torch dtype, or 'int4', "
                f"got {state_format!r}"
            )
        weight_format = group.get("weight_format")
        if weight_format not in (None, *_formats.WEIGHT_FORMATS):
            raise ValueError(
                f"weight_format must be None or one of {', '.join(_formats.WEIGHT_FORMATS)}, got {weight_format!r}"
            )
        if "l1_decay" in self._group_options:
            check_nonnegative("l1_decay value", "l1_decay", group.get("l1_decay", 0.0))
            if group.get("l1_form", "proximal") not in ("proximal", "subgradient"):
                raise ValueError(f"l1_form must be 'proximal' or 'subgradient', got {group['l1_form']!r}")
        elif group.get("l1_decay", 0.0) != 0.0:
            raise ValueError(f"{type(self).__name__} must have no l1_decay in a group, got {group['l1_decay']}")
        if not group.get("l1_cap", 10.0) > 0.0:
            raise ValueError(f"l1_cap must be > 0, got {group['l1_cap']}")

    def _decayed(self, rule: str, group: dict[str, Any], suffix: str = "") -> str:
        """The name of a rule with the intrinsic decay that a group asks for."""
        if float(group.get("l1_decay", 0.0)) == 0.0:
            return rule + suffix
        return rule + ("_l1" if group.get("l1_form", "proximal") == "proximal" else "_l1_subgradient") + suffix

    def _hyper(self, group: dict[str, Any], *names: str) -> dict[str, float | Tensor]:
        """The hyper-parameters that every rule has, and those of ``names``, as the rules take them."""
        hyper = {name: number(group[name]) for name in ("lr", "weight_decay", *names)}
        return hyper | {"l1_decay": float(group.get("l1_decay", 0.0)), "l1_cap": float(group.get("l1_cap", 10.0))}

    # The step.

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step; with a closure, evaluate it first and return its value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._update()
        return loss

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _update(self) -> None:
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        # Only CUDA and Triton read a scaler's tensors on their device. For the others both are numbers, and a step to skip
        # is skipped here, before it makes a state.
        by_device = any(
            self._own["backend"] in (None, name) and not _backend.why_not(name) for name in ("cuda", "triton")
        )
        if found_inf is not None and not (by_device and _backend.on_device(found_inf)):
            if found_inf.item():
                self._count_skip()
                return
            found_inf = None
        grad_coef = 1.0
        if grad_scale is not None and not (by_device and _backend.on_device(grad_scale)):
            grad_coef, grad_scale = 1.0 / float(grad_scale), None
        clip_value = self._own["clip_grad_value"]
        control = Control(grad_coef, grad_scale, found_inf, math.inf if clip_value is None else clip_value)

        self._run_rows([self._checked_row(group) for group in self.param_groups], control)

    def _run_rows(self, rows: list[Row], control: Control) -> None:
        """Run each group's rule on its parameters, by the plan for these groups or a new one."""
        # DeepSpeed steps once per group with param_groups cut to it: one plan for each view of the groups.
        key = tuple(map(id, self.param_groups))
        plan = self._plans.get(key)
        if plan is not None and not plan.has_wrappers and plan.run(self, rows, control):
            return
        # Only wrapped parameters can have a gradient that is placed otherwise, and a plan knows whether it has any.
        given = self._inputs
        self._inputs = {**aligned_gradients(self.param_groups), **given}
        try:
            if plan is None or not plan.has_wrappers or not plan.run(self, rows, control):
                self._keep(key, self._new_plan_run(rows, control))
        finally:
            self._inputs = given

    def _new_plan_run(self, rows: list[Row], control: Control) -> StepPlan:
        plan = StepPlan(self, rows)
        if self._asks_for_states_only(plan, rows):
            plan.new = False
            return plan
        if not plan.run(self, rows, control):
            raise RuntimeError("a gradient or state changed while the step was prepared")
        return plan

    def _asks_for_states_only(self, plan: StepPlan, rows: list[Row]) -> bool:
        """True for a first step at lr 0 on gradients of zeros, which is how torch.distributed.checkpoint has states made. A
        step counted there spoils the bias corrections of all that follow (pytorch#164929).
        """
        if not plan.fresh or any(_backend.on_device(row.hyper["lr"]) or row.hyper["lr"] != 0.0 for row in rows):
            return False
        given = {p: self._input_of(p) for group in self.param_groups for p in group["params"]}
        gradients = {p: g for p, g in given.items() if g is not None}
        return plan.fresh == gradients.keys() and not any(local(g).any() for g in gradients.values())

    def _keep(self, key: tuple[int, ...], plan: StepPlan) -> None:
        """Keep a plan for the next step. Without a compiled part the checks are all there is, and nothing is worth keeping."""
        self._plans.pop(key, None)
        while len(self._plans) >= _PLANS_KEPT:
            del self._plans[next(iter(self._plans))]
        if plan.compiled:
            self._plans[key] = plan

    def _checked_row(self, group: dict[str, Any]) -> Row:
        self._check_group(group)  # a scheduler or a checkpoint may have changed it
        if group.get("capturable") and not _backend.cuda_on_host():
            devices = _get_capturable_supported_devices()
            if any(p.grad is not None and p.device.type not in devices for p in group["params"]):
                raise AssertionError(
                    f"If capturable=True, params and state_steps must be on supported devices: {devices}."
                )
        row = self._row(group)
        for name, value in row.hyper.items():
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{name} must be a number, got nan")
        return row

    def _input_of(self, p: Tensor) -> Tensor | None:
        return self._inputs.get(p, p.grad) if self._inputs else p.grad

    def _given(self, device: torch.device) -> list[Tensor]:
        """What the parameters on a device are updated with in this step."""
        given = (self._input_of(p) for group in self.param_groups for p in group["params"])
        return [local(g) for g in given if g is not None and g.device == device and g.layout == torch.strided]

    # States: a rule has names for its own.

    def _names(self, rule: str) -> tuple[str, ...]:
        return reference.RULES[rule].states

    def _states(self, p: Tensor, rule: str) -> dict[str, Tensor]:
        """The states that a rule updates and that exist, in the rule's order."""
        state = self.state[p] if p in self.state else {}
        return {name: state[name] for name in self._names(rule) if state.get(name) is not None}

    def _missing_states(self, p: Tensor, rule: str) -> bool:
        if self._counts(p) and "step" not in (self.state[p] if p in self.state else {}):
            return True
        return len(self._states(p, rule)) < len(self._names(rule))

    def _counts(self, p: Tensor) -> bool:
        """True where a parameter has a step counter: as in torch, and where random bits depend on the step."""
        return self._counts_steps or (p in self.state and "key" in self.state[p])

    def _layout(self, p: Tensor, group: dict[str, Any], rule: str) -> _formats.Layout:
        """The formats of a parameter and of its states as they are."""
        return _formats.layout_of(p, group, self.state[p] if p in self.state else {}, self._names(rule))

    def _init_state(self, p: Tensor, group: dict[str, Any], rule: str) -> bool:
        """Make what is missing of the state. True if none of the rule's states was there."""
        names = self._names(rule)
        weight_format = group.get("weight_format") if _formats.is_half(p) else None
        if not names and not self._counts_steps and weight_format is None:
            return False
        state = self.state[p]
        fresh = not self._states(p, rule)
        if self._counts_steps:  # before the states, as in torch
            self._make_counter(p, group)
        for name in names:
            if state.get(name) is None:
                state.update(self._new_state(p, name, group))
        if weight_format in ("split24", "split32"):
            if not _formats.has_remainder(state, weight_format, p):
                state["remainder"] = _formats.new_remainder(p, weight_format)
        else:
            state.pop("remainder", None)  # a parameter that is updated without it is not what it belongs to
        if self._layout(p, group, rule).draws and not isinstance(state.get("key"), int):
            state["key"] = self._key(p)
        if self._counts(p):
            self._make_counter(p, group)
        return fresh

    def _make_counter(self, p: Tensor, group: dict[str, Any]) -> None:
        step = self.state[p].get("step", 0.0)
        device = p.device if p.device.type != "cpu" and self._step_on_device(group, "cuda") else torch.device("cpu")
        if is_counter(step, p, device):
            return
        if isinstance(step, Tensor):
            self.state[p]["step"] = step.detach().to(device, counter_dtype(p), copy=True).reshape(())
        else:
            # torch.tensor() would wait for a device, once per parameter; on the host a fake one knows its value.
            make = torch.tensor if device.type == "cpu" else functools.partial(torch.full, ())
            self.state[p]["step"] = make(float(step), dtype=counter_dtype(p), device=device)

    def _new_state(self, p: Tensor, name: str, group: dict[str, Any]) -> dict[str, Tensor]:
        """A state with its initial value, and what lies beside it."""
        initial = self._initial(p, group)
        # A complex state has its parameter's dtype: a pair of other floats is no dtype of torch.
        state_format = None if p.is_complex() else self._format_of_state(name, group)
        dtype = p.dtype if state_format is None else STATE_FORMATS[state_format]
        if isinstance(dtype, str):
            if _formats.takes_codes(p):
                made = _formats.new_codes(p, name, dtype)
                if initial != 0.0:
                    values = torch.full(local(p).shape, initial, device=p.device, dtype=torch.float32)
                    _formats.fill(made, name, values, _formats.code_format(name, dtype))
                return made
            dtype = torch.float32
        self._warn_precision(name, dtype, group)
        full = torch.full_like(p, initial, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
        return {name: full}

    def _format_of_state(self, name: str, group: dict[str, Any]) -> Any:
        """What a group asks for a state to be stored in."""
        return group.get("state_format")

    def _values(self, p: Tensor, group: dict[str, Any], name: str) -> Tensor:
        """What a state stands for, as plain numbers of the local tensor."""
        state, rule = self.state[p], self._row(group).rule
        if f"{name}_scale" not in state:
            return local(state[name])
        form = self._layout(p, group, rule).states[self._names(rule).index(name)]
        return _formats.values_of(state, name, form, p)

    def _key(self, p: Tensor) -> int:
        """What names the stream of a parameter's random bits: from the seed and its name, or its position."""
        if p not in self._stream_names:
            position = 0
            for group in self.param_groups:
                for i, q in enumerate(group["params"]):
                    self._stream_names[q] = group["param_names"][i] if "param_names" in group else str(position)
                    position += 1
        named = f"{self._own['seed']}:{self._stream_names[p]}"
        return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=8).digest(), "little") >> 1

    def _drop_stale_remainders(self, split: Iterable[Tensor]) -> None:
        """Forget what a split weight lacked of its master where somebody else has written the weight since."""
        for p in split:
            if p in self._versions and self._versions[p] != _versions_of(p):
                local(self.state[p]["remainder"]).zero_()

    def _note_versions(self, split: Iterable[Tensor]) -> None:
        self._versions.update((p, _versions_of(p)) for p in split)

    def _step_on_device(self, group: dict[str, Any], backend: str) -> bool:
        """Where torch keeps a parameter's step counter: beside it if capturable or fused, else on the host."""
        return backend in ("cuda", "triton") and bool(group.get("capturable") or group.get("fused"))

    def _initial(self, p: Tensor, group: dict[str, Any]) -> complex:
        """What a new state is filled with."""
        return 0.0

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        """P P^T of a parameter; None where no step has made it yet."""
        return Metric(why_not="it does not say what it multiplies a gradient with")

    def _smoothing(self, group: dict[str, Any]) -> float | Tensor:
        """How much of the second moment a step keeps."""
        raise NotImplementedError

    def _warn_precision(self, name: str, dtype: torch.dtype, group: dict[str, Any]) -> None:
        """Warn once where a new state's dtype cannot hold what the rule needs."""
        if name != self._second_moment or self._warned:
            return
        nearest = group.get("state_format") is None
        if dtype == torch.bfloat16 and nearest and self._smoothing(group) > 0.995:
            what = f"stands still: rounding to nearest loses what a step adds or removes at {self._smoothing(group)} > 0.995"
        elif dtype == torch.float16:
            what = "is 0 for gradients below about 1e-3, and the step is then divided by eps alone"
        else:
            return
        self._warned = True
        warnings.warn(
            f"a {dtype} {name} {what}; state_format='fp32' keeps the states in float32", PrecisionWarning, stacklevel=2
        )

    def _backend_of(self, name: str, p: Tensor, row: Row) -> str:
        """Check a parameter, its gradient and its states; choose the backend that updates them."""
        g = self._input_of(p)
        assert g is not None
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(f"{name} must be floating point or complex, got {p.dtype}")
        if p.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{name} must not be an inference tensor outside of inference mode")
        sparse = g.layout == torch.sparse_coo and row.rule in self._sparse_rules
        if sparse and row.hyper["weight_decay"] != 0.0:
            raise RuntimeError(
                f"weight_decay option is not compatible with sparse gradients, got {row.hyper['weight_decay']} for {name}"
            )
        for what, t in ((name, p),) if sparse else ((name, p), (f"the gradient of {name}", g)):
            if t.layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
                advice = ", please consider SparseAdam instead" if isinstance(self, torch.optim.Adam) else ""
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients{advice} ({what} has layout {t.layout})"
                )
            if t.layout != torch.strided:
                raise RuntimeError(f"{what} must have layout torch.strided, got {t.layout}")
        if g.device != p.device:
            raise RuntimeError(f"{name} must have its gradient on {p.device}, got {g.device}")
        if g.is_complex() != p.is_complex():
            raise RuntimeError(f"{name} of {p.dtype} must have a gradient of the same kind, got {g.dtype}")
        if g.shape != p.shape:
            raise RuntimeError(f"{name} must have a gradient of shape {tuple(p.shape)}, got {tuple(g.shape)}")
        states = self._states(p, row.rule)
        coded = {key for key in states if f"{key}_scale" in self.state[p]}
        for key, state in states.items():
            if (state.shape != p.shape and key not in coded) or state.device != p.device:
                raise RuntimeError(
                    f"{key} of {name} must have shape {tuple(p.shape)} on {p.device}, "
                    f"got {tuple(state.shape)} on {state.device}"
                )
        if sparse or self.defaults["differentiable"]:
            return "reference"
        valued = [local(state) for key, state in states.items() if key not in coded]
        return _backend.choose(self._own["backend"], [local(p), local(g), *valued])

    # What the last step found.

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's gradients: float32, on the device of the parameters. None before the first step and
        without ``max_grad_norm``. The next step writes the same tensor.
        """
        return None if self._report is None or not self._report.measured else self._report.grad_norm

    @property
    def clip_coef(self) -> Tensor | None:
        """What the last step multiplied its gradients with to clip them, at most 1; as ``grad_norm``."""
        return None if self._report is None or not self._report.measured else self._report.clip_coef

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps changed nothing, because of a loss scaler or ``nonfinite="skip"``: int64, on the device of the
        parameters. A copy counts from 0.
        """
        if self._report is None:
            self._report = Report(home(self))
        return self._report.skipped

    @property
    def norm_process_group(self) -> Any:
        """The process group that the norms of flat shards are added up over; :class:`precond.Settings`."""
        return self._own["norm_process_group"]

    @norm_process_group.setter
    def norm_process_group(self, group: Any) -> None:
        self._own["norm_process_group"] = group
        self._plans = {}

    def _keep_captured(self, plan: Any) -> None:
        """Keep a compiled plan that has just run, if a graph was captured from it."""
        if plan.was_captured and not any(plan is kept for kept in self._captured):
            self._captured.append(plan)

    def _count_skip(self) -> None:
        skipped = self.skipped_steps
        skipped += 1

    # Being a torch optimizer: groups, pickling, checkpoints.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; options that torch does not have are checked here."""
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep: torch's three dictionaries and our own settings."""
        lost = {} if self._own["norm_process_group"] is None else {"norm_process_group": LOST}
        return {**super().__getstate__(), "_own": self._own | lost}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled optimizer, or the groups and states of a checkpoint."""
        super().__setstate__(state)
        self._own = {**DEFAULTS, **self.__dict__.get("_own", {})}
        for group in self.param_groups:
            group.setdefault("foreach", None)
            if "fused" not in self._group_options:
                group.setdefault("fused", None)
            for name in ("maximize", "differentiable"):
                group.setdefault(name, False)
        self._rebuild()

    def _rebuild(self) -> None:
        """Everything private that follows from the public state."""
        self._plans = {}
        self._inputs = {}
        self._stream_names = {}
        self._versions = {}
        self._warned = False
        self._report = self.__dict__.get("_report")
        self._captured = self.__dict__.get("_captured", [])
        # GradScaler then leaves unscaling and skipping to the step. Only on request: Lightning refuses to clip otherwise.
        if self.defaults.get("fused"):
            self._step_supports_amp_scaling = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch's.

        Unlike torch, states keep the dtype they were saved in, and a tensor ``lr`` of this optimizer stays the same
        tensor and takes the loaded value. Options that torch does not have keep this optimizer's values where the
        checkpoint has none.
        """
        own_options = [{k: g[k] for k in self._group_options if k in g} for g in self.param_groups]
        tensor_options = [
            {k: v for k, v in g.items() if isinstance(v, Tensor) and v.numel() == 1} for g in self.param_groups
        ]
        # What torch loads is what the user's hooks made of the dictionary; ours sees it last, and mends before theirs.
        final: dict[str, Any] = {}
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, loaded: final.update(loaded)),
            self.register_load_state_dict_post_hook(lambda _: self._restore_states(final), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        for group, before in zip(self.param_groups, tensor_options, strict=True):
            for name, tensor in before.items():
                if name in group:
                    tensor.data.fill_(float(group[name]))
                    group[name] = tensor
        for index, (group, own) in enumerate(zip(self.param_groups, own_options, strict=True)):
            group.update({name: value for name, value in own.items() if name not in group})
            self._convert_states(group, index)
        self._rebuild()

    def _convert_states(self, group: dict[str, Any], index: int) -> None:
        """Bring states that exist, loaded or made under another option, into the format that a group asks for by name."""
        if group.get("state_format") is None:
            return
        rule = self._row(group).rule
        for position, p in enumerate(group["params"]):
            if p not in self.state or p.is_complex():
                continue
            state = self.state[p]
            forms = self._layout(p, group, rule).states
            for name, form in zip(self._states(p, rule), forms, strict=True):
                wanted = STATE_FORMATS[self._format_of_state(name, group)]
                coded = isinstance(wanted, str) and _formats.takes_codes(p)
                dtype = torch.float32 if isinstance(wanted, str) else wanted
                if coded and form == _formats.code_format(name, str(wanted)):
                    continue
                alone = f"{name}_scale" not in state
                # Of another shape: the step says so.
                if alone and (state[name].shape != p.shape or (not coded and state[name].dtype == dtype)):
                    continue
                layout = _formats.Layout("fp32", (form,), (0, 0, 0))
                _formats.check(f"parameter {position} of group {index}", p, state, (name,), layout)
                values = _formats.values_of(state, name, form, p)
                state.pop(f"{name}_scale", None)
                if coded:
                    state.update(_formats.new_codes(p, name, str(wanted)))
                    _formats.fill(state, name, values, _formats.code_format(name, str(wanted)))
                else:
                    state[name] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
                    local(state[name]).copy_(values)

    def _restore_states(self, loaded: dict[str, Any]) -> None:
        """Give loaded states the dtype they were saved in and memory of their own; torch casts and aliases them."""
        saved_ids = [i for g in loaded["param_groups"] for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for saved_id, p in zip(saved_ids, params, strict=True):
            for name, saved in loaded["state"].get(saved_id, {}).items():
                if isinstance(saved, Tensor) and name == "step":
                    self.state[p][name] = self.state[p][name].clone()
                elif isinstance(saved, Tensor):
                    self.state[p][name] = saved.detach().to(p.device, copy=True)
