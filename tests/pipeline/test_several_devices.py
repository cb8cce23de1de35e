"""Several devices in one run: recipe and keys, one that fails, what is measured again, the report and the gate."""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nets
import paths
import pytest
import torch
from onnx_files import write_net
from reports import HERE, budget, reading, sample, spread
from sshd import sshd
from typer.testing import CliRunner

from edgeprune import concurrency, targets
from edgeprune.cli.app import app
from edgeprune.diagnose import environment
from edgeprune.diagnose.device import Finding
from edgeprune.errors import DeviceError, MissingDependency, UsageError
from edgeprune.gate import verdict
from edgeprune.measure.stage import NOT_THERE, Measured
from edgeprune.pipeline.context import Context, DeviceResult, OtherDevices, beside_key, stage_keys
from edgeprune.pipeline.measure_devices import joined
from edgeprune.pipeline.run_directory import Workdir
from edgeprune.recipe import parse
from edgeprune.records import Bundle, InputSpec, Report, Source
from edgeprune.report import per_device, stage
from edgeprune.report.rows import comparison, leading

PI = "ssh://pi aarch64"
FAST = ["--set", "measure.iterations=20", "--set", "measure.seconds=1.0"]
runner = CliRunner()


# -------------------------------------------------------------------------------------------------- recipe and keys


@pytest.mark.parametrize(
    ("given", "device", "beside"),
    [
        ("local", "local", ()),
        (["local"], "local", ()),
        (["ssh://pi", "local", "fake"], "ssh://pi", ("local", "fake")),
        # As `profile` has it: a device that is named twice is measured once.
        (["local", "fake", "local"], "local", ("fake",)),
        ("fake:a,b.json", "fake:a,b.json", ()),
    ],
)
def test_a_recipe_names_one_device_or_a_list_of_them(
    given: Any, device: str, beside: tuple[str, ...]
) -> None:
    made = parse.build({"measure": {"device": given}}, {}).measure
    assert (made.device, made.beside) == (device, beside)


@pytest.mark.parametrize("given", [[], 5, [5], {"a": "b"}])
def test_what_is_no_device_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="must be a URL or a list of URLs"):
        parse.build({"measure": {"device": given}}, {})


def test_the_further_devices_are_no_key_of_their_own() -> None:
    with pytest.raises(UsageError, match="no key 'beside'"):
        parse.build({"measure": {"beside": ["local"]}}, {})


def test_one_device_is_written_as_a_text_and_several_as_a_list() -> None:
    one, two = ({"measure": {"device": d}} for d in (["local"], ["local", "fake"]))
    assert 'device = "local"' in parse.to_toml(parse.build(one, {}))
    assert 'device = ["local", "fake"]' in parse.to_toml(parse.build(two, {}))
    assert "beside" not in parse.to_toml(parse.build(two, {}))


def test_flags_replace_the_devices_of_the_file() -> None:
    file = {"measure": {"device": ["ssh://pi", "fake"], "threads": 2}}
    made = parse.build(file, {"measure": {"device": ["local"]}}).measure
    assert (made.device, made.beside, made.threads) == ("local", (), 2)


def context(folder: Path, *urls: str, **tables: Any) -> Context:
    made = parse.build({"measure": {"device": list(urls)}}, tables)
    model = Bundle(None, Source("pt2", "net.pt2", "1"), InputSpec((3, 8, 8), 5))  # type: ignore[arg-type]
    device = SimpleNamespace(where=lambda: HERE, name="local")
    target = targets.target(made.target)
    return Context(made, target, parse.budget(made), Workdir(folder), model, None, device, print)


def test_another_device_beside_the_first_changes_no_key(tmp_path: Path) -> None:
    budget = {"budget": {"latency_p50": "50 %"}}
    alone = context(tmp_path, "local", **budget)
    several = context(tmp_path, "local", "ssh://pi", "fake", **budget)
    keys = stage_keys(alone)
    assert stage_keys(several) == keys
    further = {url: beside_key(several, keys, url) for url in several.recipe.measure.beside}
    assert len({keys["measure"], *further.values()}) == 3
    fewer = context(tmp_path, "local", "fake", **budget)
    assert beside_key(fewer, keys, "fake") == further["fake"]


# -------------------------------------------------------------------------------------------------- at the same time


def test_jobs_run_at_the_same_time_and_one_that_fails_costs_the_others_nothing() -> None:
    meet = threading.Barrier(3, timeout=30)

    def good() -> int:
        meet.wait()  # passed only when all three are here together
        return 7

    def bad() -> int:
        meet.wait()
        raise DeviceError("gone")

    done, failed = concurrency.results(concurrency.start({"a": good, "b": bad, "c": good}))
    assert done == {"a": 7, "c": 7}
    assert {name: error.message for name, error in failed.items()} == {"b": "gone"}


def test_a_bug_in_a_job_is_not_taken_for_a_device_that_failed() -> None:
    with pytest.raises(ZeroDivisionError):
        concurrency.results(concurrency.start({"a": lambda: 1 / 0}))


def test_what_is_told_of_failed_devices_is_of_their_kind() -> None:
    lost, bare = DeviceError("ssh://a can't be reached", "ssh a"), MissingDependency("no onnxruntime", "pip")
    told = concurrency.combined_error({"ssh://a?python=x": lost}, 3)
    assert (told.message, told.hint, told.exit_code) == (
        "1 of 3 devices gave no readings: ssh://a can't be reached", "ssh a", 6,
    )  # fmt: skip
    assert concurrency.combined_error({"adb://b": bare}, 2).exit_code == 3
    both = concurrency.combined_error({"ssh://a": lost, "adb://b": bare}, 3)
    assert both.exit_code == 6
    assert (
        "2 of 3" in both.message and "adb://b: no onnxruntime" in both.message and both.hint == "ssh a; pip"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([("local", HERE), ("ssh://pi", PI)], [HERE, PI]),
        (
            [("local", HERE), ("fake:a.json", "fake aarch64"), ("fake", "fake aarch64")],
            [HERE, "fake:a.json aarch64", "fake aarch64"],
        ),
        ([("fake:a.json", "fake aarch64"), ("fake", "fake aarch64")], ["fake aarch64", "fake aarch64 #2"]),
    ],
)
def test_every_device_has_a_name_of_its_own(given: list[tuple[str, str]], expected: list[str]) -> None:
    assert concurrency.names(given) == expected


# ------------------------------------------------------------------------------------------------------- the report


def measured(where: str, dense: float, small: float, *notes: str, memory: float | None = 9e6) -> Measured:
    def side(name: str, seconds: float) -> tuple[Any, ...]:
        timed = reading("latency_p50", seconds, name, spread=spread(seconds, seconds / 100), where=where)
        why = {} if memory is not None else {"why": "no Python there"}
        held = reading("peak_memory", memory, name, where=where, conditions=why)
        return (reading("size", 1e6, name), timed, held)

    return Measured(
        side("dense", dense), side("compressed", small), {"dense": (dense,) * 20, "compressed": (small,) * 20},
        {}, notes,
    )  # fmt: skip


def several(folder: Path, beside: OtherDevices, first: Measured | None = None) -> Report:
    """A report of this machine and further devices, put together as a run does."""
    urls = [site.url for site, _ in beside.found] + list(beside.failed)
    run = context(folder, "local", *urls)
    own = first or measured(HERE, 8e-3, 4e-3, "Speed: 2.00x faster on local x86_64.")
    more = joined(run, own, beside)
    return replace(
        sample(layers=2),
        before=(*own.before, *more.measured.before), after=(*own.after, *more.measured.after),
        samples={**own.samples, **more.measured.samples}, notes=more.measured.notes,
        environment={"device": {"cpu": "some CPU"}, **more.environment},
    )  # fmt: skip


def pi(dense: float = 40e-3, small: float = 30e-3, *notes: str, **more: Any) -> tuple[DeviceResult, Measured]:
    return DeviceResult("ssh://pi", PI, {"cpu": "Cortex", "cores": 4}), measured(
        PI, dense, small, *notes, **more
    )


def test_every_device_has_a_row_of_its_own_and_what_is_counted_has_one(tmp_path: Path) -> None:
    report = several(tmp_path, OtherDevices((pi(),)))
    rows = [(r.metric, r.dense, r.compressed, r.how) for r in comparison(report)]
    assert rows == [
        ("size", "1 MB", "1 MB", "counted"),
        ("latency_p50", "8 ms", "4 ms", f"measured on {HERE}"),
        ("latency_p50", "40 ms", "30 ms", f"measured on {PI}"),
        ("peak_memory", "9 MB", "9 MB", f"measured on {HERE}"),
        ("peak_memory", "9 MB", "9 MB", f"measured on {PI}"),
    ]


def test_the_row_that_speaks_is_the_first_with_a_value(tmp_path: Path) -> None:
    own = measured(HERE, 8e-3, 4e-3, memory=None)
    rows = leading(several(tmp_path, OtherDevices((pi(),)), own))
    assert (rows["latency_p50"].compressed, rows["peak_memory"].compressed) == ("4 ms", "9 MB")


def test_a_report_comes_apart_into_what_each_device_alone_would_have_said(tmp_path: Path) -> None:
    first, second = per_device.views(several(tmp_path, OtherDevices((pi(),))))
    assert {r.where for r in first.after} == {"counted", HERE} and first.samples["dense"][0] == 8e-3
    assert {r.where for r in second.after} == {PI} and second.samples["dense"][0] == 40e-3
    assert (per_device.where_of(first), per_device.where_of(second)) == ("", PI)
    assert second.environment["device"]["cpu"] == "Cortex"
    assert per_device.views(sample()) == (sample(),)


def test_notes_say_of_which_device_they_are(tmp_path: Path) -> None:
    own = measured(
        HERE, 8e-3, 4e-3, f"{NOT_THERE} Raspberry Pi 5 yet.", "Times are unsteady.", "No accuracy."
    )
    said = ("Speed: NOT faster on ssh://pi aarch64.", "Times are unsteady!", "No accuracy.")
    report = several(tmp_path, OtherDevices((pi(40e-3, 41e-3, *said),)), own)
    assert list(report.notes) == [
        f"On {HERE}: Times are unsteady.", "No accuracy.", "Speed: NOT faster on ssh://pi aarch64.",
        f"On {PI}: Times are unsteady!",
    ]  # fmt: skip
    assert stage.summary_lines(report)[0] == "Speed: NOT faster on ssh://pi aarch64."


def test_a_device_without_readings_is_named(tmp_path: Path) -> None:
    gone = OtherDevices((), {"ssh://b": DeviceError("ssh://b can't be reached")})
    report = several(tmp_path, gone)
    assert "Without readings: ssh://b can't be reached." in report.notes
    assert per_device.unread(report) == {"ssh://b": "ssh://b can't be reached"}
    assert per_device.views(report) == (report,) or len(per_device.views(report)) == 1


def test_all_forms_of_the_report_show_every_device(tmp_path: Path) -> None:
    report = several(tmp_path, OtherDevices((pi(),)))
    stage.run(report, tmp_path)
    assert stage.load(tmp_path) == report
    markdown, page = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert f"| latency_p50 | 40 ms | 30 ms | 1.33x faster | measured on {PI} |" in markdown
    assert f"<h3>{HERE}</h3>" in page and f"<h3>{PI}</h3>" in page
    assert f"Time of each layer, {HERE}" in page
    assert (page.count('class="dense curve"'), page.count('class="compressed curve"')) == (2, 2)


def test_a_report_of_one_device_says_nothing_of_several(tmp_path: Path) -> None:
    stage.run(sample(layers=2), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert f"<h3>{HERE}</h3>" not in page and ">Time of each layer<" in page


# --------------------------------------------------------------------------------------------------------- the gate


def check(report: Report, limit: str, *, baseline: Report | None = None) -> Any:
    metric, _, text = limit.partition("=")
    return verdict.run(report, budget(**{metric: text}), baseline, baseline_missing=False)


@pytest.mark.parametrize(
    ("limit", "status", "value"),
    [
        ("latency_p50=50 ms", "pass", 30e-3),
        ("latency_p50=20 ms", "fail", 30e-3),
        ("latency_p50=1 ms", "fail", 30e-3),
        # A share is one of the dense model on the same device: 4 of 8 ms, and 30 of 40.
        ("latency_p50=80 %", "pass", 30e-3),
        ("latency_p50=70 %", "fail", 30e-3),
        ("size=2 MB", "pass", 1e6),
    ],
)
def test_the_worst_of_several_devices_decides(limit: str, status: str, value: float, tmp_path: Path) -> None:
    (found,) = check(several(tmp_path, OtherDevices((pi(),))), limit).checks
    assert (found.status, found.value) == (status, value)
    assert (f"the worst of 2 devices is {PI}; {HERE} 4 ms" in found.detail) == ("latency" in limit)


def test_the_order_of_the_devices_decides_nothing(tmp_path: Path) -> None:
    fast = (DeviceResult("ssh://pi", PI, {}), measured(PI, 2e-3, 1e-3))
    (found,) = check(several(tmp_path, OtherDevices((fast,))), "latency_p50=2 ms").checks
    assert (found.status, found.value) == ("fail", 4e-3)
    assert found.detail.startswith(f"the worst of 2 devices is {HERE}; {PI} 1 ms (pass)")


def test_a_limit_that_is_missed_comes_before_one_that_can_not_be_told(tmp_path: Path) -> None:
    own = measured(HERE, 8e-3, 4e-3)
    vague = replace(own, after=tuple(
        replace(r, spread=(1e-3, 9e-3)) if r.metric == "latency_p50" else r for r in own.after
    ))  # fmt: skip
    verdict = check(several(tmp_path, OtherDevices((pi(),)), vague), "latency_p50=5 ms")
    assert (verdict.checks[0].status, verdict.exit_code) == ("fail", 1)
    verdict = check(several(tmp_path, OtherDevices((pi(4e-3, 3e-3),)), vague), "latency_p50=5 ms")
    assert (verdict.checks[0].status, verdict.exit_code) == ("inconclusive", 8)


@pytest.mark.parametrize("first", [True, False])
def test_a_device_that_gave_no_reading_of_a_metric_decides_nothing(first: bool, tmp_path: Path) -> None:
    without = measured(HERE if first else PI, 8e-3, 4e-3, memory=None)
    other = (DeviceResult("ssh://pi", PI, {}), measured(PI, 8e-3, 4e-3) if first else without)
    report = several(tmp_path, OtherDevices((other,)), without if first else measured(HERE, 8e-3, 4e-3))
    (found,) = check(report, "peak_memory=10 MB").checks
    assert (found.status, found.value) == ("pass", 9e6)
    assert found.detail == (f"on {PI}" if first else "")


@pytest.mark.parametrize("metric", ["latency_p50", "peak_memory"])
@pytest.mark.parametrize("where", [HERE, PI])
def test_a_device_whose_reading_was_taken_out_leaves_the_limit_open(
    metric: str, where: str, tmp_path: Path
) -> None:
    report = several(tmp_path, OtherDevices((pi(),)))
    left = tuple(r for r in report.after if (r.metric, r.where) != (metric, where))
    limit = {"latency_p50": "latency_p50=1 s", "peak_memory": "peak_memory=1 GB"}[metric]
    verdict = check(replace(report, after=left), limit)
    assert (verdict.checks[0].status, verdict.exit_code) == ("missing", 8)


def test_the_gate_names_devices_without_readings(tmp_path: Path) -> None:
    gone = OtherDevices((), {"ssh://b": DeviceError("nobody there")})
    assert check(several(tmp_path, gone), "latency_p50=5 ms").notes[-1] == (
        "Without readings of ssh://b: nobody there"
    )


def test_each_device_is_held_against_itself_in_the_baseline(tmp_path: Path) -> None:
    now = several(tmp_path, OtherDevices((pi(40e-3, 30e-3),)))
    slower = several(tmp_path, OtherDevices((pi(40e-3, 20e-3),)))
    (found,) = check(now, "latency_p50=105 %", baseline=slower).checks
    assert (found.status, found.threshold) == ("fail", pytest.approx(21e-3))
    (found,) = check(now, "latency_p50=105 %", baseline=now).checks
    assert found.status == "pass"
    # A device that the baseline did not have is held against its own dense model.
    (found,) = check(now, "latency_p50=105 %", baseline=several(tmp_path, OtherDevices())).checks
    assert found.status == "pass"


# -------------------------------------------------------------------------------------------- from the command line


def canned(path: Path, **readings: Any) -> str:
    path.write_text(json.dumps(readings))
    return f"fake:{path}"


def latency(dense: float, small: float) -> dict[str, list[float]]:
    return {"dense": [dense], "compressed": [small]}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a run that is done on one device; the last word is its folder."""
    folder = tmp_path_factory.mktemp("several")
    weights = folder / "residual.pt"
    torch.save(nets.build("residual").state_dict(), weights)
    arch = f"{paths.NETS}:Residual"
    words = ["compress", str(weights), "--arch", arch, "--input", "3x8x8", *FAST, "--precision", "fp32"]
    words += ["--set", "prune.repair=none", "-o", str(folder / "run")]
    done = runner.invoke(app, [*words, "--device", "fake"])
    assert done.exit_code == 0, done.output
    return words


def test_a_run_measures_on_all_devices_keeps_what_it_has_and_goes_on_with_what_is_missing(
    tmp_path: Path, command: list[str]
) -> None:
    slow = canned(tmp_path / "slow.json", latency_s=latency(0.02, 0.021))
    # Times of less than nothing are what a device that is out of order answers.
    broken = canned(tmp_path / "broken.json", latency_s=latency(-1.0, -1.0))
    out = Path(command[-1])
    devices = ["--device", "fake", "--device", slow, "--device", broken]

    done = runner.invoke(app, [*command, *devices, "--json"])
    assert done.exit_code == 6, done.output
    said = json.loads(done.stdout)
    assert said["exit_code"] == 6 and "1 of 3 devices gave no readings" in said["error"]
    assert said["error"] in done.stderr and "start the same command again" in done.stderr
    places_of = [r["where"] for r in said["report"]["after"] if r["metric"] == "latency_p50"]
    assert places_of == ["fake aarch64", f"{slow} aarch64"]
    assert 'device = ["fake", "fake:' in (out / "recipe.toml").read_text()
    assert json.loads((out / "edgeprune.lock").read_text())["recipe"]["measure"]["device"][1] == slow
    kept = {p: p.stat().st_mtime_ns for p in out.glob("*/*/record.json")}
    assert len([p for p in kept if p.parts[-3] == "8-measure"]) == 2

    # The board is mended; the same command, and another time only the recipe that it left, measures only there.
    canned(tmp_path / "broken.json", latency_s=latency(0.03, 0.01))
    done = runner.invoke(app, [*command, "--recipe", str(out / "recipe.toml")])
    assert done.exit_code == 0, done.output
    assert "measure: dense and compressed in turn on fake aarch64" in done.stderr
    assert done.stderr.count("in turn on") == 1 and "prune:" not in done.stderr
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert "Without readings" not in done.stdout
    assert "Speed: NOT faster: 0.95x" in done.stdout and "Speed: 3.00x faster" in done.stdout

    done = runner.invoke(app, ["gate", str(out), "--budget", "latency_p50=15 ms"])
    assert done.exit_code == 1 and f"the worst of 3 devices is {slow} aarch64" in done.stdout


def test_when_the_first_device_fails_what_the_others_read_is_kept(tmp_path: Path, command: list[str]) -> None:
    broken = canned(tmp_path / "broken.json", latency_s=latency(-1.0, -1.0))
    other = canned(tmp_path / "other.json", latency_s=latency(0.03, 0.01))
    folder = Path(command[-1]) / "8-measure"
    before = set(folder.glob("*/record.json"))
    done = runner.invoke(app, [*command, "--device", broken, "--device", other])
    assert done.exit_code == 6 and "answered times for 'dense' that are none" in done.stderr
    (kept,) = set(folder.glob("*/record.json")) - before
    assert json.loads((kept.parent / "device.json").read_text())["url"] == other


def test_a_machine_behind_ssh_measures_beside_this_one(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with sshd(tmp_path / "sshd") as server:
        monkeypatch.setenv("PATH", f"{server.bin}:{os.environ['PATH']}")
        urls = ["--device", "local", "--device", f"{server.url}?python={sys.executable}"]
        done = runner.invoke(app, [*command, *urls, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["report"]
    found = {r["where"]: r["value"] for r in report["after"] if r["metric"] == "latency_p50"}
    assert list(found) == [f"local {platform.machine()}", f"{server.url} {platform.machine()}"]
    assert all(value > 0 for value in found.values())
    # The same file in the same runtime: what it adds to memory is alike, however it was reached.
    one, two = (r["value"] for r in report["after"] if r["metric"] == "peak_memory")
    assert one == pytest.approx(two, rel=0.5)


def test_profile_keeps_the_readings_of_those_that_answer(tmp_path: Path) -> None:
    model = write_net(tmp_path / "net.onnx")
    good, broken = (
        canned(tmp_path / f"{i}.json", latency_s={"dense": [t]}) for i, t in enumerate((0.004, -1.0))
    )
    devices = ["--device", "fake", "--device", good, "--device", broken, "--device", "fake"]
    done = runner.invoke(app, ["profile", str(model), *FAST, *devices, "--json"])
    assert done.exit_code == 6, done.output
    said = json.loads(done.stdout)
    assert [r["where"] for r in said["readings"] if r["metric"] == "latency_p50"] == [
        "fake aarch64", f"{good} aarch64",
    ]  # fmt: skip
    assert said["exit_code"] == 6 and "1 of 3 devices gave no readings" in said["error"]
    done = runner.invoke(app, ["profile", str(model), *FAST, "--device", broken, "--device", f"{broken}"])
    assert done.exit_code == 6 and "answered times for" in done.stderr and "devices gave" not in done.stderr


def test_the_doctor_looks_at_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "check_packages", lambda: [Finding("torch", "ok", "there")])
    done = runner.invoke(
        app, ["doctor", "--device", "fake", "--device", "local", "--device", "fake", "--json"]
    )
    names = [row["name"] for row in json.loads(done.stdout)["checks"]]
    assert names.count("fake cpu") == names.count("local cpu") == names.count("torch") == 1
    assert done.exit_code == 0


def test_the_doctor_s_exit_status_tells_a_device_that_is_away_from_a_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        environment, "check_packages", lambda: [Finding("onnx", "missing", "not installed", "pip")]
    )
    assert runner.invoke(app, ["doctor", "--device", "fake"]).exit_code == 3
    done = runner.invoke(app, ["doctor", "--device", "ssh://127.0.0.1:1", "--json"])
    names = [row["name"] for row in json.loads(done.stdout)["checks"]]
    assert done.exit_code == 6 and "onnx" in names, "and says all the same what else is missing"
