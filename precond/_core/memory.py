"""Where tensors lie in memory, and whether two that a step writes share some of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend as _backend


def dense(tensor: Tensor) -> bool:
    """True where the elements fill one stretch of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def apart(tensor: Tensor) -> bool:
    """True where each dimension steps over all that the faster ones span, so that no two elements can meet."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def element_addresses(tensor: Tensor) -> Tensor:
    """Byte addresses of all elements; only for the layouts that need it."""
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size, device="cpu") * stride
    return (offsets * tensor.element_size() + tensor.data_ptr()).flatten()


class Written(NamedTuple):
    """A tensor that a step writes: a parameter, or one of its states."""

    #: Of the parameter among all, and its name.
    number: int
    name: str
    #: Of the state; empty for the parameter itself.
    key: str
    tensor: Tensor

    def __str__(self) -> str:
        return f"{self.key} of {self.name}" if self.key else self.name


class Span(NamedTuple):
    """The stretch of memory that a tensor's elements lie in."""

    start: int
    end: int
    owner: Written
    dense: bool


class Memory:
    """Whether tensors that steps write share memory. Keeps where they lie, not the tensors."""

    def __init__(self) -> None:
        self._spans = None if _backend._C is None else _backend._C.Spans(_backend.reader())

    def meeting(self, tensors: list[Tensor]) -> list[int]:
        """The places in the list of those that may share memory with another, given now or earlier, or with themselves."""
        return list(range(len(tensors))) if self._spans is None else self._spans.add(tensors)

    def check(
        self, tensors: list[Tensor], owners: list[tuple[int, str]], about: Callable[[int], tuple[str, bool]]
    ) -> set[int]:
        """Raise if two of the tensors share memory, or one shares it with itself. ``owners``: of each the number of its parameter
        and the key of the state, empty for the parameter itself. ``about``: by its number a parameter's name, and whether this
        step updates it. Of those that it does not it returns the numbers of those that would share memory if they were updated.
        """
        written, moving = [], set()
        for place in self.meeting(tensors):
            number, key = owners[place]
            name, moves = about(number)
            written.append(Written(number, name, key, tensors[place]))
            if moves:
                moving.add(number)
        return _shared(written, moving)


def _shared(written: list[Written], moving: set[int]) -> set[int]:
    spans: list[Span] = []
    shared: set[int] = set()
    for item in written:
        tensor = item.tensor
        if tensor.numel() == 0 or not _backend.has_plain_memory(tensor):
            continue
        if not apart(tensor) and torch.unique(element_addresses(tensor)).numel() != tensor.numel():
            if item.number in moving:
                raise RuntimeError(
                    f"{item} must not overlap itself, got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
                )
            shared.add(item.number)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        spans.append(Span(start, start + (last + 1) * tensor.element_size(), item, dense(tensor)))
    open_spans: list[Span] = []
    for span in sorted(spans, key=lambda span: span[:2]):
        open_spans = [other for other in open_spans if other.end > span.start]
        for other in open_spans:
            tensors = [each.owner.tensor for each in (other, span)]
            if (other.dense and span.dense) or torch.isin(*map(element_addresses, tensors)).any():
                still = {each.owner.number for each in (other, span)} - moving
                if not still:
                    raise RuntimeError(f"{other.owner} and {span.owner} must not share memory: a step writes both")
                shared |= still
        open_spans.append(span)
    return shared
