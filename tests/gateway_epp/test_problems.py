"""What people are told of a picker's problems: what lasts, once, and when it is over."""

from __future__ import annotations

import logging

import pytest
from dynamo_epp.endpoints.worker import Worker
from dynamo_epp.events import EventPoster
from dynamo_epp.problems import AGAIN_S, LASTING_S, RESOLVED, Notice, Told, problems
from dynamo_kv_router.load import WorkerLoad
from dynamo_runtime.endpoint import Endpoint
from dynamo_runtime.kubernetes.access import Access
from dynamo_runtime.kubernetes.client import KubernetesClient
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.kube_api import failure, serving


def worker(number: int, *, ready: bool = True, known: bool = True) -> Worker:
    endpoint = Endpoint(name=f"pod-{number}", address=f"10.0.0.{number}", port=8000, ready=ready)
    made = Worker(endpoint, number, WorkerLoad(block_size=1, confirms=False))
    if known:
        made.live, made.exact, made.problem = True, True, ""
    return made


def found(*workers: Worker, **more: object) -> dict[str, str]:
    given = {"differing": (), "missing": (), "by_cache": True} | more
    return problems(workers, **given)  # type: ignore[arg-type]


def test_all_is_well() -> None:
    assert found(worker(1), worker(2), worker(3, ready=False, known=False)) == {}


def test_what_is_wrong_is_named_and_counted() -> None:
    workers = [worker(number, known=number > 5) for number in range(1, 9)]
    workers[6].circuit = "circuit open: 5 failures in a row (503)"
    workers[7].load_problem = "no answer within 2 s"
    assert found(*workers, differing=["m, chat: 5 predicted, 6 reported"], missing=["404"]) == {
        "TokensDiffer": "m, chat: 5 predicted, 6 reported. such requests are routed by load",
        "TokenizerMissing": "404. requests are routed by load",
        "CacheUnknown": "5 of 8 workers: pod-1, pod-2, pod-3, … (not heard of yet). "
        "their caches count in part or not at all",
        "LoadUnknown": "1 of 8 workers: pod-8 (no answer within 2 s). "
        "their load is what this picker sent them",
        "CircuitOpen": "1 of 8 workers: pod-7 (circuit open: 5 failures in a row (503)). "
        "they get no requests until a probe succeeds",
    }


def test_caches_are_no_problem_where_they_do_not_count() -> None:
    assert found(worker(1, known=False), by_cache=False) == {}


def test_a_problem_is_told_once_it_lasts_and_once_it_is_over() -> None:
    told, problem = Told(), {"CacheUnknown": "1 of 1 workers: a (no answer)"}
    assert told.news(problem, 0.0) == []
    assert told.news(problem, LASTING_S - 1) == []
    assert told.news(problem, LASTING_S) == [
        Notice("Warning", "CacheUnknown", problem["CacheUnknown"])
    ]
    assert told.news(problem, 5 * AGAIN_S) == []
    assert told.news({}, 5 * AGAIN_S + 1) == [
        Notice("Normal", "CacheKnown", f"over after {5 * AGAIN_S + 1:.0f} s")
    ]


def test_what_is_over_before_it_was_told_is_not_told_at_all() -> None:
    told = Told()
    assert told.news({"CircuitOpen": "x"}, 0.0) == []
    assert told.news({}, LASTING_S + 1) == []
    assert told.news({"CircuitOpen": "x"}, LASTING_S + 2) == []


@given(
    st.lists(
        st.tuples(st.sets(st.sampled_from(sorted(RESOLVED))), st.floats(0.1, 300)), max_size=60
    )
)
def test_warnings_and_their_ends_take_turns_and_are_rare(
    steps: list[tuple[set[str], float]],
) -> None:
    told, now = Told(), 0.0
    open_since: dict[str, float] = {}
    last_warned: dict[str, float] = {}
    for reasons, step in steps:
        now += step
        for notice in told.news(dict.fromkeys(reasons, "x"), now):
            if notice.kind == "Warning":
                assert notice.reason in reasons
                assert notice.reason not in open_since
                assert now - last_warned.get(notice.reason, -AGAIN_S) >= AGAIN_S
                open_since[notice.reason] = last_warned[notice.reason] = now
            else:
                (reason,) = (r for r, end in RESOLVED.items() if end == notice.reason)
                assert reason not in reasons
                del open_since[reason]
    assert set(open_since) <= (steps[-1][0] if steps else set())


POOL = {
    "apiVersion": "inference.networking.k8s.io/v1",
    "kind": "InferencePool",
    "metadata": {"name": "vllm", "namespace": "ns"},
}
POOLS = "/apis/inference.networking.k8s.io/v1/inferencepools"
EVENTS = "/api/v1/events"


async def test_an_event_is_about_the_pool() -> None:
    async with serving() as api, KubernetesClient(Access(api.url), user_agent="t") as client:
        pool = api.put(POOLS, POOL)
        poster = EventPoster(client, ("ns", "inference.networking.k8s.io", "vllm"))
        await poster.post(Notice("Warning", "CacheUnknown", "m" * 2000))
    (event,) = (item for key, item in api.objects.items() if key[0] == EVENTS)
    assert event["involvedObject"]["uid"] == pool["metadata"]["uid"]
    assert (event["type"], event["reason"]) == ("Warning", "CacheUnknown")
    assert len(event["message"]) == 1024


async def test_without_the_right_it_is_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("POD_NAME", "picker-1")
    caplog.set_level(logging.WARNING)
    async with serving() as api, KubernetesClient(Access(api.url), user_agent="t") as client:
        metadata = {"name": "picker-1", "namespace": client.namespace}
        api.put("/api/v1/pods", {"apiVersion": "v1", "kind": "Pod", "metadata": metadata})
        poster = EventPoster(client, None)
        for _ in range(2):
            # The pod may be read.
            api.failures += [lambda _: None, lambda _: failure(403, "Forbidden", "forbidden")]
            await poster.post(Notice("Warning", "CircuitOpen", "x"))
        assert [record.getMessage() for record in caplog.records] == [
            "event CircuitOpen not posted: forbidden (403 Forbidden)"
        ]
        await poster.post(Notice("Normal", "CircuitClosed", "x"))
    (event,) = (item for key, item in api.objects.items() if key[0] == EVENTS)
    assert event["involvedObject"]["name"] == "picker-1"
