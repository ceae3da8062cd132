"""A small prepared folder."""

import shutil

import pytest

from starlm.data.prepare import prepare


@pytest.fixture(scope="session")
def _prepared_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    (root / "text").mkdir()
    for number in range(12):
        (root / "text" / f"{number:02}.txt").write_text(f"Text {number}: " + "abc déf\n" * (1 + 5 * number))
    prepare([root / "text"], root / "data", vocab_size=270, validation_fraction=0.3, shard_tokens=200)
    return root


@pytest.fixture
def corpus(_prepared_once, tmp_path):
    """A folder with `text`, twelve files, and `data`, which was prepared from them; its own for each test."""
    return shutil.copytree(_prepared_once, tmp_path / "corpus")
