"""The server with a task inside that notes how long its event loop did nothing else.

On SIGUSR1 it logs the longest gap since the signal before, in units: the time that a
fixed piece of Python work takes in this process, about a millisecond. Time is the
processor's, so a busy machine makes no gaps; what other threads of the process compute
while they keep the interpreter counts as well.
"""

import asyncio
import contextlib
import gc
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import wxgpt  # noqa: E402

PAUSE_SECONDS = 0.001


def time_of_work() -> float:
    """Return how long the fixed piece of work takes."""
    began = time.process_time()
    [str(number) for number in range(20_000)]
    return time.process_time() - began


class Watch:
    """Notes the longest gap."""

    def __init__(self) -> None:
        self.unit = min(time_of_work() for _ in range(20))
        self.longest = 0.0

    def report(self) -> None:
        """Log the longest gap, and begin anew."""
        # A core that others share is slower now than it may have been at the start.
        unit = max(self.unit, min(time_of_work() for _ in range(5)))
        wxgpt.log.info("longest gap %.1f units", self.longest / unit)
        self.longest = 0.0

    async def run(self) -> None:
        """Note the longest gap, until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self.report)
        gc.collect()
        while True:
            began = time.process_time()
            await asyncio.sleep(PAUSE_SECONDS)
            self.longest = max(self.longest, time.process_time() - began)


wxgpt.keep_watchdog = Watch().run

if __name__ == "__main__":
    # On a busy machine the loop's thread would wait its turn while the other threads
    # compute: a gap that is not the server's. It goes first, and it alone, if we may.
    with contextlib.suppress(PermissionError):
        alone = os.SCHED_RR | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, alone, os.sched_param(1))
    sys.exit(wxgpt.main())
