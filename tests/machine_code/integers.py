"""Moves and integer arithmetic. A method do_NAME executes the instructions NAME and UNAME, whatever their modifiers."""

from __future__ import annotations

import functools

import numpy as np

from .block import I32, I64, LOW, U32, U64, WARP, Block, wide
from .instructions import is_predicate, only, parse


def table_of(lut: int, a, b, c):
    """The bitwise function of three inputs with this table, of words or of truth values."""
    result = np.zeros_like(a)
    for k in range(8):
        if lut >> k & 1:
            result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return result


class Integers(Block):
    # Loads, stores and moves.

    def do_LDG(self, i, *_):
        self.load(i)

    def do_STG(self, i, *_):
        self.store(i)

    do_LD = do_LDS = do_LDL = do_LDG
    do_ST = do_STS = do_STL = do_STG

    def do_LDC(self, i, to, source):
        if "64" in i.mods:
            self.put_pair(to, self.pair(source))
        else:
            self.put(to, self.word(source))

    def matrices(self, i, address: str):
        """Of LDSM and STSM: the active warps, and where in shared memory their threads' four words are, two 16-bit items each."""
        only(i.mods >= {"16", "4"} and i.mods & {"M88", "MT88"}, i)
        self.need_whole_warps(i)
        warps = np.flatnonzero(self.m[::WARP])
        rows = self.address(address).reshape(-1, 4, 8)[warps]  # by warp and matrix: addresses of its rows of 16 bytes
        if (rows < 0).any() or (rows + 16 > len(self.shared)).any() or (rows % 16 != 0).any():
            raise RuntimeError(f"out of bounds or misaligned: {i}")
        row, column = np.arange(WARP) // 4, 2 * (np.arange(WARP) % 4)
        items = [(row, column), (row, column + 1)]
        if "MT88" in i.mods:
            items = [(column, row) for row, column in items]
        at = np.stack([rows[:, :, row] + 2 * column for row, column in items], -1)  # warp, matrix, thread, item
        return warps, at[..., None] + np.arange(2)

    def do_LDSM(self, i, to, address):
        warps, at = self.matrices(i, address)
        loaded = np.zeros((self.threads // WARP, 4, WARP, 4), np.uint8)
        loaded[warps] = self.shared[at].reshape(-1, 4, WARP, 4)
        for k in range(4):
            self.put(f"R{int(to[1:]) + k}", np.ascontiguousarray(loaded[:, k]).view(U32).reshape(-1))

    def do_STSM(self, i, address, source):
        warps, at = self.matrices(i, address)
        for k in range(4):
            data = self.R[int(source[1:]) + k].view(np.uint8).reshape(-1, WARP, 2, 2)
            self.shared[at[:, k]] = data[warps]

    def do_S2R(self, i, to, source):
        lane = self.lane.astype(U32)
        of = {
            "SR_TID.X": lane,
            "SR_CTAID.X": np.full(self.threads, self.block_number, U32),
            "SR_LANEID": lane % U32(WARP),
            "SR_CgaCtaId": self.zero,
            "SR_SWINHI": self.zero,  # of addresses of shared memory, which are used where statistics are taken: not here
        }
        only(source in of, i)
        self.put(to, of[source])

    do_S2UR = do_S2R

    def do_CS2R(self, i, to, source):
        only(source == "SRZ", i)
        self.put_pair(to, np.zeros(self.threads, U64))

    def do_MOV(self, i, to, source):
        self.put(to, self.word(source))

    def do_R2UR(self, i, to, *sources):
        self.put(to, self.word(sources[-1]))

    def do_P2R(self, i, to, _, other, mask):
        only(i.op == "P2R", i)
        predicates = sum((self.P[k].astype(U32) << U32(k) for k in range(7)), self.zero)
        mask = self.word(mask)
        self.put(to, predicates & mask | self.word(other) & ~mask)

    def do_SEL(self, i, to, a, b, predicate):
        self.put(to, np.where(self.truth(predicate), self.word(a), self.word(b)))

    def do_PRMT(self, i, to, a, selector, b):
        only(not i.mods, i)
        select, both, result = self.word(selector), wide(self.word(b)) << U64(32) | wide(self.word(a)), self.zero.copy()
        for k in range(4):
            nibble = select >> U32(4 * k) & U32(15)
            byte = (both >> wide(nibble & U32(7)) * U64(8)).astype(U32) & U32(0xFF)
            signs = np.where(byte & U32(0x80), U32(0xFF), U32(0))
            result |= np.where(nibble & U32(8), signs, byte) << U32(8 * k)
        self.put(to, result)

    def need_whole_warps(self, i) -> None:
        if (self.same_warp[self.m] & self.alive & ~self.m).any():
            raise RuntimeError(f"without all threads of the warp: {i}")

    def do_SHFL(self, i, predicate, to, source, lane_mask, clamp):
        only("BFLY" in i.mods and predicate == "PT", i)
        self.need_whole_warps(i)
        self.put(to, self.word(source)[self.lane ^ int(lane_mask, 16)])

    def do_REDUX(self, i, to, source):
        only(i.mods == {"MAX", "S32"}, i)
        self.need_whole_warps(i)
        most = self.word(source).view(I32).reshape(-1, WARP).max(1)
        self.put(to, np.repeat(most, WARP))

    def do_VOTEU(self, i, to, source):
        only(i.mods == {"ANY"}, i)
        self.put(to, np.repeat((self.truth(source) & self.m).reshape(-1, WARP).any(1), WARP))

    # Arithmetic.

    def sum_of(self, operands):
        """64 bits. A negated register counts as its inverse and 1, so that it carries where it is 0."""
        total = np.zeros(self.threads, U64)
        for text in operands:
            value = self.word(text)
            total += wide(value)
            if parse(text).minus:
                total += wide(value == 0) << U64(32)
        return total

    def do_IADD3(self, i, to, *operands):
        carries = [x for x in operands[:2] if is_predicate(x)]
        rest = operands[len(carries) :]
        total = self.sum_of(rest[:3])
        if "X" in i.mods:
            for carry in rest[3:5]:
                total += wide(self.truth(carry))
        for k, carry in enumerate(carries):
            self.put(carry, total >> U64(32) > k)
        self.put(to, (total & LOW).astype(U32))

    def do_VIADD(self, i, to, a, b):
        self.put(to, self.word(a) + self.word(b))

    def do_IABS(self, i, to, a):
        self.put(to, np.abs(self.word(a).view(I32)).view(U32))

    def do_IMAD(self, i, to, *operands):
        carry = operands[0] if is_predicate(operands[0]) else None
        a, b, c = operands[carry is not None :][:3]
        product = wide(self.word(a)) * wide(self.word(b))
        if i.mods & {"WIDE", "HI"}:  # c has 64 bits
            if "U32" not in i.mods:
                product = (self.word(a).view(I32).astype(I64) * self.word(b).view(I32).astype(I64)).view(U64)
                only(not carry and "HI" not in i.mods, i)
            total = product + self.pair(c)
            if carry:
                self.put(carry, total < product)
            if "WIDE" in i.mods:
                self.put_pair(to, total)
            else:
                self.put(to, (total >> U64(32)).astype(U32))
            return
        total = (product & LOW) + wide(self.word(c))
        if "X" in i.mods:
            total += wide(self.truth(operands[-1]))
        if carry:
            self.put(carry, total >> U64(32) != 0)
        self.put(to, (total & LOW).astype(U32))

    def do_LEA(self, i, to, *operands):
        carry = operands[0] if is_predicate(operands[0]) else None
        a, b, *rest = operands[carry is not None :]
        if "HI" not in i.mods:
            shift = int(rest.pop(0), 16)
            shifted = wide(self.word(a)) << U64(shift) & LOW
        elif "SX32" in i.mods:
            shift = int(rest.pop(0), 16)
            shifted = (self.word(a).view(I32).astype(I64) << shift >> 32).view(U64) & LOW
        else:
            upper, shift = rest.pop(0), int(rest.pop(0), 16)
            shifted = (wide(self.word(upper)) << U64(32) | wide(self.word(a))) << U64(shift) >> U64(32)
        total = shifted + wide(self.word(b))
        if "X" in i.mods:
            total += wide(self.truth(rest[0]))
        if carry:
            self.put(carry, total >> U64(32) != 0)
        self.put(to, (total & LOW).astype(U32))

    def do_SGXT(self, i, to, a, bits):
        """The lowest bits, with their sign or with zeros."""
        only(i.mods <= {"U32"}, i)
        above = U32(32 - int(bits, 16))
        value = self.word(a) << above
        self.put(to, value >> above if "U32" in i.mods else (value.view(I32) >> I32(above)).view(U32))

    def do_LOP3(self, i, *operands):
        test = operands[0] if is_predicate(operands[0]) else None
        to, a, b, c, lut, also = operands[test is not None :]
        result = table_of(int(lut, 16), self.word(a), self.word(b), self.word(c))
        if test:
            found = result != 0
            self.put(test, found & self.truth(also) if "PAND" in i.mods else found | self.truth(also))
        self.put(to, result)

    def do_PLOP3(self, i, to, other, a, b, c, lut, *_):
        only(other in ("PT", "UPT"), i)
        self.put(to, table_of(int(lut, 16), self.truth(a), self.truth(b), self.truth(c)))

    def do_SHF(self, i, to, low, shift, high):
        only("W" not in i.mods, i)
        amount, upper = self.word(shift), self.word(high)
        both = wide(upper) << U64(32) | wide(self.word(low))
        if not i.mods & {"U64", "S64"}:
            amount = np.minimum(amount, U32(32))
        if "L" in i.mods:
            result = both << wide(amount)
        elif "S64" in i.mods:
            result = (both.view(I64) >> amount.astype(I64)).view(U64)
        elif "S32" in i.mods and "HI" in i.mods:
            result = (upper.view(I32).astype(I64) >> amount.astype(I64)).view(U64) << U64(32)
        elif "HI" in i.mods and "U64" not in i.mods:
            result = wide(upper) >> wide(amount) << U64(32)
        else:
            result = both >> wide(amount)
        self.put(to, (result >> U64(32) if "HI" in i.mods else result & LOW).astype(U32))

    # Comparisons.

    def do_ISETP(self, i, to, inverse, a, b, also, *low):
        only("XOR" not in i.mods, i)
        x, y = self.word(a), self.word(b)
        if "U32" not in i.mods:
            x, y = x.view(I32), y.view(I32)
        name = next(mod for mod in ("EQ", "NE", "LT", "LE", "GT", "GE") if mod in i.mods)
        result = {"EQ": x == y, "NE": x != y, "LT": x < y, "LE": x <= y, "GT": x > y, "GE": x >= y}[name]
        if "EX" in i.mods:  # the upper halves; `low` is what the lower ones gave
            lower = self.truth(low[0])
            strict = {"LT": x < y, "LE": x < y, "GT": x > y, "GE": x > y}
            if name == "EQ":
                result &= lower
            elif name == "NE":
                result |= lower
            else:
                result = strict[name] | (x == y) & lower
        also = self.truth(also)
        self.put(inverse, ~result | also if "OR" in i.mods else ~result & also)
        self.put(to, result | also if "OR" in i.mods else result & also)

    def do_VIMNMX(self, i, to, *operands):
        *values, take_least = operands
        only(i.mods <= {"U32", "S32", "S16x2", "RELU"}, i)
        if "S16x2" in i.mods:
            self.put(to, self.in_halves(i, values, take_least))
            return
        values = [self.word(x) if "U32" in i.mods else self.word(x).view(I32) for x in values]
        least, most = functools.reduce(np.minimum, values), functools.reduce(np.maximum, values)
        result = np.where(self.truth(take_least), least, most)
        self.put(to, np.maximum(result, 0) if "RELU" in i.mods else result)

    do_IMNMX = do_VIMNMX3 = do_VIMNMX

    def in_halves(self, i, values, take_least):
        """The least or the most of signed halves, each of its own."""
        only("RELU" not in i.mods and not any(parse(x).part or parse(x).minus for x in values), i)
        halves = [self.word(x).view(np.int16).reshape(-1, 2) for x in values]
        least, most = functools.reduce(np.minimum, halves), functools.reduce(np.maximum, halves)
        return np.ascontiguousarray(np.where(self.truth(take_least)[:, None], least, most)).view(U32)[:, 0]

    def do_VIADDMNMX(self, i, to, a, b, c, take_least):
        x, y = self.word(a) + self.word(b), self.word(c)
        if "U32" not in i.mods:
            x, y = x.view(I32), y.view(I32)
        result = np.where(self.truth(take_least), np.minimum(x, y), np.maximum(x, y))
        self.put(to, np.maximum(result, 0) if "RELU" in i.mods else result)

    # Two 16-bit constants; no other use is known.

    def do_HFMA2(self, i, to, a, b, high, low):
        only(a.strip("-") == "RZ" and b.strip("-") == "RZ", i)
        high, low = (int(np.float16(float(x)).view(np.uint16)) for x in (high, low))
        self.put(to, np.full(self.threads, high << 16 | low, U32))
