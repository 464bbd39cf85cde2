"""Keeps only the worker that the request's session belongs to, while it is among the candidates."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_kv_router.choice import Candidate

from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.sessions import Sessions


class SessionAffinityFilter(Sessions):
    """Lets everybody pass if the request has no session, or its worker is not there."""

    def reasons(self, ask: Ask, candidates: Sequence[Candidate]) -> list[str]:
        place = self.place(ask, candidates)
        if place is None:
            return [""] * len(candidates)
        reasons = ["the session has another worker"] * len(candidates)
        reasons[place] = ""
        return reasons
