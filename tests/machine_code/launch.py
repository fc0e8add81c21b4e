"""Puts operands, tables and parameters where kernels look for them, as csrc's launchers and triton_kernels do.

A kernel is given two tensors and two chunks, and block 1 is executed: it must find the second of each. What belongs to the first
is 0 or NaN.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from .build import Built
from .cpu_text import Operand
from .inputs import Input

BASE = 0x10000000  # where the memory begins that kernels see
MEMORY = 1 << 19
CUDA_THREADS, CUDA_CHUNK = 256, 8192  # kThreads, kBlockElements: kernels.cu asserts them


class Memory:
    """What a kernel sees: arrays, with bytes between them that it must leave alone."""

    def __init__(self) -> None:
        self.bytes, self.free, self.end = np.full(MEMORY, 0xA5, np.uint8), np.ones(MEMORY, bool), 256

    def put(self, array: np.ndarray | bytes, offset: int = 0) -> int:
        """The address of a copy, ``offset`` bytes behind a multiple of 256."""
        data = np.frombuffer(array, np.uint8) if isinstance(array, bytes) else array.view(np.uint8)
        at = (self.end + 255) // 256 * 256 + offset
        self.end = at + len(data) + 64
        self.bytes[at : at + len(data)] = data
        return BASE + at

    def take(self, address: int, like: np.ndarray) -> np.ndarray:
        """What is there now. From here on, what was written there is no fault."""
        place = slice(address - BASE, address - BASE + like.nbytes)
        self.free[place] = False
        return self.bytes[place].copy().view(like.dtype)


class Launch(NamedTuple):
    memory: Memory
    addresses: list[tuple[int, int]]  # of each operand, and of what lies beside it
    operands_end: int
    parameters: bytes


def chunk_of(built: Built) -> int:
    return built.layout.get("block", CUDA_CHUNK)


def threads_of(built: Built) -> int:
    return built.layout.get("threads", CUDA_THREADS)


def launch(built: Built, operands: list[Operand], given: Input, grad_coef: float, row: np.ndarray) -> Launch:
    memory, offset = Memory(), given.offset * operands[0].data.itemsize
    addresses = [(memory.put(o.data, 0 if k else offset), memory.put(o.beside)) for k, o in enumerate(operands)]
    operands_end = BASE + memory.end
    rows = memory.put(np.concatenate([np.full_like(row, np.nan), row]))
    tables = triton_tables if built.layout else cuda_tables
    parameters = tables(built, memory, operands, addresses, given, grad_coef, rows)
    return Launch(memory, addresses, operands_end, parameters)


def cuda_tables(built, memory, operands, addresses, given, grad_coef, rows) -> bytes:
    """The structures whose layout kernels.cu asserts."""
    packed = b"".join(
        struct.pack("<QiiQ", data, operand.number, strides, beside)
        for operand, (data, beside), strides in zip(operands, addresses, given.strides(len(operands)), strict=True)
    )
    draws = any(operand.draws for operand in operands)
    numel, begin = given.in_tables
    tensor = packed.ljust(144, b"\0") + struct.pack("<qqqqifi4x", numel, *given.place, 1, given.sign, draws)
    pointers = {
        "DeviceTensor": memory.put(bytes(len(tensor)) + tensor),
        "DeviceChunk": memory.put(struct.pack("<qi4xqi4x", 0, 0, begin, 1)),
        "Strides": memory.put(given.layouts()),
        "float": rows,
        "Control": memory.put(np.array([grad_coef, given.skip, given.clip], np.float32)),
        "Noting": 0,
    }
    return b"".join(struct.pack("<Q", pointers[type]) for type in built.kernel.parameters)


def triton_tables(built, memory, operands, addresses, given, grad_coef, rows) -> bytes:
    """The tables of triton_kernels/launch.py, address_table and chunk_table, and what the prologue leaves."""
    layout = built.layout
    slots = np.zeros(2 * layout["slots"], np.int64)
    of_second = slots[layout["slots"] :]
    for k, (operand, (data, beside)) in enumerate(zip(operands, addresses, strict=True)):
        of_second[k], of_second[layout["beside"] + k] = data, beside if len(operand.beside) else 0
    row = given.place[1]
    in_runs = all(number % 8 == 0 for number in given.place) and (row == 0 or row >= layout["block"])
    aligned = in_runs and not (of_second % 16).any()
    numel, begin = given.in_tables
    of_second[layout["numel"]], of_second[layout["numel"] + 1] = numel, numel if aligned else 0
    of_second[layout["place"] : layout["place"] + 3] = given.place
    values = [
        memory.put(np.array([0, 0, 1, begin], np.int64)),
        memory.put(slots),
        rows,
        memory.put(np.array([given.skip, np.nan, given.sign * grad_coef], np.float32)),
        given.clip,
    ]
    parameters = b""
    for k, type in enumerate(layout["parameters"]):
        code, size = {"u64": ("Q", 8), "f32": ("f", 4)}[type]
        parameters += bytes(-len(parameters) % size) + struct.pack("<" + code, values[k] if k < len(values) else 0)
    return parameters
