"""Chat templates: Jinja programs that come with a model, run in a sandbox with limits.

Rendering must give the engine's very characters, so the environment has what transformers gives
templates (trimmed blocks, loop controls, `tojson` without HTML escapes, `raise_exception`,
`strftime_now`, `{% generation %}`). The sandbox is jinja2's immutable one, with operators that
could eat all memory in one step cut off: those no deadline can interrupt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

from dynamo_epp.tokenize.exact import NotExact

ContentFormat = Literal["string", "openai"]

_LARGEST = 1_000_000  # characters, items, or bits that one operator or filter may make
_LOOP_DEPTH = 3
_UNBOUNDED = frozenset(("range", "lipsum", "cycler", "caller"))
# Of strftime: fields of a day or longer, whose text the engine's clock gives alike.
_DATE_FIELDS = re.compile(r"%[-_0^#]?[aAbBCdDeFgGhjmuUVwWxyY%]")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: marks what the model wrote; the text stays."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_pass"), [], [], body).set_lineno(line)

    def _pass(self, caller: Callable[[], str]) -> str:
        return caller()


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The immutable sandbox, without single operations of unbounded size."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "*":
            for size, times in ((left, right), (right, left)):
                if (
                    isinstance(size, str | list | tuple | bytes)
                    and isinstance(times, int)
                    and len(size) * times > _LARGEST
                ):
                    raise NotExact("the template repeats a value too often")
        if (
            operator in ("*", "**")
            and isinstance(left, int)
            and isinstance(right, int)
            and _product_bits(operator, left, right) > _LARGEST
        ):
            raise NotExact("the template computes a number that is too large")
        if operator == "%" and isinstance(left, str) and _wide(left):
            raise NotExact("the template formats with too wide a field")
        return super().call_binop(context, operator, left, right)


def _product_bits(operator: str, left: int, right: int) -> int:
    bits = left.bit_length()
    return bits * max(right, 0) if operator == "**" else bits + right.bit_length()


def _wide(format_string: str) -> bool:
    """Whether a format string could ask for a huge field: four digits in a row or a `*` width."""
    digits = 0
    percent = False
    for character in format_string:
        if character == "%":
            percent = True
        digits = digits + 1 if character.isdigit() else 0
        if percent and (digits > 3 or character == "*"):
            return True
    return False


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    if "%" in _DATE_FIELDS.sub("", format):
        raise NotExact("the chat template prints the time of day")
    return datetime.now().strftime(format)  # local time, as in the engine


def _limited(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def limited(value: Any, *arguments: Any, **keywords: Any) -> Any:
        for argument in (*arguments, *keywords.values()):
            if isinstance(argument, int) and argument > _LARGEST:
                raise NotExact(f"the template's `{name}` asks for too much")
            if isinstance(argument, str) and name == "indent" and len(argument) > 1000:
                raise NotExact(f"the template's `{name}` asks for too much")
        if name == "format" and isinstance(value, str) and _wide(value):
            raise NotExact("the template formats with too wide a field")
        return original(value, *arguments, **keywords)

    return limited


def _environment() -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    for name in ("center", "indent", "format", "batch", "slice"):
        original = environment.filters[name]
        if not hasattr(original, "jinja_pass_arg"):
            environment.filters[name] = _limited(name, original)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template and what its syntax tree tells about it."""

    def __init__(self, source: str) -> None:
        self.source = source
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise NotExact(f"the chat template does not compile: {error}") from error
        self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree))
        self.content_format: ContentFormat = detect_content_format(tree)
        self.knows_developer = '"developer"' in source or "'developer'" in source
        self.bounded = is_bounded(tree)

    def render(self, variables: Mapping[str, Any]) -> str:
        """Run it. Raises `NotExact` where it raises: the engine refuses such a request itself."""
        try:
            return self._template.render(**variables)
        except NotExact:
            raise
        except Exception as error:
            raise NotExact(f"the chat template failed: {type(error).__name__}: {error}") from error


def is_bounded(tree: nodes.Template) -> bool:
    """Whether rendering is surely polynomial in its input, of low degree.

    True without `range`, recursion (of loops or macros), imports, and loops nested deeper than
    three, those in called macros included. Such a template can be run in place; any other gets a
    thread and a deadline.
    """
    if any(name.name in _UNBOUNDED for name in tree.find_all(nodes.Name)):
        return False
    if any(loop.recursive for loop in tree.find_all(nodes.For)):
        return False
    if next(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None):
        return False
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    return _loop_depth(tree, macros, ()) <= _LOOP_DEPTH


def _loop_depth(
    node: nodes.Node, macros: Mapping[str, nodes.Macro], within: tuple[str, ...]
) -> int:
    """Loops around the innermost statement; a mention of a macro counts as a call of it."""
    deepest = 0
    for child in node.iter_child_nodes():
        deepest = max(deepest, _loop_depth(child, macros, within))
        if deepest > _LOOP_DEPTH:
            return deepest
    if isinstance(node, nodes.Name) and node.ctx == "load" and node.name in macros:
        if node.name in within:
            return _LOOP_DEPTH + 1
        deepest = _loop_depth(macros[node.name], macros, (*within, node.name))
    return deepest + isinstance(node, nodes.For)


def detect_content_format(tree: nodes.Template) -> ContentFormat:
    """How a template reads messages' content: `openai` if it loops over its parts.

    The rule is vLLM's: follow the names that hold `messages` (assigned, filtered, sliced), the
    loop variables over those, and look for a loop over such a message's `content`, over a variable
    called `content` outside macros, or over a macro parameter that content is passed to.
    """
    try:
        return "openai" if _loops_over_content(tree) else "string"
    except _UnusualTarget:
        return "string"


class _UnusualTarget(Exception):
    """A loop or assignment unpacks into several names; vLLM gives up on those templates."""


def _loops_over_content(tree: nodes.Template) -> bool:
    lists = ["messages"]
    for held in lists:
        for assignment in tree.find_all(nodes.Assign):
            if _reads(assignment.node, held):
                target = _single_name(assignment.target)
                if target != held:
                    if len(lists) > 1000:
                        raise _UnusualTarget
                    lists.append(target)
    loops = list(tree.find_all(nodes.For))
    messages = [
        (loop, name)
        for loop, name in _named_loops(loops, lambda loop: any(_reads(loop.iter, n) for n in lists))
    ]
    names = [name for _, name in messages]
    passed: dict[int, set[str]] = {}
    inside: set[int] = set()
    for macro in tree.find_all(nodes.Macro):
        parameters = _content_parameters(tree, macro, names)
        for loop in macro.find_all(nodes.For):
            inside.add(id(loop))
            if parameters:
                passed[id(loop)] = parameters
    for loop in loops:
        over = loop.iter
        found = any(_reads(over, name, "content") for name in names)
        if not found and isinstance(over, nodes.Name):
            found = over.name in passed.get(id(loop), ()) or (
                id(loop) not in inside and over.name == "content"
            )
        if found:
            _single_name(loop.target)
            return True
    return False


def _named_loops(
    loops: Iterable[nodes.For], wanted: Callable[[nodes.For], bool]
) -> Iterator[tuple[nodes.For, str]]:
    for loop in loops:
        if wanted(loop):
            yield loop, _single_name(loop.target)


def _content_parameters(tree: nodes.Template, macro: nodes.Macro, names: list[str]) -> set[str]:
    """Parameters of ``macro`` that some call gives a message's content."""

    def content(node: nodes.Node) -> bool:
        return any(_reads(node, name, "content") for name in names)

    declared = [argument.name for argument in macro.args]
    found: set[str] = set()
    for call in tree.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        found.update(
            name for name, given in zip(declared, call.args, strict=False) if content(given)
        )
        found.update(
            keyword.key
            for keyword in call.kwargs
            if isinstance(keyword, nodes.Keyword)
            and keyword.key in declared
            and content(keyword.value)
        )
    return found


def _single_name(target: nodes.Node) -> str:
    if isinstance(target, nodes.Name):
        return target.name
    raise _UnusualTarget


def _reads(node: nodes.Node | None, name: str, key: str | None = None) -> bool:
    """Whether ``node`` is the variable (or its ``key``), perhaps filtered, tested or sliced."""
    while True:
        if isinstance(node, nodes.Filter | nodes.Test) or (
            isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        ):
            node = node.node
            continue
        if key is None:
            return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
        if isinstance(node, nodes.Getitem):
            constant = isinstance(node.arg, nodes.Const) and node.arg.value == key
            return constant and _reads_plainly(node.node, name)
        return (
            isinstance(node, nodes.Getattr) and node.attr == key and _reads_plainly(node.node, name)
        )


def _reads_plainly(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
