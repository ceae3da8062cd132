"""What the machine is said to be able to do."""

import time

import pytest
import torch

from starlm import device


@pytest.fixture
def asked_anew():
    device._cpu_has_bfloat16.cache_clear()
    yield lambda: device.has_bfloat16(torch.device("cpu"))
    device._cpu_has_bfloat16.cache_clear()


@pytest.mark.parametrize("instructions", [{}, {"avx512_bf16": False, "avx2": True}])
def test_without_instructions_nothing_is_measured(asked_anew, monkeypatch, instructions):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: pytest.fail("a product"))
    assert not asked_anew()


@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "bf16"])
@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_where_there_are_instructions_a_measurement_decides(asked_anew, monkeypatch, name, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, weight: time.sleep(0.05 if x.dtype == slow else 0.001)
    )
    assert asked_anew() == (slow == torch.float32)
    # Once is enough.
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: pytest.fail("a product"))
    asked_anew()


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [("max", "5", None), ("1000", "900", 100 + 30), ("soon", "5", None), (None, None, None)],
)
def test_memory_of_a_container_has_an_end(tmp_path, monkeypatch, limit, used, left):
    monkeypatch.setattr(device, "_CGROUP", tmp_path)
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text(used + "\n")
        (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 30\n")
    free = device.free_memory(torch.device("cpu"))
    assert free == left if left is not None else free > 1 << 20
