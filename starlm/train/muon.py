"""Muon (kellerjordan.github.io/posts/muon) in the precision of one's choice."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from starlm.errors import InputError


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, its state and update rule, but for how matrices are orthogonalised.

    PyTorch iterates in bfloat16 everywhere. Many CPUs are slower so, and the result is a thousand times as
    far from the exact one. On a CPU we iterate matrix by matrix, which stay in the cache; on a GPU all
    matrices of a shape in one batch, and a group's rate and momentum may be tensors.
    """

    def __init__(self, params: Any, *, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        """Args:
        params: matrices, or groups of them.
        dtype: in which matrices are orthogonalised, float32 or bfloat16.
        options: those of `torch.optim.Muon`, but for `adjust_lr_fn`: rates are for its "original".

        Raises:
            InputError: another `adjust_lr_fn`.
        """
        if options.get("adjust_lr_fn") not in (None, "original"):
            raise InputError(f'Muon\'s adjust_lr_fn is "original" here; got {options["adjust_lr_fn"]!r}.')
        super().__init__(params, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape, parameter.device].append(parameter)
            for parameters in shapes.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one shape on one device."""
        momentum, rate, updates = group["momentum"], group["lr"], []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            updates.append(parameter.grad.lerp(buffer, momentum) if group["nesterov"] else buffer)
        rows, columns = parameters[0].shape
        options = group["ns_coefficients"], group["ns_steps"], group["eps"]
        scale = -rate * max(1.0, rows / columns) ** 0.5
        if group["weight_decay"]:
            for parameter in parameters:
                parameter.mul_(1 - rate * group["weight_decay"])
        if parameters[0].device.type == "cpu":
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.add_(orthogonalise(update.to(self.dtype), *options), alpha=scale)
        else:
            stack = torch.stack(updates).to(self.dtype)
            stack = torch.vmap(lambda update: orthogonalise(update, *options))(stack)
            # The rate may be a tensor: no `alpha`.
            updates = list(stack.to(parameters[0].dtype) * scale)
            torch._foreach_add_(parameters, updates)  # pyright: ignore[reportPrivateImportUsage]


def orthogonalise(
    matrix: Float[Tensor, "R C"], coefficients: tuple[float, float, float], steps: int, eps: float
) -> Float[Tensor, "R C"]:
    """The nearest orthogonal matrix, roughly: singular values go to somewhere about 1 (0.7 to 1.2).

    Each step is the odd polynomial X <- (a + b XX' + c (XX')²) X, with X' the transpose. In float32 a matrix
    at least twice as wide as high takes a short cut with half the products: XX' alone determines all the
    polynomials, so it is carried from step to step, and X multiplied once. In bfloat16 the small eigenvalues
    of XX' would drown in rounding.
    """
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    if x.dtype == torch.float32 and x.shape[1] >= 2 * x.shape[0]:
        gram, product = x @ x.T, None
        for step in range(steps):
            factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal().add_(a)
            product = factor if product is None else factor @ product
            if step < steps - 1:
                gram = factor @ gram @ factor
        x = x if product is None else product @ x
    else:
        for _ in range(steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
