"""Pickled files: networks of allowed classes load, nothing else does, and no code of a file runs."""

from __future__ import annotations

import argparse
import builtins
import collections
import functools
import io
import os
import pickle
import pickletools
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.errors import EdgepruneError, ModelError, UnsafeModel, UsageError
from edgeprune.models import architectures
from edgeprune.safe_loading import pickle_loader
from edgeprune.safe_loading.pickle_interpreter import globals_of

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Settings:
    def __init__(self) -> None:
        self.rate = 0.1


class Evil:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def saved(value: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten())


def test_a_network_of_torchs_own_modules_loads_and_answers_the_same() -> None:
    net = network().eval()
    loaded = pickle_loader.load_pickle(saved(net), "net.pt")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(x), net(x)) and not loaded.training


@pytest.mark.parametrize(
    "spec",
    ["torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:mobilenet_v3_small", "torchvision:squeezenet1_1",
     "torchvision:googlenet", "torchvision:shufflenet_v2_x0_5", "torchvision:regnet_y_400mf", "timm:resnet18",
     "timm:mobilenetv3_small_050", "timm:vit_tiny_patch16_224?depth=1", "timm:ghostnet_050", "timm:regnetx_002",
     "timm:convnext_atto", "timm:levit_128s"],
)  # fmt: skip
def test_a_network_of_the_zoos_loads_without_any_flag(spec: str) -> None:
    try:
        net = architectures.architecture(spec)
    except EdgepruneError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    loaded = pickle_loader.load_pickle(saved(net), "net.pt")
    assert type(loaded) is type(net)
    theirs = net.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_a_training_loop_loads(zipped: bool) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    held = {
        "state_dict": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": np.float64(0.25),
        "step": np.int64(3),
        "options": argparse.Namespace(lr=0.1, sizes=[1, 2]),
        "seen": collections.OrderedDict(a=1),
        "counts": collections.Counter("ab"),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "key": b"bytes",
        "set": {1, 2},
    }
    loaded = pickle_loader.load_pickle(saved(held, _use_new_zipfile_serialization=zipped), "checkpoint.pt")
    assert loaded["best"] == 0.25 and loaded["step"] == 3 and loaded["options"] == held["options"]
    assert all(torch.equal(v, held["state_dict"][k]) for k, v in loaded["state_dict"].items())
    assert {k: loaded[k] for k in ("seen", "counts", "dtype", "device", "size", "key", "set")} == {
        k: held[k] for k in ("seen", "counts", "dtype", "device", "size", "key", "set")
    }


def touching(marker: Path) -> list[Evil]:
    code = f"import os; os.system('touch {marker}')"
    return [
        Evil(os.system, f"touch {marker}"),
        Evil(builtins.exec, code),
        Evil(builtins.eval, f"__import__('os').system('touch {marker}')"),
        Evil(getattr, os, "system"),
        Evil(Path.touch, marker),
        Evil(torch.load, str(marker)),
        Evil(torch.storage._load_from_bytes, pickle.dumps(Evil(os.system, f"touch {marker}"))),
        Evil(functools.partial, os.system, f"touch {marker}"),
        Evil(torch.fx.graph_module.reduce_graph_module, {}, code),
    ]


def containers(marker: Path) -> list[bytes]:
    out = []
    for evil in touching(marker):
        for value in (evil, [evil], {"state_dict": {"a": evil}}):
            for options in ({}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}):
                try:
                    out.append(saved(value, **options))
                except (pickle.PicklingError, TypeError, AttributeError):
                    continue
        out.extend(
            pickle.dumps(evil, protocol=p) for p in PROTOCOLS if not isinstance(evil.call[1][0], type(os))
        )
    return out


def test_no_malicious_pickle_runs_whatever_it_is_wrapped_in(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    files = containers(marker)
    assert len(files) > 80
    for data in files:
        with pytest.raises(UnsafeModel):
            pickle_loader.load_pickle(data, "evil.pt")
        assert not marker.exists()


def test_the_malicious_pickles_of_these_tests_are_real(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(touching(marker)[0]))
    assert marker.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_globals_of_any_protocol_are_listed_without_running_it(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    data = pickle.dumps([Evil(os.system, f"touch {marker}"), collections.OrderedDict()], protocol=protocol)
    assert {"posix.system", "collections.OrderedDict"} <= set(globals_of(data))
    assert not marker.exists()


def with_attribute(name: str, value: Any) -> nn.Module:
    net = network()
    net.__dict__[name] = value
    return net


def test_a_hook_is_refused_with_its_function_named() -> None:
    net = network()
    net[0].register_forward_hook(print)
    with pytest.raises(UnsafeModel, match=r"builtins\.print"):
        pickle_loader.load_pickle(saved(net), "net.pt")


def test_a_hook_made_of_an_allowed_module_is_refused_too() -> None:
    net = network()
    net[0].register_forward_hook(nn.Identity())
    with pytest.raises(UnsafeModel, match="_forward_hooks"):
        pickle_loader.load_pickle(saved(net), "net.pt")


@pytest.mark.parametrize("name", ["forward", "__deepcopy__", "__call__", "_call_impl", "state_dict"])
def test_an_attribute_can_not_take_the_place_of_a_method(name: str) -> None:
    with pytest.raises(UnsafeModel, match=name):
        pickle_loader.load_pickle(saved(with_attribute(name, nn.Identity())), "net.pt")


def test_a_constructor_of_an_allowed_class_is_not_called_with_arguments_of_the_file() -> None:
    with pytest.raises(UnsafeModel, match=r"a call of torch\.nn\.modules\.linear\.Linear"):
        pickle_loader.load_pickle(saved({"a": Evil(nn.Linear, 3, 4)}), "net.pt")


def test_a_tensors_rebuild_function_can_not_be_handed_another_function() -> None:
    evil = Evil(torch._tensor._rebuild_from_type_v2, nn.Linear, torch.Tensor, (3, 4), {})
    with pytest.raises(UnsafeModel, match="rebuild_from_type_v2|construction"):
        pickle_loader.load_pickle(saved({"a": evil}), "net.pt")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (functools.partial(nn.LayerNorm, eps=1e-6), "functools.partial"),
        (torch.nn.functional.relu, "torch.nn.functional.relu"),
        (os.path.join, "posixpath.join"),
        (Settings(), f"{Settings.__module__}.Settings"),
    ],
)
def test_functions_partials_and_unknown_objects_are_refused_by_name(value: Any, named: str) -> None:
    with pytest.raises(UnsafeModel) as caught:
        pickle_loader.load_pickle(saved(with_attribute("extra", value)), "net.pt")
    assert named in caught.value.message
    assert caught.value.exit_code == 4
    assert "--trust-pickle" in caught.value.hint


def test_a_class_that_nobody_allowed_is_named_with_the_flag_that_allows_it() -> None:
    with pytest.raises(UnsafeModel) as caught:
        pickle_loader.load_pickle(saved(Own()), "own.pt")
    name = f"{Own.__module__}.Own"
    assert name in caught.value.message
    assert f"--allow-class {name}" in caught.value.hint
    assert isinstance(pickle_loader.load_pickle(saved(Own()), "own.pt", allow_class=(name,)), Own)


def test_a_class_that_is_no_module_loads_when_the_user_names_it() -> None:
    loaded = pickle_loader.load_pickle(
        saved({"a": Settings()}), "a.pt", allow_class=(f"{Settings.__module__}.Settings",)
    )
    assert loaded["a"].rate == 0.1


def test_allowing_one_class_allows_no_other(tmp_path: Path) -> None:
    net = Own()
    net.extra = Settings()  # type: ignore[assignment]
    with pytest.raises(UnsafeModel, match="Settings"):
        pickle_loader.load_pickle(saved(net), "own.pt", allow_class=(f"{Own.__module__}.Own",))


@pytest.mark.parametrize(
    ("name", "words"),
    [("os.system", "not a class"), ("torch.nn.functional.relu", "not a class"), ("torch.nn.Nothing", "does not exist"),
     ("Nothing", "package.Class"), ("no_such_package_here.Net", "no_such_package_here")],
)  # fmt: skip
def test_only_classes_can_be_allowed(name: str, words: str) -> None:
    with pytest.raises(EdgepruneError, match=words) as caught:
        pickle_loader.load_pickle(saved(network()), "net.pt", allow_class=(name,))
    assert caught.value.exit_code in (2, 3)


def test_an_allowed_class_may_live_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net_of_a_user.py").write_text("from torch import nn\nclass Net(nn.Sequential):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import net_of_a_user  # type: ignore[import-not-found]

    data = saved(net_of_a_user.Net(nn.Linear(2, 2)))
    monkeypatch.undo()
    del sys.modules["net_of_a_user"]
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    loaded = pickle_loader.load_pickle(data, "net.pt", allow_class=("net_of_a_user.Net",))
    assert type(loaded).__name__ == "Net" and sys.path == before
    del sys.modules["net_of_a_user"]


def test_a_files_say_so_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name in ("planted.Net", "timm.planted.Net", "torch.nn.modules.planted.Net"):
        module, _, attribute = name.rpartition(".")
        data = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b")\x81."
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as out:
            out.writestr("a/data.pkl", data)
            out.writestr("a/version", "3\n")
        with pytest.raises(EdgepruneError):
            pickle_loader.load_pickle(archive.getvalue(), "net.pt")
        assert not (tmp_path / "ran").exists()


def test_trusting_a_pickle_loads_anything_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    net = with_attribute("extra", functools.partial(nn.LayerNorm, eps=1e-6))
    loaded = pickle_loader.load_pickle(saved(net), "net.pt", trust=True)
    assert loaded.extra.keywords == {"eps": 1e-6}
    assert "runs whatever code" in caplog.text


def test_trusting_loads_a_plain_pickle_too() -> None:
    assert pickle_loader.load_pickle(pickle.dumps({"a": 1}), "net.pkl", trust=True) == {"a": 1}


def test_trust_does_not_hide_a_damaged_file() -> None:
    with pytest.raises(ModelError, match="can't be unpickled"):
        pickle_loader.load_pickle(saved(network())[:-200], "net.pt", trust=True)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_truncated_file_is_called_so(zipped: bool, share: float) -> None:
    data = saved(network().state_dict(), _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="truncated|corrupt|breaks off"):
        pickle_loader.load_pickle(data[: int(len(data) * share)], "net.pt")


def test_a_whole_network_in_the_old_format_is_told_as_such() -> None:
    with pytest.raises(UnsafeModel, match=r"without a zip archive: save it again") as caught:
        pickle_loader.load_pickle(saved(network(), _use_new_zipfile_serialization=False), "old.pt")
    # torch of today writes this format too.
    assert "1.6" not in caught.value.message


def filled_later(key: str, *operations: bytes) -> bytes:
    """A network whose table `key` is fetched from the pickle's memo and filled after the network was built."""
    net = network()
    archive = zipfile.ZipFile(io.BytesIO(saved({"model": net, "last": vars(net)[key]})))
    content = archive.read("archive/data.pkl")
    steps = list(pickletools.genops(content))
    at = next(i for i, (_, argument, _) in enumerate(steps) if argument == "last")
    position = next(
        place for step, _, place in steps[at + 1 :] if "PUT" not in step.name and "GET" not in step.name
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        for name in archive.namelist():
            changed = content[:position] + b"".join(operations) + content[position:]
            new.writestr(name, changed if name.endswith("data.pkl") else archive.read(name))
    return out.getvalue()


TABLES = [
    key
    for key, value in vars(nn.Module()).items()
    if isinstance(value, dict) and key.endswith(("hooks", "kwargs", "called"))
]


@pytest.mark.parametrize("key", TABLES)
def test_hooks_that_are_set_after_the_network_was_built_are_found(key: str) -> None:
    with pytest.raises(UnsafeModel, match=f"functions in {key}"):
        pickle_loader.load_pickle(filled_later(key, b"K\x07ctorch._utils\n_rebuild_parameter\ns"), "net.pt")


def test_a_table_of_parts_that_holds_something_else_is_refused() -> None:
    with pytest.raises(UnsafeModel, match="than _modules should hold"):
        pickle_loader.load_pickle(filled_later("_modules", b"X\x01\x00\x00\x00zK\x07s"), "net.pt")


@pytest.mark.parametrize(("key", "value"), [("_forward_hooks", None), ("_modules", []), ("training", "yes"),
                                            ("_forward_hooks", torch.ones(2)), ("_buffers", 5)])  # fmt: skip
def test_what_every_module_has_is_of_its_kind(key: str, value: Any) -> None:
    with pytest.raises(UnsafeModel, match=key):
        pickle_loader.load_pickle(saved(with_attribute(key, value)), "net.pt")


def test_usage_errors_are_not_model_errors() -> None:
    with pytest.raises(UsageError):
        pickle_loader.load_pickle(saved(network()), "net.pt", allow_class=("builtins.print",))
