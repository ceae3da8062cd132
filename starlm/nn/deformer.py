"""StarLM's Deformer layer: every head and channel predicts how far back to read, and reads there."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from starlm.errors import InputError
from starlm.nn.heads import PRESETS, Preset, kinds_of_heads, orders_of
from starlm.nn.linear import init_matrix, linear
from starlm.nn.origins import origins_of
from starlm.nn.state import LayerState, NoState, Reserved
from starlm.ops.backends import fuses, has_kernels, load_kernels
from starlm.ops.constants import ANCHORED, BOX, BOX_SCALE, NOW
from starlm.ops.deform import check_rows
from starlm.ops.elementwise import rms
from starlm.ops.mix import mix
from starlm.ops.plain import is_plain
from starlm.ops.reference import rows_read

if TYPE_CHECKING:
    from starlm.ops.cpu_program import Code, Row


class Reads(NamedTuple):
    """The rows that every channel of one stream reads, counted from the first token.

    A `now` or anchored head reads 1 - fraction of row `near` and fraction of row `far`. A box head reads the
    mean of the rows from `near` to the query's own, and of fraction of row `far`, the one before.
    """

    origin: Int[Tensor, "B T H"]
    """The row that shift 0 reads; -1 where an anchored head has none, and reads nothing."""
    near: Int[Tensor, "B T H C"]
    """-1 where nothing is read."""
    far: Int[Tensor, "B T H C"]
    """-1 where nothing is read."""
    fraction: Float[Tensor, "B T H C"]
    """0 to 1; 0 where `far` is `near`: there is nothing further back."""


class Deformer(nn.Module):
    """Mixes tokens by predicted shifts, in time linear in T and constant per token when decoding.

    From the normalised residual stream x, with `rms` per head::

        product   q = rms(Wq x), k = rms(Wk x);  y = read(q, Wsq x) * read(k, Wsk x)
        value     y = Wo read(rms(Wv x), Ws x)
        gated     y = Wo (read(rms(Wv x), Ws x) * sigmoid(Wg x))
        star      as gated, with heads of several kinds

    and a head of each kind reads, with z its part of the shift projection::

        now       deform(v, softplus(z))               a predicted distance behind the query
        token...  deform(v, z, origin=its anchor)      around the row behind the last same n-gram
        box       mean of v over the last exp(z / 2)   a summary; scaled by sqrt(min(width, 16))

    Example:
        >>> layer = Deformer(dim=64, heads=4, preset="gated")
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        preset: Preset = "gated",
        kinds: Sequence[str] = (),
        max_shift: int | None = None,
        shift_init: float | None = None,
        window: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Args:
            dim: width D of the residual stream.
            heads: H; D = H * C.
            preset: the formula, see above.
            kinds: of the heads, repeated over them (`starlm.nn.heads`); default the preset's own.
            max_shift: shifts of `now` heads and windows of `box` heads are clipped to this many tokens, so
                decoding keeps a bounded number of rows for them.
            shift_init: the shift, in tokens, at which all channels of `now` heads start. Without it they
                are spread, at softplus(N(0, 1)): 0.8 on average.
            window: longest window that box heads start from, in tokens; the shortest is 2.
            device, dtype: of the weights.

        Raises:
            InputError: heads does not divide dim, an unknown preset or kind, an impossible shift or window.
        """
        super().__init__()
        if heads < 1 or dim % heads:
            raise InputError(f"Deformer needs heads to divide dim; got heads={heads}, dim={dim}.")
        if max_shift is not None and (not 0 <= max_shift < math.inf or max_shift != int(max_shift)):
            raise InputError(f"Deformer needs a whole max_shift of 0 or more, or None; got {max_shift}.")
        if window < 2:
            raise InputError(f"Deformer needs a window of 2 or more tokens; got {window}.")
        if shift_init is not None and not 0 < shift_init < math.inf:
            raise InputError(f"Deformer needs shift_init above 0 and finite, or None; got {shift_init}.")
        if preset not in PRESETS:
            raise InputError(f"Deformer has the presets {', '.join(PRESETS)}; got {preset!r}.")
        self.dim, self.heads, self.preset = dim, heads, preset
        self.kinds = kinds_of_heads(preset, kinds, heads)
        self.orders = orders_of(self.kinds)
        self.max_shift, self.shift_init, self.window = max_shift, shift_init, window
        near, boxes = self.kinds.count("now"), self.kinds.count("box")
        spans = {
            "now": slice(0, near),
            "anchored": slice(near, heads - boxes),
            "box": slice(heads - boxes, heads),
        }
        self.spans = {name: span for name, span in spans.items() if span.start < span.stop}
        self._counts = {"near": near, "boxes": boxes}
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if preset == "product":
            self.query, self.key = linear(dim, dim, **place), linear(dim, dim, **place)
            self.query_shift, self.key_shift = nn.Linear(dim, dim, **place), nn.Linear(dim, dim, **place)
        else:
            self.value, self.shift = linear(dim, dim, **place), nn.Linear(dim, dim, **place)
            if preset != "value":
                self.gate = linear(dim, dim, **place)
            self.out = linear(dim, dim, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the weights: the output projection at zero, and the shift projections too, but for a bias.

        So a channel reads at the same distance for every token at first, and learns where else to read from
        there. Projections that start at random are noise to all that reads them (docs/evidence.md).
        """
        for name, layer in self.named_children():
            assert isinstance(layer, nn.Linear)
            if layer.bias is not None:
                nn.init.zeros_(layer.weight)
                self._start_shifts(layer.bias)
            elif name == "out":
                nn.init.zeros_(layer.weight)
            else:
                init_matrix(layer)

    @torch.no_grad()
    def _start_shifts(self, bias: nn.Parameter) -> None:
        nn.init.normal_(bias)
        channels = self.dim // self.heads
        if self.shift_init is not None and "now" in self.spans:
            # softplus^-1, in the form that does not overflow.
            start = self.shift_init + math.log(-math.expm1(-self.shift_init))
            nn.init.constant_(bias[: self.spans["now"].stop * channels], start)
        if "box" in self.spans:
            # 2 log of windows that are log-spaced over the channels.
            windows = bias[self.spans["box"].start * channels :]
            share = torch.linspace(0, 1, len(windows), device=bias.device)
            start, end = math.log(2), math.log(self.window)
            windows.copy_(2 * (start + (end - start) * share))

    def extra_repr(self) -> str:
        """What `print` says of the layer beside its projections."""
        kinds = ", ".join(f"{self.kinds.count(kind)} {kind}" for kind in dict.fromkeys(self.kinds))
        bound = "" if self.max_shift is None else f", max_shift={self.max_shift}"
        return f"{self.dim}, heads={self.heads} ({kinds}), preset={self.preset!r}{bound}"

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of what a decode state keeps rows of, each for every span of heads."""
        return ("query", "key") if self.preset == "product" else ("value",)

    @property
    def row_layout(self) -> tuple:
        """What beside weights decides what becomes of rows: layers that agree in it can read each other's."""
        return self.dim, self.preset, self.kinds, self.max_shift

    def shift_parameters(self) -> list[nn.Parameter]:
        """The shift projections: a parameter group of their own."""
        return [p for name, p in self.named_parameters() if "shift" in name]

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        first: Int[Tensor, "B T"] | None = None,
        origins: Mapping[int, Int[Tensor, "B T"]] | None = None,
        state: LayerState | Reserved | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the tokens of x.

        Args:
            x: normalised residual stream.
            first: first row that each token may read (absolute, when there is a state); default 0.
            origins: for each n of the anchored heads, the row that shift 0 reads: `self.origins` of the token
                ids; with a state what its `extend` says.
            state: rows of earlier tokens; x continues them, and its rows are appended. From
                `starlm.DecodeState`.

        Raises:
            InputError: x of another shape; the layer has anchored heads and `origins` lacks one of their n.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise InputError(f"This Deformer mixes [B, T, {self.dim}]; got the shape {tuple(x.shape)}.")
        if not isinstance(state, Reserved):
            check_rows("Deformer", "first", first, tuple(x.shape[:2]))
            self._check_origins(origins, tuple(x.shape[:2]))
        where = first, origins or {}, state
        if self.preset == "product":
            q = self._read("query", self.query(x), self.query_shift(x), None, *where)
            return q * self._read("key", self.key(x), self.key_shift(x), None, *where)
        gate = None if self.preset == "value" else self.gate(x)
        return self.out(self._read("value", self.value(x), self.shift(x), gate, *where))

    def origins(
        self, tokens: Int[Tensor, "B T"], *, first: Int[Tensor, "B T"] | None = None
    ) -> dict[int, Int[Tensor, "B T"]]:
        """What `forward` asks for as `origins`, for whole sequences of these token ids; {} without anchors.

        Raises:
            InputError: as `starlm.anchors`.
        """
        return origins_of(tokens, self.orders, first=first)

    def write_step(self, code: "Code", layer: int) -> None:
        """Add to the code of a step: x += what `forward` makes of rms(x), as number `layer` of a model."""
        from starlm.ops.cpu_product import ADD  # numba takes half a second to import

        layout = {**self._step_layout, "layer": layer}
        read = code.row("read", self.dim)

        def project(name: str) -> "Row":
            weights, out = getattr(self, name), code.row(name, self.dim)
            code.product(code.x, weights.weight, out, bias=weights.bias, normalise=True)
            return out

        if self.preset == "product":
            code.read(project("query"), project("query_shift"), None, read, stream=0, **layout)
            key, shift = project("key"), project("key_shift")
            code.read(key, shift, read, code.x, stream=1, sigmoid=False, then=ADD, **layout)
            return
        gate = None if self.preset == "value" else project("gate")
        code.read(project("value"), project("shift"), gate, read, stream=0, **layout)
        code.product(read, self.out.weight, code.x, bias=self.out.bias, then=ADD)

    def _check_origins(self, origins: Mapping[int, Tensor] | None, shape: tuple[int, ...]) -> None:
        missing = set(self.orders) - set(origins or ())
        if missing:
            raise InputError(
                f"This Deformer has anchored heads ({', '.join(self.kinds)}), so it needs origins for "
                f"n = {sorted(missing)}: layer.origins(tokens) computes them from the token ids."
            )
        for n in dict.fromkeys(self.orders):
            check_rows("Deformer", f"origins[{n}]", (origins or {})[n], shape)

    def _read(
        self,
        stream: str,
        values: Float[Tensor, "B T D"],
        shift: Float[Tensor, "B T D"],
        gate: Float[Tensor, "B T D"] | None,
        first: Int[Tensor, "B T"] | None,
        origins: Mapping[int, Int[Tensor, "B T"]],
        state: LayerState | Reserved | None,
    ) -> Float[Tensor, "B T D"]:
        """What every head reads of rms(values), gated; `stream` names its rows in the state."""
        if isinstance(state, Reserved):
            from starlm.ops import triton_step  # triton takes half a second to import

            place = state.streams[self.streams.index(stream)]
            return triton_step.step(values, shift, gate, state.origin, place, **self._step_layout)
        if state is None:
            if fuses(values):
                return self._mix(values, shift, gate, first, origins)
        elif (stepped := self._step(stream, values, shift, gate, first, origins, state)) is not None:
            return stepped
        values, rows = rms(values.unflatten(-1, (self.heads, -1))), state or NoState()
        read = []
        for name, distance in self._distances(shift).items():
            v, place = values[:, :, self.spans[name]], f"{stream}.{name}"
            if name == "now":
                read.append(rows.read(place, v, distance, keep=self.max_shift, first=first))
            elif name == "anchored":
                read.append(rows.read(place, v, distance, origin=self._origin(origins), first=first))
            else:
                mean, width = rows.box(place, v, distance, keep=self.max_shift, first=first)
                # Without gradient: the width is learned from what the window holds, not from its size.
                read.append((mean * width.detach().clamp(max=BOX_SCALE).sqrt()).to(v.dtype))
        y = (torch.cat(read, dim=2) if len(read) > 1 else read[0]).flatten(-2)
        return y if gate is None else y * torch.sigmoid(gate)

    def _distances(self, shift: Float[Tensor, "B T D"]) -> dict[str, Float[Tensor, "B T _ C"]]:
        """Tokens, for the heads of each span: shifts of `now` and anchored heads, widths of `box` heads.

        Args:
            shift: what a shift projection says.
        """
        # A projection in bf16 has rounded a distance of 300 tokens to the next even one; from here on, where
        # distances meet rows, all is fp32 at the least.
        shift = shift.to(torch.promote_types(shift.dtype, torch.float32)).unflatten(-1, (self.heads, -1))
        distances = {}
        for name, span in self.spans.items():
            z = shift[:, :, span]
            if name == "now":
                z = nn.functional.softplus(z)
                z = z if self.max_shift is None else z.clamp(max=self.max_shift)
            elif name == "box":
                # What is above is wider than any text; its exponential would be infinite, its gradient NaN.
                z = (z / 2).clamp(max=40).exp()
                z = (z if self.max_shift is None else z.clamp(max=self.max_shift)).clamp(min=1)
            distances[name] = z
        return distances

    def _mix(self, values, shift, gate, first, origins) -> Float[Tensor, "B T D"]:
        """`_read`, fused."""
        heads = (self.heads, -1)
        values, shift = values.unflatten(-1, heads), shift.unflatten(-1, heads)
        gate = None if gate is None else gate.unflatten(-1, heads)
        layout = {**self._counts, "max_shift": self.max_shift}
        return mix(values, shift, gate, self._origin(origins), first=first, **layout).flatten(-2)

    def _origin(self, origins: Mapping[int, Int[Tensor, "B T"]]) -> Int[Tensor, "B T A"] | None:
        return torch.stack([origins[n] for n in self.orders], dim=-1) if self.orders else None

    def _step(self, stream, values, shift, gate, first, origins, state) -> Float[Tensor, "B T D"] | None:
        """`_read` of new tokens of all slots in one go, on a GPU one of each; None where that cannot be."""
        on_cpu = values.device.type == "cpu"
        fits = values.shape[1] >= 1 if on_cpu else values.shape[1] == 1
        if not fits or len(values) != len(state.slots) or state.rows_device not in (None, values.device):
            return None
        if is_plain() or torch.compiler.is_compiling() or not has_kernels(values.device, values.dtype):
            return None
        inputs = [x for x in (values, shift, gate) if x is not None]
        if any(x.dtype != values.dtype for x in inputs):
            return None
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return None
        if (places := self.make_room(stream, values, first, state, count=values.shape[1])) is None:
            return None
        kernels = load_kernels("step", values.device)
        if on_cpu:
            rows = [origins[n] for n in self.orders]
            return kernels.step(values, shift, gate, rows, places, first=first, **self._step_layout)
        origin = self._origin(origins)
        places = torch.from_numpy(places).to(values.device, non_blocking=True)
        return kernels.step(
            values, shift, gate, None if origin is None else origin[:, 0], places, **self._step_layout
        )

    @property
    def _step_layout(self) -> dict[str, Any]:
        return {**self._counts, "heads": self.heads, "max_shift": self.max_shift}

    def make_room(
        self,
        stream: str,
        like: Tensor,
        first: Int[Tensor, "B T"] | None,
        state: LayerState,
        *,
        count: int = 1,
    ) -> Int[np.ndarray, "3 3 B"] | None:
        """Room for more rows of a stream in every slot: what the kernels of a step need to know of them.

        The rows are for the kernel to write. None if a slot holds rows of another dtype, device or shape.

        Args:
            stream: one of `streams`.
            like: in the dtype and on the device of the rows.
            first: as for `forward`.
            count: rows.

        Returns:
            For `now`, anchored and box heads, and each slot: the address of its buffer, the rows that it has,
            and the first that the first of the new tokens may read.
        """
        places = np.zeros((3, 3, len(state.slots)), np.int64)
        for kind, name in ((NOW, "now"), (ANCHORED, "anchored"), (BOX, "box")):
            if name in self.spans:
                keep, sums = None if name == "anchored" else self.max_shift, name == "box"
                span, dtype = self.spans[name], torch.float64 if sums else like.dtype
                row = like.new_empty(0, span.stop - span.start, self.dim // self.heads, dtype=dtype)
                found = state.make_room(f"{stream}.{name}", keep, row, first, count=count, sums=sums)
                if found is None:
                    return None
                places[kind] = found
        return places

    @torch.no_grad()
    def reads(
        self,
        x: Float[Tensor, "B T D"],
        *,
        first: Int[Tensor, "B T"] | None = None,
        origins: Mapping[int, Int[Tensor, "B T"]] | None = None,
        past: int = 0,
    ) -> dict[str, Reads]:
        """Where `forward` reads for the same arguments: of stream `value`, or, product, `query` and `key`.

        Args:
            past: tokens before x, whose rows a decode state holds.

        Raises:
            InputError: as for `forward`.
        """
        self._check_origins(origins, tuple(x.shape[:2]))
        own = torch.arange(past, past + x.shape[1], device=x.device)[None, :, None]
        if self.preset == "product":
            projections = {"query": self.query_shift, "key": self.key_shift}
        else:
            projections = {"value": self.shift}
        found = {}
        for stream, projection in projections.items():
            parts = []
            for name, distance in self._distances(projection(x)).items():
                origin = own.expand(distance.shape[:3])
                if name == "anchored":
                    origin = torch.stack([(origins or {})[n] for n in self.orders], dim=-1)
                if name == "box":
                    # A difference of prefix sums, of which there is one more than there are rows.
                    start = None if first is None else torch.minimum(first, own[..., 0])
                    near, far, fraction = rows_read(distance, None, start, past + 1)
                else:
                    near, far, fraction = rows_read(distance, origin, first, past)
                parts.append(Reads(origin, near, far, fraction.masked_fill(near == far, 0)))
            found[stream] = Reads(*(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True)))
        return found
