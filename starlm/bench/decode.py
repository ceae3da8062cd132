"""Generation with a long context behind it: time per token, bytes of state per token, beside attention.

    starlm bench decode
    starlm bench decode --contexts 1000 1000000 --peers star
    starlm bench decode --contexts 1000 --depth 12 --dim 768 --vocab-size 16384
    starlm bench decode --contexts 1000 --peers star gated --batch 32

The limit is the time that the machine takes to read the weights once: their bytes over the bandwidth that
summing a tensor of the same size reaches, measured in the same rounds. Weights that fit into a cache (50 MB
on an H100) are read from there, by the sum as by the model.
"""

from collections.abc import Callable
from typing import Any

import torch

from starlm.bench.config import DecodeOptions
from starlm.bench.grid import Grid, Peer, run
from starlm.device import pick_device
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.model.state import DecodeState

LIMIT, CHUNK = "weights read once", 2048


def main(options: DecodeOptions, machine: dict[str, str]) -> dict[str, Any]:
    """Print the table; everything that was measured, for JSON."""
    known: dict[str, tuple[str, dict[str, Any]]] = {
        "star": ("star", {"preset": "star"}),
        "gated": ("gated", {"preset": "gated"}),
        "bounded": (f"gated, {options.max_shift} back", {"preset": "gated", "max_shift": options.max_shift}),
        "attention": ("attention", {"layers": "A"}),
    }
    models = {name: _model(settings, options) for name, settings in map(known.__getitem__, options.peers)}
    state_bytes: dict[str, dict[int, int]] = {name: {} for name in models}

    def decoder(name: str, context: int) -> Callable[[], Any]:
        model = models[name]
        state = model.new_state(options.batch)
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(options.vocab_size, (options.batch, context), generator=random)
        tokens = tokens.to(model.head.weight.device)
        if model.config.layers == "A":
            _fill(state, model, context)
        else:
            with torch.inference_mode():
                for piece in tokens.split(CHUNK, 1):
                    model(piece, state=state, last_only=True)
        state_bytes[name][context] = state.num_bytes
        steps = tokens[:, : options.tokens]

        @torch.inference_mode()
        def decode() -> None:
            for number in range(options.tokens):
                model(steps[:, number % context : number % context + 1], state=state)

        return decode

    weights = torch.cat(
        [p.detach().flatten() for n, p in next(iter(models.values())).named_parameters() if _read(n)]
    )

    def limit(_: int) -> Callable[[], Any]:
        return lambda: [weights.sum() for _ in range(options.tokens)]

    peers = {LIMIT: Peer(make=limit)}
    for name in models:
        peers[name] = Peer(
            make=lambda context, name=name: decoder(name, context),
            # All of its memory is read for each token.
            cost=(
                lambda context, model=models[name]: (
                    weights.nbytes + options.batch * model.state_bytes(context)
                )
            )
            if name == "attention"
            else None,
        )
    grid = Grid(
        axis="context",
        unit="ms per token" if options.batch == 1 else f"ms per step of {options.batch} streams",
        value=lambda seconds, _: seconds / options.tokens * 1e3,
        baseline=LIMIT,
        together=True,
    )
    result = run("decode", grid, peers, options, machine)
    print("\nTokens per second:")
    for cell in result["cells"]:
        cell["tokens_per_second"] = options.batch / cell["value"] * 1e3
        if cell["peer"] != LIMIT:
            print(f"{cell['peer']:>24}  {cell['size']:>9,}: {cell['tokens_per_second']:,.0f}")
    print(f"\n{weights.nbytes / 2**20:.0f} MiB of weights are read for each step. Decode state, MiB:")
    for name, sizes in state_bytes.items():
        print(f"{name:>24}  " + "  ".join(f"{n:,}: {size / 2**20:.2f}" for n, size in sizes.items()))
    return {**result, "weight_bytes": weights.nbytes, "state_bytes": state_bytes}


def _fill(state: DecodeState, model: StarLM, context: int) -> None:
    """Random keys and values: attention takes minutes to read a long context, and timings stay the same."""
    config, weight = model.config, model.head.weight
    shape = context, config.num_heads, config.head_dim
    for slot in state.slots:
        for layer in slot.layers:
            for stream in ("key", "value"):
                rows = torch.randn(shape, dtype=weight.dtype, device=weight.device)
                layer.get(stream, None).append(rows, 0)
        slot.length = context


def _read(name: str) -> bool:
    """Whether decoding a token reads all of this weight; of the embedding it reads one row."""
    return not name.startswith("embedding")


def _model(settings: dict[str, Any], options: DecodeOptions) -> StarLM:
    torch.manual_seed(0)
    model = StarLM(
        StarLMConfig(vocab_size=options.vocab_size, depth=options.depth, dim=options.dim, **settings)
    )
    return model.to(pick_device(options.device), getattr(torch, options.dtype)).eval()
