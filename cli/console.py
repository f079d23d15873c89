"""Lines for people: everything that is not a result goes to stderr through here."""

import sys
import time


class Console:
    """Notes that stay and a status line that is overwritten.

    Without a terminal the status is printed as an ordinary line, at most every 15 seconds, so that logs stay short.
    """

    QUIET_SECONDS = 15.0

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self._terminal = self.stream.isatty()
        self._status_width = 0
        self._last_status = time.monotonic()

    def note(self, text: str) -> None:
        """Print `text` on a line of its own."""
        self.clear()
        print(text, file=self.stream, flush=True)
        self._last_status = time.monotonic()

    def status(self, text: str) -> None:
        """Show what is happening now; the next call replaces it."""
        if self._terminal:
            line = text[:118]
            print("\r" + line.ljust(self._status_width), end="", file=self.stream, flush=True)
            self._status_width = len(line)
        elif time.monotonic() - self._last_status >= self.QUIET_SECONDS:
            self.note(text)

    def clear(self) -> None:
        """Wipe the status line."""
        if self._status_width:
            print("\r" + " " * self._status_width + "\r", end="", file=self.stream, flush=True)
            self._status_width = 0
