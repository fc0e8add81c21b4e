"""Schedule-free AdamW and SGD."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core import backend as _backend
from ._core.arguments import arguments, check_betas, check_lr, check_nonnegative, number
from ._core.formats import StateFormat, is_coded
from ._core.metric import Metric
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.rows import Row, name_of
from ._core.scales import lr_of
from ._core.settings import Settings
from ._core.sharding import local
from ._core.swapped import Swapped


class _ScheduleFree(FusedOptimizer, abstract=True):
    """What both share: the parameters are y in training, where gradients are taken, and x in evaluation."""

    #: In a group: whether its parameters are y, and the largest lr so far.
    _modes: ClassVar[dict[str, Any]] = {"train_mode": True, "lr_max": 0.0}
    _swapped: Swapped

    def _rebuild(self) -> None:
        super()._rebuild()
        self._swapped = Swapped("y")

    @classmethod
    def _format_of_state(cls, name: str, group: dict[str, Any]) -> StateFormat:
        asked = super()._format_of_state(name, group)
        # z is a weight: codes of 8 bits are coarser than many steps.
        return "fp32" if name == "z" and is_coded(asked) else asked

    @classmethod
    def _beta1(cls, group: dict[str, Any]) -> Any:
        """beta of y = (1 - beta) z + beta x, as the group has it."""
        raise NotImplementedError

    def _check_schedule(self, defaults: dict[str, Any]) -> None:
        check_lr(defaults["lr"])
        for name in ("weight_decay", "warmup_steps", "r", "weight_lr_power"):
            check_nonnegative(f"{name} value", name, defaults[name])
            if not math.isfinite(defaults[name]):
                raise ValueError(f"{name} must be finite, got {defaults[name]}")

    def _row_of(self, rule: str, group: dict[str, Any], *names: str) -> Row:
        hyper = self._hyper(group, "warmup_steps", "r", "weight_lr_power", *names)
        hyper |= {"beta1": number(self._beta1(group)), "lr_max": _largest(group)}
        return Row(rule, -1.0 if group["maximize"] else 1.0, hyper)

    def _checked_row(self, group: dict[str, Any]) -> Row:
        self._check_mode(group)  # Grouped asks here alone
        beta1 = self._beta1(group)
        if not _backend.on_device(beta1) and not 0.0 < float(beta1) < 1.0:
            raise ValueError(f"beta1 or momentum must be in (0, 1), where y and z give x, got {beta1}")
        group["lr_max"] = _largest(group)
        return super()._checked_row(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, in the mode that the others are in."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["train_mode"] = self.param_groups[0]["train_mode"]
        group["lr_max"] = self._modes["lr_max"] if group["lr_max"] is None else group["lr_max"]

    def _check_group(self, group: dict[str, Any]) -> None:
        for name, default in {"cautious": None, "max_update_rms": None, "ema_decay": None, "decoupled": "lr"}.items():
            if group.get(name, default) != default:
                raise ValueError(f"{name} must be {default!r} for {type(self).__name__}, got {group[name]!r}")
        super()._check_group(group)

    @classmethod
    def _options_of(cls, group: dict[str, Any]) -> Mapping[str, Any]:
        """Without those of a decay that follows lr / lr_max: the key lr_max has the package's meaning here."""
        options = super()._options_of(group)
        return {name: value for name, value in options.items() if name not in ("decoupled", "lr_max", "added_lr")}

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _check_may_step(self) -> None:
        super()._check_may_step()
        in_eval = [group for group in self.param_groups if not group["train_mode"]]
        if in_eval and not self._asked_for_states_only():
            self._check_mode(in_eval[0])

    def _check_mode(self, group: dict[str, Any]) -> None:
        """Raise for a step in eval mode."""
        if not group["train_mode"]:
            raise RuntimeError(
                f"{type(self).__name__} must be in train mode for a step, got eval mode: call train() before training goes on"
            )

    def _update(self) -> None:
        groups = [group for group in self.param_groups if not group["train_mode"]]
        if not groups or not self._asked_for_states_only():
            before = [group["lr_max"] for group in self.param_groups]
            try:
                super()._update()
            except BaseException:  # a step that fails leaves no trace
                for group, lr_max in zip(self.param_groups, before, strict=True):
                    group["lr_max"] = lr_max
                raise
            return
        for group in groups:
            group["train_mode"] = True
        try:
            super()._update()
            # And what a checkpoint of eval mode has besides.
            made = [(p, group) for group in groups for p in group["params"] if "z" in self.state.get(p, ())]
            self._swapped.show(self.states, ((p, group, self.states.master(p, group)) for p, group in made))
        finally:
            for group in groups:
                group["train_mode"] = False

    def _asked_for_states_only(self) -> bool:
        """True for a first step at lr 0 on gradients of zeros, which is how torch.distributed.checkpoint has states made."""
        rates = [group["lr"] for group in self.param_groups]
        if any(self.state.values()) or any(_backend.on_device(lr) or float(lr) != 0.0 for lr in rates):
            return False
        gradients = [p.grad for p in self._all_params() if p.grad is not None]
        return bool(gradients) and not any(g.layout != torch.strided or local(g).any() for g in gradients)

    # The modes.

    def eval(self) -> None:
        """Show the averaged weights x in the parameters, for evaluation and to save a model. Their bits are kept.

        Nothing happens in eval mode, and to parameters that no step has updated yet.
        """
        groups = [group for group in self.param_groups if group["train_mode"]]
        if groups:
            states = self.states
            states.begin(self._all_params())
            self._swapped.show(states, self._moved(groups, lambda beta1: 1.0 - 1.0 / beta1))
            for group in groups:
                group["train_mode"] = False

    def train(self) -> None:
        """Show y, where gradients are taken, in the parameters: the bits that they had before :meth:`eval`.

        A parameter that was written in eval mode, by loading a model say, is taken for a new x, and y is computed from it.
        Nothing happens in train mode.
        """
        groups = [group for group in self.param_groups if not group["train_mode"]]
        if groups:
            states = self.states
            self._check_shapes(groups)
            states.begin(self._all_params())
            kept = {id(p) for p, state in self.state.items() if self._swapped.key in state}
            kept -= {id(p) for p in self._swapped.restore(states)}
            for p, group, y in self._moved(groups, lambda beta1: 1.0 - beta1, kept):
                states.write(p, group, y)
            for group in groups:
                group["train_mode"] = True

    def _check_shapes(self, groups: list[dict[str, Any]]) -> None:
        """Raise for a parameter that has another shape by now, before anything changes."""
        for index, group in enumerate(self.param_groups):
            for position, p in enumerate(group["params"] if any(group is g for g in groups) else ()):
                z = self.state.get(p, {}).get("z")
                if z is not None and z.shape != p.shape:
                    name = name_of(group, index, position)
                    raise RuntimeError(
                        f"{name} must have the shape of its state z, {tuple(z.shape)}, got {tuple(p.shape)}"
                    )

    def _moved(
        self,
        groups: list[dict[str, Any]],
        part: Callable[[float], float],
        but: set[int] = frozenset(),  # type: ignore[assignment]
    ) -> Iterator[tuple[Tensor, dict[str, Any], Tensor]]:
        """Parameters that have a z, moved towards it by a part of the way that depends on beta1."""
        states = self.states
        for group in groups:
            weight = part(float(self._beta1(group)))
            for p in group["params"]:
                state = self.state.get(p)
                if not state or state.get("z") is None or id(p) in but:
                    continue
                started = state.get("step", 0)
                if not _backend.on_device(started) and not started > 0:  # a state that no step has made
                    continue
                with torch.no_grad():  # not around the yield: it would hold for whoever takes the value
                    at = states.master(p, group)
                    z = local(self._decoded(p, group, "z"))
                    moved = at + weight * (z - at)
                    if _backend.on_device(started):
                        moved = torch.where(started > 0, moved, at)
                yield p, group, moved

    # Checkpoints.

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled optimizer, or the groups and states of a checkpoint, of the ``schedulefree`` package too."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self._modes.items():
                group.setdefault(name, value)
            group.setdefault("capturable", False)
            group.pop("scheduled_lr", None)
            steps, weight_sum = group.pop("k", None), group.pop("weight_sum", None)
            for p in group["params"] if steps is not None else ():
                if "z" in self.state.get(p, ()):
                    self.state[p].setdefault("step", torch.tensor(float(steps)))
                    self.state[p].setdefault("weight_sum", torch.tensor(float(weight_sum), dtype=torch.float64))


def _largest(group: dict[str, Any]) -> float | Tensor:
    """The largest lr so far, this step's among them: a number, or a tensor on the device that a tensor lr is on."""
    lr, before = lr_of(group), group["lr_max"]
    if isinstance(lr, Tensor):
        lr = lr.detach().reshape(())
    if not _backend.on_device(lr):
        return max(float(lr), float(before))
    if not isinstance(before, Tensor) or before.device != lr.device:
        return torch.clamp(lr, min=float(before))
    with torch.no_grad():
        return torch.maximum(before, lr, out=before)  # the same tensor, which a graph may have captured


class ScheduleFreeAdamW(_ScheduleFree):
    r"""Schedule-free AdamW: needs no schedule of the learning rate and no last step, in one pass.

    .. math::
        v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \qquad
        d_t = \frac{g_t}{\sqrt{v_t/(1-\beta_2^t)} + \epsilon} + \lambda y_{t-1}, \qquad
        \gamma_t = \gamma \min(1, t / T_{\mathrm{warm}})

        z_t = z_{t-1} - \gamma_t d_t, \qquad x_t = (1-c_t)\, x_{t-1} + c_t z_t, \qquad y_t = (1-\beta_1)\, z_t + \beta_1 x_t,
        \qquad c_t = \frac{w_t}{\sum_{i \le t} w_i}, \quad w_t = t^r \gamma_{\max}^p

    The gradient is taken at y, which the parameters are in training; z takes AdamW's steps without momentum, and x is the
    average of z, the weights to evaluate and to keep. z and x start as the parameters. Call ``eval()`` before evaluation and
    before saving a model, and ``train()`` before training goes on: y then has its old bits again. The Trainer of transformers
    calls both around evaluations, Accelerate passes them on. A new optimizer is in train mode; that of the package
    ``schedulefree`` is in eval mode.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Any shape; float32, bfloat16, float16 and
            complex64 are fused, everything else runs on the reference backend.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 2.5e-3). Take 1 to 10 times the peak of a
            schedule for AdamW.
        betas: of the interpolation y, in (0, 1), and of the second moment, in [0, 1) (default (0.9, 0.999)).
        eps: >= 0, added to the root of the second moment (default 1e-8).
        weight_decay: lambda >= 0, decoupled, of y (default 0).
        warmup_steps: >= 0, steps in which the learning rate rises to lr (default 0).
        r: >= 0, the power of t in the weights of the average (default 0). See ``weight_lr_power``.
        weight_lr_power: p >= 0, the power of the largest learning rate so far in the weights (default 2).
            Both may be fractions.
        foreach: accepted and ignored: a step is always one pass.
        maximize: ascend instead of descend (default False).
        capturable: step counters and sums of weights live on the GPU, so that a CUDA graph can capture the step (default
            False); an error at the step for parameters on the CPU, as in torch.
        differentiable: autograd sees the step, which runs on the reference backend (default False).
        fused: accepted; True lets ``torch.amp.GradScaler`` leave unscaling to the step, and keeps counters on the GPU.
        state_format: of the states: None is the parameter's dtype; "fp32", "bf16", "fp16" or their torch dtypes; "int8" or
            "int4": the second moment in codes with a scale per 64 elements, where rows are a multiple of that, and z, a weight,
            in float32 (docs/formats.md). For 16-bit parameters take "fp32": z loses steps below half of its last bit.
        weight_format: for bfloat16 and float16 parameters: None (default) rounds to nearest; "stochastic" keeps small changes
            on average; "split24" and "split32" keep 8 and 16 bits more of each beside it.
        **settings: ``backend``, ``max_grad_norm`` and others that every optimizer takes: :class:`precond.Settings`.

    Raises:
        ValueError: a hyper-parameter is out of range; ``betas[0]`` is 0, where y is z and x is lost.
        RuntimeError: at the step, in eval mode, for a sparse gradient, a wrong shape or device, or overlapping memory.

    Warns:
        PrecisionWarning: once, for a bfloat16 second moment with betas[1] > 0.995, which rounds to nearest and cannot decay,
            and for a float16 one, which underflows.

    State: ``step``, ``weight_sum``, ``z``, ``exp_avg_sq``; in eval mode also ``y``, the bits of the parameter in training.

    Source: Defazio et al. 2024, The Road Less Scheduled, arXiv 2405.15682, and the package ``schedulefree``.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.ScheduleFreeAdamW([w], lr=0.1)
        >>> for _ in range(2):
        ...     opt.zero_grad()
        ...     (w**2).sum().backward()
        ...     opt.step()
        >>> [round(x, 4) for x in w.tolist()]
        [0.848, -1.8464]
        >>> opt.eval()
        >>> [round(x, 4) for x in w.tolist()]
        [0.8527, -1.8513]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals()) | self._modes
        super().__init__(params, defaults, settings=settings)

    @classmethod
    def _beta1(cls, group: dict[str, Any]) -> Any:
        return group["betas"][0]

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        self._check_schedule(defaults)
        check_nonnegative("epsilon value", "eps", defaults["eps"])
        defaults["betas"] = check_betas(defaults["betas"])
        if not defaults["betas"][0] > 0.0:
            raise ValueError(
                f"Invalid beta parameter at index 0: {defaults['betas'][0]} (it must be in (0, 1): at 0, y is z and x is lost)"
            )

    def _row(self, group: dict[str, Any]) -> Row:
        row = self._row_of("schedule_free_adamw", group, "eps")
        row.hyper["beta2"] = number(group["betas"][1])
        return row

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        step = self._steps(p)
        if not step:
            return None
        v = self._decoded(p, group, "exp_avg_sq")
        return Metric(v, 1.0 / (1.0 - float(group["betas"][1]) ** step), float(group["eps"]))


class ScheduleFreeSGD(_ScheduleFree):
    r"""Schedule-free SGD: needs no schedule of the learning rate and no last step, in one pass.

    .. math::
        d_t = g_t + \lambda y_{t-1}, \qquad \gamma_t = \gamma \min(1, t / T_{\mathrm{warm}})

        z_t = z_{t-1} - \gamma_t d_t, \qquad x_t = (1-c_t)\, x_{t-1} + c_t z_t, \qquad y_t = (1-\beta)\, z_t + \beta x_t,
        \qquad c_t = \frac{w_t}{\sum_{i \le t} w_i}, \quad w_t = t^r \gamma_{\max}^p

    As :class:`precond.ScheduleFreeAdamW`, without the second moment: the parameters are y in training and the average x after
    ``eval()``. One state of the parameter's size, as SGD with momentum.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Any shape; float32, bfloat16, float16 and
            complex64 are fused, everything else runs on the reference backend.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1). Take 10 to 50 times that of SGD.
        momentum: beta of the interpolation, in (0, 1) (default 0.9).
        weight_decay: lambda >= 0, of y (default 0).
        warmup_steps, r, weight_lr_power: as for :class:`precond.ScheduleFreeAdamW`.
        foreach, maximize, capturable, differentiable, fused: the same.
        state_format: of z: None is the parameter's dtype; "fp32", "bf16", "fp16" or their torch dtypes; "int8" and "int4" are
            float32, since z is a weight. For 16-bit parameters take "fp32".
        weight_format: for bfloat16 and float16 parameters: None (default) rounds to nearest; "stochastic" keeps small changes
            on average; "split24" and "split32" keep 8 and 16 bits more of each beside it.
        **settings: ``backend``, ``max_grad_norm`` and others that every optimizer takes: :class:`precond.Settings`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, in eval mode, for a sparse gradient, a wrong shape or device, or overlapping memory.

    State: ``step``, ``weight_sum``, ``z``; in eval mode also ``y``, the bits of the parameter in training.

    Source: Defazio et al. 2024, The Road Less Scheduled, arXiv 2405.15682, and the package ``schedulefree``.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.ScheduleFreeSGD([w], lr=0.25)
        >>> for _ in range(2):
        ...     opt.zero_grad()
        ...     (w**2).sum().backward()
        ...     opt.step()
        >>> [round(x, 4) for x in w.tolist()], opt.state[w]["z"].tolist()
        ([0.3625, -0.725], [0.25, -0.5])
        >>> opt.eval()
        >>> [round(x, 4) for x in w.tolist()]
        [0.375, -0.75]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals()) | self._modes
        super().__init__(params, defaults, settings=settings)

    @classmethod
    def _beta1(cls, group: dict[str, Any]) -> Any:
        return group["momentum"]

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        self._check_schedule(defaults)
        if not 0.0 < defaults["momentum"] < 1.0:
            raise ValueError(f"Invalid momentum value: {defaults['momentum']} (it must be in (0, 1))")

    def _row(self, group: dict[str, Any]) -> Row:
        return self._row_of("schedule_free_sgd", group)

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        return Metric()
