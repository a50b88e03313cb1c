"""The version of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fisher-reg")
except PackageNotFoundError:  # the source is on the path but not installed, so that its version is unknown
    __version__ = "0+unknown"
