"""What one step is about: data that an optimizer hands to a plan."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

_FORMAT_OPTIONS = ("state_format", "weight_format", "ema_format")

Group = dict[str, Any]
Hyper = dict[str, float | Tensor]


def name_of(group: Group, index: int, position: int) -> str:
    """What errors call a parameter: where it stands, and its name where it has one."""
    if "_called" in group:  # a group that a pass makes of tensors; errors are about what its caller knows
        called: str = group["_called"][position]
        return called
    place = f"parameter {position} of group {index}"
    names = group.get("param_names")
    return place if names is None or position >= len(names) else f"{place} ({names[position]!r})"


def name_among(groups: list[Group], p: Tensor) -> str:
    """What errors call a parameter of these groups."""
    for index, group in enumerate(groups):
        for position, other in enumerate(group["params"]):
            if other is p:
                return name_of(group, index, position)
    return "a parameter"


class Row(NamedTuple):
    """What a group asks for in this step: a rule, the sign of its gradients, and the rule's hyper-parameters.

    A hyper-parameter is a float, or a tensor of one element: on an accelerator, which reads it, or where autograd watches.
    """

    rule: str
    sign: float
    hyper: Hyper


class Control(NamedTuple):
    """What the whole step shares: a factor on all gradients, a loss scaler's tensors where they are on a device, and what a
    gradient is clamped to.
    """

    grad_coef: float = 1.0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    clip_value: float = float("inf")


class Scaled(NamedTuple):
    """What multiplies the updates of each tensor of a group with a factor of its own."""

    #: The share of the elements that a mask leaves.
    rescale: bool = False
    #: The largest rms of an update over lr.
    max_rms: float | None = None


class PartOfStep(NamedTuple):
    """What a step of some parameters takes from that of all."""

    #: None: the step is skipped.
    control: Control | None
    #: norm.Clip, as Step has it; and where statistics go.
    clip: Any = None
    into: Any = None


class Step(NamedTuple):
    """One step of some parameter groups."""

    groups: list[Group]
    #: Of each parameter its states, by name.
    state: dict[Tensor, dict[str, Any]]
    #: What parameters are updated with where that is not their ``.grad``.
    inputs: dict[Tensor, Tensor]
    #: One for each group.
    rows: list[Row]
    control: Control
    #: norm.Clip of a norm that was measured before the step, whose control follows from it; None: the step measures its own.
    clip: Any = None
    #: The numbers of the groups among the optimizer's, where the step is of some of them.
    numbers: list[int] | None = None
    #: Statistics are taken. Then every rule here is one with parts.
    measured: bool = False
    #: Of each group what scales its updates; None where no group asks for that, else every rule is one with parts.
    scaled: list[Scaled] | None = None
    #: statistics.Collected, where a step of several passes collects them; None: they go into the report.
    into: Any = None

    def input_of(self, p: Tensor) -> Tensor | None:
        """What a parameter is updated with; None leaves it alone."""
        return self.inputs.get(p, p.grad) if self.inputs else p.grad

    def formats(self) -> list[tuple[Any, ...]]:
        """The formats that groups ask for."""
        return [tuple(group.get(name) for name in _FORMAT_OPTIONS) for group in self.groups]


def parameters(step: Step) -> list[Tensor]:
    """All parameters, by their numbers."""
    return [p for group in step.groups for p in group["params"]]


class Entry(NamedTuple):
    """Where a parameter stands: a plan keeps no tensor alive."""

    #: Among all parameters.
    number: int
    group: int
    position: int

    def param(self, step: Step) -> Tensor:
        """It itself."""
        p: Tensor = step.groups[self.group]["params"][self.position]
        return p

    def name(self, step: Step) -> str:
        """What errors call it."""
        number = self.group if step.numbers is None else step.numbers[self.group]
        return name_of(step.groups[self.group], number, self.position)


def entries_of(step: Step) -> list[Entry]:
    """All parameters, by their numbers."""
    places = [(index, i) for index, group in enumerate(step.groups) for i in range(len(group["params"]))]
    return [Entry(number, index, i) for number, (index, i) in enumerate(places)]
