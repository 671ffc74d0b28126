"""How work under way is shown: bars on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Protocol, TextIO

from ftkit.quantities import duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

BAR_AFTER = 0.5  # seconds of work before a bar appears: shorter work would only flicker
LINE_AFTER = 2.0  # seconds of work before a plain line tells of it
LINE_EVERY = 5.0  # seconds of silence after which the next one does


class Stage:
    """Work under way and how much of it is done; also a callback `stage(done, total)`."""

    def __init__(self, title: str, total: int | None = None, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self.facts: list[str] = []  # what is shown besides
        self._first, self._started = done, time.monotonic()

    def advance(self, n: int = 1) -> None:
        self.done += n

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def count(self) -> str:
        """`120/300`, or what is known of it."""
        if self.total is not None:
            return f"{min(self.done, self.total):,}/{self.total:,}"  # several processes count in equal shares, the last one short
        return f"{self.done:,}" if self.done else ""

    @property
    def left(self) -> str:
        """The time left at the speed so far; empty while there is no telling."""
        worked = self.done - self._first
        if self.total is None or worked <= 0 or self.done >= self.total:
            return ""
        return f"{duration(self.seconds / worked * (self.total - self.done))} left"


class Display(Protocol):
    """Shows stages, of which the later ones are parts of the first."""

    def show(self, stage: Stage) -> None: ...

    def hide(self, stage: Stage) -> None: ...

    def update(self, stage: Stage) -> None:
        """The facts of a stage are new."""
        ...

    def print(self, text: str, style: str = "") -> None:
        """A line that stays."""
        ...


def open_console(stream: TextIO) -> Console:
    """A console that is a terminal only where colour and redrawing are welcome (NO_COLOR, TERM=dumb)."""
    from rich.console import Console

    plain = not stream.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in ("dumb", "unknown")
    return Console(file=stream, force_terminal=not plain, color_system=None if plain else "auto", highlight=False, markup=False, emoji=False)


def print_line(console: Console, text: str, style: str = "", indent: int = 0) -> None:
    """Text wrapped between words on a terminal, and left in one line for whatever else reads it."""
    from rich.padding import Padding
    from rich.text import Text

    if console.file.isatty():
        console.print(Padding(Text(text, style=style), (0, 0, 0, indent), expand=False))
    else:
        console.print(" " * indent + text, soft_wrap=True)


def open_display(stream: TextIO) -> Display:
    console = open_console(stream)
    return Bars(console) if console.is_terminal else Lines(console)


class Bars:
    """One bar for each stage under way, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stages: list[Stage] = []

    def print(self, text: str, style: str = "") -> None:
        print_line(self._console, text, style)

    def show(self, stage: Stage) -> None:
        from rich.live import Live

        self._stages.append(stage)
        if len(self._stages) > 1:
            return
        # stdout carries results and may be a pipe, so it is never redirected through the display
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=5, transient=True, redirect_stdout=False)
        self._starter = threading.Timer(BAR_AFTER, self._live.start)
        self._starter.daemon = True
        self._starter.start()

    def hide(self, stage: Stage) -> None:
        self._stages.remove(stage)
        if not self._stages:
            self._starter.cancel()
            self._starter.join()
            self._live.stop()

    def update(self, stage: Stage) -> None:
        """Nothing to do: the next redraw shows it."""

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bars = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            bars.add_column(ratio=ratio, no_wrap=True)
        facts = []
        for stage in list(self._stages):
            if stage.seconds >= BAR_AFTER:
                bar = ProgressBar(stage.total, stage.done, pulse=stage.total is None, complete_style="cyan", finished_style="cyan")
                bars.add_row(stage.title, bar, stage.count, Text(stage.left, style="dim"))
                facts.append(Text("  ".join(stage.facts), overflow="ellipsis", no_wrap=True))
        return Group(bars, *filter(None, facts))


class Lines:
    """A plain line about the innermost stage after LINE_EVERY seconds in which nothing was printed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stages: list[Stage] = []
        self._printed = float("-inf")

    def print(self, text: str, style: str = "") -> None:
        self._printed = time.monotonic()
        print_line(self._console, text)

    def show(self, stage: Stage) -> None:
        self._stages.append(stage)
        if len(self._stages) > 1:
            return
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def hide(self, stage: Stage) -> None:
        self._stages.remove(stage)
        if not self._stages:
            self._over.set()
            self._watcher.join()

    def update(self, stage: Stage) -> None:
        self.print("  ".join(filter(None, [f"{stage.title} {stage.count}".rstrip(), *stage.facts, stage.left])))

    def _watch(self) -> None:
        while not self._over.wait(LINE_AFTER / 4):
            for stage in self._stages[-1:]:
                if stage.seconds >= LINE_AFTER and time.monotonic() - self._printed >= LINE_EVERY:
                    self.update(stage)
