"""The report's page and its Markdown."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from starlm.errors import InputError
from starlm.report.metrics import read_run
from starlm.report.page import figures, scaled, write_report

VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps ids, tags and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_one_run(tmp_path, write_run):
    folder = write_run(tmp_path / "demo")
    path = write_report([folder])
    assert path == folder / "report.html"
    text = path.read_text()
    page = Page(text)
    for wanted in (
        *("complete: 60 steps", "5.24", "246", "bits per byte, validation", "Training loss", "Throughput"),
        *("seed", "Python", f"starlm train --config {folder}/run.toml --out {folder}-again"),
    ):
        assert wanted in page.text, wanted
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    assert len(page.ids) == len(set(page.ids)), "ids of one plot must not meet those of another"
    assert "prefers-color-scheme: dark" in text


def test_the_page_needs_nothing_else(tmp_path, write_run):
    text = write_report([write_run(tmp_path / "demo")]).read_text()
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    links = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)|@import", text)


def test_colours_follow_the_page(tmp_path, write_run):
    text = write_report([write_run(tmp_path / "demo")]).read_text()
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--ink" in svg
    assert "var(--series-0" in svg
    # Only what stands in var(--name, fallback) may be a fixed colour.
    assert re.findall(r"(?<!,)#[0-9a-f]{6}\b", re.sub(r'(href="|url\()#\S+', "", svg)) == []


def test_text_of_the_model_is_text(tmp_path, write_run):
    path = write_report([write_run(tmp_path / "demo")])
    text = path.read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    markdown = path.with_suffix(".md").read_text()
    # The sample has a fence of its own, so the one around it is longer.
    assert "````text\ndef ```\n<b>&\n\n````" in markdown


def test_no_byte_of_a_sample_is_a_control_character(tmp_path, write_run):
    sample = json.dumps({"kind": "sample", "step": 60, "prompt": "a\x1b", "text": "\0[2J\x9b\tb\n"})
    path = write_report([write_run(tmp_path / "demo", tail=f"{sample}\n")])
    for text in (path.read_text(), path.with_suffix(".md").read_text()):
        assert "\\x00[2J\\x9b\tb\n" in text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_comparison(tmp_path, write_run):
    runs = [
        write_run(tmp_path / "a", settings='keep = 2\n[model]\npreset = "gated"\n'),
        write_run(tmp_path / "b", settings='keep = 2\n[model]\npreset = "value|x"\n', steps=40),
    ]
    path = write_report(runs)
    assert path == tmp_path / "comparison.html"
    page = Page(path.read_text())
    assert "2 runs compared" in page.text
    markdown = path.with_suffix(".md").read_text()
    rows = [line for line in markdown.split("## Samples")[0].splitlines() if line.startswith("|")]
    assert "|  | a | b |" in rows
    assert "| model.preset | gated | value\\|x |" in rows
    assert not any("keep" in row for row in rows), "what is the same in all runs does not distinguish them"
    assert "var(--series-1" in path.read_text()


def test_what_follows_from_the_depth_is_compared_too(tmp_path, write_run):
    settings = "[model]\ndim = 0\ndepth = 4\n"
    runs = [
        write_run(tmp_path / "a", settings=settings, model={"dim": 256, "heads": 8}),
        write_run(tmp_path / "b", settings=settings.replace("4", "6"), model={"dim": 384, "heads": 12}),
        write_run(tmp_path / "older", settings=settings),
    ]
    markdown = write_report(runs).with_suffix(".md").read_text()
    assert "| model.dim | 256 | 384 | 0 |" in markdown
    null = write_run(tmp_path / "null", settings=settings, model=None)
    assert "| model.dim | 0 |" in write_report([null]).with_suffix(".md").read_text()
    odd = write_run(tmp_path / "odd", settings="model = 3\n", model={"dim": 64, "heads": 8})
    assert "| model | 3 |" in write_report([odd]).with_suffix(".md").read_text()
    assert "| model.heads | 8 | 12 | – |" in markdown


def test_runs_of_one_name_are_told_apart(tmp_path, write_run):
    runs = [write_run(tmp_path / folder / "demo") for folder in "ab"]
    markdown = write_report(runs, tmp_path / "x.html").with_suffix(".md").read_text()
    assert f"|  | {runs[0]} | {runs[1]} |" in markdown


def test_a_run_that_has_just_begun(tmp_path, write_run):
    folder = write_run(tmp_path / "a")
    first = (folder / "metrics.jsonl").read_text().splitlines()[0]
    (folder / "metrics.jsonl").write_text(first + "\n")
    (folder / "run.toml").unlink()
    page = Page(write_report([folder]).read_text())
    assert "not complete: step 0 of 60" in page.text
    assert not any(tag == "svg" for tag, _ in page.tags)


def test_losses_that_are_no_numbers(tmp_path, write_run):
    folder = write_run(tmp_path / "a")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r'"loss": [\d.]+', '"loss": NaN', text, count=9))
    text = write_report([folder]).read_text()
    assert sum(tag == "svg" for tag, _ in Page(text).tags) == 3


@pytest.mark.parametrize("loss", [0.0, 0.1, 3.0, 1e90])
def test_losses_that_are_all_the_same(tmp_path, write_run, loss):
    """A warning of matplotlib would fail this test."""
    folder = write_run(tmp_path / "a")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r'"loss": [\d.]+', f'"loss": {loss}', text))
    assert sum(tag == "svg" for tag, _ in Page(write_report([folder]).read_text()).tags) == 3


@pytest.mark.parametrize("steps", [1, 2, 5000])
def test_any_length(tmp_path, write_run, steps):
    path = write_report([write_run(tmp_path / "a", steps=steps)])
    assert path.stat().st_size < 200_000


def test_figures(tmp_path, write_run):
    found = {name: (value, unit) for value, unit, name in figures(read_run(write_run(tmp_path / "a")))}
    assert found["tokens trained on"] == ("246", "k")
    assert found["training time"] == ("60", "s")
    assert found["mean throughput"] == ("4,096", "tokens/s")
    assert found["training FLOPs"] == ("6.14", "T")
    assert "validation tokens" not in found


def test_a_report_says_on_how_much_was_validated(tmp_path, write_run):
    part = {"kind": "validation", "step": 60, "loss": 3.0, "bits_per_byte": 1.5, "tokens": 64}
    tail = json.dumps({**part, "split_tokens": 1234}) + "\n"
    found = figures(read_run(write_run(tmp_path / "a", tail=tail)))
    assert ("64", "of 1,234", "validation tokens") in found


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, ("0", "")), (999, ("999", "")), (4_194_304, ("4.19", "M")), (2e21, ("2e+03", "E"))],
)
def test_scaled(value, text):
    assert scaled(value) == text


def test_errors(tmp_path, write_run):
    with pytest.raises(InputError, match="at least one run"):
        write_report([])
    folder = write_run(tmp_path / "a")
    with pytest.raises(InputError, match=r"must end in \.html; got .*x\.pdf"):
        write_report([folder], tmp_path / "x.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write"):
        write_report([folder], tmp_path / "file" / "x.html")
    (tmp_path / "d.html").mkdir()
    with pytest.raises(InputError, match=r"Cannot write .*d\.html: a folder has that name"):
        write_report([folder], tmp_path / "d.html")


def test_markdown_that_is_no_report_is_not_written_over(tmp_path, write_run):
    folder, page = write_run(tmp_path / "a"), tmp_path / "README.html"
    page.with_suffix(".md").write_text("# Mine\n")
    with pytest.raises(
        InputError, match=r"README\.md, .* is there and no report\. Give the page another name"
    ):
        write_report([folder], page)
    assert page.with_suffix(".md").read_text() == "# Mine\n"
    assert not page.exists()
    page.with_suffix(".md").unlink()
    assert write_report([folder], page) == write_report([folder], page)


def test_reports_load_no_torch(tmp_path, write_run):
    folder = write_run(tmp_path / "a")
    code = (
        "import sys; from pathlib import Path; from starlm.report.page import write_report; "
        "write_report([Path(sys.argv[1])]); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


@pytest.mark.parametrize("name", ["_hidden", "$x$", "a$\\x$", "$$", "<b>&", "语言"])
def test_any_name_of_a_run_is_in_the_legends(tmp_path, write_run, name):
    """As it is: neither hidden, nor a formula, nor markup; and a font that lacks a letter says nothing."""
    text = write_report([write_run(tmp_path / name), write_run(tmp_path / "other")]).read_text()
    plots = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    assert [Page(plot).text.count(name) for plot in plots] == [1, 1, 1]


def test_a_run_with_several_horizons_says_that_its_command_makes_another(tmp_path, write_run):
    folder = write_run(tmp_path / "a", steps=20)
    more = write_run(tmp_path / "b", steps=60, start_step=20)
    lines = (folder / "metrics.jsonl").read_text() + (more / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines)
    for run, told in ((folder, True), (more, False)):
        page = write_report([run])
        for path in (page, page.with_suffix(".md")):
            assert ("were to end at 20, 60 steps" in path.read_text()) == told


def test_names_that_are_not_utf_8(tmp_path, write_run):
    """Of folders, and what a sample has of half a surrogate pair."""
    sample = '{"kind": "sample", "step": 60, "prompt": "a", "text": "\\ud83d"}\n'
    runs = [write_run(tmp_path / os.fsdecode(b"run\xff"), tail=sample), write_run(tmp_path / "b")]
    for page in (write_report(runs[:1]), write_report(runs)):
        for path in (page, page.with_suffix(".md")):
            text = path.read_text()
            assert "run\\udcff" in text
            assert "\\ud83d" in text
