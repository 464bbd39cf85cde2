"""Probes with Kubernetes' semantics: when to ask, and what a run of answers means.

Pure: the clock is an argument, asking is somebody else's job (``asking``). Rules, from the
Kubernetes documentation "Configure Liveness, Readiness and Startup Probes":

- a startup probe holds back the other two until it has succeeded once;
- initial results: alive, not ready, not started; no probe means alive, ready, started;
- a result changes after ``success``/``failure`` equal answers in a row;
- "while a container is not Ready, the readiness probe may be executed at times other than the
  configured period, to make the Pod ready faster": used here, once a second. A startup probe is
  asked as often, but there a failure counts only at its period, so that the time a program gets
  to start (``failureThreshold`` × ``periodSeconds``) is exactly Kubernetes'.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EAGER_S = 1.0  # how often a container that isn't started or ready yet is asked at most


class Kind(enum.Enum):
    STARTUP = "startup"
    LIVENESS = "liveness"
    READINESS = "readiness"


class InvalidProbe(Exception):
    """A probe that Kubernetes would refuse; the message names the field."""


@dataclass(frozen=True, slots=True)
class HttpGet:
    port: int
    path: str = "/"
    host: str = ""  # "": the pod's address
    scheme: str = "HTTP"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class TcpSocket:
    port: int
    host: str = ""


@dataclass(frozen=True, slots=True)
class Grpc:
    port: int
    service: str = ""


@dataclass(frozen=True, slots=True)
class Exec:
    command: tuple[str, ...]


Action = HttpGet | TcpSocket | Grpc | Exec


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe of a container. Times in seconds; defaults are Kubernetes'."""

    kind: Kind
    action: Action
    initial_delay: float = 0.0
    period: float = 10.0
    timeout: float = 1.0
    success: int = 1
    failure: int = 3
    grace: float | None = None  # terminationGracePeriodSeconds of the probe itself


def parse_action(raw: Mapping[str, Any], ports: Mapping[str, int], where: str) -> Action | None:
    """The action of a probe or hook; ``None`` if it has none. ``ports``: those with names."""

    def port_of(value: Any) -> int:
        if isinstance(value, str) and value in ports:
            return ports[value]
        try:
            number = int(value)
        except (TypeError, ValueError):
            named = ", ".join(sorted(ports)) or "none"
            raise InvalidProbe(
                f"{where}: port {value!r} is neither a number nor a port of the container ({named})"
            ) from None
        if not 0 < number < 65536:
            raise InvalidProbe(f"{where}: port {number} is not between 1 and 65535")
        return number

    if (http := raw.get("httpGet")) is not None:
        headers = tuple((str(h["name"]), str(h["value"])) for h in http.get("httpHeaders") or ())
        path = str(http.get("path") or "/")
        return HttpGet(
            port=port_of(http.get("port")),
            path=path if path.startswith("/") else f"/{path}",
            host=str(http.get("host") or ""),
            scheme=str(http.get("scheme") or "HTTP").upper(),
            headers=headers,
        )
    if (tcp := raw.get("tcpSocket")) is not None:
        return TcpSocket(port=port_of(tcp.get("port")), host=str(tcp.get("host") or ""))
    if (grpc := raw.get("grpc")) is not None:
        return Grpc(port=port_of(grpc.get("port")), service=str(grpc.get("service") or ""))
    if (run := raw.get("exec")) is not None:
        command = tuple(str(part) for part in run.get("command") or ())
        if not command:
            raise InvalidProbe(f"{where}: exec.command is empty")
        return Exec(command)
    return None


def parse_probe(kind: Kind, raw: Mapping[str, Any], ports: Mapping[str, int], where: str) -> Probe:
    """A probe from its manifest. ``where`` opens every error message."""
    action = parse_action(raw, ports, where)
    if action is None:
        raise InvalidProbe(f"{where}: needs one of httpGet, tcpSocket, grpc, exec")

    def number(name: str, default: int, least: int) -> int:
        value = raw.get(name)
        # 0 stands for "not given" in Kubernetes' own defaulting.
        value = default if value in (None, 0) else value
        if not isinstance(value, int) or value < least:
            raise InvalidProbe(
                f"{where}: {name} is {value!r}; use a whole number of at least {least}"
            )
        return value

    success = number("successThreshold", 1, 1)
    if kind is not Kind.READINESS and success != 1:
        raise InvalidProbe(f"{where}: successThreshold must be 1 for a {kind.value} probe")
    grace = raw.get("terminationGracePeriodSeconds")
    return Probe(
        kind=kind,
        action=action,
        initial_delay=number("initialDelaySeconds", 0, 0),
        period=number("periodSeconds", 10, 1),
        timeout=number("timeoutSeconds", 1, 1),
        success=success,
        failure=number("failureThreshold", 3, 1),
        grace=None if grace is None else float(grace),
    )


class ProbeState:
    """The answers to one probe of one run of a container, and what they add up to.

    ``result`` is ``None`` until anything is known (startup), else whether the probe holds.
    """

    def __init__(self, probe: Probe, started_at: float) -> None:
        self.probe = probe
        self.result: bool | None = {
            Kind.STARTUP: None,
            Kind.LIVENESS: True,
            Kind.READINESS: False,
        }[probe.kind]
        self.message = "not asked yet"
        self._run = 0  # equal answers in a row
        self._last: bool | None = None
        self.next_due = started_at + probe.initial_delay
        self._next_tick = self.next_due  # when the configured period is next up

    @property
    def _waiting(self) -> bool:
        """Whether the container is held back by this probe, so that asking eagerly helps."""
        return self.probe.kind is not Kind.LIVENESS and not self.result

    def record(self, now: float, ok: bool, message: str = "") -> bool:
        """Take the answer of a probe asked at ``now``; true if ``result`` changed by it."""
        self.message = message
        on_tick = now >= self._next_tick
        if on_tick:
            # Ticks that passed while another probe held this one back aren't made up for.
            following = self._next_tick + self.probe.period
            self._next_tick = following if following > now else now + self.probe.period
        before = self.result
        if ok or on_tick or self.probe.kind is not Kind.STARTUP:
            self._run = self._run + 1 if ok == self._last else 1
            self._last = ok
            if self._run >= (self.probe.success if ok else self.probe.failure):
                self.result = ok
        eager = now + min(EAGER_S, self.probe.period)
        self.next_due = min(eager, self._next_tick) if self._waiting else self._next_tick
        self.next_due = max(self.next_due, now)
        return self.result != before


class ContainerProbes:
    """All probes of one run of a container, and the three facts they decide."""

    def __init__(self, probes: tuple[Probe, ...], started_at: float) -> None:
        self._states = {probe.kind: ProbeState(probe, started_at) for probe in probes}

    def _result(self, kind: Kind) -> bool:
        state = self._states.get(kind)
        return True if state is None else bool(state.result)

    @property
    def started(self) -> bool:
        return self._result(Kind.STARTUP)

    @property
    def ready(self) -> bool:
        return self.started and self._result(Kind.READINESS)

    @property
    def failed(self) -> ProbeState | None:
        """The probe that asks for a restart, if one does."""
        for kind in (Kind.STARTUP, Kind.LIVENESS):
            state = self._states.get(kind)
            if (
                state is not None
                and state.result is False
                and (kind is Kind.STARTUP or self.started)
            ):
                return state
        return None

    @property
    def waiting_for(self) -> ProbeState | None:
        """The probe that keeps the container from being ready."""
        for kind in (Kind.STARTUP, Kind.READINESS):
            state = self._states.get(kind)
            if state is not None and not state.result:
                return state
        return None

    def get(self, kind: Kind) -> ProbeState | None:
        return self._states.get(kind)
