"""The states of parameters: what a rule needs, made where it is missing and converted where another format is asked for."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import reference
from . import formats
from .counters import make_counter
from .formats import EMA, STATE_FORMATS, Layout, StateFormat
from .remainders import Remainders, State
from .rows import Group, Row
from .sharding import like, local


class PrecisionWarning(UserWarning):
    """A setting is legal but loses more precision than its user may expect."""

    __module__ = "precond"


class States(Protocol):
    """What a plan must know about the states of parameters, and has made. A rule has names for its own."""

    #: Of each parameter its states, by name: the dictionary of the step that is being prepared or run.
    state: State

    def bind(self, state: State, groups: list[Group]) -> None:
        """Take the dictionaries of a step: torch makes new ones when it loads a checkpoint."""

    def names(self, rule: str) -> tuple[str, ...]:
        """The names of a rule's states, in its order."""

    def scalars(self, rule: str) -> Mapping[str, float]:
        """A rule's states of one number, which live where the step counter does, with their initial value."""

    def keys(self, group: Group, rule: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """What there is of a parameter that has all its states, where these are as their dtypes say: the names of states, and of
        those of one number. None where a parameter may have others.
        """

    def present(self, p: Tensor, rule: str) -> dict[str, Tensor]:
        """Those of a rule's states that exist, in its order."""

    def missing(self, p: Tensor, rule: str) -> bool:
        """True where a rule cannot run before ``ensure``."""

    def layout(self, p: Tensor, group: Group, rule: str) -> Layout:
        """The formats of a parameter and of its states as they are."""

    def ensure(self, name: str, p: Tensor, group: Group, row: Row) -> bool:
        """Make what is missing. True if none of the rule's states was there: the rule's first step."""

    def counts(self, p: Tensor, rule: str) -> bool:
        """True where a parameter has a step counter: as in torch, and where the rule or random bits depend on the step."""

    def begin(self, split: Iterable[Tensor]) -> None:
        """Before a step that writes these split weights."""

    def end(self, split: Iterable[Tensor]) -> None:
        """After it."""


class Recipe(NamedTuple):
    """What an optimizer's class declares about its states."""

    #: What a new state is filled with.
    initial: Callable[[Tensor, Group], complex]
    #: What a group asks for a state to be stored in.
    format_of: Callable[[str, Group], StateFormat]
    #: Numbers that stand among the states of a parameter, as they are before the first step.
    numbers: Callable[[Group], dict[str, int]]
    #: Options of a group that torch does not have, with their defaults.
    options: Callable[[Group], Mapping[str, Any]]


class Elsewhere(Protocol):
    """What keeps split weights apart from the device's: those whose states the host has."""

    def begin(self, split: Iterable[Tensor]) -> list[Tensor]:
        """Forget what they lacked of their masters where somebody else has written them. Returns the others."""

    def end(self, split: Iterable[Tensor]) -> list[Tensor]:
        """They are as their remainders have them. Returns the others."""

    def watched(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of some parameters that are split weights of past steps."""

    def written(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of some parameters that others have written, too."""


class ParamStates:
    """The states of an optimizer's parameters."""

    #: Set where the host has some.
    elsewhere: Elsewhere | None = None

    def __init__(self, recipe: Recipe, seed: int, written: Iterable[Tensor] = ()) -> None:
        """``written``: split weights that others are known to write."""
        self.recipe = recipe
        self.remainders = Remainders(written)
        self.state: State = {}
        self._groups: list[Group] = []
        self._seed = seed
        #: What each parameter's stream of random bits is named by, by its id: its name, or its position among the parameters.
        self._stream_names: dict[int, str] = {}
        self._warned = False

    def bind(self, state: State, groups: list[Group]) -> None:
        """Take the dictionaries of a step: torch makes new ones when it loads a checkpoint."""
        self.state, self._groups = state, groups

    def names(self, rule: str) -> tuple[str, ...]:
        """The names of a rule's states, in its order."""
        return reference.RULES[rule].states

    def scalars(self, rule: str) -> Mapping[str, float]:
        """A rule's states of one number, with their initial value."""
        return reference.RULES[rule].scalars

    def stored(self, rule: str) -> frozenset[str]:
        """The names of all tensors that a rule may have for each element, and of what lies beside them."""
        names = self.names(rule)
        return frozenset((*names, *(f"{name}_scale" for name in names), "remainder"))

    def keys(self, group: Group, rule: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """What there is of a parameter that has all its states; None where formats or numbers of Python's stand beside them, or a
        parameter that only counts, to which every step is its first.
        """
        names = self.names(rule)
        if (
            group.get("state_format") is not None
            or group.get("weight_format") is not None
            or group.get("ema_format") not in (None, "fp32", torch.float32)
            or self.recipe.numbers(group)
        ):
            return None
        if not self.keeps_step(rule):
            return names, ()
        return (names, ("step", *self.scalars(rule))) if names else None

    def present(self, p: Tensor, rule: str) -> dict[str, Tensor]:
        """Those of a rule's states that exist, in its order."""
        return present_of(self.state, p, self.names(rule))

    def missing(self, p: Tensor, rule: str) -> bool:
        """True where a rule cannot run before ``ensure``."""
        state = self.state.get(p, {})
        if self.counts(p, rule) and any(name not in state for name in ("step", *self.scalars(rule))):
            return True
        return len(self.present(p, rule)) < len(self.names(rule))

    def counts(self, p: Tensor, rule: str) -> bool:
        """True where a parameter has a step counter: as in torch, and where the rule or random bits depend on the step."""
        return self.keeps_step(rule) or "key" in self.state.get(p, ())

    def keeps_step(self, rule: str) -> bool:
        """True where a rule's step counter is a state like the others, whatever the formats."""
        return reference.RULES[rule].reads_step or reference.RULES[rule].counts_steps

    def layout(self, p: Tensor, group: Group, rule: str, name: str = "a parameter") -> Layout:
        """The formats of a parameter, which errors call so, and of its states as they are."""
        return formats.layout_of(p, group, self.state.get(p, {}), self.names(rule), name)

    def begin(self, split: Iterable[Tensor]) -> None:
        """Forget what split weights lacked of their masters where somebody else has written them."""
        self.remainders.drop_stale(self.state, split if self.elsewhere is None else self.elsewhere.begin(split))

    def end(self, split: Iterable[Tensor]) -> None:
        """Split weights are now as the step left them."""
        self.remainders.note(split if self.elsewhere is None else self.elsewhere.end(split))

    def watched(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of some parameters that are split weights of past steps."""
        params = list(params)
        found = self.remainders.watched(params)
        return found if self.elsewhere is None else found + self.elsewhere.watched(params)

    def written(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of some parameters that others have written, too."""
        params = list(params)
        found = self.remainders.written(params)
        return found if self.elsewhere is None else found + self.elsewhere.written(params)

    def decoded(self, p: Tensor, group: Group, rule: str, name: str) -> Tensor:
        """A state that a parameter has: itself, or decoded where it consists of codes; a copy where the host has it."""
        state, device = self.state[p], local(p).device
        if f"{name}_scale" not in state:
            found: Tensor = state[name]
            return found if local(found).device == device else like(p, local(found).to(device), found.shape)
        formats.renew([(p, state)])
        form = self.layout(p, group, rule).states[self.names(rule).index(name)]
        return like(p, formats.values_of(state, name, form, p).to(device))

    def master(self, p: Tensor, group: Group) -> Tensor:
        """The values of a parameter, of the local shape: in float32 or wider, for a split weight with what its remainder adds."""
        plain = local(p.detach())
        remainder = self.state[p].get("remainder") if p in self.state else None
        if remainder is not None and group.get("weight_format") in ("split24", "split32"):
            return formats.decode(
                plain, local(remainder).to(plain.device), formats.layout_of(p, group, {}, ()).param, plain.shape
            )
        return plain.float() if formats.is_half(p) else plain

    def write(self, p: Tensor, group: Group, values: Tensor) -> None:
        """Give a parameter values of the local shape, rounded to nearest, and a split weight its remainder."""
        plain = local(p.detach())
        remainder = self.state[p].get("remainder") if p in self.state else None
        if remainder is None or group.get("weight_format") not in ("split24", "split32"):
            plain.copy_(values)
            return
        stored, beside = formats.encode(values, formats.layout_of(p, group, {}, ()).param, None, 0)
        assert beside is not None
        plain.copy_(stored)
        local(remainder).copy_(beside)
        self.end([p])

    def ensure(self, name: str, p: Tensor, group: Group, row: Row) -> bool:
        """Make what is missing, convert what is stored otherwise than asked. True if none of the rule's states was there."""
        names = self.names(row.rule)
        if EMA not in names and p in self.state:  # one that misses steps is no average: it begins anew
            for key in (EMA, f"{EMA}_scale"):
                self.state[p].pop(key, None)
        weight_format = group.get("weight_format") if formats.is_half(p) else None
        counts = self.keeps_step(row.rule)
        if not names and not counts and weight_format is None:
            return False
        self.convert(name, p, group, row.rule)
        state = self.state[p]
        fresh = all(state.get(key) is None for key in names if key != EMA)
        if counts:  # before the states, as in torch
            make_counter(name, p, state, group, self.scalars(row.rule), reference.RULES[row.rule].wide_scalars)
        for key in names:
            if state.get(key) is None:
                made = self._new_average(name, p, group) if key == EMA else self._new_state(name, p, key, group, row)
                state.update(made)
        if weight_format in ("split24", "split32"):
            if not formats.has_remainder(state, weight_format, p):
                state["remainder"] = formats.new_remainder(p, weight_format)
        else:
            state.pop("remainder", None)  # a parameter that is updated without it is not what it belongs to
        if formats.layout_of(p, group, state, names, name).draws and not isinstance(state.get("key"), int):
            state["key"] = self.key_of(p)
        if not counts and "key" in state:
            make_counter(name, p, state, group, self.scalars(row.rule), reference.RULES[row.rule].wide_scalars)
        for key, number in self.recipe.numbers(group).items():
            state.setdefault(key, number)
        return fresh

    def _settle(self) -> None:
        """Before states are read: wait for whoever is writing them."""

    def convert(self, name: str, p: Tensor, group: Group, rule: str) -> None:
        """Bring states that exist, loaded or made under another option, into the format that a group asks for by name."""
        asked = {key: self.recipe.format_of(key, group) for key in self.names(rule)}
        if p not in self.state or p.is_complex() or not any(form is not None for form in asked.values()):
            return
        state = self.state[p]
        forms = self.layout(p, group, rule, name).states
        for key, form in zip(self.present(p, rule), forms, strict=True):
            if asked[key] is None:
                continue
            wanted = STATE_FORMATS[asked[key]]
            coded = isinstance(wanted, str) and formats.takes_codes(p)
            dtype = torch.float32 if isinstance(wanted, str) else wanted
            if coded and form == formats.code_format(key, str(wanted)):
                continue
            alone = f"{key}_scale" not in state
            # Of another shape: the step says so.
            if alone and (state[key].shape != p.shape or (not coded and state[key].dtype == dtype)):
                continue
            if hasattr(p, "placements") and not hasattr(state[key], "placements"):
                continue  # whole: whoever holds it converts it
            self._settle()
            formats.check(name, p, state, (key,), Layout("fp32", (form,), (0, 0, 0)))
            formats.renew([(p, state)])
            values = formats.values_of(state, key, form, p)
            state.pop(f"{key}_scale", None)
            if coded:
                state.update(formats.new_codes(p, key, str(wanted), name))
                formats.fill(state, key, values, formats.code_format(key, str(wanted)))
            else:
                state[key] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
                local(state[key]).copy_(values)

    def name_streams(self) -> None:
        """Name every parameter's random bits by its name, or by its position among those that are bound now."""
        if all(id(p) in self._stream_names for group in self._groups for p in group["params"]):
            return
        position = 0
        for group in self._groups:
            for i, p in enumerate(group["params"]):
                self._stream_names[id(p)] = group["param_names"][i] if "param_names" in group else str(position)
                position += 1

    def name_as(self, tensor: Tensor, p: Tensor) -> None:
        """Name the random bits of a tensor that stands for a parameter as the parameter's own."""
        if id(p) not in self._stream_names:
            self.name_streams()
        self._stream_names[id(tensor)] = self._stream_names[id(p)]

    def keep(self, groups: list[Group]) -> None:
        """Forget parameters that are neither in these groups nor have a state."""
        if not self._stream_names and not self.remainders:
            return
        params = [p for group in groups for p in group["params"]]
        if max(len(self.remainders), len(self._stream_names)) > len(params):
            alive = {*map(id, params), *map(id, self.state)}
            self.remainders.keep(alive)
            self._stream_names = {key: name for key, name in self._stream_names.items() if key in alive}

    def key_of(self, p: Tensor) -> int:
        """What names the stream of a parameter's random bits: from the seed and its name, or its position."""
        if id(p) not in self._stream_names:
            self.name_streams()
        name = self._stream_names[id(p)]
        named = f"{self._seed}:{name}"
        return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=8).digest(), "little") >> 1

    def _new_state(self, name: str, p: Tensor, key: str, group: Group, row: Row) -> dict[str, Tensor]:
        """A state of a parameter, which errors call so, with its initial value, and what lies beside it."""
        initial = self.recipe.initial(p, group)
        # A complex state has its parameter's dtype: a pair of other floats is no dtype of torch.
        state_format = None if p.is_complex() else self.recipe.format_of(key, group)
        dtype = p.dtype if state_format is None else STATE_FORMATS[state_format]
        if isinstance(dtype, str):
            if formats.takes_codes(p):
                made = formats.new_codes(p, key, dtype, name)
                if initial != 0.0:
                    values = torch.full(local(p).shape, initial, device=p.device, dtype=torch.float32)
                    formats.fill(made, key, values, formats.code_format(key, dtype))
                return made
            dtype = torch.float32
        self._warn_precision(key, dtype, group, row)
        full = torch.full_like(p, initial, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
        return {key: full}

    def _new_average(self, name: str, p: Tensor, group: Group) -> dict[str, Tensor]:
        """The average of a parameter's weights, which errors call so: it begins with what the parameter is now."""
        state = self.state[p]
        if group["ema_decay"] == "equal" and float(state["step"]) > group.get("ema_start", 0):
            raise ValueError(
                f"ema_start must be at least {int(state['step'])}, the steps that {name} has taken, where an equal average "
                f"begins, got {group.get('ema_start', 0)}"
            )
        asked = self.recipe.format_of(EMA, group)
        dtype = STATE_FORMATS["fp32" if asked is None else asked]
        if p.is_complex() or (p.dtype == torch.float64 and asked is None):
            dtype = p.dtype
        coded = isinstance(dtype, str) and formats.takes_codes(p)
        if coded:
            made = formats.new_codes(p, EMA, str(dtype), name)
        else:
            dtype = torch.float32 if isinstance(dtype, str) else dtype
            made = {EMA: torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)}
        values = self.master(p, group)
        if coded:
            formats.fill(made, EMA, values.float(), formats.code_format(EMA, str(STATE_FORMATS[asked])))
        else:
            local(made[EMA]).copy_(values)
        return made

    def _warn_precision(self, name: str, dtype: torch.dtype, group: Group, row: Row) -> None:
        """Warn once where a new state's dtype cannot hold what the rule needs."""
        rule = reference.RULES[row.rule]
        if name not in rule.second_moments or self._warned:
            return
        kept = row.hyper[rule.keeps] if isinstance(rule.keeps, str) else rule.keeps
        if dtype == torch.bfloat16 and group.get("state_format") is None and kept > 0.995:
            stays = "stands still" if rule.squares else "never decays"
            what = f"{stays}: rounding to nearest loses what a step adds or removes at {kept} > 0.995"
        elif dtype == torch.float16 and rule.squares:
            what = "is 0 for gradients below about 1e-3, and the step is then divided by eps alone"
        else:
            return
        self._warned = True
        warnings.warn(
            f"a {dtype} {name} {what}; state_format='fp32' keeps the states in float32", PrecisionWarning, stacklevel=2
        )


def present_of(state: State, p: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Those of a parameter's states that exist, in the order of the names."""
    held = state.get(p, {})
    return {name: held[name] for name in names if held.get(name) is not None}
