"""Rendering: a graph becomes Kubernetes manifests, by a pure function.

It serves the operator, `dynamo render`, the local runner and golden tests alike. No module here
does I/O, reads a clock or knows a cluster.
"""

from dynamo_operator.render.graph import (
    Manifest,
    Rendered,
    RenderedComponent,
    render,
    render_with_notes,
)
from dynamo_operator.render.inputs import template_inputs, whole_inputs
from dynamo_operator.render.notes import Note
from dynamo_operator.render.overrides import Kept, Scale
from dynamo_operator.render.platform import Platform

__all__ = [
    "Kept",
    "Manifest",
    "Note",
    "Platform",
    "Rendered",
    "RenderedComponent",
    "Scale",
    "render",
    "render_with_notes",
    "template_inputs",
    "whole_inputs",
]
