"""The part of CEL that the rules of our schemas are written in, so that they hold without an API server as well.

What a rule uses beyond this part is an error, and a test tries every rule of every kind.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

Scope = Mapping[str, Any]
Node = Callable[[Scope], Any]

_TOKENS = re.compile(
    r"""\s*(?:
        (?P<number>[0-9]+(?:\.[0-9]+)?)
      | r(?P<raw>'[^']*')
      | (?P<text>'(?:[^'\\]|\\.)*')
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<sign>\|\||&&|==|!=|<=|>=|[-+*/%<>!?:.,()\[\]])
    )""",
    re.VERBOSE,
)
_BINARY: tuple[tuple[str, ...], ...] = (
    ("||",),
    ("&&",),
    ("==", "!=", "<=", ">=", "<", ">", "in"),
    ("+", "-"),
    ("*", "/", "%"),
)
"""Operators, those that bind least first."""
_CONSTANTS = {"true": True, "false": False, "null": None, "string": str, "int": int}


class CelError(Exception):
    """An expression cannot be read, or not be evaluated for these values."""


@functools.cache
def compile_rule(text: str) -> Node:
    """A function of the variables, `self` first of all. Raises CelError."""
    parser = _Parser(text)
    node = parser.expression()
    parser.end()
    return node


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str]] = []
        place = 0
        while place < len(text.rstrip()):
            match = _TOKENS.match(text, place)
            if match is None or match.lastgroup is None:
                raise CelError(f"{text!r} cannot be read from {text[place:]!r} on")
            self._tokens.append((match.lastgroup, match[match.lastgroup]))
            place = match.end()
        self._next = 0

    def end(self) -> None:
        if self._next < len(self._tokens):
            raise CelError(f"{self._text!r}: {self._tokens[self._next][1]!r} is too much")

    def expression(self) -> Node:
        condition = self._binary(0)
        if not self._take("?"):
            return condition
        first = self.expression()
        self._need(":")
        second = self.expression()
        return lambda scope: first(scope) if condition(scope) else second(scope)

    def _binary(self, level: int) -> Node:
        if level == len(_BINARY):
            return self._unary()
        left = self._binary(level + 1)
        while (sign := self._take(*_BINARY[level])) is not None:
            left = _operation(sign, left, self._binary(level + 1))
        return left

    def _unary(self) -> Node:
        if self._take("!"):
            operand = self._unary()
            return lambda scope: not operand(scope)
        if self._take("-"):
            operand = self._unary()
            return lambda scope: -operand(scope)
        return self._member()

    def _member(self) -> Node:
        node = self._primary()
        while True:
            if self._take("."):
                name = self._name()
                node = self._method(node, name) if self._take("(") else _attribute(node, name)
            elif self._take("["):
                node = _item(node, self.expression())
                self._need("]")
            else:
                return node

    def _method(self, target: Node, name: str) -> Node:
        if name in ("all", "exists", "filter", "map"):
            variable = self._name()
            self._need(",")
            body = self.expression()
            self._need(")")
            return _comprehension(name, target, variable, body)
        arguments = self._list(")")
        match name, arguments:
            case "size", []:
                return lambda scope: len(target(scope))
            case "matches", [pattern]:
                return lambda scope: re.search(pattern(scope), target(scope)) is not None
            case "startsWith", [start]:
                return lambda scope: target(scope).startswith(start(scope))
        raise CelError(f"{self._text!r}: {name} with {len(arguments)} arguments is not known")

    def _primary(self) -> Node:
        if self._take("("):
            node = self.expression()
            self._need(")")
            return node
        if self._take("["):
            items = self._list("]")
            return lambda scope: [item(scope) for item in items]
        kind, text = self._pop()
        if kind == "number":
            number = float(text) if "." in text else int(text)
            return lambda scope: number
        if kind in ("text", "raw"):
            value = text[1:-1] if kind == "raw" else re.sub(r"\\(.)", r"\1", text[1:-1])
            return lambda scope: value
        if kind != "name":
            raise CelError(f"{self._text!r}: {text!r} is not expected")
        if self._take("("):
            return self._function(text)
        if text in _CONSTANTS:
            constant = _CONSTANTS[text]
            return lambda scope: constant
        return lambda scope: _look_up(scope, text)

    def _function(self, name: str) -> Node:
        if name == "has":
            argument = self._member_of_has()
            self._need(")")
            return argument
        arguments = self._list(")")
        if len(arguments) == 1:
            (only,) = arguments
            if name == "type":
                return lambda scope: type(only(scope))
            if name == "int":
                return lambda scope: int(only(scope))
            if name == "size":
                return lambda scope: len(only(scope))
        raise CelError(f"{self._text!r}: {name} with {len(arguments)} arguments is not known")

    def _member_of_has(self) -> Node:
        names = [self._name()]
        while self._take("."):
            names.append(self._name())
        *path, last = names

        def has(scope: Scope) -> bool:
            value = _look_up(scope, path[0])
            for name in path[1:]:
                value = _get(value, name)
            return isinstance(value, Mapping) and value.get(last) is not None

        return has

    def _list(self, end: str) -> list[Node]:
        items: list[Node] = []
        while not self._take(end):
            if items:
                self._need(",")
            items.append(self.expression())
        return items

    def _take(self, *signs: str) -> str | None:
        if self._next < len(self._tokens):
            kind, text = self._tokens[self._next]
            if text in signs and (kind == "sign" or text == "in"):
                self._next += 1
                return text
        return None

    def _need(self, sign: str) -> None:
        if self._take(sign) is None:
            raise CelError(f"{self._text!r}: {sign!r} is missing")

    def _name(self) -> str:
        kind, text = self._pop()
        if kind != "name":
            raise CelError(f"{self._text!r}: a name is expected, not {text!r}")
        return text

    def _pop(self) -> tuple[str, str]:
        if self._next == len(self._tokens):
            raise CelError(f"{self._text!r} ends too early")
        self._next += 1
        return self._tokens[self._next - 1]


def _operation(sign: str, left: Node, right: Node) -> Node:
    operations: dict[str, Node] = {
        "==": lambda scope: left(scope) == right(scope),
        "!=": lambda scope: left(scope) != right(scope),
        "<=": lambda scope: left(scope) <= right(scope),
        ">=": lambda scope: left(scope) >= right(scope),
        "<": lambda scope: left(scope) < right(scope),
        ">": lambda scope: left(scope) > right(scope),
        "in": lambda scope: left(scope) in right(scope),
        "+": lambda scope: left(scope) + right(scope),
        "-": lambda scope: left(scope) - right(scope),
        "*": lambda scope: left(scope) * right(scope),
        "/": lambda scope: left(scope) // right(scope),
        "%": lambda scope: left(scope) % right(scope),
        "&&": lambda scope: _both(left, right, scope),
        "||": lambda scope: not _both(lambda s: not left(s), lambda s: not right(s), scope),
    }
    return operations[sign]


def _both(left: Node, right: Node, scope: Scope) -> bool:
    """CEL's `&&`: one false side decides even where the other is an error."""
    try:
        first = bool(left(scope))
    except (CelError, TypeError, ValueError):
        if not right(scope):
            return False
        raise
    return first and bool(right(scope))


def _comprehension(name: str, target: Node, variable: str, body: Node) -> Node:
    def values(scope: Scope) -> list[tuple[Any, Any]]:
        return [(item, body({**scope, variable: item})) for item in target(scope)]

    match name:
        case "all":
            return lambda scope: all(value for _, value in values(scope))
        case "exists":
            return lambda scope: any(value for _, value in values(scope))
        case "filter":
            return lambda scope: [item for item, value in values(scope) if value]
    return lambda scope: [value for _, value in values(scope)]


def _attribute(node: Node, name: str) -> Node:
    return lambda scope: _get(node(scope), name)


def _item(node: Node, key: Node) -> Node:
    return lambda scope: node(scope)[key(scope)]


def _get(value: Any, name: str) -> Any:
    if not isinstance(value, Mapping) or name not in value:
        raise CelError(f"there is no {name}")
    return value[name]


def _look_up(scope: Scope, name: str) -> Any:
    if name not in scope:
        raise CelError(f"there is no variable {name}")
    return scope[name]
