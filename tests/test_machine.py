"""Memory of a machine, and of a container that may not have all of it."""

import psutil
import pytest

from msr_dist.machine import free_memory, main_memory

MIB = 1 << 20


@pytest.fixture
def container(tmp_path):
    """One that may take 256 MiB, and holds 100, of which 30 are files'."""
    (tmp_path / "memory.max").write_text(f"{256 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{100 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {70 * MIB}\nfile {30 * MIB}\nkernel 0\n")
    return tmp_path


def test_a_container_has_what_it_may_take(container):
    assert main_memory(container) == 256 * MIB
    assert free_memory(container) == (256 - 70) * MIB


def test_without_a_limit_it_is_the_machines(container, tmp_path):
    (container / "memory.max").write_text("max\n")
    for folder in (container, tmp_path / "none"):
        assert main_memory(folder) == psutil.virtual_memory().total
        assert free_memory(folder) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
