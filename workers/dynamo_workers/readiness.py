"""When a worker may get traffic: when it is routable, not merely when its engine answers.

A pod that turns ready before any picker knows its cache and load lets a rollout go on and remove
the pods that pickers do know. So the first picker's subscription opens it. The opening is sticky:
a picker that restarts must not close every worker. And it has a time limit: a picker that never
comes must not hold a rollout for ever, but then it is said why.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reason`` is why not, or for a ready worker what is wrong all the same (``""``: nothing)."""

    ready: bool
    reason: str
    without_picker: bool = False


def judge(
    unhealthy: str, *, picker_seen: bool, healthy_for_s: float, without_picker_s: float
) -> Verdict:
    """Is the worker ready?

    ``unhealthy``: why the engine can't serve, ``""`` if it can. ``picker_seen``: a picker has
    subscribed since this process began. ``healthy_for_s``: since the engine first was healthy.
    """
    if unhealthy:
        return Verdict(False, unhealthy)
    if picker_seen:
        return Verdict(True, "")
    if healthy_for_s >= without_picker_s:
        reason = f"no picker subscribed within {without_picker_s:g} s; open without one"
        return Verdict(True, reason, without_picker=True)
    return Verdict(
        False, f"waiting for a picker to subscribe; opens without one after {without_picker_s:g} s"
    )
