"""The operator `deform`: definition, fused kernels, registration. Imports torch, nothing above."""

from starlm.ops.anchors import anchors, longest
from starlm.ops.deform import Backend, deform
from starlm.ops.plain import plain

__all__ = ["Backend", "anchors", "deform", "longest", "plain"]
