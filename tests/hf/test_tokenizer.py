"""AutoTokenizer reads a checkpoint's tokenizer, with the same ids, and formats conversations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from wrapped import TEXT, make_tokenizer

from starlm.data.tokenizer import SPECIAL, Tokenizer

OURS = make_tokenizer()
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": [{"type": "text", "text": "More, "}, {"type": "text", "text": "please"}]},
    {"role": "assistant", "content": "No"},
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    OURS.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text())
def test_the_same_ids(theirs, text):
    ids = OURS.encode(text, bos=True)
    assert theirs(text, split_special_tokens=True).input_ids == ids
    assert theirs.decode(ids, skip_special_tokens=True) == text


def test_special_tokens(theirs):
    assert isinstance(theirs, PreTrainedTokenizerFast)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (OURS.bos, OURS.bos, OURS.pad)
    assert set(theirs.all_special_tokens) == set(SPECIAL)
    assert OURS.pad not in (OURS.bos, OURS.end_of_turn)
    # In transformers the name of a special token in a text is the token.
    assert theirs("<|user_end|>").input_ids == [OURS.bos, OURS.special["<|user_end|>"]]
    assert theirs(TEXT, add_special_tokens=False).input_ids == OURS.encode(TEXT)


def test_batches_are_padded_on_the_left(theirs):
    batch = theirs(["f", "f(x):"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch.attention_mask[0].tolist() == [0] * (batch.attention_mask[0] == 0).sum() + [1, 1]
    assert batch.input_ids[0, 0] == OURS.pad


def test_a_conversation(theirs):
    text = theirs.apply_chat_template(CONVERSATION, tokenize=False)
    assert text == (
        "<|bos|><|user_start|>Be brief.\n\nHi<|user_end|><|assistant_start|>Hello<|assistant_end|>"
        "<|user_start|>More, please<|user_end|><|assistant_start|>No<|assistant_end|>"
    )
    asked = theirs.apply_chat_template(CONVERSATION[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)
    assert asked.endswith("<|assistant_start|>")
    ids = theirs.apply_chat_template(CONVERSATION, return_dict=False)
    assert ids.count(OURS.bos) == 1


def test_the_loss_can_be_on_answers_alone(theirs):
    found = theirs.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    chosen = [n for n, kept in zip(found["input_ids"], found["assistant_masks"], strict=True) if kept]
    wanted = [*OURS.encode("Hello"), OURS.end_of_turn, *OURS.encode("No"), OURS.end_of_turn]
    assert chosen == wanted


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "tool", "content": "7"}], "got one of tool"),
        ([*CONVERSATION, CONVERSATION[0]], "may begin with one of system"),
        (CONVERSATION[:1], "needs a user message"),
    ],
)
def test_what_is_no_conversation(theirs, messages, words):
    with pytest.raises(TemplateError, match=words):
        theirs.apply_chat_template(messages, tokenize=False)


def test_saved_by_transformers_it_is_ours_again(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == OURS.fingerprint
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == theirs.chat_template
    assert again.get_vocab() == theirs.get_vocab()
