"""`alignzoo data lint` on data with planted faults: each is found where it was put, and clean data is left alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import REPO

from alignzoo.cli import cli
from alignzoo.data import language

DEMO = REPO.parent / "shared/data/llamafactory"
WORDS = "river stone window market garden letter evening travel music winter bridge copper lantern silver meadow port"


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS.split(), words)) + f" {rng.integers(10**6)}."


def clean(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs without a fault: random words, both sides about as long."""
    rng = np.random.default_rng(seed)
    return [{"prompt": sentence(rng, 8), "chosen": sentence(rng, 30), "rejected": sentence(rng, 30)} for _ in range(n)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def lint(*words: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """The findings by identifier. code: the exit code that is wanted."""
    result = CliRunner().invoke(cli, ["data", "lint", "--json", *map(str, words)])
    assert result.exit_code == code, result.output
    return {finding["id"]: finding for finding in json.loads(result.stdout)["findings"]}


def lines(finding: dict[str, Any]) -> list[int]:
    """The numbers of the rows that are named."""
    return sorted(int(re.findall(r"\d+$", row["where"])[0]) for row in finding["rows"])


def test_clean_pairs_have_notes_only(tmp_path: Path) -> None:
    found = lint(write(tmp_path / "a.jsonl", clean(200)), "--eval", write(tmp_path / "b.jsonl", clean(60, seed=1)))
    assert {finding["severity"] for finding in found.values()} <= {"note"}
    assert set(found) <= {"lengths", "languages"}


def test_copies(tmp_path: Path) -> None:
    rows = clean(50)
    rows[10] = dict(rows[3])  # in every word
    rows[20] = {**rows[4], "chosen": rows[4]["chosen"].replace("1", "2").replace("river", "RIVER  ") + " and"}  # nearly
    rows[30]["prompt"] = rows[5]["prompt"].upper()  # one prompt doubled, with another answer
    found = lint(write(tmp_path / "a.jsonl", rows))
    for rule, row, of in (("duplicate", 11, 4), ("near-duplicate", 21, 5), ("repeated-prompt", 31, 6)):
        assert lines(found[rule]) == [row], rule
        assert f"a.jsonl:{of}" in found[rule]["rows"][0]["detail"]
    assert found["duplicate"]["severity"] == "warning" and found["duplicate"]["share"] == 1 / 50
    assert found["duplicate"]["rows"][0]["texts"]["prompt"] == rows[3]["prompt"]
    assert lint(tmp_path / "a.jsonl", "--minor", "0.1")["duplicate"]["severity"] == "note"
    lint(tmp_path / "a.jsonl", "--strict", code=1)


def test_twenty_rows_leaked_into_training(tmp_path: Path) -> None:
    train, held = clean(200), clean(60, seed=1)
    for i in range(20):
        other = clean(1, seed=100 + i)[0]
        train[i * 7] = {**other, "prompt": "  " + held[i]["prompt"].upper()}  # the prompt alone is enough
    train[150]["prompt"] = held[40]["prompt"][:-1] + " !"
    found = lint(
        write(tmp_path / "a.jsonl", train), "--eval", write(tmp_path / "b.jsonl", held), "--rows", "30", code=1
    )
    leaked, near = found["leaked-prompt"], found["leaked-near"]
    assert (leaked["severity"], leaked["count"], leaked["of"]) == ("error", 20, 60)
    assert lines(leaked) == list(range(1, 21)) and lines(near) == [41]
    assert all("b.jsonl" in row["where"] and "a.jsonl" in row["detail"] for row in leaked["rows"])


def test_the_same_question_under_another_system_turn_is_another_prompt(tmp_path: Path) -> None:
    rows = [{"system": f"You are number {i % 2}.", **row} for i, row in enumerate(clean(60))]
    rows[3] = {**rows[2], "system": rows[3]["system"], "chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}
    held = [{**clean(1, seed=9)[0], "system": "You are another.", "prompt": rows[5]["prompt"]}]
    found = lint(write(tmp_path / "a.jsonl", rows), "--eval", write(tmp_path / "b.jsonl", held))
    assert "contradiction" not in found and "leaked-prompt" not in found and "repeated-prompt" not in found
    assert lines(found["leaked-near"]) == [1]


def test_pairs_that_are_nearly_or_wholly_the_same(tmp_path: Path) -> None:
    rows = clean(50)
    rows[7]["rejected"] = rows[7]["chosen"] + " Yes."
    rows[8]["rejected"] = rows[8]["chosen"].title()
    rows[9]["rejected"] = rows[9]["chosen"]
    found = lint(write(tmp_path / "a.jsonl", rows), code=1)
    assert lines(found["near-identical-pair"]) == [8, 9]
    assert "letter case" in found["near-identical-pair"]["rows"][0]["detail"]  # the worst first
    assert found["chosen-equals-rejected"]["severity"] == "error" and lines(found["chosen-equals-rejected"]) == [10]


def test_empty_broken_and_wordless_texts(tmp_path: Path) -> None:
    rows = clean(60)
    rows[0]["chosen"], rows[1]["chosen"], rows[2]["rejected"] = " ", 7, "?!... 🙂"
    rows[3]["chosen"] += " cafÃ© \ufffd"
    rows[5]["prompt"], rows[6]["prompt"] = "Who are {{you}} and {{me}}?", "Who is {{else}}?"
    rows[4]["prompt"] = "<|im_start|>user\nHi<|im_end|>"
    path = Path(write(tmp_path / "a.jsonl", rows))
    path.write_text(path.read_text() + "{broken\n")
    found = lint(path, code=1)
    where = {
        "empty-completion": 1, "not-text": 2, "no-words": 3, "broken-text": 4, "template-in-text": 5,
        "invalid-json": 61,
    }  # fmt: skip
    assert {rule: lines(found[rule]) for rule in where} == {rule: [line] for rule, line in where.items()}
    assert lines(found["placeholder"]) == [6, 7] and "{{you}}, {{me}}" in str(found["placeholder"]["rows"])
    assert [found[rule]["severity"] for rule in ("empty-completion", "not-text", "invalid-json")] == ["error"] * 3


def test_length_bias(tmp_path: Path) -> None:
    rows = clean(100)
    for i, row in enumerate(rows):
        row["chosen" if i < 80 else "rejected"] += " and more" * (i + 9)
    ties = [{"prompt": row["prompt"], "chosen": row["prompt"], "rejected": row["prompt"][::-1]} for row in clean(10, 2)]
    found = lint(write(tmp_path / "a.jsonl", rows + ties))["length-bias"]
    assert (found["severity"], found["count"], found["of"]) == ("warning", 80, 100) and "80 of 100" in found["detail"]
    assert found["rows"][0]["where"].endswith(":80")  # the widest apart
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert "20 of 100" in lint(write(tmp_path / "b.jsonl", swapped))["length-bias"]["detail"]
    assert lint(tmp_path / "a.jsonl", "--length-bias", "0.9")["lengths"]["severity"] == "note"
    few = write(tmp_path / "c.jsonl", rows[:3])  # three of three is no evidence
    assert "length-bias" not in lint(few)


def labelled(n: int, good: int) -> list[dict[str, Any]]:
    rows = clean(n)
    return [{"prompt": r["prompt"], "completion": r["chosen"], "label": i < good} for i, r in enumerate(rows)]


def test_labels(tmp_path: Path) -> None:
    rare = lint(write(tmp_path / "a.jsonl", labelled(100, 10)))["label-balance"]
    assert (rare["severity"], rare["count"], rare["of"]) == ("warning", 10, 100)
    assert lint(write(tmp_path / "b.jsonl", labelled(100, 40)))["labels"]["detail"] == "40 desirable, 60 undesirable"
    assert "single-label" in lint(write(tmp_path / "c.jsonl", labelled(20, 20)))
    longer = labelled(100, 50)
    for row in longer[:50]:
        row["completion"] += " and more" * 20
    assert lint(write(tmp_path / "d.jsonl", longer))["length-bias"]["share"] == 1.0


def test_the_area_under_the_curve_is_the_share_of_pairings() -> None:
    from alignzoo.data.lint_sets import _area

    rng = np.random.default_rng(0)
    lengths, labels = rng.integers(0, 20, 60), rng.random(60) < 0.3
    good, bad = lengths[labels], lengths[~labels]
    wanted = np.mean([(g > b) + 0.5 * (g == b) for g in good for b in bad])
    assert _area(lengths, labels) == pytest.approx(wanted)


def test_contradictions(tmp_path: Path) -> None:
    rows = clean(40)
    rows[30] = {**rows[2], "chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}
    assert lines(lint(write(tmp_path / "a.jsonl", rows))["contradiction"]) == [31]
    judged = labelled(40, 20)
    judged[35] = {**judged[2], "label": False}
    judged[36] = {**judged[3]}  # the same label again is a copy
    found = lint(write(tmp_path / "b.jsonl", judged))
    assert lines(found["contradiction"]) == [36] and lines(found["duplicate"]) == [37]


def test_languages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    english = "The shop is open until nine in the evening, and on Sundays it stays closed all day."
    german = "Das Geschäft hat bis neun Uhr abends geöffnet, und am Sonntag bleibt es den ganzen Tag geschlossen."
    russian = "Магазин открыт до девяти вечера, по воскресеньям он весь день закрыт для посетителей."
    rows = [{"prompt": english, "chosen": english + f" {i}", "rejected": text} for i, text in enumerate(
        [english + " Yes.", german, russian])]  # fmt: skip
    path = write(tmp_path / "a.jsonl", rows)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    language.identifier.cache_clear()
    found = lint(path)
    assert lines(found["pair-languages"]) == [3] and "latin 100.0%" in found["languages"]["detail"]
    assert "pip install 'alignzoo[lint]'" in found["languages"]["detail"]
    monkeypatch.undo()
    language.identifier.cache_clear()
    pytest.importorskip("py3langid", reason="the extra lint is not installed")
    found = lint(path)
    assert lines(found["pair-languages"]) == [2, 3] and "en 100.0%" in found["languages"]["detail"]
    assert "pip install" not in found["languages"]["detail"]


# --- the command


class _Page(HTMLParser):
    """Collects what a page loads and runs, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_shows_the_worst_rows_and_loads_nothing(tmp_path: Path) -> None:
    rows = clean(20)
    evil = '<script>alert(1)</script><img src="http://x.test/a.png" onerror=alert(2)>{{ 7 * 7 }} é\ud800'
    rows[3] = {"prompt": evil[:-1], "chosen": "?!", "rejected": rows[3]["rejected"]}
    rows[4]["chosen"] = evil  # half a surrogate pair: a bad row whose message is shown
    path, page = write(tmp_path / "<b>.jsonl", rows), tmp_path / "page.html"
    result = CliRunner().invoke(cli, ["data", "lint", path, "--html", str(page)])
    assert result.exit_code == 1 and "no-words" in result.output
    seen = _Page()
    seen.feed(page.read_text(encoding="utf-8"))
    assert not seen.tags & {"script", "img", "link", "iframe", "b"}
    assert seen.addresses and all(address.startswith("#f") for address in seen.addresses)
    assert evil[:-1] in seen.words and "<b>.jsonl:4" in seen.words and "not-unicode" in seen.words
    assert "url(" not in page.read_text(encoding="utf-8")


def test_what_the_terminal_shows(tmp_path: Path) -> None:
    rows = clean(30)
    for i in range(5):
        rows[i]["rejected"] = rows[i]["chosen"] + " [red]"
    result = CliRunner().invoke(cli, ["data", "lint", write(tmp_path / "a.jsonl", rows)])
    assert result.exit_code == 0
    for words in ("30 rows, 30 usable, of format pairs", "near-identical-pair", "5 of 30", "16.7%",
                  ": similarity 0.9", "in training: ", "to do: ",
                  "... --html FILE and --json name 5 rows", "1 warning(s)",
                  "cannot be looked for", "alignzoo data lint --recipe R.toml"):  # fmt: skip
        assert words in result.output, words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "PATH..., or --recipe"),
        (["a.jsonl", "--recipe", "a.toml"], "give one of the two"),
        (["--recipe", "a.toml", "--eval", "b.jsonl"], "--eval: for paths"),
        (["nowhere.jsonl"], "no such file"),
    ],
)
def test_mistakes(words: list[str], said: str) -> None:
    result = CliRunner().invoke(cli, ["data", "lint", *words])
    assert result.exit_code == 2 and said in result.output


def test_several_files_are_one_data_set(tmp_path: Path) -> None:
    a, b = clean(30), clean(30, seed=1)
    b[4] = a[2]
    found = lint(write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b))["duplicate"]
    assert [row["where"].rpartition("/")[2] for row in found["rows"]] == ["b.jsonl:5"] and "a.jsonl:3" in str(found)


def test_columns_and_formats_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "Where to?", "good": "To the river.", "bad": "To the sea."}])
    columns = ["--column", "prompt=q", "--column", "chosen=good", "--column", "rejected=bad"]
    assert "lengths" in lint(path, *columns, "--format", "pairs")


def test_every_rule_is_documented() -> None:
    from alignzoo.data.lint_rules import RULES

    page = (REPO / "docs/lint.md").read_text(encoding="utf-8")
    for name, rule in RULES.items():
        assert f"| `{name}` | {rule.severity} | {rule.what} |" in page, name


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """9 MB of text, in a process of its own: far less than that is added."""
    path, filler = tmp_path / "a.jsonl", sentence(np.random.default_rng(0), 400)
    with path.open("w") as file:
        for i in range(3000):
            row = {"prompt": f"{i} what", "completion": f"{i} {filler[i % 97 :]}"}
            file.write(json.dumps(row) + "\n")
    code = (
        "import torch\nfrom click.testing import CliRunner\nfrom alignzoo.cli import cli\n"
        "from alignzoo.metrics import memory_gib\ndef peak(): return memory_gib(torch.device('cpu')) * 1024\n"
        "def run(p): assert CliRunner().invoke(cli, ['data', 'lint', '--json', p]).exit_code == 0\n"
        f"run({write(tmp_path / 'b.jsonl', clean(300))!r})\nbefore = peak()\nrun({str(path)!r})\nprint(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert path.stat().st_size > 8e6 and float(done.stdout) < 6, done.stdout


@pytest.mark.skipif(not DEMO.is_dir(), reason="the LLaMA-Factory demo data is not there")
def test_planted_faults_in_real_pairs(tmp_path: Path) -> None:
    """And flipped labels are not seen: no text says which of two answers is the better one."""
    rows = json.loads((DEMO / "dpo_en_demo.json").read_text(encoding="utf-8"))
    rows = list({json.dumps(row["conversations"]): row for row in rows}.values())  # it has doubled rows of its own
    train, held = rows[:240], rows[240:]
    before = lint(write(tmp_path / "a.jsonl", train), "--eval", write(tmp_path / "b.jsonl", held))
    assert not {"duplicate", "repeated-prompt", "leaked-prompt", "leaked-near"} & set(before)
    rng = np.random.default_rng(0)
    flipped = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if rng.random() < 0.3 else row for row in train
    ]
    after = lint(write(tmp_path / "c.jsonl", flipped), "--eval", str(tmp_path / "b.jsonl"))
    assert set(before) == set(after)
    changed = {rule for rule in before if before[rule]["count"] != after[rule]["count"]}
    assert changed <= {"lengths", "languages", "answer-language"}, changed
    leaking = [*train, *held[:20], train[17]]
    found = lint(write(tmp_path / "d.jsonl", leaking), "--eval", str(tmp_path / "b.jsonl"), "--rows", "30", code=1)
    assert lines(found["leaked-prompt"]) == list(range(1, 21))
    assert lines(found["duplicate"]) == [len(train) + 21]


@pytest.mark.skipif(not DEMO.is_dir(), reason="the LLaMA-Factory demo data is not there")
@pytest.mark.parametrize(
    ("file", "warnings"),
    [
        ("alpaca_en_demo.json", {"duplicate"}),
        ("dpo_en_demo.json", {"duplicate", "pair-languages"}),
        ("dpo_zh_demo.json", {"duplicate", "broken-text"}),
        ("glaive_toolcall_en_demo.json", {"duplicate", "near-duplicate"}),
        ("identity.json", {"placeholder"}),
        ("kto_en_demo.json", set()),
    ],
)
def test_real_files_have_these_warnings_and_no_others(file: str, warnings: set[str]) -> None:
    """Each of them was read and found to be true."""
    pytest.importorskip("py3langid", reason="the extra lint is not installed")
    found = lint(DEMO / file)
    assert {rule for rule, finding in found.items() if finding["severity"] != "note"} == warnings
