"""Timers, and the loop that takes turns: a noisy moment then hits every implementation alike.

A timer binds work to input sets once, giving a list of shots, and times one shot at a time.
"""

import math
import time
from functools import partial

import torch


class CpuTimer:
    """Wall time of single calls."""

    turn_ms = 30.0  # an implementation's turn lasts about that long

    def bind(self, run, argument_sets):
        return [partial(run, *args) for args in argument_sets]

    def milliseconds(self, shot):
        start = time.perf_counter()
        result = shot()
        stop = time.perf_counter()
        del result  # after the clock: freeing a large output takes as long as a small op
        return (stop - start) * 1e3


class CudaTimer:
    """Replays of one CUDA graph that calls the work once on every input set, or several times when
    that takes less than graph_ms: no launch gaps, no input that the last call left in the cache.
    """

    turn_ms = 0.0  # a turn is one replay
    graph_ms = 1.0

    def bind(self, run, argument_sets):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles what is compiled on demand
            for args in argument_sets[:2]:
                run(*args)
        torch.cuda.current_stream().wait_stream(stream)
        shot = self._capture(run, argument_sets)
        self.milliseconds(shot)
        once = self.milliseconds(shot) * shot[1]
        if once < self.graph_ms:
            times = min(50, math.ceil(self.graph_ms / once))
            shot = self._capture(run, argument_sets * times)
            self.milliseconds(shot)
        return [shot]

    def _capture(self, run, argument_sets):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for args in argument_sets:
                run(*args)
        return graph, len(argument_sets), argument_sets  # the graph holds no reference to these

    def milliseconds(self, shot):
        graph, calls, _ = shot
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / calls


TIMERS = {"cpu": CpuTimer, "cuda": CudaTimer}


def take_turns(timer, shots, seconds, min_rounds=5, max_rounds=50):
    """{name: [shot, ...]} -> {name: [ms, ...]}: in every round each name has its turn.

    Rounds go on until `seconds` have passed, within the bounds. Each call takes the next input set.
    """
    times = {name: [] for name in shots}
    deadline = time.perf_counter() + seconds
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() > deadline:
            break
        for name, own in shots.items():
            spent = 0.0
            while True:
                ms = timer.milliseconds(own[len(times[name]) % len(own)])
                times[name].append(ms)
                spent += ms
                if spent >= timer.turn_ms:
                    break
    return times
