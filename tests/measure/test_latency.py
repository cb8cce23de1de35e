"""Times, memory and size: exact numbers from canned samples, and the whole way on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx_files import Scripted, timed, write_net

from edgeprune import confidence, serialization
from edgeprune.devices._base import device_from_url
from edgeprune.devices.fake import Fake
from edgeprune.devices.local import Local
from edgeprune.devices.transport.stream import Answer
from edgeprune.errors import DeviceError, ModelError, UsageError
from edgeprune.measure import counts, latency, layer_times, resources
from edgeprune.recipe.schema import MeasureTable
from edgeprune.speedup import Ratio

TABLE = MeasureTable(iterations=200)

QUICK = MeasureTable(iterations=20, warmup=1, seconds=5.0)


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    return {
        "dense": write_net(tmp_path / "dense.onnx", 32),
        "compressed": write_net(tmp_path / "model.onnx", 16),
    }


def test_latency_readings_are_the_quantiles_of_the_samples(pair: dict[str, Path]) -> None:
    samples = [1000 * n for n in range(1, 401)]
    result = latency.latency(pair, Scripted(timed(samples, [s // 2 for s in samples])), TABLE)
    ordered = [s * 1e-9 for s in samples]
    by_metric = {r.metric: r for r in result.readings["dense"]}
    assert list(by_metric) == ["latency_p50", "latency_p90", "latency_p99"]
    for q, metric in ((0.5, "latency_p50"), (0.9, "latency_p90"), (0.99, "latency_p99")):
        reading = by_metric[metric]
        assert reading.value == pytest.approx(confidence.quantile(ordered, q))
        assert reading.spread == pytest.approx(confidence.quantile_interval(ordered, q))
        assert (reading.unit, reading.n, reading.where, reading.artifact) == (
            "s",
            400,
            "scripted aarch64",
            "dense",
        )
    assert by_metric["latency_p50"].value == pytest.approx(200.5e-6)
    conditions = by_metric["latency_p50"].conditions
    assert conditions["cv"] == pytest.approx(np.std(samples) / np.mean(samples))
    assert {k: conditions[k] for k in ("threads", "iterations", "warmup", "batch", "clock", "runtime", "load")} == {
        "threads": 1, "iterations": 400, "warmup": 3, "batch": 1, "clock": "wall", "runtime": "r 1", "load": 0.5,
    }  # fmt: skip
    assert result.samples["dense"] == pytest.approx(tuple(ordered))


def test_too_few_runs_give_no_interval_of_the_99th_percentile_and_say_so(pair: dict[str, Path]) -> None:
    result = latency.latency(pair, Scripted(timed([1000] * 200, [1000] * 200)), TABLE)
    p99 = result.readings["compressed"][2]
    assert p99.spread is None
    assert "200 runs are too few" in p99.conditions["no_interval"]


def test_a_batch_in_the_file_is_divided_out(pair: dict[str, Path]) -> None:
    answer = json.loads(timed([8000] * 20, [4000] * 20).stdout)
    for row in answer["models"].values():
        row["batch"] = 4
    result = latency.latency(pair, Scripted(Answer(0, json.dumps(answer), "")), TABLE)
    assert result.readings["dense"][0].value == pytest.approx(2e-6)
    assert result.readings["dense"][0].conditions["batch"] == 4


def test_ratios_pair_neighboring_blocks(pair: dict[str, Path]) -> None:
    """In the second half of the time the machine is three times slower: paired ratios do not notice."""
    dense, compressed = [2000] * 100 + [6000] * 100, [1000] * 100 + [3000] * 100
    ratio = latency.latency(pair, Scripted(timed(dense, compressed)), TABLE).ratios["wall"]
    assert ratio == Ratio(2.0, 2.0, 2.0, 40)


def test_one_slow_run_in_each_block_does_not_move_the_ratio(pair: dict[str, Path]) -> None:
    ratio = latency.latency(
        pair, Scripted(timed([2000, 2000, 9000, 2000, 2000] * 40, [1000] * 200)), TABLE
    ).ratios["wall"]
    assert ratio == Ratio(2.0, 2.0, 2.0, 40)


def test_few_runs_are_paired_one_by_one(pair: dict[str, Path]) -> None:
    dense = [1000 * n for n in range(1, 11)]
    ratio = latency.latency(pair, Scripted(timed(dense, [1000] * 10)), TABLE).ratios["wall"]
    assert (ratio.n, ratio.value, ratio.low, ratio.high) == pytest.approx((10, 5.5, 2.0, 9.0))


def test_waiting_for_other_work_is_noticed_and_cpu_time_is_compared_instead(pair: dict[str, Path]) -> None:
    cpu = ([2000] * 100, [1000] * 100)
    result = latency.latency(pair, Scripted(timed([2000] * 100, [1100] * 100, cpu)), TABLE)
    assert result.contended
    assert result.readings["compressed"][0].conditions["contention"] == pytest.approx(1.1)
    assert result.readings["compressed"][0].conditions["cpu_p50"] == pytest.approx(1e-6)
    assert result.readings["compressed"][0].value == pytest.approx(1.1e-6)
    assert latency.speed_words(result) == (
        "2.00x faster (95 % interval 2.00-2.00) on scripted aarch64, 1 thread, by CPU time because other work ran on "
        "the machine"
    )


def test_long_waits_of_few_runs_are_noticed_too(pair: dict[str, Path]) -> None:
    """One run in ten is interrupted for ten times its length: the median hides it, the 99th percentile does not."""
    wall = ([1000] * 9 + [11000]) * 20
    result = latency.latency(pair, Scripted(timed(wall, [1000] * 200, ([1000] * 200, [1000] * 200))), TABLE)
    assert result.readings["dense"][0].conditions["contention"] == 1.0
    assert result.readings["dense"][0].conditions["waited"] == pytest.approx(0.5)
    assert result.contended
    found = latency.latency_ratio(result)
    assert found is not None
    assert found == ("cpu", result.ratios["cpu"])


def test_an_idle_machine_is_not_called_busy(pair: dict[str, Path]) -> None:
    result = latency.latency(
        pair, Scripted(timed([2000] * 100, [1040] * 100, ([2000] * 100, [1000] * 100))), TABLE
    )
    assert not result.contended


def test_canned_readings_give_the_same_table_everywhere(pair: dict[str, Path]) -> None:
    result = latency.latency(pair, device_from_url("fake"), TABLE)
    assert result.where == "fake aarch64"
    assert result.readings["dense"][0].value == pytest.approx(0.004)
    assert result.ratios["wall"].value == pytest.approx(1.6)
    assert latency.speed_words(result) == "1.60x faster (95 % interval 1.60-1.60) on fake aarch64, 1 thread"
    assert resources.peak_memory(pair["dense"], Fake(), name="dense").value == 14_000_000
    assert layer_times.per_layer(pair["dense"], Fake(), TABLE) == {"conv": 0.0036}


def test_own_canned_readings_replace_the_built_in_ones(tmp_path: Path, pair: dict[str, Path]) -> None:
    file = tmp_path / "readings.json"
    file.write_text(json.dumps({"latency_s": {"dense": [0.5], "compressed": [0.1]}}))
    result = latency.latency(pair, device_from_url(f"fake:{file}"), TABLE)
    assert result.readings["compressed"][0].value == pytest.approx(0.1)
    assert result.where == "fake aarch64"


def test_latencies_survive_being_written_down(pair: dict[str, Path]) -> None:
    result = latency.latency(pair, Fake(), TABLE)
    again = serialization.from_json(latency.Latency, json.loads(json.dumps(serialization.to_json(result))))
    assert again == result


def test_two_real_files_are_timed_on_this_machine(pair: dict[str, Path]) -> None:
    result = latency.latency(pair, Local(), QUICK)
    assert result.where == latency.where(Local())
    for name in pair:
        assert len(result.samples[name]) == 20
        assert min(result.samples[name]) > 0
        p50, p90, p99 = (r.value for r in result.readings[name])
        assert p50 is not None and p90 is not None and p99 is not None
        assert min(result.samples[name]) <= p50 <= p90 <= p99 <= max(result.samples[name])
        assert result.readings[name][0].conditions["cpu_p50"] > 0
    assert set(result.ratios) == {"wall", "cpu"}


def test_measuring_leaves_nothing_behind_and_tells_nobody(
    pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's telemetry leaves a file in TMPDIR and another in the cache when it is on."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for variable in ("TMPDIR", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(temporary))
    for variable in ("CI", "ORT_DISABLE_TELEMETRY"):
        monkeypatch.delenv(variable, raising=False)
    latency.latency(pair, Local(), QUICK)
    layer_times.node_times(pair["compressed"], Local(), QUICK)
    resources.peak_memory(pair["compressed"], Local())
    assert list(temporary.rglob("*")) == []


def test_one_file_alone_has_no_ratio(pair: dict[str, Path]) -> None:
    result = latency.latency({"compressed": pair["compressed"]}, Fake(), QUICK)
    assert result.ratios == {}
    assert latency.speed_words(result) == "the speed can't be compared: timed were only compressed"


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    for call in (resources.peak_memory, counts.size):
        with pytest.raises(UsageError, match=r"none\.onnx"):
            call(
                *(
                    (tmp_path / "none.onnx", Fake())
                    if call is resources.peak_memory
                    else (tmp_path / "none.onnx",)
                )
            )  # type: ignore[arg-type]


def test_size_is_the_bytes_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"x" * 1234)
    reading = counts.size(tmp_path / "m.onnx", name="compressed")
    assert (reading.value, reading.unit, reading.where, reading.artifact) == (
        1234.0,
        "B",
        "counted",
        "compressed",
    )


def test_peak_memory_is_the_median_of_fresh_processes(pair: dict[str, Path]) -> None:
    reading = resources.peak_memory(pair["dense"], Local(), name="dense")
    if reading.value is None:
        pytest.skip(reading.conditions["why"])
    assert reading.n == 3
    assert reading.conditions["lowest"] <= reading.value <= reading.conditions["highest"]
    assert reading.value >= pair["dense"].stat().st_size
    assert reading.conditions["bare_runtime_bytes"] > 5e6


def test_memory_that_can_not_be_had_says_why(pair: dict[str, Path]) -> None:
    device = Scripted(Answer(0, '{"peak": null, "why": "no /proc here", "runtime": "r"}', ""))
    reading = resources.peak_memory(pair["dense"], device)
    assert reading.value is None
    assert reading.conditions["why"] == "no /proc here"
    assert ["env", "MALLOC_MMAP_THRESHOLD_=131072", "the-agent"] in device.log
    with pytest.raises(DeviceError, match="peak = 'much'"):
        resources.peak_memory(pair["dense"], Scripted(Answer(0, '{"peak": "much"}', "")))


def test_fused_nodes_are_called_after_the_layer_that_does_the_work(pair: dict[str, Path]) -> None:
    nodes = layer_times.node_times(pair["compressed"], Local(), QUICK)
    by_op: dict[str, list[str]] = {}
    for node in nodes:
        by_op.setdefault(node.op.replace("FusedConv", "Conv"), []).append(node.name)
    assert by_op["Conv"] == ["stem", "block.conv"]
    assert by_op["Gemm"] == ["fc"]
    assert set(layer_times.per_layer(pair["compressed"], Local(), QUICK)) >= {"stem", "block.conv", "fc"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("7", "no nodes"),
        ("[7]", "node must be an object"),
        ('[{"name": "a"}]', "node"),
        ('[{"name": "a", "op": "Conv", "seconds": -1}]', "below 0"),
        ('[{"name": "a", "op": "Conv", "seconds": NaN}]', "finite"),
    ],
)
def test_a_profile_that_is_nonsense_is_a_device_error(pair: dict[str, Path], rows: str, said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        layer_times.node_times(pair["dense"], Scripted(Answer(0, '{"nodes": ' + rows + "}", "")), QUICK)


def test_a_profile_of_a_file_that_is_no_onnx_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff\xff")
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        layer_times.node_times(tmp_path / "bad.onnx", Fake(), QUICK)
