"""The operator `deform`: definition, fused kernels, registration. Imports torch, nothing above."""

from starlm.ops.deform import Backend, deform

__all__ = ["Backend", "deform"]
