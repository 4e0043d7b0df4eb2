"""Dynamic neural networks in PyTorch: say what is routed and how, profile it, specialise it."""

from importlib.metadata import version

from brt.hookspecs import hookimpl

__version__ = version("brt-core")

__all__ = ["__version__", "hookimpl"]
