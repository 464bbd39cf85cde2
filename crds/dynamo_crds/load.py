"""Manifests from files: YAML as Kubernetes reads it, with the line of every field.

PyYAML speaks YAML 1.1, where `on` is true, `12:30` is a number and `2024-01-01` a date. Kubernetes'
tools read those as texts, so this loader resolves scalars by their rules, turns keys into texts,
finds keys given twice, and keeps the nodes so that a problem can name its line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from dynamo_crds import v1alpha1, v1beta1
from dynamo_crds.conversion import to_v1beta1
from dynamo_crds.problem import (
    Finding,
    InvalidManifest,
    Problem,
    findings,
    located,
    nearest,
    or_list,
)
from dynamo_crds.schema import Path, Resource

GROUP = v1beta1.GROUP
KINDS: dict[tuple[str, str], type[Resource]] = {
    (version.API_VERSION, kind): model
    for version in (v1beta1, v1alpha1)
    for kind, model in version.KINDS.items()
}
OUR_KINDS = tuple(v1beta1.KINDS)
FOREIGN_KINDS = (
    "DynamoCheckpoint",
    "DynamoComponent",
    "DynamoComponentDeployment",
    "DynamoGraphDeploymentRequest",
    "DynamoGraphPowerBudget",
    "DynamoModel",
    "DynamoWorkerMetadata",
    "LPXGraphDeployment",
)
"""Kinds of the same group that belong to Dynamo's own operator."""

MOST_NODES = 1_000_000
"""Values in one document after its aliases are expanded; more is taken for an attack."""


MOST_DIGITS = 64
"""Digits of an integer; Kubernetes knows 64 bits, and Python's conversion has a limit too."""

MOST_LEVELS = 200
"""Nesting of one document; composing and walking it are recursive, and libyaml would crash."""


class _Loader(yaml.CSafeLoader):
    """Composes nodes (by libyaml, ten times faster) with the scalar rules of Kubernetes' YAML."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*|0o?[0-7]+|0x[0-9a-fA-F]+|0b[01]+)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
    ("merge", r"^<<$", "<"),
):
    for _character in _first:
        _Loader.yaml_implicit_resolvers.setdefault(
            "" if _character == "\0" else _character, []
        ).append((f"tag:yaml.org,2002:{_tag}", re.compile(_pattern)))


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a file.

    `data` is JSON-like, `null` included. `problems` are mistakes of the YAML itself, such as a key
    that is given twice. `index` counts from 0.
    """

    file: str
    index: int
    data: Any
    problems: tuple[Problem, ...] = ()
    node: yaml.Node | None = field(default=None, compare=False, repr=False)
    prefix: Path = ()
    """Where `data` stands in the document, if it is an item of a `kind: List`."""

    @property
    def kind(self) -> str:
        value = self.data.get("kind") if isinstance(self.data, dict) else None
        return value if isinstance(value, str) else ""

    @property
    def api_version(self) -> str:
        value = self.data.get("apiVersion") if isinstance(self.data, dict) else None
        return value if isinstance(value, str) else ""

    @property
    def name(self) -> str:
        metadata = self.data.get("metadata") if isinstance(self.data, dict) else None
        value = metadata.get("name") if isinstance(metadata, dict) else None
        return value if isinstance(value, str) else ""

    @property
    def is_graph(self) -> bool:
        """Whether this is a DynamoGraphDeployment, of whatever version, valid or not."""
        return self.kind == "DynamoGraphDeployment"

    def line(self, path: Path) -> int | None:
        """Line of the field at `path`, or of the nearest object above it that exists."""
        return None if self.node is None else _line(self.node, self.prefix + path)

    def problem(self, finding: Finding) -> Problem:
        shifted = Finding(
            self.prefix + finding.path, finding.value, finding.expected, finding.message
        )
        return located(shifted, self.file, self.index, self.line(finding.path))


@dataclass(slots=True)
class _Construction:
    """Turns nodes into data; a node that aliases name several times is built once."""

    file: str
    index: int
    problems: list[Problem] = field(default_factory=list)
    built: dict[int, tuple[Any, int]] = field(default_factory=dict)  # id(node) -> data, size
    open: set[int] = field(default_factory=set)

    def wrong(self, node: yaml.Node, path: Path, value: Any, expected: str, message: str) -> None:
        finding = Finding(path, value, expected, message)
        self.problems.append(located(finding, self.file, self.index, _node_line(node)))

    def build(self, node: yaml.Node, path: Path) -> tuple[Any, int]:
        known = self.built.get(id(node))
        if known is not None:
            return known
        if id(node) in self.open:
            self.wrong(node, path, None, "a value that does not contain itself", "endless alias")
            return None, 1
        self.open.add(id(node))
        result = self._build(node, path)
        self.open.discard(id(node))
        if result[1] > MOST_NODES:
            self.wrong(
                node, path, None, f"at most {MOST_NODES} values", "aliases expand to too much"
            )
            result = (None, 1)
        self.built[id(node)] = result
        return result

    def _build(self, node: yaml.Node, path: Path) -> tuple[Any, int]:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            return [data for data, _ in items], 1 + sum(size for _, size in items)
        return self._scalar(node, path), 1

    def _mapping(self, node: yaml.MappingNode, path: Path) -> tuple[dict[str, Any], int]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        size = 1
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                sources, weight = self.build(value_node, path)
                size += weight
                for source in sources if isinstance(sources, list) else [sources]:
                    if isinstance(source, dict):
                        merged = {**source, **merged}
                    else:
                        self.wrong(value_node, path, source, "a mapping", "<< merges mappings")
                continue
            key = self._key(key_node, path)
            value, weight = self.build(value_node, (*path, key))
            size += weight
            if key in result:
                first = f"one {key}"
                self.wrong(key_node, (*path, key), value, first, "key given twice")
            result[key] = value
        for key, value in merged.items():
            result.setdefault(key, value)
        return result, size

    def _key(self, node: yaml.Node, path: Path) -> str:
        if not isinstance(node, yaml.ScalarNode):
            self.wrong(node, path, None, "a text", "a key must be a text")
            return "?"
        value = self._scalar(node, path)
        return value if isinstance(value, str) else json.dumps(value)

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        text = str(node.value)
        match node.tag.removeprefix("tag:yaml.org,2002:"):
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                if len(text) > MOST_DIGITS:
                    expected = f"at most {MOST_DIGITS} digits, or quotes"
                    self.wrong(node, path, text, expected, "number too long")
                    return None
                return _integer(text)
            case "float":
                number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
                if not math.isfinite(number):
                    self.wrong(node, path, text, "a finite number", "JSON has no such number")
                    return None
                return number
            case "str":
                return text
        self.wrong(node, path, node.tag, "plain YAML", "tag that Kubernetes does not know")
        return text


def _integer(text: str) -> int:
    sign = -1 if text.startswith("-") else 1
    digits = text.lstrip("+-")
    for prefix, base in (("0x", 16), ("0b", 2), ("0o", 8)):
        if digits.startswith(prefix):
            return sign * int(digits[2:], base)
    return sign * int(digits, 8 if digits.startswith("0") and len(digits) > 1 else 10)


def _node_line(node: yaml.Node) -> int | None:
    return None if node.start_mark is None else int(node.start_mark.line) + 1


def _entry(node: yaml.MappingNode, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    for key_node, value_node in node.value:
        if isinstance(key_node, yaml.ScalarNode) and key_node.value == name:
            return key_node, value_node
    for key_node, value_node in node.value:
        if key_node.tag != "tag:yaml.org,2002:merge":
            continue
        sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
        for source in sources:
            found = _entry(source, name) if isinstance(source, yaml.MappingNode) else None
            if found is not None:
                return found
    return None


def _line(node: yaml.Node, path: Path) -> int | None:
    line = _node_line(node)
    for step in path:
        if isinstance(node, yaml.MappingNode) and isinstance(step, str):
            entry = _entry(node, step)
            if entry is None:
                return line
            line, node = _node_line(entry[0]), entry[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            if not 0 <= step < len(node.value):
                return line
            node = node.value[step]
            line = _node_line(node)
        else:
            return line
    return line


def _syntax_problem(error: yaml.YAMLError, text: str, file: str, index: int) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = None if mark is None else int(mark.line) + 1
    lines = text.splitlines()
    content = lines[line - 1] if line is not None and line <= len(lines) else ""
    if "\t" in content[: len(content) - len(content.lstrip())]:
        return Problem(
            file, index, "", content.strip(), "spaces", "YAML is not indented with tabs", line
        )
    reason = getattr(error, "problem", None) or str(error).splitlines()[0]
    return Problem(file, index, "", content.strip() or None, "YAML", f"not YAML: {reason}", line)


def read_documents(text: str, file: str) -> tuple[list[Document], list[Problem]]:
    """The documents of a manifest, and what is wrong with the YAML between them.

    Empty documents are left out but counted. After a syntax error nothing more is read.
    """
    documents: list[Document] = []
    index = 0
    too_deep = _too_deep(text, file)
    if too_deep is not None:
        return [], [too_deep]
    try:
        loader = _Loader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                documents.extend(_from_node(node, file, index))
                index += 1
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        as_json = _from_json(text, file) if not documents else None
        if as_json is not None:
            return [as_json], []
        return documents, [_syntax_problem(error, text, file, index)]
    return documents, []


def _too_deep(text: str, file: str) -> Problem | None:
    depth = index = 0
    try:
        for event in yaml.parse(text, _Loader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif isinstance(event, yaml.DocumentEndEvent):
                index += 1
            if depth > MOST_LEVELS:
                mark = event.start_mark
                line = None if mark is None else int(mark.line) + 1
                expected = f"at most {MOST_LEVELS} levels"
                return Problem(file, index, "", None, expected, "nested too deep", line)
    except yaml.YAMLError:
        return None  # composing finds it too, and says it
    return None


def _from_node(node: yaml.Node | None, file: str, index: int) -> Iterator[Document]:
    if node is None:
        return
    construction = _Construction(file, index)
    data, _ = construction.build(node, ())
    if data is not None or construction.problems:
        yield from _items(Document(file, index, data, tuple(construction.problems), node))


def _from_json(text: str, file: str) -> Document | None:
    """JSON that YAML cannot read, for instance because it is indented with tabs."""
    try:
        return Document(file, 0, json.loads(text))
    except ValueError:
        return None


def _items(document: Document) -> Iterator[Document]:
    """The objects of a `kind: List`, or the document itself."""
    data = document.data
    if not (isinstance(data, dict) and data.get("kind") == "List" and "items" in data):
        yield document
        return
    items = data["items"] if isinstance(data["items"], list) else []
    for position, item in enumerate(items):
        yield Document(
            document.file,
            document.index,
            item,
            document.problems if position == 0 else (),
            document.node,
            ("items", position),
        )


def load_documents(path: FilePath | str) -> list[Document]:
    """All documents of a file.

    Raises OSError or UnicodeDecodeError if the file cannot be read, InvalidManifest if it is not
    YAML.
    """
    file = str(path)
    documents, problems = read_documents(FilePath(path).read_text(encoding="utf-8"), file)
    if problems:
        raise InvalidManifest(problems)
    return documents


def _kind_problems(document: Document) -> list[Problem]:
    data = document.data
    if not isinstance(data, dict):
        finding = Finding(
            (), data, "a mapping with apiVersion, kind, metadata and spec", "not an object"
        )
        return [document.problem(finding)]
    found: list[Finding] = []
    for name, example in (("apiVersion", v1beta1.API_VERSION), ("kind", OUR_KINDS[0])):
        value = data.get(name)
        if not isinstance(value, str) or not value:
            found.append(Finding((name,), value, f"a text such as {example}", "missing"))
    if not found and document.kind not in FOREIGN_KINDS:
        found.extend(_misspelt(document))
    return [document.problem(finding) for finding in found]


def _misspelt(document: Document) -> Iterator[Finding]:
    versions = sorted({version for version, _ in KINDS}, reverse=True)
    if document.kind in OUR_KINDS:
        if document.api_version not in versions:
            guess = nearest(document.api_version, versions)
            hint = f" (did you mean {guess}?)" if guess else ""
            yield Finding(
                ("apiVersion",),
                document.api_version,
                or_list(versions) + hint,
                f"{document.kind} has no such version",
            )
    elif document.api_version.partition("/")[0] == GROUP:
        guess = nearest(document.kind, [*OUR_KINDS, *FOREIGN_KINDS])
        if guess in OUR_KINDS:
            yield Finding(("kind",), document.kind, str(guess), "unknown kind")


def is_ours(document: Document) -> bool:
    """Whether the document is one of this platform's kinds (or plainly meant to be)."""
    return (document.api_version, document.kind) in KINDS or bool(_kind_problems(document))


def check(document: Document) -> list[Problem]:
    """Everything that is wrong with one document; foreign kinds are not looked into."""
    problems = _kind_problems(document)
    if problems:
        return [*document.problems, *problems]
    model = KINDS.get((document.api_version, document.kind))
    if model is None:
        return []
    found = [document.problem(finding) for finding in findings(model, document.data)]
    return [*document.problems, *sorted(found, key=lambda problem: problem.line or 0)]


def parse(document: Document) -> Resource:
    """The document as the model of its own version.

    Raises InvalidManifest if it is of a foreign kind or wrong.
    """
    problems = check(document)
    model = KINDS.get((document.api_version, document.kind))
    if model is None and not problems:
        expected = or_list(OUR_KINDS)
        problems = [document.problem(Finding(("kind",), document.kind, expected, "foreign kind"))]
    if problems or model is None:
        raise InvalidManifest(problems)
    return model.model_validate(document.data, by_alias=True, by_name=False)


def parse_graph(document: Document) -> v1beta1.DynamoGraphDeployment:
    """A DynamoGraphDeployment of either version, in v1beta1's form.

    Raises InvalidManifest if the document is something else or wrong.
    """
    resource = parse(document)
    if isinstance(resource, v1alpha1.DynamoGraphDeployment):
        return to_v1beta1(resource)
    if isinstance(resource, v1beta1.DynamoGraphDeployment):
        return resource
    expected = "DynamoGraphDeployment"
    finding = Finding(("kind",), document.kind, expected, "not a graph")
    raise InvalidManifest([document.problem(finding)])


def load_graphs(path: FilePath | str) -> list[v1beta1.DynamoGraphDeployment]:
    """All graphs of a file, in v1beta1's form; raises as `load_documents` and `parse_graph`."""
    return [parse_graph(document) for document in load_documents(path) if document.is_graph]
