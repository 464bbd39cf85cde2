"""Options for graphs with prefill and decode workers, which every command that picks has in common.

Each alias is one option; `pairing` makes settings of their values.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dynamo_epp.scheduling.disagg import DisaggPolicy

EnforceDisagg = Annotated[
    bool,
    typer.Option(
        envvar="DYN_ENFORCE_DISAGG",
        help="Prefill and decode workers: 503 for a request whose prompt no prefill worker can "
        "compute. Without, its decode worker does both.",
    ),
]
ConditionalDisagg = Annotated[
    bool,
    typer.Option(
        "--router-conditional-disagg",
        envvar="DYN_ROUTER_CONDITIONAL_DISAGG",
        help="Prefill and decode workers: a decode worker that caches most of a prompt computes "
        "the rest itself.",
    ),
]
ConditionalDisaggConfig = Annotated[
    str,
    typer.Option(
        "--router-conditional-disagg-config",
        envvar="DYN_ROUTER_CONDITIONAL_DISAGG_CONFIG",
        help='JSON: {"eff_isl_threshold": 2048, "eff_isl_ratio_threshold": 0.7}, the uncached '
        "tokens and share of a prompt from which on a prefill worker computes it.",
    ),
]


def pairing(*, enforce: bool, conditional: bool, config: str) -> tuple[DisaggPolicy, bytes | None]:
    """The policy, and the graph's secret from the environment (None if there is none). Raises
    ``ValueError``: which option or variable, and what would be right."""
    from dynamo_epp.scheduling.disagg import DisaggPolicy
    from dynamo_runtime.prefill_grant import read_secret

    policy = DisaggPolicy.read(enforce=enforce, conditional=conditional, config=config)
    return policy, read_secret(os.environ)
