"""The transformers model is StarLM: logits, loss, gradients, padding, packing, decoding."""

import pytest
import torch
from models import VOCAB, make_tokens
from relations import assert_close
from transformers import DynamicCache
from wrapped import ALL, FEW, make_pair

from starlm.errors import InputError
from starlm.hf import StarLMCache, StarLMForCausalLM, StarLMHFConfig, StarLMModel
from starlm.model.step import parts_of
from starlm.nn.origins import origins_of

NEW = 12
OPTIONS = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None}


def greedy(model, tokens, count=NEW):
    """The likeliest continuation, by one full forward per token."""
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_logits_and_loss_are_those_of_starlm(kind):
    model, wrapper = make_pair(kind)
    tokens = make_tokens(2, 30)
    out = wrapper(tokens, labels=tokens)
    assert torch.equal(out.logits, model(tokens))
    assert out.cache is None
    # The loss of transformers is fp32.
    torch.testing.assert_close(out.loss, model.loss(tokens[:, :-1], tokens[:, 1:]).float())
    assert torch.equal(wrapper(tokens, return_dict=False)[0], out.logits)


@torch.no_grad()
def test_labels_of_minus_100_are_left_out():
    model, wrapper = make_pair("star")
    tokens = make_tokens(2, 30)
    labels = tokens.clone()
    labels[:, :20] = -100
    targets = torch.where(labels == -100, -1, labels)[:, 1:]
    wanted = model.loss(tokens[:, :-1], targets).float()
    torch.testing.assert_close(wrapper(tokens, labels=labels).loss, wanted)


@torch.no_grad()
def test_logits_to_keep():
    model, wrapper = make_pair("star")
    tokens = make_tokens(2, 9)
    wanted = model(tokens)
    torch.testing.assert_close(wrapper(tokens, logits_to_keep=1).logits, wanted[:, -1:])
    chosen = torch.tensor([2, 5])
    torch.testing.assert_close(wrapper(tokens, logits_to_keep=chosen).logits, wanted[:, chosen])


@torch.no_grad()
def test_hidden_states_and_the_headless_model():
    model, wrapper = make_pair("star mixed")
    tokens = make_tokens(2, 9)
    out = wrapper(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == len(model.blocks) + 1
    assert torch.equal(out.hidden_states[-1], model.hidden(tokens))
    x = out.hidden_states[1]
    assert torch.equal(model.blocks[0](out.hidden_states[0], origins=origins_of(tokens, model.orders)), x)
    headless = StarLMModel(wrapper.config).double().eval()
    headless.load_state_dict({n: p for n, p in model.state_dict().items() if n != "head.weight"})
    assert torch.equal(headless(tokens).last_hidden_state, model.hidden(tokens))


@torch.no_grad()
def test_looking_at_hidden_states_leaves_no_trace():
    model, wrapper = make_pair("star mixed", layers="DW", dtype=torch.float32)
    tokens = make_tokens(2, 9)
    wanted = wrapper(tokens, output_hidden_states=True).hidden_states
    for _ in range(2):
        found = wrapper.base_model(tokens, output_hidden_states=True).hidden_states
        assert len(found) == len(model.blocks) + 1
        assert all(map(torch.equal, found, wanted))
    assert wrapper(tokens).hidden_states is None
    assert not parts_of(wrapper).are_hooked()
    cache = wrapper(tokens[:, :-1], use_cache=True).cache
    step = wrapper(tokens[:, -1:], cache=cache, output_hidden_states=True).hidden_states
    for one, all_of_it in zip(step, wanted, strict=True):
        assert_close(one, all_of_it[:, -1:], 1e-5)
    wrapper.config.output_hidden_states = True
    assert len(wrapper.base_model(tokens, return_dict=False)[1]) == len(wanted)


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_greedy_generation_is_the_full_forward(kind):
    model, wrapper = make_pair(kind)
    tokens = make_tokens(2, 7)
    wanted = greedy(model, tokens)
    out = wrapper.generate(tokens, return_dict_in_generate=True, **OPTIONS)
    assert torch.equal(out.sequences, wanted)
    assert isinstance(out.cache, StarLMCache)
    assert out.cache.get_seq_length() == 7 + NEW - 1
    assert torch.equal(wrapper.generate(tokens, use_cache=False, **OPTIONS), wanted)


@pytest.mark.parametrize("kind", FEW)
@torch.no_grad()
def test_assisted_generation_is_greedy(kind):
    model, wrapper = make_pair(kind)
    # Nearly the same model, so that some of what it guesses is right.
    other = make_pair(kind)[1]
    other.head.weight.add_(0.3 * torch.randn_like(other.head.weight))
    tokens = make_tokens(1, 20)
    wanted = greedy(model, tokens)
    assert torch.equal(wrapper.generate(tokens, prompt_lookup_num_tokens=4, **OPTIONS), wanted)
    assert torch.equal(wrapper.generate(tokens, assistant_model=other, **OPTIONS), wanted)
    assert torch.equal(wrapper.generate(tokens, assistant_model=wrapper, **OPTIONS), wanted)


@pytest.mark.parametrize("kind", FEW)
@torch.no_grad()
def test_beams_are_those_of_the_full_forward(kind):
    wrapper = make_pair(kind)[1]
    tokens = make_tokens(2, 7)
    options = {**OPTIONS, "num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    cached = wrapper.generate(tokens, return_dict_in_generate=True, **options)
    full = wrapper.generate(tokens, return_dict_in_generate=True, use_cache=False, **options)
    assert torch.equal(cached.sequences, full.sequences)
    torch.testing.assert_close(cached.sequences_scores, full.sequences_scores)


@torch.no_grad()
def test_as_many_beams_as_there_are_continuations_find_the_best():
    model, wrapper = make_pair("star", vocab_size=4)
    tokens = torch.randint(4, (1, 6))
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    rows = torch.cat([tokens.expand(len(every), -1), every], dim=1)
    chances = model(rows).log_softmax(-1)[:, 5:-1].gather(2, every[..., None]).sum((1, 2))
    found = wrapper.generate(tokens, **{**OPTIONS, "num_beams": 16, "max_new_tokens": 3})
    assert torch.equal(found[0, 6:], every[chances.argmax()])


@torch.no_grad()
def test_samples_are_those_of_the_full_forward():
    wrapper = make_pair("star")[1]
    options = {**OPTIONS, "do_sample": True, "num_return_sequences": 3, "top_k": 0}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        drawn.append(wrapper.generate(make_tokens(1, 7) * 0 + 1, use_cache=use_cache, **options))
    assert torch.equal(*drawn)
    assert len(drawn[0].unique(dim=0)) == 3


def padded(sequences, side, width):
    """Sequences filled up with token 3 to one batch, and its mask."""
    rows = torch.full((len(sequences), width), 3)
    mask = torch.zeros_like(rows)
    for row, filled, tokens in zip(rows, mask, sequences, strict=True):
        place = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        row[place], filled[place] = tokens, 1
    return rows, mask


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_padding_changes_nothing(kind):
    model, wrapper = make_pair(kind)
    sequences = [make_tokens(n) for n in (9, 1, 14)]
    for side in ("left", "right"):
        rows, mask = padded(sequences, side, 14)
        logits = wrapper(rows, attention_mask=mask).logits
        for found, kept, tokens in zip(logits, mask.bool(), sequences, strict=True):
            torch.testing.assert_close(found[kept], model(tokens[None])[0])


@pytest.mark.parametrize("kind", FEW)
@torch.no_grad()
def test_padding_changes_nothing_that_is_generated(kind):
    model, wrapper = make_pair(kind)
    sequences = [make_tokens(n) for n in (9, 1, 14)]
    rows, mask = padded(sequences, "left", 14)
    generated = wrapper.generate(rows, attention_mask=mask, **OPTIONS)
    beams = wrapper.generate(rows, attention_mask=mask, num_beams=2, **OPTIONS)
    for found, best, tokens in zip(generated, beams, sequences, strict=True):
        assert torch.equal(found[14 - len(tokens) :], greedy(model, tokens[None])[0])
        alone = wrapper.generate(tokens[None], num_beams=2, **OPTIONS)[0]
        assert torch.equal(best[14 - len(tokens) :], alone)


@pytest.mark.parametrize("kind", ALL)
def test_packed_is_separate(kind):
    """Positions that start again part documents: logits and gradients, and a continuation by a cache."""
    model, wrapper = make_pair(kind)
    documents = [make_tokens(n) for n in (5, 1, 9)]
    packed = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    out = wrapper(packed, position_ids=positions, use_cache=True)
    separate = torch.cat([model(d[None])[0] for d in documents])
    torch.testing.assert_close(out.logits[0], separate)
    weights = torch.randn_like(separate)
    (out.logits[0] * weights).sum().backward()
    (separate * weights).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), wrapper.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, msg=name)
    with torch.no_grad():
        more = make_tokens(1, 4)
        found = wrapper(more, position_ids=torch.arange(9, 13)[None], cache=out.cache).logits
        wanted = model(torch.cat([documents[-1][None], more], dim=1))[:, -4:]
        torch.testing.assert_close(found, wanted)
        # A document that begins with the call.
        new = wrapper(more, position_ids=torch.arange(4)[None], cache=out.cache).logits
        torch.testing.assert_close(new, model(more))


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL)
def test_who_goes_on_does_not_notice_that_a_neighbour_begins_anew(kind):
    """Behind a cache: one row begins a document, the others go on with theirs, packed or behind padding."""
    model, wrapper = make_pair(kind)
    tokens, more = make_tokens(3, 6), make_tokens(3, 3)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[2, :2] = 0
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 2, 3]])
    cache = wrapper(tokens, attention_mask=mask, position_ids=positions, use_cache=True).cache
    starts = torch.tensor([0, 3, 4])
    for row in range(3):
        # The second call has no starts to give, and goes on with what the first has left behind.
        found = wrapper(more[:, row : row + 1], position_ids=starts[:, None] + row, cache=cache).logits
        for slot, begin in enumerate((6, 3, 2)):
            whole = torch.cat([tokens[slot, begin:], more[slot, : row + 1]])[None]
            torch.testing.assert_close(found[slot], model(whole)[0, -1:], msg=f"row {row} of slot {slot}")


@torch.no_grad()
def test_packed_behind_padding():
    model, wrapper = make_pair("star")
    documents = [make_tokens(n) for n in (5, 6)]
    rows, mask = padded([torch.cat(documents)], "left", 15)
    positions = torch.tensor([[0] * 4 + [*range(5)] + [*range(6)]])
    found = wrapper(rows, attention_mask=mask, position_ids=positions).logits[0, 4:]
    torch.testing.assert_close(found, torch.cat([model(d[None])[0] for d in documents]))


@torch.no_grad()
def test_a_prompt_in_chunks_and_a_conversation_that_goes_on():
    model, wrapper = make_pair("star")
    rows, mask = padded([make_tokens(9), make_tokens(4)], "left", 9)
    wanted = wrapper.generate(rows, attention_mask=mask, **OPTIONS)
    cache = StarLMCache(wrapper.new_state(2))
    chunked = wrapper.generate(rows, attention_mask=mask, cache=cache, prefill_chunk_size=3, **OPTIONS)
    assert torch.equal(chunked, wanted)
    more = torch.cat([chunked[:1], make_tokens(1, 3)], dim=1)
    cache.batch_select_indices(torch.tensor([0]))
    assert torch.equal(wrapper.generate(more, cache=cache, **OPTIONS), greedy(model, more))


@pytest.mark.parametrize("kind", ["gated", "star", "star mixed"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(kind, use_reentrant):
    wrapper = make_pair(kind)[1].train()
    tokens = make_tokens(2, 12)
    wanted = [p.grad for p in backward(wrapper, tokens)]
    wrapper.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    wrapper.blocks[0].mixer.register_forward_hook(lambda *args: calls.append(1))
    found = backward(wrapper, tokens, use_cache=True)
    assert len(calls) == 2
    for ours, theirs in zip(wanted, found, strict=True):
        assert torch.equal(ours, theirs.grad)


def backward(model, tokens, **options):
    model.zero_grad(set_to_none=True)
    model(tokens, labels=tokens, **options).loss.backward()
    return list(model.parameters())


@torch.no_grad()
def test_embeddings_in_place_of_tokens():
    tokens = make_tokens(2, 9)
    for kind in ("gated", "mixed", "convolution"):
        model, wrapper = make_pair(kind)
        embedded = wrapper.get_input_embeddings()(tokens)
        assert torch.equal(wrapper(inputs_embeds=embedded).logits, model(tokens))
        generated = wrapper.generate(inputs_embeds=embedded, **OPTIONS)
        assert torch.equal(generated, greedy(model, tokens)[:, 9:])
    model, wrapper = make_pair("star")
    embedded = wrapper.get_input_embeddings()(tokens)
    assert torch.equal(wrapper(tokens, inputs_embeds=embedded).logits, model(tokens))
    refused(lambda: wrapper(inputs_embeds=embedded), "anchored", "Give the input_ids too")
    refused(lambda: wrapper(), "Give input_ids")


def test_a_vocabulary_that_grows():
    model, wrapper = make_pair("star", dtype=torch.float32)
    tokens = make_tokens(2, 9)
    wanted = model(tokens)
    wrapper.resize_token_embeddings(VOCAB + 3)
    assert wrapper.config.vocab_size == wrapper.config.shape.vocab_size == VOCAB + 3
    found = wrapper(tokens + 0).logits
    assert torch.equal(found[..., :VOCAB], wanted)
    assert wrapper(torch.full((1, 2), VOCAB + 2)).logits.isfinite().all()


def refused(call, *words):
    with pytest.raises(InputError) as error:
        call()
    for word in words:
        assert word in str(error.value), str(error.value)


@torch.no_grad()
def test_what_has_no_meaning_is_refused():
    wrapper = make_pair("star")[1]
    tokens = make_tokens(2, 4)
    hole = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
    refused(lambda: wrapper(tokens, attention_mask=hole), "hole", "Pad on the left or on the right")
    refused(lambda: wrapper(tokens, attention_mask=hole[:, 1:]), "attention_mask", "(2, 4)", "(2, 3)")
    refused(lambda: wrapper(tokens, attention_mask=torch.ones(2, 1, 4, 4)), "attention_mask", "(2, 1, 4, 4)")
    refused(lambda: wrapper(tokens, position_ids=torch.arange(3)[None]), "position_ids", "(2, 4)", "(1, 3)")
    refused(lambda: wrapper(tokens, cache=DynamicCache()), "DynamicCache", "StarLMCache(model.new_state")
    cache = wrapper(tokens, use_cache=True).cache
    middle = torch.tensor([[4, 5, 0, 1]])
    refused(lambda: wrapper(tokens, position_ids=middle, cache=cache), "begin a document within")
    late = torch.tensor([[1] * 8, [0, 0, *[1] * 6]])
    refused(lambda: wrapper(tokens, attention_mask=late, cache=cache), "the cache has read", "when they are")
    # A refusal leaves the cache as it was.
    assert cache.get_seq_length() == 4
    refused(lambda: wrapper(tokens[0]), "[B, T]", "(4,)")
    refused(lambda: wrapper(tokens, cu_seq_lens_q=torch.tensor([0, 2, 4])), "cu_seq_lens_q", "position_ids")
    refused(lambda: wrapper(tokens, seq_idx=torch.zeros(2, 4)), "seq_idx", "DataCollatorWithFlattening")


def test_weights_start_as_those_of_starlm():
    torch.manual_seed(0)
    wrapper = StarLMForCausalLM(StarLMHFConfig(depth=2, vocab_size=50, shift_init=3.0))
    assert not wrapper.head.weight.any()
    assert not wrapper.blocks[0].mixer.out.weight.any()
    assert wrapper.embedding.weight.std().item() == pytest.approx(1, rel=0.1)
    assert wrapper.blocks[0].mixer.shift.bias.any()


def test_the_cache_under_its_former_name():
    """transformers serves `past_key_values` until 5.40."""
    _, wrapper = make_pair("star", dtype=torch.float32)
    tokens = make_tokens(2, 9)
    with torch.no_grad():
        wanted = wrapper(tokens).logits
        for model in (wrapper, wrapper.base_model):
            out = model(tokens[:, :5], use_cache=True)
            with pytest.warns(FutureWarning, match="past_key_values"):
                end = model(tokens[:, 5:], past_key_values=out.cache)
            got = end.logits if model is wrapper else wrapper.logits(end.last_hidden_state)
            assert_close(got, wanted[:, 5:], 1e-5)


def test_looking_at_the_trunk_changes_no_mode():
    _, wrapper = make_pair("star")
    wrapper.train().blocks[0].eval()
    assert wrapper.base_model.training
    assert [block.training for block in wrapper.blocks] == [False, *[True] * (len(wrapper.blocks) - 1)]


def test_attention_implementations(tmp_path):
    _, wrapper = make_pair("star mixed", dtype=torch.float32)
    wrapper.save_pretrained(tmp_path)
    for name in ("sdpa", "eager"):
        StarLMForCausalLM.from_pretrained(tmp_path, attn_implementation=name)


def test_a_step_is_taken_in_one_piece():
    """As the model's own, also by the trunk and with the blocks that training needs."""
    _, wrapper = make_pair("star mixed", layers="DW", dtype=torch.float32)
    with torch.no_grad():
        for model in (wrapper, wrapper.base_model):
            model(make_tokens(2, 1), use_cache=True)
            assert parts_of(model).stepper is not None
