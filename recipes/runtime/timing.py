"""Time and memory of a call."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

T = TypeVar("T")


# torch.utils.benchmark.Timer does not return the result of the call, and runs its own loops; here calls alternate.
def timed(call: Callable[[], T], device: torch.device, num_rounds: int = 1) -> tuple[T, float]:
    """Return the result of a call and its median time in seconds on the device over ``num_rounds`` calls."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    times = []
    for _ in range(num_rounds):
        synchronize()
        begin = time.perf_counter()
        result = call()
        synchronize()
        times.append(time.perf_counter() - begin)
    return result, median(times)


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak number of bytes that ``call`` allocates."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_allocated(device)
        call()
        peak: int = torch.cuda.max_memory_allocated(device)
        return peak - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profile.export_chrome_trace(path)
        events = json.loads(Path(path).read_text())["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    held: list[int] = [event["args"]["Total Allocated"] for event in sorted(events, key=lambda event: event["ts"])]
    first: dict[str, int] = min(events, key=lambda event: event["ts"])["args"]
    return max(held) - (first["Total Allocated"] - first["Bytes"])


@contextmanager
def silent_stderr() -> Generator[None, None, None]:
    """Discard output of native code to stderr: the profiler of torch 2.14 reports each start and stop."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
