"""What `import starlm` gives, and what it costs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import starlm


def test_all_is_sorted_and_complete():
    expected = {
        "DecodeState",
        "Deformer",
        "InputError",
        "StarLM",
        "StarLMConfig",
        "StarLMError",
        "__version__",
        "anchors",
        "deform",
        "load",
    }
    assert starlm.__all__ == sorted(expected)
    assert set(starlm.__all__) <= set(dir(starlm))


@pytest.mark.parametrize("name", starlm.__all__)
def test_every_name_is_there(name):
    assert getattr(starlm, name) is not None


def test_names_are_those_of_their_homes():
    from starlm.nn.deformer import Deformer
    from starlm.ops.deform import deform

    assert starlm.Deformer is Deformer
    assert starlm.deform is deform


def test_unknown_name():
    with pytest.raises(AttributeError, match="'starlm' has no attribute 'Deformr'"):
        starlm.Deformr  # noqa: B018


def test_import_is_light():
    code = (
        "import sys, starlm; starlm.StarLMConfig; "
        "print({'torch', 'numpy', 'transformers', 'triton', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_star_import_gives_all_names():
    code = "from starlm import *; import starlm; assert set(starlm.__all__) <= set(globals())"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_changelog_begins_with_this_version():
    changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = [
        name for name in re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE) if name != "Unreleased"
    ]
    assert versions[0] == starlm.__version__
