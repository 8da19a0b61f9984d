"""SIGINT and SIGTERM as a wish to stop soon, instead of an exception in the middle of a step."""

import signal


class StopSignal:
    """Within the with block, `number` is 0 until the first such signal, then the signal's number.

    A second SIGINT raises KeyboardInterrupt as ever.
    """

    def __init__(self):
        self.number = 0

    def __enter__(self) -> "StopSignal":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame):
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
