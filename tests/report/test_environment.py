"""What a report says about the software that wrote it."""

import subprocess

from starlm.report import environment


def test_the_commit_is_that_of_starlm_alone(tmp_path):
    """Not that of a project in whose repository it happens to be installed."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    assert environment.commit(tmp_path).startswith("at ")
    inner = tmp_path / "venv/lib/site-packages"
    inner.mkdir(parents=True)
    assert environment.commit(inner) == ""
