"""RMSNorm without parameters."""

from starlm.ops.elementwise import rms

__all__ = ["rms"]
