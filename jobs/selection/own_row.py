"""Whether an expression's value in a row follows from that row alone; plain data.

Polars has no such question that holds: `Expr.meta.is_row_separable` is true of an average. So the
expression is written out, and every part of it must be known to look at its own row alone.
"""

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

OWN_ROW_FUNCTIONS: Mapping[str, frozenset[str]] = {
    "Boolean": frozenset(
        {"IsNull", "IsNotNull", "IsFinite", "IsInfinite", "IsNan", "IsNotNan", "IsIn", "Not"}
        | {"AllHorizontal", "AnyHorizontal", "IsBetween"}
    ),
    "Sql": frozenset({"IsIn"}),
    "StringExpr": frozenset(
        {"Lowercase", "Uppercase", "StartsWith", "EndsWith", "Contains", "LenChars", "LenBytes"}
        | {"StripChars", "StripCharsStart", "StripCharsEnd", "Slice", "Head", "Tail", "Replace"}
    ),
}
"""Functions of one row's values, by the family that Polars writes them under."""
OWN_ROW_NAMES = frozenset({"Coalesce", "Abs", "Negate"})
"""Those that stand under no family."""


def is_of_own_row(expression: pl.Expr) -> bool:
    """Whether every part of it is known to look at no other row; false where that is unknown."""
    return _is_known(json.loads(expression.meta.serialize(format="json")))


def _is_known(node: Any) -> bool:
    match node:
        case {"Column": _} | {"Literal": _}:
            return True
        case {"BinaryExpr": {"left": left, "right": right}}:
            return _is_known(left) and _is_known(right)
        case {"Cast": {"expr": inner}}:
            return _is_known(inner)
        case {"Ternary": {"predicate": asked, "truthy": one, "falsy": other}}:
            return _is_known(asked) and _is_known(one) and _is_known(other)
        case {"Function": {"input": [*inputs], "function": function}}:
            return _is_own_row_function(function) and all(map(_is_known, inputs))
    return False


def _is_own_row_function(function: Any) -> bool:
    if isinstance(function, str):
        return function in OWN_ROW_NAMES
    ((family, name),) = function.items()
    if isinstance(name, dict):
        (name,) = name
    return name in OWN_ROW_FUNCTIONS.get(family, ())
