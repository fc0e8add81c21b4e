"""Batch normalisation preconditioning: an optimizer around another one, and the transform of a layer's gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._core.precision import at_stated_precision
from ._wrappers.decays import coupled_decays
from ._wrappers.inputs import Inputs, Observer, add_seen, pooled
from ._wrappers.layers import Layer, layers_of, plain_layers
from ._wrappers.standardised import Coordinates, step_in_z
from ._wrappers.standardised import precondition_gradients as precondition_gradients
from ._wrappers.wrapper import Wrapper

T = TypeVar("T")


class BNP(Wrapper):
    r"""Batch normalisation preconditioning: gives any optimizer gradients as if the inputs of each layer were standardised.

    For a layer with m inputs of running mean mu and variance var, and a batch of N rows:

    .. math::
        s_j^2 = \mathrm{var}_j + \epsilon_1 \max_k \mathrm{var}_k + \epsilon_2, \qquad q^2 = \max(m / N, 1)

        \hat g_{W,ij} = \frac{g_{W,ij} - \mu_j\, g_{b,i}}{q^2 s_j^2}, \qquad
        \hat g_{b,i} = \frac{g_{b,i}}{q^2} - \sum_j \hat g_{W,ij}\, \mu_j

    This is P P^T g, with P the map from the parameters z of standardised inputs, z_W = q s W and z_b = q (b + W mu), to (W, b).
    The model's outputs do not change: hooks read the inputs of its layers, and the step transforms gradients. Layers are
    nn.Linear, with any leading dimensions, and nn.Conv1d, nn.Conv2d and nn.Conv3d. For a convolution mu and var are per input
    channel, m is the channels of a group times the taps, and N is the number of output positions. A layer without a bias that
    ``base`` updates cannot be centred; it is only scaled. All other parameters, and layers that were never seen in training,
    take the plain step of ``base``.

    Inputs count when the layer is in training mode and gradients are enabled. All inputs since the last step are pooled as one
    batch. A channel whose moments are not finite keeps its previous ones.

    Args:
        module: the model, an nn.Module. Its layers whose weight is in a group of ``base`` are preconditioned, in float32,
            float64, bfloat16 and float16. Transposed convolutions, and subclasses that define ``forward``, are not.
        base: any ``torch.optim.Optimizer`` that steps without a closure. Its ``param_groups`` are those of this one.
        stat_momentum: rho in [0, 1], decay rate of the running mean and variance (default 0.99; 1 freezes them).
        eps1: epsilon_1 >= 0, relative to the largest variance of the layer (default 1e-2).
        eps2: epsilon_2 > 0, absolute (default 1e-4).
        compose: "gradient" (default) gives ``base`` the transformed gradient P P^T g. "direction" lets ``base`` step in z, on the
            gradient P^T g. For SGD without momentum both are the same. Adam undoes any scaling of its input, so with "gradient"
            only the centring has an effect on it. "direction" needs float32 or float64 parameters, and three copies of them
            during a step.
        process_group: the ``torch.distributed`` processes that train replicas (DDP). Their statistics are pooled; without that
            the replicas drift apart. None (default): one process. Neither copied nor pickled.

    Raises:
        TypeError: ``module`` or ``base`` is something else.
        ValueError: an argument is out of range, the module has no such layer, a layer is lazy or sharded, or layers that share a
            weight differ in their numbers of input channels.

    State: per weight, in ``own``: ``mean`` (starts at 0), ``var`` (starts at 1) and ``rows``, the N of the last step. A
    checkpoint has them among the states of ``base`` as "bnp_mean", "bnp_var" and "bnp_rows".

    Source: Lange, Helfrich, Ye 2022, JMLR 23(72). The constants, and q for convolutions, are recalled from it, not
    quoted: docs/theory.md, A.3, which also derives "direction" (A.3.5).

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

    _layers: dict[Tensor, Layer]
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
        self._layers = layers_of(self.module, self._params(), in_z=self.compose == "direction")
        self._observer_hooks = [
            layer.register_forward_hook(Observer(self._observe), with_kwargs=True)
            for layer in plain_layers(self.module)
            if layer._parameters["weight"] in self._layers
        ]

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
        """What deepcopy and pickle keep; layers are found again."""
        kept = {name: value for name, value in super().__getstate__().items() if name != "_layers"}
        return {**kept, "process_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach()

    # Statistics.

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    @at_stated_precision
    def _observe(self, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        """Add the inputs of one forward to what the next step sees."""
        weight = layer._parameters["weight"]
        # Values under torch.func must not outlive the call.
        if weight not in self._layers or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return
        if weight is not None and weight.requires_grad:
            add_seen(self._pending, weight, x, output)

    @at_stated_precision
    def _update_statistics(self) -> None:
        """Move the running statistics to those of the inputs since the last step."""
        pending, self._pending = self._pending, {}
        if self.process_group is not None:
            pending = pooled(pending, self._layers, self.process_group)
        for weight, inputs in pending.items():
            if weight not in self.own:
                self.own[weight] = {"mean": torch.zeros_like(inputs.mean), "var": torch.ones_like(inputs.mean)}
            own, var = self.own[weight], inputs.squares / inputs.count
            finite = torch.isfinite(inputs.mean) & torch.isfinite(var)
            for name, value in (("mean", inputs.mean), ("var", var)):
                own[name] = torch.where(finite, own[name].lerp(value, 1.0 - self.stat_momentum), own[name])
            own["rows"] = inputs.rows

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
            step_in_z(list(self._with_statistics()), coupled_decays(self.base), self._with_gradients)

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
