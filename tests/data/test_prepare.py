import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from starlm.data import prepare as module
from starlm.data.documents import position_of
from starlm.data.prepare import prepare
from starlm.data.shards import TokenData
from starlm.data.tokenizer import Tokenizer
from starlm.errors import InputError, StarLMError


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def texts_of(data, name):
    tokenizer = Tokenizer.load(data)
    split = TokenData.open(data).splits[name]
    texts = []
    for number, size in enumerate(split.document_lengths()):
        ids = np.empty(size, np.int64)
        split.read(number, 0, int(size), ids)
        texts.append(tokenizer.decode(ids[1:]))
    return texts


def write(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_the_same_sources_give_the_same_bytes(corpus, tmp_path):
    options = {"vocab_size": 270, "validation_fraction": 0.3, "shard_tokens": 200}
    code = (
        "import sys; from starlm.data.prepare import prepare\n"
        f"prepare([sys.argv[1]], sys.argv[2], **{options})"
    )
    # Another process, hash seed, number of threads and place.
    shutil.copytree(corpus / "text", tmp_path / "elsewhere")
    for number, source in enumerate((corpus / "text", tmp_path / "elsewhere")):
        subprocess.run(
            [sys.executable, "-c", code, str(source), str(tmp_path / f"again{number}")],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": str(number), "RAYON_NUM_THREADS": str(1 + number)},
        )
        assert tree(tmp_path / f"again{number}") == tree(corpus / "data")


def test_each_document_is_in_the_split_of_its_name(corpus):
    for path in (corpus / "text").iterdir():
        name = "validation" if position_of(path.name) < 0.3 * 2**64 else "train"
        assert path.read_text() in texts_of(corpus / "data", name)
    assert sorted(texts_of(corpus / "data", "train") + texts_of(corpus / "data", "validation")) == sorted(
        path.read_text() for path in (corpus / "text").iterdir()
    )


def test_the_split_of_a_document_stays_when_others_come_and_go(corpus, tmp_path):
    before = set(texts_of(corpus / "data", "validation"))
    gone = corpus / "text" / "03.txt"
    lost = gone.read_text()
    gone.unlink()
    write(corpus / "text", new="Something new " * 20, newer="Something newer " * 20)
    prepare([corpus / "text"], tmp_path / "out", vocab_size=270, validation_fraction=0.3)
    after = set(texts_of(tmp_path / "out", "validation"))
    assert before - after <= {lost}
    assert all("Something new" in text for text in after - before)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_split_has_a_document(corpus, tmp_path, fraction):
    report = prepare([corpus / "text"], tmp_path / "out", vocab_size=270, validation_fraction=fraction)
    assert min(report.documents.values()) == 1
    assert sum(report.documents.values()) == 12


@pytest.mark.parametrize(
    ("text", "fraction", "train"),
    [
        ("one\ntwo\nthree\nfour\n", 0.3, "one\ntwo\n"),
        ("one\ntwo\nthree\nfour\n", 0.25, "one\ntwo\nthree\n"),
        ("one\ntwo\n", 0.9, "o"),
        ("no line ends here", 0.3, "no line ends"),
        ("ab", 0.01, "a"),
        ("a\nb", 0.99, "a"),
    ],
)
def test_a_single_document_is_divided_at_a_line(tmp_path, text, fraction, train):
    source = write(tmp_path / "text", a=text)
    report = prepare([source], tmp_path / "out", vocab_size=265, validation_fraction=fraction)
    assert texts_of(tmp_path / "out", "train") == [train]
    assert texts_of(tmp_path / "out", "validation") == [text[len(train) :]]
    assert report.documents == {"train": 1, "validation": 1}
    assert sum(report.bytes.values()) == len(text)


@pytest.mark.parametrize(
    ("lines", "fraction"),
    [
        # Of the files in the order of their positions; by their names only, the first would be validation.
        ([5000, 3], 0.05),
        ([2500, 1400, 10], 0.05),
        ([1400, 1400, 2500], 0.05),
        ([5000, 3], 0.5),
    ],
)
def test_of_few_documents_the_longest_are_divided(tmp_path, lines, fraction):
    names = sorted("abcd"[: len(lines)], key=lambda name: position_of(f"{name}.txt"))
    texts = {name: f"{name} says é\n" * count for name, count in zip(names, lines, strict=True)}
    source, stages = write(tmp_path / "text", **texts), []
    options = {"vocab_size": 270, "validation_fraction": fraction}
    report = prepare([source], tmp_path / "out", progress=lambda *values: stages.append(values), **options)
    total = sum(len(text.encode()) for text in texts.values())
    assert sum(report.bytes.values()) == total
    assert report.bytes["validation"] == pytest.approx(fraction * total, abs=30)
    train, validation = (texts_of(tmp_path / "out", name) for name in ("train", "validation"))
    assert texts[names[0]] in [head + tail for head in train for tail in validation]
    assert all(text.endswith("\n") for text in train)
    pieces = sum(report.documents.values())
    assert (len(train) + len(validation), stages[-1]) == (pieces, ("encode", pieces, pieces))
    prepare([source], tmp_path / "again", **options)
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


def test_a_long_line_is_divided(tmp_path):
    """Minified code behind its licence."""
    source = write(tmp_path / "text", code="a licence\n" + "x += 1;" * 10_000)
    report = prepare([source], tmp_path / "out", vocab_size=270, validation_fraction=0.1)
    assert report.bytes == {"train": 63_009, "validation": 7_001}


def test_short_held_out_documents_stay_whole(tmp_path):
    """Of those that make validation too large, the long ones are cut."""
    names = sorted("abcdef", key=lambda name: position_of(f"{name}.txt"))
    fraction = (position_of(f"{names[2]}.txt") + position_of(f"{names[3]}.txt")) / 2**65
    lines = dict(zip(names, [3, 3000, 3000, 10, 10, 10], strict=True))
    source = write(tmp_path / "text", **{name: f"{name} says so\n" * count for name, count in lines.items()})
    report = prepare([source], tmp_path / "out", vocab_size=265, validation_fraction=fraction)
    held_out = texts_of(tmp_path / "out", "validation")
    assert [text[0] for text in held_out] == sorted(names[:3])
    assert f"{names[0]} says so\n" * 3 in held_out
    wanted = fraction * sum(report.bytes.values())
    assert report.bytes["validation"] == pytest.approx(wanted, abs=30)


def test_characters_are_not_divided(tmp_path):
    report = prepare([write(tmp_path / "text", a="🙂", b="🙃")], tmp_path / "out", vocab_size=265)
    assert report.bytes == {"train": 4, "validation": 4}


def test_a_source_named_twice_is_read_once(corpus, tmp_path):
    once = prepare([corpus / "text"], tmp_path / "a", vocab_size=270)
    links = tmp_path / "links"
    links.symlink_to(corpus / "text")
    for number, sources in enumerate(
        ([corpus / "text"] * 2, [corpus / "text", corpus / "text" / "03.txt"], [corpus / "text", links])
    ):
        again = prepare(sources, tmp_path / f"b{number}", vocab_size=270)
        assert again.documents == once.documents
        assert again.tokens == once.tokens


def test_unreadable_files_are_passed_over_if_asked(corpus, tmp_path):
    text, out = corpus / "text", tmp_path / "out"
    wanted = prepare([text], tmp_path / "wanted", vocab_size=270)
    (text / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(
        InputError, match=r"latin\.txt is not a text file: at byte offset 2 .*--skip-unreadable"
    ):
        prepare([text], out, vocab_size=270)
    (text / "gone.txt").symlink_to(text / "nothing")
    for reused in (False, True):
        report = prepare([text], out, vocab_size=270, skip_unreadable=True)
        assert (report.reused, report.tokens) == (reused, wanted.tokens)
        assert report.skipped_first == ("gone.txt", "latin.txt")


def test_the_report_counts(corpus, tmp_path):
    write(corpus / "text", empty="", blank=" \n")
    stages = []
    report = prepare(
        [corpus / "text"], tmp_path / "out", vocab_size=270, progress=lambda *values: stages.append(values)
    )
    assert (report.out, report.reused, report.vocab_size) == (tmp_path / "out", False, 270)
    assert report.skipped == 2
    assert report.skipped_first == ("blank.txt", "empty.txt")
    texts = {name: texts_of(tmp_path / "out", name) for name in ("train", "validation")}
    assert report.documents == {name: len(found) for name, found in texts.items()}
    assert report.bytes == {name: len("".join(found).encode()) for name, found in texts.items()}
    data = TokenData.open(tmp_path / "out")
    data.verify()
    assert report.tokens == {name: split.num_tokens for name, split in data.splits.items()}
    assert [values[1:] for values in stages if values[0] == "read"] == [(n, 14) for n in range(1, 15)]
    assert [stage for stage, *_ in stages][-1] == "encode"
    assert stages[-1] == ("encode", 12, 12)
    assert {total for stage, _, total in stages if stage == "tokenizer"} == {None}


def test_the_tokenizer_sees_training_documents_only(tmp_path):
    source = write(tmp_path / "text", **{f"d{n}": f"common {n} " * 900 for n in range(9)})
    held_out = min(source.iterdir(), key=lambda path: position_of(path.name))
    held_out.write_text("zqzqzqzq " * 500)
    prepare([source], tmp_path / "out", vocab_size=300, validation_fraction=1e-9)
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert not any(b"zq" in tokenizer.token_bytes(n) for n in range(tokenizer.vocab_size))


def test_the_tokenizer_reads_no_more_than_it_needs(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOKENIZER_BYTES", 100)
    monkeypatch.setattr(module, "_BATCH", 10)
    stages = []
    prepare([corpus / "text"], tmp_path / "out", vocab_size=300, progress=lambda *v: stages.append(v))
    assert len([values for values in stages if values[0] == "tokenizer"]) < 6
    TokenData.open(tmp_path / "out").verify()


@pytest.mark.parametrize("files", [1, 40])
def test_the_tokenizer_learns_from_all_sources(tmp_path, monkeypatch, files):
    """From a part of each, if all would be too much: of long documents and of many."""
    monkeypatch.setattr(module, "TOKENIZER_BYTES", 20_000)
    monkeypatch.setattr(module, "_PART", 200)
    words, stages = {"english": "house ", "russian": "дом "}, []
    for name, word in words.items():
        write(tmp_path / name, **{f"{name}{n}": word * (8000 // files) for n in range(files)})
    sources = [tmp_path / name for name in words]
    prepare(sources, tmp_path / "out", vocab_size=280, progress=lambda *v: stages.append(v))
    taken = max(done for stage, done, _ in stages if stage == "tokenizer")
    assert taken == pytest.approx(20_000, rel=0.3)
    tokens = Tokenizer.load(tmp_path / "out")
    assert [len(tokens.encode(f" {word.strip()}")) for word in words.values()] == [1, 1]


def test_a_given_tokenizer_is_used(corpus, tmp_path):
    given = Tokenizer.train(["abc def " * 50], 268)
    given.save(tmp_path / "mine.json")
    report = prepare([corpus / "text"], tmp_path / "out", tokenizer=tmp_path / "mine.json")
    assert report.vocab_size == 268
    assert Tokenizer.load(tmp_path / "out").fingerprint == given.fingerprint
    TokenData.open(tmp_path / "out").verify()
    for tokenizer in (tmp_path / "mine.json", str(tmp_path), given):
        if tokenizer == str(tmp_path):
            given.save(tmp_path)
        assert prepare([corpus / "text"], tmp_path / "out", tokenizer=tokenizer).reused


OPTIONS = {"vocab_size": 270, "validation_fraction": 0.3, "shard_tokens": 200}


def test_the_same_preparation_is_not_done_again(corpus):
    before = tree(corpus / "data")
    times = {path: path.stat().st_mtime_ns for path in (corpus / "data").iterdir()}
    report = prepare([corpus / "text"], corpus / "data", **OPTIONS)
    assert report.reused
    assert sum(report.documents.values()) == 12
    assert {path: path.stat().st_mtime_ns for path in (corpus / "data").iterdir()} == times
    assert prepare([corpus / "text"], corpus / "data", overwrite=True, **OPTIONS).reused is False
    assert tree(corpus / "data") == before


def changed(corpus):
    write(corpus / "text", **{"05": "changed"})


def touched(corpus):
    os.utime(corpus / "text" / "05.txt", ns=(1, 1))


def added(corpus):
    write(corpus / "text", more="more text")


def removed(corpus):
    (corpus / "text" / "05.txt").unlink()


def renamed(corpus):
    (corpus / "text" / "05.txt").rename(corpus / "text" / "55.txt")


@pytest.mark.parametrize("change", [changed, touched, added, removed, renamed])
def test_changed_sources_are_noticed(corpus, change):
    change(corpus)
    before = tree(corpus / "data")
    with pytest.raises(InputError, match=r"data holds another preparation.*--overwrite"):
        prepare([corpus / "text"], corpus / "data", **OPTIONS)
    assert tree(corpus / "data") == before
    report = prepare([corpus / "text"], corpus / "data", overwrite=True, **OPTIONS)
    assert not report.reused
    assert tree(corpus / "data") != before
    TokenData.open(corpus / "data").verify()
    assert prepare([corpus / "text"], corpus / "data", **OPTIONS).reused


@pytest.mark.parametrize(
    "option",
    [{"vocab_size": 268}, {"validation_fraction": 0.2}, {"shard_tokens": 100}, {"text_field": "body"}],
)
def test_other_options_are_noticed(corpus, option):
    with pytest.raises(InputError, match="another preparation"):
        prepare([corpus / "text"], corpus / "data", **{**OPTIONS, **option})


def test_damaged_data_is_prepared_again(corpus):
    before = tree(corpus / "data")
    (corpus / "data" / "train-00000.tokens.npy").write_bytes(b"")
    assert not prepare([corpus / "text"], corpus / "data", **OPTIONS).reused
    assert tree(corpus / "data") == before
    for content in ("{", "[]", json.dumps({"sources": 3})):
        (corpus / "data" / "meta.json").write_text(content)
        with pytest.raises(InputError, match="another preparation"):
            prepare([corpus / "text"], corpus / "data", **OPTIONS)
    assert not prepare([corpus / "text"], corpus / "data", overwrite=True, **OPTIONS).reused
    assert tree(corpus / "data") == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("out", ["data", "new", "empty"])
def test_what_appears_meanwhile_is_not_replaced(corpus, out, overwrite):
    (corpus / "empty").mkdir()

    def work(stage, done, total):
        if stage == "encode":
            (corpus / out).mkdir(exist_ok=True)
            (corpus / out / "thesis.txt").write_text("years")

    (corpus / "data" / "train-00000.tokens.npy").write_bytes(b"damaged")
    before = tree(corpus / "data")
    with pytest.raises(InputError, match="something else than prepared data"):
        prepare([corpus / "text"], corpus / out, overwrite=overwrite, progress=work, **OPTIONS)
    assert tree(corpus / out)["thesis.txt"] == b"years"
    assert before.items() <= tree(corpus / "data").items()
    assert sorted(path.name for path in corpus.iterdir()) == sorted({"data", "empty", "text", out})


def test_of_two_preparations_the_second_to_end_does_not_replace_the_first(corpus):
    def other(stage, done, total):
        if stage == "encode" and not (corpus / "new").exists():
            shutil.copytree(corpus / "data", corpus / "new")

    with pytest.raises(InputError, match="new holds another preparation"):
        prepare([corpus / "text"], corpus / "new", vocab_size=265, progress=other)
    assert tree(corpus / "new") == tree(corpus / "data")


@pytest.mark.parametrize("name", [".DS_Store", "._meta.json", "Thumbs.db", "desktop.ini", ".directory"])
def test_what_file_managers_leave_is_in_nobodys_way(corpus, name):
    (corpus / "data" / name).write_text("x")
    assert prepare([corpus / "text"], corpus / "data", **OPTIONS).reused
    assert not prepare([corpus / "text"], corpus / "data", overwrite=True, **OPTIONS).reused
    (corpus / "empty").mkdir()
    (corpus / "empty" / name).write_text("x")
    assert not prepare([corpus / "text"], corpus / "empty", **OPTIONS).reused
    # A folder is no leftover, whatever its name.
    thesis = corpus / "folder" / name / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years")
    with pytest.raises(InputError, match="something else than prepared data"):
        prepare([corpus / "text"], corpus / "folder", **OPTIONS)
    assert thesis.read_text() == "years"


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folders_are_never_replaced(corpus, overwrite):
    for name, text in (("thesis.txt", "years"), (".git", "x"), ("train-00000.tokens.npy.bak", "x")):
        (corpus / "data" / name).write_text(text)
        with pytest.raises(InputError, match=r"something else than prepared data.*Choose another --out"):
            prepare([corpus / "text"], corpus / "data", overwrite=overwrite, **OPTIONS)
        assert (corpus / "data" / name).read_text() == text
        (corpus / "data" / name).unlink()
    before = tree(corpus / "text")
    with pytest.raises(InputError, match="something else"):
        prepare([corpus / "text"], corpus / "text", overwrite=overwrite)
    assert tree(corpus / "text") == before
    with pytest.raises(InputError, match=r"03\.txt is a file. Choose another --out"):
        prepare([corpus / "text"], corpus / "text" / "03.txt", overwrite=overwrite)


def test_an_empty_folder_and_a_link_may_be_filled(corpus, tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    prepare([corpus / "text"], tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "disk" / "real") == tree(corpus / "data")


def test_a_killed_replacement_is_settled_first(corpus):
    before = tree(corpus / "data")
    (corpus / "data").rename(corpus / f".data.old-{2**22 + 1}")
    (corpus / f".data.partial-{2**22 + 1}").mkdir()
    assert prepare([corpus / "text"], corpus / "data", **OPTIONS).reused
    assert tree(corpus / "data") == before
    assert sorted(path.name for path in corpus.iterdir()) == ["data", "text"]


def test_sources_that_change_meanwhile_are_refused(corpus, tmp_path):
    def change(stage, done, total):
        if stage == "encode":
            write(corpus / "text", **{"05": "changed while it was read"})

    with pytest.raises(InputError, match=r"changed while it was read\. Run the same command again"):
        prepare([corpus / "text"], tmp_path / "out", vocab_size=270, progress=change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 0}, "above 0 and below 1; got 0"),
        ({"validation_fraction": 1}, "above 0 and below 1; got 1"),
        ({"validation_fraction": float("nan")}, "above 0 and below 1; got nan"),
        ({"vocab_size": 264}, "vocab_size must be at least 265"),
        ({"vocab_size": 300, "tokenizer": "t"}, r"so vocab_size \(300\) cannot be met\. Leave out"),
        ({"shard_tokens": 0}, "shard_tokens must be 1 or more"),
        ({"vocab_size": None, "tokenizer": "nowhere.json"}, "no readable tokenizer at nowhere.json"),
    ],
)
def test_impossible_options_leave_nothing(corpus, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        prepare([corpus / "text"], tmp_path / "out", **{"vocab_size": 270} | options)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 264}, "vocab_size must be at least 265"),
        ({"out": "corpus/text/03.txt/x/y"}, r"Cannot write .*y: .*03\.txt is a file\. Choose a folder"),
        ({"out": "locked/x"}, r"Cannot write locked/x: Permission denied"),
        # An empty folder is found out by the folder that it lies in, as it is replaced as a whole.
        ({"out": "locked/empty"}, r"Cannot write locked/empty: Permission denied"),
    ],
)
def test_nothing_is_read_for_what_cannot_be(corpus, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locked" / "empty").mkdir(parents=True)
    # The tests may run as root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "locked")
    with pytest.raises(InputError, match=message):
        prepare(
            [corpus / "text"], **{"out": "new", **options}, progress=lambda *values: pytest.fail(f"{values}")
        )


def test_data_are_used_again_where_nothing_can_be_written(corpus, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert prepare([corpus / "text"], corpus / "data", **OPTIONS).reused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no text in .*a\.txt: every document is empty.*other sources"),
        ("x", r"a\.txt is the only document"),
    ],
)
def test_sources_without_enough_text_are_refused(tmp_path, text, message):
    source = write(tmp_path / "text", a=text)
    with pytest.raises(InputError, match=message):
        prepare([source], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize("files", [0, 1, 5])
@pytest.mark.parametrize("out", ["data", "other/new"])
def test_a_full_disk_leaves_nothing(corpus, monkeypatch, files, out):
    before, calls = tree(corpus), iter(range(100))

    def full(path):
        if next(calls) >= files:
            raise OSError(errno.ENOSPC, "No space left on device")
        return ""

    monkeypatch.setattr("starlm.data.shards.sha256", full)
    with pytest.raises(StarLMError, match=r"The disk is full: .*Free some space"):
        prepare([corpus / "text"], corpus / out, overwrite=True, **OPTIONS)
    assert tree(corpus) == before
