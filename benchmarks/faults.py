"""Small faults that fit into a source file; benchmarks/mutants.py puts them in, one at a time.

A comparison turned, `and` for `or`, plus for minus, a constant moved, a condition negated, a
statement dropped, a result emptied. Annotations, decorators, docstrings, messages, log lines and
what stands in `raise` are left alone: nobody's tests should hold those word by word.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TURNED: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
}
OTHER_CALL = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault: the text from `start` to `stop` (bytes of the file) becomes `became`."""

    path: str
    line: int
    lines: tuple[int, ...]  # those of its statement, as coverage may name any of them
    start: int
    stop: int
    was: str
    became: str


def mutants_of(path: str, text: str) -> list[Mutant]:
    """Every fault that fits into the file, in the order of its lines."""
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, statement, replacement in _faults(ast.parse(text), ast.Pass(lineno=0, end_lineno=0)):
        lines = set(range(node.lineno, node.end_lineno + 1)) | {statement.lineno}
        if not hasattr(statement, "body"):
            lines |= set(range(statement.lineno, statement.end_lineno + 1))
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        was = text.encode()[start:stop].decode()
        found.append(Mutant(path, node.lineno, tuple(sorted(lines)), start, stop, was, replacement))
    return sorted(set(found), key=lambda mutant: (mutant.start, mutant.stop, mutant.became))


def _faults(node: ast.AST, statement: Any) -> Iterator[tuple[Any, Any, str]]:
    """Node, the statement that it is part of, what stands there instead."""
    if isinstance(node, ast.stmt):
        statement = node
    for part, replacement in _faults_at(node):
        yield part, statement, replacement
    for child in _mutable_children(node):
        yield from _faults(child, statement)


def _mutable_children(node: ast.AST) -> Iterator[ast.AST]:
    """Parts that may hold a fault: no annotations, decorators, docstrings, messages."""
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Call) and _says_something(node):
        return
    left_alone = {"annotation", "returns", "decorator_list", "bases", "type_comment"}
    for name, value in ast.iter_fields(node):
        if name in left_alone:
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST):
                yield item


def _faults_at(node: ast.AST) -> Iterator[tuple[Any, str]]:
    match node:
        case ast.Compare(ops=[operator]):
            for other in TURNED.get(type(operator), ()):
                yield node, _unparsed(node, ops=[other()])
        case ast.BoolOp(op=operator) | ast.BinOp(op=operator):
            if not _joins_texts(node):
                for other in TURNED.get(type(operator), ()):
                    yield node, _unparsed(node, op=other())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value)):
            yield node, str(value + 1)
        case ast.Constant(value=float(value)):
            yield node, repr(value * 1.25 if value else 1.0)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield test, f"(not ({ast.unparse(test)}))"
        case ast.comprehension(ifs=conditions):
            for condition in conditions:
                yield condition, f"(not ({ast.unparse(condition)}))"
        case ast.Raise() | ast.AugAssign():
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "pass"
        case ast.Expr(value=(ast.Call() | ast.Await()) as call):
            if not (isinstance(call, ast.Call) and _says_something(call)):
                yield node, "pass"
        case ast.Return(value=value) if value is not None:
            if not (isinstance(value, ast.Constant) and value.value is None):
                yield node, "return None"
        case ast.Break():
            yield node, "continue"
        case ast.Continue():
            yield node, "break"
        case ast.Call(func=ast.Name(id=name)) if name in OTHER_CALL:
            yield node.func, OTHER_CALL[name]


def _unparsed(node: Any, **changed: Any) -> str:
    fields = {name: getattr(node, name) for name in node._fields}
    return f"({ast.unparse(type(node)(**{**fields, **changed}))})"


def _joins_texts(node: ast.AST) -> bool:
    """Whether an operand is a text (`"a" + b`) or the operation unites types (`int | None`)."""
    parts = [node.left, node.right] if isinstance(node, ast.BinOp) else []
    return any(
        isinstance(part, ast.JoinedStr)
        or (isinstance(part, ast.Constant) and (part.value is None or isinstance(part.value, str)))
        or (isinstance(part, ast.Name) and (part.id[:1].isupper() and not part.id.isupper()))
        or (isinstance(part, ast.Name) and part.id in {"str", "int", "float", "bytes", "bool"})
        for part in parts
    )


def _says_something(call: ast.Call) -> bool:
    names = [node.id for node in ast.walk(call.func) if isinstance(node, ast.Name)]
    return bool({"log", "warnings", "print", "logger", "_LOG"} & set(names))
