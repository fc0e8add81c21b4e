"""Tables in device memory, and the order that tensors are visited in."""

import functools
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


@functools.lru_cache(maxsize=4096)
def storage_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """The dimensions from the slowest to the fastest in memory, and whether the elements then fill one stretch of it."""
    order = tuple(sorted(range(len(shape)), key=lambda d: -strides[d] if shape[d] > 1 else 0))
    expected = 1
    for d in reversed(order):
        if shape[d] != 1 and strides[d] != expected:
            return order, False
        expected *= shape[d]
    return order, True


def in_order(p: Tensor, g: Tensor) -> Tensor:
    """A gradient whose memory is in the visiting order of its parameter: itself, or a dense copy."""
    order, dense = storage_order(p.shape, p.stride())
    return g if dense and g.stride() == p.stride() else g.permute(order).contiguous()


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; ``host.to(device)`` would wait for the device. Not to be captured into a graph."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


# What the host last put into each table, and the table in device memory.
_tables: dict[Hashable, tuple[list, Tensor]] = {}
_TABLES_KEPT = 256


def table(key: Hashable, values: list, make: Callable[[list], Tensor], device: torch.device) -> Tensor:
    """A table made from these values, in device memory: the one of the last step if they are the same. Does not wait."""
    if device.type == "cuda":
        # A table of another stream may not have arrived yet, and its memory may be used again before this stream has read it.
        key = (torch.cuda.current_stream(device).cuda_stream, key)
    kept = _tables.pop(key, None)
    if kept is None or kept[0] != values:
        with torch.device("cpu"):
            host = make(values)
        kept = values, sent(host, device)
    while len(_tables) >= _TABLES_KEPT:
        del _tables[next(iter(_tables))]
    _tables[key] = kept
    return kept[1]
