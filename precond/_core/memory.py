"""Where tensors lie in memory, and whether two that a step writes share some of it."""

from __future__ import annotations

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


class Span(NamedTuple):
    """The stretch of memory that a tensor's elements lie in."""

    start: int
    end: int
    name: str
    tensor: Tensor
    dense: bool


def check_overlap(tensors: list[tuple[str, Tensor]]) -> None:
    """Raise if two of the tensors that a step writes share memory, or one shares it with itself."""
    spans = []
    for name, tensor in tensors:
        if tensor.numel() == 0 or not _backend.has_plain_memory(tensor):
            continue
        if not apart(tensor) and torch.unique(element_addresses(tensor)).numel() != tensor.numel():
            raise RuntimeError(
                f"{name} must not overlap itself, got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        spans.append(Span(start, start + (last + 1) * tensor.element_size(), name, tensor, dense(tensor)))
    open_spans: list[Span] = []
    for span in sorted(spans, key=lambda span: span[:2]):
        open_spans = [other for other in open_spans if other.end > span.start]
        for other in open_spans:
            both_dense = other.dense and span.dense
            if both_dense or torch.isin(element_addresses(other.tensor), element_addresses(span.tensor)).any():
                raise RuntimeError(f"{other.name} and {span.name} must not share memory: a step writes both")
        open_spans.append(span)
