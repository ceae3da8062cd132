import errno
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from starlm.errors import InputError, StarLMError
from starlm.files import check_place, only_writer, readable_os_errors, settle, whole_folder, write_whole

# A process number above what any system gives out.
DEAD = 2**22 + 1


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def fill(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def replace(path, before_the_end):
    with whole_folder(path) as folder:
        fill(folder, new="2")
        before_the_end()


def fail(error):
    raise error


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_pipe_is_written_into(tmp_path):
    """As /dev/stdout and /dev/null are, which root could replace."""
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"whole")
    reader.join()
    assert got == [b"whole"]
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_of_a_link_the_file_behind_it_is_replaced(tmp_path):
    (tmp_path / "page").write_text("old")
    (tmp_path / "link").symlink_to("page")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "page").read_bytes() == b"new"


def test_a_folder_appears_whole(tmp_path):
    with whole_folder(tmp_path / "a" / "b") as folder:
        fill(folder, x="1")
        fill(folder / "deep", y="2")
        assert not (tmp_path / "a" / "b").exists()
    assert tree(tmp_path) == {
        "a": None,
        "a/b": None,
        "a/b/deep": None,
        "a/b/deep/y": b"2",
        "a/b/x": b"1",
    }


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    fill(tmp_path / "a", old="1")
    with whole_folder(tmp_path / "a") as folder:
        fill(folder, new="2")
    assert tree(tmp_path) == {"a": None, "a/new": b"2"}


@pytest.mark.parametrize("before", [{}, {"a": None, "a/old": b"1"}])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, before, error):
    if before:
        fill(tmp_path / "a", old="1")
    with pytest.raises(error):
        replace(tmp_path / "a", partial(fail, error))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["os.fsync", "pathlib.Path.rename"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, name):
    fill(tmp_path / "a", old="1")
    with pytest.raises(StarLMError, match=r"The disk is full: .*a could not be written.* Free some space"):
        replace(tmp_path / "a", lambda: monkeypatch.setattr(name, full))
    monkeypatch.undo()
    assert tree(tmp_path) == {"a": None, "a/old": b"1"}


def test_a_failure_of_the_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    fill(tmp_path / "a", old="1")
    rename = Path.rename

    def only_aside(self, target):
        return full() if ".partial-" in self.name else rename(self, target)

    monkeypatch.setattr(Path, "rename", only_aside)
    with pytest.raises(StarLMError, match="disk is full"), whole_folder(tmp_path / "a") as folder:
        fill(folder, new="2")
    assert tree(tmp_path) == {"a": None, "a/old": b"1"}


KILLED = """
import os, sys
from pathlib import Path
import psutil
from starlm.files import whole_folder

left, calls = int(sys.argv[2]), 0

def watch(event, args):
    global calls
    if event in ("os.mkdir", "os.rename", "os.rmdir", "os.remove", "open"):
        calls += 1
        if calls > left:
            os.kill(os.getpid(), 9)

path = Path(sys.argv[1])
sys.addaudithook(watch)
with whole_folder(path) as folder:
    for name in ("x", "y"):
        (folder / name).write_text("new")
print(calls)
"""


def test_a_kill_before_any_call_of_the_system_leaves_the_old_or_the_new_folder(tmp_path):
    """Killed before its first, second, ... call that opens, makes, renames or removes anything."""
    old = {"x": b"old", "z": b"old"}
    new = {"x": b"new", "y": b"new"}
    seen, missing, done = [], 0, False
    for left in range(400):
        path = tmp_path / str(left) / "a"
        fill(path, x="old", z="old")
        child = subprocess.run([sys.executable, "-c", KILLED, str(path), str(left)], capture_output=True)
        missing += not path.exists()
        settle(path)
        assert [p.name for p in path.parent.iterdir()] == ["a"]
        seen.append(tree(path))
        if child.returncode == 0:
            done = True
            break
        assert child.returncode == -9, child.stderr
    assert done
    assert missing == 1
    changes = seen.index(new)
    assert changes > 5
    assert seen == [old] * changes + [new] * (len(seen) - changes)


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path):
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        fill(tmp_path / f".a[b].partial-{DEAD}", x="1")
        fill(tmp_path / f".a[b].partial-{living.pid}", x="1")
        fill(tmp_path / f".a[b].partial-{os.getpid()}", x="an earlier process had this number")
        fill(tmp_path / f".ab.partial-{DEAD}", x="another folder's")
        (tmp_path / f".a[b].old-{DEAD}").write_text("a file")
        with whole_folder(tmp_path / "a[b]") as folder:
            fill(folder, new="2")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            [f".a[b].partial-{living.pid}", f".ab.partial-{DEAD}", "a[b]"]
        )
    finally:
        living.communicate()


def test_what_was_moved_aside_comes_back(tmp_path):
    fill(tmp_path / f".a.old-{DEAD}", x="1")
    fill(tmp_path / f".a.partial-{DEAD}", x="2")
    settle(tmp_path / "a")
    assert tree(tmp_path) == {"a": None, "a/x": b"1"}
    settle(tmp_path / "nowhere" / "a")


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "a"
    (tmp_path / f".a.partial-{DEAD}").write_text("left over")
    write_whole(path, b"1")
    write_whole(path, b"2")
    assert tree(tmp_path) == {"a": b"2"}
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StarLMError, match="disk is full"):
        write_whole(path, b"3")
    assert tree(tmp_path) == {"a": b"2"}


@pytest.mark.parametrize(
    ("number", "parts"),
    [
        (errno.ENOSPC, ["The disk is full: here", "untouched", "Free some space"]),
        (errno.EDQUOT, ["The disk quota is used up: here", "Free some space"]),
        (errno.EFBIG, ["ulimit -f", "here", "choose another folder"]),
        (errno.EACCES, ["Cannot write here: Permission denied", "Choose a folder"]),
        (errno.EROFS, ["Cannot write here: Read-only", "Choose a folder"]),
        (errno.EBUSY, ["Cannot write here", "mount point", "folder within it"]),
        (errno.EISDIR, ["Cannot write here", "a folder has that name", "another name"]),
    ],
)
def test_errors_of_the_system_are_explained(number, parts):
    with pytest.raises(StarLMError) as caught, readable_os_errors(Path("here")):
        raise OSError(number, os.strerror(number))
    # A full disk is nobody's bad input.
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    assert caught.value.exit_code == (1 if full else 2)
    for part in parts:
        assert part in str(caught.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(OSError, match="Input/output error"), readable_os_errors(Path("here")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "a").write_text("x")
    with (
        pytest.raises(InputError, match=r"Cannot write .*Choose a folder"),
        whole_folder(tmp_path / "a" / "b"),
    ):
        pass


def test_a_folder_in_the_way_of_a_file_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match=r"Cannot write .*a: a folder has that name"):
        write_whole(tmp_path / "a", b"1")
    assert tree(tmp_path) == {"a": None}


@pytest.mark.parametrize("place", ["a", "new/b", "file/b/c", "locked/b"])
def test_a_place_is_looked_at_before_the_work(tmp_path, monkeypatch, place):
    fill(tmp_path, file="x")
    (tmp_path / "locked").mkdir()
    # The tests may run as root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "locked")
    before = tree(tmp_path)
    if "new" in place or "/" not in place:
        check_place(tmp_path / place)
    else:
        with pytest.raises(InputError, match=rf"Cannot write .*{place}: "):
            check_place(tmp_path / place)
    assert tree(tmp_path) == before


def test_where_a_file_system_has_no_locks_work_goes_on(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr("fcntl.flock", missing)
    # filelock then takes the existence of the file for the lock, and says so.
    with pytest.warns(UserWarning, match="flock not supported"), only_writer(tmp_path / "run"):
        (tmp_path / "run" / "made").touch()
    assert (tmp_path / "run" / "made").exists()


def test_a_folder_that_vanished_or_was_filled_hides_no_error(tmp_path, monkeypatch):
    def work(last):
        with only_writer(tmp_path / "run"):
            last()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        work(lambda: shutil.rmtree(tmp_path / "run"))
    # Something appears between the last look and the removal.
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [listed(path), (path / "new").touch()][0])
    with pytest.raises(KeyError, match="mine"):
        work(lambda: None)
    assert (tmp_path / "run" / "new").exists()


def test_a_folder_in_which_nothing_was_made_is_not_left_behind(tmp_path):
    with only_writer(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
