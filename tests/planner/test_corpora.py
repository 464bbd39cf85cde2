"""Configurations of Dynamo's own graphs: each is taken, or refused with a reason."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from dynamo_planner.config import given_config

REFUSED = ("only the metrics of vLLM", "power is not watched")


def configurations() -> list[tuple[str, str]]:
    """(file, text) of every inline planner configuration."""
    folder = os.environ.get("CORPORA")
    if not folder:
        pytest.skip("CORPORA is not set: it names the folder with real manifests")
    found = []
    for path in sorted((Path(folder) / "manifests").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            found += [(path.name, text) for text in _after_config(document)]
    return found


def _after_config(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _after_config(item)]
    if not isinstance(value, list):
        return []
    strings = [item for item in value if isinstance(item, str)]
    here = [
        text for flag, text in pairwise(strings) if flag == "--config" and '"environment"' in text
    ]
    return here + [text for item in value for text in _after_config(item)]


def test_dynamos_configurations_are_taken_or_refused_with_a_reason() -> None:
    refused = {}
    given = configurations()
    for name, text in given:
        try:
            given_config(text)
        except ValueError as error:
            refused[name] = str(error)
    assert len(given) - len(refused) >= 2
    for name, why in refused.items():
        assert any(reason in why for reason in REFUSED), (name, why)
