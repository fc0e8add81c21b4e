"""What split weights lack of their masters, and when it is void: somebody else wrote the weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .sharding import local

State = dict[Tensor, dict[str, Any]]


class _Noted:
    """A split weight as the last step left it."""

    __slots__ = ("stored", "versions", "written")

    def __init__(self, written: bool) -> None:
        #: Its version counters then; None where no step has been: a remainder that was loaded or copied is trusted.
        self.versions: tuple[int, int] | None = None
        #: True once somebody else has written it.
        self.written = written
        #: Its 16 bits then, where it was ever written: most weights never are, and cost nothing.
        self.stored: Tensor | None = None

    def fits(self, now: Tensor) -> bool:
        """True where there are bits to compare with."""
        before = self.stored
        return before is not None and (before.shape, before.dtype, before.device) == (now.shape, now.dtype, now.device)

    def drop_changed(self, now: Tensor, remainder: Tensor) -> None:
        """Zero the remainders of elements whose bits are others now; of all, the first time."""
        if self.stored is None or not self.fits(now):
            remainder.zero_()
            return
        changed = now.view(torch.int16) != self.stored.view(torch.int16)
        remainder.masked_fill_(changed if remainder.dim() == now.dim() else changed.unsqueeze(-1), 0)

    def store(self, now: Tensor) -> None:
        """Keep the bits, for the next write to be compared with."""
        if self.stored is not None and self.fits(now):
            self.stored.copy_(now)
            return
        with torch.inference_mode(False):  # or it could not be written outside of that mode
            self.stored = now.clone()


class Remainders:
    """Watches split weights: what an element of a weight lacks of its master, its remainder, is void once somebody else wrote the
    element.

    Version counters tell that a weight was written. Its first foreign write voids all of its remainders, since nothing says which
    elements it changed. From then on a copy of its 16 bits is kept after each step, and elements whose bits a write leaves alone
    keep their remainders: a clamp after every step would else undo every step below half an ulp.
    """

    def __init__(self, written: Iterable[Tensor] = ()) -> None:
        """``written``: weights that are known to be written by others, and whose remainders are right."""
        #: By the weight's id, without a reference: a weight that its owner drops is not kept alive, and one that has weak
        #: references cannot be swapped (torch.utils.swap_tensors, FSDP2's ``.to``). ``keep`` drops what is gone. Should another
        #: weight get the id before, its versions or its bits differ.
        self._noted: dict[int, _Noted] = {}
        for p in written:
            self.expect(p)

    def expect(self, p: Tensor) -> None:
        """A weight is known to be written by others, and its remainder is right."""
        self._add(p, written=True)

    def forget(self, p: Tensor) -> None:
        """What has this weight's id is another one than before."""
        self._noted.pop(id(p), None)

    def drop_stale(self, state: State, split: Iterable[Tensor]) -> None:
        """Forget the remainders of elements that somebody else has written since the last step."""
        for p in split:
            noted = self._of(p)
            if noted is None or noted.versions is None or noted.versions == versions_of(p):
                continue
            remainder = state[p].get("remainder") if p in state else None
            if remainder is None:  # its group asks for another format by now
                del self._noted[id(p)]
                continue
            with torch.no_grad():
                now = local(p.detach())
                noted.drop_changed(now, local(remainder))
                noted.store(now)
            noted.versions, noted.written = versions_of(p), True

    def note(self, split: Iterable[Tensor]) -> None:
        """These weights are as their remainders have them."""
        for p in split:
            noted = self._of(p) or self._add(p)
            if noted.written:
                with torch.no_grad():
                    noted.store(local(p.detach()))
            noted.versions = versions_of(p)

    def watched(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of some parameters that are weights of past steps."""
        return [p for p in params if (noted := self._of(p)) is not None and noted.versions is not None]

    def written(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of some parameters that others have written, too."""
        return [p for p in params if (noted := self._of(p)) is not None and noted.written]

    def keep(self, alive: set[int]) -> None:
        """Forget the weights with other ids."""
        self._noted = {key: noted for key, noted in self._noted.items() if key in alive}

    def __len__(self) -> int:
        return len(self._noted)

    def _of(self, p: Tensor) -> _Noted | None:
        return self._noted.get(id(p))

    def _add(self, p: Tensor, written: bool = False) -> _Noted:
        noted = self._noted[id(p)] = _Noted(written)
        return noted


def versions_of(p: Tensor) -> tuple[int, int]:
    """The version counters of a parameter: every write in place advances one."""
    return p._version, local(p)._version
