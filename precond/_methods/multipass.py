"""Methods whose step has several passes, with matrix products or norms between them."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._core import parts
from .._core.amp import control_of
from .._core.clipping import Begun
from .._core.engine import stands_still
from .._core.formats import StateFormat
from .._core.memory import Memory
from .._core.optimizer import FusedOptimizer
from .._core.passes import Beginning, Job
from .._core.plan import first_differs
from .._core.rows import Control, PartOfStep, Row, Step, name_among, name_of
from .._core.sharding import aligned_gradients, local
from .exchange import Agreements, Member
from .last_pass import LastPass
from .of_parameters import OfParameters
from .placed import is_sharded


class MultiPass(LastPass, abstract=True):
    """A method whose step, or that of some groups, has several passes. Whether the step is skipped, and what gradients are
    multiplied with, is found before the first one.
    """

    #: Why what needs one pass is refused.
    _why_not_one_pass: ClassVar[str]
    #: True where updates may be scaled by what all of them come to: each rank then has a job for each parameter that moves.
    _scales_updates: ClassVar[bool] = False
    _must_declare = (*FusedOptimizer._must_declare, "_why_not_one_pass")
    #: Tensors that a pass writes and the next one reads, by parameter: memory that no checkpoint has.
    _buffers: OfParameters
    _beginning: Beginning
    #: True where the host must know what gradients are multiplied with, and whether the step is skipped.
    _host_must_know: ClassVar[bool] = True

    def _rebuild(self) -> None:
        super()._rebuild()
        self._passes, self._buffers, self._counters = {}, OfParameters(), OfParameters()
        # It depends on parameters and options alone, and asking the other ranks again takes all of them.
        self.agreements: Agreements = self.__dict__.get("agreements") or Agreements(type(self).__name__)
        self._beginning = Beginning(self.engine)
        #: The ids of the parameters that were found apart.
        self._apart: list[int] = []

    @property
    def _all_groups(self) -> list[dict[str, Any]]:
        """The groups that errors number."""
        groups: list[dict[str, Any]] = self._whole().param_groups
        return groups

    # What a subclass declares.

    def _needs_passes(self, group: dict[str, Any]) -> bool:
        """True for a group whose step has several passes."""
        return True

    def _check_whole(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        """Raise for a sharded parameter of such a group that must be whole, or have whole rows."""

    def _maps(self, p: Tensor, group: dict[str, Any]) -> bool:
        """True where a step maps whole matrices of a parameter: of a sharded one, an owner's work."""
        return False

    def _held_by_owner(self, p: Tensor, group: dict[str, Any]) -> bool:
        """True where the states of a parameter belong to whole matrices, and their owner has them and checks them."""
        return False

    def _member(self, key: str, name: str, p: Tensor, group: dict[str, Any], kind: int) -> Member:
        """A sharded parameter whose matrices are mapped, as an exchange has it."""
        raise NotImplementedError

    def _check_ready(self) -> None:
        """Raise where something must be called before a step."""

    def _prepare(self, groups: list[dict[str, Any]], rows: list[Row]) -> Any:
        """Check what such groups update, and agree with other ranks, before anything changes. Returns what ``_step_in_passes``
        must know.
        """
        raise NotImplementedError

    def _step_in_passes(self, groups: list[dict[str, Any]], rows: list[Row], work: Any, begun: Begun) -> None:
        """The step of such groups."""
        raise NotImplementedError

    # Groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does. What no step of it could take is refused here: ``torch.distributed.checkpoint`` leaves lr
        at 0 where its step that makes states raises.
        """
        super().add_param_group(param_group)
        group, index = self.param_groups[-1], self._groups_before + len(self.param_groups) - 1
        try:
            if self._needs_passes(group):
                self._check_settings(group)
                for position, p in enumerate(group["params"]):
                    if hasattr(p, "placements"):
                        self._check_whole(name_of(group, index, position), p, group)
        except RuntimeError:
            del self.param_groups[-1]
            raise

    def _check_settings(self, group: dict[str, Any]) -> None:
        """Raise for settings that need one pass."""
        if self._whole()._own["offload"] is not None:
            raise RuntimeError(f"offload must be None: {self._why_not_away(group)}")
        refused = ("differentiable", "capturable") if self._host_must_know else ("differentiable",)
        for name in refused:
            if self.defaults.get(name):
                raise RuntimeError(f"{name} must be False {self._why_not_one_pass}")
        for name in () if self._scales_updates else ("max_update_rms", "cautious_rescale"):
            if group.get(name, parts.OPTIONS[name]) != parts.OPTIONS[name]:
                raise RuntimeError(
                    f"{name} must be {parts.OPTIONS[name]} {self._why_not_one_pass}, got {group[name]!r}"
                )

    # The step.

    def _forget_strangers(self) -> None:
        super()._forget_strangers()
        self.keep_memory([p for group in self.param_groups for p in group["params"]])

    def keep_memory(self, params: list[Tensor]) -> None:
        """Forget the memory of other parameters."""
        self._buffers.keep(params)
        self._counters.keep(params)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _update(self) -> None:
        groups = self.param_groups
        in_passes = [self._needs_passes(group) for group in groups]
        several = list(itertools.compress(groups, in_passes))
        self._check_ready()
        if not several:
            self._step_in_one_pass(groups)
            return
        part = self._partial
        control = control_of(getattr(self, "found_inf", None), getattr(self, "grad_scale", None), self._own)
        if control is None:
            self.skipped_steps.add_(1)
            return
        rows = [self._checked_row(group) for group in groups]
        self._check_apart()
        of_several = list(itertools.compress(rows, in_passes))
        still = stands_still(rows)
        self._only_states = still and self._has_neither_states_nor_gradients(several)
        work = self._prepare(several, of_several)
        begun = self._begin(control, rows) if part is None else self._begun_by(part)
        if begun is None:
            return
        collecting = self._measures and part is None
        self._into = self._collecting(groups) if collecting else None if part is None else part.into
        # torch.distributed.checkpoint makes states by a step at lr 0. Those of the passes come first then: a plan that has only
        # made states holds until other states appear, and knows that its next step is the first one.
        if still:
            self._step_in_passes(several, of_several, work, begun)
        numbers = [i for i, several_passes in enumerate(in_passes) if not several_passes]
        if numbers:
            straight, of_straight = [groups[i] for i in numbers], [rows[i] for i in numbers]
            if any(group.get(name) is not None for group in straight for name in ("weight_format", "state_format")):
                self.states.name_streams()  # by places among all
            self.engine.run(
                Step(
                    straight,
                    self.state,
                    {},
                    of_straight,
                    *begun,
                    numbers,
                    measured=self._measures,
                    scaled=parts.scaled(straight),
                    into=self._into,
                ),
                partial=part is not None,
            )
        if not still:
            self._step_in_passes(several, of_several, work, begun)
        if collecting and self._into is not None:
            if (total := self._into.total()) is not None:
                self.engine.report.note(total, self._into.labels)
            if total is not None and total.is_cuda and torch.cuda.is_current_stream_capturing():
                self.engine.captured.append(self._into.kept())
        self._into = None

    def _has_one_pass(self, group: dict[str, Any]) -> bool:
        """True for a group that the engine steps."""
        return not self._needs_passes(group)

    def _why_not_away(self, group: dict[str, Any]) -> str:
        """Why the states of a group's parameters cannot be the host's; empty if they can."""
        if self._needs_passes(group):
            return f"a step of several passes has its states on the device {self._why_not_one_pass}"
        return super()._why_not_away(group)

    def why_not_alone(self, group: dict[str, Any]) -> str:
        """Why a parameter of a group cannot be stepped before the others have gradients; empty if it can."""
        shared = self._needs_passes(group) and any(self._is_shared(p, group) for p in group["params"])
        return "of matrices on shards: all ranks and all matrices share a step" if shared else ""

    def _check_apart(self) -> None:
        """Raise where two parameters share memory, of whatever methods, before a pass writes one of them."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        ids = [id(p) for p in params]
        if ids != self._apart:
            owners = [(i, "") for i in range(len(params))]
            Memory().check([local(p) for p in params], owners, lambda i: (self._name(params[i]), True))
            self._apart = ids

    def _begin(self, control: Control, rows: list[Row]) -> Begun | None:
        """What the step does with gradients; None where it is skipped."""
        if self._own["max_grad_norm"] is None and control.found_inf is None:
            return Begun(control)
        groups = self.param_groups
        may_skip = control.found_inf is not None or self._own["nonfinite"] == "skip"
        host_must_know = self._decided_by_host(groups) or (
            may_skip
            and any(
                first_differs(row) and any(p.grad is not None and not self.state.get(p) for p in group["params"])
                for group, row in zip(groups, rows, strict=True)
            )
        )
        return self._beginning.find(groups, control, host_must_know=host_must_know)

    def _begun_by(self, part: PartOfStep) -> Begun | None:
        """The same where the step of all parameters says so."""
        if part.control is None:
            return None
        begun = Begun(part.control, part.clip)
        return begun.folded() if self._decided_by_host(self.param_groups) else begun

    def _members(self, groups: list[dict[str, Any]], *, frozen: bool = False) -> list[Member]:
        """The parameters whose matrices ranks share: whether they have a gradient or not, since no rank knows of the others'.
        Those that require none take no part, unless ``frozen``.
        """
        members = []
        names = [name for group in groups for name in group.get("param_names", ())]
        named = all("param_names" in group for group in groups) and len(set(names)) == len(names)
        for group in groups:
            index = self._number_of(group)
            for position, p in enumerate(group["params"]):
                if not self._is_shared(p, group) or p.device_mesh.get_coordinate() is None:
                    continue
                name = name_of(group, index, position)
                if not p.requires_grad and not frozen:
                    if p.grad is not None:
                        raise RuntimeError(
                            f"{name} is sharded and has a gradient: it must require gradients, on all ranks"
                        )
                    continue
                key = group["param_names"][position] if named else f"parameter {position} of group {index}"
                members.append(self._member(key, name, p, group, index))
        return members

    def _is_shared(self, p: Tensor, group: dict[str, Any]) -> bool:
        """True for a parameter of which this rank has a shard, of matrices that are mapped."""
        return is_sharded(p) and p.numel() > 0 and self._maps(p, group)

    def _number_of(self, group: dict[str, Any]) -> int:
        """The number of a group that errors give."""
        return next(i for i, other in enumerate(self._all_groups) if other is group)

    def _decided_by_host(self, groups: list[dict[str, Any]]) -> bool:
        """True where a method of these groups needs the host to know."""
        return self._host_must_know

    def _init_state(self, p: Tensor, group: dict[str, Any], row: Row, name: str | None = None) -> None:
        """Make what a parameter's rule needs and has not."""
        states = self.states
        states.ensure(self._name(p) if name is None else name, p, group, row)
        self._keep_counter(p, row)

    def _keep_counter(self, p: Tensor, row: Row) -> None:
        """Have a copy of the counter of a parameter with random bits and a rule that counts its steps."""
        if not self.states.keeps_step(row.rule):
            self._counters.drop(p)
        elif "key" in self.state[p]:
            self._counter(p)

    def _name(self, p: Tensor) -> str:
        """What errors call a parameter."""
        return name_among(self._all_groups, p)

    def _has_neither_states_nor_gradients(self, groups: list[dict[str, Any]]) -> bool:
        """True before a first step on gradients of zeros: at lr 0 it is how torch.distributed.checkpoint has states made."""
        given = [p for group in groups for p in group["params"] if p.grad is not None]
        return not any(self.state.get(p) or bool(local(p.grad).any()) for p in given)

    def _buffer(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        made = self._buffers.get(p)
        if made is None or (made.dtype, made.shape, made.device) != (dtype, p.shape, p.device):
            made = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            self._buffers.put(p, made)
        return made

    def _job(
        self,
        name: str,
        p: Tensor,
        target: Tensor,
        g: Tensor,
        names: tuple[str, ...],
        hyper: dict[str, float | Tensor],
        sign: float = 1.0,
        weight_format: str | None = None,
        state_format: StateFormat = None,
    ) -> Job:
        """A job with the states of these names that a parameter has, and what random bits need. Each pass that draws counts a
        step of the parameter, so that no two draw alike; where its rule counts them itself, a later pass has a copy to count.
        """
        state = self.state.get(p, {})
        given = {key: state[key] for key in names if key in state}
        if "key" in state:
            given["key"] = state["key"]
            copy = None if "step" in names else self._counters.get(p)
            given["step"] = state["step"] if copy is None else copy.copy_(state["step"])
        return Job(target, g, given, hyper, sign, weight_format, state_format, name)

    def _gradients(self, group: dict[str, Any], row: Row) -> list[tuple[str, Tensor, Tensor]]:
        """Name, parameter and gradient of each parameter that has one, checked with its states before anything changes."""
        self._check_settings(group)
        index = self._number_of(group)
        step = Step([group], self.state, aligned_gradients([group]), [], Control())
        states, plain, of_rule = self.states, Row("sgdw", 1.0, {}), self.states.names(row.rule)
        found = []
        for position, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            name = name_of(group, index, position)
            self.engine.checks.backend_of(name, p, step, plain, states)
            held = {} if self._held_by_owner(p, group) else self.state.get(p, {})
            if any(
                (t := held.get(key)) is not None
                and (t.shape != p.shape or t.device != p.device or t.is_complex() or not t.is_floating_point())
                for key in of_rule
            ):
                self.engine.checks.backend_of(name, p, step, row, states)  # raises, unless they are codes
            if hasattr(p, "placements"):
                self._check_whole(name, p, group)
            found.append((name, p, step.inputs.get(p, p.grad)))
        return found
