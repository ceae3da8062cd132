"""One training step: loss, gradients, clipping, update. On a GPU recorded once, then replayed."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from starlm.data.loader import Batch
from starlm.errors import StarLMError
from starlm.model.model import StarLM
from starlm.train.config import Precision

# Steps that run as they are before one is recorded: what is made at first use, such as the optimizers' state
# and compiled kernels, must be there by then.
WARMUP = 3


class Updates(Protocol):
    """What `starlm.train.optim.Optimizers` does."""

    def update(self) -> None:
        """Update every parameter from its gradient, and clear the gradients, without asking the GPU."""


class TrainingStep:
    """Trains a model on one batch per call.

    A step of a small model is a thousand kernels of a few microseconds each, which Python cannot start as
    fast as a GPU ends them. So on a GPU, after WARMUP steps, one is recorded as a CUDA graph; from then on a
    step is a copy of the batch and one launch. The arithmetic is the same.
    """

    def __init__(
        self,
        model: StarLM,
        optimizers: Updates,
        loss: Callable[..., Tensor],
        *,
        precision: Precision = "float32",
        clip: float = 0.0,
        parts: int = 1,
        graph: bool = True,
    ) -> None:
        """Args:
        loss: loss(inputs, targets, first=first), of tensors [B, T]; `model.loss`, if nothing else is meant.
        precision: of the matrix products.
        clip: largest norm of the whole gradient; 0 is off.
        parts: in which a batch goes by, its gradients added up; must divide its rows.
        graph: replay a recorded step where the model is on a GPU.
        """
        self.model, self.optimizers, self.precision = model, optimizers, precision
        self.clip, self.parts = clip or torch.inf, parts
        self.device = model.head.weight.device
        self._loss = loss
        self._warmup = WARMUP if graph and self.device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._inputs: list[Tensor] = []
        self._results = torch.empty(0)

    def __call__(self, batch: Batch) -> tuple[float, float]:
        """Update the model, at the rates that `Optimizers.schedule` has set; the loss and the norm of its
        gradient, before clipping.

        Raises:
            StarLMError: a part of the model cannot be recorded, or another thread used the GPU meanwhile.
            torch.OutOfMemoryError: the batch does not fit; give more `parts`.
        """
        arrays = (batch.inputs, batch.targets, batch.first)
        tensors = [torch.from_numpy(array) for array in arrays]
        if self._warmup is None:
            results = self._run([tensor.to(self.device) for tensor in tensors])
        else:
            with torch.cuda.device(self.device):
                results = self._replay(tensors)
        loss, norm = results.tolist()
        return loss, norm

    def _run(self, tensors: list[Tensor]) -> Tensor:
        """Loss and norm [2] of a step on inputs, targets and first rows, all [B, T]."""
        losses, total = [], (tensors[1] >= 0).sum()
        for part in zip(*(tensor.chunk(self.parts) for tensor in tensors), strict=True):
            inputs, targets, first = part
            # Each target counts alike, of whichever part; there may be few in one.
            share = (targets >= 0).sum() / total
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                loss = self._loss(inputs, targets, first=first)
            (loss * share).backward()
            losses.append((loss * share).detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizers.update()
        return torch.stack([torch.stack(losses).sum(), norm])

    def _replay(self, tensors: list[Tensor]) -> Tensor:
        if not self._inputs:
            self._inputs = [torch.empty_like(tensor, device=self.device) for tensor in tensors]
        for target, source in zip(self._inputs, tensors, strict=True):
            target.copy_(source)
        if self._warmup:
            self._warmup -= 1
            # What is recorded runs on a stream of its own, and so must all that it finds ready.
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                results = self._run(self._inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            return results
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    self._results = self._run(self._inputs)
            except RuntimeError as error:
                # Leaving the recording fails too, and says less.
                for cause in (error, error.__context__):
                    if isinstance(cause, torch.OutOfMemoryError):
                        raise cause from None
                line, *_ = str(error).split("\n")
                raise StarLMError(
                    f"This training step cannot be recorded as a CUDA graph ({line}). "
                    f"Train with --no-cuda-graph (cuda_graph=False)."
                ) from error
            self._graph = graph
        self._graph.replay()
        return self._results
