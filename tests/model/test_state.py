"""The decode state equals the full forward: in chunks, after crops, in slots, packed and padded."""

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from models import BOUNDED, KINDS, VOCAB, make_model, make_tokens
from relations import assert_close, unchecked
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from starlm.errors import InputError
from starlm.model.model import StarLM
from starlm.model.state import DecodeState
from starlm.ops import plain

ALL = [*KINDS, *BOUNDED]
MODELS = {kind: make_model(kind) for kind in ALL}


def in_chunks(model, tokens, sizes, state, first=None):
    """Logits of `tokens`, appended in pieces of the given sizes."""
    pieces, begin = [], 0
    for size in sizes:
        rows = None if first is None else first[:, begin : begin + size]
        pieces.append(model(tokens[:, begin : begin + size], state=state, first=rows))
        begin += size
    assert begin == tokens.shape[1]
    return torch.cat(pieces, dim=1)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@given(
    kind=st.sampled_from(ALL),
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_chunks_equal_the_full_forward(kind, sizes, seed):
    torch.manual_seed(seed)
    model, tokens = MODELS[kind], make_tokens(2, sum(sizes))
    state = model.new_state(2, rollback=0)
    assert_close(in_chunks(model, tokens, sizes, state), model(tokens))
    assert state.lengths == [sum(sizes)] * 2


@pytest.mark.parametrize("kind", ALL)
def test_token_by_token_equals_the_full_forward(kind):
    model, tokens = MODELS[kind], make_tokens(1, 150)
    assert_close(in_chunks(model, tokens, [1] * 150, model.new_state()), model(tokens))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(kind, dtype):
    """Within the dtype's rounding; fp64 above is what finds a wrong row."""
    model, tokens = make_model(kind, dtype=dtype), make_tokens(1, 40)
    got, wanted = in_chunks(model, tokens, [13, 1, 26], model.new_state()), model(tokens)
    assert got.dtype == torch.float32
    assert_close(got, wanted, 1e-5 if dtype == torch.float32 else 0.05)


ACTIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 70)),
    st.tuples(st.just("crop"), st.lists(st.integers(0, 8), min_size=4, max_size=4)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 10**6), min_size=1, max_size=4)),
    st.tuples(st.just("clear"), st.integers(0, 10**6)),
)


@given(
    kind=st.sampled_from(ALL), actions=st.lists(ACTIONS, min_size=1, max_size=10), seed=st.integers(0, 2**31)
)
@settings(max_examples=120, deadline=None)
def test_any_history(kind, actions, seed):
    """Slots cropped one by one, copied, emptied and refilled equal their tokens in one forward."""
    torch.manual_seed(seed)
    model = MODELS[kind]
    state, texts = model.new_state(2, rollback=8), [torch.empty(0, dtype=torch.long)] * 2
    given_back = [0, 0]
    for action, detail in [*actions, ("append", 3)]:
        if action == "append":
            tokens = make_tokens(len(texts), detail)
            logits = model(tokens, state=state)
            texts = [torch.cat([text, new]) for text, new in zip(texts, tokens, strict=True)]
            given_back = [max(0, back - detail) for back in given_back]
            for slot, text in enumerate(texts):
                assert_close(logits[slot], model(text[None])[0, -detail:])
        elif action == "crop":
            # Together no more than `rollback` behind the longest that the slot has been.
            counts = [min(n, 8 - back, len(t)) for n, back, t in zip(detail, given_back, texts, strict=False)]
            state.crop([len(text) - n for text, n in zip(texts, counts, strict=True)])
            texts = [text[: len(text) - n] for text, n in zip(texts, counts, strict=True)]
            given_back = [back + n for back, n in zip(given_back, counts, strict=True)]
        elif action == "reorder":
            slots = [number % len(texts) for number in detail]
            state, texts = state.reorder(slots), [texts[slot] for slot in slots]
            given_back = [given_back[slot] for slot in slots]
        else:
            slot = detail % len(texts)
            state.crop([0 if i == slot else len(text) for i, text in enumerate(texts)])
            texts[slot], given_back[slot] = texts[slot][:0], 0
        assert state.lengths == [len(text) for text in texts]


@pytest.mark.parametrize("kind", ALL)
def test_fork_is_independent(kind):
    model, prompt = MODELS[kind], make_tokens(2, 30)
    one, two = make_tokens(2, 100), make_tokens(4, 100)
    state = model.new_state(2)
    model(prompt, state=state)
    fork = state.fork(2)
    got = in_chunks(model, two, [1] * 100, fork)
    wanted = model(torch.cat([prompt.repeat_interleave(2, 0), two], 1))[:, 30:]
    assert_close(got, wanted)
    fork.crop(0)
    wanted = model(torch.cat([prompt, one], 1))[:, 30:]
    assert_close(model(one, state=state), wanted)


@pytest.mark.parametrize("kind", ["product, bounded", "value, bounded", "gated, bounded"])
def test_bounded_memory_is_constant(kind):
    model, sizes = make_model(kind, depth=1), {}
    state, length = model.new_state(), 0
    for count in [1] * 150 + [17] * 300:
        model(make_tokens(1, count), state=state)
        length += count
        sizes[length] = state.num_bytes
    assert length > 5000
    assert set(sizes.values()) == {sizes[100]}
    # The same holds after a prompt that was longer than the memory.
    model(make_tokens(1, 3000), state=state)
    for _ in range(20):
        model(make_tokens(1, 17), state=state)
    assert state.num_bytes == sizes[100]


def test_unbounded_memory_grows():
    for kind in KINDS:
        model, state = MODELS[kind], MODELS[kind].new_state()
        model(make_tokens(1, 100), state=state)
        before = state.num_bytes
        model(make_tokens(1, 900), state=state)
        assert state.num_bytes >= before * 5
        assert state.num_bytes >= model.state_bytes(1000)


@pytest.mark.parametrize("kind", BOUNDED)
def test_crop_beyond_rollback(kind):
    model, state = MODELS[kind], MODELS[kind].new_state(rollback=3)
    tokens = make_tokens(1, 3000)
    in_chunks(model, tokens, [2000, *[20] * 50], state)
    with pytest.raises(
        InputError, match=r"Fork the state before generating, or ask for more rollback.*3 tok"
    ):
        state.crop(10)
    assert state.lengths == [3000], "a refused crop changes nothing"
    state.crop(2997)
    assert_close(model(tokens[:, 2997:], state=state), model(tokens)[:, 2997:])
    state.crop(0)
    assert_close(model(tokens[:, :100], state=state), model(tokens[:, :100]))


@pytest.mark.parametrize("kind", BOUNDED)
def test_every_crop_is_refused_or_right(kind):
    model, tokens, state = MODELS[kind], make_tokens(1, 1300), MODELS[kind].new_state(rollback=3)
    wanted = model(tokens)
    in_chunks(model, tokens, [50] * 26, state)
    refused = 0
    for length in range(1, 1301):
        fork = state.fork()
        try:
            fork.crop(length)
        except InputError:
            refused = length
            continue
        # All that is beyond the first one allowed is alike.
        if length <= refused + 12 or length > 1290:
            piece = tokens[:, length : length + 20]
            assert_close(model(piece, state=fork), wanted[:, length : length + piece.shape[1]])
    assert 0 < refused < 1297


def test_impossible_crops_and_states():
    model = MODELS["gated"]
    state = model.new_state(2)
    model(make_tokens(2, 5), state=state)
    for wanted in (6, -1, [5, 6]):
        with pytest.raises(InputError, match=r"Cannot crop slot [01] to (6|-1) tokens: it has 5"):
            state.crop(wanted)
    for wanted in ([], [1], [1, 2, 3], 2.5, [2.5, 1]):
        for method in (DecodeState.crop, DecodeState.fork):
            with pytest.raises(InputError, match="2 slots needs as many whole lengths"):
                unchecked(method)(state, lengths=wanted)
    with pytest.raises(InputError, match=r"2 slots, so it takes token ids \[2, T\].*of shape \[3, 1\]"):
        model(make_tokens(3, 1), state=state)
    with pytest.raises(InputError, match=r"integers \[B, T\]; got torch.float32"):
        unchecked(StarLM.forward)(model, make_tokens(2, 1).float(), state=state)
    # Numbers as arrays have them are numbers.
    unchecked(DecodeState.crop)(state, np.int64(3))
    unchecked(DecodeState.crop)(state, np.array([2, 1]))
    assert state.lengths == [2, 1]


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("gated", {"depth": 1}),
        ("gated", {"preset": "product"}),
        ("gated", {"layers": "A"}),
        ("gated", {"max_shift": 9}),
        ("mixed", {"layers": "AD"}),
        ("star", {"kinds": ("now", "bigram", "box")}),
        ("window", {"attention_window": 5}),
    ],
)
@pytest.mark.parametrize("read", [0, 5])
def test_the_state_of_another_model(kind, other, read):
    """What its rows are would be chance: memory that nobody has written."""
    state = make_model(kind, dtype=torch.float32).new_state()
    if read:
        make_model(kind, dtype=torch.float32)(make_tokens(1, read), state=state)
    with pytest.raises(InputError, match=r"another model.* there and .* here.*new_state"):
        make_model(kind, dtype=torch.float32, **other)(make_tokens(1, 1), state=state)
    # A copy of the model is no other one.
    make_model(kind, dtype=torch.float32)(make_tokens(1, 1), state=state)


def test_a_layer_that_changes_under_a_state():
    model = make_model("gated, bounded")
    state = model.new_state()
    model(make_tokens(1, 40), state=state)
    model.blocks[1].mixer.max_shift = 30
    with pytest.raises(InputError, match="a layer has changed since"):
        model(make_tokens(1, 1), state=state)


@pytest.mark.parametrize("length", [1, 3])
def test_a_state_that_another_thread_works_on(monkeypatch, length):
    model = make_model("star", dtype=torch.float32)
    state = model.new_state(2)
    model(make_tokens(2, 5), state=state)
    said, advance = [], DecodeState.advance

    def other():
        work = (lambda: model(make_tokens(2, 1), state=state), lambda: state.crop(1), state.fork)
        for call in (*work, lambda: state.pick([1]).crop(1)):
            try:
                call()
            except InputError as error:
                said.append(str(error))

    def advance_slowly(self, *args):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        advance(self, *args)

    monkeypatch.setattr(DecodeState, "advance", advance_slowly)
    model(make_tokens(2, length), state=state)
    assert len(said) == 4
    assert all("A call of the model works on this decode state" in text for text in said)
    assert state.lengths == [5 + length] * 2
    state.crop(1)


def test_copies_may_be_made_by_many_threads_and_in_the_middle_of_a_call():
    model = make_model("gated", dtype=torch.float32)
    state = model.new_state()
    model(make_tokens(1, 30), state=state)
    with ThreadPoolExecutor(4) as pool:
        forks = list(pool.map(lambda _: state.fork(), range(200)))
    assert all(fork.lengths == [30] for fork in forks)
    copies = []
    handle = model.blocks[0].register_forward_hook(lambda *_: copies.append(copy.deepcopy(state)))
    model(make_tokens(1, 1), state=state)
    handle.remove()
    copies[0].crop(10)
    model(make_tokens(1, 1), state=copies[0])
    assert copies[0].lengths == [11]


def test_blocks_may_be_wrapped():
    model, tokens = make_model("star", dtype=torch.float32), make_tokens(1, 8)
    wanted = model(tokens)
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    state = model.new_state()
    found = torch.cat([model(token, state=state) for token in tokens.split(1, 1)], dim=1)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ALL)
def test_packed_documents_in_a_state(kind):
    """Documents that begin within a chunk, and go on in later calls without `first`."""
    model = MODELS[kind]
    texts = [make_tokens(1, n) for n in (17, 80, 5, 60)]
    starts = torch.tensor([0] * 17 + [17] * 80 + [97] * 5 + [102] * 60)[None]
    wanted = torch.cat([model(text) for text in texts], dim=1)
    tokens = torch.cat(texts, dim=1)
    for sizes in ([30, 1, 66, 65], [110, 52], [1] * 162):
        assert_close(in_chunks(model, tokens, sizes, model.new_state(), starts), wanted)
    state = model.new_state()
    model(tokens[:, :110], state=state, first=starts[:, :110])
    assert_close(in_chunks(model, tokens[:, 110:], [1, 50, 1], state), wanted[:, 110:])
    # Cropped into an earlier document, or to its end, that one goes on; a fork's crop is its own.
    more = make_tokens(1, 9)
    for length, begin in ((99, 97), (97, 17)):
        state = model.new_state()
        model(tokens[:, :105], state=state, first=starts[:, :105])
        fork = state.fork()
        fork.crop(length)
        text = torch.cat([tokens[:, begin:length], more], 1)
        assert_close(model(more, state=fork), model(text)[:, -9:])
        assert_close(model(tokens[:, 105:], state=state), wanted[:, 105:])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("keep", [2, 7, 20])
def test_left_padded_slots(kind, keep):
    """Padding of other lengths per slot changes nothing, nor does a crop, even one into the padding."""
    model, pads = MODELS[kind], (0, 3, 7)
    tokens, more = make_tokens(3, 20), make_tokens(3, 90)
    first = torch.tensor(pads)[:, None].expand(3, 20)
    state = model.new_state(3)
    logits = in_chunks(model, tokens, [2, 18], state, first)
    for slot, pad in enumerate(pads):
        assert_close(logits[slot, pad:], model(tokens[slot : slot + 1, pad:])[0])
    state.crop(keep)
    logits = in_chunks(model, more, [1, 5, 84], state)
    for slot, pad in enumerate(pads):
        if keep >= pad:
            text = torch.cat([tokens[slot, pad:keep], more[slot]])
            assert_close(logits[slot], model(text[None])[0, -90:])


def test_last_only():
    for kind in KINDS:
        model, tokens = MODELS[kind], make_tokens(2, 9)
        assert_close(model(tokens, last_only=True), model(tokens)[:, -1:])
        assert_close(model(tokens, state=model.new_state(2), last_only=True), model(tokens)[:, -1:])
    assert MODELS["gated"](tokens, last_only=True).shape == (2, 1, VOCAB)


@given(
    kind=st.sampled_from(ALL),
    steps=st.lists(
        st.tuples(st.sets(st.integers(0, 4), min_size=1), st.sampled_from([1, 1, 1, 2, 40])),
        min_size=1,
        max_size=12,
    ),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_choice_of_shared_slots(kind, steps, seed):
    """Slots that run in changing company, and are forked on the way, equal their tokens in one forward."""
    torch.manual_seed(seed)
    model = MODELS[kind]
    states = [model.new_state(rollback=2) for _ in range(4)] + [model.new_state()]
    texts = [torch.empty(0, dtype=torch.long)] * 5
    for chosen, length in steps:
        slots, tokens = sorted(chosen, reverse=True), make_tokens(len(chosen), length)
        shared = DecodeState.join(states[slot] for slot in slots)
        logits = model(tokens, state=shared)
        for row, slot in enumerate(slots):
            texts[slot] = torch.cat([texts[slot], tokens[row]])
            assert_close(logits[row], model(texts[slot][None])[0, -length:])
        states[slots[0]] = shared.fork().pick([0])
    assert [state.lengths[0] for state in states] == [len(text) for text in texts]


def test_picked_slots_are_shared_and_forked_ones_are_not():
    model = MODELS["star mixed"]
    state = model.new_state(3)
    model(make_tokens(3, 20), state=state)
    picked, fork = state.pick([2, 0]), state.fork(lengths=[20, 0, 3])
    assert fork.lengths == [20, 0, 3]
    model(make_tokens(2, 1), state=picked)
    assert state.lengths == [21, 20, 21]
    assert picked.slots == [state.slots[2], state.slots[0]]
    assert fork.lengths == [20, 0, 3]
    assert state.num_bytes == sum(state.pick([slot]).num_bytes for slot in range(3))
    for wrong in ([0, 0], []):
        with pytest.raises(InputError, match=r"at least one slot, and each only once.*reorder"):
            state.pick(wrong)


def test_a_short_fork_of_a_long_state_is_small():
    model = MODELS["star"]
    state = model.new_state()
    model(make_tokens(1, 3000), state=state)
    fork = state.fork(lengths=10)
    rows = [sum(layer.num_bytes for layer in s.slots[0].layers) for s in (state, fork)]
    assert rows[1] < rows[0] / 20
    more = make_tokens(1, 5)
    model(more, state=fork)
    assert fork.lengths == [15]
    assert state.lengths == [3000]


def test_a_call_that_fails_halfway_leaves_the_state_as_it_was(monkeypatch):
    model, tokens = MODELS["star mixed"], make_tokens(2, 30)
    state = model.new_state(2)
    model(tokens[:, :20], state=state)
    with monkeypatch.context() as patch:
        patch.setattr(model.blocks[1], "forward", lambda *args, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(make_tokens(2, 1), state=state)
    assert_close(in_chunks(model, tokens[:, 20:], [1, 9], state), model(tokens)[:, 20:])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_dropped_state_is_gone(mode):
    """Freed by reference counts alone, and nothing of a call stays with it."""
    model = MODELS["star mixed"]
    with mode():
        state = model.new_state(2)
        for _ in range(5):
            model(make_tokens(2, 1), state=state)
    buffers = [rows.data for slot in state.slots for layer in slot.layers for rows in layer.rows.values()]
    assert not any(buffer.requires_grad or buffer.is_inference() for buffer in buffers)
    watched = [weakref.ref(buffer) for buffer in buffers]
    gc.disable()
    try:
        del state, buffers
        assert not any(ref() is not None for ref in watched)
    finally:
        gc.enable()


@pytest.mark.gpu
def test_anchored_rows_in_host_memory():
    model = make_model("star mixed", dtype=torch.float32).cuda()
    tokens = make_tokens(2, 50).cuda()
    wanted = in_chunks(model, tokens, [40, *[1] * 10], model.new_state(2))
    state = model.new_state(2, rows_device="cpu")
    assert_close(in_chunks(model, tokens, [40, *[1] * 10], state), wanted, 1e-5)
    kept = {
        (name.split(".")[-1], rows.data.device.type) for name, rows in state.slots[0].layers[0].rows.items()
    }
    assert kept == {("now", "cuda"), ("anchored", "cpu"), ("box", "cuda")}


@pytest.mark.parametrize("kind", ["gated, bounded", "star", "star mixed"])
def test_gradients_reach_the_tokens_of_their_call_and_end_there(kind):
    """Who forgets no_grad holds no more and more, and may copy the state."""
    model, tokens = MODELS[kind], make_tokens(1, 12)
    with torch.enable_grad():
        state = model.new_state()

        def gradient(logits):
            return torch.autograd.grad(logits.square().sum(), model.embedding.weight)[0]

        # Of the first call, before which there is nothing, that of the full forward.
        assert_close(gradient(model(tokens[:, :5], state=state)), gradient(model(tokens[:, :5])), 1e-6)
        for piece in tokens[:, 5:].split([1, 4, 2], dim=1):
            held = copy.deepcopy(state)
            logits = model(piece, state=state)
            got = gradient(logits)
            with plain():
                again = model(piece, state=held)
                wanted = gradient(again)
            assert_close(logits, again)
            assert_close(got, wanted, 1e-6)
            assert wanted.any()
    with torch.no_grad():
        assert_close(logits, model(tokens)[:, -2:])
    rows = [rows.data for slot in state.slots for layer in slot.layers for rows in layer.rows.values()]
    assert rows
    assert not any(data.requires_grad for data in rows)
