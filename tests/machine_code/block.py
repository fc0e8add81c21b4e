"""The state of a block of threads, a register being an array over its threads: what instructions read and write."""

from __future__ import annotations

import re

import numpy as np

from .instructions import Instruction, parse
from .sass import Kernel

F32, U32, I32, U64, I64 = np.float32, np.uint32, np.int32, np.uint64, np.int64
LOW = U64(0xFFFFFFFF)
WARP = 32
# Bytes: what a block may have of shared memory, what a thread may have of local memory, and where shared memory that the
# program asks for begins on sm_90.
SHARED, LOCAL, RESERVED_SHARED = 1 << 16, 1024, 0x400
ACCESS_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def wide(x):
    return x.astype(U64)


class Block:
    """Registers, predicates, constant banks and memory. ``m``: the threads that execute the instruction at hand."""

    kernel: Kernel

    def reset(self, threads: int, number: int, parameters: bytes, memory: np.ndarray, base: int) -> None:
        """``memory``: bytes of global memory, the first of them at the address ``base``. Registers start as garbage."""
        self.threads, self.block_number, self.memory, self.base = threads, number, memory, base
        self.lane = np.arange(threads)
        self.same_warp = self.lane[:, None] // WARP == self.lane[None, :] // WARP
        first = np.zeros(0x1000, np.uint8)
        first[0x28:0x2C] = np.frombuffer(RESERVED_SHARED.to_bytes(4, "little"), np.uint8)  # the stack's pointer
        at = self.kernel.parameters_at
        first[at : at + len(parameters)] = np.frombuffer(parameters, np.uint8)
        banks = {bank: np.frombuffer(content + bytes(16), np.uint8) for bank, content in self.kernel.constants.items()}
        self.bank = banks | {0: first}
        self.zero = np.zeros(threads, U32)
        self.R, self.UR = np.full((260, threads), 0xDEADBEEF, U32), np.full((65, threads), 0xDEADBEEF, U32)
        self.P, self.UP = np.zeros((8, threads), bool), np.zeros((8, threads), bool)
        self.shared, self.local = np.zeros(SHARED, np.uint8), np.zeros((threads + 4) * LOCAL, np.uint8)
        self.m = np.ones(threads, bool)

    # Operands.

    def word(self, text: str):
        """32 bits of an operand as integers."""
        x = parse(text)
        value = self.plain_word(x.text)
        if x.part:
            shift, mask = (8, 0xFF) if x.part[0] == "B" else (16, 0xFFFF)
            value = value >> U32(shift * int(x.part[1])) & U32(mask)
        if x.magnitude:
            value = np.abs(value.view(I32)).view(U32)
        if x.minus:
            value = ~value + U32(1)
        return ~value if x.inverted else value

    def plain_word(self, text: str):
        if text in ("RZ", "URZ"):
            return self.zero
        if found := re.match(r"R(\d+)(\.64|\.U32)?$", text):
            return self.R[int(found[1])]
        if found := re.match(r"UR(\d+)$", text):
            return self.UR[int(found[1])]
        if text.startswith("c["):
            return self.constant(text, 4).view(U32)[:, 0].copy()
        if re.match(r"-?(0x[0-9a-f]+|\d+)$", text):
            return np.full(self.threads, int(text, 0) & 0xFFFFFFFF, U32)
        raise NotImplementedError("operand " + text)

    def constant(self, text: str, size: int):
        """``size`` bytes per thread of c[bank][register + offset]."""
        found = re.match(r"c\[(0x\w+)\]\[(U?R\d+|U?RZ)?\+?(-?0x\w+)?\]$", text)
        if found is None:
            raise NotImplementedError("operand " + text)
        offset = np.full(self.threads, int(found[3] or "0", 16), I64)
        if found[2]:
            offset += self.plain_word(found[2]).view(I32)
        bank = self.bank[int(found[1], 16)]
        return bank[np.where(self.m, offset, 0)[:, None] + np.arange(size)]

    def number(self, text: str):
        """An operand as fp32."""
        x = parse(text)
        if re.match(r"U?R\d+$|U?RZ$|c\[", x.text):
            value = self.plain_word(x.text).view(F32)
        else:
            value = np.full(self.threads, float(x.text.replace("QNAN", "nan")), F32)
        if x.magnitude:
            value = (value.view(U32) & U32(0x7FFFFFFF)).view(F32)
        return (value.view(U32) ^ U32(0x80000000)).view(F32) if x.minus else value

    def pair(self, text: str):
        """64 bits of an operand."""
        if text in ("RZ", "URZ"):
            return np.zeros(self.threads, U64)
        if text.startswith("c["):
            return self.constant(text, 8).view(U64)[:, 0].copy()
        if found := re.match(r"(U?R)(\d+)", text):
            file, k = self.UR if found[1] == "UR" else self.R, int(found[2])
            return wide(file[k]) | wide(file[k + 1]) << U64(32)
        return np.full(self.threads, int(text, 16) & 2**64 - 1, U64)

    def truth(self, text: str):
        """A predicate."""
        name = text.lstrip("!")
        if name in ("PT", "UPT"):
            value = np.ones(self.threads, bool)
        else:
            value = self.UP[int(name[2:])] if name[0] == "U" else self.P[int(name[1:])]
        return ~value if text.startswith("!") else value.copy()

    def put(self, register: str, value) -> None:
        """Into the active threads; a uniform register takes the value of each warp's first active one."""
        if register in ("RZ", "URZ", "PT", "UPT"):
            return
        letters, number = re.match(r"([A-Z]+)(\d+)", register).groups()
        file, k = {"UP": self.UP, "UR": self.UR, "P": self.P, "R": self.R}[letters], int(number)
        value = np.broadcast_to(value, (self.threads,))
        if letters[-1] == "P":
            value = value.astype(bool)
        else:
            value = value.view(U32) if value.dtype.itemsize == 4 else value.astype(U32)
        if letters[0] != "U":
            file[k][self.m] = value[self.m]
            return
        for warp in range(0, self.threads, WARP):
            active = np.flatnonzero(self.m[warp : warp + WARP])
            if len(active):
                file[k][warp : warp + WARP] = value[warp + active[0]]

    def put_pair(self, register: str, value) -> None:
        self.put(register, (value & LOW).astype(U32))
        if not register.endswith("RZ"):
            letters, number = re.match(r"(U?R)(\d+)", register).groups()
            self.put(f"{letters}{int(number) + 1}", (value >> U64(32)).astype(U32))

    # Memory.

    def address(self, text: str):
        total = np.zeros(self.threads, I64)
        for part in re.findall(r"[+-]?[^+-]+", re.sub(r"desc\[UR\d+\]", "", text).strip("[]")):
            sign, part = (-1 if part[0] == "-" else 1), part.lstrip("+-")
            if part.startswith("0x"):
                total += sign * int(part, 16)
            elif part.endswith(".64"):
                total += sign * self.pair(part[:-3]).view(I64)
            elif part.endswith(".X4"):
                total += 4 * self.word(part[:-3]).astype(I64)
            else:
                total += self.word(part).astype(I64)
        return total

    def places(self, i: Instruction, text: str):
        """The memory that an access goes to, where in it for each active thread, and how many bytes."""
        size = next((ACCESS_BYTES[mod] for mod in ACCESS_BYTES if mod in i.mods), 4)
        address = self.address(text)
        if i.name in ("LDS", "STS"):
            memory = self.shared
        elif i.name in ("LDL", "STL"):
            memory, address = self.local, address + self.lane * LOCAL
        else:
            memory, address = self.memory, address - self.base
        at = address[self.m]
        if (at < 0).any() or (at + size > len(memory)).any() or (at % size != 0).any():
            raise RuntimeError(f"out of bounds or misaligned: {i.op} {text}, at {at[:4]} of {len(memory)}")
        return memory, at[:, None] + np.arange(size), size

    def load(self, i: Instruction) -> None:
        memory, at, size = self.places(i, i.operands[1])
        loaded = np.zeros((self.threads, max(size, 4)), np.uint8)
        loaded[self.m, :size] = memory[at]
        if i.mods & {"S8", "S16"}:
            loaded[:, size:] = np.where(loaded[:, size - 1 : size] & 0x80, 0xFF, 0)
        if i.operands[0] != "RZ":
            for k, value in enumerate(loaded.view(U32).T):
                self.put(f"R{int(i.operands[0][1:]) + k}", np.ascontiguousarray(value))

    def store(self, i: Instruction) -> None:
        memory, at, size = self.places(i, i.operands[0])
        words, source = max(1, size // 4), i.operands[1]
        data = [self.zero if source == "RZ" else self.R[int(source[1:]) + k] for k in range(words)]
        memory[at] = np.stack(data, 1).view(np.uint8)[self.m, :size]
