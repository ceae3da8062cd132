"""Conversations as a model learns them, as the chat template of our checkpoints writes them, and as data."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlm.data.conversations import Message, check_messages, encode
from starlm.data.prepare import prepare
from starlm.data.shards import TokenData
from starlm.data.tokenizer import Tokenizer
from starlm.errors import InputError
from starlm.files import sha256
from starlm.generate.chat import own_template

TOKENIZER = Tokenizer.train(["Be brief.\n\n\nHi Hello Bye. <|user_end|>"] * 3, 280)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(["<|user_end|>", "\n\n", " "])


@st.composite
def conversations(draw):
    messages = [Message("system", draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(TEXTS)), Message("assistant", draw(TEXTS))]
    return messages


def test_by_hand():
    special, say = TOKENIZER.special, TOKENIZER.encode
    talk = [
        *(Message("system", "Be brief."), Message("user", "\nHi"), Message("assistant", "Hello")),
        *(Message("user", "Bye"), Message("assistant", "")),
    ]
    parts = [
        (special["<|user_start|>"], False), *((n, False) for n in say("Be brief.\n\n\nHi")),
        (special["<|user_end|>"], False), (special["<|assistant_start|>"], False),
        *((n, True) for n in say("Hello")), (special["<|assistant_end|>"], True),
        (special["<|user_start|>"], False), *((n, False) for n in say("Bye")),
        (special["<|user_end|>"], False),
        (special["<|assistant_start|>"], False), (special["<|assistant_end|>"], True),
    ]  # fmt: skip
    ids, learned = zip(*parts, strict=True)
    assert encode([talk], TOKENIZER) == [([*ids], [*learned])]


@given(st.lists(conversations(), min_size=1, max_size=3))
def test_a_model_is_asked_as_it_has_learned(found):
    """What is learned are the answers, each behind the very tokens after which the assistant is to speak."""
    render = own_template(TOKENIZER)
    for talk, (ids, learned) in zip(found, encode(found, TOKENIZER), strict=True):
        answers = [number for number, message in enumerate(talk) if message.role == "assistant"]
        whole, begin = [TOKENIZER.bos, *ids], 0
        for number in answers:
            asked = render(talk[:number])
            assert whole[: len(asked)] == asked
            end = len(asked) + len(TOKENIZER.encode(talk[number].content)) + 1
            assert whole[end - 1] == TOKENIZER.end_of_turn
            assert learned[begin : len(asked) - 1] == [False] * (len(asked) - 1 - begin)
            assert learned[len(asked) - 1 : end - 1] == [True] * (end - len(asked))
            begin = end - 1
        assert begin == len(ids)


def test_messages_as_sharegpt_has_them():
    talk = [{"from": who, "value": who} for who in ("system", "human", "gpt", "human")]
    assert [(message.role, message.content) for message in check_messages(talk)] == [
        *(("system", "system"), ("user", "human"), ("assistant", "gpt"), ("user", "human"))
    ]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "a list of objects"),
        (["Hi"], "message 1 must be an object"),
        ([{"role": "tool", "content": ""}], "message 1 needs a role of .* got 'tool'"),
        ([{"role": "user", "content": None}], "message 1 needs a text as content; got None"),
        ([{"role": "assistant", "content": "Hi"}], "message 1 must be of the user, and is of the assistant"),
        ([{"role": "user", "content": "\ud800"}], "message 1 has half of a surrogate pair"),
        ([{"role": "user", "content": "", "tool_calls": [{}]}], "message 1 calls a tool"),
        ([{"role": "user", "content": "", "weight": 0}], "message 1 .* not to be learned"),
    ],
)
def test_what_is_no_conversation_is_refused(values, said):
    with pytest.raises(InputError, match=said):
        check_messages(values)


def talks(folder, count=40):
    """A folder with a file of conversations."""
    folder.mkdir()
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What is {n} <|assistant_start|>?"},
                    {"role": "assistant", "content": f"It is {n}."},
                ]
            }
        )
        for n in range(count)
    ]
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return folder


def learned_of(data, name):
    split = TokenData.open(data).splits[name]
    for number, size in enumerate(split.document_lengths()):
        ids, learned = np.empty(size, np.int64), np.empty(size, bool)
        split.read(number, 0, int(size), ids)
        split.read_learned(number, 0, int(size), learned)
        yield ids, learned


def test_of_conversations_the_answers_are_learned(tmp_path):
    prepare([talks(tmp_path / "talks")], tmp_path / "data", vocab_size=300, shard_tokens=500)
    data = TokenData.open(tmp_path / "data")
    data.verify()
    tokenizer = Tokenizer.load(tmp_path / "data")
    assert len(data.meta["splits"]["train"]["shards"]) > 1
    count = 0
    for name, split in data.splits.items():
        total = 0
        for ids, learned in learned_of(tmp_path / "data", name):
            text = tokenizer.decode(ids[learned], skip_special=False)
            number = text.removeprefix("It is ").removesuffix(".<|assistant_end|>")
            asked = f"<|user_start|>What is {number} <|assistant_start|>?<|user_end|>"
            whole = f"<|bos|>{asked}<|assistant_start|>{text}"
            assert tokenizer.decode(ids, skip_special=False) == whole
            # As the template has it, and not as the message spells it.
            assert (ids == tokenizer.special["<|assistant_start|>"]).sum() == 1
            count, total = count + 1, total + int(learned.sum())
        assert (split.conversations, split.num_learned) == (True, total)
        assert split.num_learned < split.num_tokens
    assert count == 40


def test_of_texts_all_is_learned(corpus):
    for split in TokenData.open(corpus / "data").splits.values():
        assert (split.conversations, split.num_learned) == (False, split.num_tokens)
    assert not list((corpus / "data").glob("*.learned.npy"))
    assert all(learned.all() for _, learned in learned_of(corpus / "data", "train"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: (data / "train-00000.learned.npy").unlink(), "learned.npy: the file is missing"),
        (lambda data: (data / "train-00000.learned.npy").write_bytes(b"x" * 500), "bytes instead of"),
    ],
)
def test_damage_to_what_is_learned_is_found(tmp_path, change, said):
    prepare([talks(tmp_path / "talks")], tmp_path / "data", vocab_size=300)
    change(tmp_path / "data")
    with pytest.raises(InputError, match=said):
        TokenData.open(tmp_path / "data")


def test_other_learned_tokens_are_other_data(tmp_path):
    prepare([talks(tmp_path / "talks")], tmp_path / "data", vocab_size=300)
    before = TokenData.open(tmp_path / "data").splits["train"].fingerprint
    file, meta = tmp_path / "data" / "train-00000.learned.npy", tmp_path / "data" / "meta.json"
    array = np.load(file, allow_pickle=False)
    np.save(file, ~array, allow_pickle=False)
    with pytest.raises(InputError, match=r"learned\.npy: its content does not match its SHA-256"):
        TokenData.open(tmp_path / "data").verify()
    values = json.loads(meta.read_text())
    values["splits"]["train"]["shards"][0]["learned"]["sha256"] = sha256(file)
    meta.write_text(json.dumps(values))
    assert TokenData.open(tmp_path / "data").splits["train"].fingerprint != before


def test_conversations_stand_alone(tmp_path):
    folder = talks(tmp_path / "talks")
    (folder / "more.txt").write_text("A text.")
    with pytest.raises(InputError, match=r"talks\.jsonl:1 is a conversation, more\.txt a text"):
        prepare([folder], tmp_path / "data", vocab_size=300)
    assert not (tmp_path / "data").exists()


def test_a_single_conversation_leaves_none_for_validation(tmp_path):
    with pytest.raises(InputError, match="only conversation"):
        prepare([talks(tmp_path / "talks", 1)], tmp_path / "data", vocab_size=300)


def test_conversations_are_never_cut(tmp_path):
    """Of texts such long ones would be, where few are held out."""
    prepare([talks(tmp_path / "talks", 2)], tmp_path / "data", vocab_size=300)
    found = [
        learned.sum()
        for name in ("train", "validation")
        for _, learned in learned_of(tmp_path / "data", name)
    ]
    assert len(found) == 2
    assert min(found) > 0
