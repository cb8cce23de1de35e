"""The device profiles: complete, sourced line by line, plausible; and the machine that `local` adapts to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgeprune import host, targets
from edgeprune.errors import UsageError
from edgeprune.host import machine

ALL = targets.names("targets")

JETSONS = [name for name in ALL if name.startswith("jetson-")]
WANTED = {
    "local",
    "jetson",
    "jetson-orin-nano",
    "jetson-orin-nx",
    "jetson-agx-orin",
    "jetson-xavier-nx",
    "jetson-nano",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "android-arm64",
}


def source(name: str) -> str:
    """The text of a bundled profile."""
    return (targets.folder("targets") / f"{name}.toml").read_text(encoding="utf-8")


def test_the_promised_targets_are_there() -> None:
    assert set(ALL) >= WANTED


@pytest.mark.parametrize("name", ALL)
def test_a_target_has_every_fact(name: str) -> None:
    target = targets.target(name)
    assert target.title
    assert target.runtime in ("onnxruntime", "tensorrt")
    assert target.device in ("local", "ssh", "adb")
    assert set(target.precisions) <= set(targets.PRECISIONS)
    assert "fp32" in target.precisions
    assert set(target.multiple_of) == set(targets.PRECISIONS)
    assert all(value >= 1 for value in target.multiple_of.values())
    assert 1e9 <= target.memory_bytes <= 1e12
    assert target.setup["threads"] >= 1
    if name != "local":
        assert 1e9 <= target.bandwidth <= 1e12
        assert set(target.peak) == set(target.precisions)
        assert [target.peak[p] for p in targets.PRECISIONS if p in target.peak] == sorted(
            target.peak.values()
        )


@pytest.mark.parametrize("name", ALL)
def test_every_fact_is_followed_or_preceded_by_a_comment_with_its_source(name: str) -> None:
    lines = source(name).splitlines()
    for above, line in zip(["", *lines[:-1]], lines, strict=True):
        if re.match(r"[a-z_0-9]+ = ", line):
            comment = line.partition("#")[2] or (above if above.startswith("#") else "")
            assert re.search(r"[A-Za-z]{3}", comment), f"{name}: no source for {line!r}"


@pytest.mark.parametrize("name", ALL)
def test_the_sources_listed_on_top_are_those_that_the_comments_name(name: str) -> None:
    text = source(name)
    listed = set(re.findall(r"^# \[([a-z0-9 ]+)\]", text, re.MULTILINE))
    comments = [line.partition("#")[2] for line in text.splitlines() if line[:1] != "#"]
    used = set(re.findall(r"\[([a-z0-9 ]+)\]", "\n".join(comments)))
    assert used == listed


def test_jetson_is_another_name_of_the_orin_nano() -> None:
    assert targets.target("jetson") == targets.target("jetson-orin-nano")
    assert targets.target("jetson").name == "jetson-orin-nano"


@pytest.mark.parametrize("name", JETSONS)
def test_a_jetson_says_which_tensorrt_it_has_and_exports_no_newer_opset(name: str) -> None:
    target = targets.target(name)
    newest = {"8.2": 13, "8.5": 17, "10.3": 20}[target.setup["tensorrt"]]
    assert target.runtime == "tensorrt"
    assert target.opset == target.setup["max_opset"] == newest
    assert re.fullmatch(r"\d+\.\d+", target.setup["jetpack"])
    assert re.fullmatch(r"\d\.\d", target.setup["compute_capability"])
    assert target.setup["dla"] in (0, 2)


@pytest.mark.parametrize(
    ("name", "precision", "operations"),
    [
        ("jetson-orin-nano", "fp32", 1024 * 2 * 0.625e9),
        ("jetson-orin-nano", "int8", 32 * 512 * 2 * 0.625e9),
        ("jetson-orin-nx", "fp16", 32 * 256 * 2 * 0.918e9),
        ("jetson-agx-orin", "fp32", 2048 * 2 * 1.3e9),
        ("jetson-agx-orin", "int8", 64 * 512 * 2 * 1.3e9),
        ("jetson-xavier-nx", "fp16", 48 * 64 * 2 * 1.1e9),
        ("jetson-nano", "fp16", 128 * 2 * 2 * 0.9216e9),
        ("raspberry-pi-4", "fp32", 4 * 1.5e9 * 4 * 2),
        ("raspberry-pi-5", "int8", 4 * 2.4e9 * 16 * 2 * 2),
    ],
)
def test_a_peak_is_the_arithmetic_that_its_comment_shows(
    name: str, precision: str, operations: float
) -> None:
    # 3 %: the figures are rounded, and NVIDIA's "20 TOPS" is 20.5 by arithmetic
    assert targets.target(name).peak[precision] == pytest.approx(operations, rel=0.03)


@pytest.mark.parametrize(
    ("cpu", "fp32", "int8"), [("avx512", 16, 16), ("avx2", 8, 16), ("arm64", 1, 8), ("other", 1, 1)]
)
def test_local_takes_the_multiples_of_the_cpu_it_runs_on(
    monkeypatch: pytest.MonkeyPatch, cpu: str, fp32: int, int8: int
) -> None:
    monkeypatch.setattr(host, "this", lambda: machine.Machine("x", cpu, 123_456_789, 6))
    target = targets.target("local")
    assert target.multiple_of == {"fp32": fp32, "fp16": 1, "int8": int8}
    assert target.memory_bytes == 123_456_789
    assert (target.setup["cpu"], target.setup["cores"]) == (cpu, 6)


X86 = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni\nbugs\t\t: spectre_v1\n"
ARM = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm asimddp\nCPU part\t: 0xd0b\n"


def test_flags_are_read_from_an_x86_and_from_an_arm_cpuinfo() -> None:
    assert machine.cpu_flags(X86 + X86.replace("avx512f ", "")) == {
        "fpu",
        "sse2",
        "avx2",
        "avx512f",
        "avx512_vnni",
    }
    assert machine.cpu_flags(ARM) == {"fp", "asimd", "evtstrm", "asimddp"}
    assert machine.cpu_flags("flags\t:\nbugs\t: x\n") == frozenset()
    assert machine.cpu_flags("") == frozenset()


@pytest.mark.parametrize(
    ("arch", "flags", "kind"),
    [
        ("x86_64", {"avx2", "avx512f"}, "avx512"),
        ("x86_64", {"avx2", "avx512_vnni"}, "avx2"),
        ("x86_64", {"sse2"}, "other"),
        ("aarch64", {"asimd"}, "arm64"),
        ("riscv64", {"avx2"}, "other"),
    ],
)
def test_the_kind_of_a_cpu_is_its_widest_vector(arch: str, flags: set[str], kind: str) -> None:
    assert machine.cpu_kind(arch, frozenset(flags)) == kind


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("AMD64", "x86_64"),
        ("x86_64", "x86_64"),
        ("arm64", "aarch64"),
        ("aarch64", "aarch64"),
        ("armv7l", "armv7l"),
    ],
)
def test_an_architecture_has_one_name(name: str, arch: str) -> None:
    assert machine.architecture(name) == arch


def test_memory_is_the_total_and_not_what_is_free() -> None:
    assert (
        machine.memory_bytes("MemTotal:       24684084 kB\nMemFree:        20674000 kB\n")
        == 24_684_084 * 1024
    )
    assert machine.memory_bytes("MemFree: 5 kB\n") == 0


def test_a_machine_is_read_from_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(X86)
    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\n")
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    here = machine.this(tmp_path)
    assert (here.architecture, here.cpu, here.memory_bytes) == ("x86_64", "avx512", 8192)
    assert here.cores >= 1


def test_a_machine_without_proc_is_of_unknown_kind_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    here = machine.this(tmp_path)
    assert (here.cpu, here.memory_bytes) == ("other", 0)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A target of one's own, made from a bundled one."""
    path = tmp_path / "board.toml"
    path.write_text(source("raspberry-pi-5"))
    return path


def test_a_path_is_a_target_of_ones_own(mine: Path) -> None:
    target = targets.target(str(mine))
    assert target.name == "board"
    assert target.multiple_of == targets.target("raspberry-pi-5").multiple_of


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("opset = 20", "opsett = 20", "unknown key 'opsett'"),
        ("opset = 20", "", "missing opset"),
        ("opset = 20", 'opset = "20"', "opset = '20' must be of type int"),
        ("opset = 20", "opset = true", "opset = True must be of type int"),
        ("opset = 20", "opset = 3", "opset = 3 must be at least 7"),
        ('memory = "8 GB"', 'memory = "8"', "memory = '8' is not a quantity of that kind"),
        ('memory = "8 GB"', 'memory = "-8 GB"', "memory = '-8 GB' must not be negative"),
        ('memory = "8 GB"', "memory = 8", "memory = 8 must be of type str"),
        ('bandwidth = "17 GB"', 'bandwidth = "fast"', "bandwidth = 'fast' is not a quantity"),
        (
            '["fp32", "int8"]',
            '["fp32", "int4"]',
            "precisions = ['fp32', 'int4'] must name at least one of fp32",
        ),
        ('["fp32", "int8"]', "[]", "precisions = [] must name at least one of fp32"),
        ('["fp32", "int8"]', "[[1]]", "precisions = [[1]] must name"),
        ("int8 = 8 ", "int8 = 0 ", "multiple_of.int8 = 0 must be a whole number >= 1"),
        ("int8 = 8 ", "int8 = 8.5 ", "multiple_of.int8 = 8.5 must be a whole number >= 1"),
        ("int8 = 8 ", "int8 = true ", "multiple_of.int8 = True must be a whole number >= 1"),
        ("int8 = 8 ", "int4 = 8 ", "multiple_of.int4 = 8 must be"),
        ("fp32 = 153.6e9", "fp32 = -1", "peak.fp32 = -1 must be operations per second"),
        ("fp32 = 153.6e9", "fp32 = inf", "peak.fp32 = inf must be operations per second"),
        ("fp32 = 153.6e9", 'fp32 = "1 T"', "peak.fp32 = '1 T' must be operations per second"),
        ("[peak]", "[[peak]]", "peak = [{"),
        ("[setup]", "[cpu.avx1024]", "no table [cpu."),
        ("[multiple_of]", "[multiple_of", "line 17"),
    ],
)
def test_a_wrong_profile_is_refused_with_the_key_and_the_value(
    mine: Path, old: str, new: str, message: str
) -> None:
    text = mine.read_text()
    assert old in text
    mine.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        targets.target(str(mine))
    assert f"{mine}: " in caught.value.message
    assert message in caught.value.message


def test_an_unknown_name_gets_the_closest_one() -> None:
    with pytest.raises(UsageError) as caught:
        targets.target("jetson-orin-nanoo")
    assert caught.value.message == "no target is named 'jetson-orin-nanoo'"
    assert caught.value.hint == "did you mean 'jetson-orin-nano'?"


def test_a_path_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="no file 'none/board.toml'"):
        targets.target("none/board.toml")


def test_an_alias_of_itself_does_not_go_round_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "loop.toml"
    path.write_text(f'alias = "{path}"\n')
    with pytest.raises(UsageError, match="unknown key 'alias'"):
        targets.target(str(path))


@pytest.mark.parametrize("content", [b"\xff\xff", b"a = " + b"[" * 100_000, b"a"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(str(path))):
        targets.target(str(path))
