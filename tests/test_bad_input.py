"""What a user may get wrong, through the command line: one paragraph, exit code 2, and nothing lost."""

import json
import os
import random
import resource
import shutil
import subprocess
from itertools import product
from types import SimpleNamespace

import pytest

from starlm.cli.main import main
from starlm.data.tokenizer import Tokenizer

SETTINGS = """
data = "data"
out = "run"
steps = 4
batch_tokens = 64
save_every = 2
eval_tokens = 64
sample_prompts = []
device = "cpu"
precision = "float32"

[model]
vocab_size = 300
depth = 1
dim = 64
heads = 2
# Attention, whose kernels need no seconds to load.
layers = "A"
context = 16
"""


def write_corpus(folder):
    source = random.Random(0)
    folder.mkdir()
    for number in range(6):
        words = ["".join(source.choices("abcdefgh", k=4)) for _ in range(200)]
        (folder / f"{number}.txt").write_text(" ".join(words))


@pytest.fixture(scope="session")
def _made(tmp_path_factory):
    """A folder with text, prepared data and a finished run."""
    home, here = tmp_path_factory.mktemp("made"), os.getcwd()
    os.chdir(home)
    try:
        write_corpus(home / "text")
        (home / "train.toml").write_text(SETTINGS)
        assert main(["data", "prepare", "text", "--vocab-size", "300", "--validation-fraction", "0.3"]) == 0
        assert main(["train", "--config", "train.toml"]) == 0
    finally:
        os.chdir(here)
    return home


@pytest.fixture
def home(_made, tmp_path, monkeypatch):
    """A copy of that folder; the test runs in it."""
    shutil.copytree(_made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(home, capsys):
    """Runs `starlm ARGS` and checks that it is refused in one paragraph that has these parts."""

    def run(*argv, parts, lost=lambda path: False, code=2):
        before = tree(home)
        got = main([str(word) for word in argv])
        said = capsys.readouterr().err
        assert got == code, said
        paragraph = said.splitlines()[-1]
        if not paragraph.startswith("error: "):
            # What the command line's parser found comes wrapped, in a box.
            paragraph = " ".join(said.translate(dict.fromkeys(map(ord, "│╭╮╰╯─|+-"))).split())
            assert paragraph.startswith("Value error")
        assert "Traceback" not in said
        assert "bug in StarLM" not in said
        for part in parts:
            assert part in paragraph, paragraph
        after = tree(home)
        assert {path: data for path, data in after.items() if not lost(path)} == {
            path: data for path, data in before.items() if not lost(path)
        }
        return paragraph

    return run


PREPARE = ["data", "prepare"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("missing.txt", None, ["no file or folder", "missing.txt", "Check the path"]),
        ("empty.txt", b"", ["no text in", "empty.txt", "Name other sources"]),
        ("binary.txt", bytes(range(256)), ["binary.txt", "byte offset 0", "NUL", "UTF-8"]),
        ("latin.txt", "né".encode("latin-1"), ["latin.txt", "byte offset 1", "0xe9", "UTF-8"]),
        ("picture.png", b"\x89PNG", ["picture.png", "supported are .txt", "Convert"]),
        ("broken.jsonl", b'{"text": "a"}\n{"text', ["broken.jsonl:2", "not JSON", "mend the line"]),
        ("broken.jsonl.gz", b"\x1f\x8b\x08", ["broken.jsonl.gz", "truncated", "download"]),
        ("broken.parquet", b"PAR1", ["broken.parquet", "not a readable Parquet", "download"]),
        ("one.txt", b"x", ["one.txt", "only document", "Name more sources"]),
    ],
)
def test_sources_that_cannot_be_read(home, refused, name, content, parts):
    if content is not None:
        (home / name).write_bytes(content)
    refused(*PREPARE, name, "--out", "new", parts=parts)
    # Nor does it harm what is there.
    refused(*PREPARE, name, "--overwrite", parts=parts)
    assert not (home / "new").exists()


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--vocab-size", "3"], ["vocab_size must be at least 265", "got 3"]),
        (["--validation-fraction", "1.5"], ["validation_fraction must be above 0 and below 1", "1.5"]),
        (["--tokenizer", "nowhere"], ["tokenizer", "nowhere", "Give a tokenizer.json"]),
        (["--tokenizer", "text/1.txt"], ["1.txt is not a tokenizer", "Copy the file again"]),
        (["--out", "text"], ["text holds something else", "Choose another --out"]),
        (["--out", "data"], ["data holds another preparation", "--overwrite"]),
    ],
)
def test_impossible_preparations(refused, argv, parts):
    refused(*PREPARE, "text", "--out", "new", *argv, parts=parts)


READERS = [
    ("train", "--config", "train.toml", "--steps", "5"),
    ("data", "stats", "--verify"),
    ("eval", "--model", "run", "--data", "data"),
]


@pytest.mark.parametrize("argv", READERS, ids=" ".join)
@pytest.mark.parametrize("name", ["train-00000.tokens.npy", "validation-00000.documents.npy", "meta.json"])
def test_truncated_data(home, refused, argv, name):
    path = home / "data" / name
    path.write_bytes(path.read_bytes()[:-7])
    refused(*argv, parts=["The prepared data cannot be used", name, "starlm data prepare", "--overwrite"])


def test_corrupt_data(home, refused):
    path = home / "data" / "train-00000.tokens.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(content)
    refused(*READERS[1], parts=["train-00000.tokens.npy", "does not match its SHA-256", "--overwrite"])


def test_data_that_were_prepared_again_hold_nothing_out(home, refused, capsys):
    again = ["--tokenizer", "run", "--validation-fraction", "0.9", "--overwrite"]
    assert main([*PREPARE, "text", *again]) == 0
    argv = ("eval", "--model", "run", "--device", "cpu")
    refused(*argv, parts=["data holds other data than run was trained on", "name them with --data"])
    assert main([*argv, "--data", "data"]) == 0


def test_training_goes_on_from_another_folder(home, capsys, monkeypatch):
    (home / "sub").mkdir()
    monkeypatch.chdir(home / "sub")
    for steps, argv in enumerate((["--out", "../run"], ["--config", "../run/run.toml"]), 5):
        assert main(["train", *argv, "--steps", str(steps)]) == 0
        assert f"going on at step {steps - 1}" in capsys.readouterr().out
    assert os.listdir(home / "sub") == []
    monkeypatch.chdir(home)
    assert main(["eval", "--model", "run"]) == 0
    assert main(["train", "--out", "run", "--steps", "7"]) == 0
    assert main(["train", "--config", "run/run.toml", "--out", "new", "--steps", "1"]) == 0
    assert (home / "new/checkpoints/step-000001").is_dir()


@pytest.mark.parametrize("argv", READERS, ids=" ".join)
def test_missing_data(home, refused, argv):
    shutil.rmtree(home / "data")
    refused(*argv, parts=["data"])


USERS = [
    ("generate", "--model", "run", "--prompt", "a", "--device", "cpu"),
    ("eval", "--model", "run", "--device", "cpu"),
    ("train", "--config", "train.toml", "--steps", "5"),
]


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        *product(USERS, ["model.safetensors", "config.json", "tokenizer.json"]),
        (USERS[-1], "optimizer.safetensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
@pytest.mark.parametrize("damage", ["truncated", "corrupt", "missing"])
def test_damaged_checkpoints(home, refused, argv, name, damage):
    path = home / "run" / "checkpoints" / "step-000004" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.unlink()
    if damage != "missing":
        path.write_bytes(content if damage == "corrupt" else content[:-9])
    cure = "delete this folder to go on from an earlier one"
    refused(*argv, parts=["step-000004 cannot be used", name, cure])


def test_the_cure_for_a_damaged_checkpoint_works(home, refused, capsys):
    before = (home / "run" / "checkpoints" / "step-000004" / "model.safetensors").read_bytes()
    shutil.rmtree(home / "run" / "checkpoints" / "step-000004")
    assert main(["train", "--config", "train.toml"]) == 0
    assert "going on at step 2" in capsys.readouterr().out
    assert (home / "run" / "checkpoints" / "step-000004" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_a_model_that_is_not_there(home, refused, verb):
    (home / "hollow").mkdir()
    prompt = ["--prompt", "a"] if verb == "generate" else ["--data", "data"]
    refused(
        verb,
        "--model",
        "nowhere",
        *prompt,
        parts=["no model at nowhere", "Give a run folder", "starlm demo makes one"],
    )
    refused(verb, "--model", "hollow", *prompt, parts=["hollow holds no checkpoint", "starlm train"])


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("steps = 4", "stepz = 4", ["Unknown key 'stepz'", "bad.toml", "Did you mean 'steps'?"]),
        ("dim = 64", "dims = 64", ["Unknown key 'model.dims'", "Did you mean 'dim'?"]),
        ("steps = 4", 'steps = "four"', ["steps in bad.toml must be of type int", "'four'"]),
        ("steps = 4", "steps = -4", ["steps must be above 0", "got -4"]),
        ("steps = 4", "steps = 4\ntokens = 100", ["Give the horizon once", "Keep one of them"]),
        ("batch_tokens = 64", "batch_tokens = 65", ["batch_tokens must be a multiple of model.context (16)"]),
        ("heads = 2", "heads = 3", ["model.heads must divide the width", "divisors of 64"]),
        (
            'layers = "A"',
            'layers = "ABC"',
            ["model.layers must be", "D (Deformer), A (attention)"],
        ),
        ("context = 16", "context = 0", ["model.context must be at least 1", "got 0"]),
        ('"float32"', '"float8"', ["precision in bad.toml must be one of", "'float8'"]),
        ("steps = 4", "steps = ", ["bad.toml is not valid TOML"]),
    ],
)
def test_configs_that_cannot_be(home, refused, old, new, parts):
    (home / "bad.toml").write_text(SETTINGS.replace(old, new))
    refused("train", "--config", "bad.toml", "--out", "new", parts=parts)
    refused("train", "--config", "bad.toml", "--out", "new", "--dry-run", parts=parts)
    assert not (home / "new").exists()


def test_a_config_that_is_not_there(refused):
    refused("train", "--config", "nowhere.toml", parts=["Cannot read", "nowhere.toml", "Check the path"])


def test_vocabularies_that_do_not_fit(home, refused):
    (home / "other.toml").write_text(SETTINGS.replace("vocab_size = 300", "vocab_size = 400"))
    refused(
        *("train", "--config", "other.toml", "--out", "new"),
        parts=["vocabulary of 300", "model one of 400", "Set model.vocab_size to 300"],
    )
    assert not (home / "new").exists()
    checkpoint = home / "run" / "checkpoints" / "step-000004"
    (checkpoint / "manifest.json").unlink()
    Tokenizer.train(["ab"], 265).save(checkpoint)
    for argv in USERS[:2]:
        refused(*argv, parts=["tokenizer has 265 tokens, the model 300", "tokenizer.json"])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--seed", "1"], ["run holds a run with other settings", "seed was 0, is 1", "another --out"]),
        (["--steps", "3"], ["at step 4 already", "another --out"]),
        (["--out", "text"], ["text is not empty and holds no run", "another --out"]),
        (["--out", "text/1.txt"], ["text/1.txt is a file", "another --out, a folder"]),
        (["--out", "runs/\udcff"], ["out must be a name in UTF-8"]),
        (["--optim.matrix-lr", "1e38"], ["optim.matrix_lr must be between 0 and", "got 1e38"]),
        (["--out", "/dev/full"], ["/dev/full is a file", "another --out, a folder"]),
        (["--out", "text/1.txt/x"], ["Cannot write text/1.txt/x", "Not a directory", "Choose a folder"]),
    ],
)
def test_a_run_that_cannot_go_on(refused, change, parts):
    refused("train", "--config", "train.toml", *change, parts=parts)


def test_a_prompt_longer_than_the_memory(home, refused, monkeypatch):
    parts = ["tokens) need about", "MiB of memory", "Shorten the prompt", "max_shift"]
    refused(*USERS[0], "--max-tokens", 10**13, parts=parts)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**6))
    (home / "long.txt").write_text("abcd " * 50_000)
    refused("generate", "--model", "run", "--prompt-file", "long.txt", "--device", "cpu", parts=parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["prompt.txt", "No such file", "Check the path"]),
        (b"\xff", ["prompt.txt is not UTF-8", "byte 0"]),
    ],
)
def test_prompts_that_cannot_be_read(home, refused, content, parts):
    if content is not None:
        (home / "prompt.txt").write_bytes(content)
    refused("generate", "--model", "run", "--prompt-file", "prompt.txt", "--device", "cpu", parts=parts)


@pytest.fixture(params=["disk", "quota"])
def no_room(request, home):
    """Puts a folder of `home` where next to nothing more can be written; returns how to make room again.

    On a full disk of its own if we may mount one, else (and in any case) by a limit to the size of files.
    """
    undo = []

    def limit():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def fill(folder):
        aside = home / "aside"
        folder.rename(aside)
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
        if request.param == "quota" or subprocess.run(mount, capture_output=True).returncode:
            folder.rmdir()
            aside.rename(folder)
            undo.append(limit())
            return undo[-1]
        undo.append(lambda: subprocess.run(["umount", str(folder)], check=True))
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        shutil.rmtree(aside)
        filler = folder / ".filler"
        free = shutil.disk_usage(folder).free
        filler.write_bytes(bytes(free - 40_000))
        return filler.unlink

    yield fill
    for step in reversed(undo):
        step()


FULL = [
    "could not be written",
    "What was there before is untouched",
    "Free some space or choose another folder",
]


def test_no_room_for_data(home, refused, no_room):
    (home / "place").mkdir()
    (home / "data").rename(home / "place" / "data")
    for number in range(6, 30):
        (home / "text" / f"{number}.txt").write_text("abcd efgh " * 1000)
    make_room = no_room(home / "place")
    refused(*PREPARE, "text", "--out", "place/data", "--overwrite", "--vocab-size", 300, parts=FULL, code=1)
    refused(*PREPARE, "text", "--out", "place/new", "--vocab-size", 300, parts=FULL, code=1)
    assert sorted(os.listdir(home / "place")) in (["data"], [".filler", "data"])
    make_room()
    assert main([*PREPARE, "text", "--out", "place/data", "--overwrite", "--vocab-size", "300"]) == 0


def test_no_room_for_a_checkpoint(home, refused, no_room, capsys):
    make_room = no_room(home / "run")
    # What was measured in the meantime may be told; the run itself is as it was.
    told = ("metrics.jsonl", "run.toml")
    refused(*USERS[2], parts=FULL, code=1, lost=lambda path: path.name in told)
    records = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"][:4] == [1, 2, 3, 4]
    make_room()
    capsys.readouterr()
    assert main(list(USERS[2])) == 0
    assert "going on at step 4" in capsys.readouterr().out
    assert (home / "run" / "checkpoints" / "step-000005").is_dir()
