"""A step of decoding on a GPU as one CUDA graph: one token of each slot through all layers, in one launch.

Launched one by one from Python, the kernels of a step take many times as long as the weights take to be read.
A graph replays them, with the same addresses each time: so token ids, origins and the table of the slots'
buffers (`DecodeState.step_table`) are copied into memory that stays, and what was computed is copied out of
it.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from starlm.model.state import StepInputs, positioned
from starlm.nn.block import through
from starlm.nn.state import Reserved

# Graphs kept of a model, one for each number of slots; the one unused for longest goes.
MOST = 32

Run = Callable[[], Tensor]


class Graphs:
    """The graphs of one model, of which each is made when its number of slots first comes: a `Stepper`."""

    def __init__(self, model: Any, head: Tensor | None) -> None:
        self.steps: dict[int, RecordedStep] = {}
        self._lock = threading.Lock()

    @property
    def sizes(self) -> list[int]:
        """The numbers of slots that there are graphs for, the one unused for longest first."""
        return list(self.steps)

    def logits(self, model: Any, inputs: StepInputs) -> Float[Tensor, "B 1 V"]:
        """The model's logits of that; the head is no part of a graph."""
        return model.logits(self.hidden(model, inputs))

    def hidden(self, model: Any, inputs: StepInputs) -> Float[Tensor, "B 1 D"]:
        """The residual stream after the last block, normalised."""
        tokens, table, origin = inputs
        weight, places = model.embedding.weight, torch.from_numpy(table)
        rows = torch.from_numpy(origin) if origin.size else None
        # The memory of a graph is for one call at a time.
        with self._lock, torch.cuda.device_of(weight):
            return self._of(places, rows, weight.device)(model, tokens, places, rows)

    def _of(self, table: Tensor, origin: Tensor | None, device: torch.device) -> "RecordedStep":
        """That for so many slots."""
        batch = table.shape[-1]
        found = self.steps.pop(batch, None) or RecordedStep(table, origin, device)
        self.steps[batch] = found
        if len(self.steps) > MOST:
            del self.steps[next(iter(self.steps))]
        return found


class RecordedStep:
    """A step of so many slots: memory for what goes in, and the kernels that run on it."""

    def __init__(
        self, table: Int[Tensor, "L S 3 3 B"], origin: Int[Tensor, "B A"] | None, device: torch.device
    ) -> None:
        """Args: table, origin: of the shapes that every call has."""
        self._replay: Run | None = None
        sizes = [table.numel(), 0 if origin is None else origin.numel()]
        # Ordinary tensors, which may be written under any mode.
        with torch.inference_mode(False):
            self._tokens = torch.zeros(table.shape[-1], 1, dtype=torch.int64, device=device)
            self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
            self._inputs = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
            places, rows = self._inputs.split(sizes)
            self._table = places.view(table.shape)
            self._origin = None if origin is None else rows.view(origin.shape)
        self._events = Events(device)

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        tokens: Int[Tensor, "B 1"],
        table: Int[Tensor, "L S 3 3 B"],
        origin: Int[Tensor, "B A"] | None,
    ) -> Float[Tensor, "B 1 D"]:
        """The residual stream after the last block, normalised."""
        self._events.before()
        parts = [x.flatten() for x in (table, origin) if x is not None]
        torch.cat(parts, out=self._host)
        self._inputs.copy_(self._host, non_blocking=True)
        self._events.copied()
        self._tokens.copy_(tokens)
        if self._replay is None:
            # It runs the step a few times, which writes the same rows again.
            self._replay = capture(lambda: self._run(model), self._inputs.device)
        hidden = self._replay().clone()
        self._events.done()
        return hidden

    def _run(self, model: Any) -> Tensor:
        number, turns = positioned(model), None
        if number is not None:
            turns = model.blocks[number].mixer.turns(self._table[number, 0, 0])
        layers = [Reserved(streams, self._origin, turns) for streams in self._table]
        return through(model.blocks, model.embedding(self._tokens), layers)


class Events:
    """When memory that calls share may be written again, by the host and by any stream."""

    def __init__(self, device: torch.device) -> None:
        here = device.type == "cuda"
        self._copied, self._done = (torch.cuda.Event() if here else None for _ in range(2))

    def before(self) -> None:
        """Wait: the host for its copy to have been read, this stream for the last call to be over."""
        if self._copied is not None and self._done is not None:
            self._copied.synchronize()
            torch.cuda.current_stream().wait_event(self._done)

    def copied(self) -> None:
        """The host's memory is read so far in this stream."""
        if self._copied is not None:
            self._copied.record()

    def done(self) -> None:
        """All of a call is in this stream."""
        if self._done is not None:
            self._done.record()


def capture(run: Run, device: torch.device) -> Run:
    """`run` as a graph, which gives its result in the same memory each time; on a CPU `run` itself."""
    if device.type == "cpu":
        return run
    # What a graph computes must not be bound to the mode in which the first call came.
    with _RECORDING, torch.inference_mode(False), torch.no_grad():
        # One for all: each stream that products run on has tens of MiB of cuBLAS to itself.
        side = _STREAMS.setdefault(device, torch.cuda.Stream(device))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


_RECORDING = threading.Lock()
_STREAMS: dict[torch.device, torch.cuda.Stream] = {}
