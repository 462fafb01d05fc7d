"""Every format, other name and bundled template stands in docs/data.md, and its rows there are read as they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_data_formats_shapes import reading_of

from alignzoo.data import formats
from alignzoo.data.rows import Example
from alignzoo.data.template import BUNDLED


def as_documented(example: Example) -> str:
    """An example in the lines of docs/data.md."""
    answers = ("completion",) * len(example.completions)
    names = {"pairs": ("chosen", "rejected")}.get(example.kind, answers)
    lines = _lines("prompt", example.prompt, learned=False) if example.prompt else []
    for name, completion in zip(names, example.completions, strict=True):
        lines += _lines(name, completion, learned=True)
    if example.label is not None:
        lines.append(("label", str(example.label).lower()))
    if example.rewards is not None:
        lines.append(("rewards", ", ".join(f"{reward:g}" for reward in example.rewards)))
    return "\n".join(f"{name:<12}{line}" for name, line in lines)


def _lines(name: str, turns: Any, learned: bool) -> list[tuple[str, str]]:
    if isinstance(turns, str):
        return [(name, _marked(turns, learned))]
    shown = []
    for turn in turns:
        calls = [call["function"] for call in turn.get("tool_calls", ())]
        text = turn["content"] + "".join(f"{call['name']}({json.dumps(call['arguments'])})" for call in calls)
        shown.append(f"{turn['role']}: {_marked(text, learned and turn['role'] == 'assistant')}")
    return [("" if i else name, line) for i, line in enumerate(shown)]


def _marked(text: str, learned: bool) -> str:
    flat = text.replace("\n", "⏎")
    return f"⟦{flat}⟧" if learned else flat


DOCUMENTED = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^#### (\w+)\n.*?```json\n(.*?)```\n\n```text\n(.*?)\n```", DOCUMENTED, re.DOTALL | re.MULTILINE)


def test_every_format_has_its_row_in_the_documentation() -> None:
    assert [name for name, _, _ in EXAMPLES] == [known.name for known in formats.FORMATS]


@pytest.mark.parametrize(("name", "row", "becomes"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
def test_a_documented_row_is_read_as_documented(name: str, row: str, becomes: str) -> None:
    reading = reading_of([json.loads(row)])
    assert reading.format is not None
    assert reading.format.name == name
    assert [as_documented(example) for example in reading.examples] == [becomes]


def test_other_names_and_bundled_templates_are_documented() -> None:
    for ours, others in formats.ALIASES.items():
        assert f"| `{ours}` | {', '.join(f'`{other}`' for other in others)} |" in DOCUMENTED
    for name, tokens in BUNDLED.items():
        lines = re.findall(rf"^\| `{name}` \| .*$", DOCUMENTED.replace("\\|", "|"), re.MULTILINE)
        assert any(all(token in line for token in tokens) for line in lines)
