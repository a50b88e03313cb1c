"""The version of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fisher-reg")
except PackageNotFoundError:  # the source was put on the path and not installed: nothing states its version
    __version__ = "0+unknown"
