"""What a user sees while a graph runs: what waits for what, and why something died.

On a terminal a table that is redrawn while starting; otherwise (CI, a pipe) one line for each
change and a reminder of what is being waited for. Everything goes to stderr: stdout belongs to the
command of ``--exec``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dynamo_cli.local.pod import Pod

REMIND_S = 15.0
STYLES = {"ready": "green", "back-off": "red", "stopping": "yellow"}


class View:
    """Shows pods on ``console`` until ``close``."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._pods: Sequence[Pod] = ()
        self._began = time.monotonic()
        self._shown: dict[str, str] = {}
        self._reminded = self._began

    def open(self) -> None:
        """Start the live table, where there is a terminal to draw it on."""
        self._began = self._reminded = time.monotonic()
        if self.console.is_terminal:
            self._live = Live(
                console=self.console, get_renderable=self._table, transient=True,
                refresh_per_second=5,
            )  # fmt: skip
            self._live.start()

    def close_table(self) -> None:
        """End the live table; lines go on. Calling it again changes nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._shown = {pod.name: pod.state for pod in self._pods}

    def line(self, text: str, style: str = "") -> None:
        """Print one line (or several) above the table."""
        self.console.print(escape(text), style=style or None, highlight=False, soft_wrap=True)

    def error(self, text: str) -> None:
        self.line(text, "red")

    def show(self, pods: Sequence[Pod]) -> None:
        """Take the pods' present state."""
        self._pods = pods
        if self._live is not None:
            return
        for pod in pods:
            before = self._shown.get(pod.name)
            if pod.state not in ("starting", "ready") or pod.state == before:
                continue
            self._shown[pod.name] = pod.state
            if pod.state == "ready" or before is None:  # a restart has its own line
                self.line(f"{pod.name} ({pod.address}) {pod.state}")

    def remind(self) -> None:
        """Without a table: say now and then what is being waited for."""
        if self._live is None and time.monotonic() - self._reminded >= REMIND_S:
            self._reminded = time.monotonic()
            seconds = self._reminded - self._began
            for pod in self._pods:
                if not pod.ready:
                    self.line(f"{seconds:4.0f} s: {pod.name} waits for {pod.waits_for}", "dim")

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0))
        seconds = time.monotonic() - self._began
        for heading in ("pod", "address", "state"):
            table.add_column(heading, header_style="dim", no_wrap=True)
        # The one column that gives way on a narrow terminal.
        table.add_column(f"waits for ({seconds:.0f} s)", header_style="dim")
        for pod in self._pods:
            restarts = f" ({pod.restarts} restarts)" if pod.restarts else ""
            table.add_row(
                pod.name,
                pod.address,
                f"[{STYLES.get(pod.state, 'default')}]{pod.state}[/]",
                Text(
                    pod.waits_for.replace("\n", " ") + restarts, no_wrap=True, overflow="ellipsis"
                ),
            )
        return table
