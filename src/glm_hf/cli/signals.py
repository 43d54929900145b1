"""How a process of the command ends when it is told to: with a sentence, and the exit code that shells expect.

Both signals become an exception of the main thread, so that unfinished work is cleaned up. A process that does not
come to that, as it hangs in a library, ends without it after some seconds.
"""

import atexit
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

patience = [5.0]
"""Seconds in which a process that was told to end may do so by itself; the last counts."""
REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
received: list[int] = []
"""Signals that this process was sent."""
ending: list[int] = []
"""Exit code of a process that has nothing left to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which libraries that clean up on Ctrl-C are to take for that."""


def listen() -> None:
    """Turn SIGINT and SIGTERM into exceptions; children of the process have the system's way of ending again."""
    handled = [number for number in REASONS if signal.getsignal(number) != signal.SIG_IGN]  # as under nohup
    for number in handled:
        signal.signal(number, _raise)
    atexit.register(_end)  # the first to be registered is the last to be called
    if os.name == "posix":
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)  # written to even while a library holds the main thread
        threading.Thread(target=_wait, args=(told,), daemon=True).start()
        os.register_at_fork(after_in_child=_forget)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REASONS)  # which have waited since the package was imported


def wait_longer(seconds: float) -> None:
    """Let the process take so many seconds more to end by itself."""
    patience.append(patience[0] + seconds)


def exit_code() -> int:
    """Return the exit code of a process that a signal has ended."""
    return 128 + (received[0] if received else signal.SIGINT)


def reason() -> str:
    """Return in a word what has ended the process."""
    return REASONS[signal.Signals(received[0] if received else signal.SIGINT)]


def _raise(number: int, frame: FrameType | None) -> Any:
    received.append(number)
    if ending:
        _leave()
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _wait(told: int) -> None:
    """End the process some seconds after it was told to, unless it has ended by itself."""
    while (number := os.read(told, 1)[0]) not in REASONS:
        pass
    time.sleep(patience[-1])
    received.append(number)
    _leave()


def _leave() -> None:
    if sys.stderr is not None:
        print(f"glm-hf: error: {reason()}", file=sys.stderr, flush=True)
    os._exit(exit_code())


def _end() -> None:
    """End before Python takes its modules apart, when it no longer listens to signals."""
    if ending:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                if stream is not None:
                    stream.flush()
        os._exit(ending[0])


def _forget() -> None:
    atexit.unregister(_end)
    received.clear()
    signal.set_wakeup_fd(-1)
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == _raise:
            signal.signal(number, usual)
