"""NAdam."""

from __future__ import annotations

import torch
from torch import Tensor

from .decays import decayed_gradient
from .rule import Needs, Rule, with_decays
from .step import Hyper, Number, States, Step


def momentum_of(hyper: Hyper, step: int) -> Number:
    """mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2), where q = 0.96^momentum_decay."""
    return hyper["beta1"] * (1 - 0.5 * hyper["q"] ** step)


def product_after(hyper: Hyper, step: int, product: float) -> float:
    """The product of all mu_t so far. Each is rounded to float32 first, as where torch multiplies its float32 tensor."""
    return product * torch.tensor(float(momentum_of(hyper, step)), dtype=torch.float32, device="cpu").item()


def nadam(
    p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool, *, decay: str
) -> tuple[Step, States]:
    """torch.optim.NAdam: p -= lr ((1 - mu_t) d / (1 - mu_1 ... mu_t) + mu_t+1 m / (1 - mu_1 ... mu_t+1)) / den."""
    m, v = states
    d = decayed_gradient(p, g, hyper, decay)
    m = hyper["beta1"] * m + (1 - hyper["beta1"]) * d
    v = hyper["beta2"] * v + (1 - hyper["beta2"]) * d * d
    den = (v / (1 - hyper["beta2"] ** step)).sqrt() + hyper["eps"]
    product, mu, mu_next = hyper["mu_product"], momentum_of(hyper, step), momentum_of(hyper, step + 1)
    direction = ((1 - mu) / (1 - product) * d + mu_next / (1 - product * mu_next) * m) / den
    return Step(hyper["lr"] * direction, hyper["lr"], den, v), (m, v)


_NADAM: Needs = dict(
    states=("exp_avg", "exp_avg_sq"),
    second_moments=("exp_avg_sq",),
    keeps="beta2",
    reads_step=True,
    scalars={"mu_product": 1.0},
    advance=product_after,
)
RULES: dict[str, Rule] = with_decays("nadamw", nadam, _NADAM, coupled="nadam")
