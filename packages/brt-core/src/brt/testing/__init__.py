"""Contract checks for plugin authors: each raises an `AssertionError` that names the rule."""

from brt.testing.kernels import check_kernel
from brt.testing.passes import check_pass
from brt.testing.protocols import check_protocol
from brt.testing.routers import check_router

__all__ = ["check_kernel", "check_pass", "check_protocol", "check_router"]
