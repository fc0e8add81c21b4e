"""Batch normalisation preconditioning: an optimizer around another one, and the transform of a layer's gradients."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._core.precision import at_stated_precision
from ._wrappers.decays import check_direction, coupled_decays
from ._wrappers.inputs import Inputs, Observer, add_seen, pooled, statistics_dtype
from ._wrappers.layers import Layer, layers_of, plain_layers
from ._wrappers.standardised import Coordinates, moved, squared_q, squared_scales, step_in_z
from ._wrappers.standardised import precondition_gradients as precondition_gradients
from ._wrappers.wrapper import Wrapper

T = TypeVar("T")


class BNP(Wrapper):
    r"""Batch normalisation preconditioning: gives any optimizer gradients as if the inputs of each layer were standardised.

    For a layer with m inputs of running mean mu and variance var, and a batch of n samples with N rows:

    .. math::
        s_j^2 = \mathrm{var}_j + \epsilon_1 \max_k \mathrm{var}_k + \epsilon_2, \qquad q^2 = \max(m, N) / n

        \hat g_{W,ij} = \frac{g_{W,ij} - \mu_j\, g_{b,i}}{q^2 s_j^2}, \qquad
        \hat g_{b,i} = \frac{g_{b,i}}{q^2} - \sum_j \hat g_{W,ij}\, \mu_j

    The statistics are those of all rows, where the weight of a batch decays by rho a step: with rho > 0 batches of one row have
    a variance too. With mu_B and var_B of a batch, delta = mu_B - mu:

    .. math::
        \mathrm{var} \leftarrow \rho\, \mathrm{var} + (1 - \rho)\, (\mathrm{var}_B + \rho\, \delta^2), \qquad
        \mu \leftarrow \mu + (1 - \rho)\, \delta

    This is P P^T g / q^2, with P the map from the parameters z of standardised inputs, z_W = s W and z_b = b + W mu, to (W, b).
    The model's outputs do not change: hooks read the inputs of its layers, and the step transforms gradients. Layers are
    nn.Linear, with any leading dimensions, where n = N, and nn.Conv1d, nn.Conv2d and nn.Conv3d. For a convolution mu and var are
    per input channel, m is the channels of a group times the taps, N is the number of output positions and n that of images. A
    layer without a bias that ``base`` updates cannot be centred; it is only scaled. All other parameters, and layers that were
    never seen in training, take the plain step of ``base``.

    Inputs count when the layer is in training mode and gradients are enabled. All inputs since the last step are pooled as one
    batch. A channel whose moments are not finite keeps its previous ones.

    Args:
        module: the model, an nn.Module. Its layers whose weight is in a group of ``base`` are preconditioned, in float32,
            float64, bfloat16 and float16. Transposed convolutions, and subclasses that define ``forward``, are not.
        base: any ``torch.optim.Optimizer`` that steps without a closure. Its ``param_groups`` are those of this one.
        stat_momentum: rho in [0, 1], decay rate of the running mean and variance (default 0.99; 1 freezes them).
        eps1: epsilon_1 >= 0, relative to the largest variance of the layer (default 1e-2).
        eps2: epsilon_2 > 0, absolute (default 1e-4).
        compose: "gradient" (default) gives ``base`` the transformed gradient P P^T g / q^2, for SGD and momentum. "direction"
            lets ``base`` step in z, on the gradient P^T g, without q. It is for Adam, which undoes any scaling of its input:
            with "gradient" only the centring has an effect on it. It needs float32 or float64 parameters, three copies of them
            during a step, and a ``base`` without averages (``ema_decay``, schedule-free).
        process_group: the ``torch.distributed`` processes that train replicas (DDP). Their statistics are pooled; without that
            the replicas drift apart. None (default): one process. Neither copied nor pickled.

    Raises:
        TypeError: ``module`` or ``base`` is something else.
        ValueError: an argument is out of range, ``base`` averages weights with ``compose="direction"``, the module has no such
            layer, a layer is lazy or sharded, or layers that share a weight differ in their numbers of input channels.

    State: per weight, "bnp_mean" (starts at 0), "bnp_var" (starts at 1), "bnp_rows" and "bnp_samples" (N and n of the last step;
    0: not seen), among the states of ``base``. ``own[weight]`` has them without the prefix.

    A step warns of layers that have a gradient although no input of theirs was ever seen.

    Source: Lange, Helfrich, Ye 2022, JMLR 23(72), whose constants are recalled, not quoted. The term in delta^2, q of
    convolutions and "direction" are ours: docs/theory.md, A.3.3 to A.3.5.

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
    #: The layers of the module, preconditioned or not.
    _watched: list[nn.Module]
    #: The weights that had hooks since the last step.
    _awaited: set[Tensor]
    #: False after ``remove``.
    _observes = True

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
        self._check_steps_alone()
        if compose == "direction":
            check_direction(base)
        self.module, self.compose, self.process_group = module, compose, process_group
        self.stat_momentum, self.eps1, self.eps2 = stat_momentum, eps1, eps2
        self._pending = {}
        self._attach()
        if not self._layers:
            raise ValueError(
                "module must have an nn.Linear or nn.Conv layer whose weight base updates, "
                f"got {type(module).__name__} with none"
            )
        self._awaited = set(self._layers)
        self._join_states()

    def _set_up(self) -> None:
        super()._set_up()
        self._said: set[str] = set()

    def _attach(self) -> None:
        """Find the layers, and put hooks on them unless ``remove`` was called."""
        self._layers = layers_of(self.module, self._params(), self._name_of, in_z=self.compose == "direction")
        self._watched = list(plain_layers(self.module))
        self._found_with = self._tensors()
        self._observer_hooks = [
            layer.register_forward_hook(Observer(layer, self._observe), with_kwargs=True)
            for layer in self._watched
            if self._observes and layer._parameters["weight"] in self._layers
        ]

    def _detach(self) -> None:
        for hook in self._observer_hooks:
            hook.remove()
        self._observer_hooks = []

    def _tensors(self) -> list[Tensor | None]:
        """What the layers were found by: their parameters and those of ``base``, which anybody may replace."""
        of_layers = [layer._parameters.get(name) for layer in self._watched for name in ("weight", "bias")]
        return [*of_layers, *self._params()]

    def _find_again(self) -> None:
        """Find the layers again if a parameter was replaced."""
        now = self._tensors()
        if len(now) == len(self._found_with) and all(map(operator.is_, now, self._found_with)):
            return
        weights = zip(self._watched, self._found_with[::2], strict=False)
        replaced = [
            layer
            for layer, weight in weights
            if weight in self._layers and layer._parameters.get("weight") is not weight
        ]
        self._detach()
        self._attach()
        lost = {layer for layer in replaced if layer._parameters.get("weight") not in self._layers}
        if lost:
            self._warn(lost, "have new weights that base does not update: put these into its param_groups")

    def remove(self) -> None:
        """Take the hooks off the model. Steps go on with the statistics as they are."""
        self._observes = False
        self._detach()
        self._pending = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to ``base``; its layers are preconditioned too."""
        super().add_param_group(param_group)
        if self.compose == "direction":
            try:
                check_direction(self.base)
            except ValueError:
                del self.param_groups[-1]
                raise
        self._find_again()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class; one of ``base`` alone starts with statistics 0 and 1."""
        super().load_state_dict(state_dict)
        self._pending = {}

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep; layers are found again."""
        found = ("_layers", "_watched", "_found_with", "_awaited", "_said")
        kept = {name: value for name, value in super().__getstate__().items() if name not in found}
        return {**kept, "process_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach()
        self._awaited = set(self._layers)

    # Statistics.

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    @at_stated_precision
    def _observe(self, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        """Add the inputs of one forward to what the next step sees."""
        weight = layer._parameters.get("weight")
        # Values under torch.func must not outlive the call.
        if weight is None or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return
        if weight not in self._layers:
            # Of torch.func.functional_call, or assigned by load_state_dict(assign=True).
            if not any(weight is p for p in self._params()):
                return
            self._find_again()
        if weight in self._layers and weight.requires_grad:
            add_seen(self._pending, weight, x, output)

    @at_stated_precision
    def _update_statistics(self) -> None:
        """Move the running statistics to those of the inputs since the last step."""
        pending, self._pending = self._pending, {}
        if self.process_group is not None:
            pending = pooled(pending, self._layers, self.process_group)
        for weight, inputs in pending.items():
            if weight not in self._layers:
                continue
            self._make_statistics(weight, inputs.mean)
            own, batch = self.own[weight], (inputs.mean, inputs.squares / inputs.count)
            own["mean"], own["var"] = moved(own["mean"], own["var"], batch, self.stat_momentum)
            own["rows"], own["samples"] = inputs.rows, inputs.samples

    def _make_entries(self) -> None:
        for weight, layer in self._layers.items():
            if weight.requires_grad:
                dtype = statistics_dtype(weight)
                self._make_statistics(weight, torch.zeros(layer.channels, dtype=dtype, device=weight.device))

    def _make_statistics(self, weight: Tensor, mean: Tensor) -> None:
        """Statistics of a layer that was not seen, unless it has some: they wait for its first input."""
        if not self._is_known(weight):
            start = {"mean": torch.zeros_like(mean), "var": torch.ones_like(mean)}
            self.own[weight] = {**start, "rows": 0, "samples": 0}

    def _is_known(self, weight: Tensor) -> bool:
        return f"{self._start}rows" in (self.state.get(weight) or {})

    def _is_seen(self, weight: Tensor) -> bool:
        return self._is_known(weight) and self.state[weight][f"{self._start}rows"] > 0

    # The step.

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], T] | None = None) -> T | None:  # type: ignore[override]
        """Step ``base`` on preconditioned gradients; with a closure, evaluate it first and return its value."""
        value = self._evaluated(closure)
        self._update()
        return value

    @torch.no_grad()
    def _update(self) -> None:
        self._find_again()
        if self.compose == "direction":
            check_direction(self.base)
        if self._asked_for_states_only():
            self._step_base()
            self._make_entries()
            return
        self._update_statistics()
        self._warn_of_unseen()
        if self.compose == "gradient":
            transformed: dict[Tensor, Tensor] = {}
            for coordinates in self._with_statistics():
                transformed.update(coordinates.gradients())
            self._with_gradients(transformed)
        else:
            step_in_z(list(self._with_statistics()), coupled_decays(self.base), self._with_gradients)

    def _with_statistics(self) -> Iterator[Coordinates]:
        """The layers whose gradients are transformed in this step."""
        for weight, layer in self._layers.items():
            if weight.grad is None or not self._is_seen(weight):
                continue
            if weight.grad.layout != torch.strided:
                raise RuntimeError(f"the gradient of {self._name_of(weight)} must be dense, got {weight.grad.layout}")
            own = self.own[weight]
            bias = layer.bias if layer.bias is not None and layer.bias.grad is not None else None
            # A checkpoint from before samples counted has none.
            q2 = squared_q(weight, own["rows"], own.get("samples", own["rows"]))
            yield Coordinates(weight, bias, own["mean"], squared_scales(own["var"], self.eps1, self.eps2), q2)

    # What does nothing says so.

    def _warn_of_unseen(self) -> None:
        """Warn of layers that have gradients although no hook saw an input: base's plain step is all they get."""
        awaited, self._awaited = self._awaited, set(self._layers)
        if not self._observes:
            return
        unseen = {
            weight
            for weight in self._layers
            if weight in awaited
            and weight.grad is not None
            and not self._is_seen(weight)
            and (weight.grad.layout != torch.strided or weight.grad.any())
        }
        if unseen:
            self._warn(
                {layer for layer in self._watched if layer._parameters.get("weight") in unseen},
                "have gradients but no inputs were seen, so they take base's plain step. Inputs are seen where the layer "
                "itself is called, in train() mode, with gradients enabled, and if torch.compile first ran the model after "
                "BNP was built",
            )

    def _warn(self, layers: set[nn.Module], what: str) -> None:
        """Warn once of the same layers."""
        names = [name or type(layer).__name__ for name, layer in self.module.named_modules() if layer in layers]
        message = f"layers {', '.join(names)} {what}"
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=2)
