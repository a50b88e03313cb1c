"""A device that is not the CPU, simulated on it, so that tests can see faults that only another device shows.

It has the rules of a CUDA device and none of its speed: its tensors do not mix with those of the CPU, its generators
draw other numbers, and what would make the host wait for it is counted (:mod:`tests.accelerator.waits`).

A backend is registered once in a process and for good. So a test gets the names of its cases, and what went wrong,
from :mod:`tests.accelerator.groups`, which runs each group in a process of its own. Nothing that a test imports
imports :mod:`tests.accelerator.device`.

    python -m tests.accelerator estimates   # run a group of cases, and print what failed as JSON
    python -m tests.accelerator waits       # print how often the host waits, by line of fisher_reg
"""
