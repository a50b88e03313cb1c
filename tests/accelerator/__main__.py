"""Run as ``python -m tests.accelerator GROUP [CASE ...]``; see :mod:`tests.accelerator`."""

import json
import os
import sys

from tests.accelerator import groups


def _failures(name, chosen):
    from tests.accelerator.compare import failures

    group = groups.module_of(name)
    return failures({case: group.CASES[case] for case in chosen or group.CASES}, group.ROUGH)


if __name__ == "__main__":
    if sys.argv[1] in ("waits", "counts"):
        from tests.accelerator import counted

        print(json.dumps(counted.counts())) if sys.argv[1] == "counts" else counted.print_counts()
    else:
        print(json.dumps(_failures(sys.argv[1], sys.argv[2:])))
    sys.stdout.flush()
    # autograd has a thread for the device, which does not always survive the end of the interpreter
    os._exit(0)
