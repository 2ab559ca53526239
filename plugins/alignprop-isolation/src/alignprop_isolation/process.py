"""The worker process of one reward: starting it, sending requests, timeouts, memory limit, failures. No torch."""

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
from alignprop_isolation.messages import check_protocol, error_from, receive, send

_CHECK_EVERY = 0.2
"""Seconds between checks of a busy process: whether it is alive, and how much memory it uses."""

GIB = 1024**3


class WorkerExited(RewardError):
    """The worker process exited while a request was pending."""


class Worker:
    """A process in another environment that answers one message at a time.

    It exits when this object is closed or collected, when this process exits for any reason (its standard input
    closes), and when it exceeds a timeout or the memory limit. It ignores Ctrl-C, which the run handles.

    Args:
        python: Python interpreter of the environment.
        memory_limit: limit on the resident memory of the process and its children in GiB; None for no limit.
    """

    def __init__(self, python: str, memory_limit: float | None) -> None:
        self.python = python
        self.memory_limit = memory_limit
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        try:
            self._process = subprocess.Popen(
                [python, "-I", "-m", "alignprop_isolation.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
            )
        except OSError as error:
            raise RewardError(f"its interpreter {python} cannot be started: {error.strerror or error}.") from error
        self._in = cast(BinaryIO, self._process.stdin)
        threading.Thread(
            target=_read, args=(cast(BinaryIO, self._process.stdout), self._answers), daemon=True, name="worker answers"
        ).start()
        self._finalizer = weakref.finalize(self, _end, self._process, self._log)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def ask(self, message: dict[str, Any], *, timeout: float, doing: str) -> dict[str, Any]:
        """Send a message and return the answer.

        Args:
            message: the request.
            timeout: seconds.
            doing: what the request does, for errors: "load", "score a batch".

        Raises:
            WorkerExited: the process exited instead of answering; a new process may succeed.
            RewardError: the request took too long or too much memory (the process is then terminated), or raised.
            UserError: the reward raised it.
        """
        try:
            send(self._in, message)
        except OSError:
            raise self._exited(doing) from None
        try:
            answer = self._wait(timeout, doing)
        except BaseException:
            # A late answer would be taken for the answer to the next request.
            self.close(wait=False)
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
                    f"did not {doing} within {timeout:g} s, so its worker was terminated; isolation.timeout and "
                    f"isolation.start_timeout set the limits.{self._last_output()}"
                )
            try:
                answer = self._answers.get(timeout=min(_CHECK_EVERY, left))
            except queue.Empty:
                self._check_memory(doing)
                continue
            if answer is None:
                raise self._exited(doing)
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
                f"used {used / GIB:.2f} GiB of memory to {doing}, more than isolation.memory_limit of "
                f"{self.memory_limit:g} GiB, so its worker was terminated. Score fewer images at a time "
                "(mix.reward_batch_size), or raise the limit."
            )

    def _exited(self, doing: str) -> WorkerExited:
        code = self._process.wait(timeout=10)
        how = f"exit code {code}"
        if code < 0:
            try:
                how = f"signal {signal.Signals(-code).name}"
            except ValueError:
                how = f"signal {-code}"
        return WorkerExited(f"its worker exited ({how}) when asked to {doing}.{self._last_output()}")

    def _last_output(self) -> str:
        """Return the last lines that the process printed, for an error message."""
        self._log.seek(0, 2)
        self._log.seek(max(self._log.tell() - 2000, 0))
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()[-8:]
        return "\nIts last output:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""

    def close(self, *, wait: bool = True) -> None:
        """End the process.

        Args:
            wait: let it exit by itself first, for a few seconds; otherwise kill it at once.
        """
        if not wait:
            self._process.kill()
        self._finalizer()


def _read(stream: BinaryIO, answers: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Put every message into the queue, and None when the stream ends."""
    try:
        with stream:
            while (message := receive(stream)) is not None:
                answers.put(message)
    finally:  # also after an invalid message: there will be no further answer
        answers.put(None)


def _end(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    log.close()
    # Closing standard input tells the worker to exit. The pipe of a worker that already exited is broken.
    with suppress(OSError):
        cast(BinaryIO, process.stdin).close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=10)
