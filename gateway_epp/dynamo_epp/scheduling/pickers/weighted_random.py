"""At random, with scores as weights: the better, the more often."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dynamo_kv_router.choice import Candidate, Rng

from dynamo_epp.scheduling.pickers.parameters import PickerParameters


class WeightedRandomPicker:
    """An order drawn without replacement: descending by ``u^(1 / score)``, ``u`` uniform in (0, 1)
    (Efraimidis and Spirakis 2006, A-Res). Who scores 0 comes last; where all do, all are alike."""

    def __init__(self, parameters: PickerParameters) -> None:
        self.limit = parameters.max_num_of_endpoints

    def order(
        self, candidates: Sequence[Candidate], totals: Sequence[float], rng: Rng, turn: int
    ) -> list[int]:
        # In logarithms, where small scores stay apart.
        keys = [
            (0, math.log(max(draw, 5e-324)) / total) if total > 0 else (-1, draw)
            for total, draw in ((total, rng.random()) for total in totals)
        ]
        return sorted(range(len(totals)), key=keys.__getitem__, reverse=True)
