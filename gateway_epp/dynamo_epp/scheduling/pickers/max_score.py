"""The highest score first; chance among equals."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_kv_router.choice import Candidate, Rng

from dynamo_epp.scheduling.pickers.parameters import PickerParameters


class MaxScorePicker:
    def __init__(self, parameters: PickerParameters) -> None:
        self.limit = parameters.max_num_of_endpoints

    def order(
        self, candidates: Sequence[Candidate], totals: Sequence[float], rng: Rng, turn: int
    ) -> list[int]:
        return sorted(range(len(totals)), key=lambda at: (-totals[at], rng.random()))
