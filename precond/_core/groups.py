"""Parameter groups for any torch optimizer: what is decayed, what is not, and the matrices that a matrix method takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .arguments import check_nonnegative

Named = Iterable[tuple[str, Tensor]]
Place = tuple[str, Tensor, nn.Module | None]


def param_groups(
    model: nn.Module | Named,
    weight_decay: float | None = None,
    no_decay: Iterable[str] = ("bias", "norm"),
    *,
    matrices: Mapping[str, Any] | None = None,
    head: str | None = None,
) -> list[dict[str, Any]]:
    """Split trainable parameters into groups: decayed, not decayed, and on request the hidden matrices.

    Not decayed are parameters with fewer than two dimensions (biases, gains of norms, scalars), the gains of weight
    normalisation (torch's ``parametrizations.weight_norm`` and ``weight_norm``) and those that an entry of ``no_decay``
    names. Everything else is decayed, embeddings too: ``no_decay=("bias", "norm", "embed")`` exempts them.

    Args:
        model: a module, or named parameters such as ``model.named_parameters()``. Parameters that do not require a gradient
            are left out; a tied one appears once, under its first name. Take it before a wrapper flattens parameters.
        weight_decay: of the decayed parameters, >= 0; None (default) leaves it to the optimizer.
        no_decay: words looked for, whatever their case, in the last two parts of a parameter's name ("norm1.weight",
            not "norm1.linear.weight") and in the class name, and its bases', of the module that holds it. A tied
            parameter is exempt if any of its places is. A word that occurs nowhere is no error: lists serve many models.
        matrices: options of a group of its own, such as ``dict(lr=0.02)``, for hidden matrices: decayed parameters of two
            dimensions or more (convolutions too) that are neither embeddings nor the head. None (default): no such group.
            Embeddings are what ``nn.Embedding`` or ``nn.EmbeddingBag`` holds, also where it is tied to the head, and
            what the word "embed" names in the sense of ``no_decay``.
        head: with ``matrices``, the name of the output head, a module or a parameter. None (default) takes the model's last
            matrix; "" says that there is no head.

    Returns:
        The groups that are not empty, in the order above. ``params`` are pairs of name and parameter in the model's order,
        which a torch optimizer keeps as ``param_names``.

    Raises:
        ValueError: a negative weight_decay, an empty word, ``params`` in matrices, or a head that the model does not have.
        TypeError: a string for no_decay, unnamed parameters, or matrices without a module: names do not tell embeddings.

    Source: ``param_groups_weight_decay`` of timm and ``configure_optimizers`` of nanoGPT for the dimensions; transformers'
    ``get_decay_parameter_names`` for names and classes.

    Example:
        >>> import precond
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 50))
        >>> groups = precond.param_groups(model, weight_decay=0.1, matrices=dict(lr=0.02))
        >>> for group in groups:
        ...     print([name for name, _ in group["params"]], {k: v for k, v in group.items() if k != "params"})
        ['0.weight', '3.weight'] {'weight_decay': 0.1}
        ['1.bias', '2.weight', '2.bias', '3.bias'] {'weight_decay': 0.0}
        ['1.weight'] {'weight_decay': 0.1, 'lr': 0.02}
        >>> opt = precond.AdamW(groups, lr=3e-4)
    """
    if weight_decay is not None:
        check_nonnegative("weight_decay value", "weight_decay", weight_decay)
    if isinstance(no_decay, str):
        raise TypeError(f"no_decay must be several words, such as ({no_decay!r},), got the string {no_decay!r}")
    words = tuple(no_decay)
    if not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"no_decay must be words that are not empty, got {words!r}")
    if matrices is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module where matrices are asked for: names do not tell embeddings, got {type(model)}"
        )
    if matrices is not None and "params" in matrices:
        raise ValueError("matrices must be options of a group without 'params', got 'params' among them")

    places = list(_places(model))
    gains = _gains(places)
    exempt = {p for name, p, holder in places if p.ndim < 2 or p in gains or _named(words, name, holder)}
    not_hidden: set[Tensor] = set()
    if matrices is not None:
        not_hidden = {
            p
            for name, p, holder in places
            if isinstance(holder, nn.Embedding | nn.EmbeddingBag) or _named(("embed",), name, holder)
        }
        not_hidden |= _head(places, exempt, head)

    names: dict[Tensor, str] = {}
    for name, p, _ in places:
        names.setdefault(p, name)
    decayed: list[tuple[str, Tensor]] = []
    undecayed: list[tuple[str, Tensor]] = []
    hidden: list[tuple[str, Tensor]] = []
    for p, name in names.items():
        if p.requires_grad:
            group = undecayed if p in exempt else decayed if matrices is None or p in not_hidden else hidden
            group.append((name, p))
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": decayed, **decay},
        {"params": undecayed, "weight_decay": 0.0},
        {"params": hidden, **decay, **(matrices or {})},
    ]
    return [group for group in groups if group["params"]]


def _places(model: nn.Module | Named) -> Iterator[Place]:
    """Every place of every parameter: its name there and the module that holds it; a tied one has several."""
    if isinstance(model, nn.Module):
        for prefix, module in model.named_modules():
            for name, p in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
                yield name, p, module
        return
    for item in model:
        match item:
            case (str(name), Tensor() as p):
                yield name, p, None
            case _:
                raise TypeError(
                    f"model must be a torch.nn.Module or pairs of name and parameter, got an item of {type(item)}"
                )


def _gains(places: list[Place]) -> set[Tensor]:
    """Gains of weight normalisation. They have the dimensions of the direction v, each but one of size 1; a linear map to one
    output has such a shape too and is a matrix, so they are told by their names beside v.
    """
    by_name = {name: p for name, p, _ in places}
    found = set()
    for name, p in by_name.items():
        for of_gain, of_direction in (("original0", "original1"), ("_g", "_v")):
            v = by_name.get(name.removesuffix(of_gain) + of_direction) if name.endswith(of_gain) else None
            if v is None or v.ndim != p.ndim or sum(n > 1 for n in p.shape) > 1:
                continue
            if all(n in (1, m) for n, m in zip(p.shape, v.shape, strict=True)):
                found.add(p)
    return found


def _named(words: Iterable[str], name: str, holder: nn.Module | None) -> bool:
    """True if a word occurs in the last two parts of the name or in a class name of the holder."""
    texts = [".".join(name.split(".")[-2:])]
    if holder is not None:
        texts += [cls.__name__ for cls in type(holder).__mro__ if cls not in nn.Module.__mro__]
    return any(word.lower() in text.lower() for word in words for text in texts)


def _head(places: list[Place], exempt: set[Tensor], head: str | None) -> set[Tensor]:
    """The parameters of the output head. By default the last matrix, frozen or not: models register what they use last, last."""
    if head is None:
        return set([p for _, p, _ in places if p not in exempt][-1:])
    found = {p for name, p, _ in places if name == head or name.startswith(f"{head}.")}
    if head and not found:
        raise ValueError(f"head must be the name of a module or parameter of the model, or '' for none, got {head!r}")
    return found
