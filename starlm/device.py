"""What the machine can do."""

from importlib.metadata import PackageNotFoundError, version

import torch

from starlm.errors import InputError


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
    """Whether the hardware has matrix units for bfloat16, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    # AVX-512's own bfloat16 instructions (avx512_bf16) do not count: measured, products in float32 are 1.5
    # times faster than with them.
    return bool(capabilities.get("amx_bf16") or capabilities.get("bf16"))
