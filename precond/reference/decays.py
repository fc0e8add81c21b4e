"""Decays. ``decay`` is "coupled", "l2", "proximal" or "subgradient"; "" for a rule without one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .step import Hyper, Number, Step


def sign(x: Tensor) -> Tensor:
    """1, -1 or 0, and a NaN stays a NaN, of which torch.sign makes 0."""
    return torch.where(x.isnan(), x, torch.sign(x))


def soft_threshold(x: Tensor, t: Tensor) -> Tensor:
    """S_t(x) = sign(x) max(|x| - t, 0)."""
    return torch.sign(x) * torch.clamp(x.abs() - t, min=0)


def intrinsic_l1_threshold(den: Tensor, v: Tensor, lr: Number, hyper: Hyper) -> Tensor:
    """lr min(l1 den^(-1/2), cap), and no threshold where the coordinate never saw a gradient (docs/theory.md, A.2.2)."""
    t = lr * torch.clamp(hyper["l1_decay"] * den**-0.5, max=hyper["l1_cap"])
    return torch.where(v == 0, torch.zeros_like(t), t)


def decayed_gradient(p: Tensor, g: Tensor, hyper: Hyper, decay: str) -> Tensor:
    """What the statistics see: g, or with a penalty on p itself g + wd p."""
    weight_decay = hyper["weight_decay"]
    if decay != "coupled" or weight_decay == 0:  # 0 times an infinite p is NaN
        return g
    return g + p * weight_decay


def stepped(p: Tensor, step: Step, hyper: Hyper, decay: str) -> Tensor:
    """p - step, and the decay that a penalty on z = den^(1/2) p brings; den = 1 where there is none."""
    if decay == "coupled":
        return p - step.taken
    q = p - smooth_decay(p, step, hyper) - step.taken
    if decay == "l2":
        return q
    t = threshold_of(p, step, hyper)
    return soft_threshold(q, t) if decay == "proximal" else q - t * torch.sign(p)


def taken_from(p: Tensor, step: Step, hyper: Hyper, decay: str) -> Tensor:
    """What ``stepped`` takes from p, in a sum that p does not round."""
    if decay == "coupled":
        return step.taken
    smooth = smooth_decay(p, step, hyper) + step.taken
    if decay == "l2":
        return smooth
    t = threshold_of(p, step, hyper)
    return smooth + (torch.clamp(p - smooth, -t, t) if decay == "proximal" else t * torch.sign(p))


def smooth_decay(p: Tensor, step: Step, hyper: Hyper) -> Tensor:
    """lr wd p. An infinite p stays what it is: inf - inf is NaN."""
    return step.lr * hyper["weight_decay"] * torch.where(p.isinf(), 0.0, p)


def threshold_of(p: Tensor, step: Step, hyper: Hyper) -> Tensor:
    """That of an L1 penalty on z."""
    if step.den is None or step.v is None:
        return torch.ones_like(p) * (step.lr * hyper["l1_decay"])
    return intrinsic_l1_threshold(step.den, step.v, step.lr, hyper)


def clamped(g: Tensor, limit: float) -> Tensor:
    """g between -limit and limit."""
    return g if limit == math.inf else torch.clamp(g, -limit, limit)
