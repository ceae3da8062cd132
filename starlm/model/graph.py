"""A step of decoding on a GPU as one CUDA graph: one token of each slot through all layers, in one launch.

Launched one by one from Python, the kernels of a step take many times as long as the weights take to be read.
A graph replays them, with the same addresses each time: so token ids, origins and the table of the slots'
buffers (`DecodeState.reserve`) are copied into memory that stays, and what was computed is copied out of it.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from starlm.model.state import DecodeState
from starlm.nn.block import Block, through
from starlm.nn.deformer import Deformer, step_kernel
from starlm.nn.mlp import MLP
from starlm.nn.state import Reserved
from starlm.ops.plain import is_plain

# Graphs kept of a model, one for each number of slots; the one unused for longest goes.
MOST = 32
# Of what a model must be made; and blocks, also those of transformers.
MODULES = {nn.Embedding, nn.ModuleList, nn.Linear, Deformer, MLP}

Run = Callable[[], Tensor]


def step(
    model: Any,
    tokens: Int[Tensor, "B T"],
    first: Int[Tensor, "B T"] | None,
    state: DecodeState,
) -> Float[Tensor, "B 1 D"] | None:
    """`StarLM.hidden` of one token of each slot; None where that cannot be, and the state is as it was.

    It can on a GPU, without gradients and autocast, if all layers are Deformers in one dtype that their
    kernels have, without hooks and adapters, and the slots hold rows of that dtype.

    Args:
        model: a `StarLM`, or what has its modules and methods.
    """
    if not _asked_for(model.embedding.weight, tokens, state):
        return None
    weights = fingerprint(model)
    if weights is None:
        return None
    with _LOCK:
        graphs = _GRAPHS.setdefault(model, Graphs())
    return graphs.step(model, weights, tokens, first, state)


def _asked_for(weight: Tensor, tokens: Tensor, state: DecodeState) -> bool:
    """Whether this call is a step that a graph could run."""
    return (
        tokens.shape[1] == 1
        and weight.device.type == "cuda"
        and tokens.device == weight.device
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_plain()
        and not torch.is_autocast_enabled("cuda")
        and not torch.cuda.is_current_stream_capturing()
        and all(slot.rows_device is None for slot in state.slots)
    )


def fingerprint(model: Any) -> tuple[Any, ...] | None:
    """What a graph of this model depends on: its modules and where weights lie. None if there can be none.

    Weights that change in place keep it.
    """
    kernel = step_kernel(model.embedding.weight.device)
    found, dtype = [], model.embedding.weight.dtype
    if kernel is None or dtype not in kernel.DTYPES:
        return None
    if not all(isinstance(block.mixer, Deformer) for block in model.blocks):
        return None
    modules = [model.embedding, model.blocks]
    # Once per token: `Module.modules` and `parameters` would take several times as long.
    for module in modules:
        # Of other modules, adapters say, not all that matters is in their weights.
        if type(module) not in MODULES and not isinstance(module, Block):
            return None
        # Whoever hooks into a module, or gives it another `forward`, wants to be called.
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        found.append(type(module))
        for weight in module._parameters.values():
            if weight is not None:
                if weight.dtype != dtype:
                    return None
                found.append(weight.data_ptr())
        modules.extend(child for child in module._modules.values() if child is not None)
    return dtype, *found


class Graphs:
    """The graphs of one model. Not part of it: copies and files of a model know nothing of them."""

    def __init__(self) -> None:
        self._lock, self._weights = threading.Lock(), None
        self.steps: dict[int, Step] = {}

    def step(
        self,
        model: Any,
        weights: tuple[Any, ...],
        tokens: Int[Tensor, "B 1"],
        first: Int[Tensor, "B 1"] | None,
        state: DecodeState,
    ) -> Float[Tensor, "B 1 D"] | None:
        """`step`, with the model's `fingerprint`."""
        weight = model.embedding.weight
        mixers = [block.mixer for block in model.blocks]
        starts = [slot.first for slot in state.slots]
        if first is not None:
            first = first.cpu()
            starts = first[:, 0].tolist()
        places = state.reserve(mixers, weight, starts)
        if places is None:
            return None
        origin = None
        if orders := mixers[0].orders:
            # Here the host waits for the token.
            reach = state.first(1, torch.device("cpu")) if first is None else first
            origins = model._origins(tokens.cpu(), reach, state)
            origin = torch.cat([origins[n] for n in orders], dim=1)
        table = torch.from_numpy(places)
        # The memory of a graph is for one call at a time.
        with self._lock, torch.cuda.device_of(weight):
            of_size = self._of(weights, table, origin, weight.device)
            hidden = of_size(model, tokens, table, origin)
        state.advance(1, first)
        return hidden

    def _of(
        self, weights: tuple[Any, ...], table: Tensor, origin: Tensor | None, device: torch.device
    ) -> "Step":
        """That for so many slots, and these weights."""
        if weights != self._weights:
            self.steps.clear()
            self._weights = weights
        batch = table.shape[-1]
        found = self.steps.pop(batch, None) or Step(table, origin, device)
        self.steps[batch] = found
        if len(self.steps) > MOST:
            del self.steps[next(iter(self.steps))]
        return found


class Step:
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
        layers = [Reserved(streams, self._origin) for streams in self._table]
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


def graphs_of(model: nn.Module) -> list[int]:
    """The numbers of slots that there are graphs for, the one unused for longest first."""
    graphs = _GRAPHS.get(model)
    return [] if graphs is None else list(graphs.steps)


_LOCK, _RECORDING = threading.Lock(), threading.Lock()
_STREAMS: dict[torch.device, torch.cuda.Stream] = {}
_GRAPHS: "weakref.WeakKeyDictionary[nn.Module, Graphs]" = weakref.WeakKeyDictionary()
