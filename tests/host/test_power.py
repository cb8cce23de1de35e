"""Power sensors and the state of a machine, from trees of files as boards have them; energy by integration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_files import write_one_conv

from edgeprune.agent import resources
from edgeprune.host import power, sensors
from edgeprune.runtimes.onnxruntime import OnnxRuntime

HWMON = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def channel(
    number: int, label: str, millivolts: int, milliamperes: int, place: str = HWMON
) -> dict[str, str]:
    return {
        f"{place}/in{number}_label": label,
        f"{place}/in{number}_input": str(millivolts),
        f"{place}/curr{number}_input": str(milliamperes),
    }


ORIN_NANO = {
    **channel(1, "VDD_IN", 5000, 1200), **channel(2, "VDD_CPU_GPU_CV", 5000, 400), **channel(3, "VDD_SOC", 5000, 300),
    f"{HWMON}/in7_label": "sum of shunt voltages", f"{HWMON}/in7_input": "3",
}  # fmt: skip
AGX_ORIN = {
    **channel(1, "VDD_GPU_SOC", 20000, 150), **channel(2, "VDD_CPU_CV", 20000, 50),
    **channel(3, "VIN_SYS_5V0", 5000, 600),
    **channel(2, "VDDQ_VDD2_1V8AO", 5000, 100, "sys/bus/i2c/drivers/ina3221/1-0041/hwmon/hwmon2"),
}  # fmt: skip
IIO = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
NANO = {
    f"{IIO}/rail_name_0": "POM_5V_IN", f"{IIO}/in_power0_input": "2532",
    f"{IIO}/rail_name_1": "POM_5V_GPU", f"{IIO}/in_power1_input": "120",
}  # fmt: skip
THOR = {
    "sys/class/hwmon/hwmon3/name": "ina238", "sys/class/hwmon/hwmon3/power1_input": "31500000",
    "sys/class/hwmon/hwmon4/name": "nvme", "sys/class/hwmon/hwmon4/power1_input": "9000000",
}  # fmt: skip
LINE = (
    "11-21-2026 10:00:00 RAM 2443/7620MB (lfb 4x4MB) SWAP 0/3810MB CPU [1%@1510,0%@1510] GR3D_FREQ 0% "
    "cpu@46.75C gpu@46.9C tj@47.9C VDD_IN 4856mW/4702mW VDD_CPU_GPU_CV 520mW/503mW VDD_SOC 1481mW/1473mW"
)


@pytest.mark.parametrize(
    ("files", "rails", "watts"),
    [
        (ORIN_NANO, ("VDD_IN",), 6.0),
        (AGX_ORIN, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 3.0 + 1.0 + 3.0),
        (NANO, ("POM_5V_IN",), 2.532),
        (THOR, ("VIN",), 31.5),
    ],
    ids=["Orin Nano", "AGX Orin", "Nano", "Thor"],
)
def test_the_power_of_a_board_is_its_input_or_the_sum_of_its_rails(
    tmp_path: Path, files: dict[str, str], rails: tuple[str, ...], watts: float
) -> None:
    tree(tmp_path, files)
    with power.metered(tmp_path, ("no-such-program",)) as meter:
        assert meter is not None
        assert (meter.source, meter.rails) == ("ina", rails)
        assert meter.watts() == pytest.approx(watts)
    assert power.available(tmp_path)


def test_one_sensor_that_is_found_in_two_places_counts_once(tmp_path: Path) -> None:
    tree(tmp_path, {**AGX_ORIN, f"{HWMON}/name": "ina3221"})
    (tmp_path / "sys/class/hwmon").mkdir(parents=True)
    (tmp_path / "sys/class/hwmon/hwmon1").symlink_to(tmp_path / HWMON)
    assert len(power.rails(tmp_path)) == 4


def test_a_rail_that_can_not_be_read_makes_the_power_absent_not_zero(tmp_path: Path) -> None:
    tree(tmp_path, {**AGX_ORIN, f"{HWMON}/curr2_input": "broken"})
    with power.metered(tmp_path, ("no-such-program",)) as meter:
        assert meter is not None and meter.watts() is None


def test_a_machine_without_sensors_has_no_meter(tmp_path: Path) -> None:
    with power.metered(tmp_path, ("no-such-program",)) as meter:
        assert meter is None
    assert power.rails(tmp_path) == []


def test_a_line_of_tegrastats_is_read_without_its_averages() -> None:
    assert power.parsed(LINE) == {"VDD_IN": 4.856, "VDD_CPU_GPU_CV": 0.52, "VDD_SOC": 1.481}
    assert power.parsed("POM_5V_IN 2532/2493 POM_5V_GPU 120/118") == {
        "POM_5V_IN": 2.532,
        "POM_5V_GPU": 0.12,
    }
    assert power.parsed("RAM 2443/7620MB CPU [1%@1510]") == {}


def test_tegrastats_is_the_meter_where_the_kernel_shows_no_sensor(tmp_path: Path) -> None:
    code = f"import time\nwhile True:\n    print({LINE!r}, flush=True)\n    time.sleep(0.001)"
    with power.metered(tmp_path, (sys.executable, "-c", code)) as meter:
        assert meter is not None
        assert (meter.source, meter.rails) == ("tegrastats", ("VDD_IN",))
        assert meter.watts() == pytest.approx(4.856)


def test_a_tegrastats_without_power_is_no_meter(tmp_path: Path) -> None:
    with power.metered(tmp_path, (sys.executable, "-c", "print('RAM 1/2MB')")) as meter:
        assert meter is None


def test_constant_power_integrates_to_power_times_time() -> None:
    samples = [(0.1 * n, 5.0) for n in range(1, 20)]
    assert power.integral(samples, 0.05, 1.95) == pytest.approx(5.0 * 1.9)


def test_a_ramp_integrates_exactly() -> None:
    samples = [(0.1 * n, 1.0 + 0.1 * n) for n in range(0, 21)]
    assert power.integral(samples, 0.0, 2.0) == pytest.approx(2.0 + 2.0)


def test_samples_before_and_after_do_not_count() -> None:
    inside = [(1.0 + 0.1 * n, 2.0) for n in range(11)]
    assert power.integral([(0.5, 99.0), *inside, (2.5, 99.0)], 1.0, 2.0) == pytest.approx(2.0)


def test_too_few_samples_are_no_energy() -> None:
    assert power.integral([(0.1 * n, 5.0) for n in range(9)], 0.0, 1.0) is None


@given(st.lists(st.floats(0.1, 100.0), min_size=10, max_size=60))
def test_energy_lies_between_the_least_and_the_most_power(watts: list[float]) -> None:
    samples = [(float(i), w) for i, w in enumerate(watts)]
    joules = power.integral(samples, 0.0, len(watts) - 1.0)
    assert joules is not None
    assert min(watts) * (len(watts) - 1) - 1e-6 <= joules <= max(watts) * (len(watts) - 1) + 1e-6


def test_energy_of_an_image_is_power_times_its_time(tmp_path: Path) -> None:
    """A board of constant 6 W: whatever the machine does meanwhile, joules over seconds are 6 W."""
    tree(tmp_path / "root", ORIN_NANO)
    file = write_one_conv(tmp_path / "net.onnx", batch=4)
    request = {"model": str(file), "threads": 1, "seconds": 2.5, "idle_seconds": 0.1}
    answer = resources.energy_reply(request, OnnxRuntime(), tmp_path / "root")
    assert answer["source"] == "ina" and answer["rails"] == ["VDD_IN"]
    assert answer["watts"] == pytest.approx(6.0) and answer["idle_watts"] == pytest.approx(6.0)
    assert answer["images"] % 4 == 0
    mean = 6.0 * answer["seconds"] / answer["images"]
    low, high = answer["spread"]
    assert low <= answer["joule"] <= high
    assert low <= mean * 3 and high >= mean / 3
    assert answer["samples"] >= 100


def test_energy_is_absent_with_a_reason_without_sensors(tmp_path: Path) -> None:
    request = {"model": "net.onnx", "threads": 1, "seconds": 1, "idle_seconds": 0.1}
    answer = resources.energy_reply(request, OnnxRuntime(), tmp_path)
    assert answer["joule"] is None
    assert answer["why"].startswith("this machine has no power sensor")


def test_energy_is_absent_when_the_sensor_stops(tmp_path: Path) -> None:
    tree(tmp_path / "root", {**ORIN_NANO, f"{HWMON}/curr1_input": "broken"})
    request = {
        "model": str(write_one_conv(tmp_path / "n.onnx")),
        "threads": 1,
        "seconds": 0.1,
        "idle_seconds": 0.05,
    }
    answer = resources.energy_reply(request, OnnxRuntime(), tmp_path / "root")
    assert answer["joule"] is None
    assert answer["why"] == "ina gave too few readings of VDD_IN"


CPU = "sys/devices/system/cpu"
BOARD = {
    f"{CPU}/cpu0/cpufreq/scaling_governor": "schedutil",
    f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "729600",
    f"{CPU}/cpu4/cpufreq/scaling_cur_freq": "1510400",
    f"{CPU}/cpu0/cpufreq/cpuinfo_max_freq": "1510400",
    "sys/class/thermal/thermal_zone0/temp": "46750",
    "sys/class/thermal/thermal_zone1/temp": "-256000",
    "sys/class/thermal/thermal_zone2/temp": "47900",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000",
    "sys/class/devfreq/3507d000.ufs/cur_freq": "999000000",
    "proc/loadavg": "0.52 0.40 0.30 1/200 1234",
}


def answers(text: dict[str, str]) -> Any:
    return lambda argv: text.get(argv[0], "")


def test_a_board_is_called_as_its_device_tree_says(tmp_path: Path) -> None:
    assert sensors.board(tmp_path) == ""
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    assert sensors.board(tmp_path) == "NVIDIA Jetson Orin Nano Developer Kit"


def test_the_state_of_a_board_is_what_its_files_say(tmp_path: Path) -> None:
    said = {"nvpmodel": "NV Power Mode: 15W\n0\n"}
    assert sensors.state(gpu=False, root=tree(tmp_path, BOARD), ask=answers(said)) == {
        "governor": "schedutil", "clock_hz": 1510.4e6, "clock_max_hz": 1510.4e6, "temperature_c": pytest.approx(47.9),
        "gpu_clock_hz": 306e6, "load": 0.52, "power_mode": "15W",
    }  # fmt: skip


def test_what_a_machine_does_not_say_is_absent(tmp_path: Path) -> None:
    assert sensors.state(gpu=True, root=tmp_path, ask=answers({})) == {}
    tree(tmp_path, {"sys/class/thermal/thermal_zone0/temp": "-274000", "proc/loadavg": ""})
    assert sensors.state(gpu=False, root=tmp_path, ask=answers({})) == {}


def test_a_pc_says_its_clock_in_cpuinfo_and_its_gpu_by_nvidia_smi(tmp_path: Path) -> None:
    tree(tmp_path, {"proc/cpuinfo": "cpu MHz\t\t: 2600.100\ncpu MHz\t\t: 3400.500"})
    state = sensors.state(gpu=True, root=tmp_path, ask=answers({"nvidia-smi": "1980, 33, 74.12, P0\n"}))
    assert state == {
        "clock_hz": 3400.5e6, "gpu_clock_hz": 1980e6, "gpu_temperature_c": 33.0, "gpu_watts": 74.12, "gpu_state": "P0",
    }  # fmt: skip
    # a Jetson's nvidia-smi knows next to nothing
    state = sensors.state(
        gpu=True, root=tmp_path, ask=answers({"nvidia-smi": "[N/A], [N/A], [N/A], [N/A]\n"})
    )
    assert state == {"clock_hz": 3400.5e6}


def test_a_program_that_is_not_there_or_fails_says_nothing() -> None:
    assert sensors.run(["no-such-program-anywhere"]) == ""
    assert sensors.run([sys.executable, "-c", "print('x'); raise SystemExit(1)"]) == ""
    assert sensors.run([sys.executable, "-c", "print('x')"]) == "x\n"
