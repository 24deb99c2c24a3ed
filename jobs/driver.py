"""The driver's side of a training: what the workers say is printed and logged; a signal becomes a request to stop.

SIGTERM (`ray job stop`, a preempted node) and Ctrl-C ask the workers to save a checkpoint and end; a second one ends at
once. `ray job stop` kills after 3 s, unless the job's runtime environment sets RAY_JOB_STOP_WAIT_TIME_S.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypeVar

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from lcrnet.board import Board

LOG = "train.log"
"""What a run said, in its folder."""

T = TypeVar("T")


def attend(work: Callable[[], T], desk: Any, out: Path) -> tuple[T, int]:
    """(What `work` returns, the signal that ended it or 0); meanwhile, prints and logs what comes to the desk.

    `work` runs in a thread of its own: Ray takes neither signals nor prints while it waits for the workers.
    """
    result: dict[str, Any] = {}

    def target() -> None:
        try:
            result["value"] = work()
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=target, daemon=True)
    with _signals() as asked, (out / LOG).open("a", encoding="utf-8") as log, _Screen(log, out) as screen:
        thread.start()
        requested = False
        while thread.is_alive():
            thread.join(0.2)
            for kind, what in ray.get(desk.take.remote()):
                screen.show(kind, what)
            if asked and not requested:
                if not screen.begun:
                    raise SystemExit(128 + asked[0])
                screen.show("say", "asked to stop: saves a checkpoint first; once more ends at once")
                desk.ask_to_stop.remote()
                requested = True
            if len(asked) > 1:
                raise SystemExit(128 + asked[1])
        for kind, what in ray.get(desk.take.remote()):
            screen.show(kind, what)
    if "error" in result:
        raise result["error"]
    return result["value"], asked[0] if asked else 0


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT; only a main thread can, another (a trial of Tune) is stopped by those who run it."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Screen:
    """One line that lives on a terminal; plain lines elsewhere and in the log. Figures of a validation beside the
    training go to RUN/tensorboard/beside: TensorBoard reads one file of a folder at a time."""

    def __init__(self, log: TextIO, out: Path):
        self.log, self.out, self.begun = log, out, False
        self.board: Board | None = None
        self.boards = contextlib.ExitStack()
        self.console = Console(soft_wrap=True, highlight=False, markup=False)
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        self.live = Progress(BarColumn(20), text, console=self.console, transient=True, disable=not self._terminal)
        self.task: TaskID | None = None

    @property
    def _terminal(self) -> bool:
        return self.console.is_terminal

    def __enter__(self) -> _Screen:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()
        self.boards.close()

    def show(self, kind: str, what: Any) -> None:
        """Something from the desk (`Desk.tell`)."""
        self.begun = True
        if kind == "say":
            self._line(what)
            (self.live.console.print if self._terminal else _plain)(what)
        elif kind == "progress":
            step, last, line = what
            self._line(line)
            if not self._terminal:
                _plain(line)
            elif self.task is None:
                self.task = self.live.add_task(line, total=last, completed=step)
            else:
                self.live.update(self.task, completed=step, total=last, description=line)

        elif kind == "figures":
            self.board = self.board or self.boards.enter_context(Board(self.out / "tensorboard" / "beside"))
            self.board.validation(*what)

    def _line(self, text: str) -> None:
        self.log.write(text + "\n")
        self.log.flush()


def _plain(text: str) -> None:
    print(text, flush=True)
