"""Sources on the network, from real servers on the loopback interface that misbehave as servers do."""

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from starlm.data import download
from starlm.data.documents import find_files, iter_documents
from starlm.data.prepare import prepare
from starlm.errors import InputError

TEXT = b"".join(b"line %d of a text that is fetched\n" % n for n in range(20_000))


class Files(BaseHTTPRequestHandler):
    """Serves what is in `server.files`, and does once each what is in `server.faults`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers["Range"]))
        content = server.files.get(self.path.partition("?")[0])
        fault = server.faults.pop(0) if server.faults else None
        if fault == "move" or (isinstance(fault, str) and "://" in fault):
            self.send_response(302)
            self.send_header("Location", "/file.txt" if fault == "move" else fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if isinstance(fault, int) or content is None:
            self.send_error(fault or 404)
            return
        if fault == "unsized":
            # As an old server does: what has come when the connection ends is the file.
            self.send_response(200)
            self.send_header("ETag", '"some"')
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        etag, begin = f'"{hashlib.sha256(content).hexdigest()}"', 0
        if server.ranges and self.headers["Range"] and self.headers["If-Range"] == etag:
            begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        elif server.tagged and self.headers["If-None-Match"] == etag:
            self.send_response(304)
            self.end_headers()
            return
        else:
            self.send_response(200)
        if server.tagged:
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(content[begin : begin + (len(content) - begin) // 2])
            self.close_connection = True
            return
        self.wfile.write(content[begin:])

    def log_message(self, *args):
        pass


def serve(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.files, server.faults, server.asked, server.ranges = {"/file.txt": TEXT}, [], [], True
    server.tagged = True
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def server():
    server = serve(Files)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STARLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_PAUSE", 0.01)


def fetch(source, **options):
    told = []
    (path,) = download.local([source], lambda *what: told.append(what), **options)
    return path, told


def test_a_file_is_fetched_once_and_its_progress_told(server):
    path, told = fetch(f"{server.url}/file.txt?version=1")
    assert path.read_bytes() == TEXT
    assert path.name == "file.txt"
    assert told[-1] == (download.STAGE, len(TEXT), len(TEXT))
    assert fetch(f"{server.url}/file.txt?version=1") == (path, [])
    assert len(server.asked) == 1
    # Nothing else is left, and another address is another file.
    assert sorted(p.name for p in path.parent.iterdir()) == [".file.txt.tag", ".lock", "file.txt"]
    assert fetch(f"{server.url}/file.txt?version=2")[0] != path


@pytest.mark.parametrize("faults", [["cut", "cut", None], [503, "cut", 429, None], ["move", None]])
def test_what_broke_off_goes_on_where_it_was(server, faults):
    server.faults = list(faults)
    path, _ = fetch(f"{server.url}/file.txt")
    assert path.read_bytes() == TEXT
    begins = [int(r.removeprefix("bytes=").rstrip("-")) for _, r in server.asked if r]
    assert len(begins) == sum(f == "cut" for f in faults) + (429 in faults)
    assert begins == sorted(begins)
    assert all(0 < begin < len(TEXT) for begin in begins)


def test_a_file_that_changed_meanwhile_is_fetched_anew(server):
    server.faults = ["cut", *[503] * download.ATTEMPTS]
    with pytest.raises(InputError, match=r"answered 503.*goes on after the [\d,]+ bytes"):
        fetch(f"{server.url}/file.txt")
    server.files["/file.txt"], server.faults = TEXT[::-1], []
    assert fetch(f"{server.url}/file.txt")[0].read_bytes() == TEXT[::-1]


def test_without_a_tag_nothing_is_promised(server):
    server.tagged, server.faults = False, ["cut", *[503] * download.ATTEMPTS]
    with pytest.raises(InputError, match=r"run the same command again\.$"):
        fetch(f"{server.url}/file.txt")


@pytest.mark.parametrize("tagged", [True, False])
def test_a_file_is_fetched_again_if_asked(server, tagged):
    server.tagged = tagged
    path, _ = fetch(f"{server.url}/file.txt")
    # What is the same is not sent again, if the server says so.
    assert bool(fetch(f"{server.url}/file.txt", again=True)[1]) != tagged
    server.files["/file.txt"], server.faults = TEXT[::-1], [None, "cut", None] if tagged else []
    assert fetch(f"{server.url}/file.txt")[0].read_bytes() == TEXT
    for _ in range(2):
        assert fetch(f"{server.url}/file.txt", again=True)[0] == path
        assert path.read_bytes() == TEXT[::-1]
    # A copy that is no longer what came is not kept, whatever the server says of the file.
    path.write_bytes(b"damaged")
    assert fetch(f"{server.url}/file.txt", again=True)[0].read_bytes() == TEXT[::-1]
    known = f"{server.url}/file.txt#sha256={hashlib.sha256(TEXT[::-1]).hexdigest()}"
    asked = len(server.asked)
    assert fetch(known, again=True) == (path, [])
    assert len(server.asked) == asked


def test_a_file_that_nobody_knows_to_be_whole_is_fetched_anew_if_asked(server):
    server.faults = ["unsized"]
    assert fetch(f"{server.url}/file.txt")[0].read_bytes() == TEXT[: len(TEXT) // 2]
    assert fetch(f"{server.url}/file.txt", again=True)[0].read_bytes() == TEXT


def test_an_empty_file_is_not_kept(server):
    server.files["/file.txt"] = b""
    with pytest.raises(InputError, match=r"could not be fetched: the server sent an empty file\. Check"):
        fetch(f"{server.url}/file.txt")
    server.files["/file.txt"] = TEXT
    assert fetch(f"{server.url}/file.txt")[0].read_bytes() == TEXT


def test_without_an_answer_the_copy_is_used_and_that_is_said(server):
    path, _ = fetch(f"{server.url}/file.txt")
    notes, server.faults = [], [503] * download.ATTEMPTS
    assert fetch(f"{server.url}/file.txt", again=True, notes=notes) == (path, [])
    assert len(notes) == 1
    assert "answered 503" in notes[0]
    assert notes[0].endswith(f"the copy of it that was fetched before is used: {path}.")
    server.faults = [404]
    with pytest.raises(InputError, match="answered 404"):
        fetch(f"{server.url}/file.txt", again=True)
    assert path.read_bytes() == TEXT


def test_an_empty_source_is_not_the_current_folder():
    with pytest.raises(InputError, match="A source is empty"):
        download.local(["a.txt", ""], lambda *_: None)


def test_a_server_without_ranges(server):
    server.ranges, server.faults = False, ["cut", None]
    assert fetch(f"{server.url}/file.txt")[0].read_bytes() == TEXT


def test_a_partial_file_longer_than_the_file(server):
    server.faults = ["cut", *[503] * download.ATTEMPTS]
    with pytest.raises(InputError):
        fetch(f"{server.url}/file.txt")
    server.faults = [416, None]
    assert fetch(f"{server.url}/file.txt")[0].read_bytes() == TEXT


def test_the_content_is_compared_with_its_sum(server):
    right = hashlib.sha256(TEXT).hexdigest()
    path, _ = fetch(f"{server.url}/file.txt#sha256={right.upper()}")
    assert path.read_bytes() == TEXT
    with pytest.raises(InputError, match="another file than expected"):
        fetch(f"{server.url}/file.txt#sha256={'0' * 64}")
    assert not path.exists()
    with pytest.raises(InputError, match=r"may stand sha256= and 64 hex digits; got 'md5=1'"):
        fetch(f"{server.url}/file.txt#md5=1")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{url}/none.txt", r"none\.txt: the server answered 404 Not Found. Check the address"),
        ("{url}/file.zip", r"does not name a file that can be read: supported are \.txt"),
        ("{url}", "does not name a file"),
        ("http://127.0.0.1:1/x.txt", r"could not be fetched: .*refused.*run the same command again"),
        ("http://127.0.0.1:1/ü.txt?ö=ä", r"127\.0\.0\.1:1/%C3%BC\.txt\?%C3%B6=%C3%A4 could not be fetched: "),
        ("https://[bad/x.txt", r"https://\[bad/x\.txt is no address: .*IPv6.* Check it\."),
        ("https:///x.txt", "is no address: it names no server"),
        ("https://h:99999/x.txt", "is no address: Port out of range"),
        (f"https://{'ü' * 80}.org/x.txt", "is no address: .*too long"),
        ("hf:alone", "is no dataset: write hf:OWNER/NAME"),
    ],
)
def test_wrong_addresses(server, source, message):
    with pytest.raises(InputError, match=message):
        fetch(source.format(url=server.url))


def test_what_can_be_no_address_is_not_tried_again(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it was tried again"))
    with pytest.raises(InputError, match=r"https://no such host/x\.txt is no address: .*control characters"):
        fetch("https://no such host/x.txt")


def test_addresses_of_other_letters(server):
    """Encoded, unless they are already; the server's name in its own encoding."""
    server.files |= {"/%C3%BC%20b.txt": b"a text"}
    for name in ("ü b.txt", "%C3%BC%20b.txt", "ü%20b.txt?größe=1&b=%20#sha256="):
        source = f"{server.url}/{name}"
        path, _ = fetch(source + hashlib.sha256(b"a text").hexdigest() if source.endswith("=") else source)
        assert (path.name, path.read_bytes()) == ("ü_b.txt", b"a text")
    assert server.asked[-1][0] == "/%C3%BC%20b.txt?gr%C3%B6%C3%9Fe=1&b=%20"
    for host, wanted in {
        "bücher.example:80": "xn--bcher-kva.example:80",
        "ein@пример.рф:8080": "ein@xn--e1afmkfd.xn--p1ai:8080",
        "[::1]:80": "[::1]:80",
    }.items():
        assert download._address(f"https://{host}/") == f"https://{wanted}/"


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/x.txt"])
def test_unsafe_redirects_are_refused(server, place):
    server.faults = [place]
    with pytest.raises(InputError, match=r"redirects to .*not safe|answered 302"):
        fetch(f"{server.url}/file.txt")


def test_training_data_from_an_address(server, tmp_path):
    server.files["/a%20b.txt"] = b"Another text, which is short. " * 20
    report = prepare([f"{server.url}/file.txt", f"{server.url}/a%20b.txt"], tmp_path / "out", vocab_size=270)
    assert sum(report.bytes.values()) == len(TEXT) + 600


def test_a_file_with_bad_lines_can_be_fetched_again(server, tmp_path):
    server.files["/a.jsonl"] = b'{"text": "one two"}\n{"te'
    with pytest.raises(
        InputError, match=r"cache/downloads/\w+/a\.jsonl:2 is not JSON.* --overwrite .* asks for it again"
    ):
        prepare([f"{server.url}/a.jsonl"], tmp_path / "out", vocab_size=265)
    server.files["/a.jsonl"] = b'{"text": "one two"}\n{"text": "three"}'
    report = prepare([f"{server.url}/a.jsonl"], tmp_path / "out", vocab_size=265, overwrite=True)
    assert (sum(report.bytes.values()), report.notes) == (12, ())


class Hub(Files):
    """As much of a Hugging Face hub as a dataset's download needs."""

    def do_GET(self):
        self._answer(body=True)

    def do_HEAD(self):
        self._answer(body=False)

    def _answer(self, body):
        files, revision = self.server.files, "0123456789abcdef0123456789abcdef01234567"
        headers, cut = {"X-Repo-Commit": revision}, False
        if self.server.gone:
            headers["X-Error-Code"], status, content = "RepoNotFound", 404, b"{}"
        elif self.path.startswith("/api/datasets/some/texts/revision/nowhere"):
            headers["X-Error-Code"], status, content = "RevisionNotFound", 404, b"{}"
        elif self.path.startswith("/api/datasets/some/texts"):
            siblings = [
                {
                    "rfilename": name,
                    "size": len(data),
                    "blobId": "0",
                    "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1},
                }
                for name, data in files.items()
            ]
            content = json.dumps({"id": "some/texts", "sha": revision, "siblings": siblings}).encode()
            status = 200
        elif self.path.startswith(f"/datasets/some/texts/resolve/{revision}/"):
            self.server.asked.append((self.command, self.path.rpartition(f"{revision}/")[2]))
            content = files[self.path.rpartition(f"{revision}/")[2]]
            headers["ETag"], status = f'"{hashlib.sha256(content).hexdigest()}"', 200
            if self.server.damage and body:
                content = content[:-1] + b"?"
            self.close_connection = cut = self.server.cut and body
        else:
            headers["X-Error-Code"], status, content = "RepoNotFound", 404, b"{}"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content[:-9] if cut else content)


@pytest.fixture
def hub():
    server = serve(Hub)
    letters = random.Random(0)
    server.files = {
        name: " ".join(letters.choices(["one", "two", "three", "four", "five"], k=300)).encode()
        for name in ("README.md", "picture.png", "train/a.txt", "train/b.txt", "test/c.txt")
    }
    server.damage = server.cut = server.gone = False
    yield server
    server.shutdown()
    server.server_close()


def starlm(hub, tmp_path, *words):
    """The real command in a process of its own: the hub's address is read when its library is imported."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_OFFLINE", None)
    command = [
        sys.executable,
        "-m",
        "starlm",
        "data",
        "prepare",
        *words,
        "--out",
        "out",
        "--vocab-size",
        "270",
    ]
    return subprocess.run(
        [*command, "--json"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("hf:some/texts", ["test/c.txt", "train/a.txt", "train/b.txt"]),
        ("hf:some/texts@main/train", ["train/a.txt", "train/b.txt"]),
    ],
)
def test_a_dataset_of_the_hub(hub, tmp_path, source, names):
    done = starlm(hub, tmp_path, source)
    assert done.returncode == 0, done.stderr
    assert sum(json.loads(done.stdout)["bytes"].values()) == sum(len(hub.files[name]) for name in names)
    size = f"{sum(len(hub.files[name]) for name in names):,}"
    assert f"{download.STAGE}: {size}/{size} (100%)" in done.stderr
    assert sorted(name for method, name in hub.asked if method == "GET") == names
    # Again: from Hugging Face's cache, and the same folder.
    assert json.loads(starlm(hub, tmp_path, source).stdout)["reused"]
    assert sorted(name for method, name in hub.asked if method == "GET") == names


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:some/other", "hf:some/other could not be fetched: "),
        ("hf:some/texts@nowhere", "hf:some/texts@nowhere could not be fetched: "),
        ("hf:some/texts/none", "hf:some/texts/none has no file that can be read"),
        ("hf:some/..", "hf:some/.. could not be fetched: "),
    ],
)
def test_datasets_that_are_not_there(hub, tmp_path, source, message):
    done = starlm(hub, tmp_path, source)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached(tmp_path):
    done = starlm(SimpleNamespace(url="http://127.0.0.1:9"), tmp_path, "hf:some/texts")
    assert (done.returncode, done.stdout) == (2, "")
    assert "hf:some/texts could not be fetched: " in done.stderr
    assert "refused. Check the name and the network" in done.stderr


def test_a_dataset_that_was_fetched_needs_no_network(hub, tmp_path):
    assert starlm(hub, tmp_path, "hf:some/texts/train").returncode == 0
    nowhere = SimpleNamespace(url="http://127.0.0.1:9")
    done = starlm(nowhere, tmp_path, "hf:some/texts/train")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reused"]
    assert "hf:some/texts/train: nobody answered (" in done.stderr
    assert "so what was fetched before is used." in done.stderr
    # What is damaged counts as none.
    (record,) = (tmp_path / "cache" / "datasets").glob("*.json")
    whole = record.read_text()
    record.write_text("[")
    assert starlm(nowhere, tmp_path, "hf:some/texts/train").returncode == 2
    record.write_text(whole)
    # A part is not the whole, and a server that says no has answered.
    assert starlm(nowhere, tmp_path, "hf:some/texts").returncode == 2
    hub.gone = True
    assert "could not be fetched" in starlm(hub, tmp_path, "hf:some/texts/train").stderr
    for path in (tmp_path / "hf").rglob("a.txt"):
        path.unlink()
    assert starlm(nowhere, tmp_path, "hf:some/texts/train").returncode == 2


def test_a_dataset_that_breaks_off(hub, tmp_path):
    hub.cut = True
    done = starlm(hub, tmp_path, "hf:some/texts")
    assert (done.returncode, done.stdout) == (2, "")
    assert "hf:some/texts could not be fetched: " in done.stderr
    hub.cut = False
    assert starlm(hub, tmp_path, "hf:some/texts").returncode == 0


def test_a_damaged_dataset(hub, tmp_path):
    hub.damage = True
    done = starlm(hub, tmp_path, "hf:some/texts")
    assert done.returncode == 2
    assert "is damaged. Run the same command again." in done.stderr
    hub.damage = False
    assert starlm(hub, tmp_path, "hf:some/texts").returncode == 0


def test_files_of_a_dataset_are_documents(tmp_path):
    """Of one name in two folders."""
    paths = [tmp_path / folder / "x.txt" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(str(path.parent.name))
    assert [d.source for d in iter_documents(find_files(paths))] == ["x.txt", "x.txt~2"]
