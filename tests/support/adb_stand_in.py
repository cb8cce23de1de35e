"""A script that acts like adb with one phone, which is a folder of this machine; there is no phone here to test with.

It does what the real one does as far as it is used: shell -T runs a command by sh with its input, outputs and status,
push and pull copy. What it says without a phone is word for word what adb 29 says.
"""

from __future__ import annotations

import stat
from pathlib import Path

from edgeprune.devices._base import ShellDevice, device_from_url

SERIAL = "R5CT10ABCDE"
_SCRIPT = r"""#!/bin/sh
fault='@FOLDER@/fault'
if [ "$1" = -s ]; then
    [ "$2" = '@SERIAL@' ] || { echo "error: device '$2' not found" >&2; exit 1; }
    shift 2
fi
if [ -s "$fault" ]; then cat "$fault" >&2; exit 1; fi
export TMPDIR='@FOLDER@/phone'
case $1 in
shell)
    [ "$2" = -T ] && [ $# -eq 3 ] || { echo "adb: unexpected: $*" >&2; exit 9; }
    exec sh -c "$3"
    ;;
push | pull)
    [ "$#" -eq 3 ] || { echo "adb: unexpected: $*" >&2; exit 9; }
    if [ -e '@FOLDER@/full' ] && [ "$1" = push ]; then
        head -c 10 "$2" >"$3"
        echo "adb: error: failed to copy '$2' to '$3': remote write failed: No space left on device" >&2
        exit 1
    fi
    cp -- "$2" "$3" && echo "$2: 1 file ${1}ed, 0 skipped."
    ;;
*)
    echo "adb: unknown command $1" >&2
    exit 1
    ;;
esac
"""

_BENCHMARK = r"""#!/bin/sh
# Acts like onnxruntime_perf_test: one row a run, slower for the dense model; the first of a process is slow.
echo "$0 $*" >>"$(dirname "$0")/../../calls"
[ "$LD_LIBRARY_PATH" = "$(dirname "$0")" ] || exit 9
while [ $# -gt 2 ]; do
    [ "$1" = -r ] && runs=$2
    shift
done
[ -f "$1" ] || { echo "Load model from $1 failed:Load model $1 failed. File doesn't exist" >&2; exit 1; }
[ "${1%few.onnx}" = "$1" ] || runs=$((runs - 1))
case $1 in
*broken*) echo "Invalid model" >&2; exit 1 ;;
*-slow.onnx) time=0.02 ;;
*dense*) time=0.004 ;;
*) time=0.002 ;;
esac
i=0
while [ "$i" -lt "$runs" ]; do
    [ "$i" -eq 0 ] && t=0.009 || t=$time
    echo "m,$t,30000000,90,$i" >>"$2"
    i=$((i + 1))
done
printf '\nP50 Latency: %s s\n' "$time" >>"$2"
echo "Session creation time cost: 0.01 s"
"""


def native(folder: Path) -> ShellDevice:
    """The phone with the benchmark program, which lies in a new folder with a library here."""
    folder.mkdir()
    (folder / "onnxruntime_perf_test").write_text(_BENCHMARK)
    (folder / "libonnxruntime.so").write_text("")
    device = device_from_url(f"adb://{SERIAL}", {"benchmark": str(folder), "cores": 2})
    assert isinstance(device, ShellDevice)
    return device


def install(folder: Path) -> Path:
    """Write it and its phone into a folder, and give the folder to put before PATH.

    A text in `folder/fault` is what it says instead of working; a file `folder/full` fills the phone's disk.
    """
    (folder / "bin").mkdir(parents=True)
    (folder / "phone").mkdir()
    adb = folder / "bin" / "adb"
    adb.write_text(_SCRIPT.replace("@FOLDER@", str(folder)).replace("@SERIAL@", SERIAL))
    adb.chmod(adb.stat().st_mode | stat.S_IXUSR)
    return folder / "bin"
