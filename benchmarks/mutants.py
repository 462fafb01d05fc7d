"""How many small mistakes in a loss the conformance kit finds: `python benchmarks/mutants.py [NAME]...`.

Each mutant is a loss's file with one operator, number, name, argument or call changed in the code that computes. It
is killed by the checks of `alignzoo conform`, or else by the loss's own oracle: the reference function in
tests/conformance_oracles.py and the fixtures in tests/fixtures_conformance. --write puts the counts into
docs/mutants.json.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests"))
RECORDS = REPO / "docs/mutants.json"
FIXTURES = REPO / "tests/fixtures_conformance"
EQUIVALENT = REPO / "benchmarks/equivalent_mutants.json"  # by loss: which give the same numbers for all rows, and why

_OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Mod: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And,
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_NAMES = {
    "chosen": "rejected", "rejected": "chosen", "sum": "mean", "mean": "sum", "min": "max", "max": "min",
    "policy": "reference", "reference": "policy", "log_ratio": "sum", "minimum": "maximum", "maximum": "minimum",
    "zeros_like": "ones_like", "ones_like": "zeros_like", "new_zeros": "new_ones",
}  # fmt: skip


VARIANTS = 5  # of the settings, in all checks but THOROUGH, to save time
THOROUGH = ("contract", "settings", "reference function", "fixtures")
_SAME = ("bool", "to")  # calls that change nothing on a CPU or are for the type checker
_UNREAD = ("dtype", "stable")  # and arguments


@dataclass(frozen=True)
class Mutant:
    what: str  # "a + b -> a - b, in: return a + b"
    tree: ast.Module


@dataclass
class Count:
    """Of one loss."""

    mutants: int = 0
    conform: int = 0  # killed by alignzoo conform
    oracle: int = 0  # killed by the reference function or the fixtures only
    equivalent: dict[str, str] = field(default_factory=dict)  # those that cannot be, and why
    survivors: list[str] = field(default_factory=list)
    checks: dict[str, int] = field(default_factory=dict)  # which check was the first to kill


# --- the mutants -----------------------------------------------------------------------------------------------------


def mutants(source: str) -> Iterator[Mutant]:
    """One after the other, no two alike; where two of a line read alike, the later ones are numbered."""
    tree, lines = ast.parse(source), source.splitlines()
    seen, named = {ast.dump(tree)}, Counter[str]()
    for number, node in enumerate(_places(tree)):
        for change in _changes(node):
            twin = copy.deepcopy(tree)
            before = _places(twin)[number]
            after = change(before)
            text = ast.unparse(before)
            if after is not before:
                _Put(before, after).visit(twin)
            place = lines[node.lineno - 1].strip()
            what, dump = f"{text} -> {ast.unparse(after)}, in: {place}", ast.dump(twin)
            if dump not in seen:
                seen.add(dump)
                named[what] += 1
                again = f" ({named[what]})" if named[what] > 1 else ""
                yield Mutant(what + again, ast.fix_missing_locations(twin))


def _places(tree: ast.Module) -> list[Any]:
    """The expressions that compute: in functions but the hook, and the flags in class bodies."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name != "alignzoo_losses":
            body = node.body[1:] if ast.get_docstring(node) else node.body
            found += [part for line in body for part in ast.walk(line) if isinstance(part, ast.expr)]
        if isinstance(node, ast.ClassDef) and node.name != "Settings":
            flags = [line.value for line in node.body if isinstance(line, ast.Assign)]
            found += [
                p for f in flags for p in ast.walk(f) if isinstance(p, ast.Constant) and isinstance(p.value, bool)
            ]
    hidden = {id(p) for n in _of_type(tree, ast.AnnAssign) for p in ast.walk(n.annotation)}
    documented = [
        n for n in _of_type(tree, ast.FunctionDef) if ast.get_docstring(n)
    ]  # functions inside of functions too
    hidden |= {id(n.body[0].value) for n in documented}
    unread = [n for n in _of_type(tree, ast.keyword) if n.arg in _UNREAD]
    hidden |= {id(p) for n in (*unread, *_of_type(tree, ast.Assert | ast.Raise)) for p in ast.walk(n)}
    unique = {id(node): node for node in found if id(node) not in hidden}
    return list(unique.values())


def _of_type(tree: ast.Module, kind: Any) -> list[Any]:
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


class _Put(ast.NodeTransformer):
    """One node in the place of another."""

    def __init__(self, before: ast.AST, after: ast.AST) -> None:
        self.before, self.after = before, after

    def visit(self, node: ast.AST) -> Any:
        return self.after if node is self.before else self.generic_visit(node)


Change = Callable[[Any], ast.expr]


def _changes(node: ast.expr) -> Iterator[Change]:
    """What can be done to a node. Each change gets the node's twin and gives what is to stand in its place."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _OPERATORS:
        yield lambda n: _set(n, op=_OPERATORS[type(n.op)]())
    elif isinstance(node, ast.UnaryOp):
        yield lambda n: n.operand
    elif isinstance(node, ast.Compare):
        yield lambda n: _set(n, ops=[_OPERATORS[type(n.ops[0])](), *n.ops[1:]])
    elif isinstance(node, ast.IfExp):
        yield lambda n: _set(n, body=n.orelse, orelse=n.body)
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node)
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        yield lambda n: _set(n, attr=_NAMES[n.attr])
    elif isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("settings"):
        yield _default_instead
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in _NAMES:
        yield lambda n: _set(n, id=_NAMES[n.id])
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_constant(node: ast.Constant) -> Iterator[Change]:
    if isinstance(node.value, bool):
        yield lambda n: _set(n, value=not n.value)
    elif isinstance(node.value, int | float):
        yield lambda n: _set(n, value=n.value + 1)
    elif isinstance(node.value, str):
        yield lambda n: _set(n, value=_NAMES.get(n.value, n.value + "x"))


def _of_call(node: ast.Call) -> Iterator[Change]:
    if len(node.args) > 1:
        yield lambda n: _set(n, args=[n.args[1], n.args[0], *n.args[2:]])
    for place, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in _UNREAD:
            yield lambda n, at=place: _set(n, keywords=[k for i, k in enumerate(n.keywords) if i != at])  # type: ignore[misc]
    if ast.unparse(node.func).split(".")[-1] in _SAME:
        return
    if isinstance(node.func, ast.Attribute) and not re.match(r"(torch|alignzoo|math)\b", ast.unparse(node.func)):
        yield lambda n: n.func.value  # x.detach() -> x
    elif node.args and "LossOutput" not in ast.unparse(node.func):
        yield lambda n: n.args[0]  # logsigmoid(x) -> x


def _set(node: Any, **values: Any) -> Any:
    """A node with other fields, the old one kept for its text."""
    twin = copy.copy(node)
    for name, value in values.items():
        setattr(twin, name, value)
    return twin


def _default_instead(node: ast.Attribute) -> ast.expr:
    """settings.beta -> the default of beta: a setting that is ignored."""
    return ast.parse(f"({ast.unparse(node.value)}).__class__().{node.attr}", mode="eval").body


# --- killed by what --------------------------------------------------------------------------------------------------


def killer(mutant: Mutant, name: str, oracle: Any) -> str:
    """The first check that fails, "" where all hold."""
    from alignzoo import Loss
    from alignzoo.testing import CHECKS, kit
    from alignzoo.testing.suite import subject_of, verdict_of

    kit.SHRINKS = 0  # that it fails is enough

    module = types.ModuleType(f"mutant_{name}")
    sys.modules[module.__name__] = module
    try:
        exec(compile(mutant.tree, f"{name}.py, mutated", "exec"), module.__dict__)
        classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        cls = next(v for v in classes if issubclass(v, Loss))
        fixtures = FIXTURES / f"{name}.json"
        thorough, quick = (
            subject_of(cls, reference=oracle, fixtures=fixtures if fixtures.exists() else None) for _ in range(2)
        )
        vars(quick)["variants"] = quick.variants[:VARIANTS]
    except Exception:
        return "does not load"
    for check in CHECKS.values():
        if verdict_of(check, thorough if check.name in THOROUGH else quick).state == "fails":
            return check.name
    return ""


def oracles() -> dict[str, Any]:
    """The reference functions of the tests, by the loss's name."""
    import conformance_oracles

    return conformance_oracles.ORACLES


def count(name: str, source: str, oracle: Any) -> Count:
    found, equivalent = Count(), json.loads(EQUIVALENT.read_text(encoding="utf-8")).get(name, {})
    for mutant in mutants(source):
        check = killer(mutant, name, oracle)
        found.mutants += 1
        found.checks[check] = found.checks.get(check, 0) + 1
        by_oracle = check in ("reference function", "fixtures")
        found.oracle += by_oracle
        found.conform += bool(check) and not by_oracle
        why = equivalent.get(mutant.what)
        if not check and why:
            found.equivalent[mutant.what] = why
        elif not check:
            found.survivors.append(mutant.what)
            click.echo(f"{name} survives: {mutant.what}")
    return found


@click.command()
@click.argument("names", nargs=-1)
@click.option("--write", is_flag=True, help="Keep the counts in docs/mutants.json.")
def main(names: tuple[str, ...], write: bool) -> None:
    """Mutate the files of built-in losses (all that have an oracle, if no NAME is given) and count."""
    from alignzoo.plugins import discover

    known, registry = oracles(), discover()
    records = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}
    for name in names or known:
        file = sys.modules[registry.get(name).cls.__module__].__file__
        assert file is not None
        found = count(name, Path(file).read_text(encoding="utf-8"), known.get(name))
        killed = found.conform + found.oracle
        click.echo(f"{name}: {killed} of {found.mutants} killed, {found.conform} by conform; {found.checks}")
        kept = ("mutants", "conform", "oracle", "equivalent", "survivors")
        records[name] = {key: getattr(found, key) for key in kept}
        if write:  # after each: it takes a while
            RECORDS.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
