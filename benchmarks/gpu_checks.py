"""What `python -m benchmarks.gpu check` checks: the Triton kernels against the definition, at real sizes.

Each check takes the device and T, and raises AssertionError. They run on a CPU too, in Triton's interpreter,
which is how they are tested.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_comparisons import (
    DTYPES,
    EPS,
    NAMES,
    ORDER,
    PARTS,
    SHIFTS,
    NotRun,
    assert_close,
    compare,
    compare_layer,
    deterministic,
    gpu_kernels,
    layer_problem,
    layer_results,
    problem,
    results,
    triton,
)
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM
from starlm.model.step import sizes_of
from starlm.ops import anchors, triton_elementwise
from starlm.ops.box import box, prefix_sums
from starlm.ops.cross_entropy import _softmax_loss, cross_entropy
from starlm.ops.elementwise import relu2
from starlm.ops.mix import mix
from starlm.ops.plain import plain
from starlm.ops.reference import deform_reference

# Rows and width of the problem whose B * S * H * C passes 2^31, and what its backward needs.
WIDE_ROWS, WIDE_HEADS, WIDE_CHANNELS = 131073, 64, 129
WIDE_BYTES = 2 * WIDE_ROWS * WIDE_HEADS * WIDE_CHANNELS * 20


def definition(device: str, length: int) -> None:
    for dtype in DTYPES:
        for size in (1, 2, 3, 63, 64, 65, 129):
            if size <= length:
                values, shift, options = problem(device, size, dtype)
                compare(values, shift, **options)


def long(device: str, length: int) -> None:
    for dtype in DTYPES:
        values, shift, options = problem(device, length, dtype, 4, 64)
        compare(values, shift, **options)


def not_a_number(device: str, length: int) -> None:
    for dtype in DTYPES:
        values, shift, options = problem(device, min(length, 129), dtype)
        compare(values, torch.where(torch.rand_like(shift) < 0.1, torch.nan, shift), **options)


def strided(device: str, length: int) -> None:
    values, shift = torch.randn(2, length, 2, 8, 24, device=device).unbind(2)
    compare(values, shift.abs(), torch.ones((), device=device).expand_as(values))
    grad = torch.randn(24, 8, length, 2, device=device).permute(3, 2, 1, 0)
    compare(values[..., ::3], shift[..., ::3].abs(), grad[..., ::3])


def causal(device: str, length: int) -> None:
    functions = [triton] if device == "cpu" else [triton, torch.compile(triton, fullgraph=True)]
    cut = length * 3 // 4
    for dtype in DTYPES[:3]:
        values, shift, options = problem(device, length, dtype)
        options["past"] = 5
        other = values.clone()
        other[:, 5 + cut :] = torch.nan
        for function in functions:
            one, two = (function(x, shift, **options)[:, :cut] for x in (values, other))
            assert torch.equal(one, two), f"{dtype}: outputs of the past depend on the future"


def repeatable(device: str, length: int) -> None:
    values, shift, options = problem(device, length, torch.float32)
    grad = torch.randn_like(shift)
    with deterministic():
        first = compare(values, shift, grad, **options)
        for _ in range(3):
            again = results(triton, values, shift, grad, **options)
            for name, a, b in zip(NAMES, first, again, strict=True):
                assert torch.equal(a, b), f"{name}: two runs differ"


def compiled(device: str, length: int) -> None:
    if device == "cpu":
        raise NotRun("tests/ops has it for the interpreter")
    function = torch.compile(triton, fullgraph=True)
    for dtype in DTYPES[:3]:
        values, shift, options = problem(device, length, dtype)
        grad = torch.randn(shift.shape, device=device).to(dtype)
        with deterministic():
            both = (results(f, values, shift, grad, **options) for f in (triton, function))
            for name, a, b in zip(NAMES, *both, strict=True):
                assert torch.equal(a, b), f"{name}: another one when compiled, {dtype}"


def many_rows(device: str, length: int) -> None:
    """More batch rows than a grid has places in its second dimension."""
    batch = 70000 if device != "cpu" else 3
    values, shift = torch.randn(2, batch, 2, 1, 8, device=device)
    compare(values, shift.abs())


def wide(device: str, length: int) -> None:
    """Past 2^31 elements: the last rows of the last batch row, where 32-bit addresses would have wrapped."""
    if device == "cpu":
        raise NotRun("tests/ops has it for the interpreter")
    free, _ = torch.cuda.mem_get_info()
    if free < WIDE_BYTES:
        raise NotRun(f"needs {WIDE_BYTES >> 30} GiB, {free >> 30} are free")
    shape, tail = (2, WIDE_ROWS, WIDE_HEADS, WIDE_CHANNELS), 64
    make = {"device": device, "dtype": torch.bfloat16}
    values, shift = torch.randn(shape, **make), torch.rand(shape, **make) * (tail / 2)
    grad = torch.zeros(shape, **make)
    grad[-1, -tail:] = torch.randn(tail, *shape[2:], **make)
    out, dvalues, dshift = results(triton, values, shift, grad)
    wanted = results(
        deform_reference,
        values[-1:, -2 * tail :].float(),
        shift[-1:, -tail:].float(),
        grad[-1:, -tail:].float(),
        past=tail,
    )
    got = out[-1:, -tail:], dvalues[-1:, -2 * tail :], dshift[-1:, -tail:]
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert_close(name, a, b, torch.bfloat16, ORDER[torch.float32] if name == NAMES[1] else 0.0)
    rest = dvalues[:-1].count_nonzero() + dvalues[-1, : -2 * tail].count_nonzero()
    assert rest == 0, "gradient of values: also at rows that nothing read"


def anchored(device: str, length: int) -> None:
    tokens = torch.randint(50, (3, length))
    first = torch.where(torch.rand(3, length) < 0.05, torch.arange(length), 0).cummax(1).values
    wanted = anchors(tokens, [1, 2, 3], first=first)
    got = anchors(tokens.to(device), [1, 2, 3], first=first.to(device)).cpu()
    assert torch.equal(got, wanted), "anchors differ from those of the CPU"


def layer(device: str, length: int) -> None:
    for dtype in DTYPES[:3]:
        for size in {min(length, size) for size in (1, 65, length)}:
            compare_layer(device, size, dtype, 8 if device == "cpu" else 64)
    if device != "cpu":
        compare_layer(device, length, torch.float32, 40, max_shift=100)


def whole_layer(device: str, length: int) -> None:
    """With its projections; by its parameters' gradients, as wholes."""
    layer, _, first, origins = layer_problem(device, length, torch.float32, 8 if device == "cpu" else 64)
    x = torch.randn(2, length, layer.dim, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    found = []
    for context in (gpu_kernels(device), plain()):
        with context:
            out = layer(x, first=first, origins=origins)
            found.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)])
    names = ("output", "gradient of x", *(name for name, _ in layer.named_parameters()))
    for name, a, b in zip(names, *found, strict=True):
        off = ((a - b).norm() / b.norm()).item()
        assert off < 1e-2, f"{name}: off by {off:.3g} of its size"


def repeatable_layer(device: str, length: int) -> None:
    channels = 3 if device == "cpu" else 64
    *problem, wanted = compare_layer(device, length, torch.float32, channels, alone=True)
    with gpu_kernels(device), deterministic():
        again = layer_results(*problem)
    for name, a, b in zip(PARTS, wanted, again, strict=True):
        assert torch.equal(a, b), f"{name}: two runs differ"


def recorded_layer(device: str, length: int) -> None:
    """In a CUDA graph, and by torch.compile: neither waits for the GPU, nor breaks the graph."""
    if device == "cpu":
        raise NotRun("there are no CUDA graphs")
    *problem, wanted = compare_layer(device, length, torch.bfloat16, 64, alone=True)
    with deterministic():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer_results(*problem)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = layer_results(*problem)
        graph.replay()
        torch.cuda.synchronize()
        for name, a, b in zip(PARTS, wanted, recorded, strict=True):
            assert torch.equal(a, b), f"{name}: another one from a CUDA graph"
        layer, tensors, grad, first, origins = problem
        function = torch.compile(lambda *x: layer._read("value", *x, first, origins, None), fullgraph=True)
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves)
        for name, a, b in zip(PARTS, wanted, (out, *torch.autograd.grad(out, leaves, grad)), strict=True):
            assert torch.equal(a, b), f"{name}: another one when compiled"


def sums(device: str, length: int) -> None:
    """Prefix sums of a million rows, and their gradient, in fp64 as on a CPU."""
    from starlm.ops.triton_mix import pieces_of

    rows, channels = (1_000_000 if device != "cpu" else 4 * length), 5
    values = torch.randn(1, rows, 1, channels, device=device)
    (piece,) = pieces_of(values, 0, 1, {})
    got = piece.sums(values.flatten(2)).cpu()
    # What was added up is fp32, so differences of sums give it back to the last bit.
    added = torch.diff(got, dim=1, prepend=torch.zeros(1, 1, channels)).float()
    assert_close(
        "rows",
        added,
        torch.nn.functional.rms_norm(values.cpu().flatten(2), [channels], eps=1e-6),
        torch.float32,
        1e-6,
    )
    off = (got - added.double().cumsum(1)).abs().max().item()
    assert off < 1e-8, f"sums of {rows} rows: off by {off:.3g}"

    shift, grad = torch.randn_like(values) * 4 + 8, torch.randn_like(values)
    leaf = values.requires_grad_()
    with gpu_kernels(device):
        out = mix(leaf, shift, None, None, near=0, boxes=1)
        (got,) = torch.autograd.grad(out, leaf, grad)
    leaf = values.detach().double().cpu().requires_grad_()
    width = (shift.double().cpu() / 2).exp().clamp(min=1)
    mean, width = box(prefix_sums(torch.nn.functional.rms_norm(leaf, [channels], eps=1e-6)), width)
    wanted = mean * width.clamp(max=16).sqrt()
    assert_close("means", out.cpu(), wanted, torch.float32, SHIFTS)
    (wanted,) = torch.autograd.grad(wanted, leaf, grad.double().cpu())
    assert_close("gradient of values", got.cpu(), wanted, torch.float32, SHIFTS)


def relu_squared(device: str, length: int) -> None:
    for dtype in DTYPES[:3]:
        x, grad = (torch.randn(3, length, 129, device=device).to(dtype) for _ in range(2))
        x[0, 0, :3] = torch.tensor([torch.nan, 0.0, torch.inf])
        # The gradient as a view, as those of transposes and sums are.
        for g in (grad, grad.new_ones(()).expand(x.shape)):
            wanted = x.double().relu().square().to(dtype), (2 * x.double().relu() * g.double()).to(dtype)
            got = triton_elementwise.relu2(x), triton_elementwise.relu2_backward(g, x)
            for name, a, b in zip(("relu²", "gradient of relu²"), got, wanted, strict=True):
                assert a.dtype == dtype, f"{name}: {a.dtype}, wanted {dtype}"
                assert_close(name, a, b, dtype)
        if device != "cpu":
            # Of the largest number the plain one makes twice that on its way, which float16 has not.
            leaf = x.nan_to_num(1.0, posinf=1.0).requires_grad_()
            (got,) = torch.autograd.grad(relu2(leaf), leaf, grad)
            with plain():
                (want,) = torch.autograd.grad(relu2(leaf), leaf, grad)
            assert_close("gradient of relu² by autograd", got, want, dtype)


def loss_of_logits(device: str, length: int) -> None:
    """The kernel against its definition in fp64; some rows are ignored, some have infinite or NaN logits."""
    widths = (5, 4099) if device == "cpu" else (5, 4099, 50304)
    for dtype, width, softcap in product(DTYPES[:3], widths, (0.0, 15.0)):
        logits = (8 * torch.randn(min(length, 300), width, device=device)).to(dtype)
        targets = torch.randint(-1, width, (len(logits),), device=device)
        targets[0], targets[1] = -7, width - 1
        logits[2, width // 2], logits[3, :2] = torch.nan, -torch.inf
        targets[2:4] = width - 1
        losses, grad = _softmax_loss(logits.double(), targets, softcap)
        got = triton_elementwise.softmax_loss(logits.clone(), targets, softcap, False)
        where = f"V = {width}, softcap {softcap:g}"
        assert_close(f"losses, {where}", got, losses, torch.float32, ORDER[torch.float32])
        again = triton_elementwise.softmax_loss(logits, targets, softcap, True)
        assert torch.equal(again.nan_to_num(7.0), got.nan_to_num(7.0)), f"losses, {where}: others with grad"
        assert_close(f"gradient, {where}", logits, grad, dtype, ORDER[torch.float32])


def loss_of_a_head(device: str, length: int) -> None:
    """Through autograd and chunks, against products by hand."""
    if device == "cpu":
        raise NotRun("a CPU has kernels of its own")
    for dtype, softcap in product(DTYPES[:3], (0.0, 15.0)):
        hidden = torch.randn(length, 64, device=device).to(dtype).requires_grad_()
        weight = (torch.randn(50304, 64, device=device) / 4).to(dtype).requires_grad_()
        targets = torch.randint(-1, 50304, (length,), device=device)
        loss = cross_entropy(hidden, weight, targets, softcap=softcap)
        got = loss, *torch.autograd.grad(loss, (hidden, weight))
        with torch.no_grad():
            losses, grad = _softmax_loss((hidden @ weight.T).float(), targets, softcap)
            count = (targets >= 0).sum()
            wanted = losses.sum() / count, grad @ weight.float() / count, grad.T @ hidden.float() / count
        for name, a, b in zip(("loss", "gradient of hidden", "gradient of weight"), got, wanted, strict=True):
            off = ((a.float() - b).norm() / b.norm()).item()
            allowed = max(2 * EPS[dtype], 1e-5)
            assert off <= allowed, f"{name}, softcap {softcap:g}: off by {off:.3g} in {dtype}"


def decode_step(device: str, length: int) -> None:
    """Token by token in graphs, in slots at different positions, against one forward by the definition."""
    if device == "cpu":
        raise NotRun("tests/model has it with the kernel of the CPU")
    for options in GRAPHED:
        for dtype, allowed in GRAPHED_DTYPES.items():
            model = small_model(device, dtype, **options)
            error = decoded(model, torch.randint(40, (3, 300), device=device))
            assert error <= allowed, f"{options}, {dtype}: off by {error:.3g} of the largest logit"
            assert sizes_of(model) == [3], f"{options}, {dtype}: no graph was used"


@torch.no_grad()
def decoded(model: StarLM, text: Tensor) -> float:
    """How far 160 steps of three slots are off the full forward at most, in units of the largest logit."""
    state, worst = model.new_state(3, rollback=8), 0.0
    for slot, begin in ((1, 37), (2, 130)):
        model(text[slot : slot + 1, :begin], state=state.pick([slot]))
    with plain():
        wanted = model(text)
    for step in range(160):
        if step == 80:
            # Rows given back, and a copy that goes on in place of its original.
            state.crop([length - 3 for length in state.lengths])
            state = state.fork()
        rows, slots = torch.tensor(state.lengths, device=text.device), torch.arange(3, device=text.device)
        got = model(text[slots, rows][:, None], state=state)[:, 0]
        worst = max(worst, (got - wanted[slots, rows]).abs().max().item())
    return worst / wanted.abs().max().item()


def small_model(device: str, dtype: torch.dtype, **options: Any) -> StarLM:
    """A model whose every weight says something, with shifts of some tokens; for inference."""
    model = StarLM(StarLMConfig(depth=3, vocab_size=40, **options))
    for name, parameter in model.named_parameters():
        scale = 2.0 if "shift" in name else 1.0
        torch.nn.init.normal_(parameter, std=scale * parameter.shape[-1] ** -0.5)
    return model.to(device, dtype).requires_grad_(False)


# What a decode step may be off, and models for it: presets, bounds, heads of 33 channels, attention.
GRAPHED_DTYPES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
GRAPHED = (
    {"preset": "star", "dim": 8 * 64, "heads": 8},
    {"preset": "star", "dim": 8 * 33, "heads": 8, "max_shift": 20},
    {"preset": "product", "dim": 128, "heads": 4},
    {"preset": "gated", "dim": 128, "heads": 1, "max_shift": 5},
    {"preset": "star", "dim": 8 * 64, "heads": 8, "layers": "DDW", "attention_window": 50},
    {"layers": "A", "dim": 4 * 34, "heads": 4},
    {"layers": "WA", "dim": 2 * 128, "heads": 2, "attention_window": 200, "rope_base": 0.0},
)

CHECKS: dict[str, Callable[[str, int], None]] = {
    "definition, T from 1 to 129, every dtype": definition,
    "definition, long, every dtype": long,
    "NaN shifts": not_a_number,
    "strided tensors and gradients": strided,
    "causality to the last bit, eager and compiled": causal,
    "deterministic backward, run after run": repeatable,
    "torch.compile(fullgraph=True)": compiled,
    "70000 batch rows": many_rows,
    "more than 2^31 elements": wide,
    "anchors": anchored,
    "fused layer, between its projections": layer,
    "fused layer, whole": whole_layer,
    "fused layer, deterministic": repeatable_layer,
    "fused layer, CUDA graph and torch.compile": recorded_layer,
    "prefix sums of a million rows, both ways": sums,
    "relu²": relu_squared,
    "loss of logits, V up to 50304": loss_of_logits,
    "loss of a head, with its gradients": loss_of_a_head,
    "decode step in a graph = full forward": decode_step,
}
