"""What the scheduler says about a pod that fits on no node, condensed to what people look for.

The scheduler counts the nodes by reason ("0/4 nodes are available: 1 node(s) had untolerated taint
{…}, 3 Insufficient nvidia.com/gpu. preemption: …"). For GPUs, and for everything else that there
is too little of, the first words are to say of what: "0/4 nodes have 8 free nvidia.com/gpu: …".
"""

import re
from collections.abc import Mapping
from typing import Any

from dynamo_crds.schema import is_quantity, quantity_number

from dynamo_operator.diagnosis.fields import at, items
from dynamo_operator.diagnosis.wording import one_line

_HEAD = re.compile(r"(\d+)/(\d+) nodes are available(?:: (.*))?")
_PREEMPTION = re.compile(r"\.? (?:no new claims to deallocate, )?preemption: .*")
_INSUFFICIENT = re.compile(r"(\d+) Insufficient (\S+)")


def unschedulable(message: str, pod: Mapping[str, Any]) -> str:
    """The scheduler's `message` about `pod`, condensed; as it is if it has another form."""
    text = _PREEMPTION.sub("", one_line(message)).rstrip(". ")
    match = _HEAD.fullmatch(text)
    if match is None:
        return text or "no node is found"
    free, total, why = match[1], match[2], match[3] or ""
    if total == "0":
        return "the cluster has no node"
    reasons = why.split(", ")
    short = {m[2]: m[1] for reason in reasons if (m := _INSUFFICIENT.fullmatch(reason))}
    if not short:
        return f"{free}/{total} nodes fit: {why}" if why else f"{free}/{total} nodes fit"
    # A device (vendor/name) is scarcer than cpu and memory, and more telling.
    resource = min(short, key=lambda name: ("/" not in name, name))
    head = f"{free}/{total} nodes have {_asked(pod, resource)}"
    if len(reasons) == 1 and short[resource] == total:
        return f"{head}; free some or add nodes"
    return f"{head}: {why}"


def _asked(pod: Mapping[str, Any], resource: str) -> str:
    """ "a free nvidia.com/gpu", "8 free nvidia.com/gpu", "enough free memory (16Gi asked)"."""
    amounts = [
        amount
        for container in items(pod, "spec", "containers")
        if is_quantity(amount := _request(container, resource))
    ]
    if "/" in resource:
        total = sum(quantity_number(amount) for amount in amounts)
        return f"{total:g} free {resource}" if total > 1 else f"a free {resource}"
    asked = f" ({' + '.join(map(str, amounts))} asked)" if amounts else ""
    return f"enough free {resource}{asked}"


def _request(container: Mapping[str, Any], resource: str) -> Any:
    asked = at(container, "resources", "requests", resource)
    return at(container, "resources", "limits", resource) if asked is None else asked
