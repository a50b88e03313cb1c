"""A device that is not the CPU, simulated on it, so that tests can see faults that only another device shows.

It has the rules of a CUDA device and none of its speed: its tensors do not mix with those of the CPU, its generators
draw other numbers, and what would make the host wait for it is counted (:mod:`tests.accelerator.waits`).

A backend is registered once in a process and for good. So nothing here is imported into a process of other tests but
:mod:`tests.accelerator.groups`, which starts a process of its own for each group of cases.

    python -m tests.accelerator estimates   # run a group of cases, and print what failed as JSON
    python -m tests.accelerator waits       # print how often the host waits, by line of fisher_reg
"""
