"""What every optimizer takes besides its own arguments, kept out of groups and checkpoints."""

from __future__ import annotations

import math
import numbers
from typing import Any, Final

from typing_extensions import TypedDict


class Settings(TypedDict, total=False):
    """Keyword arguments of every optimizer of precond. They concern the whole step, so no group and no checkpoint has them;
    deepcopy and pickle keep them. Only the last six are options of groups, where they may differ, and of checkpoints: what
    rides along in the pass of the step (docs/averages.md, docs/cautious.md).

    Args:
        backend: None picks the best per parameter, or "cpu", "cuda", "triton", "reference".
        max_grad_norm: >= 0, the norm of all gradients of all groups above which they are scaled down to it; inf measures the norm
            and clips nothing. None (default): no norm.
        clip_grad_value: c >= 0; every gradient is clamped to [-c, c]. None (default): not clamped. Not with ``max_grad_norm``.
        norm_type: 2 (default) or inf, the largest magnitude.
        nonfinite: what a norm that is inf or NaN does: "propagate" (default; the step goes on, as in torch), "skip" (the step
            changes nothing) or "raise". Needs ``max_grad_norm``.
        norm_process_group: where parameters are pieces of flat shards, the ``torch.distributed`` process group that has all of
            them; their norm is added up over it. None (default): parameters are whole, or DTensors, which know their mesh. It is
            neither copied nor pickled: set the attribute ``norm_process_group`` of the copy.
        seed: an integer that, with a parameter's name or position, names the random bits of formats that round stochastically
            (default 0). Optimizers of one parameter each, without names, need a seed each.
        offload: "cpu" keeps the states of parameters on CUDA devices in the host's memory, where the CPU backend updates them
            while the device goes on (docs/offload.md). None (default): states are beside their parameters.
        statistics: True takes statistics of every step, in its pass: the attribute ``statistics``, a :class:`precond.Statistics`.
            k >= 1: of every k-th, beginning with the first. False (default): of none.
        cautious: "update" leaves out updates against the gradient, "decay" a decay against the update, "both" does both. None
            (default): neither.
        cautious_rescale: True divides what "update" leaves by its share of the elements, at a second pass over the tensors
            (default False).
        max_update_rms: > 0, the root mean square of a tensor's update over lr above which the update is scaled down to it, at a
            second pass over the tensors. None (default): no limit.
        ema_decay: in [0, 1), keeps an average of the weights, which ``averaged()`` shows; "equal": the mean of all weights from
            ``ema_start`` on. None (default): no average.
        ema_start: >= 0, the steps before averaging begins (default 0).
        ema_format: of the average, as ``state_format``; None (default) is float32, or wider for wider parameters.

    Raises:
        TypeError: another name.
        ValueError: a value out of range, or both ways of clipping.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = precond.SGD([w], lr=1.0, max_grad_norm=1.0)
        >>> w.grad = torch.tensor([6.0, 8.0])
        >>> opt.step()
        >>> opt.grad_norm.item(), round(opt.clip_coef.item(), 4), [round(x, 4) for x in w.tolist()]
        (10.0, 0.1, [2.4, 3.2])
    """

    backend: str | None
    max_grad_norm: float | None
    clip_grad_value: float | None
    norm_type: float
    nonfinite: str
    norm_process_group: Any
    seed: int
    offload: str | None
    statistics: bool | int
    cautious: str | None
    cautious_rescale: bool
    max_update_rms: float | None
    ema_decay: float | str | None
    ema_start: int
    ema_format: Any


DEFAULTS: Final = Settings(
    backend=None,
    max_grad_norm=None,
    clip_grad_value=None,
    norm_type=2.0,
    nonfinite="propagate",
    norm_process_group=None,
    seed=0,
    offload=None,
    statistics=False,
)
#: In place of a process group that a copy could not take along.
LOST: Final = "lost"


def own_settings(owner: str, given: Settings) -> dict[str, Any]:
    """All settings, from those that a constructor was given."""
    for name in given:
        if name not in Settings.__annotations__:
            raise TypeError(f"{owner}.__init__() got an unexpected keyword argument {name!r}")
    own: dict[str, Any] = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    for name in ("max_grad_norm", "clip_grad_value"):
        if own[name] is not None:
            own[name] = float(own[name])
            if not own[name] >= 0.0:
                raise ValueError(f"{name} must be None or >= 0, got {own[name]}")
    if not isinstance(own["seed"], int):
        raise TypeError(f"seed must be an integer, got {own['seed']!r}")
    if own["offload"] not in (None, "cpu"):
        raise ValueError(f"offload must be None or 'cpu', got {own['offload']!r}")
    if not isinstance(own["statistics"], numbers.Integral) or own["statistics"] < 0:
        raise ValueError(f"statistics must be False, True or an integer >= 1, got {own['statistics']!r}")
    own["norm_type"] = float(own["norm_type"])
    if own["norm_type"] not in (2.0, math.inf):
        raise ValueError(f"norm_type must be 2 or inf, got {own['norm_type']}")
    if own["nonfinite"] not in ("propagate", "skip", "raise"):
        raise ValueError(f"nonfinite must be 'propagate', 'skip' or 'raise', got {own['nonfinite']!r}")
    if own["max_grad_norm"] is None and own["nonfinite"] != "propagate":
        raise ValueError(
            f"nonfinite={own['nonfinite']!r} is about a norm and needs max_grad_norm, got None; inf clips nothing"
        )
    if own["max_grad_norm"] is not None and own["clip_grad_value"] is not None:
        raise ValueError(
            "max_grad_norm and clip_grad_value must not both be given, "
            f"got {own['max_grad_norm']} and {own['clip_grad_value']}"
        )
    return own
