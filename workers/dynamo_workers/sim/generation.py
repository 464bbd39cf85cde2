"""The sequences of one request in the engine, and waiting for what they produce."""

import asyncio
from collections.abc import Sequence as Seq
from typing import Any

from dynamo_workers.sim.adapters import Adapter
from dynamo_workers.sim.answers import Answer, AnswerBook
from dynamo_workers.sim.engine import Engine
from dynamo_workers.sim.errors import RequestError
from dynamo_workers.sim.parameters import Parameters
from dynamo_workers.sim.scheduler import Sequence


class Generation:
    """One sequence for each prompt and each of its n answers, in the order of their choices."""

    def __init__(self, engine: Engine, sequences: list[Sequence], answers: list[Answer]) -> None:
        self.sequences = sequences
        self.answers = answers
        self._engine = engine
        self._changed: asyncio.Future[None] | None = None
        self._stale = False

    @classmethod
    def start(
        cls,
        engine: Engine,
        book: AnswerBook,
        prompts: Seq[list[int]],
        parameters: Parameters,
        *,
        adapter: Adapter | None = None,
        external: int = 0,
        keep_as: str = "",
    ) -> "Generation":
        """Checks the lengths and queues everything; RequestError if something does not fit.

        `external` tokens of the (only) prompt come from another engine; under `keep_as` another
        engine may fetch its blocks.
        """
        longest = engine.scheduler.limits.max_model_len
        given = parameters.max_tokens
        if given is not None and given > longest:
            raise RequestError(
                f"max_tokens={given} cannot be greater than max_model_len={longest}. "
                "Please request fewer output tokens.",
                param="max_tokens",
                value=given,
            )
        sequences, answers = [], []
        for prompt in prompts:
            check_length(prompt, longest)
            room = longest - len(prompt)
            limit = room if given is None else min(given, room)
            for index in range(parameters.n):
                answer = book.answer(
                    prompt,
                    max_tokens=limit,
                    index=index,
                    adapter="" if adapter is None else adapter.name,
                    min_tokens=parameters.min_tokens,
                    ignore_eos=parameters.ignore_eos,
                    stop=parameters.stop,
                    stop_token_ids=parameters.stop_token_ids,
                    include_stop=parameters.include_stop,
                )
                answers.append(answer)
                sequences.append(
                    Sequence(
                        prompt,
                        answer.tokens,
                        finish_reason=answer.finish_reason,
                        max_tokens=limit,
                        salt=parameters.salt,
                        adapter=adapter,
                        external=external,
                        keep_as=keep_as,
                    )
                )
        engine.metrics.answers.observe(parameters.n, len(prompts))
        return cls._submit(engine, sequences, answers)

    @classmethod
    def embed(
        cls, engine: Engine, prompts: Seq[list[int]], adapter: Adapter | None
    ) -> "Generation":
        """Queues prompts of which only the prefill is wanted."""
        for prompt in prompts:
            check_length(prompt, engine.scheduler.limits.max_model_len + 1)
        sequences = [Sequence(prompt, [], adapter=adapter) for prompt in prompts]
        return cls._submit(engine, sequences, [])

    @classmethod
    def _submit(
        cls, engine: Engine, sequences: list[Sequence], answers: list[Answer]
    ) -> "Generation":
        generation = cls(engine, sequences, answers)
        for sequence in sequences:
            sequence.on_progress = generation._notify
            engine.submit(sequence)
        return generation

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

    @property
    def produced(self) -> int:
        return sum(sequence.produced for sequence in self.sequences)

    @property
    def transfer_params(self) -> dict[str, Any] | None:
        """What leads another engine to the blocks of an ended generation, if they are kept."""
        return self.sequences[0].transfer_params

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the first sequence found in the cache."""
        return max(0, self.sequences[0].cached_tokens)

    async def changed(self) -> None:
        """Returns when there is a token more than at the last call, or something ended."""
        if not self._stale:
            self._changed = asyncio.get_running_loop().create_future()
            await self._changed
            self._changed = None
        self._stale = False

    async def wait(self) -> None:
        """Returns when every sequence has ended."""
        while not self.finished:
            await self.changed()

    def abort(self) -> None:
        """Ends what still runs, and wakes whoever waits."""
        for sequence in self.sequences:
            self._engine.abort(sequence)
        self._notify()

    def _notify(self) -> None:
        self._stale = True
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)


def check_length(prompt: list[int], longest: int) -> None:
    """Refuses a prompt that leaves no room for an answer, in vLLM's words."""
    length = len(prompt)
    if length == 0:
        raise RequestError("The decoder prompt cannot be empty")
    if length >= longest:
        raise RequestError(
            f"This model's maximum context length is {longest} tokens. However, your prompt "
            f"contains {length} input tokens, which exceeds this limit even without any output "
            "tokens. Please reduce the length of the input prompt.",
            param="input_tokens",
            value=length,
        )
