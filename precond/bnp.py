"""Batch normalisation preconditioning: an optimizer around another one, and the transform of a layer's gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._wrappers.inputs import Inputs, Observer, moments, plain_layers, statistics_dtype
from ._wrappers.standardised import Coordinates
from ._wrappers.standardised import precondition_gradients as precondition_gradients
from ._wrappers.wrapper import Wrapper

T = TypeVar("T")

#: torch's classes whose ``weight_decay`` is added to the gradient; a group's "decoupled_weight_decay" comes first.
_COUPLED = (
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
)


@dataclasses.dataclass
class _Layer:
    """What belongs to a weight: the bias that centres its gradients, if there is one, and its input channels."""

    bias: Tensor | None
    channels: int


class BNP(Wrapper):
    r"""Batch normalisation preconditioning: the gradients of a layer as if its inputs were standardised. For any optimizer.

    For a layer with m inputs, of running mean mu and variance var, and N rows in the batch:

    .. math::
        s_j^2 = \mathrm{var}_j + \epsilon_1 \max_k \mathrm{var}_k + \epsilon_2, \qquad q^2 = \max(m / N, 1)

        \hat g_{W,ij} = \frac{g_{W,ij} - \mu_j\, g_{b,i}}{q^2 s_j^2}, \qquad
        \hat g_{b,i} = \frac{g_{b,i}}{q^2} - \sum_j \hat g_{W,ij}\, \mu_j

    This is P P^T g, with P the map from the parameters z of standardised inputs, z_W = q s W and z_b = q (b + W mu), to (W, b).
    The model computes what it did: hooks read the inputs of its layers, and the step transforms gradients. Layers are nn.Linear,
    with any leading dimensions, and nn.Conv1d, nn.Conv2d and nn.Conv3d, where mu and var belong to an input channel, m counts
    channels of a group times taps, and N positions of the output. Without a bias that ``base`` updates there is nothing to centre
    with: only the division is left. Every other parameter, and a layer that was never seen in training, takes base's plain step.

    Inputs count where the layer is in training mode and gradients are on. All that came since the last step are pooled, as if
    they were one batch. A channel whose moments are not finite keeps those it had.

    Args:
        module: the model, an nn.Module. Layers whose weight is in a group of ``base`` are preconditioned; float32, float64,
            bfloat16 and float16. Left alone are transposed convolutions and subclasses with a forward of their own.
        base: any ``torch.optim.Optimizer`` that steps without a closure. Its ``param_groups`` are those of this one.
        stat_momentum: rho in [0, 1], of the running mean and variance (default 0.99; 1 freezes them).
        eps1: epsilon_1 >= 0, relative to the largest variance of the layer (default 1e-2).
        eps2: epsilon_2 > 0, absolute (default 1e-4).
        compose: "gradient" (default): ``base`` gets (g_W, g_b) transformed, P P^T g. "direction": ``base`` steps in z, on the
            gradient P^T g. For SGD without momentum both are the same; Adam undoes every scaling of its input, and of the first
            it keeps only the centring. Directions need float32 or float64 parameters, and three copies of them during a step.
        process_group: ``torch.distributed`` processes that train replicas (DDP): their statistics are pooled, or else the
            replicas drift apart. None (default): one process. Neither copied nor pickled.

    Raises:
        TypeError: ``module`` or ``base`` is something else.
        ValueError: an argument is out of range, no layer is there, one is lazy or sharded, or two layers share a weight and have
            different numbers of input channels.

    State: ``mean`` (init 0), ``var`` (init 1) and ``rows``, N of the last step, per weight, in ``own``; in a checkpoint they are
    beside the states of ``base`` as "bnp_mean", ...

    Source: Lange, Helfrich, Ye 2022, JMLR 23(72). Its constants and q for convolutions are recalled, not quoted: they are
    arguments, or stand in METHODS A.3; "direction" is derived there (A.3.5).

    Example:
        >>> import torch, precond
        >>> layer = torch.nn.Linear(1, 1)
        >>> opt = precond.BNP(layer, torch.optim.SGD(layer.parameters(), lr=1.0), stat_momentum=0.0, eps1=0.0, eps2=1e-9)
        >>> x = torch.linspace(99, 101, 50).unsqueeze(1)  # plain gradient descent would need a rate of 1e-4
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     loss = (layer(x) - 3 * x).square().mean() / 2
        ...     loss.backward()
        ...     opt.step()
        >>> round(layer.weight.item(), 2)
        3.0
    """

    _prefix = "bnp"

    _layers: dict[Tensor, _Layer]
    _pending: dict[Tensor, Inputs]

    def __init__(
        self,
        module: nn.Module,
        base: torch.optim.Optimizer,
        stat_momentum: float = 0.99,
        eps1: float = 1e-2,
        eps2: float = 1e-4,
        *,
        compose: str = "gradient",
        process_group: Any = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if not 0.0 <= stat_momentum <= 1.0:
            raise ValueError(f"stat_momentum must be in [0, 1], got {stat_momentum}")
        if not 0.0 <= eps1 < math.inf:
            raise ValueError(f"eps1 must be >= 0 and finite, got {eps1}")
        if not 0.0 < eps2 < math.inf:
            raise ValueError(f"eps2 must be > 0 and finite, got {eps2}")
        if compose not in ("gradient", "direction"):
            raise ValueError(f"compose must be 'gradient' or 'direction', got {compose!r}")
        super().__init__(base)
        if isinstance(base, torch.optim.LBFGS):
            raise TypeError("base must be an optimizer that steps without a closure, got LBFGS")
        self.module, self.compose, self.process_group = module, compose, process_group
        self.stat_momentum, self.eps1, self.eps2 = stat_momentum, eps1, eps2
        self._pending = {}
        self._attach()
        if not self._layers:
            raise ValueError(
                "module must have an nn.Linear or nn.Conv layer whose weight base updates, "
                f"got {type(module).__name__} with none"
            )

    def _attach(self) -> None:
        """Find the layers and put hooks on them."""
        self._layers = self._found()
        self._observer_hooks = [
            layer.register_forward_hook(Observer(self._observe), with_kwargs=True)
            for layer in plain_layers(self.module)
            if layer._parameters["weight"] in self._layers
        ]

    def _found(self) -> dict[Tensor, _Layer]:
        ours = set(self._params())
        found: dict[Tensor, _Layer] = {}
        for layer in plain_layers(self.module):
            weight, bias = layer._parameters["weight"], layer._parameters["bias"]
            if weight not in ours or weight is None or weight.is_complex() or weight.numel() == 0:
                continue
            if hasattr(weight, "placements"):
                raise ValueError(
                    f"a weight must be a plain tensor, got a {type(weight).__name__} of {tuple(weight.shape)}"
                )
            if self.compose == "direction" and weight.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"compose='direction' needs float32 or float64 weights, got {weight.dtype}")
            new = _Layer(bias if bias in ours else None, int(getattr(layer, "groups", 1)) * weight.shape[1])
            known = found.setdefault(weight, new)
            if known.channels != new.channels:
                raise ValueError(
                    "layers that share a weight must have the same number of input channels, "
                    f"got {known.channels} and {new.channels} for {tuple(weight.shape)}"
                )
            if known.bias is not new.bias:
                known.bias = None
        # Nor does a bias of several weights centre any.
        users = [layer.bias for layer in found.values() if layer.bias is not None]
        for known in found.values():
            if known.bias is not None and sum(known.bias is other for other in users) > 1:
                known.bias = None
        return found

    def remove(self) -> None:
        """Take the hooks off the model. Steps go on with the statistics as they are."""
        for hook in self._observer_hooks:
            hook.remove()
        self._observer_hooks = []
        self._pending = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to ``base``; its layers are preconditioned too."""
        super().add_param_group(param_group)
        pending = self._pending
        self.remove()
        self._attach()
        self._pending = pending

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class; one of ``base`` alone starts with statistics 0 and 1."""
        super().load_state_dict(state_dict)
        self._pending = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "process_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach()

    # Statistics.

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _observe(self, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        """Add the inputs of one forward to what the next step sees."""
        weight = layer._parameters["weight"]
        known = self._layers.get(weight) if weight is not None and weight.requires_grad else None
        # Not under torch.func: its values live no longer than a call.
        if known is None or weight is None or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return
        # In a backward a checkpoint runs its layers again. It counts where the first run had no gradients, and did not.
        recomputed = torch._C._current_graph_task_id() != -1
        pending = self._pending.get(weight)
        if x.numel() == 0 or (recomputed and pending is not None and not pending.recomputed):
            return
        dim = x.dim() + 1 - weight.dim()
        count, mean, squares = moments(x.detach(), dim, statistics_dtype(weight))
        inputs = Inputs(output.numel() // weight.shape[0], count, mean, squares, recomputed)
        if pending is None:
            self._pending[weight] = inputs
        else:
            pending.add(inputs)
            pending.recomputed &= recomputed

    def _update_statistics(self) -> None:
        """Move the running statistics to those of the inputs since the last step."""
        pending, self._pending = self._pending, {}
        if self.process_group is not None:
            pending = self._pooled(pending)
        for weight, inputs in pending.items():
            if weight not in self.own:
                self.own[weight] = {"mean": torch.zeros_like(inputs.mean), "var": torch.ones_like(inputs.mean)}
            own, var = self.own[weight], inputs.squares / inputs.count
            finite = torch.isfinite(inputs.mean) & torch.isfinite(var)
            for name, value in (("mean", inputs.mean), ("var", var)):
                own[name] = torch.where(finite, own[name].lerp(value, 1.0 - self.stat_momentum), own[name])
            own["rows"] = inputs.rows

    def _pooled(self, pending: dict[Tensor, Inputs]) -> dict[Tensor, Inputs]:
        """The statistics of all processes, in one reduction of sums in float64."""
        sums = []
        for weight, layer in self._layers.items():
            part = torch.zeros(2 + 2 * layer.channels, dtype=torch.float64, device=weight.device)
            if (inputs := pending.get(weight)) is not None:
                mean = inputs.mean.double()
                part[0], part[1] = inputs.rows, inputs.count
                part[2:] = torch.cat([mean, inputs.squares / inputs.count + mean.square()]) * inputs.count
            sums.append(part)
        total = torch.cat(sums)
        torch.distributed.all_reduce(total, group=self.process_group)
        pooled, begin = {}, 0
        for weight, layer in self._layers.items():
            part, begin = total[begin : begin + 2 + 2 * layer.channels], begin + 2 + 2 * layer.channels
            rows, count = (int(n) for n in part[:2].tolist())
            if count:
                mean, square = (part[2:] / count).view(2, -1)
                squares = (square - mean.square()).clamp_min(0.0) * count
                dtype = statistics_dtype(weight)
                pooled[weight] = Inputs(rows, count, mean.to(dtype), squares.to(dtype), False)
        return pooled

    # The step.

    def step(self, closure: Callable[[], T] | None = None) -> T | None:  # type: ignore[override]
        """Step ``base`` on preconditioned gradients; with a closure, evaluate it first and return its value."""
        value = self._evaluated(closure)
        self._update()
        return value

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _update(self) -> None:
        self._update_statistics()
        if self.compose == "gradient":
            transformed: dict[Tensor, Tensor] = {}
            for layer in self._with_statistics():
                transformed.update(layer.gradients())
            self._with_gradients(transformed)
        else:
            self._step_in_z(list(self._with_statistics()))

    def _with_statistics(self) -> Iterator[Coordinates]:
        """The layers whose gradients are transformed in this step."""
        for weight, layer in self._layers.items():
            if weight.grad is None or weight not in self.own:
                continue
            if weight.grad.layout != torch.strided:
                raise RuntimeError(f"the gradient of a layer must be dense, got {weight.grad.layout}")
            own = self.own[weight]
            var = own["var"]
            bias = layer.bias if layer.bias is not None and layer.bias.grad is not None else None
            s2 = var + self.eps1 * var.max() + self.eps2
            q2 = max(math.prod(weight.shape[1:]) / own["rows"], 1.0)
            yield Coordinates(weight, bias, own["mean"], s2, q2)

    def _step_in_z(self, layers: list[Coordinates]) -> None:
        """Let ``base`` step on z with P^T g, and move p by P (z_new - z)."""
        decay = self._coupled_decays()
        p = {q: q.clone() for layer in layers for q in layer.params()}
        z, gradients = {}, {}
        for layer in layers:
            values = layer.z()
            # A penalty on p: what base adds of z itself is taken off.
            given = {q: q.grad.add(q, alpha=decay.get(q, 0.0)) for q in layer.params() if q.grad is not None}
            for q, g in layer.z_gradients(given).items():
                gradients[q] = g.sub_(values[q], alpha=decay.get(q, 0.0))
            z.update(values)
        try:
            for q, value in z.items():
                q.copy_(value)
            self._with_gradients(gradients)
        except BaseException:
            for q, value in p.items():
                q.copy_(value)
            raise
        for layer in layers:
            layer.move({q: p[q] for q in layer.params()}, {q: z[q] for q in layer.params()})

    def _coupled_decays(self) -> dict[Tensor, float]:
        """The weight decay of parameters whose optimizer adds it to the gradient, with the sign of a gradient."""
        decays: dict[Tensor, float] = {}
        for group in self.param_groups:
            weight_decay = group.get("weight_decay", 0.0)
            decoupled = group.get("decoupled_weight_decay", not _is_coupled(self.base))
            if weight_decay != 0.0 and not decoupled:
                sign = -1.0 if group.get("maximize", False) else 1.0
                decays.update((p, sign * float(weight_decay)) for p in group["params"])
        return decays


def _is_coupled(base: torch.optim.Optimizer) -> bool:
    while isinstance(base, Wrapper):
        base = base.base
    return isinstance(base, _COUPLED)
