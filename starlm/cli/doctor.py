"""starlm doctor: what this machine has, and for each problem its cure."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from starlm.cli.console import Console
from starlm.cli.options import Verb
from starlm.errors import InputError
from starlm.report.environment import processor
from starlm.version import __version__

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What to look at."""

    folder: Path = Path(".")
    """Folder whose disk will hold data and runs."""
    matmul_size: int = 1024
    """Side of the square matrices that float32 and bfloat16 are timed on."""

    def __post_init__(self) -> None:
        if self.matmul_size < 1:
            raise InputError(f"matmul_size must be at least 1; got {self.matmul_size}.")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing about the machine."""

    name: str
    value: str
    problem: str = ""
    """What is wrong and how to mend it; empty if all is well."""


def run(options: DoctorOptions, console: Console) -> dict[str, Any]:
    """Look at everything; a part that cannot be looked at is itself a finding.

    Raises:
        InputError: there is no such folder.
    """
    if not options.folder.is_dir():
        raise InputError(f"There is no folder {options.folder}. Name the one that will hold data and runs.")
    findings: list[Finding] = []
    for look in (_python, _packages, _processor, _torch, _bfloat16, _gpu, _backends, _disk, _caches):
        try:
            findings += look(options)
        except Exception as error:
            # A broken installation is what this verb is for, so it must survive one.
            name = look.__name__.strip("_")
            problem = (
                f"{type(error).__name__}: {error}. Install StarLM again: pip install --force-reinstall starlm"
            )
            findings.append(Finding(name=name, value="failed", problem=problem))
    console.table([(finding.name, finding.value) for finding in findings])
    problems = [finding for finding in findings if finding.problem]
    console.say()
    for finding in problems:
        console.say(f"! {finding.name}: {finding.problem}")
    if not problems:
        console.say("No problem found.")
    return {
        "machine": {finding.name: finding.value for finding in findings},
        "problems": {finding.name: finding.problem for finding in problems},
    }


def _python(options: DoctorOptions) -> Iterator[Finding]:
    yield Finding(name="starlm", value=f"{__version__} in {Path(__file__).parents[1]}")
    yield Finding(name="python", value=f"{platform.python_version()} in {sys.prefix}")
    yield Finding(name="platform", value=platform.platform())


def _packages(options: DoctorOptions) -> Iterator[Finding]:
    for name in ("torch", "numba", "numpy", "tokenizers", "transformers"):
        try:
            yield Finding(name=name, value=version(name))
        except PackageNotFoundError:
            problem = "" if name == "transformers" else f"It is missing. Run: pip install {name}"
            yield Finding(name=name, value="not installed", problem=problem)


def _processor(options: DoctorOptions) -> Iterator[Finding]:
    import psutil
    import torch

    from starlm.device import free_memory

    cores, memory = psutil.cpu_count(logical=False), psutil.virtual_memory()
    yield Finding(
        name="processor", value=f"{processor()}: {cores} cores, {_usable_threads()} threads usable here"
    )
    free = free_memory(torch.device("cpu"))
    low = "Under 2 GiB is usable: close programs, or train with a smaller --batch-tokens and --model.depth."
    yield Finding(
        name="memory",
        value=f"{free / GIB:.1f} GiB usable here of {memory.total / GIB:.1f} of the machine",
        problem=low if free < 2 * GIB else "",
    )


def _torch(options: DoctorOptions) -> Iterator[Finding]:
    import torch

    threads, cores = torch.get_num_threads(), _usable_threads()
    few = f"PyTorch uses {threads} of {cores}. Unset OMP_NUM_THREADS, or set it to the number of cores."
    yield Finding(name="torch threads", value=str(threads), problem=few if threads * 4 < cores else "")


def _usable_threads() -> int:
    """Threads that this process may run on; fewer than the machine has in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bfloat16(options: DoctorOptions) -> Iterator[Finding]:
    import torch

    from starlm.device import has_bfloat16, pick_device

    size = options.matmul_size
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype)
        seconds = _seconds(lambda matrix=matrix: matrix @ matrix)
        rates[dtype] = 2 * size**3 / seconds / 1e9
    said = "bfloat16" if has_bfloat16(pick_device("cpu")) else "float32"
    yield Finding(
        name="matmul on the CPU",
        value=f"float32 {rates[torch.float32]:,.0f}, bfloat16 {rates[torch.bfloat16]:,.0f} GFLOP/s; "
        f"precision=auto takes {said}",
    )


def _seconds(call: Callable[[], Any], budget: float = 0.2) -> float:
    """The fastest of several calls within a budget of seconds."""
    call()
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


def _gpu(options: DoctorOptions) -> Iterator[Finding]:
    import torch

    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield Finding(
            name=f"GPU {number}", value=f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
        )
    if torch.cuda.device_count():
        return
    problem = ""
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        problem = (
            "There is an NVIDIA driver, but PyTorch is a CPU build. Install one from pytorch.org for CUDA."
        )
    yield Finding(name="GPU", value="none that PyTorch can use", problem=problem)


def _backends(options: DoctorOptions) -> Iterator[Finding]:
    import torch

    from starlm.ops import Backend, deform

    values, shift = torch.randn(1, 8, 2, 4), torch.rand(1, 8, 2, 4) * 4
    expected = deform(values, shift, backend="reference")
    for name in get_args(Backend):
        if name in ("auto", "reference"):
            continue
        device = "cuda" if name == "triton" else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            yield Finding(name=f"operator, {name}", value="not used, no GPU")
            continue
        try:
            found = deform(values.to(device), shift.to(device), backend=name).cpu()
            right = torch.allclose(found, expected, atol=1e-5)
            problem = (
                "" if right else f"It computes something else than the definition. Report it: {__version__}."
            )
        except Exception as error:
            problem = (
                f"It does not run here ({type(error).__name__}: {error}); backend=reference does, slower."
            )
        yield Finding(name=f"operator, {name}", value="fails" if problem else "works", problem=problem)


def _disk(options: DoctorOptions) -> Iterator[Finding]:
    usage = shutil.disk_usage(options.folder)
    low = "Under 1 GiB is free: remove old checkpoints (runs/*/checkpoints), or use another disk."
    yield Finding(
        name="disk",
        value=f"{usage.free / GIB:.1f} GiB free at {options.folder.resolve()}",
        problem=low if usage.free < GIB else "",
    )
    if not os.access(options.folder, os.W_OK):
        yield Finding(
            name="folder",
            value="not writable",
            problem=f"{options.folder.resolve()} cannot be written. Change to another folder.",
        )


def _caches(options: DoctorOptions) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE
    from numba.core.dispatcher import Dispatcher

    from starlm.data.download import cache_folder
    from starlm.ops import cpu

    kernels = [value for value in vars(cpu).values() if isinstance(value, Dispatcher)]
    folders = sorted({str(kernel.stats.cache_path) for kernel in kernels if kernel.stats.cache_path})
    for folder in folders:
        yield Finding(name="cache of compiled kernels", value=folder)
    if kernels and not folders:
        yield Finding(
            name="cache of compiled kernels",
            value="none",
            problem="No folder for it can be written, so kernels are compiled at every start. Set "
            "NUMBA_CACHE_DIR to a folder that can.",
        )
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
    yield Finding(name="cache of torch.compile", value=folder)
    yield Finding(name="cache of downloads", value=str(cache_folder()))
    yield Finding(name="cache of Hugging Face", value=HF_HUB_CACHE)


VERBS = {"doctor": Verb(options=DoctorOptions, run=run)}
