"""A step of decoding on a CPU as one program: one token of each slot through all layers, in one call."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from starlm.model.state import StepInputs, positioned

# For more slots PyTorch's products, layer by layer, may be as fast (docs/performance.md).
MOST_ROWS = 16


class Program:
    """The program of one model: a `starlm.model.step.Stepper`."""

    def __init__(self, model: Any, head: Float[Tensor, "V D"] | None) -> None:
        from starlm.ops.cpu_program import Code  # numba takes half a second to import

        table = model.embedding.weight
        self._code = Code(table.dtype, table.shape[1])
        for layer, block in enumerate(model.blocks):
            block.write_step(self._code, layer)
        if head is not None:
            self._code.head(head, model.config.softcap)
        self._attention = positioned(model)

    @property
    def sizes(self) -> list[int]:
        """The numbers of slots that have had a step."""
        return self._code.sizes

    def hidden(self, model: Any, inputs: StepInputs) -> Float[Tensor, "B 1 D"]:
        """The residual stream after the last block, normalised."""
        return self._run(model, inputs, head=False)

    def logits(self, model: Any, inputs: StepInputs) -> Float[Tensor, "B 1 V"]:
        """The model's logits of that, in the same call if its head is a dense layer like the others."""
        if self._code.logits is None:
            return model.logits(self.hidden(model, inputs))
        return self._run(model, inputs, head=True)

    def _run(self, model: Any, inputs: StepInputs, *, head: bool) -> Float[Tensor, "B 1 _"]:
        tokens, table, origin = inputs
        turns = self._turns(model, table)
        return self._code.run(model.embedding.weight, tokens[:, 0], table, origin, turns, head=head)[:, None]

    def _turns(self, model: Any, table: Int[np.ndarray, "L S 3 3 B"]) -> Float[np.ndarray, "B 2 _"]:
        """Cosines and sines of the new tokens' rotary angles."""
        if self._attention is None:
            return np.zeros((table.shape[-1], 2, 0), np.float32)
        mixer = model.blocks[self._attention].mixer
        return mixer.turns(torch.from_numpy(table[self._attention, 0, 0])).numpy()
