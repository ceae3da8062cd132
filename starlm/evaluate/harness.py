"""Tasks of lm-evaluation-harness, on the model as transformers has it."""

import logging
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from starlm.device import pick_device, takes_bfloat16
from starlm.errors import InputError, StarLMError
from starlm.model.folder import find_checkpoint, verify


def run_tasks(
    model: Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    rows: int = 8,
    precision: str = "auto",
    device: str = "auto",
) -> dict[str, dict[str, float]]:
    """The numbers of each task, by name of the measure.

    Contexts are cut on the left to the model's `context`, as they were in training, and begin with <|bos|>.
    A task that does not say how many tokens to generate gets 256, but at most half of `context`.

    Args:
        model: run or checkpoint folder.
        tasks: names that the harness knows, or paths of YAML files that define one.
        limit: examples per task; None takes all.
        rows: sequences per forward pass.
        precision: auto, float32 or bfloat16.
        device: auto, cpu, cuda, or cuda:N.

    Raises:
        InputError: no usable checkpoint, an unknown task or precision, or the extra `eval` is not installed.
        StarLMError: the harness could not run a task.
    """
    folder = find_checkpoint(model)
    verify(folder)
    needed = ("lm_eval", "transformers", "accelerate", "datasets")
    if missing := [name for name in needed if find_spec(name) is None]:
        raise InputError(
            f"--lm-eval needs lm-evaluation-harness and its parts; not installed: {', '.join(missing)}. "
            f"Install StarLM with its extra: pip install -e '.[eval]'"
        )
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks.manager import TaskManager
    from transformers import AutoTokenizer

    from starlm.evaluate.windows import Windows
    from starlm.hf import StarLMForCausalLM

    place = pick_device(device)
    bfloat16 = takes_bfloat16(precision, place)
    files = [task for task in tasks if Path(task).is_file()]
    # It reads thousands of files to know its own tasks.
    manager = TaskManager(include_defaults=len(files) < len(tasks))
    for task in tasks:
        if task not in files and task not in manager.all_tasks:
            raise InputError(
                f"lm-evaluation-harness knows no task {task!r}, and no file has that name. Its tasks: "
                f"lm-eval ls tasks."
            )
    wrapper: Any = StarLMForCausalLM.from_pretrained(folder)
    # It warns of whatever it chooses by itself.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = Windows(
        wrapper.to(place),  # type: ignore[call-arg]
        tokenizer=AutoTokenizer.from_pretrained(folder),
        backend="causal",
        batch_size=rows,
        mixed_precision_dtype=torch.bfloat16 if bfloat16 else None,
    )
    try:
        found: Any = simple_evaluate(
            harness, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
        )
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500].rstrip(".: ")
        raise StarLMError(
            f"lm-evaluation-harness could not run {', '.join(tasks)}: {text}.{_cure(error)}"
        ) from error
    return {task: _numbers(measures) for task, measures in found["results"].items()}


def _cure(error: BaseException) -> str:
    """What to do about an error of the harness, where it is known; begins with a blank."""
    if "max tokens to generate" in str(error):
        return " Write a smaller max_gen_toks into the task's generation_kwargs."
    cause: BaseException | None = error
    while cause is not None:
        unreachable = isinstance(cause, ConnectionError | TimeoutError | socket.gaierror)
        if unreachable or (isinstance(cause, FileNotFoundError) and "://" in str(cause)):
            return " Without a network, a task must read its data from files."
        cause = cause.__cause__ or cause.__context__
    return ""


def _numbers(measures: dict[str, Any]) -> dict[str, float]:
    """Name -> number; the harness's names end with the filter of the answers, mostly none.

    What it calls sample_len is how many examples there were.
    """
    return {
        name.removesuffix(",none"): value
        for name, value in measures.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "sample_len"
    }
