"""The HTML pages: nothing of them comes from elsewhere, nothing in them runs, everything in them is escaped."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from compare_helpers import made_pairs, write_run

from alignzoo.compare import compare
from alignzoo.comparepage import html
from alignzoo.pages import Table, page, visible
from alignzoo.readrun import read_finished
from alignzoo.records import Sample
from alignzoo.report import finish, summary
from alignzoo.rundir import RunDir
from alignzoo.runpage import run_page

EVIL = '<script>alert(1)</script><img src="https://evil.example/x.png" onerror="alert(2)">'
TURNED = "a\u202eb\x1b[31m\x00"


class Parsed(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_harmless(text: str) -> Parsed:
    """Well nested; no script, no handler, no address that a browser would load."""
    parsed = Parsed(text)
    assert parsed.open == []
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form", "svg")
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "srcset", "action")]
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/svg+xml;base64,") and attributes["alt"]
    policy = next(a["content"] for tag, a in parsed.tags if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    return parsed


def plots_in(parsed: Parsed) -> list[str]:
    return [base64.b64decode(str(a["src"]).partition(",")[2]).decode() for tag, a in parsed.tags if tag == "img"]


def evil_run(folder: Path, loss: str = "dpo") -> Path:
    trees, sums = made_pairs(40, 1.0)
    return write_run(
        folder, trees, sums, loss=loss, samples=[(f"who? {EVIL}", f"before {EVIL}", f"after {EVIL} {TURNED}")],
        said=["loss: dpo", f"WARNING: odd {EVIL}"], settings={"data": {"system": EVIL}},
        manifest={"command": ["alignzoo", EVIL], "live": [EVIL]}, summary={"recipe": EVIL, "paper": EVIL},
    )  # fmt: skip


def test_the_page_of_a_run(tmp_path: Path) -> None:
    parsed = assert_harmless(run_page(read_finished(evil_run(tmp_path / "run")), f"dpo {EVIL}", [("figure", EVIL)]))
    assert parsed.text.count("<script>alert(1)</script>") > 10
    assert "after " + EVIL + r" a\u202eb\x1b[31m\x00" in parsed.text
    for part in ("Verdict", "Warnings", "Curves", "Held-out metrics", "Answers", "Cost", "Settings", "made from"):
        assert part in parsed.text, part
    (plot,) = plots_in(parsed)
    assert "<script" not in plot and not re.search(r'(?:xlink:)?href="(?!#)|<image|@import', plot)


def test_the_page_of_a_comparison(tmp_path: Path) -> None:
    runs = [read_finished(evil_run(tmp_path / loss, loss)) for loss in ("dpo", "ipo")]
    parsed = assert_harmless(html(compare(runs), f"dpo, ipo {EVIL}", [f"failed: {EVIL}"]))
    assert f"odd {EVIL} (dpo, ipo)" in parsed.text and f"failed: {EVIL}" in parsed.text
    for part in (
        "Read this first", "Verdict", "Held-out results", "Differences from dpo", "Curves", "own scale",
        "Answers side by side", "Cost", "Settings that differ", "Warnings", "Runs",
    ):  # fmt: skip
        assert part in parsed.text, part
    plots = plots_in(parsed)
    assert len(plots) == 2
    for plot in plots:
        assert "<script" not in plot and not re.search(r'(?:xlink:)?href="(?!#)|<image|@import', plot)


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = read_finished(evil_run(tmp_path / "run"))
    assert run_page(run, "a", []) == run_page(run, "a", [])


def test_finish_writes_the_page_of_a_run_with_nothing_but_metrics(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "bare")
    records = [{"step": 1, "epoch": 1.0, "loss": 0.5, "memory": 0.25}]
    for record in records:
        run.append_metrics(record)
    finish(run, records, [Sample("p", "b", "a")], summary(records, eval_rows=0, model_path="m", seconds=3.0))
    text = assert_harmless((run.path / "report.html").read_text(encoding="utf-8")).text
    assert "There are no held-out rows." in text and "0:00:03" in text and "0.25" in text


def test_settings_that_are_not_the_default_are_marked(tmp_path: Path) -> None:
    trees, sums = made_pairs(3, 1.0)
    settings = {"train": {"learning_rate": 0.1, "batch_size": 16, "epochs": 3}}
    text = run_page(read_finished(write_run(tmp_path / "run", trees, sums, settings=settings)), "t", [])
    own, everything = text.split("<h2>Settings</h2>")[1].split("All settings")
    assert "train.epochs" in own and "train.batch_size" not in own
    assert '<tr class="marked"><th scope="row">train.epochs' in everything
    assert '<tr><th scope="row">train.batch_size' in everything


def test_a_template_that_asks_for_what_is_not_given_fails() -> None:
    with pytest.raises(Exception, match="is undefined"):
        page("run.html", title="t")


def test_what_cannot_be_seen_is_shown() -> None:
    assert visible(TURNED) == r"a\u202eb\x1b[31m\x00" and visible("") == "(empty)" and visible("ä\n\tß") == "ä\n\tß"
    assert Table(("a",), [("b",)]).marked == frozenset()
