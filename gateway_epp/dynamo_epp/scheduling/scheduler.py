"""All profiles of a configuration, and what is remembered between requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynamo_kv_router.choice import Candidate, Decision, Rng

from dynamo_epp.scheduling.approximate import ApproximatePrefixes
from dynamo_epp.scheduling.ask import Ask
from dynamo_epp.scheduling.plugin import Answers, Watcher
from dynamo_epp.scheduling.profile import Profile


class Scheduler:
    """``primary`` names the profile for the worker that answers the client. Others are for the
    other parts of a divided request, such as ``prefill``."""

    def __init__(
        self,
        profiles: Mapping[str, Profile],
        primary: str,
        approximate: ApproximatePrefixes | None = None,
        *,
        reads_prompt: bool = True,
    ) -> None:
        self.profiles = profiles
        self.primary = primary
        self.reads_prompt = reads_prompt
        """Whether any plugin looks at the prompt; otherwise it need not be tokenized."""
        self._approximate = approximate or ApproximatePrefixes()
        self._watchers = {
            name: tuple(plugin for plugin in _plugins(profile) if isinstance(plugin, Watcher))
            for name, profile in profiles.items()
        }
        self._answers = {
            name: tuple(plugin for plugin in _plugins(profile) if isinstance(plugin, Answers))
            for name, profile in profiles.items()
        }

    def decide(
        self,
        ask: Ask,
        candidates: Sequence[Candidate],
        rng: Rng,
        *,
        turn: int = 0,
        profile: str = "",
    ) -> Decision:
        """Rank ``candidates`` by the profile of that name, the primary one by default.

        Raises KeyError for a profile that does not exist.
        """
        chosen = self.profiles[profile or self.primary]
        return chosen.decide(ask, candidates, self._approximate, rng, turn=turn)

    def answer_headers(self, decision: Decision) -> tuple[tuple[str, str], ...]:
        """What clients have to send back, for plugins that know them by it."""
        plugins = self._answers[decision.profile]
        return tuple(header for plugin in plugins for header in plugin.answer_headers(decision))

    def picked(self, ask: Ask, decision: Decision) -> None:
        """The request goes to the first of ``decision``: what has to be remembered is."""
        if decision.chosen is None:
            return
        for watcher in self._watchers[decision.profile]:
            watcher.picked(ask, decision)
        # An engine whose events come is not guessed at, unless the prompt could not be read.
        if ask.prefixes is not None and ask.prefixes.asked:
            ask.prefixes.sent(decision.chosen.candidate)


def _plugins(profile: Profile) -> list[object]:
    """Its filters and scorers, each once: some are both."""
    used = (*(each for _, each in profile.filters), *(each for _, _, each in profile.scorers))
    return list({id(plugin): plugin for plugin in used}.values())
