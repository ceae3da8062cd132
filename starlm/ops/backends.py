"""Which kernels of our own there are, in which dtypes, and where they take the place of compositions."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from starlm.ops.plain import is_plain

HAS_TRITON = find_spec("triton") is not None
CPU_DTYPES = torch.float32, torch.bfloat16
GPU_DTYPES = *CPU_DTYPES, torch.float16


def on_gpu(device: torch.device) -> bool:
    """Whether Triton's kernels are those for this device; otherwise it is the CPU's, if any."""
    return device.type == "cuda"


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a layer, its normalisation and its MLP have kernels there."""
    if on_gpu(device):
        return HAS_TRITON and dtype in GPU_DTYPES
    return device.type == "cpu" and dtype in CPU_DTYPES


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that products take in place of that of x under autocast; None where they take x as it is."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def fuses(x: Tensor) -> bool:
    """Whether kernels take x in place of a composition."""
    return not is_plain() and has_kernels(x.device, x.dtype)


def load_kernels(name: str, device: torch.device) -> Any:
    """The module of these kernels for the device; numba and triton take half a second to import."""
    return import_module(f"starlm.ops.{'triton' if on_gpu(device) else 'cpu'}_{name}")
