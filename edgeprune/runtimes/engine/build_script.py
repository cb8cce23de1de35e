"""build_engine.sh: a shell script that builds a TensorRT engine on the board and times it with trtexec."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from edgeprune.errors import visible
from edgeprune.records import Artifact, Target

# The memory of a Jetson is the CPU's too; a quarter leaves room for the system and for the engine itself.
WORKSPACE_SHARE = 4
LEAST_WORKSPACE_MIB = 64


def workspace_mib(memory_bytes: int) -> int:
    """How much memory building may take on a machine with so much, in MiB."""
    return max(memory_bytes // WORKSPACE_SHARE // 2**20, LEAST_WORKSPACE_MIB)


def engine_script(target: Target, artifact: Artifact, *, dynamic_batch: bool, sparse: bool = False) -> str:
    """The text of build_engine.sh: POSIX sh, to be run on the Jetson beside the ONNX file.

    It finds trtexec, reads its version and gives it the flags that this version has (TensorRT 8.2 to 11),
    so that all of them build the same network and time the same thing: one image at a time on the GPU
    alone, with a CUDA graph, spinning, no transfers. No precision is chosen: it is in the file.
    """
    shape = "x".join(str(n) for n in (1, *artifact.input.shape))
    values = {
        "TITLE": " ".join(visible(target.title).split()),
        "EXPECTED": shlex.quote(str(target.setup.get("tensorrt", ""))),
        "JETPACK": shlex.quote(str(target.setup.get("jetpack", ""))),
        "ONNX": shlex.quote(Path(artifact.path).name),
        "FILE": " ".join(visible(Path(artifact.path).name).split()),
        "OPSET": str(artifact.opset),
        "PRECISION": shlex.quote(artifact.precision),
        "SPARSITY": "enable" if sparse else "disable",
        "SHAPE": shlex.quote(f"input:{shape}" if dynamic_batch else ""),
        "WORKSPACE": str(workspace_mib(target.memory_bytes)),
    }
    # One pass: what a value holds is never taken for another name.
    return re.sub("@([A-Z]+)@", lambda found: values[found[1]], _SCRIPT)


_SCRIPT = r"""#!/bin/sh
# Build a TensorRT engine of an ONNX file on this machine, and time it with trtexec.
#
#   sh build_engine.sh              for @FILE@ beside this script
#   sh build_engine.sh dense.onnx   for another file, to compare
#
# Written for @TITLE@. It leaves, beside the ONNX file and under its name:
# .engine, .timing.cache (makes the next build faster), .build.log, .time.log,
# .times.json (every run), .profile.json and .layers.json (every layer).
# Exit status: 0 done, 2 wrong use, 3 trtexec is missing or too old, 6 trtexec failed.
# The flags are those of trtexec's source from 8.2 to 11.1; nothing has run on this board yet.

set -eu

expected=@EXPECTED@     # TensorRT version of this board's JetPack
jetpack=@JETPACK@
default=@ONNX@
precision=@PRECISION@   # of the ONNX file
shape=@SHAPE@   # of one input, when the file leaves the batch dimension open
workspace=@WORKSPACE@   # MiB for building, a quarter of this board's memory

fail() {
    status=$1
    shift
    echo "error: $*" >&2
    exit "$status"
}

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
[ $# -le 1 ] || fail 2 "one ONNX file at a time, got $#"
onnx=${1:-$here/$default}
case $onnx in
*.onnx) ;;
*) fail 2 "'$onnx' is not an .onnx file" ;;
esac
[ -f "$onnx" ] || fail 2 "no file '$onnx'"
name=${onnx%.onnx}

trtexec=$(command -v trtexec || true)
[ -n "$trtexec" ] || trtexec=/usr/src/tensorrt/bin/trtexec
[ -x "$trtexec" ] || fail 3 "no trtexec in PATH or /usr/src/tensorrt/bin; sudo apt install libnvinfer-bin"

# trtexec says [TensorRT v8201] for 8.2.1 and [TensorRT v100300] for 10.3.0; version becomes 802 and 1003.
code=$("$trtexec" --help 2>&1 | sed -n 's/.*\[TensorRT v\([0-9][0-9]*\)].*/\1/p' | sed -n 1p)
[ -n "$code" ] || fail 3 "'$trtexec --help' does not tell its version"
if [ "$code" -ge 10000 ]; then
    version=$((code / 100))
else
    version=$((code / 1000 * 100 + code % 1000 / 100))
fi
found=$((version / 100)).$((version % 100))
[ "$version" -ge 802 ] || fail 3 "TensorRT $found is too old, 8.2 is needed: install JetPack 4.6.1 or newer"
echo "TensorRT $found, $trtexec"
case $expected in
'' | "$found" | "$found".*) ;;
*) echo "note: TensorRT $expected was expected (JetPack $jetpack); the file has ONNX opset @OPSET@" ;;
esac
if command -v nvpmodel >/dev/null 2>&1; then
    nvpmodel -q 2>/dev/null || true
    echo "note: clocks follow the load until 'sudo jetson_clocks' holds them"
fi

run() {
    log=$1
    shift
    echo "trtexec $*"
    if ! "$trtexec" "$@" >"$log" 2>&1; then
        tail -n 20 -- "$log" >&2
        fail 6 "trtexec failed, all it said is in '$log'"
    fi
}

set -- "--onnx=$onnx" "--saveEngine=$name.engine" "--timingCacheFile=$name.timing.cache"
set -- "$@" --profilingVerbosity=detailed --sparsity=@SPARSITY@
if [ "$version" -ge 804 ]; then
    set -- "$@" "--memPoolSize=workspace:$workspace"
else
    set -- "$@" "--workspace=$workspace"
fi
if [ "$version" -ge 806 ]; then
    set -- "$@" --builderOptimizationLevel=3 --skipInference
else
    set -- "$@" --buildOnly
fi
# The precision is the file's: TensorRT 11 takes it from there, 10 does when told, 8 needs leave to use it.
if [ "$version" -ge 1000 ] && [ "$version" -lt 1100 ]; then
    set -- "$@" --stronglyTyped
elif [ "$version" -lt 1000 ] && [ "$precision" != fp32 ]; then
    set -- "$@" "--$precision"
fi
if [ -n "$shape" ]; then
    set -- "$@" "--minShapes=$shape" "--optShapes=$shape" "--maxShapes=$shape"
fi
run "$name.build.log" "$@"

# TensorRT 11 changed what trtexec does when not told: no transfers, a CUDA graph, spinning. So it is told.
set -- "--loadEngine=$name.engine" --noDataTransfers --useCudaGraph --useSpinWait
set -- "$@" --warmUp=1000 --duration=10 --iterations=200 --avgRuns=100 --sleepTime=0 --idleTime=0
if [ "$version" -ge 806 ]; then
    set -- "$@" --infStreams=1
else
    set -- "$@" --streams=1
fi
if [ "$version" -ge 805 ]; then
    set -- "$@" --percentile=50,90,99
else
    set -- "$@" --percentile=99
fi
# Layers are timed in a run of their own; TensorRT 11 always does so and will drop the flag.
if [ "$version" -lt 1100 ]; then
    set -- "$@" --separateProfileRun
fi
if [ -n "$shape" ]; then
    set -- "$@" "--shapes=$shape"
fi
set -- "$@" --profilingVerbosity=detailed "--exportTimes=$name.times.json"
set -- "$@" "--exportProfile=$name.profile.json" "--exportLayerInfo=$name.layers.json"
run "$name.time.log" "$@"

grep -E 'Throughput:|Latency:|GPU Compute Time:' -- "$name.time.log" || true
echo "engine: $name.engine"
"""
