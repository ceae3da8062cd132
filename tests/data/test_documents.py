import gzip
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from starlm.data.conversations import Message
from starlm.data.documents import (
    Document,
    SourceFile,
    embedded_corpus,
    find_files,
    iter_documents,
    left_out,
    position_of,
)
from starlm.errors import InputError


def read(*paths, **options):
    return [(d.source, d.text) for d in iter_documents(find_files(paths), **options)]


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_folders_are_searched_in_order_of_names_without_what_is_hidden(tmp_path):
    for name in ("b.txt", "a/z.MD", "a/b.py", ".git/x.txt", ".hidden.txt", "c.bin", "a.txt"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    files = find_files([tmp_path / "root"])
    assert [file.name for file in files] == ["a/b.py", "a/z.MD", "a.txt", "b.txt"]
    assert all(file.path == tmp_path / "root" / file.name and file.required for file in files)


def test_a_file_reached_twice_is_taken_once_and_names_are_unique(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    for name in ("x", "y"):
        (tmp_path / name / "t.txt").write_text(name)
    (tmp_path / "x" / "link.txt").symlink_to(tmp_path / "x" / "t.txt")
    (tmp_path / "x" / "round").symlink_to(tmp_path / "x")
    (tmp_path / "x" / "elsewhere").symlink_to(tmp_path / "y")
    names = [file.name for file in find_files([tmp_path / "x", tmp_path / "x", tmp_path / "y"])]
    assert names == ["elsewhere/t.txt", "link.txt"]
    names = [file.name for file in find_files([tmp_path / "y/t.txt", tmp_path / "x/t.txt"])]
    assert names == ["t.txt", "t.txt~2"]


def test_each_format_gives_its_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo".encode())
    (tmp_path / "b.jsonl").write_bytes(
        b"\xef\xbb\xbf" + lines({"text": "é"}).encode() + b"\n" + b'{"text":"x"}'
    )
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines({"text": "zip"}, {"text": None}).encode()))
    pq.write_table(
        pa.table({"n": [1, 2, 3], "text": ["p", None, "q"]}), tmp_path / "d.parquet", row_group_size=2
    )
    skipped = []
    assert read(tmp_path, skipped=skipped) == [
        ("a.txt", "one\r\ntwo"),
        ("b.jsonl:1", "é"),
        ("b.jsonl:3", "x"),
        ("c.jsonl.gz:1", "zip"),
        ("d.parquet:1", "p"),
        ("d.parquet:3", "q"),
    ]
    assert skipped == ["c.jsonl.gz:2", "d.parquet:2"]


def test_another_field_can_hold_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"text": 1, "body": "yes"}))
    pq.write_table(pa.table({"body": ["row"]}), tmp_path / "b.parquet")
    assert read(tmp_path, text_field="body") == [("a.jsonl:1", "yes"), ("b.parquet:1", "row")]


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_conversations_are_read_from_lines_and_rows(tmp_path):
    lines = [json.dumps({"messages": TALK}), json.dumps(TALK), json.dumps({"id": 3, "messages": TALK})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table({"id": [1, 2], "messages": [TALK, None]}), tmp_path / "b.parquet")
    skipped = []
    found = list(iter_documents(find_files([tmp_path]), skipped=skipped))
    assert [document.source for document in found] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.parquet:1"]
    messages = (Message("user", "Hi"), Message("assistant", "Hello"))
    assert {document.messages for document in found} == {messages}
    assert {document.text for document in found} == {"Hi\nHello"}
    assert skipped == ["b.parquet:2"]


def test_the_field_that_is_asked_for_is_taken(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "messages": TALK, "chosen": TALK}))
    assert read(tmp_path) == [("a.jsonl:1", "a")]
    assert read(tmp_path, text_field="chosen") == [("a.jsonl:1", "Hi\nHello")]
    # No other in its place.
    with pytest.raises(InputError, match='no key "choosen"; it has text, messages, chosen'):
        read(tmp_path, text_field="choosen")


def test_where_there_is_no_text_the_messages_are_taken(tmp_path):
    records = [{"text": text, "messages": TALK} for text in (None, "", " \n")]
    (tmp_path / "a.jsonl").write_text(lines(*records))
    pq.write_table(pa.table({"text": pa.nulls(2), "messages": [TALK, TALK]}), tmp_path / "b.parquet")
    assert [text for _, text in read(tmp_path)] == ["Hi\nHello"] * 5


def test_conversations_in_which_nobody_answers_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines([], TALK[:1], {"messages": TALK[:1]}, TALK))
    skipped = []
    assert read(tmp_path, skipped=skipped) == [("a.jsonl:4", "Hi\nHello")]
    assert skipped == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]


def test_empty_files_are_passed_over(tmp_path):
    for name, text in (("a.txt", ""), ("b.py", " \n\t"), ("c.md", "c"), ("d.jsonl", "")):
        (tmp_path / name).write_text(text)
    skipped = []
    assert read(tmp_path, skipped=skipped) == [("c.md", "c")]
    assert skipped == ["a.txt", "b.py"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"abc\0d", ["a.txt", "byte offset 3", "NUL", "leave it out"]),
        ("a.py", b"ab\xffcd", ["a.py", "byte offset 2", "0xff", "Convert the file to UTF-8"]),
        ("a.md", "é".encode()[:1], ["a.md", "byte offset 0", "0xc3"]),
        ("a.txt", "hi".encode("utf-16"), ["byte offset 3", "NUL"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl:2", "not JSON", "mend the line"]),
        ("a.jsonl", b'{"text": "\xff"}\n', ["a.jsonl:1", "not text in UTF-8", "byte 10", "0xff"]),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "\xff"}\n', ["a.jsonl:1", "byte 13", "0xff"]),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            ["a.jsonl:2", 'no key "text"', "it has body", "text_field"],
        ),
        ("a.jsonl", b"[1]\n", ["a.jsonl:1", "not a conversation", "message 1", "take the conversation out"]),
        ("a.jsonl", b'{"messages": "[]"}\n', ["a.jsonl:1", '"messages" holds a text', "as a list"]),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "?"}]}\n',
            ["a.jsonl:1", "not a conversation: message 2 must be of the assistant"],
        ),
        ("a.jsonl", b'"abc"\n', ["a.jsonl:1", "not a JSON object", '"abc"']),
        ("a.jsonl", b'{"text": 3}\n', ["a.jsonl:1", "holds int, not text"]),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', ["a.jsonl:1", "surrogate", "character 1"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl:1", "not JSON"]),
        ("a.jsonl.gz", b"plain", ["a.jsonl.gz", "damaged or truncated gzip", "download"]),
        (
            "a.jsonl.gz",
            gzip.compress(b"".join(b'{"text": "%d"}\n' % (n * n * 7919) for n in range(3000)))[:-500],
            ["a.jsonl.gz", "truncated", "after line", "download"],
        ),
        ("a.parquet", b"PAR1 not at all", ["a.parquet", "not a readable Parquet file", "download"]),
    ],
)
def test_bad_content_is_named_with_its_place(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    for part in parts:
        assert part in str(caught.value)


def test_a_damaged_row_group_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{n * 7919}" for n in range(5000)]}), path, row_group_size=2500)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 9000] = os.urandom(9000)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet is not a readable Parquet file: after row"):
        read(path)


@pytest.mark.parametrize(
    ("table", "part"),
    [
        ({"body": ["x"]}, 'no column "text", "messages", "conversations"; it has body'),
        ({"text": [1]}, "row 1 holds int, not text"),
    ],
)
def test_a_parquet_file_without_text_is_refused(tmp_path, table, part):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="text_field") as caught:
        read(tmp_path)
    assert part in str(caught.value)
    assert "a.parquet" in str(caught.value)


def test_what_cannot_be_found_is_refused(tmp_path):
    (tmp_path / "x.pdf").write_text("x")
    with pytest.raises(InputError, match=r"There is no file or folder .*nowhere.*Check the path"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"x\.pdf cannot be read.*supported are \.txt.*Convert"):
        find_files([tmp_path / "x.pdf"])
    with pytest.raises(InputError, match=r"No file to read in .*Supported are \.txt"):
        find_files([tmp_path])
    with pytest.raises(InputError, match="No file to read in an empty list"):
        find_files([])
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"gone\.txt cannot be read: No such file"):
        read(tmp_path)


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "pipe.txt")
    (tmp_path / "a.txt").write_text("x")
    assert [file.name for file in find_files([tmp_path])] == ["a.txt"]
    with pytest.raises(InputError, match=r"pipe\.txt is no file but a pipe"):
        find_files([tmp_path / "pipe.txt"])


def test_a_file_that_is_not_required_counts_as_empty(tmp_path):
    (tmp_path / "a.py").write_bytes(b"\xff")
    file = SourceFile(path=tmp_path / "a.py", name="a.py", required=False)
    skipped = []
    assert list(iter_documents([file], skipped=skipped)) == []
    assert skipped == ["a.py"]


def test_the_embedded_corpus_is_the_standard_library(tmp_path):
    files = embedded_corpus()
    names = [file.name for file in files]
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert names == [file.name for file in sorted(files, key=lambda file: file.name.split("/"))]
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
    assert not any(file.required for file in files)


def test_a_python_without_sources_has_no_embedded_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="Name your own files"):
        embedded_corpus()


def test_the_place_of_a_document_is_a_fixed_function_of_its_source():
    # printf a.txt | sha256sum | cut -c1-16
    assert position_of("a.txt") == 0x18B7CB099A9EA3F5
    # Even: those below a fifth of all places are a fifth of all.
    assert 900 < sum(position_of(f"{n}.txt") < 0.2 * 2**64 for n in range(5000)) < 1100


def test_documents_are_values():
    assert Document(text="a", source="b") == Document(text="a", source="b")


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, starlm.data.documents, starlm.data\n"
        "assert not {'torch', 'numpy', 'pyarrow', 'tokenizers'} & set(sys.modules), sys.modules.keys()\n"
        "for name in starlm.data.__all__: getattr(starlm.data, name)\n"
        "import starlm.data.prepare\n"
        "assert 'torch' not in sys.modules\n"
        "assert not hasattr(starlm.data, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_left_out_is_counted_by_suffix(tmp_path):
    for name in (
        "a.txt",
        "b.c",
        "c.C",
        "sub/d.html",
        "sub/Makefile",
        ".hidden",
        ".git/e.c",
        "sub/f.jsonl.gz",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    assert left_out([tmp_path]) == {".c": 2, ".html": 1, "no suffix": 1}
    assert left_out([tmp_path / "a.txt"]) == {}
