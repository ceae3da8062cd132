"""What the machine can do."""

import math
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from starlm.errors import InputError

_CGROUP = Path("/sys/fs/cgroup")
# How much faster products must be in bfloat16: what lies between them casts.
_GAIN = 1.3


def pick_device(name: str) -> torch.device:
    """The device that `name` means: auto, cpu, cuda, or cuda:N.

    Raises:
        InputError: unknown name, or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r} is not on this machine ({torch.cuda.device_count()} GPUs that PyTorch can use)."
            f" Use cpu, or install a PyTorch build for your GPU."
        )
    return device


def pick_dtype(name: str) -> torch.dtype | None:
    """The dtype that `name` means: float32, bfloat16, float16; None for auto.

    Raises:
        InputError: unknown name.
    """
    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InputError(f"dtype must be {', '.join(known)}; got {name!r}.")
    return known[name]


def takes_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether products on the device are in bfloat16 by this `precision`: auto, float32 or bfloat16.

    Raises:
        InputError: unknown name.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise InputError(f"precision must be auto, float32, bfloat16; got {precision!r}.")
    return precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))


def free_memory(device: torch.device) -> int:
    """Bytes that tensors on the device may still take."""
    if device.type != "cuda":
        return min(psutil.virtual_memory().available, _left_to_container())
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _left_to_container() -> int:
    """Bytes until the limit of this process's container (cgroup v2), if it has one."""
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # The file cache counts as used, and goes when memory is short.
        return sys.maxsize if limit == "max" else int(limit) - int(used) + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return sys.maxsize


def describe(device: torch.device) -> dict[str, str]:
    """What figures of a GPU must be read with: its name and the software that runs it; of a CPU nothing."""
    if device.type != "cuda":
        return {}
    found = {"GPU": torch.cuda.get_device_name(device), "CUDA": str(torch.version.cuda)}
    for package in ("triton", "flash-linear-attention"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def has_bfloat16(device: torch.device) -> bool:
    """Whether products are clearly faster in bfloat16 than in float32; on a CPU that is measured once."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _cpu_has_bfloat16()


@cache
def _cpu_has_bfloat16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if not any(map(capabilities.get, ("amx_bf16", "avx512_bf16", "bf16"))):
        return False
    # That there are instructions says little: with AVX-512's a Xeon is 1.5 times slower than in float32, an
    # EPYC (Zen 4) 2.2 to 3 times faster.
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(5):
        for dtype in seconds:
            x, weight = torch.ones(1024, 256, dtype=dtype), torch.ones(1024, 256, dtype=dtype)
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - began)
    return _GAIN * seconds[torch.bfloat16] < seconds[torch.float32]
