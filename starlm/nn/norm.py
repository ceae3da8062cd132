"""RMSNorm without parameters."""

from starlm.ops.elementwise import rms, rms_unseen

__all__ = ["rms", "rms_unseen"]
