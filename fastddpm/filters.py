"""data.filter: a Python-like condition on columns, made a pyarrow expression and evaluated once into a stored index.

Only column names, literals, comparisons, in, not in, and, or, not and parentheses are understood; nothing is executed.
As in SQL, a comparison with a missing value does not hold, nor does its negation.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import ConfigError, DataError
from .library import one_line

_UNDERSTOOD = "names of columns, literals, comparisons, in, not in, and, or, not and parentheses"
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ROW = "fastddpm_row"
_SHOWN = 120  # characters of a condition in messages


class Filter:
    """A condition on rows, e.g. "label in ('cat', 'dog') and 32 <= width". Raises ConfigError naming what it is not."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._body = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise ConfigError(f"data.filter={self.shown()} is not an expression: {error.args[0]}") from error
        except (RecursionError, MemoryError) as error:
            raise self._too_deep() from error
        names: list[str] = []
        self._translated(_Translation(self, None, names))
        if not names:
            raise ConfigError(f"data.filter={self.shown()} names no column")
        self.columns = tuple(dict.fromkeys(names))

    def expression(self, features: datasets.Features, source: str) -> pc.Expression:
        """The pyarrow expression for columns of `features`; DataError for a column or a class that is not there."""
        for name in self.columns:
            if name not in features:
                columns = ", ".join(features)
                raise DataError(f"{source}: no column {name} (data.filter={self.shown()}); columns: {columns}")
            if isinstance(features[name], datasets.Image):
                raise DataError(f"{source}: column {name} holds images, which data.filter cannot compare")
        condition = self._translated(_Translation(self, features, [], source))
        nothing = datasets.Features({name: features[name] for name in self.columns}).arrow_schema.empty_table()
        try:
            rows_where(nothing, condition, 0)  # types that cannot be compared are found before anything is read
        except (pa.ArrowException, TypeError) as error:
            types = ", ".join(f"{field.name} is {field.type}" for field in nothing.schema)
            raise ConfigError(f"data.filter={self.shown()} cannot be evaluated: {one_line(error)} ({types})") from error
        return condition

    def key(self, features: datasets.Features) -> list[Any]:
        """What the rows that pass depend on besides the data: the whole condition and the columns' types and classes.

        (pyarrow's text of an expression leaves out the middle of long lists.)
        """
        columns = datasets.Features({name: features[name] for name in self.columns})
        types = [[field.name, str(field.type)] for field in columns.arrow_schema]
        return [ast.dump(self._body), types, [getattr(columns[name], "names", None) for name in self.columns]]

    def _translated(self, translation: _Translation) -> pc.Expression:
        try:
            return translation.condition(self._body)
        except (RecursionError, MemoryError) as error:
            raise self._too_deep() from error
        except (OverflowError, pa.ArrowException) as error:
            raise ConfigError(f"data.filter={self.shown()} cannot be evaluated: {one_line(error)}") from error

    def _too_deep(self) -> ConfigError:
        return ConfigError(f"data.filter={self.shown()} is too long or too deeply nested")

    def shown(self) -> str:
        """The condition, or the beginning of a long one, in quotation marks."""
        return repr(self.text if len(self.text) <= _SHOWN else self.text[: _SHOWN - 3] + "...")


class _Translation:
    """Walks the tree; without features it only checks and collects the names of columns."""

    def __init__(self, rule: Filter, features: datasets.Features | None, names: list[str], source: str = "") -> None:
        self.rule, self.features, self.names, self.source = rule, features, names, source

    def condition(self, node: ast.expr) -> pc.Expression:
        """A node that is true or false of a row."""
        match node:
            case ast.BoolOp(op=both, values=values):
                join = operator.and_ if isinstance(both, ast.And) else operator.or_
                found = self.condition(values[0])
                for value in values[1:]:
                    found = join(found, self.condition(value))
                return found
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.condition(operand)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                sides = [left, *comparators]
                found = None
                for one, op, other in zip(sides, ops, comparators, strict=False):
                    pair = self.comparison(one, op, other)
                    found = pair if found is None else found & pair
                return found
            case ast.Name(id=name):
                feature = self.feature(node)
                if feature is not None and getattr(feature, "dtype", None) != "bool":
                    raise DataError(
                        f"{self.source}: column {name} is neither true nor false: compare it with something "
                        f"(data.filter={self.rule.shown()})"
                    )
                return pc.field(name)
        raise self.not_understood(node)

    def comparison(self, one: ast.expr, op: ast.cmpop, other: ast.expr) -> pc.Expression:
        if isinstance(op, (ast.In, ast.NotIn)):
            if not isinstance(one, ast.Name):
                raise self.not_understood(one)
            if not isinstance(other, (ast.Tuple, ast.List, ast.Set)):
                raise self.not_understood(other)
            feature = self.feature(one)
            values = [self.literal(element, feature) for element in other.elts]
            try:
                array = pa.array(values, _float_type(feature) if _all_numbers(values) else None)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise ConfigError(f"data.filter: {ast.unparse(other)} mixes types") from error
            # is_in alone is false of a missing value, and its negation would hold.
            field = pc.field(one.id)
            held = pc.if_else(field.is_valid(), field.isin(array), pc.scalar(pa.scalar(None, pa.bool_())))
            return held if isinstance(op, ast.In) else ~held
        if type(op) not in _COMPARISONS:
            raise ConfigError(f"data.filter={self.rule.shown()}: is and is not are not understood, only {_UNDERSTOOD}")
        features = [self.feature(side) if isinstance(side, ast.Name) else None for side in (one, other)]
        if not any(isinstance(side, ast.Name) for side in (one, other)):
            raise self.not_understood(one if not isinstance(one, ast.Constant) else other)
        sides = (self.value(one, features[1]), self.value(other, features[0]))
        return _COMPARISONS[type(op)](*sides)

    def value(self, node: ast.expr, beside: Any) -> pc.Expression:
        if isinstance(node, ast.Name):
            return pc.field(node.id)
        value = self.literal(node, beside)
        kind = _float_type(beside)
        # In the column's own precision: in double 0.1 is equal to no float32.
        return pc.scalar(value if kind is None or not _all_numbers([value]) else pa.scalar(float(value), kind))

    def literal(self, node: ast.expr, beside: Any) -> Any:
        """The value of a literal; the name of a class, beside a column of classes, is its number."""
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            sign = -1 if isinstance(node.op, ast.USub) else 1
            node = node.operand
            if not (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
                raise self.not_understood(node)
        if not isinstance(node, ast.Constant) or not isinstance(node.value, (bool, int, float, str)):
            raise self.not_understood(node)
        if isinstance(node.value, str) and isinstance(beside, datasets.ClassLabel):
            if node.value not in (beside.names or ()):
                raise DataError(
                    f"{self.source}: no class {node.value!r} (data.filter={self.rule.shown()}); classes: "
                    f"{', '.join(beside.names or ())}"
                )
            return beside.str2int(node.value)
        return node.value if isinstance(node.value, (bool, str)) else sign * node.value

    def feature(self, node: ast.Name) -> Any:
        self.names.append(node.id)
        return self.features[node.id] if self.features is not None else None

    def not_understood(self, node: ast.AST) -> ConfigError:
        return ConfigError(f"data.filter: {ast.unparse(node)} is not understood in its place, only {_UNDERSTOOD}")


def _float_type(feature: Any) -> pa.DataType | None:
    """The Arrow type of a column of floating-point numbers; None of any other."""
    kind = feature.pa_type if isinstance(feature, datasets.Value) else None
    return kind if kind is not None and pa.types.is_floating(kind) else None


def _all_numbers(values: list[Any]) -> bool:
    return all(type(value) in (int, float) for value in values)


def rows_where(table: pa.Table, condition: pc.Expression, first: int) -> np.ndarray:
    """Numbers of the rows of `table` for which `condition` holds, int64; its first row is number `first`."""
    numbers = pa.array(np.arange(first, first + len(table), dtype=np.int64))
    return table.append_column(_ROW, numbers).filter(condition).column(_ROW).to_numpy()
