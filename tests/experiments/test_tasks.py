"""The synthetic tasks are what their papers say; where a model's loss lies is counted right."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments import needle, packages, reference, synthetic
from experiments.candidates import Star
from experiments.measure import by_position_and_recall
from experiments.mqar import VOCAB, examples
from experiments.variants import CANDIDATES, builder, settings
from starlm.data.shards import Split
from starlm.model.config import StarLMConfig
from starlm.model.model import StarLM


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (256, 64)])
def test_mqar(length, pairs):
    inputs, labels = examples(300, length, pairs, seed=0)
    slots = []
    for tokens, wanted in zip(inputs, labels, strict=True):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert ((keys > 0) & (keys < VOCAB // 2)).all()
        assert ((values >= VOCAB // 2) & (values < VOCAB)).all()
        asked = np.flatnonzero(wanted >= 0)
        assert len(asked) == pairs
        assert (asked >= 2 * pairs).all()
        assert (asked % 2 == 0).all()
        value_of = dict(zip(keys, values, strict=True))
        assert all(wanted[at] == value_of[tokens[at]] for at in asked)
        rest = np.delete(tokens[2 * pairs :], asked - 2 * pairs)
        assert (rest == 0).all()
        slots.append(int(asked[0] - 2 * pairs) // 2)
    # Early slots are likelier, as i^-0.99 has it.
    if pairs == 4:
        assert 0.5 < np.mean(np.array(slots) == 0) < 0.9


def test_induction_and_copy():
    tokens, labels = synthetic.induction(np.random.default_rng(0), 50, 40)
    for row, wanted in zip(tokens, labels, strict=True):
        at = (row == 1).nonzero().flatten().tolist()
        assert len(at) == 2
        assert at[1] == 39
        assert wanted[-1] == row[at[0] + 1]
        assert (wanted[:-1] == -1).all()
    tokens, labels = synthetic.copy(np.random.default_rng(0), 3, 40)
    assert (tokens[:, 20] == 1).all()
    assert torch.equal(labels[:, 20:], tokens[:, :20])
    assert torch.equal(tokens[:, 21:], tokens[:, :19])


def test_order():
    rng = np.random.default_rng(0)
    tokens, labels = synthetic.TASKS["lag-4"](rng, 3, 20)
    assert (labels[:, :4] == -1).all()
    assert torch.equal(labels[:, 4:], tokens[:, :-4])
    tokens, labels = synthetic.TASKS["token-lag-4"](rng, 3, 20)
    for row in range(3):
        for t in range(20):
            at = t - 1 - int(tokens[row, t]) % 4
            assert labels[row, t] == (tokens[row, at] if at >= 0 else -1)
    _, labels = synthetic.TASKS["absolute"](rng, 2, 512)
    assert labels[0, [0, 31, 32, 255, 256, 511]].tolist() == [0, 0, 1, 7, 7, 7]


def test_needle():
    stream = np.arange(100) % 7
    tokens, answers = needle.with_facts(stream, np.random.default_rng(0), 64, 7, 5)
    keys = tokens[-5:]
    for key, answer in zip(keys, answers, strict=True):
        first, last = np.flatnonzero(tokens == key)
        assert tokens[first + 1] == answer
        assert last >= 59
    for depth, place in ((0.0, 0), (1.0, 60)):
        tokens, _ = needle.with_facts(stream, np.random.default_rng(0), 64, 7, 1, depth)
        assert tokens[place] == tokens[-1] >= 7


def test_loss_by_position_and_recall():
    """An untrained model's loss is ln V everywhere; recall tokens are counted by hand."""
    split = Split.from_documents([[0, 5, 6, 5, 6, 5, 7], [0, 5, 6, 8]])
    model = StarLM(StarLMConfig(vocab_size=10, depth=1, context=4))
    found = by_position_and_recall(model, split, 100)
    losses = [*found["by_position"].values(), found["recall"], found["other"]]
    assert losses == pytest.approx([np.log(10)] * len(losses), abs=1e-4)
    # Inputs 0565 | 6570 | 568, eleven targets; only the first row's last one completes a bigram again.
    assert found["recall_share"] == pytest.approx(1 / 11, abs=1e-4)


@pytest.mark.parametrize("name", ["gated", "star"])
def test_shifts_of_variants(name):
    """Equal parameters but for biases; shifts start the same for all tokens, or random."""
    config = StarLMConfig(vocab_size=50, depth=2, dim=64, heads=8, **settings(name))
    models = {shifts: builder(f"{name}{shifts}")(config) for shifts in ("", "+random", "+frozen", "+static")}
    sizes = {shifts: sum(p.numel() for p in model.parameters()) for shifts, model in models.items()}
    assert sizes[""] == sizes["+random"] == sizes["+frozen"]
    assert abs(sizes["+static"] - sizes[""]) <= 2 * 64
    x = torch.randn(1, 5, 64)
    for shifts, model in models.items():
        shift = model.blocks[1].mixer.shift(x)
        assert torch.equal(shift, shift[:, :1].expand_as(shift)) is (shifts in ("", "+static"))
        assert shift[..., :32].std() > 0.5
        layer = model.blocks[0].mixer.shift
        assert all(p.requires_grad is (shifts != "+frozen") for p in layer.parameters())
        tokens = torch.randint(50, (2, 12))
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()


def test_the_reference_run_has_none_of_our_operators_and_the_fused_one_has_them(our_operators):
    data = SimpleNamespace(splits={"train": Split.from_documents([[0, *range(1, 60)]] * 20)})
    config, found = StarLMConfig(vocab_size=64, depth=1, dim=64, context=32), {}
    for fused in (False, True):
        with our_operators() as heard:
            found[fused], _ = reference.losses(config, 3, data, fused=fused)
        assert ("starlm::mix" in heard) is fused
        assert bool(heard) is fused
    assert found[False] == pytest.approx(found[True], rel=1e-4)


def test_packages_are_found_in_a_folder_of_any_name(tmp_path, monkeypatch):
    root = tmp_path / "test" / "site-packages"
    for name in ("numpy/core.py", "numpy/again.py", "numpy/tests/test_core.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x = 1\n" if "test" not in name else "y = 1\n")
    monkeypatch.setattr(packages, "NAMES", ("numpy",))
    monkeypatch.setattr(packages.sysconfig, "get_path", lambda name: str(root))
    assert packages.sources() == [root / "numpy" / "again.py"]


def candidate(name: str) -> StarLM:
    torch.manual_seed(0)
    config = StarLMConfig(vocab_size=64, depth=3, dim=64, context=32, **settings(name))
    model = builder(name)(config)
    for parameter in (model.head.weight, *(block.mixer.out.weight for block in model.blocks)):
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidates_read_no_future_and_no_other_document(name):
    model = candidate(name)
    tokens = torch.randint(0, 9, (2, 32))
    first = torch.zeros(2, 32, dtype=torch.long)
    first[1, 12:] = 12
    hidden = model.hidden(tokens, first=first)
    later, other = tokens.clone(), tokens.clone()
    later[:, 20:] = torch.randint(0, 9, (2, 12))
    other[1, :12] = torch.randint(0, 9, (12,))
    assert torch.equal(model.hidden(later, first=first)[:, :20], hidden[:, :20])
    # Rows reach a prefix sum, so a mean over a window of this document, rounded otherwise.
    torch.testing.assert_close(model.hidden(other, first=first)[1, 12:], hidden[1, 12:], atol=1e-5, rtol=1e-5)
    model.loss(tokens, tokens, first=first).backward()
    mixers = [p for block in model.blocks for p in block.mixer.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixers)


def test_candidate_star_without_additions_is_star():
    model = candidate("star")
    tokens = torch.randint(0, 9, (2, 32))
    before = model.hidden(tokens)
    for block in model.blocks:
        layer = Star(64, model.config.num_heads, window=16)
        layer.load_state_dict(block.mixer.state_dict())
        block.mixer = layer
    torch.testing.assert_close(model.hidden(tokens), before, atol=1e-4, rtol=1e-4)
    # As each addition starts: weights of 1, factors of 1.
    for options in ({"keys": "head"}, {"keys": "channel"}, {"fit": True}):
        for block in model.blocks:
            layer = Star(64, model.config.num_heads, window=16, **options)
            layer.load_state_dict(block.mixer.state_dict(), strict=False)
            block.mixer = layer
        torch.testing.assert_close(model.hidden(tokens), before, atol=1e-4, rtol=1e-4)
        for block in model.blocks:
            block.mixer.weigh = block.mixer.fit = None
