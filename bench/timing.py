"""Timers, and the loop that takes turns: a noisy moment then hits every implementation alike."""

import time
from functools import partial


class CpuTimer:
    """Wall time of single calls.

    A timer binds work to input sets once, giving a list of shots, and times one shot at a time.
    """

    def bind(self, run, argument_sets):
        return [partial(run, *args) for args in argument_sets]

    def milliseconds(self, shot):
        start = time.perf_counter()
        result = shot()
        stop = time.perf_counter()
        del result  # after the clock: freeing a large output takes as long as a small op
        return (stop - start) * 1e3


TIMERS = {"cpu": CpuTimer}


def take_turns(timer, shots, seconds, turn_ms=30.0, min_rounds=5, max_rounds=50):
    """{name: [shot, ...]} -> {name: [ms, ...]}: in every round each name runs for about turn_ms.

    Rounds go on until `seconds` have passed, within the bounds. Each call takes the next input set.
    """
    times = {name: [] for name in shots}
    deadline = time.perf_counter() + seconds
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() > deadline:
            break
        for name, own in shots.items():
            spent = 0.0
            while spent < turn_ms:
                ms = timer.milliseconds(own[len(times[name]) % len(own)])
                times[name].append(ms)
                spent += ms
    return times
