"""The page and the picture of a text's reads."""

import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from matplotlib.image import imread

from starlm.errors import InputError
from starlm.report.inspect import about, bin_names, series, short, write_page
from starlm.report.reads_plot import chosen_columns, gather, write_picture

REACH = {"histogram": (0.25, 0.5, 0.25), "median": 1, "p90": 2, "max": 2, "nothing": 0.0}
NONE = {"histogram": (), "median": 0, "p90": 0, "max": 0, "nothing": 1.0}
HOSTILE = "</script><b>&"


def data(**changes):
    """Two Deformer layers and one of attention, four heads each, on 12 tokens of which 4 are drawn."""
    heads = [
        {"layer": layer, "head": head, "kind": kind, "stream": "value", **of_kind}
        for layer in (0, 2)
        for head, (kind, of_kind) in enumerate(
            {
                "now": {
                    "reach": REACH,
                    "origins": (8, 9, 10, 11),
                    "rows": ((), (), (), ((9, 0.25), (11, 0.75))),
                },
                "token": {"reach": REACH, "origins": (1, -1, -1, 3), "rows": ((), (), (), ((3, 1.0),))},
                "4-gram": {"reach": NONE, "origins": (-1,) * 4, "rows": ((),) * 4},
                "box": {
                    "reach": REACH,
                    "origins": (8, 9, 10, 11),
                    "rows": ((), (), (), ((2, 0.5), (10, 0.5))),
                },
            }.items()
        )
    ]
    groups = [{"heads": 1, **{k: head[k] for k in ("layer", "kind", "reach")}} for head in heads[:8]]
    texts = {row: f"w{row}" for row in (2, 3, 8, 9, 10)} | {11: HOSTILE}
    return {
        **{"title": HOSTILE, "num_tokens": 12, "begin": 8, "end": 12, "texts": texts, "bins": (0, 1, 2)},
        **{"layers": ("deformer", "attention", "deformer"), "groups": groups, "heads": heads},
        **changes,
    }


class Page(HTMLParser):
    """Text and tags of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(tmp_path):
    return write_page(data(), tmp_path / "new" / "a.html", token=11).read_text()


def test_what_the_page_says(page):
    said = re.sub(r"\s+", " ", Page(page).text)
    for wanted in (
        *("4 of 12 tokens are shown", "attention: it mixes by weights", "layer 3", "nothing to read: 100 %"),
        *("median 1, 90 % ≤ 2, max 2", "2 of 3", "4-gram", "less than 1 %"),
    ):
        assert wanted in said, wanted


def test_the_data_come_back(page):
    """As JSON that no token can break out of."""
    assert page.count("</script>") == 2
    found = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert found["texts"]["11"] == HOSTILE
    assert found["token"] == 11
    assert found["heads"] == json.loads(json.dumps(data()["heads"]))


def test_the_page_needs_nothing_else(page):
    tags = Page(page).tags
    assert not [tag for tag, a in tags if tag in ("link", "img", "iframe") or "src" in a]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert "prefers-color-scheme: dark" in page


def test_what_is_not_seen_is_named(page):
    """Regions that scroll can be reached by keyboard, pictures and controls have names."""
    for tag, attributes in Page(page).tags:
        if attributes.get("role") in ("region", "listbox", "img"):
            assert attributes["aria-label"]
        if "scroll" in attributes.get("class", "").split():
            assert attributes["tabindex"] == "0"
        if tag == "input":
            assert attributes["value"]
    assert 'aria-label="layer 1, now heads: median 1, 90 % within 2, furthest 2 tokens"' in page


def test_a_model_without_deformer(tmp_path):
    text = write_page(
        data(layers=("attention",), groups=[], heads=[], bins=()), tmp_path / "a.html", token=11
    ).read_text()
    assert "No layer of this model is a Deformer" in text
    assert "<script" not in text


def test_picture(tmp_path):
    pixels = imread(write_picture(data(), tmp_path / "new" / "a.png", token=11))
    assert pixels.shape[1] == 1800
    assert pixels.std() > 0.05
    small = write_picture(
        data(layers=("attention",), groups=[], heads=[], bins=()), tmp_path / "b.png", token=11
    )
    assert imread(small).shape[0] < pixels.shape[0]


def test_any_text_can_be_drawn(tmp_path):
    """Neither a formula, nor a reason for warnings of letters that the font lacks."""
    some = data() | {"title": "a$\\x$"}
    some["texts"] = dict(zip(some["texts"], itertools.cycle(["$$", "$\\x$", "语", "🙂"])))
    assert imread(write_picture(some, tmp_path / "a.png", token=11)).std() > 0.05


def test_gather():
    rows, anchors = gather(data()["heads"], 3)
    assert rows["now"] == {9: 0.25, 11: 0.75}
    assert rows["4-gram"] == {}
    assert anchors == {"token": {3}}


def test_columns_have_what_is_read_most():
    rows = {"now": {99: 0.5, 100: 0.5}, "token": {row: row / 1000 for row in range(10, 60)}, "box": {0: 1.0}}
    columns = chosen_columns(100, rows, {"token": {40}})
    assert {92, 100, 38, 42, 59} <= set(columns)
    assert 10 not in columns
    assert len(columns) <= 33
    assert columns == sorted(columns)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for write in (write_page, write_picture):
        with pytest.raises(InputError, match="Cannot write"):
            write(data(), tmp_path / "file" / "a", token=11)
        with pytest.raises(InputError, match="a folder has that name"):
            write(data(), tmp_path, token=11)


def test_words():
    assert bin_names([0, 1, 2, 4, 8, 16384]) == ["0", "1", "2", "3–4", "5–8", "9–16.4k"]
    assert [short(n) for n in (0, 9999, 65536, 2**20)] == ["0", "9999", "65.5k", "1.05M"]
    assert about("7-gram") == "reads around the row behind the last occurrence of the last 7 tokens"
    assert series("7-gram") == series("longest") != series("box")
