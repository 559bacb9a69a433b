"""Muon for the matrices of the layers and AdamW for everything else, as one optimizer.

torch's own Muon iterates in bfloat16, which CPUs without such instructions emulate a hundred times slower than float32;
this one iterates in the dtype it is told, and orthogonalises all matrices of one shape in one batched product.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

# quintic Newton-Schulz coefficients of Jordan et al., "Muon" (2024)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) on hidden matrices, AdamW on embeddings, head, norms and biases.

    Args:
        model: its 2-D parameters inside decoder layers go to Muon.
        muon_lr: learning rate of Muon; an update has spectral norm about 1 times sqrt(max(1, rows / columns)).
        lr: learning rate of AdamW.
        momentum: Nesterov momentum of Muon.
        betas, eps: of AdamW.
        weight_decay: decoupled, for matrices only.
        dtype: of Muon's iteration; None for that of the parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        muon_lr: float = 0.02,
        lr: float = 3e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
    ):
        matrices, rest = _split(model)
        self.dtype = dtype
        groups = [
            {"params": matrices, "kind": "muon", "lr": muon_lr, "momentum": momentum, "weight_decay": weight_decay},
            {"params": rest, "kind": "adamw", "lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            (self._muon if group["kind"] == "muon" else self._adamw)(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        for shape, same in by_shape.items():
            for parameter in same:
                if "momentum" not in self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            gradients = _gradients(same)
            buffers = [self.state[parameter]["momentum"] for parameter in same]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(gradients, buffers, group["momentum"])
            updates = orthogonalise(torch.stack(nesterov).to(self.dtype or same[0].dtype))
            scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            if group["weight_decay"]:
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, list(updates.to(same[0].dtype).unbind()), alpha=-scale)

    def _adamw(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            _gradients(parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """`(n, rows, columns)` to nearly orthogonal matrices of the same row and column spaces, by Newton-Schulz."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a, alpha=1)
    return x if wide else x.mT


def name_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Notes in each group the names of its parameters, which its state on disk is found by again."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[parameter] for parameter in group["params"]]


def gradients_by_modality(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The gradients of what `text` and `image` tokens have of their own; empty where they share all."""
    found: dict[str, list[torch.Tensor]] = {}
    parameters = dict(model.named_parameters())
    for name in filter(is_of_images, parameters):
        for kind, own in (("image", name), ("text", name.replace(".image.", "."))):
            gradient = parameters[own].grad if own in parameters else None
            if gradient is not None:
                found.setdefault(kind, []).append(gradient)
    return found


def is_of_images(name: str) -> bool:
    """Whether a parameter of this name belongs to image tokens alone."""
    return ".image." in name


def _gradients(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _split(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    matrices: list[torch.Tensor] = []
    rest: list[torch.Tensor] = []
    for name, parameter in _trainable(model):
        (matrices if parameter.ndim == 2 and ".layers." in f".{name}" else rest).append(parameter)
    return matrices, rest


def _trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
