"""Executes the SASS of a kernel for sm_90 on the CPU: one block of threads.

Modelled
- Predicates and divergence: of a warp, the threads at the smallest address go first; threads wait at BSYNC for those that met
  in BSSY, at WARPSYNC for the warp, at BAR for the block. An instruction counts once for each warp that executes it,
  however few of its threads do.
- Registers, uniform registers (one value per warp), constant banks; global memory as one stretch whose bounds and
  alignment are checked; shared and local memory; SHFL.BFLY, REDUX, LDSM and STSM, which need all threads of a warp.
- fp32 with rounding modes, FTZ and fused multiply-add, and the NaN that arithmetic makes, 0x7fffffff (fp.c).
- MUFU.RCP and MUFU.RSQ: the rounded result moved by -1, 0 or 1 ulp at random, because the last bit that a chip returns is not
  specified. Bits that come out equal do not depend on it.

Assumed
- FCHK sends a division to its slow path where an exponent, or the difference of both, is near its end; so also where the
  dividend is 0. NVIDIA does not publish the rule; this one is stricter. Both paths give the same bits; counts of
  instructions are an upper bound, above all where many numbers are 0.
- An instruction waits for the scoreboards that its encoding names, also where its predicate is false.

Not modelled: time, caches, other blocks, atomics, fp64, packed fp16 arithmetic, matrix units, and the order in which a
chip takes the sides of a branch. An unknown instruction, or an unknown use of one, raises NotImplementedError.
"""

from __future__ import annotations

import collections
import ctypes

import numpy as np

from .block import WARP
from .floats import Floats
from .instructions import decode, is_predicate, only
from .integers import Integers
from .sass import Kernel

WHOLE_WARP, WHOLE_BLOCK = 16, 17  # barriers of WARPSYNC and BAR; those before are of BSSY
MOST_STEPS = 10**7


class Emulator(Integers, Floats):
    """``fp``: fp.c as a library. After ``run``: ``executed``, warp instructions by opcode; ``in_flight``, the most bytes of the
    counted addresses that a thread has asked for and not yet waited for; and the memory as the kernel left it.
    """

    def __init__(self, kernel: Kernel, fp: ctypes.CDLL) -> None:
        self.kernel, self.fp = kernel, fp
        self.code = [decode(line.text) for line in kernel.instructions]
        self.at = {line.address: k for k, line in enumerate(kernel.instructions)}

    def run(
        self, threads: int, number: int, parameters: bytes, memory: np.ndarray, base: int, counted: tuple[int, int]
    ) -> None:
        """Execute block ``number``. ``counted``: the addresses between which operands lie."""
        self.reset(threads, number, parameters, memory, base)
        self.counted = counted
        self.executed: collections.Counter[str] = collections.Counter()
        self.asked = np.zeros(8)  # by scoreboard: bytes of a thread
        self.in_flight = 0.0
        self.pc, self.alive = np.zeros(threads, np.int64), np.ones(threads, bool)
        self.meets = np.zeros((WHOLE_BLOCK + 1, threads, threads), bool)  # by barrier and thread: whom it waits for
        self.meets[WHOLE_WARP], self.meets[WHOLE_BLOCK] = self.same_warp, True
        self.waits = np.full(threads, -1)  # at this barrier, or none
        with np.errstate(all="ignore"):
            for _ in range(MOST_STEPS):
                if not self.alive.any():
                    return
                self.step()
        raise RuntimeError(f"not at its end after {MOST_STEPS} instructions")

    def step(self) -> None:
        free = self.alive & (self.waits < 0)
        if not free.any():
            raise RuntimeError("every thread waits")
        pc = int(self.pc[free].min())
        self.m = free & (self.pc == pc)  # the active threads
        self.pc[self.m] = pc + 1
        i = self.code[pc]
        if i.name == "NOP":
            return
        self.executed[i.op] += int(self.m.reshape(-1, WARP).any(1).sum())
        if waits := self.kernel.instructions[pc].waits:
            self.asked[[waits >> k & 1 == 1 for k in range(8)]] = 0
        if i.predicate:
            self.m = self.m & self.truth(i.predicate)
            if not self.m.any():
                return
        method = getattr(self, "do_" + i.name, None)
        if method is None:
            raise NotImplementedError(str(i))
        method(i, *i.operands)

    def do_LDG(self, i, to, address):
        _, at, size = self.places(i, address)
        first, last = (limit - self.base for limit in self.counted)
        counted = (at[:, 0] >= first) & (at[:, 0] < last)
        self.load(i)
        if counted.any():
            line = self.kernel.instructions[self.pc[self.m][0] - 1]
            self.asked[line.scoreboard] += size * int(counted.sum()) / self.threads
            self.in_flight = max(self.in_flight, float(self.asked.sum()))

    do_LD = do_LDG

    # Control flow.

    def jump(self, address: str) -> None:
        self.pc[self.m] = self.at[int(address, 16)]

    def jump_to_threads(self, addresses) -> None:
        for thread in np.flatnonzero(self.m):
            self.pc[thread] = self.at[int(addresses[thread])]

    def release(self, barrier: int) -> None:
        """Lets threads go on that wait at a barrier which all that they wait for have reached or will never reach."""
        waiting = np.flatnonzero(self.waits == barrier)
        missing = (self.meets[barrier][waiting] & self.alive & (self.waits != barrier)).any(1)
        self.waits[waiting[~missing]] = -1

    def do_BSSY(self, i, barrier, address):
        self.meets[int(barrier[1:])][self.m] = self.same_warp[self.m] & self.m

    def do_BSYNC(self, i, barrier):
        self.waits[self.m] = int(barrier[1:])
        self.release(int(barrier[1:]))

    def do_BREAK(self, i, *operands):
        """Nobody waits for these threads at the barrier any more."""
        barrier = int(operands[-1][1:])
        self.meets[barrier][:, self.m] = False
        self.release(barrier)

    def do_BAR(self, i, *_):
        self.waits[self.m] = WHOLE_BLOCK
        self.release(WHOLE_BLOCK)

    def do_WARPSYNC(self, i, *operands):
        only("ALL" in i.mods or operands == ("0xffffffff",), i)
        self.waits[self.m] = WHOLE_WARP
        self.release(WHOLE_WARP)

    def do_EXIT(self, i):
        self.alive[self.m] = False
        for barrier in np.unique(self.waits[self.waits >= 0]):
            self.release(barrier)

    def do_BRA(self, i, *operands):
        for condition in operands[:-1]:
            only(is_predicate(condition), i)
            self.m = self.m & self.truth(condition)
        self.jump(operands[-1])

    def do_CALL(self, i, address):
        self.jump(address)

    def do_RET(self, i, operand):
        self.jump_to_threads(self.word(operand.split()[0]))

    def do_BRX(self, i, operand):
        register, _, offset = operand.partition(" ")
        behind = self.kernel.instructions[self.pc[self.m][0]].address  # the address of the next instruction
        total = self.pair(register).view(np.int64) + int(offset or "0", 16) + behind
        self.jump_to_threads(total & 0xFFFFFFFF)
