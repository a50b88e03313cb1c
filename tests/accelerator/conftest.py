"""Doctests are looked for in every module: importing these would register the device in the process of other tests."""

collect_ignore_glob = ["*.py"]
