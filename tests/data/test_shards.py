import hashlib
import json
from functools import partial

import numpy as np
import pytest

from starlm.data.shards import META, ShardWriter, Split, TokenData, token_dtype
from starlm.data.tokenizer import Tokenizer
from starlm.errors import InputError

DOCUMENTS = [[5, 6], [], [7], [8, 9, 10, 11], [12]]


def write(folder, documents=DOCUMENTS, **options):
    writer = ShardWriter(folder, "train", **{"vocab_size": 300, "bos": 0} | options)
    for document in documents:
        writer.add(document, num_bytes=len(document))
    return writer.finish()


def read(split):
    result = []
    for number, size in enumerate(split.document_lengths()):
        out = np.empty(size, np.int64)
        split.read(number, 0, int(size), out)
        result.append(out.tolist())
    return result


def edit_meta(data, change):
    """Change meta.json, an object, in place."""
    meta = json.loads((data / META).read_text())
    change(meta)
    (data / META).write_text(json.dumps(meta))


@pytest.mark.parametrize(("size", "shards"), [(1, 5), (3, 4), (4, 4), (5, 4), (6, 3), (7, 2), (100, 1)])
def test_documents_begin_with_bos_and_lie_in_one_shard(tmp_path, size, shards):
    entry = write(tmp_path, shard_tokens=size)
    assert len(entry["shards"]) == shards
    assert (entry["documents"], entry["tokens"], entry["bytes"]) == (5, 13, 8)
    found = []
    for number, shard in enumerate(entry["shards"]):
        tokens = np.load(tmp_path / f"train-{number:05}.tokens.npy", allow_pickle=False)
        starts = np.load(tmp_path / f"train-{number:05}.documents.npy", allow_pickle=False)
        assert (tokens.dtype, starts.dtype) == (np.uint16, np.int64)
        assert len(tokens) == shard["num_tokens"]
        assert len(tokens) <= size or len(starts) == 1
        found += [piece.tolist() for piece in np.split(tokens, starts[1:])]
        for kind in ("tokens", "documents"):
            content = (tmp_path / shard[kind]["file"]).read_bytes()
            assert shard[kind]["size"] == len(content)
            assert shard[kind]["sha256"] == hashlib.sha256(content).hexdigest()
    assert found == [[0, *document] for document in DOCUMENTS]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, "uint16"), (65536, "uint16"), (65537, "uint32"), (2**31, "uint32")]
)
def test_tokens_take_as_few_bytes_as_they_can(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    write(tmp_path, [[vocab_size - 1]], vocab_size=vocab_size)
    tokens = np.load(tmp_path / "train-00000.tokens.npy")
    assert tokens.dtype == dtype
    assert tokens.tolist() == [0, vocab_size - 1]


def test_a_split_without_documents_has_no_shard(tmp_path):
    assert write(tmp_path, []) == {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}
    with pytest.raises(InputError, match="shard_tokens must be 1 or more; got 0"):
        write(tmp_path, shard_tokens=0)


def test_any_part_of_any_document_can_be_read():
    split = Split(
        "train",
        tokens=[np.array([0, 1, 2, 0], np.uint16), np.array([0, 3], np.uint16)],
        starts=[np.array([0, 3]), np.array([0])],
        bos=0,
        num_bytes=3,
        fingerprint="",
    )
    documents = [[0, 1, 2], [0], [0, 3]]
    assert (split.num_tokens, split.num_documents) == (6, 3)
    assert split.document_lengths().tolist() == [3, 1, 2]
    for number, document in enumerate(documents):
        for start in range(len(document) + 1):
            for stop in range(start, len(document) + 1):
                out = np.empty(stop - start, np.int64)
                split.read(number, start, stop, out)
                assert out.tolist() == document[start:stop]
    same = Split.from_documents(documents)
    assert read(same) == documents
    assert same.fingerprint != Split.from_documents(documents[:2]).fingerprint
    assert same.fingerprint != Split.from_documents([[0, 1], [2, 0], [0, 3]]).fingerprint


def test_what_was_prepared_can_be_read(corpus):
    data = TokenData.open(str(corpus / "data"))
    data.verify()
    tokenizer = Tokenizer.load(corpus / "data")
    assert data.vocab_size == tokenizer.vocab_size == 270
    texts = {path.read_text() for path in (corpus / "text").iterdir()}
    found = [tokenizer.decode(ids[1:]) for split in data.splits.values() for ids in read(split)]
    assert set(found) == texts
    assert len(found) == 12
    assert len(list((corpus / "data").glob("train-*.tokens.npy"))) > 2
    assert sum(split.num_bytes for split in data.splits.values()) == sum(len(t.encode()) for t in texts)


def refused(call, *parts):
    with pytest.raises(InputError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


AGAIN = "Run starlm data prepare again, with --overwrite"
FILES = [
    "train-00001.tokens.npy",
    "train-00000.documents.npy",
    "validation-00000.tokens.npy",
    "tokenizer.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_truncated_file_is_named(corpus, name):
    path = corpus / "data" / name
    content = path.read_bytes()
    for change in (content[:-1], content[:40], b"", content + b"x"):
        path.write_bytes(change)
        refused(lambda: TokenData.open(corpus / "data"), str(path), f"{len(change)} bytes instead of", AGAIN)
    path.unlink()
    refused(lambda: TokenData.open(corpus / "data"), str(path), "the file is missing", AGAIN)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_found(corpus, name):
    path = corpus / "data" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(lambda: TokenData.open(corpus / "data").verify(), str(path), AGAIN)


def test_a_header_that_does_not_fit_is_found(corpus):
    path = corpus / "data" / "train-00000.tokens.npy"
    content = path.read_bytes()
    for change, part in (
        (content.replace(b"<u2", b"<i2"), "int16"),
        (content.replace(b"\x93NUMPY", b"NUMPY\x93"), "not a readable .npy file"),
        (content.replace(b"descr", b"dexcr"), "not a readable .npy file"),
    ):
        path.write_bytes(change)
        refused(lambda: TokenData.open(corpus / "data"), str(path), part, AGAIN)


def replace_array(data, kind, change):
    """Write an array of the first shard anew, with a meta.json that fits it."""
    path = data / f"train-00000.{kind}.npy"
    np.save(path, change(np.load(path)))

    def entry(meta):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        meta["splits"]["train"]["shards"][0][kind] |= {"size": path.stat().st_size, "sha256": sha256}

    edit_meta(data, entry)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s + 1,
        lambda s: s[::-1].copy(),
        lambda s: np.append(s[:-1], 10**6),
        lambda s: np.append(s[:-1], s[-2]),
    ],
)
def test_offsets_out_of_order_are_found(corpus, change):
    replace_array(corpus / "data", "documents", change)
    refused(lambda: TokenData.open(corpus / "data"), "train-00000.documents.npy", "out of order", AGAIN)


@pytest.mark.parametrize(("at", "token", "part"), [(1, 270, "the token 270"), (0, 9, "begin with <|bos|>")])
def test_tokens_that_cannot_be_are_found(corpus, at, token, part):
    def change(tokens):
        tokens[at] = token
        return tokens

    replace_array(corpus / "data", "tokens", change)
    refused(lambda: TokenData.open(corpus / "data").verify(), "train-00000.tokens.npy", part, AGAIN)


def first_shard(meta):
    return meta["splits"]["train"]["shards"][0]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda m: m.update(format="parquet"), '"format": "starlm-data"'),
        (lambda m: m.update(version=2), "version 2 of the data format; this StarLM reads version 1"),
        (lambda m: m.pop("version"), "version None"),
        (lambda m: m.update(dtype="float32"), "dtype float32 does not fit 270"),
        (lambda m: m.update(vocab_size=10**6), "dtype uint16 does not fit"),
        (lambda m: m.update(vocab_size="many"), "of another kind"),
        (lambda m: m.pop("bos"), "a value is missing"),
        (lambda m: m.update(bos=None), "bos is None"),
        (lambda m: m.update(bos=270), "bos is 270"),
        (lambda m: m["splits"].pop("validation"), "a value is missing"),
        (lambda m: m.update(splits=[]), "of another kind"),
        (lambda m: m["splits"]["train"].update(tokens=1), "do not add up to the split train"),
        (lambda m: m["splits"]["train"].update(shards=[]), "do not add up to the split train"),
        (lambda m: m["splits"]["train"].update(bytes="x"), "bytes of train is 'x'"),
        (lambda m: m["splits"]["train"]["shards"].pop(), "do not add up to the split train"),
        (lambda m: first_shard(m)["tokens"].update(file="../elsewhere.npy"), "not in this folder"),
        (lambda m: first_shard(m)["tokens"].update(file=7), "of another kind"),
        (lambda m: first_shard(m)["tokens"].pop("sha256"), "a value is missing"),
    ],
)
def test_a_meta_file_with_unknown_values_is_refused(corpus, change, part):
    edit_meta(corpus / "data", change)
    refused(lambda: TokenData.open(corpus / "data"), "meta.json", part, "starlm data prepare")


def test_a_length_that_does_not_fit_is_named(corpus):
    edit_meta(corpus / "data", lambda meta: first_shard(meta).update(num_tokens=1))
    refused(lambda: TokenData.open(corpus / "data"), "train-00000.tokens.npy", "instead of", AGAIN)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000, b'{"format": 3}'])
def test_a_meta_file_of_another_kind_is_refused(corpus, content):
    (corpus / "data" / META).write_bytes(content)
    refused(lambda: TokenData.open(corpus / "data"), "meta.json", AGAIN)


def test_another_tokenizer_is_found(corpus):
    path = corpus / "data" / "tokenizer.json"
    Tokenizer.train(["other text " * 50], 270).save(path)
    new = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit_meta(corpus / "data", lambda meta: meta["tokenizer_file"].update(new))
    refused(lambda: TokenData.open(corpus / "data").verify(), "another tokenizer", AGAIN)


def test_a_folder_without_data_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "no" / "where"):
        refused(partial(TokenData.open, folder), f"no prepared data in {folder}", "Run starlm data prepare")


def test_data_whose_replacement_was_killed_is_found(corpus):
    (corpus / "data").rename(corpus / f".data.old-{2**22 + 1}")
    TokenData.open(corpus / "data").verify()
