import errno
import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from starlm.data import tokenizer as module
from starlm.data.tokenizer import SPECIAL, Tokenizer
from starlm.errors import InputError, StarLMError

TEXTS = [
    "def add(a, b):\n    return a + b\n\n" * 30,
    "The café is 1234 km away; 你好 🙂 don't <|bos|> " * 20,
    "<|user_start|> <|bos|><|bos|>\n" * 200,
    " ".join(a + b for a in "abcdefghij" for b in "klmnopqrst") * 2,
]
TOKENIZER = Tokenizer.train(TEXTS, 400)


def test_special_tokens_come_first_and_have_no_bytes():
    assert TOKENIZER.special == {name: number for number, name in enumerate(SPECIAL)}
    assert TOKENIZER.bos == 0
    assert TOKENIZER.vocab_size == 400
    lengths = TOKENIZER.byte_lengths()
    assert lengths.dtype == np.int32
    assert lengths.shape == (400,)
    assert (lengths[: len(SPECIAL)] == 0).all()
    assert (lengths[len(SPECIAL) :] >= 1).all()
    assert {TOKENIZER.token_bytes(n) for n in range(9, 265)} == {bytes([byte]) for byte in range(256)}
    assert all(lengths[n] == len(TOKENIZER.token_bytes(n)) for n in range(400))


def test_what_a_call_of_transformers_left_in_the_file_cuts_and_fills_up_nothing(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.enable_truncation(3)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    for text in TEXTS[0][:40], "a":
        assert again.encode(text) == TOKENIZER.encode(text)
    assert [list(ids) for ids in again.encode_batch(["a", "a b c d e"])] == [
        list(ids) for ids in TOKENIZER.encode_batch(["a", "a b c d e"])
    ]


def test_text_is_split_into_words_signs_and_pairs_of_digits():
    words = Tokenizer.train(["1234 don't\n\n    x != y" * 100], 600)
    pieces = [words.token_bytes(n).decode() for n in words.encode("1234 don't\n\n    x != y")]
    assert pieces == ["12", "34", " don", "'t", "\n\n", "   ", " x", " !=", " y"]


@given(st.text())
@settings(max_examples=300)
def test_every_text_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert sum(TOKENIZER.byte_lengths()[ids]) == len(text.encode())
    assert TOKENIZER.encode(text, bos=True) == [TOKENIZER.bos, *ids]


@given(st.lists(st.sampled_from([*SPECIAL, "<|", "|>", "bos", " ", "x", "\n", "<|bos", "|"]), max_size=12))
def test_names_of_special_tokens_in_a_text_stay_text(parts):
    text = "".join(parts)
    for tokenizer in (TOKENIZER, Tokenizer(tokenizers.Tokenizer.from_str(TOKENIZER._inner.to_str()))):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special.values())
        assert tokenizer.encode_batch([text, text]) == [ids, ids]
        assert tokenizer.decode(ids) == text


ANY_IDS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40)


@given(ANY_IDS, st.booleans())
def test_a_stream_gives_what_decode_gives(ids, skip):
    stream = TOKENIZER.stream(skip_special=skip)
    text = "".join(stream.push(number) for number in ids) + stream.flush()
    assert text == TOKENIZER.decode(ids, skip_special=skip)
    if skip:
        data = b"".join(TOKENIZER.token_bytes(number) for number in ids)
        assert text == data.decode("utf-8", errors="replace")


@given(st.text())
def test_a_stream_never_breaks_a_character(text):
    stream = TOKENIZER.stream()
    done = ""
    for byte in text.encode():
        done += stream.push(TOKENIZER._bytes.index(bytes([byte])))
        assert text.startswith(done)
    assert done == text
    assert stream.flush() == ""


def test_an_unfinished_character_is_replaced():
    stream = TOKENIZER.stream()
    euro = [TOKENIZER._bytes.index(bytes([byte])) for byte in "€".encode()]
    assert [stream.push(number) for number in euro] == ["", "", "€"]
    assert stream.push(euro[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    ids = [0, *TOKENIZER.encode("a"), euro[0], 1]
    assert TOKENIZER.decode(ids) == "a\ufffd"
    assert TOKENIZER.decode(ids, skip_special=False) == "<|bos|>a\ufffd<|user_start|>"


@given(
    st.lists(
        st.sampled_from(["\n", " ", "word", "==", "7", "é", "\r", "\n\n", "\u3000", "\x1c", "\x85"]),
        min_size=8,
    )
)
def test_a_long_text_is_encoded_in_pieces_as_if_whole(parts):
    text = "".join(parts * 3)
    whole = TOKENIZER.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", 5)
        pieces = list(module._pieces(text))
        assert "".join(pieces) == text
        assert TOKENIZER.encode(text) == whole


def test_long_texts_are_cut():
    text = "one line\n" * 300_000
    pieces = list(module._pieces(text))
    assert [len(piece) for piece in pieces[:-1]] == [1048581, 1048581]
    assert "".join(pieces) == text


def test_saving_and_loading_changes_nothing(tmp_path):
    assert TOKENIZER.save(tmp_path) == tmp_path / "tokenizer.json"
    TOKENIZER.save(tmp_path / "other.json")
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path / "other.json")):
        again = Tokenizer.load(path)
        assert again.fingerprint == TOKENIZER.fingerprint
        assert again.encode(TEXTS[1]) == TOKENIZER.encode(TEXTS[1])
        assert again.special == TOKENIZER.special
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "tokenizer.json"]


def test_the_file_works_without_this_class_and_begins_with_bos(tmp_path):
    TOKENIZER.save(tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = inner.encode("add(1)").ids
    assert ids == [0, *TOKENIZER.encode("add(1)")]
    assert inner.decode(ids) == "add(1)"


@pytest.mark.parametrize("sign", ["x", "é", "=", "_", " ", "\n", "!\x1c"])
def test_what_runs_on_is_no_word(sign):
    """Training on such a text would take minutes: it costs the square of a word's length."""
    text = f"def f(x):\n    {sign * 300_001} and more"
    parts = list(module._short_runs(text))
    assert "".join(parts) == text
    assert max(part.count(sign) for part in parts) <= 256 + 4
    trained = Tokenizer.train([text], 300)
    assert trained.decode(trained.encode(text)) == text


def test_training_is_deterministic():
    code = (
        "from starlm.data.tokenizer import Tokenizer\nimport pathlib, starlm.errors\n"
        "text = ''.join(pathlib.Path(m.__file__).read_text() for m in (starlm.errors, pathlib))\n"
        "print(Tokenizer.train([text, text[::-1]], 700).fingerprint)"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": str(run), "RAYON_NUM_THREADS": str(1 + run)},
        ).stdout
        for run in range(3)
    }
    assert len(seen) == 1
    assert TOKENIZER.fingerprint == Tokenizer.train(iter(TEXTS), 400).fingerprint
    assert TOKENIZER.fingerprint != Tokenizer.train(TEXTS, 399).fingerprint


def test_too_little_text_gives_a_smaller_vocabulary():
    assert Tokenizer.train(["ab"], 1000).vocab_size == 265


@pytest.mark.parametrize("size", [264, 0, -1])
def test_a_vocabulary_must_hold_the_bytes(size):
    with pytest.raises(InputError, match=f"at least 265 .* got {size}"):
        Tokenizer.train(["a"], size)
    assert Tokenizer.train(["aaaa"], 265).vocab_size == 265


@pytest.mark.parametrize("bad", [-1, 400, 10**9])
def test_ids_outside_of_the_vocabulary_are_refused(bad):
    with pytest.raises(InputError, match=f"Token {bad} is not in the vocabulary of 400. Use the tokenizer"):
        TOKENIZER.decode([bad])


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(InputError, match="surrogate pair at character 2"):
        TOKENIZER.encode("ab\ud800")


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no readable tokenizer at .*tokenizer\.json: No such file.*Give a"):
        Tokenizer.load(tmp_path)
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{", b"[]", b'{"version": "1.0"}', TOKENIZER._inner.to_str().encode()[:-50]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer: .*Copy the file again"):
            Tokenizer.load(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"no readable tokenizer at .*tokenizer\.json"):
        Tokenizer.load(tmp_path)


def changed(edit):
    content = json.loads(TOKENIZER._inner.to_str())
    edit(content)
    return json.dumps(content)


def foreign_word(content):
    content["model"]["vocab"]["你"] = content["model"]["vocab"].pop("Ġ")
    content["model"]["merges"] = []


def no_byte(content):
    content["model"]["merges"] = []
    vocab = content["model"]["vocab"]
    del vocab["Ā"]
    content["model"]["vocab"] = {token: n for n, token in enumerate(vocab)}


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda content: content["added_tokens"].pop(3), "no special token <|assistant_start|>"),
        (
            lambda content: content["added_tokens"][2].update(special=False),
            "no special token <|user_end|>",
        ),
        (
            lambda content: content["added_tokens"].append(
                {**content["added_tokens"][0], "id": 400, "content": "<x>", "special": False, "rstrip": True}
            ),
            "'<x>' takes the blanks beside it away",
        ),
        (lambda content: content["model"]["vocab"].update({"zzz": 1000}), "gap: there is no token 400"),
        (foreign_word, "not a byte-level one"),
        (no_byte, "no token for the byte 0x00"),
    ],
)
def test_tokenizers_of_another_kind_are_refused(tmp_path, edit, part):
    path = tmp_path / "tokenizer.json"
    path.write_text(changed(edit))
    with pytest.raises(InputError) as caught:
        Tokenizer.load(path)
    assert part in str(caught.value)
    assert str(path) in str(caught.value)
    assert "with StarLM" in str(caught.value)


def test_tokens_that_others_have_added():
    """A special one is none in a text; another one is, and comes back."""
    inner = tokenizers.Tokenizer.from_str(TOKENIZER._inner.to_str())
    inner.add_special_tokens(["<|im_start|>"])
    inner.add_tokens(["<é 0>"])
    grown, size = Tokenizer(inner), TOKENIZER.vocab_size
    assert grown.special == {**TOKENIZER.special, "<|im_start|>": size}
    text = "a<|im_start|> <é 0> b"
    ids = grown.encode(text)
    assert size not in ids
    assert ids.count(size + 1) == 1
    assert grown.decode(ids) == text
    assert grown.byte_lengths()[size:].tolist() == [0, len("<é 0>".encode())]


def test_special_tokens_that_are_words_of_the_vocabulary():
    """Every text can spell them, so they are words: nothing of a text is lost."""
    inner = Tokenizer.train(["### Title\n### Other ## x\n" * 50], 300)._inner
    number = inner.token_to_id("###")
    assert number is not None
    inner.add_special_tokens(["###", "<|im_start|>"])
    grown = Tokenizer(inner)
    assert "###" not in grown.special
    assert grown.ordinary == {"###": number}
    assert "<|im_start|>" in grown.special
    assert number in grown.encode("### hi")
    assert grown.decode(grown.encode("### hi <|im_start|>")) == "### hi <|im_start|>"
    assert grown.byte_lengths()[number] == 3


def test_a_plain_tokenizer_is_refused():
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="no special token"):
        Tokenizer(inner)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    TOKENIZER.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StarLMError, match=r"disk is full: .*tokenizer\.json.*Free"):
        Tokenizer.train(["a"], 265).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["one text", b"bytes"])
def test_one_text_is_no_sequence_of_texts(text):
    """Its characters would be."""
    with pytest.raises(InputError, match=r"as in \[text\].*got one"):
        Tokenizer.train(text, 300)
