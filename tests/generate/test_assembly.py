"""Text of tokens that come one at a time: whole characters, stop strings, blanks that are left out."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from starlm.data.tokenizer import Tokenizer
from starlm.generate.assembly import Assembly

TOKENIZER = Tokenizer.train(["def add(a, b):\n    return a + b  # é 你好 🙂\n" * 30], 300)


def pieces(what, stop=(), skip=0):
    """What each token of a text (or of ids) brings to light, and what is left at the end."""
    ids = TOKENIZER.encode(what) if isinstance(what, str) else what
    assembly, shown = Assembly(TOKENIZER, stop=stop, skip=skip), []
    for token in ids:
        shown.append(assembly.push(token))
        if assembly.stopped:
            assert assembly.flush() == ""
            return shown
    return [*shown, assembly.flush()]


@pytest.mark.parametrize("text", ["é你好🙂" * 5, "plain", "", "a🙂b\n"])
def test_pieces_are_whole_characters_and_join_to_the_text(text):
    got = pieces(text)
    assert "".join(got) == text
    assert all("\ufffd" not in piece for piece in got)
    if len(text) > 5:
        assert len([piece for piece in got if piece]) > 5, "as they come, not all at the end"


def test_a_character_that_is_never_finished():
    ids = TOKENIZER.encode("ab🙂")
    assert "".join(pieces(ids[:-1])) == "ab\ufffd"
    assert "".join(pieces([*ids[:-1], *TOKENIZER.encode("c")])) == "ab\ufffdc"


def test_special_tokens_have_no_text():
    ids = [*TOKENIZER.encode("ab"), TOKENIZER.special["<|user_end|>"], *TOKENIZER.encode("cd")]
    assert "".join(pieces(ids)) == "abcd"


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["o"], ""),
        ("one two three", ["four"], "one two three"),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("say 🙂 now", ["🙂"], "say "),
        ("ends with a start of stop: <|en", ["<|end|>"], "ends with a start of stop: <|en"),
        ("x\n\ny", ["\n\n"], "x"),
    ],
)
def test_stop_strings(text, stop, wanted):
    assert "".join(pieces(text, stop)) == wanted


@given(text=st.text("ab🙂", max_size=30), stop=st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_stop_strings(text, stop):
    """Cut where the first stop string is complete; nothing that belongs to it gets out before."""
    ids = TOKENIZER.encode(text)
    joined = "".join(pieces(ids, stop))
    # Token by token: the text so far, cut at the first stop string in it, if there is one.
    wanted, stream, sofar = text, TOKENIZER.stream(), ""
    for token in ids:
        sofar += stream.push(token)
        found = [at for at in (sofar.find(s) for s in stop) if at >= 0]
        if found:
            wanted = sofar[: min(found)]
            break
    assert joined == wanted


def test_stop_strings_are_held_back():
    seen = pieces("ab<|end", ["<|end|>"])
    assert "".join(seen[:-1]) == "ab"
    assert seen[-1] == "<|end"


@pytest.mark.parametrize("text", ["  ab", "    ", "\t \tx y"])
def test_what_the_reader_has_is_left_out(text):
    for skip in range(len(text) + 1):
        assert "".join(pieces(text, skip=skip)) == text[skip:]
