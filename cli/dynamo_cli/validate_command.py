"""`dynamo validate`: says of manifests whether they are in order, and of mistakes what they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from dynamo_crds.load import read_documents
from dynamo_crds.problem import InvalidManifest, Problem, nearest, show_value
from dynamo_crds.validate import Report, validate_text
from rich.console import Console
from rich.text import Text

EXIT_MISTAKES = 1
EXIT_UNREADABLE = 2


class Unreadable(Exception):
    """A file that cannot be read; the message says why and what to do."""


def manifests(argument: Path) -> Iterator[Path]:
    """The files that an argument names: itself, or the manifests in a directory (not deeper).

    Raises Unreadable.
    """
    if str(argument) == "-" or argument.is_file():
        yield argument
    elif argument.is_dir():
        found = sorted(p for p in argument.iterdir() if p.suffix in (".yaml", ".yml"))
        if not found:
            raise Unreadable(f"{argument}: no *.yaml or *.yml in this directory")
        yield from found
    else:
        raise Unreadable(_no_such_file(argument))


def _no_such_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such file, and no directory {path.parent}"
    guess = nearest(path.name, (p.name for p in path.parent.iterdir()), cutoff=0.75)
    return f"{path}: no such file" + (f"; did you mean {path.parent / guess}?" if guess else "")


def read(path: Path) -> tuple[str, str]:
    """A manifest's text and the name to show for it; `-` is standard input.

    Raises Unreadable.
    """
    name = "<stdin>" if str(path) == "-" else str(path)
    try:
        if str(path) == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig"), name
        return path.read_text(encoding="utf-8-sig"), name
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"{name}: not a text in UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise Unreadable(f"{name}: {error.strerror or error}") from error


def checked(text: str, name: str) -> Report:
    """What is found in a manifest. Configurations of the picker are loaded as the picker would."""
    report = validate_text(text, name)
    if "EndpointPickerConfig" not in text:
        return report
    try:  # the picker's packages need not be there
        from dynamo_epp.config import KIND, load_document
    except ImportError:
        return report
    for document in read_documents(text, name)[0]:
        if document.kind != KIND or document.problems:
            continue
        note = f"not checked: kind {KIND} ({document.api_version}) {document.name}".rstrip()
        if note in report.notes:
            report.notes.remove(note)
        try:
            report.notes.extend(load_document(document).notes)
            report.checked.append(KIND)
        except InvalidManifest as invalid:
            report.problems.extend(invalid.problems)
    return report


def _show(report: Report, console: Console) -> None:
    if report.ok:
        what = ", ".join(report.checked) if report.checked else "nothing of ours in it"
        console.print(Text.assemble(("ok     ", "green"), f"{report.file}: {what}"))
    else:
        count = len(report.problems)
        mistakes = "1 mistake" if count == 1 else f"{count} mistakes"
        console.print(Text.assemble(("wrong  ", "bold red"), f"{report.file}: {mistakes}"))
        for problem in report.problems:
            _show_problem(problem, console)
    for note in report.notes:
        console.print(Text.assemble(("  note ", "yellow"), note))


def _show_problem(problem: Problem, console: Console) -> None:
    where = [f"line {problem.line}"] if problem.line is not None else []
    if problem.document:
        where.append(f"document {problem.document + 1}")
    place = f" ({', '.join(where)})" if where else ""
    head = f"{problem.path}: {problem.message}" if problem.path else problem.message
    console.print(Text.assemble("  ", (head, "bold"), place))
    found = "nothing" if problem.value is None else show_value(problem.value)
    console.print(Text(f"      found     {found}"))
    console.print(Text(f"      expected  {problem.expected}"))


def validate(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Manifests, directories with *.yaml and *.yml, or - for standard input.",
            metavar="FILE…",
        ),
    ],
) -> None:
    """Check manifests and explain every mistake: field, value, what would be right.

    An EndpointPickerConfig is read as `dynamo epp --config-file` would. Kinds that are not this
    platform's pass with a note. Exit status: 0 all in order, 1 mistakes,
    2 a file cannot be read.

    Examples:

      dynamo validate graph.yaml

      dynamo validate examples/

      kubectl get dgd my-graph -o yaml | dynamo validate -
    """
    console = Console(highlight=False, soft_wrap=True)
    status = 0
    for argument in files:
        try:
            for path in manifests(argument):
                report = checked(*read(path))
                _show(report, console)
                if not report.ok:
                    status = max(status, EXIT_MISTAKES)
        except Unreadable as error:
            Console(stderr=True, highlight=False, soft_wrap=True).print(Text(str(error)))
            status = EXIT_UNREADABLE
    raise typer.Exit(status)
