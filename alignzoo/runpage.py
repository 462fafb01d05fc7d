"""report.html: one run on one page that needs no network. It imports no torch."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from alignzoo.curves import figure, rendered
from alignzoo.pages import Image, Table, page, shown
from alignzoo.readrun import Run
from alignzoo.recipe import SECTIONS
from alignzoo.records import is_eval, number
from alignzoo.resume import flat

Rows = list[tuple[str, str]]


def run_page(run: Run, title: str, figures: Sequence[tuple[str, str]]) -> str:
    """figures: the closing figures in words, report.figures."""
    plotted = int(run.summary.get("accuracy", {}).get("rows", 0))
    picture = rendered(lambda: figure(run.records, "", plotted), "svg")
    settings, columns = list(_setting_rows(run)), ("setting", "value", "default")
    return page(
        "run.html",
        title=f"{title}: {run.path.name}" if title != run.path.name else title,
        header=Table((), _facts(run)),
        verdict=Table((), figures),
        warnings=run.warnings,
        curves=Image(picture, "Training and held-out curves: the numbers are in training_metrics.csv"),
        held_out=_held_out(run),
        samples=[dataclasses.astuple(sample) for sample in run.samples],
        cost=Table((), cost_rows(run)),
        settings=Table(columns, [row for row, own in settings if own], "The loss's own, and what is not the default."),
        all_settings=Table(
            columns, [row for row, _ in settings], "", frozenset(i for i, (_, own) in enumerate(settings) if own)
        ),
        made_from=Table((), made_from(run)),
        said=run.said,
        footer=footer(run),
    )  # fmt: skip


def footer(run: Run) -> str:
    return f"alignzoo {run.manifest.get('alignzoo', '')}. This page needs no network and runs no script."


def _facts(run: Run) -> Rows:
    summary, recipe = run.summary, run.recipe
    losses = [f"{one.get('name', '?')}: {shown({k: v for k, v in one.items() if k != 'name'})}" for one in run.losses]
    rows = [
        ("recipe", str(summary.get("recipe", ""))),
        ("loss", "; ".join(losses)),
        ("paper", str(summary.get("paper", ""))),
        ("reference", str(summary.get("reference", ""))),
        ("start model", str(recipe.get("model", {}).get("path", ""))),
        ("rows", f"{summary.get('train_rows', '?')} to train on, {summary.get('eval_rows', '?')} held out"),
        ("seed", str(run.manifest.get("seed", ""))),
        ("started", str(run.manifest.get("started", ""))),
        ("trained model", str(summary.get("model", ""))),
    ]
    return [(fact, value) for fact, value in rows if value]


def made_from(run: Run) -> Rows:
    """Command, versions, hashes and revisions of the manifest."""
    manifest = run.manifest
    rows = [("command", shlex.join(manifest.get("command", []))), ("alignzoo", str(manifest.get("alignzoo", "")))]
    rows += [(name, str(manifest[name])) for name in ("python", "platform") if name in manifest]
    rows += [("libraries", ", ".join(f"{k} {v}" for k, v in manifest.get("versions", {}).items()))]
    rows += [(f"data, {name}", f"sha256 {sha}") for name, sha in manifest.get("data", {}).items()]
    rows += [(f"weights, {name}", f"sha256 {sha}") for name, sha in manifest.get("weights", {}).items()]
    rows += [("plugin", shown(plugin)) for plugin in manifest.get("plugins", [])]
    rows += [(f"git, {place}", shown(found)) for place, found in manifest.get("git", {}).items() if found]
    rows += [("from Python", ", ".join(manifest.get("live", [])))]
    rows += [("resumed", shown(line)) for line in manifest.get("resumed", [])]
    return [(name, value) for name, value in rows if value]


def cost_rows(run: Run) -> Rows:
    """Time, tokens, memory, and what the reference's cache spared."""
    summary = run.summary
    rows = [
        ("optimizer steps", summary.get("steps")),
        ("training and evaluations (h:mm:ss)", _time(summary.get("seconds"))),
        ("of that evaluations (h:mm:ss)", _time(sum(number(r.get("eval_runtime")) or 0.0 for r in run.records))),
        ("tokens trained on", summary.get("tokens")),
        ("tokens per second, median", _rounded(summary.get("tokens_per_second"))),
        ("peak memory (GiB)", summary.get("memory")),
        ("reference log-probs", cache_in_words(run)),
    ]
    return [(name, shown(value)) for name, value in rows if value is not None]


def cache_in_words(run: Run) -> str | None:
    """ "96 of 120 completions from the cache, 24 computed in 1.2 s"; None where the run used none."""
    used = run.summary.get("reference_cache")
    if not used:
        return None
    kept = used["completions"] - used["computed"]
    return (
        f"{kept} of {used['completions']} completions from the cache, {used['computed']} computed "
        f"in {used['seconds']:.1f} s"
    )


def _time(seconds: Any) -> str | None:
    found = number(seconds)
    return None if found is None else str(timedelta(seconds=round(found)))


def _rounded(value: Any) -> int | None:
    found = number(value)
    return None if found is None else round(found)


def _held_out(run: Run) -> Table:
    """Every held-out metric at the first and the last evaluation."""
    found = [record for record in run.records if is_eval(record)]
    keys = dict.fromkeys(key for record in found for key in record if key.startswith("eval_"))
    if not found:
        return Table((), ())
    first, last = found[0], found[-1]
    rows = []
    for key in keys:
        before, after = number(first.get(key)), number(last.get(key))
        change = f"{after - before:+.4g}" if before is not None and after is not None and len(found) > 1 else ""
        rows.append((key.removeprefix("eval_"), shown(before) if len(found) > 1 else "", shown(after), change))
    header = ("metric", f"step {first.get('step')}", f"step {last.get('step')}", "change")
    return Table(header, rows, "On the held-out rows; what each name means: docs/runs.md.")


def _setting_rows(run: Run) -> Iterator[tuple[tuple[str, str, str], bool]]:
    """Key, value and default of each setting, and whether it is of this run: the loss's, or not the default.

    A loss's defaults are its plugin's own, and not known here.
    """
    fields = {f"{section}.{f.name}": f for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
    for key, value in flat(run.recipe):
        field = fields.get(key)
        default = dataclasses.MISSING if field is None else _default(field)
        if default is dataclasses.MISSING:
            yield (key, shown(value), "required" if field else ""), True
            continue
        yield (key, shown(value), shown(default)), shown(value) != shown(default)


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default of a setting, MISSING where it has none."""
    make = field.default_factory
    return field.default if make is dataclasses.MISSING else make()
