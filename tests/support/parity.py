"""Steps of any backend held to the float64 reference, in ulp of the operands: what the parity tests and the benchmarks run."""

from __future__ import annotations

import dataclasses

import torch
from families import Optimizer

from precond import reference
from precond._core.formats import SECOND_MOMENTS

from .cases import BACKEND, gradient, guarded, random_values

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Parameter, gradient, state.
DTYPES = [(F32, F32, None), (BF16, BF16, None), (BF16, F32, None), (F32, BF16, None), (BF16, BF16, "fp32"),
          (F32, F32, "bf16"), (F16, F16, None), (F16, F32, "fp32"), (F32, F16, "fp16")]  # fmt: skip


def worst_error(
    row, shapes, p_dtype, g_dtype, state_format, p_layout="contiguous", g_layout="same", steps=3, **override
):
    """Step an optimizer over guarded tensors, checking each parameter after each step. Returns the worst error in ulp."""
    buffers = [guarded(random_values(shape, p_dtype), p_layout) for shape in shapes]
    params = [buffer.tensor.requires_grad_() for buffer in buffers]
    optimizer = row.cls(params, **{**row.kwargs, **override}, state_format=state_format, backend=BACKEND)
    worst = 0.0
    for step in range(1, max(steps, row.steps) + 1):
        before = []
        for p in params:
            p.grad_dtype = None
            p.grad = gradient(random_values(p.shape, g_dtype), g_layout, p)
            states = optimizer.states.present(p, row.rule).values()
            dtype = {"fp32": F32, "bf16": BF16, "fp16": F16, None: p_dtype}[state_format]
            names = optimizer.states.names(row.rule)
            initial = optimizer._initial(p, optimizer.param_groups[0])
            before.append(Snapshot.of(p, list(states) or [torch.full_like(p, initial, dtype=dtype) for _ in names]))
        optimizer.step()
        group = optimizer.param_groups[0]
        _, sign, hyper = optimizer._row(group)
        for p, snapshot, buffer in zip(params, before, buffers, strict=True):
            states = list(optimizer.states.present(p, row.rule).values())
            # A formula reads states of one number as they are after the step.
            numbers = {name: float(optimizer.state[p][name]) for name in optimizer.states.scalars(row.rule)}
            asked_for = state_format is not None
            drawn = [
                k for k, name in enumerate(optimizer.states.names(row.rule)) if asked_for and name in SECOND_MOMENTS
            ]
            error = snapshot.check(row, p.grad, hyper | numbers, sign, step, step == 1, p.detach(), states, drawn)
            worst = max(worst, error)
            buffer.check()
    return worst


def ulp_bound(
    scale: torch.Tensor, exact: torch.Tensor, ulps: float, dtype: torch.dtype, drawn: bool = False
) -> torch.Tensor:
    """``ulps`` fp32 ulp of the operands, plus the rounding of the store: to nearest, or ``drawn``, by up to a whole ulp."""
    fp32 = torch.finfo(torch.float32)
    bound = ulps * fp32.eps * scale + ulps * fp32.smallest_normal * fp32.eps
    if dtype != torch.float32:
        stored = torch.finfo(dtype)
        bound = bound + stored.eps / (1 if drawn else 2) * (1.01 * exact.abs() + 1.01 * stored.smallest_normal)
    return bound


@dataclasses.dataclass
class Snapshot:
    """A parameter before a step, in float64, and what the reference makes of it."""

    p: torch.Tensor
    states: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, p: torch.Tensor, states: list[torch.Tensor]) -> Snapshot:
        return cls(p.detach().double(), tuple(s.double() for s in states))

    def check(self, row: Optimizer, g, hyper, sign, step, fresh, p, states, drawn=()) -> float:
        """Assert that ``p`` and ``states`` are one step from here; return the largest error in ulp of the operands.

        ``drawn``: positions of states that are rounded stochastically.
        """
        rule = reference.RULES[row.rule].update
        g = sign * g.double()
        exact_p, exact_states = rule(self.p, g, self.states, hyper, step, fresh)
        # The same formula on magnitudes: how large its operands are. A coupled decay adds to the gradient.
        plain = {**hyper, "l1_decay": 0.0}
        q, _ = rule(self.p, g, self.states, plain, step, fresh)
        zero = torch.zeros_like(self.p)
        coupled = hyper["weight_decay"] if reference.RULES[row.rule].decay == "coupled" else 0.0
        scale_g = g.abs() + coupled * self.p.abs()
        # A negative second moment, an estimate of a curvature, counts as none.
        names = reference.RULES[row.rule].states
        sizes = [
            s.clamp(min=0) if name in SECOND_MOMENTS else s.abs() for name, s in zip(names, self.states, strict=True)
        ]
        steps, scales = rule(zero, scale_g, tuple(sizes), plain, step, fresh)
        scale_p = self.p.abs() + steps.abs() + (q - exact_p).abs()
        if "z" in names:  # a weight, which p moves to and which starts as p
            z, moved = (values[names.index("z")] for values in (self.states, exact_states))
            z = self.p if fresh else z
            scale_p = self.p.abs() + z.abs() + (moved - z).abs()
            scales = [scale_p if name == "z" else scale for name, scale in zip(names, scales, strict=True)]
        slack = [torch.zeros_like(self.p) for _ in row.ulps]
        if row.steep:
            few_ulp = row.ulps[0] * torch.finfo(torch.float32).eps
            operands = [(g, scale_g), *((s, s.abs()) for s in self.states)]
            for k, (operand, size) in enumerate(operands):
                for sign_of_error in (-1, 1):
                    near = [o for o, _ in operands]
                    near[k] = operand + sign_of_error * few_ulp * size
                    near_p, near_states = rule(self.p, near[0], tuple(near[1:]), hyper, step, fresh)
                    for room, exact, other in zip(slack, (exact_p, *exact_states), (near_p, *near_states), strict=True):
                        room.copy_(torch.maximum(room, (other - exact).abs()))
        worst = 0.0
        results = [(p, exact_p, scale_p), *zip(states, exact_states, scales, strict=True)]
        for k, ((actual, exact, scale), ulps, room) in enumerate(zip(results, row.ulps, slack, strict=True), -1):
            error = (actual.double() - exact).abs()
            bound = ulp_bound(scale, exact.abs() + room, ulps, actual.dtype, k in drawn) + room
            assert torch.all(error <= bound), (
                f"{row.rule}: error {error.max():.3e} is {(error / bound).max():.2f} times the bound"
            )
            if actual.numel() and actual.dtype == torch.float32:
                worst = max(worst, (error / (torch.finfo(torch.float32).eps * scale + 1e-300)).max().item())
        return worst
