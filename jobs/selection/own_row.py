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
    "Sql": frozenset({"IsIn", "Binary", "Round", "ToFloat"}),
    "Pow": frozenset({"Generic", "Sqrt", "Cbrt"}),
    "Trigonometry": frozenset({"Sin", "Cos", "Tan", "ArcSin", "ArcCos", "ArcTan", "Degrees"}),
    "StringExpr": frozenset(
        {"Lowercase", "Uppercase", "Titlecase", "Reverse", "ConcatHorizontal", "Replace"}
        | {"StartsWith", "EndsWith", "Contains", "Find", "LenChars", "LenBytes", "CountMatches"}
        | {"StripChars", "StripCharsStart", "StripCharsEnd", "Slice", "Head", "Tail", "Split"}
    ),
    "StructExpr": frozenset({"FieldByName"}),
    "ListExpr": frozenset({"Contains", "Length", "Get", "Min", "Max", "Sum", "Mean"}),
    "TemporalExpr": frozenset(
        {"Millennium", "Century", "Year", "IsoYear", "Quarter", "Month", "Week", "WeekDay", "Day"}
        | {"OrdinalDay", "Hour", "Minute", "Second", "Millisecond", "Microsecond", "Nanosecond"}
        | {"Date", "Time", "ToString"}
    ),
}
"""Functions of one row's values, by the family that Polars writes them under."""
OWN_ROW_NAMES = frozenset(
    {"Coalesce", "Abs", "Negate", "Sign", "Floor", "Ceil", "Log", "Log1p", "Exp"}
    | {"FillNull", "MaxHorizontal", "MinHorizontal"}
)
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
        # Its name with its options, or no family at all, whose options these are.
        name = next(iter(name), None)
    return name in OWN_ROW_FUNCTIONS.get(family, ())
