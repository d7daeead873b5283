"""The Gram matrix of the tasks' gradients, of a proxy instead of all shared parameters.

**What the proxy is.** The gradient of a task's weight * loss with respect to

- ``weights``: the last shared weights: weight and bias of the context module's last layer; where tasks share no
  trained context module (``none``, ``share: false``, frozen), of the projection, else of the backbone's last trained
  layer. It costs a backward of each head and no further. The tasks may have different inputs. What a head reads of
  the pyramid does not pass through them and is not seen. Averaged over ranks before the products.
- ``features``: the context module's output, for tasks that share one input (Sener & Koltun 2018, MGDA-UB: bounds
  the gradients of all shared parameters). Its products tell apart what samples and places want. A rank's features are
  its own samples', so the products are added.

It equals the full gradient's Gram matrix only where nothing else is shared; elsewhere signs of its products agree
with those of the full gradients where tasks conflict or agree clearly, lengths do not.

With gradient accumulation it is that of each batch of the window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from densectx.errors import ConfigError
from densectx.model import DenseModel
from densectx.nn.norm import PerInput
from densectx.normalising import sum_over_ranks

Of: TypeAlias = Literal["weights", "features"]
OF: Final = ("weights", "features")


def last_shared(model: DenseModel) -> list[nn.Parameter]:
    """The last trained parameters that every task uses.

    Raises:
        ConfigError: there are none: everything shared is frozen, or ablated.
    """
    if model.ablate:
        raise ConfigError(
            f"ablate {model.ablate} leaves nothing that tasks share; gradients have nothing to agree about, take fixed."
        )
    parts: list[nn.Module] = [model.backbone, model.projection]
    if "shared" in model.context:
        parts.append(model.context["shared"])
    for part in reversed(parts):
        copies = {id(m) for norm in part.modules() if isinstance(norm, PerInput) for m in norm.modules()}
        for module in reversed([m for m in part.modules() if id(m) not in copies]):
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own:
                return own
    raise ConfigError("nothing that tasks share is trained (model.freeze); take a method that looks at losses.")


def of_weights(
    losses: Mapping[str, Tensor], tasks: Sequence[str], weights: Sequence[nn.Parameter], scale: float = 1.0
) -> Tensor:
    """(T, T) float64, CPU: products of the gradients with respect to weights, averaged over ranks before.

    Args:
        losses: weight * loss of the tasks of this rank, each a share of a mean over ranks.
        tasks: those of any rank; zeros where this rank has none.
        weights: see :func:`last_shared`.
        scale: what losses are multiplied by on the way, lest float16 loses their small gradients.
    """
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    table = torch.zeros(len(tasks), sum(w.numel() for w in weights), dtype=dtype, device=weights[0].device)
    for row, task in zip(table, tasks, strict=True):
        if task in losses and losses[task].requires_grad:
            found = torch.autograd.grad(losses[task] * scale, weights, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
            torch.cat([part.flatten().to(dtype) for part in parts], out=row)
    table /= scale
    table /= sum_over_ranks(table)
    table = table.double()
    return (table @ table.T).cpu()


def of_features(
    losses: Mapping[str, Tensor],
    tasks: Sequence[str],
    features: Mapping[str, Tensor],
    scale: float = 1.0,
    *,
    device: torch.device,
) -> Tensor:
    """(T, T) float64, CPU: products of the gradients with respect to the shared features, added over ranks.

    Args:
        losses: weight * loss of the tasks of this rank, each a share of a mean over ranks.
        tasks: those of any rank; zeros where this rank has none.
        features: of each task of this rank; the very same tensor for all.
        scale: as in :func:`of_weights`.
        device: of the model, on which ranks add; a rank without losses has no other way to know it.

    Raises:
        ConfigError: the tasks have different features.
    """
    shared = next(iter(features.values()), None)
    other = next((task for task, one in features.items() if one is not shared), None)
    if other is not None:
        raise ConfigError(
            f"of: features needs tasks that share one input; {other} has its own (it changes the picture). Take of:"
            " weights.",
            "model.balancing",
        )
    gram = torch.zeros(len(tasks), len(tasks), dtype=torch.float64, device=device)
    if shared is not None and shared.requires_grad:
        zero = torch.zeros_like(shared, dtype=torch.float64).flatten()
        rows = [
            torch.autograd.grad(losses[task] * scale, shared, retain_graph=True)[0].double().flatten() / scale
            if task in losses and losses[task].requires_grad
            else zero
            for task in tasks
        ]
        table = torch.stack(rows)
        gram = table @ table.T
    gram /= sum_over_ranks(gram) ** 2  # of means over ranks, as the gradients of weights are
    return gram.cpu()
