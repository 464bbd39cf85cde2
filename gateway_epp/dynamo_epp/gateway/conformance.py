"""The headers by which the extension's conformance suite steers a picker and looks at the outcome.

Only for test clusters: with them a client chooses its endpoint. Even then an address that is none
of the pool's is ignored, because the header is taken as a subset of the pool.
"""

from __future__ import annotations

from dataclasses import replace

from dynamo_epp.extproc import Picker, PickRequest, Refusal, Route

STEER = "test-epp-endpoint-selection"
"""Request: ``ip`` or ``ip:port``, several with commas; goes before a subset hint."""
SERVED = "x-conformance-test-served-endpoint"
"""Response: the endpoint that answered, as the gateway tells."""
ECHO = "x-echo-set-header"
"""Request: asks the suite's echo server to put a header on its response."""


class ConformancePicker:
    """``picker`` as the suite expects one."""

    def __init__(self, picker: Picker) -> None:
        self._picker = picker

    async def pick(self, request: PickRequest) -> Route | Refusal:
        steer = request.head.headers.get(STEER, "")
        wanted = tuple(part for part in map(str.strip, steer.split(",")) if part)
        if wanted:
            request = replace(request, subset=wanted)
        outcome = await self._picker.pick(request)
        if isinstance(outcome, Route) and outcome.endpoints:
            told = f"{SERVED}:{outcome.endpoints[0]}"
            outcome.set_headers = (*outcome.set_headers, (ECHO, told))
        return outcome

    def answered(self, route: Route) -> None:
        self._picker.answered(route)

    def released(self, route: Route) -> None:
        self._picker.released(route)
