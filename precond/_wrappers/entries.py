"""What wrappers keep among the states of an optimizer: entries whose names begin with a wrapper's prefix."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

#: The prefixes of all wrapper classes. One around another of its class has a number behind it.
_PREFIXES: set[str] = set()


def add_prefix(prefix: str) -> None:
    """Let ``is_entry`` know the prefix of a class."""
    _PREFIXES.add(prefix)
    is_entry.cache_clear()


@functools.cache
def is_entry(name: object) -> bool:
    """True for the name of a wrapper's entry, whichever wrapper it belongs to."""
    return isinstance(name, str) and any(re.match(rf"{prefix}\d*_", name) for prefix in _PREFIXES)


class Entries(MutableMapping[str, Any]):
    """The entries of one parameter under their names without the prefix."""

    def __init__(self, state: MutableMapping[str, Any], start: str) -> None:
        self._state, self._start = state, start

    def __getitem__(self, name: str) -> Any:
        return self._state[self._start + name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._state[self._start + name] = value

    def __delitem__(self, name: str) -> None:
        del self._state[self._start + name]

    def __iter__(self) -> Iterator[str]:
        names = [str(name) for name in self._state]
        return (name[len(self._start) :] for name in names if name.startswith(self._start))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


class Own(MutableMapping[Tensor, MutableMapping[str, Any]]):
    """What a wrapper keeps per parameter, for those that have any: a view of ``state`` that may be written."""

    def __init__(
        self, state: MutableMapping[Tensor, dict[str, Any]], params: Callable[[], Iterable[Tensor]], start: str
    ) -> None:
        self._state, self._params, self._start = state, params, start

    def __getitem__(self, p: Tensor) -> Entries:
        found = Entries(self._state.get(p) or {}, self._start)
        if not found:
            raise KeyError(p)
        return found

    def __setitem__(self, p: Tensor, values: Mapping[str, Any]) -> None:
        values = dict(values)
        if not self._state.get(p):
            self._state[p] = {}
        entries = Entries(self._state[p], self._start)
        entries.clear()
        entries.update(values)

    def __delitem__(self, p: Tensor) -> None:
        self[p].clear()
        if not self._state[p]:
            del self._state[p]

    def __iter__(self) -> Iterator[Tensor]:
        return (p for p in self._params() if Entries(self._state.get(p) or {}, self._start))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))
