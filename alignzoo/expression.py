"""Conditions over named numbers, as `abs(margin) > 0.1 and chosen_tokens < 200`: parsed, never executed as Python."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from alignzoo.errors import AlignzooError
from alignzoo.schema import nearest

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {"abs": abs, "min": min, "max": max}


class Expression:
    """One condition. Raises AlignzooError where it is none, or names what is not there."""

    def __init__(self, text: str, names: Collection[str]) -> None:
        self.text, self.names = text, names
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise self._refused(f"cannot be read: {error.msg}") from error
        self._value(self._tree, dict.fromkeys(names, 1.0))

    def holds(self, values: Mapping[str, float]) -> bool:
        return bool(self._value(self._tree, values))

    def _refused(self, what: str) -> AlignzooError:
        return AlignzooError(
            f'"{self.text}" {what}',
            why="numbers, comparisons, and, or, not, + - * /, abs, min, max and these names: " + ", ".join(self.names),
            fix='for example "abs(margin) > 0.1"',
        )

    def _value(self, node: ast.AST, values: Mapping[str, float]) -> Any:
        match node:
            case ast.Constant(value=int() | float() as value):
                return value
            case ast.Name(id=name):
                if name not in values:
                    raise self._refused(f'names "{name}"{nearest(name, self.names)}')
                return values[name]
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](self._value(operand, values))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                try:
                    return _OPERATORS[type(op)](self._value(left, values), self._value(right, values))
                except ZeroDivisionError:
                    return float("nan")
            case ast.BoolOp(op=op, values=parts):
                held = [self._value(part, values) for part in parts]  # all of them, so that every name is looked at
                return all(held) if isinstance(op, ast.And) else any(held)
            case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _OPERATORS for op in ops):
                numbers = [self._value(part, values) for part in (left, *others)]
                pairs = zip(ops, numbers, numbers[1:], strict=False)
                return all(_OPERATORS[type(op)](a, b) for op, a, b in pairs)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and args:
                found = [self._value(part, values) for part in args]
                return _FUNCTIONS[name](*found) if name == "abs" or len(found) > 1 else found[0]
        raise self._refused("holds what is no condition over numbers")
