"""On PYTHONPATH of a server, this burns a given share of CPU on top of what the process uses: the gate's proof."""

import os
import threading
import time

_SHARE = float(os.environ.get("BENCH_INJECT_SLOWDOWN", "0"))


def _drag() -> None:
    burnt = 0.0
    while True:
        time.sleep(0.02)
        owed = (time.process_time() - burnt) * _SHARE - burnt
        started = time.thread_time()
        while time.thread_time() - started < owed:
            pass
        burnt += time.thread_time() - started


def _start() -> None:
    threading.Thread(target=_drag, daemon=True, name="drag").start()


if _SHARE > 0:
    os.register_at_fork(after_in_child=_start)
    _start()
