"""CUDA by ctypes: the types of every call, held against a library compiled from C that keeps to NVIDIA's signatures."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edgeprune.errors import DeviceError, MissingDependency
from edgeprune.runtimes.engine import cuda as cuda_module
from edgeprune.runtimes.engine.cuda import SIGNATURES, Cuda

# The signatures are those of the CUDA Runtime API manual; "the GPU's memory" is the host's, high up in its 64 bits.
SOURCE = r"""
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
typedef int error;
typedef void *stream, *event, *graph, *executable;
static int last, capturing, launched;
const char *cudaGetErrorString(error e) { return e == 2 ? "out of memory" : e == 1 ? "invalid argument" : "other"; }
error cudaGetLastError(void) { int e = last; last = 0; return e; }
error cudaMalloc(void **p, size_t n) { if (n > ((size_t)1 << 40)) return 2; *p = malloc(n); return 0; }
error cudaFree(void *p) { free(p); return 0; }
error cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, stream s) {
  if (s != (stream)0x7000000000000001 || (kind != 1 && kind != 2)) return 1;
  memcpy(to, from, n); return 0; }
error cudaMemGetInfo(size_t *f, size_t *t) { *f = (size_t)5 << 32; *t = (size_t)8 << 32; return 0; }
error cudaStreamCreate(stream *s) { *s = (stream)0x7000000000000001; return 0; }
error cudaStreamDestroy(stream s) { return 0; }
error cudaStreamSynchronize(stream s) { return s == (stream)0x7000000000000001 ? 0 : 1; }
error cudaStreamBeginCapture(stream s, int mode) { capturing = 1; return mode == 1 ? 0 : 1; }
error cudaStreamEndCapture(stream s, graph *g) {
  if (!capturing) return 1;
  capturing = 0; *g = (graph)0x7000000000000002; return 0; }
error cudaGraphInstantiateWithFlags(executable *e, graph g, unsigned long long flags) {
  if (g != (graph)0x7000000000000002 || flags) return 1;
  *e = (executable)0x7000000000000003; return 0; }
error cudaGraphLaunch(executable e, stream s) { launched++; return e == (executable)0x7000000000000003 ? 0 : 1; }
error cudaGraphDestroy(graph g) { return g == (graph)0x7000000000000002 ? 0 : 1; }
error cudaGraphExecDestroy(executable e) { return 0; }
error cudaEventCreate(event *e) { *e = calloc(1, 8); return 0; }
error cudaEventDestroy(event e) { free(e); return 0; }
error cudaEventRecord(event e, stream s) { *(double *)e = launched; return 0; }
error cudaEventSynchronize(event e) { return 0; }
error cudaEventElapsedTime(float *ms, event a, event b) { *ms = 0.25f * (*(double *)b - *(double *)a); return 0; }
error cudaDeviceGetAttribute(int *v, int which, int device) {
  *v = which == 75 ? 8 : which == 76 ? 7 : which == 18 ? 1 : which == 16 ? 4 : -1; return device; }
error cudaGetDeviceProperties(void *p, int device) { memset(p, 1, 4096); strcpy(p, "Orin"); return device; }
error cudaRuntimeGetVersion(int *v) { *v = 12060; return 0; }
"""


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Cuda:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "cuda.c").write_text(SOURCE)
    library = folder / "libcudart.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(folder / "cuda.c")], check=True
    )
    return cuda_module.load(("no-such-library.so", str(library)))


def test_what_goes_to_the_gpu_comes_back(cuda: Cuda) -> None:
    x, y = np.arange(1000, dtype=np.float32), np.zeros(1000, np.float32)
    stream, there = cuda.made("cudaStreamCreate"), cuda.made("cudaMalloc", x.nbytes)
    assert stream == 0x7000000000000001, "handles keep all of their 64 bits"
    cuda.to_device(there, x.ctypes.data, x.nbytes, stream)
    cuda.to_host(y.ctypes.data, there, y.nbytes, stream)
    cuda.call("cudaStreamSynchronize", stream)
    cuda.call("cudaFree", there)
    np.testing.assert_array_equal(x, y)


def test_a_graph_is_launched_between_two_events(cuda: Cuda) -> None:
    stream, ran = cuda.made("cudaStreamCreate"), []
    graph = cuda.captured(lambda: ran.append(1), stream)
    assert graph == 0x7000000000000003 and ran == [1]
    start, end = cuda.made("cudaEventCreate"), cuda.made("cudaEventCreate")
    cuda.call("cudaEventRecord", start, stream)
    cuda.call("cudaGraphLaunch", graph, stream)
    cuda.call("cudaEventRecord", end, stream)
    assert cuda.elapsed_ns(start, end) == 250_000


def test_work_that_can_not_be_captured_gives_no_graph(cuda: Cuda) -> None:
    def fails() -> None:
        raise DeviceError("not while capturing")

    assert cuda.captured(fails, cuda.made("cudaStreamCreate")) == 0


def test_the_gpu_says_what_it_is(cuda: Cuda) -> None:
    assert (cuda.name(), cuda.capability(), cuda.integrated(), cuda.version()) == (
        "Orin",
        "8.7",
        True,
        "12.6",
    )
    assert cuda.multiprocessors() == 4
    assert (cuda.in_use(), cuda.memory()) == (3 << 32, 8 << 32)


def test_an_error_is_said_in_cudas_words_with_what_to_do(cuda: Cuda) -> None:
    with pytest.raises(DeviceError) as error:
        cuda.made("cudaMalloc", 2**41)
    assert error.value.message == "cudaMalloc failed with CUDA error 2: out of memory"
    assert error.value.hint == "close what else uses the GPU's memory"


def test_a_machine_without_cuda_says_what_to_install() -> None:
    with pytest.raises(MissingDependency) as missing:
        cuda_module.load(("no-such-library.so",))
    assert "no-such-library.so" in missing.value.message
    assert "sudo apt install nvidia-jetpack" in missing.value.hint


def test_every_function_that_is_called_has_its_types() -> None:
    folder = Path(cuda_module.__file__).parent
    used = set()
    for path in (folder / "cuda.py", folder.parent / "tensorrt.py"):
        used |= set(re.findall(r'"(cuda[A-Z]\w+)"', path.read_text()))
    assert used <= set(SIGNATURES)
