"""The families' mechanism, on members that the test writes: the file name is the registration."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeprune import devices, plugins
from edgeprune.devices.fake import Fake
from edgeprune.devices.local import Local
from edgeprune.errors import MissingDependency, UsageError

MEMBER = '''"""{about}

More about it.
"""

from dataclasses import dataclass
from typing import ClassVar


class _Helper:
    """Private classes do not count."""

    hidden: int = 1


@dataclass(frozen=True)
class Radio:
    """Reached by radio."""

    kind: ClassVar[str] = "radio"
    channel: int
    power_w: float = 0.5
    band: str = "uhf" + "f"
'''
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes NAME.py into a family of the test's own, which stands in for `devices`."""
    monkeypatch.setattr(plugins, "members_folder", lambda family: tmp_path)
    monkeypatch.setattr(devices, "__path__", [str(tmp_path)])
    before = set(sys.modules)

    def writing(name: str, text: str = MEMBER.format(about="Reached by radio.")) -> str:
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        return name

    yield writing
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_members_are_the_files_without_an_underscore_sorted(write: Write) -> None:
    for name in ("radio", "_shared", "__init__", "carrier_pigeon"):
        write(name)
    assert plugins.names("devices") == ["carrier-pigeon", "radio"]


@pytest.mark.parametrize("name", ["carrier-pigeon", "carrier_pigeon"])
def test_a_name_may_be_written_with_a_dash_or_as_its_file(write: Write, name: str) -> None:
    write("carrier_pigeon")
    assert plugins.path_of("devices", name).name == "carrier_pigeon.py"
    assert plugins.describe("devices", name) == "Reached by radio."
    assert plugins.build("devices", name, {"channel": 3}).channel == 3
    with pytest.raises(UsageError) as caught:
        plugins.check_options("devices", name, {"chanel": 3})
    assert caught.value.message == "carrier-pigeon has no option 'chanel'"


def test_a_name_has_one_spelling_and_a_dotted_path_keeps_its_own() -> None:
    assert plugins.spelled("uniform_random") == plugins.spelled("uniform-random") == "uniform-random"
    assert plugins.spelled("my_package.my_file.My_Class") == "my_package.my_file.My_Class"


def test_a_member_is_described_by_its_first_line_and_not_imported(write: Write) -> None:
    write("radio", MEMBER.format(about="Reached by radio.") + "\nraise RuntimeError('imported')\n")
    assert plugins.describe("devices", "radio") == "Reached by radio."
    assert "edgeprune.devices.radio" not in sys.modules


def test_a_member_without_a_docstring_has_an_empty_description(write: Write) -> None:
    assert plugins.describe("devices", write("radio", "x = 1\n")) == ""


def test_options_are_the_fields_of_the_public_class_and_not_its_class_variables(write: Write) -> None:
    write("radio")
    assert plugins.options("devices", "radio") == {"channel": "", "power_w": "0.5", "band": "'uhf' + 'f'"}


def test_a_member_is_built_with_the_options_given(write: Write) -> None:
    built = plugins.build("devices", write("radio"), {"channel": 7, "band": "vhf"})
    assert (built.channel, built.power_w, built.band) == (7, 0.5, "vhf")


def test_an_unknown_option_gets_the_closest_field(write: Write) -> None:
    with pytest.raises(UsageError) as caught:
        plugins.build("devices", write("radio"), {"chanel": 7})
    assert caught.value.message == "radio has no option 'chanel'"
    assert caught.value.hint == "did you mean 'channel'?"


def test_a_member_without_options_says_so(write: Write) -> None:
    write("plain", "class Plain:\n    pass\n")
    with pytest.raises(UsageError) as caught:
        plugins.check_options("devices", "plain", {"x": 1})
    assert caught.value.hint == "plain takes no options"


def test_an_option_that_is_missing_is_a_usage_error(write: Write) -> None:
    with pytest.raises(UsageError, match="radio: .*missing 1 required positional argument: 'channel'"):
        plugins.build("devices", write("radio"), {})


@pytest.mark.parametrize("name", ["radiio", "_shared", "-shared", "__init__", "../plugins", "", "a/b"])
def test_an_unknown_member_is_refused(write: Write, name: str) -> None:
    write("radio")
    write("_shared")
    with pytest.raises(UsageError):
        plugins.build("devices", name, {})


def test_an_unknown_member_gets_the_closest_name(write: Write) -> None:
    write("radio")
    with pytest.raises(UsageError) as caught:
        plugins.describe("devices", "radiio")
    assert (caught.value.message, caught.value.hint) == (
        "no device is named 'radiio'",
        "did you mean 'radio'?",
    )


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        plugins.names("method")
    assert (caught.value.message, caught.value.hint) == (
        "no family is named 'method'",
        "did you mean 'methods'?",
    )


def test_a_file_with_two_public_classes_is_refused(write: Write) -> None:
    write("two", "class A:\n    pass\n\n\nclass B:\n    pass\n")
    with pytest.raises(UsageError, match="must define exactly one public class, found 2"):
        plugins.build("devices", "two", {})


def test_a_class_that_is_only_imported_does_not_count(write: Write) -> None:
    write("radio", "from pathlib import Path\n\n\nclass Radio:\n    pass\n")
    assert type(plugins.build("devices", "radio", {})).__name__ == "Radio"


def test_a_package_that_is_not_installed_is_named_with_its_pip_line(write: Write) -> None:
    write("radio", "import no_such_package.inner\n\n\nclass Radio:\n    pass\n")
    with pytest.raises(MissingDependency) as caught:
        plugins.build("devices", "radio", {})
    assert caught.value.message == "radio needs the package no_such_package"
    assert caught.value.hint == "pip install no_such_package"
    assert caught.value.exit_code == 3


def test_a_dotted_path_names_a_class_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pigeons.py").write_text(
        "from dataclasses import dataclass\nfrom edgeprune.devices.local import Local\n"
        "from edgeprune.devices._base import Device\n\n\n@dataclass(frozen=True)\nclass Pigeon(Device):\n"
        "    speed: int = 3\n    name = 'pigeon'\n"
        "    run, put, get, agent = Local.run, Local.put, Local.get, Local.agent\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.build("devices", "pigeons.Pigeon", {"speed": 9}).speed == 9
    with pytest.raises(UsageError, match=r"pigeons\.Pigeon: .*unexpected keyword argument 'colour'"):
        plugins.build("devices", "pigeons.Pigeon", {"colour": "grey"})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pathlib.Path", "pathlib.Path is not a subclass of edgeprune.devices.Device"),
        ("pathlib.Nothing", "pathlib.Nothing is not a subclass of edgeprune.devices.Device"),
        ("no_such_module.Device", "no_such_module.Device: No module named 'no_such_module'"),
        ("os.path.join", "os.path.join is not a subclass of edgeprune.devices.Device"),
        (".Device", "'.Device' is not a dotted path to a class"),
        ("..x", "'..x' is not a dotted path to a class"),
        ("a..b", "'a..b' is not a dotted path to a class"),
        ("a.b/c", "'a.b/c' is not a dotted path to a class"),
    ],
)
def test_a_dotted_path_to_anything_else_is_refused(path: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        plugins.build("devices", path, {})
    assert caught.value.message == message


@pytest.mark.parametrize("text", ["def broken(:\n", "from pathlib import NoSuchName\n"])
def test_an_outside_file_that_can_not_be_imported_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "broken_outside.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"broken_outside\.X can't be imported: "):
        plugins.build("devices", "broken_outside.X", {})


def test_the_real_devices_are_built_by_name() -> None:
    assert type(plugins.build("devices", "local", {})) is Local
    assert type(plugins.build("devices", "fake", {})) is Fake
