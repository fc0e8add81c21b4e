"""The last pass of methods that have several: it moves parameters along what the others have found, with the parts that groups
ask for.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import parts
from .._core.clipping import Begun
from .._core.formats import EMA
from .._core.optimizer import FusedOptimizer
from .._core.passes import Job, Pass
from .._core.rows import Row
from .._core.sharding import local
from .._core.statistics import Collected
from .of_parameters import OfParameters


class Move(NamedTuple):
    """What the last pass does with a parameter."""

    group: dict[str, Any]
    #: The rule of its group, with parts.
    row: Row
    #: As the rule "sgdw" takes it, along its ``g``.
    job: Job
    #: The gradient, which may be what the job has. None: this rank has none.
    g: Tensor | None


class LastPass(FusedOptimizer, abstract=True):
    """A method with a last pass."""

    _passes: dict[tuple[str, Hashable], Pass]
    #: Copies of the counters of parameters with a rule that counts their steps and with random bits: for a pass that draws after
    #: the one that counts.
    _counters: OfParameters
    #: What collects the statistics of this step; None where it takes none.
    _into: Collected | None = None
    #: The same between steps: graphs may have been captured with it.
    _collected: Collected | None = None
    #: What ``_asked_for_states`` says, of the optimizer that steps.
    _only_states: bool = False

    def _pass(self, rule: str, names: tuple[str, ...] = (), *, of: Hashable = 0) -> Pass:
        """The pass of a rule, for those who call it once per group or batch: of that one."""
        if (rule, of) not in self._passes:
            self._passes[rule, of] = Pass(
                rule,
                names,
                self._own["backend"],
                remainders=self.states.remainders,
                captured=self.engine.captured,
            )
        return self._passes[rule, of]

    @property
    def _asked_for_states(self) -> bool:
        """True for a step that is only to make states, as far as this rank knows."""
        whole = self._whole()
        assert isinstance(whole, LastPass)
        return whole._only_states

    def _last_pass(
        self, moves: list[Move], begun: Begun, *, of: Hashable = 0, may_only_make_states: bool = False
    ) -> None:
        """Move parameters along what was found, with the parts that their groups ask for. With parts the pass reads the gradient,
        which masks and statistics are about, and has the direction for a state, also where neither is on: an average's random
        bits depend on its place among the states. ``begun``: what is done with gradients. ``may_only_make_states``: a step that
        is asked for states alone comes here too, and is none for averages and statistics.
        """
        whole = self._whole()
        assert isinstance(whole, LastPass)
        only_states = may_only_make_states and self._asked_for_states
        into = None if only_states else whole._into
        passes: dict[str, list[Job]] = {}
        hypers: dict[tuple[int, int], dict[str, float | Tensor]] = {}  # one for all that a pass may take together
        for group, row, job, g in moves:
            suffix = "" if only_states else parts.suffix(group, into is not None)
            rule = "sgdw"
            if suffix:
                key = id(job.hyper), id(group)
                if (hyper := hypers.get(key)) is None:
                    hyper = hypers[key] = {**job.hyper, **parts.hyper(group)}
                scaled = parts.scaled_of(group) if parts.is_scaled(group) else None
                job = job._replace(hyper=hyper, state=dict(job.state), scaled=scaled)
                if g is not job.g:
                    assert job.g is not None
                    job.state["direction"] = job.g if job.sign > 0 else -job.g
                    job, rule = job._replace(g=_readable(g, job.p), sign=row.sign), "directed"
                if suffix == "+ema":
                    self._add_average(job, row, group)
            passes.setdefault(rule + suffix, []).append(job)
        for rule, jobs in passes.items():
            reads = rule.startswith("directed")
            names = ("direction",) * reads + (EMA,) * rule.endswith("+ema")
            self._pass(rule, names, of=of).run(jobs, begun if reads else begun.of_results(), into)

    def _add_average(self, job: Job, row: Row, group: dict[str, Any]) -> None:
        """Have the last pass move a parameter's average."""
        state = self.state[job.p]
        job.state.update({key: state[key] for key in (EMA, f"{EMA}_scale") if key in state})
        counted = self.states.keeps_step(without_parts(row).rule)
        # An earlier pass has counted this step, and the average's counts a copy once more.
        job.hyper["ema_start"] = float(group.get("ema_start", 0)) + counted
        job.state["step"] = self._counter(job.p).copy_(state["step"]) if counted else state["step"]

    def _counter(self, p: Tensor) -> Tensor:
        """A copy of a parameter's counter, which another pass counts."""
        counter = self.state[p]["step"]
        copy = self._counters.get(p)
        if copy is None or _kind(copy) != _kind(counter):
            copy = counter.clone()
            self._counters.put(p, copy)
        return copy

    def _collecting(self, groups: list[dict[str, Any]]) -> Collected:
        """What collects the statistics of a step."""
        if self._collected is None or not self._collected.fits(groups):
            self._collected = Collected(groups)
        return self._collected.begin(groups)


def _readable(g: Tensor | None, p: Tensor) -> Tensor | None:
    """A gradient that the backend of the direction takes: bits of a step must not depend on who looks at its gradient."""
    if g is None:
        return None
    wide = g.dtype in (torch.float64, torch.complex128) and p.dtype not in (torch.float64, torch.complex128)
    if wide:
        g = g.to(torch.complex64 if g.is_complex() else torch.float32)
    return g if local(g) is not g else g.resolve_conj().resolve_neg()


def without_parts(row: Row) -> Row:
    """A row without parts."""
    return row._replace(rule=row.rule.partition("+")[0])


def _kind(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.shape, t.device
