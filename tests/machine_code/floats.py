"""fp32 arithmetic and conversions. A method do_NAME executes the instructions NAME, whatever their modifiers."""

from __future__ import annotations

import ctypes

import numpy as np

from .block import F32, I32, U32, U64, Block, wide
from .instructions import only

ROUNDING = {"RN": 0, "RZ": 1, "RM": 2, "RP": 3}  # the modes of fp.c
COMPARISONS = ("GTU", "GEU", "LTU", "LEU", "NEU", "EQU", "GT", "GE", "LT", "LE", "EQ", "NE", "NAN", "NUM")
NAN = U32(0x7FFFFFFF)  # what arithmetic makes
SMALL = {"S8": np.int8, "U8": np.uint8, "S16": np.int16, "U16": np.uint16}


def pointer(array) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


class Floats(Block):
    fp: ctypes.CDLL  # fp.c

    def arithmetic(self, function, i, to, *operands):
        numbers = [np.ascontiguousarray(self.number(x)) for x in operands]
        result = np.empty(self.threads, F32)
        mode = next((ROUNDING[mod] for mod in ROUNDING if mod in i.mods), 0)
        function(*map(pointer, (*numbers, result)), self.threads, mode, int("FTZ" in i.mods))
        self.put(to, result)

    def do_FADD(self, i, *operands):
        self.arithmetic(self.fp.fadd, i, *operands)

    def do_FMUL(self, i, *operands):
        self.arithmetic(self.fp.fmul, i, *operands)

    def do_FFMA(self, i, *operands):
        self.arithmetic(self.fp.ffma, i, *operands)

    def do_MUFU(self, i, to, source):
        only(i.op in ("MUFU.RCP", "MUFU.RSQ"), i)
        function = self.fp.mufu_rcp if "RCP" in i.mods else self.fp.mufu_rsq
        x, result = np.ascontiguousarray(self.number(source)), np.empty(self.threads, F32)
        function(pointer(x), pointer(result), self.threads)
        self.put(to, result)

    def do_FCHK(self, i, to, a, b):
        of_a, of_b = ((self.number(x).view(U32) >> U32(23) & U32(255)).astype(I32) for x in (a, b))
        self.put(to, (of_a < 27) | (of_a > 250) | (of_b < 3) | (of_b > 250) | (np.abs(of_a - of_b) > 120))

    def do_FSEL(self, i, to, a, b, predicate):
        self.put(to, np.where(self.truth(predicate), self.number(a), self.number(b)))

    def compared(self, i, a, b):
        x, y = self.number(a), self.number(b)
        if "FTZ" in i.mods:
            x, y = (np.where(np.abs(z) < F32(2.0**-126), F32(0), z) for z in (x, y))
        unordered = np.isnan(x) | np.isnan(y)
        name = next(mod for mod in COMPARISONS if mod in i.mods)
        if name in ("NAN", "NUM"):
            return unordered if name == "NAN" else ~unordered
        result = {"GT": x > y, "GE": x >= y, "LT": x < y, "LE": x <= y, "EQ": x == y, "NE": x != y}[name[:2]]
        return result | unordered if name.endswith("U") else result & ~unordered

    def do_FSETP(self, i, to, inverse, a, b, also):
        only(inverse == "PT" and "XOR" not in i.mods, i)
        result, also = self.compared(i, a, b), self.truth(also)
        self.put(to, result | also if "OR" in i.mods else result & also)

    def do_FSET(self, i, to, a, b, also):
        only("BF" in i.mods and also == "PT", i)
        self.put(to, np.where(self.compared(i, a, b), F32(1), F32(0)))

    def do_FMNMX(self, i, to, a, b, take_least):
        only("FTZ" not in i.mods, i)
        x, y = self.number(a), self.number(b)
        least = np.where((x < y) | (x == y) & np.signbit(x), x, y)
        most = np.where((x > y) | (x == y) & ~np.signbit(x), x, y)
        result = np.where(self.truth(take_least), least, most).view(U32)
        if "NAN" in i.mods:
            result = np.where(np.isnan(x) | np.isnan(y), NAN, result)
        else:
            one = np.where(np.isnan(x), np.where(np.isnan(y), NAN, y.view(U32)), x.view(U32))
            result = np.where(np.isnan(x) | np.isnan(y), one, result)
        self.put(to, result)

    # Conversions.

    def do_F2FP(self, i, to, high, low):
        only(i.mods >= {"PACK_AB"} and i.mods & {"BF16", "F16"}, i)

        def half(text):
            x = np.ascontiguousarray(self.number(text))
            bits = wide(x.view(U32))
            rounded = (bits + U64(0x7FFF) + (bits >> U64(16) & U64(1)) >> U64(16)).astype(U32)
            if "F16" in i.mods:
                rounded = x.astype(np.float16).view(np.uint16).astype(U32)
            return np.where(np.isnan(x), U32(0x7FFF), rounded)

        self.put(to, half(high) << U32(16) | half(low))

    def do_F2F(self, i, to, source):
        """fp32 to fp16; no other use is known."""
        only(i.op == "F2F.F16.F32", i)
        x = np.ascontiguousarray(self.number(source))
        self.put(to, np.where(np.isnan(x), U32(0x7FFF), x.astype(np.float16).view(np.uint16).astype(U32)))

    def do_HADD2(self, i, to, zero, source):
        """fp16 to fp32; no other use is known."""
        only(i.op == "HADD2.F32" and zero == "-RZ", i)
        self.put(to, self.word(source).astype(np.uint16).view(np.float16).astype(F32))

    def do_I2F(self, i, to, source):
        x = self.word(source)
        if "U64" in i.mods:
            exact = self.pair(source)
        elif i.mods & SMALL.keys():
            exact = x.astype(next(SMALL[mod] for mod in SMALL if mod in i.mods))
        else:
            exact = x if "U32" in i.mods else x.view(I32)
        result = exact.astype(F32)
        if "RP" in i.mods:
            too_small = result.astype(np.longdouble) < exact.astype(np.longdouble)  # 64 bits of mantissa
            result = np.where(too_small, np.nextafter(result, F32(np.inf)), result)
        self.put(to, result)

    do_I2FP = do_I2F

    def do_F2I(self, i, to, source):
        only("TRUNC" in i.mods and not i.mods & {"S64", *SMALL}, i)
        x = np.trunc(self.number(source).astype(np.longdouble))
        if "NTZ" not in i.mods and np.isnan(x[self.m]).any():
            raise RuntimeError(f"an integer of a NaN: {i}")
        x = np.nan_to_num(x, nan=0.0)
        if "U64" in i.mods:
            self.put_pair(to, np.clip(x, 0, 2**64 - 1).astype(U64))
        elif "U32" in i.mods:
            self.put(to, np.clip(x, 0, 2**32 - 1).astype(U32))
        else:
            self.put(to, np.clip(x, -(2**31), 2**31 - 1).astype(I32))
