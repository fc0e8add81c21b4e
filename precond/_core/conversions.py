"""From formats to plain float32: checkpoints that torch's optimizers load, and master weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import formats
from .optimizer import FusedOptimizer
from .rows import Group
from .sharding import like
from .states import ParamStates

_BESIDE = ("key", "remainder", formats.EMA, f"{formats.EMA}_scale")


def to_torch_state_dict(optimizer: FusedOptimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` as torch's class of the same name would have it: plain float32 states, no options of ours.

    Codes are decoded, 16-bit states widened; scales, remainders and keys are left out, and a ``step`` that torch's class does
    not have. Sharded states stay sharded. The way back needs no function: ``load_state_dict`` of an optimizer with a
    ``state_format`` brings float32 states into it. What a split weight lacks of its master is in no state of torch's:
    :func:`precond.master_weights` gives it.

    Args:
        optimizer: any optimizer of precond. It is not changed.

    Returns:
        A dictionary for ``torch.optim.X.load_state_dict``, whose tensors are copies.

    Raises:
        TypeError: for another optimizer.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.ones(64, 64))
        >>> opt = precond.AdamW([w], state_format="int8")
        >>> w.grad = torch.ones(64, 64)
        >>> opt.step()
        >>> stock = torch.optim.AdamW([w])
        >>> stock.load_state_dict(precond.to_torch_state_dict(opt))
        >>> stock.state[w]["exp_avg"].dtype
        torch.float32
    """
    _check(optimizer)
    packed = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    ids = [i for group in packed["param_groups"] for i in group["params"]]
    states = {}
    for i, p, group in zip(ids, params, groups, strict=True):
        if i in packed["state"]:
            states[i] = _plain_state(optimizer.states, p, group, optimizer.rule_of(group), packed["state"][i])
    own = optimizer.states.recipe.options
    stripped = [{k: v for k, v in group.items() if k not in own(group)} for group in packed["param_groups"]]
    return {"state": states, "param_groups": stripped}


def _plain_state(states: ParamStates, p: Tensor, group: Group, rule: str, state: dict[str, Any]) -> dict[str, Any]:
    forms = states.layout(p, group, rule).states
    plain = {}
    for name, form in zip(states.present(p, rule), forms, strict=True):
        value = state[name]
        if value.dtype in (torch.float64, torch.complex64, torch.complex128):
            plain[name] = value.clone()
        else:
            plain[name] = like(p, formats.values_of(state, name, form, p).clone())
    left = {*_BESIDE, *plain, *(f"{name}_scale" for name in plain)}
    for name, value in state.items():
        if name not in left and (name != "step" or states.keeps_step(rule)):
            plain[name] = value.clone() if isinstance(value, Tensor) else value
    return plain


def master_weights(optimizer: FusedOptimizer, model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model in float32: for split weights with what their remainders add.

    Args:
        optimizer: the optimizer of precond that steps them.
        model: a module; its parameters that the optimizer does not have, or that are not split, are widened as they are.

    Returns:
        Names, as of ``model.named_parameters()``, and copies in float32 (wider ones stay what they are); sharded parameters
        give sharded copies. ``model.float().load_state_dict(masters, strict=False)`` continues in float32.

    Raises:
        TypeError: for another optimizer.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> opt = precond.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, weight_format="split32")
        >>> model.weight.grad = torch.ones_like(model.weight)
        >>> opt.step()
        >>> model.weight.tolist(), precond.master_weights(opt, model)["weight"].tolist()
        ([[1.0, 1.0]], [[0.9998999834060669, 0.9998999834060669]])
    """
    _check(optimizer)
    optimizer.states.begin(p for group in optimizer.param_groups for p in group["params"])
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    masters = {}
    for name, p in model.named_parameters():
        master = optimizer.states.master(p, group_of.get(p, {}))
        masters[name] = like(p, master.clone() if master.dtype == p.dtype else master)
    return masters


def averaged_state_dict(optimizer: FusedOptimizer, model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` with the average of the weights, to evaluate or to publish.

    Args:
        optimizer: the optimizer of precond that steps the model's parameters, with ``ema_decay``; a wrapper around it or a
            trainer's object that has it as ``optimizer`` too.
        model: a module. It is not changed. Where it is sharded, all ranks call this, and the dictionary has shards.

    Returns:
        ``model.state_dict()`` with copies of the model's parameters and buffers, in their dtypes. Parameters without an average
        are as they are.

    Raises:
        TypeError: for another optimizer.
        RuntimeError: no parameter has an average.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> opt = precond.SGD(model.parameters(), lr=1.0, ema_decay=0.5)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> for _ in range(3):
        ...     model.weight.grad = torch.ones(1, 1)
        ...     opt.step()
        >>> precond.averaged_state_dict(opt, model)["weight"].item(), model.weight.item()
        (-2.25, -3.0)
    """
    while not isinstance(optimizer, FusedOptimizer) and (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner  # a trainer's
    if not hasattr(optimizer, "averaged"):
        _check(optimizer)
    with optimizer.averaged():
        found: dict[str, Any] = model.state_dict()
        for name, value in found.items():
            if isinstance(value, Tensor):
                found[name] = value.detach().clone()
    return found


def _check(optimizer: object) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"optimizer must be one of precond, got a {type(optimizer).__name__}")
