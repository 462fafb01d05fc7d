"""docs/performance.md out of docs/performance.json: the tables, and the plot of how cost grows.

Every table is of one machine and one model, whose names stand above it. Records of a void case are left out, and so are
those of a case that was not measured to its end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_cases import NO_REFERENCE, label
from step_data import batch_of

_PART = re.compile(r"(<!-- measured -->\n).*?(<!-- end measured -->)", re.DOTALL)
_GROWING = re.compile(r"(tokens|completions)-(\d+)")
_COMMON = ("loss", "data", "precision", "factor", "warmup", "steps")
ROWS_ARE = {"kto": "labelled rows", "sft": "rows", "grpo": "groups"}
Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """All processes that measured one specification on one machine, taken together."""

    records: tuple[Record, ...]

    @property
    def spec(self) -> dict[str, Any]:
        return dict(self.records[0]["spec"])

    def _all(self, name: str) -> list[float]:
        return [value for record in self.records for value in record[name] or ()]

    @property
    def seconds(self) -> float:
        """Of a step, the mean over all."""
        return sum(self._all("seconds")) / len(self._all("seconds"))

    @property
    def tokens_per_second(self) -> float:
        return sum(self._all("tokens")) / sum(self._all("seconds"))

    @property
    def head(self) -> float | None:
        """Seconds of a step in the head; None where that is not known."""
        found = self._all("head_seconds")
        return sum(found) / len(found) if sum(found) else None

    @property
    def reference(self) -> float:
        """Seconds of a step for the reference's log-probs."""
        found = self._all("reference_seconds")
        return sum(found) / len(found) if found else 0.0

    @property
    def memory(self) -> float:
        """MiB at most, above the loaded model."""
        return max(float(r["memory"]["peak"] - r["memory"]["loaded"]) for r in self.records)

    def flops(self, layout: str) -> float:
        """Of a step in a layout."""
        return sum(float(r["flops"][layout]) for r in self.records) / len(self._all("seconds"))

    @property
    def of_peak(self) -> float:
        """The part of the matrix peak, measured just before and after, that its own layout's operations are."""
        layout = self.spec["layout"] if self.spec["side"] == "ours" else "trl"
        return self.flops(layout) / self.seconds / (sum(self._all("peak_flops")) / len(self._all("peak_flops")))


class Machine:
    """The good rows of one model on one machine, found by what they are of."""

    def __init__(self, records: Sequence[Record]) -> None:
        found: dict[str, list[Record]] = {}
        for record in records:
            found.setdefault(json.dumps({**record["spec"], "round": 0}, sort_keys=True), []).append(record)
        self.rows = [Row(tuple(same)) for same in found.values()]

    def find(self, **spec: Any) -> list[Row]:
        return [row for row in self.rows if all(row.spec[name] == value for name, value in spec.items())]

    def cases(self) -> Iterator[dict[str, Any]]:
        """What both sides were measured on, as the part of a specification that is common to them."""
        seen = []
        for row in self.rows:
            case = {name: row.spec[name] for name in _COMMON}
            if case not in seen and _GROWING.fullmatch(case["data"]) is None:
                seen.append(case)
                yield case

    def one(self, **spec: Any) -> Row | None:
        plain = {"layout": "trees", "defaults": False, "set": {}, "compile": False}
        found = self.find(**{**plain, **spec})
        return found[0] if found else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def words(case: dict[str, Any]) -> tuple[str, str, str]:
    """Loss, data and precision, and how many rows a step has."""
    batch = batch_of(case["data"], case["factor"])
    rows = ROWS_ARE.get(case["loss"], "pairs")
    return case["loss"], f"{case['data']}, {batch} {rows.removesuffix('s') if batch == 1 else rows}", case["precision"]


# --- tables ----------------------------------------------------------------------------------------------------------


def steps_table(machine: Machine) -> list[str]:
    rows = []
    for case in machine.cases():
        for row in sorted(machine.find(**case), key=lambda r: (r.spec["side"], r.spec["reference"] != "live")):
            rows.append((
                *words(case), label(row.spec), f"{row.seconds:.3g}", f"{row.tokens_per_second:.4g}",
                f"{row.of_peak:.0%}", f"{row.memory:.0f}",
            ))  # fmt: skip
    header = ("loss", "data", "precision", "what", "s per step", "tokens/s", "of the peak", "MiB above the model")
    return table(header, rows)


def compared(case: dict[str, Any], machine: Machine) -> Iterator[tuple[str, Row, Row]]:
    """What is compared, theirs, ours."""
    names = {"none": "no reference"} if case["loss"] in NO_REFERENCE else {
        "live": "live against live", "cached": "kept against precomputed"
    }  # fmt: skip
    for reference, name in names.items():
        for defaults, more in ((False, ""), (True, ", TRL's defaults")):
            ours = machine.one(side="ours", reference=reference, **case)
            theirs = machine.one(side="trl", reference=reference, defaults=defaults, **case)
            if ours and theirs:
                yield name + more, theirs, ours


def ratios_table(machine: Machine) -> list[str]:
    rows = []
    for case in machine.cases():
        for name, theirs, ours in compared(case, machine):
            ratio, bound = theirs.seconds / ours.seconds, ours.flops("trl") / ours.flops("trees")
            numbers = (f"{ratio:.2f}", f"{bound:.2f}", f"{ratio / bound:.2f}", f"{ours.memory / theirs.memory:.2f}")
            rows.append((*words(case), name, *numbers))
        live, kept = (machine.one(side="ours", reference=r, **case) for r in ("live", "cached"))
        if live and kept:
            bound = live.flops("trees") / kept.flops("trees")
            ratio = live.seconds / kept.seconds
            numbers = (f"{ratio:.2f}", f"{bound:.2f}", f"{ratio / bound:.2f}", f"{kept.memory / live.memory:.2f}")
            rows.append((*words(case), "ours live against ours kept", *numbers))
    return table(("loss", "data", "precision", "ratio", "time", "bound", "time / bound", "memory"), rows)


def split_of(theirs: Row, padded: Row, packed: Row, trees: Row) -> list[tuple[str, float | None, float]]:
    """Factors of theirs / trees with the bound of each: what they multiply to is that ratio.

    The head's is what theirs would gain with the seconds that the head takes ours.
    """
    parts: list[tuple[str, float | None, float]] = []
    other, bound = theirs.seconds, trees.flops("trl") / trees.flops("padded")
    if theirs.head is not None and padded.head is not None:
        other = theirs.seconds - theirs.head + padded.head
        parts.append(("head", theirs.seconds / other, trees.flops("trl") / trees.flops("trl_head")))
        bound = trees.flops("trl_head") / trees.flops("padded")
    else:
        parts.append(("head", None, 1.0))
    parts.append(("padding", padded.seconds / packed.seconds, trees.flops("padded") / trees.flops("packed")))
    parts.append(("sharing", packed.seconds / trees.seconds, trees.flops("packed") / trees.flops("trees")))
    return [*parts, ("the rest", other / padded.seconds, bound)]


def split_table(machine: Machine) -> list[str]:
    rows = []
    for case in machine.cases():
        for name, theirs, trees in compared(case, machine):
            own = {"side": "ours", "reference": trees.spec["reference"], **case}
            padded, packed = machine.one(layout="padded", **own), machine.one(layout="packed", **own)
            if padded and packed and not theirs.spec["defaults"]:
                parts = split_of(theirs, padded, packed, trees)
                cells = [f"in the rest ({b:.2f})" if r is None else f"{r:.2f} ({b:.2f})" for _, r, b in parts]
                rows.append((*words(case), name, *cells, f"{theirs.seconds / trees.seconds:.2f}"))
    return table(("loss", "data", "precision", "ratio", "head", "padding", "sharing", "the rest", "product"), rows)


# --- goals -----------------------------------------------------------------------------------------------------------


def goals(machine: Machine) -> Iterator[tuple[str, float, float, bool]]:
    """What was to be reached on two CPU cores: its words, the limit, what was found, whether less is better."""
    for case in machine.cases():
        name = f"{case['loss']} {case['data']} {case['precision']}"
        for row in (machine.one(side="ours", reference=r, **case) for r in ("live", "cached", "none")):
            if row:
                limit = 0.65 if case["precision"] == "fp32" else 0.50
                yield f"{name}, {label(row.spec)}: part of the matrix peak", limit, row.of_peak, False
        for what, theirs, ours in compared(case, machine):
            if theirs.spec["defaults"]:
                continue
            ratio, bound = theirs.seconds / ours.seconds, ours.flops("trl") / ours.flops("trees")
            if case["loss"] == "sft":
                yield f"{name}: TRL's time over ours", 1.0, ratio, False
            elif what != "kept against precomputed":
                yield f"{name}, {what}: ratio over its bound", 1.1, ratio / bound, False
            yield f"{name}, {what}: memory above the model", 0.45, ours.memory / theirs.memory, True
        kept = machine.one(side="ours", reference="cached", **case)
        if kept:
            share = kept.seconds / (kept.seconds - kept.reference)
            yield f"{name}, kept reference over the same step without it", 1.02, share, True


def goals_table(machine: Machine) -> list[str]:
    rows = [
        (what, f"{'at most' if less else 'at least'} {limit:g}", f"{found:.3g}",
         "yes" if (found <= limit if less else found >= limit) else "no")
        for what, limit, found, less in goals(machine)
    ]  # fmt: skip
    return table(("goal", "asked", "found", "reached"), rows)


# --- growth, options, start-up ---------------------------------------------------------------------------------------


def growing(machine: Machine, what: str) -> list[tuple[int, Row]]:
    """Sizes and rows of one kind of growth, of the precision that most of them have."""
    found: dict[str, list[tuple[int, Row]]] = {}
    for row in machine.find(side="ours", set={}, compile=False):
        match = _GROWING.fullmatch(row.spec["data"])
        if match and match[1] == what:
            found.setdefault(row.spec["precision"], []).append((int(match[2]), row))
    return sorted(max(found.values(), key=len), key=lambda pair: pair[0]) if found else []


def growth_table(machine: Machine) -> list[str]:
    rows = []
    for what in ("tokens", "completions"):
        for size, row in growing(machine, what):
            smallest = growing(machine, what)[0][1]
            rows.append((
                f"{what}, {size}x" if what == "tokens" else f"{what}, {size}", row.spec["precision"],
                f"{row.seconds:.3g}", f"{row.seconds / smallest.seconds:.2f}",
                f"{row.flops('trees') / smallest.flops('trees'):.2f}", f"{row.of_peak:.0%}", f"{row.memory:.0f}",
            ))  # fmt: skip
    header = ("size", "precision", "s per step", "time, smallest = 1", "operations, smallest = 1",
              "of the matrix peak", "MiB above the model")  # fmt: skip
    return table(header, rows) if rows else []


def growth_plot(machine: Machine, path: Path, title: str) -> bool:
    """Both kinds of growth with the line that operations alone would give; whether there is anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = {"tokens": "tokens in a step, smallest = 1", "completions": "completions of a prompt"}
    kinds = {what: axis for what, axis in kinds.items() if len(growing(machine, what)) > 1}
    if not kinds:
        return False
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(4.5 * len(kinds), 3.4), squeeze=False)
    for ax, (what, axis) in zip(axes[0], kinds.items(), strict=True):
        sizes, rows = zip(*growing(machine, what), strict=True)
        ax.plot(sizes, [row.seconds for row in rows], "o-", label="measured")
        line = [rows[0].seconds * row.flops("trees") / rows[0].flops("trees") for row in rows]
        ax.plot(sizes, line, ":", color="0.5", label="by operations, from the smallest")
        ax.set(xlabel=axis, ylabel="seconds per step", xticks=sizes)
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


def options_table(machine: Machine) -> list[str]:
    rows = []
    for row in machine.find(side="ours"):
        spec = row.spec
        if not spec["data"].startswith("tokens-"):
            continue
        growth = growing(machine, "tokens")
        base = next((r for _, r in growth if r.spec["data"] == spec["data"]), None)
        if base and spec != base.spec:
            changed = label(spec).split(", ")[2:] or [spec["precision"]]
            times, memory = row.seconds / base.seconds, row.memory / base.memory
            cells = (f"{base.seconds:.3g}", f"{row.seconds:.3g}", f"{times:.2f}", f"{memory:.2f}")
            rows.append((", ".join(changed), base.spec["precision"], *cells))
    return table(("changed", "from", "s per step before", "after", "time", "memory"), rows) if rows else []


def startup_table(found: Record) -> list[str]:
    phases = found["phases"]
    rows = [(name, *(f"{phases[run].get(name, 0):.2f}" for run in ("cold", "kept"))) for name in phases["kept"]]
    sums = {run: sum(s for name, s in own.items() if name != "the model loaded") for run, own in phases.items()}
    rows.append(("all but the model", f"{sums['cold']:.2f}", f"{sums['kept']:.2f}"))
    imports = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found["imports"])
    lines = table(("phase", "first run, s", "second run, s"), rows)
    return [*lines, f"Imports by package, seconds (`python -X importtime`): {imports}.", ""]


# --- the page --------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[Machine], list[str]]] = {
    "Steps": steps_table, "Ratios": ratios_table, "Where a ratio comes from": split_table,
    "How cost grows": growth_table, "Options": options_table,
}  # fmt: skip


def section(name: str, machine: Machine, startup: Record | None, plot: str) -> list[str]:
    """One machine and model."""
    first = machine.rows[0].records[0]
    versions = ", ".join(f"{library} {version}" for library, version in first["versions"].items())
    dates = sorted({record["date"] for row in machine.rows for record in row.records})
    lines = [f"## {name}", "", f"{versions}; {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else ""), ""]
    for title, make in TABLES.items():
        found = make(machine)
        if len(found) > 3:
            lines += [f"### {title}", "", *found]
            if make is growth_table and plot:
                lines += [f"![seconds per step over tokens and over completions]({plot})", ""]
    if "CPU" in first["hardware"] and len(goals_table(machine)) > 3:
        lines += ["### Goals", "", *goals_table(machine)]
    if startup:
        lines += ["### Start-up", "", *startup_table(startup)]
    return lines


def report(content: dict[str, list[Record]], plots: Path) -> list[str]:
    """The measured part of the page; draws the plots into a folder beside it."""
    by_place: dict[tuple[str, str], list[Record]] = {}
    for record in content["records"]:
        if record.get("void") == "":
            by_place.setdefault((record["hardware"], record["model"]), []).append(record)
    lines = []
    for (hardware, model), records in by_place.items():
        name = f"{hardware}: {model.rsplit('/', 1)[-1].removesuffix('.gguf')}"
        machine = Machine(records)
        plot = plots / (re.sub(r"\W+", "-", name.lower()).strip("-") + ".png")
        drawn = growth_plot(machine, plot, name)
        found = [s for s in content["startup"] if (s["hardware"], s["model"]) == (hardware, model)]
        link = f"{plots.name}/{plot.name}" if drawn else ""
        lines += section(name, machine, found[0] if found else None, link)
    void = {f"- {r['spec']['loss']} {r['spec']['data']} {r['spec']['precision']} on {r['hardware']}: {r['void']}"
            for r in content["records"] if r.get("void")}  # fmt: skip
    return lines + (["## Void", "", *sorted(void), ""] if void else [])


def write(results: Path) -> None:
    """The page beside the records, and its plots."""
    page = results.with_suffix(".md")
    content = json.loads(results.read_text(encoding="utf-8"))
    lines = report(content, results.with_suffix(""))
    text = page.read_text(encoding="utf-8")
    made = _PART.sub(lambda part: part[1] + "\n" + "\n".join(lines) + part[2], text)
    page.write_text(made, encoding="utf-8")
