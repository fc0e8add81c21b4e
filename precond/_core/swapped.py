"""Other values in the parameters for a while, such as an average of them, and the old bits back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .remainders import versions_of
from .rows import Group
from .sharding import like, local
from .states import ParamStates

#: Elements whose values are there at a time before they are written.
_AT_ONCE = 1 << 24


class Swapped:
    """Shows values in parameters and keeps their bits among their states, under a name: so checkpoints, copies and shards have
    them, and whoever loads such a checkpoint can restore them too.
    """

    def __init__(self, key: str) -> None:
        #: The name among the states. What a split weight has beside it is kept under that name with ``_remainder`` behind it.
        self.key = key
        self._beside = f"{key}_remainder"
        #: What parameters were as ``show`` left them, by id; of those that a checkpoint brought nothing is known.
        self._left: dict[int, tuple[int, ...]] = {}

    def active(self, states: ParamStates) -> bool:
        """True while some parameters show other values."""
        return any(self.key in state for state in states.state.values())

    def show(self, states: ParamStates, values: Iterable[tuple[Tensor, Group, Tensor]]) -> None:
        """Put values of the local shape and of any dtype into parameters, given with their groups; they are rounded to nearest.
        ``values`` may compute them one by one. If that fails, or memory is short, all parameters have their old bits.
        """
        try:
            with torch.no_grad():
                for batch in _batches(values):
                    self._show(states, batch)
        except BaseException:
            self.restore(states)
            raise

    def _show(self, states: ParamStates, batch: list[tuple[Tensor, Group, Tensor]]) -> None:
        kept = []
        for p, _, _ in batch:
            for name, t in ((self.key, p.detach()), (self._beside, states.state[p].get("remainder"))):
                if t is not None:
                    with torch.inference_mode(False):  # or it could not be written outside of that mode
                        kept.append((p, name, t, torch.empty_like(local(t))))
        _copy([(copy, local(t)) for _, _, t, copy in kept])
        for p, name, t, copy in kept:
            states.state[p][name] = like(p, copy, t.shape)
        _copy([(local(p.detach()), value) for p, _, value in batch if self._beside not in states.state[p]])
        for p, group, value in batch:
            if self._beside in states.state[p]:
                states.write(p, group, value)
            self._left[id(p)] = _seen(p)

    def restore(self, states: ParamStates, *, written_too: bool = False) -> list[Tensor]:
        """Put the old bits back. Returns the parameters that somebody else has written meanwhile, which stay as they are unless
        ``written_too``, and then where they have another shape or device by now.
        """
        written, back, split = [], [], []
        for p, state in list(states.state.items()):
            if self.key not in state:
                continue
            kept, beside = state.pop(self.key), state.pop(self._beside, None)
            if not state:
                del states.state[p]  # it had none before
            if self._left.get(id(p), _seen(p)) != _seen(p):
                written.append(p)
                here, of = local(p.detach()), local(kept)
                if not written_too or (here.shape, here.device) != (of.shape, of.device):
                    continue
            back.append((local(p.detach()), local(kept)))
            if beside is not None and "remainder" in state:
                back.append((local(state["remainder"]), local(beside)))
                split.append(p)
        with torch.no_grad():
            _copy(back)
        states.end(split)
        self._left.clear()
        return written


def _batches(values: Iterable[tuple[Tensor, Group, Tensor]]) -> Iterator[list[tuple[Tensor, Group, Tensor]]]:
    batch, elements = [], 0
    for item in values:
        batch.append(item)
        elements += item[2].numel()
        if elements >= _AT_ONCE:
            yield batch
            batch, elements = [], 0
    if batch:
        yield batch


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy second tensors into first ones."""
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [of for _, of in pairs])


def _seen(p: Tensor) -> tuple[int, ...]:
    return (*versions_of(p), local(p.detach()).data_ptr())
