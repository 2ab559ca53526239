"""Runs in a reward's own environment: loads the reward and scores batches until standard input closes.

    python -I -m alignprop_isolation.worker

The first message has the reward's name, its options and the shared file; each further message is a batch in that file.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from alignprop_core import __version__
from alignprop_isolation.messages import PROTOCOL, error_data, receive, send


def main() -> None:
    """Serve the reward that the first message names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches every process; the run handles it
    # Standard output is for answers alone: what the reward prints, from C too, goes to standard error.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, requests, os.getppid()), daemon=True).start()
    first = requests.get()
    server = None
    try:
        server, answer = _load(first)
    except BaseException as error:
        answer = {"error": error_data(error)}
    send(answers, _signed(answer))
    while server is not None:
        send(answers, _signed(server.answer(requests.get())))


def _listen(stream: BinaryIO, requests: queue.SimpleQueue[dict[str, Any]], run: int) -> None:
    """Put every message into the queue; exit when the run closes the stream or is gone, even during a batch."""
    file = None
    while (message := receive(stream)) is not None:
        file = message.get("file", file)
        requests.put(message)
    with suppress(OSError):
        sys.stderr.flush()
        if file is not None and _orphaned(run):
            os.unlink(file)  # a run that was killed could not remove it
    os._exit(0)


def _orphaned(run: int) -> bool:
    """Return whether the run's process is gone; its pipes close a moment earlier. Always False on Windows."""
    for _ in range(20):
        if os.getppid() != run:
            return True
        time.sleep(0.05)
    return False


def _signed(answer: dict[str, Any]) -> dict[str, Any]:
    return {"protocol": PROTOCOL, "core": __version__, **answer}


def _load(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import torch

    from alignprop_isolation.serving import Server

    server = Server(request["name"], request["options"], request["device"], Path(request["file"]))
    return server, {"torch": torch.__version__, "differentiable": server.differentiable}


if __name__ == "__main__":
    main()
