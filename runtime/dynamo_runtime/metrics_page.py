"""Samples out of a Prometheus page, for those who want few of many.

A full parser costs milliseconds on vLLM's thousands of lines, once a second and for each worker;
the lines of interest begin with known names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
"""One label in the label text of a sample: name and value."""


def samples(page: str, names: Iterable[str]) -> Iterator[tuple[str, str, float]]:
    """(name, label text, value) of each sample of ``names``. Raises ValueError for no number."""
    wanted = set(names)
    for line in page.splitlines():
        if line.startswith("#"):
            continue
        head, labelled, rest = line.rpartition("}")
        if labelled:
            name, _, labels = head.partition("{")
        else:
            name, _, rest = line.partition(" ")
            labels = ""
        if name in wanted:
            yield name, labels, float(rest.split(maxsplit=1)[0])  # a time stamp may follow
