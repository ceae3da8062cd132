"""A step of decoding, one token of each slot, through all layers in one piece instead of module by module.

Which pieces there are: on a GPU a CUDA graph (`starlm.model.graph`), on a CPU a program of our own
(`starlm.model.program`). Who may take one, and what both need, is decided here.
"""

import threading
import weakref
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from starlm.model.graph import Graphs
from starlm.model.program import MOST_ROWS, Program
from starlm.model.state import DecodeState, Mixer, StepInputs, row_layout
from starlm.nn.attention import Attention
from starlm.nn.block import Block
from starlm.nn.deformer import Deformer
from starlm.nn.heads import LONGEST
from starlm.nn.linear import is_bare
from starlm.nn.mlp import MLP
from starlm.ops.anchors import longest
from starlm.ops.backends import has_kernels
from starlm.ops.plain import is_plain

if TYPE_CHECKING:
    from starlm.model.model import Backbone

# Of what a model must be made, and what these do when called; starlm.hf adds its own blocks.
MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward for kind in (nn.Embedding, nn.ModuleList, nn.Linear, Block, Deformer, MLP, Attention)
}


def step(
    model: "Backbone",
    tokens: Int[Tensor, "B T"],
    first: Int[Tensor, "B T"] | None,
    state: DecodeState,
    *,
    logits: bool,
) -> Float[Tensor, "B 1 _"] | None:
    """`StarLM.hidden` of one token of each slot, or its logits; None, and the state as it was, where that
    cannot be.

    It can without gradients and autocast, if all layers are Deformers or attention, in one dtype that their
    kernels have, without hooks and adapters, and the slots hold rows of that dtype; on a CPU for up to
    MOST_ROWS slots.
    """
    if not _asked_for(model.embedding.weight, tokens, state):
        return None
    parts = parts_of(model)
    if parts.stepper is None or parts.are_hooked():
        return None
    state.check_layout(parts.of_states)
    if first is not None:
        first = first.cpu()
    starts = np.array([slot.first for slot in state.slots] if first is None else first[:, 0].tolist())
    with state.working():
        table = state.step_table(parts.mixers, model.embedding.weight, parts.layout, starts)
        if table is None:
            return None
        origin = np.empty((len(tokens), 0), np.int64)
        if parts.orders:
            origin = parts.of_heads(state.anchors(tokens, starts[:, None])[:, 0])
        run = parts.stepper.logits if logits else parts.stepper.hidden
        result = run(model, StepInputs(tokens, table, origin))
        state.advance(1, first)
    return result


def logits_of_step(model: "Backbone", hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B 1 V"] | None:
    """`StarLM.logits` of one token of each slot; None where that cannot be.

    It can on a CPU, if the head is a dense layer without a bias, hooks and adapters.
    """
    device = hidden.device
    if device.type != "cpu" or hidden.shape[1] != 1 or not _wanted(device, len(hidden)):
        return None
    parts = parts_of(model)
    if parts.head is None or parts.head.dtype != hidden.dtype or parts.are_hooked():
        return None
    from starlm.ops import cpu_program  # numba takes half a second to import

    return cpu_program.logits(hidden[:, 0], parts.head, model.config.softcap)[:, None]


class Stepper(Protocol):
    """What runs the steps of a model as it is. It does not hold the model, which may go."""

    @property
    def sizes(self) -> list[int]:
        """The numbers of slots that it has something for, the one unused for longest first."""
        ...

    def hidden(self, model: "Backbone", inputs: StepInputs) -> Float[Tensor, "B 1 D"]:
        """The residual stream after the last block, normalised."""
        ...

    def logits(self, model: "Backbone", inputs: StepInputs) -> Float[Tensor, "B 1 V"]:
        """The model's logits of that."""
        ...


class Parts:
    """The modules that a model is made of, and what can run its steps as long as it is: `stepper`, or None.

    Weights that change in place may do so; settings of layers may not, since code that is written has them in
    it. `head` is the weight of a head that is a dense layer like the others, or None.
    """

    def __init__(self, model: "Backbone") -> None:
        self._modules = [model.embedding, model.blocks]
        self._head = getattr(model, "head", None)
        self.head = _plain_head(self._head, model.embedding.weight)
        if self.head is not None:
            self._modules.append(self._head)
        for module in self._modules:
            self._modules.extend(child for child in module._modules.values() if child is not None)
        self._holders = [module._modules for module in self._modules if module._modules]
        self._owners = [module._parameters for module in self._modules if module._parameters]
        self._hooks = [h for m in self._modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._vars = list(map(vars, self._modules))
        self.mixers: list[Mixer] = []
        self.stepper: Stepper | None = None
        if self._is_steppable():
            self.mixers = [cast(Mixer, block.mixer) for block in model.blocks]
        known = [*model.orders, LONGEST]
        if self.mixers and _agree(self.mixers, known):
            weight = model.embedding.weight
            self.layout = row_layout(self.mixers, weight)
            self.orders = next((m.orders for m in self.mixers if isinstance(m, Deformer) and m.orders), [])
            self._columns = [known.index(n) for n in self.orders]
            self.stepper = STEPPERS[weight.device.type](model, self.head)
        self.of_states = model.layout()
        self._softcap, self._seen = model.config.softcap, self._look()

    def are_those_of(self, model: "Backbone") -> bool:
        """Whether the model is made of the same modules still, whose weights lie where they did."""
        embedding, blocks = self._modules[:2]
        same = model.embedding is embedding and model.blocks is blocks
        same = same and getattr(model, "head", None) is self._head and model.config.softcap == self._softcap
        return same and self._look() == self._seen

    def are_hooked(self) -> bool:
        """Whether somebody hooks into a module, or has given it another `forward`, and wants to be called."""
        if any(self._hooks) or has_global_hooks() or any("forward" in own for own in self._vars):
            return True
        return any(kind.forward is not known for kind, known in MODULES.items())

    def of_heads(self, found: Int[np.ndarray, "B N"]) -> Int[np.ndarray, "B A"]:
        """The anchors of anchored heads, of those for each n that the model has."""
        if LONGEST in self.orders:
            best = longest(dict(enumerate(torch.from_numpy(found)[:, None].unbind(-1))))
            found = np.concatenate([found, best.numpy()], axis=1)
        # In C's order for any number of slots, unlike found[:, columns]: kernels are compiled for an order.
        return found.take(self._columns, axis=1)

    def _look(self) -> list[Any]:
        # For every token: as little Python as can be. Part of a weight may begin where all of it did.
        weights, children = self._weights(), chain.from_iterable(map(dict.values, self._holders))
        seen: list[Any] = list(map(id, children))
        for of_weight in (Tensor.data_ptr, Tensor.size, Tensor.stride):
            seen.extend(map(of_weight, weights))
        seen.extend([mixer.row_layout for mixer in self.mixers])
        return seen

    def _weights(self) -> list[Tensor]:
        return [w for w in chain.from_iterable(map(dict.values, self._owners)) if w is not None]

    def _is_steppable(self) -> bool:
        """Whether a stepper would do what the modules do."""
        weights = self._weights()
        dtype, device = weights[0].dtype, weights[0].device
        # Of other modules, adapters say, not all that matters is in their weights.
        known = all(type(m) in MODULES for m in self._modules)
        plain = all(type(w) is nn.Parameter and w.dtype == dtype and w.is_contiguous() for w in weights)
        return known and plain and has_kernels(device, dtype) and len(self._modules[1]) > 0


def _agree(mixers: list[Mixer], known: list[int]) -> bool:
    """Whether all layers can have the same anchors, n of which are `known`, and the same positions."""
    anchors = {tuple(m.orders) for m in mixers if isinstance(m, Deformer) and m.orders}
    turns = {(m.dim // m.heads, m.rope_base) for m in mixers if isinstance(m, Attention)}
    return len(anchors) < 2 and len(turns) < 2 and all(n in known for n in chain(*anchors))


def _plain_head(head: Any, like: Tensor) -> Tensor | None:
    """The weight of a head that is nothing more than its weight, in the dtype and place of the others."""
    if not isinstance(head, nn.Module) or not is_bare(head) or type(head.weight) is not nn.Parameter:
        return None
    weight = head.weight
    same = weight.dtype == like.dtype and weight.device == like.device and weight.is_contiguous()
    return weight if same and has_kernels(like.device, weight.dtype) else None


def parts_of(model: "Backbone") -> Parts:
    """Those of the model, looked up anew where they have changed."""
    with _LOCK:
        parts = _PARTS.get(model)
        if parts is None or not parts.are_those_of(model):
            parts = _PARTS[model] = Parts(model)
        return parts


def sizes_of(model: "Backbone") -> list[int]:
    """The numbers of slots for which steps were taken in one piece, by the model as it was then."""
    parts = _PARTS.get(model)
    return [] if parts is None or parts.stepper is None else parts.stepper.sizes


def _asked_for(weight: Tensor, tokens: Tensor, state: DecodeState) -> bool:
    """Whether this call is a step that could be taken in one piece."""
    return (
        tokens.shape[1] == 1
        and tokens.device == weight.device
        and _wanted(weight.device, len(tokens))
        and all(slot.rows_device is None for slot in state.slots)
    )


def _wanted(device: torch.device, rows: int) -> bool:
    """Whether kernels may take the place of modules, for so many rows."""
    return (
        (device.type == "cuda" or rows <= MOST_ROWS)
        and has_kernels(device, torch.float32)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_plain()
        # A mode that counts or replaces operators sees none in one piece.
        and not torch._C._len_torch_dispatch_stack()
        and not torch.is_autocast_enabled(device.type)
        and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


STEPPERS: dict[str, Callable[[Any, Tensor | None], Stepper]] = {"cuda": Graphs, "cpu": Program}
_LOCK = threading.Lock()
_PARTS: "weakref.WeakKeyDictionary[nn.Module, Parts]" = weakref.WeakKeyDictionary()
