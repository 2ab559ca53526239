"""A worker process that holds one reward: starting it, asking it, and what happens if it does not answer. No torch."""

from __future__ import annotations

import queue
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from typing import IO, Any, BinaryIO, cast

import psutil

from alignprop_core.errors import RewardError
from alignprop_core.isolation.messages import check_protocol, error_from, receive, send

_LOOK_EVERY = 0.2
"""Seconds between looks at a working process: is it alive, and how much memory does it have?"""

GIB = 1024**3


class WorkerEnded(RewardError):
    """The worker's process ended by itself while it was asked something."""


class Worker:
    """A process in another environment, answering one message at a time.

    It ends when this object is closed or collected, when this process ends in whatever way (its standard input closes),
    and when it is too slow or too large. Ctrl-C is for the run: a worker does not listen to it.

    Args:
        python: the environment's Python.
        memory_limit: GiB of resident memory the process and its children may have; None for any.
    """

    def __init__(self, python: str, memory_limit: float | None) -> None:
        self.python = python
        self.memory_limit = memory_limit
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        try:
            self._process = subprocess.Popen(
                [python, "-I", "-m", "alignprop_core.isolation.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
            )
        except OSError as error:
            raise RewardError(f"its environment's {python} cannot be started: {error.strerror or error}.") from error
        self._in = cast(BinaryIO, self._process.stdin)
        threading.Thread(
            target=_read, args=(cast(BinaryIO, self._process.stdout), self._answers), daemon=True, name="worker answers"
        ).start()
        self._finalizer = weakref.finalize(self, _end, self._process, self._log)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(self, message: dict[str, Any], *, timeout: float, doing: str) -> dict[str, Any]:
        """Send a message and return the answer.

        Args:
            message: what to do.
            timeout: seconds.
            doing: what that is, for errors: "load", "score a batch".

        Raises:
            WorkerEnded: the process ended instead; asking a new one may help.
            RewardError: it took too long or too much memory (its process is gone then), or raised.
            UserError: as the reward raised it.
        """
        try:
            send(self._in, message)
        except OSError:
            raise self._ended(doing) from None
        try:
            answer = self._wait(timeout, doing)
        except BaseException:
            # Its answer would be taken for that of the next question.
            self.close(kindly=False)
            raise
        check_protocol(answer, self.python)
        if "error" in answer:
            raise error_from(answer["error"], self.python)
        return answer

    def _wait(self, timeout: float, doing: str) -> dict[str, Any]:
        end = time.monotonic() + timeout
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise RewardError(
                    f"did not {doing} within {timeout:g} s, so its worker was ended; isolation.timeout and "
                    f"isolation.start_timeout say how long it may take.{self._last_words()}"
                )
            try:
                answer = self._answers.get(timeout=min(_LOOK_EVERY, left))
            except queue.Empty:
                self._check_memory(doing)
                continue
            if answer is None:
                raise self._ended(doing)
            self._check_memory(doing)
            return answer

    def _check_memory(self, doing: str) -> None:
        if self.memory_limit is None:
            return
        try:
            process = psutil.Process(self.pid)
            used = sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))
        except psutil.NoSuchProcess:
            return
        if used > self.memory_limit * GIB:
            raise RewardError(
                f"took {used / GIB:.2f} GiB of memory to {doing}, more than isolation.memory_limit of "
                f"{self.memory_limit:g} GiB, so its worker was ended. Score fewer images at a time "
                "(mix.reward_batch_size), or raise the limit."
            )

    def _ended(self, doing: str) -> WorkerEnded:
        code = self._process.wait(timeout=10)
        how = f"exit code {code}"
        if code < 0:
            try:
                how = f"signal {signal.Signals(-code).name}"
            except ValueError:
                how = f"signal {-code}"
        return WorkerEnded(f"its worker ended ({how}) when it was to {doing}.{self._last_words()}")

    def _last_words(self) -> str:
        """What the process printed last, for an error message."""
        self._log.seek(0, 2)
        self._log.seek(max(self._log.tell() - 2000, 0))
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()[-8:]
        return "\nIt printed last:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""

    def close(self, *, kindly: bool = True) -> None:
        """End the process; kindly lets it end by itself first."""
        if not kindly:
            self._process.kill()
        self._finalizer()


def _read(stream: BinaryIO, answers: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Put every message into the queue, and None when the stream ends."""
    try:
        with stream:
            while (message := receive(stream)) is not None:
                answers.put(message)
    finally:  # whatever came instead of a message, nobody waits for another
        answers.put(None)


def _end(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    log.close()
    # Closing standard input asks the worker to end; one that is gone already has broken the pipe.
    with suppress(OSError):
        cast(BinaryIO, process.stdin).close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=10)
