"""Asks the API server about rendered objects: created with `dryRun`, so that nothing is stored.

Creation, not server-side apply: it judges the content alone, whatever exists under the same name,
and needs no right to change anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_runtime.kubernetes import resources
from dynamo_runtime.kubernetes.client import ApiError, KubernetesClient

from dynamo_operator.admission.review import Denial
from dynamo_operator.admission.trial import Trial, circumstance, refused
from dynamo_operator.admission.wording import Wording

AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all trials together gave."""

    denials: tuple[Denial, ...] = ()
    warnings: tuple[str, ...] = ()


async def dry_run(
    client: KubernetesClient, trials: Sequence[Trial], wording: Wording, limit_s: float
) -> Outcome:
    """Try all objects at once, for at most `limit_s` seconds; what takes longer goes unchecked."""
    slots = asyncio.Semaphore(AT_ONCE)
    tasks = [asyncio.create_task(_try(client, trial, wording, slots)) for trial in trials]
    if not tasks:
        return Outcome()
    done, pending = await asyncio.wait(tasks, timeout=limit_s)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    outcomes = [task.result() for task in tasks if task in done]
    warnings = [warning for outcome in outcomes for warning in outcome.warnings]
    if pending:
        warnings.append(
            f"{len(pending)} of {len(tasks)} rendered objects were not tried within {limit_s:g} s"
        )
    return Outcome(
        tuple(denial for outcome in outcomes for denial in outcome.denials), tuple(warnings)
    )


async def _try(
    client: KubernetesClient, trial: Trial, wording: Wording, slots: asyncio.Semaphore
) -> Outcome:
    path = resources.of(trial.manifest).path(trial.manifest["metadata"]["namespace"])
    params = {"dryRun": "All", "fieldValidation": "Strict"}
    try:
        async with slots:
            await client.request("POST", path, body=trial.manifest, params=params)
    except ApiError as error:
        denials = refused(trial, error.status, error.message, error.body, wording)
        if denials:
            return Outcome(tuple(denials))
        warning = circumstance(trial, error.status, error.message)
        return Outcome(warnings=() if warning is None else (warning,))
    return Outcome()
