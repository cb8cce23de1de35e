"""A script that acts like adb with one phone, which is a folder of this machine; there is no phone here to test with.

It does what the real one does as far as it is used: shell -T runs a command by sh with its input, outputs and status,
push and pull copy. What it says without a phone is word for word what adb 29 says.
"""

from __future__ import annotations

import stat
from pathlib import Path

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
