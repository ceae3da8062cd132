"""A step of decoding in one piece equals the full forward, whatever happens to states and weights meanwhile.

On a CPU its program, and all of the GPU's graph but the graph itself: the function that it would be captured
from, with the CPU's kernels in place of the GPU's, which tests/ops has tests for.
"""

import copy
import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import BOUNDED, KINDS, make_model, make_tokens
from relations import assert_close, randomise

from starlm.errors import InputError
from starlm.model import graph, program, step
from starlm.model.model import StarLM
from starlm.model.state import DecodeState, row_layout
from starlm.nn.block import Block
from starlm.nn.deformer import Deformer
from starlm.ops import cpu_attention, cpu_program, cpu_step, plain, triton_attention, triton_step

STEPPED = [kind for kind, options in (KINDS | BOUNDED).items() if "C" not in options.get("layers", "D")]


def by_cpu(values, shift, gate, origin, streams, **layout):
    rows = [] if origin is None else [row[:, None] for row in origin.unbind(1)]
    return cpu_step.step(values, shift, gate, rows, streams.numpy(), **layout)


def attention_by_cpu(query, key, value, turns, places, *, window):
    batch, _, heads, channels = query.shape
    out, turns, like = np.empty(query.shape, np.float32), turns.numpy(), np.empty(0, np.float32)
    for slot in range(batch):
        for head in range(heads):
            new = (x[slot, 0, head].numpy() for x in (query, key, value))
            more = turns[slot], places.numpy(), window or 0, slot, head * channels, heads * channels, like
            cpu_attention.attend(*new, *more, out[slot, 0, head])
    return torch.from_numpy(out)


STEPPERS = ["program", "graph", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=STEPPERS)
def stepper(request, monkeypatch):
    if request.param == "graph":
        monkeypatch.setitem(step.STEPPERS, "cpu", graph.Graphs)
        monkeypatch.setattr(triton_step, "step", by_cpu)
        monkeypatch.setattr(triton_attention, "attend", attention_by_cpu)
    return request.param


@pytest.fixture
def device(stepper):
    return "cuda" if stepper == "cuda" else "cpu"


def of_kinds(*kinds):
    return pytest.mark.parametrize("kind", kinds)


with_graphs = pytest.mark.parametrize("stepper", STEPPERS[1:], indirect=True)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def model_on(device, kind="star", dtype=torch.float32, **options):
    return make_model(kind, dtype=dtype, **options).to(device)


def tokens_on(device, *shape):
    return make_tokens(*shape).to(device)


def full(model, tokens):
    """Logits by the definition."""
    with plain():
        return model(tokens)


def check(model, state, text, count, tolerance=1e-4):
    """Append `count` more tokens one by one, each in one piece, to slots that hold `text`; all the tokens."""
    new = tokens_on(text[0].device, len(text), count)
    before = len(step.sizes_of(model))
    got = torch.cat([model(new[:, t : t + 1], state=state) for t in range(count)], dim=1)
    assert len(step.sizes_of(model)) >= max(before, 1), "no step was taken in one piece"
    text = [torch.cat(pair) for pair in zip(text, new, strict=True)]
    for row, ids in zip(got, text, strict=True):
        assert_close(row, full(model, ids[None])[0, -count:], tolerance)
    assert state.lengths == [len(ids) for ids in text]
    return text


@of_kinds(*STEPPED)
def test_token_by_token_equals_the_full_forward(device, kind):
    """From nothing, over several doublings of the buffers."""
    model = model_on(device, kind)
    check(model, model.new_state(), [tokens_on(device, 0)], 300 if device == "cuda" else 140)


@of_kinds("star", "star product", "star, bounded", "star, longest match", "star window", "mixed product")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_slots_at_different_positions(device, kind, mode):
    """Cropped, forked, emptied, in other company, and read by the ordinary path between steps."""
    model = model_on(device, kind)
    with mode():
        states, text = [], []
        for length in (0, 70, 9):
            state, ids = model.new_state(rollback=8), tokens_on(device, length)
            if length:
                model(ids[None], state=state)
            states.append(state)
            text.append(ids)
        state = DecodeState.join(states)
        text = check(model, state, text, 6)
        state.crop([5, 70, 12])
        text = check(model, state, [text[0][:5], text[1][:70], text[2][:12]], 3)
        fork = state.fork(lengths=[8, 72, 0])
        check(model, fork, [text[0], text[1][:72], text[2][:0]], 4)
        text = check(model, state, text, 2)
        state.crop([0, 74, 16])
        text = check(model, state, [text[0][:0], text[1][:74], text[2][:16]], 3)
        two = check(model, state.pick([2, 0]), [text[2], text[0]], 5)
        text = [two[1], text[1], two[0]]
        other = state.reorder([1, 1])
        check(model, other, [text[1], text[1]], 3)
        more = tokens_on(device, 3, 20)
        model(more, state=state)
        text = [torch.cat(pair) for pair in zip(text, more, strict=True)]
        text = check(model, state, text, 4)
        copied = copy.deepcopy(state)
        check(model, copied, text, 3)
        check(model, state, text, 150 if device == "cuda" else 20)


@of_kinds("gated, bounded", "star, bounded", "product, bounded", "window")
def test_rows_that_move_to_the_front(device, kind):
    model = model_on(device, kind, depth=1)
    prompt = tokens_on(device, 1, 1000)
    state = model.new_state(rollback=2)
    model(prompt, state=state)
    check(model, state, list(prompt), 60)
    rows = [rows for layer in state.slots[0].layers for rows in layer.rows.values() if rows.keep is not None]
    assert any(rows.base for rows in rows)


@of_kinds("gated", "star", "star product", "mixed", "window")
def test_packed_and_padded_slots(device, kind):
    model = model_on(device, kind)
    pads, prompt, more = (0, 3, 7), tokens_on(device, 3, 20), tokens_on(device, 3, 12)
    first = torch.tensor(pads, device=device)[:, None]
    state = model.new_state(3)
    model(prompt, state=state, first=first.expand(3, 20))
    got = [model(more[:, t : t + 1], state=state) for t in range(6)]
    # As transformers says it, with each token.
    got += [model(more[:, t : t + 1], state=state, first=first) for t in range(6, 9)]
    # Now slot 1 begins a document.
    start = first.clone()
    start[1] = 29
    got += [model(more[:, 9:10], state=state, first=start)]
    got += [model(more[:, t : t + 1], state=state) for t in range(10, 12)]
    assert step.sizes_of(model) == [3]
    got = torch.cat(got, dim=1)
    for slot, pad in enumerate(pads):
        text = torch.cat([prompt[slot, pad:], more[slot]])
        assert_close(got[slot, :9], full(model, text[None])[0, -12:-3], 1e-4)
        text = more[slot, 9:] if slot == 1 else text
        assert_close(got[slot, 9:], full(model, text[None])[0, -3:], 1e-4)
    state.crop(29)
    assert [slot.first for slot in state.slots] == list(pads)


def test_weights_that_change(device):
    """In place the stepper goes on; elsewhere, or in another dtype, it is made anew."""
    model, other = model_on(device), model_on(device)
    prompt = tokens_on(device, 1, 5)
    for parameter in other.parameters():
        parameter.neg_()

    def decode(tolerance=1e-4):
        state = model.new_state()
        model(prompt, state=state)
        check(model, state, list(prompt), 3, tolerance)
        return step.parts_of(model).stepper

    first = decode()
    for parameter in model.parameters():
        parameter.mul_(1.1)
    assert decode() is first
    model.load_state_dict(other.state_dict())
    assert decode() is first
    model.load_state_dict({name: x.clone() for name, x in other.state_dict().items()}, assign=True)
    assert (changed := decode()) is not first
    model.head.weight = torch.nn.Parameter(model.head.weight * 2)
    assert (last := decode()) is not changed, "the head is part of it"
    up = model.blocks[0].mlp.up
    up.weight = torch.nn.Parameter(up.weight * 2)
    assert (changed := decode()) is not last
    up.weight.data = up.weight.data * 2
    assert (moved := decode()) is not changed
    model.blocks[1].mlp = copy.deepcopy(model.blocks[0].mlp)
    assert (last := decode()) is not moved
    # They begin where they did before, and are fewer.
    up, down = model.blocks[0].mlp.up, model.blocks[0].mlp.down
    up.weight, down.weight = (
        torch.nn.Parameter(w) for w in (up.weight[:24], down.weight[:, :24].contiguous())
    )
    up.out_features = down.in_features = 24
    assert decode() is not last
    square = model.blocks[0].mixer.out.weight
    square.data = square.data.T
    assert step.parts_of(model).stepper is None, "no kernel reads columns"
    square.data = square.data.T.contiguous()
    last = decode()
    model.bfloat16()
    assert decode(0.1) is not last
    model.float()
    decode()


@of_kinds("star", "window")
def test_settings_that_change(device, kind):
    """After the first step, in which they are written down."""
    model, setting = model_on(device, kind), "max_shift" if kind == "star" else "window"
    check(model, model.new_state(), [tokens_on(device, 0)], 12)
    setattr(model.blocks[0].mixer, setting, 3)
    check(model, model.new_state(), [tokens_on(device, 0)], 12)
    model.config = replace(model.config, softcap=2.0)
    check(model, model.new_state(), [tokens_on(device, 0)], 12)


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_that_differ(device, layer):
    """Anchored heads in one layer only."""
    model = model_on(device, "star")
    dim, heads = model.config.width, model.blocks[0].mixer.heads
    model.blocks[layer].mixer = randomise(Deformer(dim, heads, preset="gated")).to(device)
    check(model, model.new_state(), [tokens_on(device, 0)], 20)


def test_layers_that_disagree_go_the_ordinary_way(device):
    """On where their anchored heads read, or on positions."""
    tokens = tokens_on(device, 1, 20)

    def check_composed(model):
        state = model.new_state()
        got = torch.cat([model(tokens[:, t : t + 1], state=state) for t in range(20)], dim=1)
        assert not step.sizes_of(model)
        assert_close(got, full(model, tokens), 1e-4)

    model = model_on(device, "star")
    other = Deformer(model.config.width, model.blocks[0].mixer.heads, preset="gated", kinds=("token", "now"))
    model.blocks[0].mixer = randomise(other).to(device)
    check_composed(model)
    model = model_on(device, "attention")
    model.blocks[0].mixer.rope_base = 0.0
    check_composed(model)


def test_a_state_of_another_dtype_goes_the_ordinary_way(device):
    model = model_on(device)
    state = model.new_state()
    prompt = tokens_on(device, 1, 5)
    model(prompt, state=state)
    model.bfloat16()
    before = len(step.sizes_of(model))
    try:
        model(prompt[:, :1], state=state)
    except (RuntimeError, InputError):
        assert state.lengths == [5]
    assert len(step.sizes_of(model)) == before


def test_where_a_step_goes_the_ordinary_way(device):
    tokens, taken = tokens_on(device, 2, 1), step.sizes_of
    for kind in ("star mixed", "convolution"):
        model = model_on(device, kind)
        model(tokens, state=model.new_state(2))
        assert not taken(model)
    model = model_on(device)
    with plain():
        model(tokens, state=model.new_state(2))
    model(tokens)
    model(tokens_on(device, 2, 2), state=model.new_state(2))
    handle = model.blocks[1].register_forward_hook(lambda *args: None)
    model(tokens, state=model.new_state(2))
    handle.remove()
    model.blocks[0].mlp.forward = lambda x: torch.zeros_like(x)
    model(tokens, state=model.new_state(2))
    del model.blocks[0].mlp.forward
    with torch.autocast(device, torch.bfloat16):
        model(tokens, state=model.new_state(2))
    with torch.enable_grad():
        assert model(tokens, state=model.new_state(2)).requires_grad
    if device == "cuda":
        model(tokens, state=model.new_state(2, rows_device="cpu"))
    else:
        many = program.MOST_ROWS + 1
        model(tokens_on(device, many, 1), state=model.new_state(many))
    assert not taken(model)
    wide = model_on(device, dtype=torch.float64)
    wide(tokens, state=wide.new_state(2))
    assert not taken(wide)
    lying = model_on(device)
    up = lying.blocks[0].mlp.up
    up.weight = torch.nn.Parameter(up.weight.T.contiguous().T)
    lying(tokens, state=lying.new_state(2))
    assert not taken(lying)
    model(tokens, state=model.new_state(2))
    assert taken(model) == [2]


def test_a_stepper_belongs_to_one_model(device):
    model = model_on(device)
    names = list(model.state_dict())
    check(model, model.new_state(2), list(tokens_on(device, 2, 0)), 2)
    other = copy.deepcopy(model)
    assert not step.sizes_of(other)
    assert list(model.state_dict()) == names
    for parameter in other.parameters():
        parameter.neg_()
    check(other, other.new_state(2), list(tokens_on(device, 2, 0)), 2)
    check(model, model.new_state(2), list(tokens_on(device, 2, 0)), 2)


@with_graphs
def test_the_number_of_graphs_is_bounded(device, monkeypatch):
    monkeypatch.setattr(graph, "MOST", 2)
    model = model_on(device, "gated")
    for batch in (1, 2, 1, 3, 1):
        check(model, model.new_state(batch), list(tokens_on(device, batch, 0)), 2)
        assert len(step.sizes_of(model)) <= 2
    # 2 was unused for longest.
    assert step.sizes_of(model) == [3, 1]


def test_results_are_not_overwritten(device):
    model, tokens = model_on(device), tokens_on(device, 1, 3)
    state = model.new_state()
    hidden = [model.hidden(tokens[:, t : t + 1], state=state) for t in range(3)]
    assert_close(torch.cat(hidden, dim=1), model.hidden(tokens), 1e-4)


def test_a_token_that_the_vocabulary_lacks_is_an_error():
    """Kernels would read whatever stands there."""
    model = model_on("cpu", "gated")
    for token in (model.config.vocab_size, -1):
        state = model.new_state()
        with pytest.raises(IndexError, match=r"Token ids must be 0 to \d+; got"):
            model(torch.tensor([[1, token, 2]]))
        with pytest.raises(IndexError, match=r"Token ids must be 0 to \d+; got"):
            model(torch.tensor([[token]]), state=state)
        assert state.lengths == [0]


def test_a_step_that_fails_leaves_the_state_as_it_was(device, monkeypatch):
    model, tokens = model_on(device), tokens_on(device, 2, 30)
    state = model.new_state(2)
    model(tokens[:, :20], state=state)
    with monkeypatch.context() as patch:
        patch.setattr(graph, "through", lambda *args, **named: 1 / 0)
        patch.setattr(graph, "capture", lambda run, device: run)
        patch.setattr(cpu_program, "_run", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens[:, 3:4], state=state)
    step._PARTS.pop(model)
    check(model, state, list(tokens[:, :20]), 3)


def test_places_are_found_anew_only_where_they_changed(device):
    model = model_on(device, "star")
    state = model.new_state()
    check(model, state, [tokens_on(device, 0)], 1)
    slot = state.slots[0]
    places, changes = slot.places, []
    for _ in range(300):
        model(tokens_on(device, 1, 1), state=state)
        if slot.places is not places:
            places = slot.places
            changes.append(state.lengths[0])
    assert len(changes) < 8


@pytest.mark.parametrize("stepper", [STEPPERS[0], STEPPERS[2]], indirect=True)
def test_a_dropped_model_takes_its_stepper_along(device):
    """What stands in for a graph has the model."""
    model = model_on(device)
    check(model, model.new_state(), [tokens_on(device, 0)], 2)
    watched = weakref.ref(step.parts_of(model).stepper)
    del model
    gc.collect()
    assert watched() is None


def test_what_is_more_than_its_weights_is_called(device):
    """Adapters, for one: whether they act is no matter of weights."""

    class Adapted(torch.nn.Linear):
        pass

    model = model_on(device)
    assert step.parts_of(model).stepper is not None
    out = model.blocks[0].mixer.out
    model.blocks[0].mixer.out = Adapted(out.in_features, out.out_features, bias=False).to(device)
    assert step.parts_of(model).stepper is None


def test_a_state_of_another_model_is_refused(device):
    one, wider = model_on(device, dim=64, heads=4), model_on(device, dim=128, heads=4)
    state = one.new_state()
    one(tokens_on(device, 1, 1), state=state)
    for model, fits in ((one, True), (wider, False)):
        mixers, weight = [block.mixer for block in model.blocks], model.embedding.weight
        assert len(mixers) == len(one.blocks)
        assert (
            state.step_table(mixers, weight, row_layout(mixers, weight), np.zeros(1, np.int64)) is not None
        ) == fits


def test_a_head_of_another_make_is_called():
    """With a bias, hooks, adapters, in another dtype: the ordinary way."""
    model, tokens = model_on("cpu", "star"), tokens_on("cpu", 2, 1)
    weight, hidden = model.head.weight, torch.randn(2, 1, 32)
    assert step.logits_of_step(model, hidden) is not None
    assert step.logits_of_step(model, torch.randn(2, 2, 32)) is None
    assert step.logits_of_step(model, hidden.bfloat16()) is None
    handle = model.head.register_forward_hook(lambda module, inputs, out: out + 1)
    assert_close(model.logits(hidden, step=True), model.logits(hidden), 0)
    assert step.logits_of_step(model, hidden) is None
    handle.remove()
    model.head = torch.nn.Linear(32, len(weight))
    model(tokens, state=model.new_state(2))
    assert step.logits_of_step(model, hidden) is None


def test_a_subclass_has_its_own_logits(device):
    class Doubled(StarLM):
        def logits(self, hidden, *, step=False):
            return 2 * super().logits(hidden, step=step)

    model, tokens = model_on(device), tokens_on(device, 2, 1)
    wanted = 2 * model(tokens, state=model.new_state(2))
    model.__class__ = Doubled
    assert_close(model(tokens, state=model.new_state(2)), wanted, 1e-5)


def test_a_subclass_has_its_own_blocks(device):
    class Trice(Block):
        def forward(self, x, **named):
            return super().forward(x, **named) + 2 * x

    model, tokens = model_on(device), tokens_on(device, 2, 9)
    before = model(tokens)
    model.blocks[1].__class__ = Trice
    wanted, state = model(tokens), model.new_state(2)
    assert not torch.allclose(wanted, before, atol=1e-2)
    got = torch.cat([model(token, state=state) for token in tokens.split(1, dim=1)], dim=1)
    assert_close(got, wanted, 1e-4)


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_step(dtype, softcap):
    model = model_on("cpu", "star", dtype, softcap=softcap, vocab_size=1003)
    hidden = torch.randn(5, 1, 32, dtype=dtype) * 3
    with plain():
        wanted = model.double().logits(hidden.double())
    got = model.to(dtype).logits(hidden, step=True)
    assert got.dtype == torch.float32
    assert_close(got.double(), wanted, 1e-5)


@pytest.mark.parametrize("slots", [1, 3])
def test_anchors_of_heads_lie_in_one_order_for_any_number_of_slots(slots):
    """A kernel is compiled for the order that it gets; in another one clients would wait for the compiler."""
    model = make_model("star", dtype=torch.float32)
    found = np.arange(slots * len(model.orders)).reshape(slots, -1)
    of_heads = step.parts_of(model).of_heads(found)
    assert of_heads.flags.c_contiguous
    layer = model.blocks[0].mixer
    assert of_heads.T.tolist() == [found[:, model.orders.index(n)].tolist() for n in layer.orders]
