"""A decode state of layers in somebody's own model equals that model's full forward."""

import pytest
import torch
from relations import assert_close, randomise
from torch import nn

from starlm import DecodeState, Deformer
from starlm.errors import InputError
from starlm.nn.attention import Attention
from starlm.nn.conv import ShortConv

WIDTH, VOCAB = 16, 7
OWN = (
    lambda: [Deformer(WIDTH, 8, preset="star"), Deformer(WIDTH, 2, preset="product", max_shift=5)],
    lambda: [Deformer(WIDTH, 4, kinds=("now", "longest")), Attention(WIDTH, 2), ShortConv(WIDTH)],
    lambda: [Attention(WIDTH, 2, window=4)],
)


class Own(nn.Module):
    """Not built as ours: other norms, no MLP, one head for two layers."""

    def __init__(self, layers):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(VOCAB, WIDTH), nn.ModuleList(layers)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens, *, first=None, state=None):
        if state is None:
            origins = {}
            for layer in self.layers:
                if isinstance(layer, Deformer):
                    origins.update(layer.origins(tokens, first=first))
            return self._through(tokens, [None] * len(self.layers), origins, first)
        with state.extend(tokens, first) as rows:
            return self._through(tokens, rows.layers, rows.origins, rows.first)

    def _through(self, tokens, states, origins, first):
        x = self.embedding(tokens)
        for layer, state in zip(self.layers, states, strict=True):
            x = x + layer(self.norm(x), origins=origins, first=first, state=state)
        return self.head(x)


@pytest.fixture(params=OWN)
def model(request):
    torch.manual_seed(3)
    return randomise(Own(request.param())).double()


@torch.no_grad()
def test_any_portions_equal_the_full_forward(model):
    tokens = torch.randint(VOCAB, (2, 40))
    state = DecodeState.of(model.layers, batch=2)
    parts = [model(part, state=state) for part in tokens.split([13, 1, 1, 0, 20, 5], dim=1)]
    assert_close(torch.cat(parts, dim=1), model(tokens))
    assert state.lengths == [40, 40]


@torch.no_grad()
def test_crop_fork_and_reorder(model):
    tokens, other = torch.randint(VOCAB, (2, 30)), torch.randint(VOCAB, (2, 6))
    state = DecodeState.of(model.layers, batch=2, rollback=12)
    model(tokens, state=state)
    fork = state.fork()
    state.crop(20)
    assert_close(model(other, state=state), model(torch.cat([tokens[:, :20], other], dim=1))[:, 20:])
    swapped = fork.reorder([1, 0, 1])
    whole = torch.cat([tokens[[1, 0, 1]], other[[0, 0, 1]]], dim=1)
    assert_close(model(other[[0, 0, 1]], state=swapped), model(whole)[:, 30:])


@torch.no_grad()
def test_documents_stay_apart_and_are_remembered(model):
    tokens = torch.randint(VOCAB, (1, 30))
    first = torch.where(torch.arange(30) < 11, 0, 11)[None]
    state = DecodeState.of(model.layers)
    begun = model(tokens[:, :20], first=first[:, :20], state=state)
    # Without `first` tokens go on in the document of the last one.
    rest = model(tokens[:, 20:], state=state)
    assert_close(torch.cat([begun, rest], dim=1), model(tokens, first=first))
    assert_close(rest, model(tokens[:, 11:])[:, 9:])


@torch.no_grad()
def test_a_call_that_fails_leaves_the_state_as_it_was(model):
    tokens = torch.randint(VOCAB, (1, 12))
    state = DecodeState.of(model.layers)
    model(tokens[:, :8], state=state)
    head, model.head = model.head, None  # fails when all layers have written their rows
    with pytest.raises(TypeError):
        model(torch.randint(VOCAB, (1, 3)), state=state)
    model.head = head
    assert state.lengths == [8]
    assert_close(model(tokens[:, 8:], state=state), model(tokens)[:, 8:])


def test_a_layer_that_was_left_out_or_read_other_tokens(model):
    """Rows that nobody has written would be read later."""
    tokens = torch.randint(VOCAB, (1, 5))
    state = DecodeState.of(model.layers)
    with pytest.raises(InputError, match=r"Layer 0 has read 0 of 5 new tokens"), state.extend(tokens):
        pass
    layers = list(model.layers)
    model.layers = nn.ModuleList([*layers[:-1], nn.Identity()])
    model.layers[-1].forward = lambda x, **_: x
    with pytest.raises(InputError, match=rf"Layer {len(layers) - 1} has read 0 of 5 new tokens"):
        model(tokens, state=state)
    assert state.lengths == [0]
    state = DecodeState.of([Deformer(WIDTH, 2)])
    x = torch.randn(1, 3, WIDTH)
    with pytest.raises(InputError, match=r"has read 3 of 5"), state.extend(tokens) as rows:
        Deformer(WIDTH, 2)(x, state=rows.layers[0])


def test_states_of_different_layers_have_no_call_in_common():
    tokens = torch.zeros(2, 1, dtype=torch.long)
    one, two = (DecodeState.of([Deformer(WIDTH, 2, kinds=("now", kind))]) for kind in ("now", "token"))
    with (
        pytest.raises(InputError, match="another model, or a layer has changed"),
        DecodeState.join([one, two]).extend(tokens),
    ):
        pass


def test_what_does_not_fit():
    state = DecodeState.of([Deformer(WIDTH, 2)], batch=2)
    for shape in ((3, 1), (2,)):
        with pytest.raises(InputError, match=r"takes token ids \[2, T\]"):
            state.check_tokens(torch.zeros(shape, dtype=torch.long), None)
    with pytest.raises(InputError, match="A decode state needs first as integers"):
        state.check_tokens(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(InputError, match=r"whole numbers; got torch\.float32"):
        state.check_tokens(torch.zeros(2, 3), None)
    with pytest.raises(InputError, match="rollback must be 0 or more"):
        DecodeState.of([Deformer(WIDTH, 2)], rollback=-1)
