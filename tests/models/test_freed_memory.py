"""Freed memory is kept for the next tensor."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Page faults of ten tensors of 8 MiB, one after another, each written to: 2,048 pages each where they are new. Before
# them the heap finds its size.
COUNT = """
import resource, sys, torch
from edgeprune.models.replicas import keep_freed_memory as keep_freed
if sys.argv[1] == "keep":
    assert keep_freed()
else:
    # What the library would raise by itself, by and by.
    import ctypes
    ctypes.CDLL(None).mallopt(-3, 128 * 1024)
torch.set_num_threads(1)
for _ in range(20):
    torch.ones(2**21)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**21)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_tensor_gets_the_memory_of_the_one_before() -> None:
    assert faults("keep") < 1024
    assert faults("give back") > 10 * 1024
