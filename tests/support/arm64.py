"""A Linux for arm64 with ONNX Runtime in a folder, run by qemu: how it is made, run, and put behind a real sshd.

`python tests/support/arm64.py FOLDER` makes it (about 200 MB, from Debian's packages and PyPI's wheels); the tests look
for it in build/arm64 and skip where it is not there. Nothing of it needs root but the sshd, which locks its guests
into the folder, with the kernel told, for this one server, that qemu runs arm64 programs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "build" / "arm64"
QEMU = shutil.which("qemu-aarch64-static") or "/usr/bin/qemu-aarch64-static"
CPU = "cortex-a76"
ENVIRONMENT = f"QEMU_CPU={CPU} OMP_NUM_THREADS=1"
PYTHON = "3.11"
PACKAGES = (
    *(
        "libc6",
        "libgcc-s1",
        "libstdc++6",
        "zlib1g",
        "libexpat1",
        "libssl3",
        "libffi8",
        "libbz2-1.0",
        "liblzma5",
    ),
    *("libsqlite3-0", "libuuid1", "libdb5.3", "libncursesw6", "libtinfo6", "libreadline8", "libcrypt1"),
    *(
        f"libpython{PYTHON}-minimal",
        f"libpython{PYTHON}-stdlib",
        f"python{PYTHON}-minimal",
        f"python{PYTHON}",
    ),
    *(
        "dash",
        "bash",
        "coreutils",
        "libacl1",
        "libattr1",
        "libgmp10",
        "libselinux1",
        "libpcre2-8-0",
        "grep",
        "sed",
    ),
    "util-linux",
)
WHEELS = (
    "manylinux_2_28_aarch64",
    "manylinux_2_27_aarch64",
    "manylinux_2_17_aarch64",
    "manylinux2014_aarch64",
)
# ONNX Runtime looks here for what the processor can do, and crashes under qemu when it finds that of an x86. No more
# than what qemu's Cortex-A76 has.
CPUINFO = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""
# The ELF header of arm64 programs, and what of it counts, for the kernel (binfmt_misc). F: qemu is opened now, so that
# it is found from within the folder.
BINFMT = (
    r":{name}:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:"
    r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:{qemu}:F"
)


def why_not() -> str:
    """What is missing to run arm64 programs here; "" when nothing is."""
    if not Path(QEMU).is_file():
        return "no qemu-aarch64-static: apt-get install qemu-user-static"
    if not (FOLDER / "complete").is_file():
        return f"no arm64 system in {FOLDER}: python tests/support/arm64.py build/arm64"
    return ""


def python(argv: list[str], stdin: bytes, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    """Run the folder's Python, without root: qemu looks for its files in the folder first."""
    command = [QEMU, "-cpu", CPU, "-L", str(FOLDER), str(FOLDER / f"usr/bin/python{PYTHON}"), *argv]
    environment = {**os.environ, "QEMU_SET_ENV": "PYTHONHOME=/usr,OMP_NUM_THREADS=1"}
    return subprocess.run(
        command, input=stdin, env=environment, capture_output=True, timeout=timeout_s, check=False
    )


def make(folder: Path) -> None:
    """Make the system in a folder that is not there yet."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch:
        for archive in _packages(Path(scratch)):
            subprocess.run(["dpkg-deb", "-x", str(archive), str(part)], check=True)
        site = part / f"usr/local/lib/python{PYTHON}/dist-packages"
        site.mkdir(parents=True)
        for wheel in _wheels(Path(scratch)):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
    for name in ("proc", "dev", "tmp", "root"):
        (part / name).mkdir(exist_ok=True)
    (part / "proc/cpuinfo").write_text(CPUINFO)
    (part / "usr/bin/python3").symlink_to(f"python{PYTHON}")
    if not (part / "bin/sh").exists():
        (part / "bin/sh").symlink_to("dash")
    (part / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (part / "complete").write_text("")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _packages(scratch: Path) -> list[Path]:
    """Debian's packages for arm64, by the apt of this machine with lists of its own."""
    for name in ("lists/partial", "cache/archives/partial", "debs"):
        (scratch / name).mkdir(parents=True)
    (scratch / "status").write_text("")
    scratch.chmod(0o755)
    options = [
        "-oAPT::Architecture=arm64", "-oAPT::Architectures=arm64", f"-oDir::State::Lists={scratch}/lists",
        f"-oDir::Cache={scratch}/cache", f"-oDir::State::status={scratch}/status", "-oDebug::NoLocking=1",
        "-oAPT::Sandbox::User=root",
    ]  # fmt: skip
    subprocess.run(["apt-get", *options, "-qq", "update"], check=True)
    subprocess.run(["apt-get", *options, "-qq", "download", *PACKAGES], cwd=scratch / "debs", check=True)
    return sorted((scratch / "debs").glob("*.deb"))


def _wheels(scratch: Path) -> list[Path]:
    """PyPI's wheels for arm64, of the version of ONNX Runtime that is installed here."""
    wanted = f"onnxruntime=={metadata.version('onnxruntime')}"
    platforms = [word for name in WHEELS for word in ("--platform", name)]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "-d", scratch / "wheels",
         *platforms, "--python-version", PYTHON, "--only-binary=:all:", wanted, "numpy"], check=True,
    )  # fmt: skip
    return sorted((scratch / "wheels").glob("*.whl"))


@contextmanager
def locked_in(folder: Path) -> Iterator[tuple[list[str], str]]:
    """The words to start an sshd with, and a line for its configuration, so that who comes in is on the arm64 system.

    It has mounts of its own, which go with it: the system, a fresh /tmp, /dev and /proc, and the kernel's list of
    interpreters, which is a list of its own where the kernel has one for each user namespace.

    Yields:
        The words, and the configuration.
    """
    name = f"edgeprune-{os.getpid()}"
    binfmt = BINFMT.format(name=name, qemu=QEMU)
    mounts = folder / "mounts"
    mounts.write_text(
        f"""set -e
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/arm64
mount --bind '{FOLDER}' /mnt/arm64
mount -t tmpfs -o mode=1777,size=256m tmpfs /mnt/arm64/tmp
mount --rbind /dev /mnt/arm64/dev
cp /mnt/arm64/proc/cpuinfo /mnt/cpuinfo
mount -t proc proc /mnt/arm64/proc
mount --bind /mnt/cpuinfo /mnt/arm64/proc/cpuinfo
[ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
printf '%s' '{binfmt}' >/proc/sys/fs/binfmt_misc/register
exec "$@"
"""
    )
    try:
        yield (
            ["unshare", "--mount", "--propagation", "private", "sh", str(mounts)],
            "ChrootDirectory /mnt/arm64\n",
        )
    finally:
        forget = f"[ ! -e /proc/sys/fs/binfmt_misc/{name} ] || echo -1 >/proc/sys/fs/binfmt_misc/{name}"
        mount = "[ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc"
        subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", f"{mount}; {forget}"], check=False,
            capture_output=True,
        )  # fmt: skip


def main() -> int:
    """Make it where the first argument says; says why where it can't be made."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    if (folder / "complete").is_file():
        return 0
    release = Path("/etc/os-release").read_text(encoding="utf-8") if Path("/etc/os-release").is_file() else ""
    if not re.search(r"^VERSION_CODENAME=bookworm$", release, re.MULTILINE):
        print("arm64: the packages are named for Debian 12, which this system is not", file=sys.stderr)
        return 1
    start = time.monotonic()
    try:
        make(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"arm64: {error}", file=sys.stderr)
        return 1
    print(f"arm64: made in {time.monotonic() - start:.0f} s in {folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
