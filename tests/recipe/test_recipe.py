"""Files, flags and --set lines to a recipe: who wins, what is refused, and that it comes back from its own text."""

from __future__ import annotations

import dataclasses
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune import plugins
from edgeprune.errors import UsageError
from edgeprune.recipe import parse, schema
from edgeprune.recipe.schema import (
    DataTable,
    ExportTable,
    MeasureTable,
    ModelTable,
    PruneTable,
    Recipe,
    SynthesizeTable,
    TuneTable,
)
from edgeprune.records import METRICS, Budget, Limit

# Any text but halves of surrogate pairs, which no TOML file can hold.
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
SHARES = st.floats(0.01, 0.99)


def some(kind: type, **fields: Any) -> st.SearchStrategy[Any]:
    """Instances of a table with any of the given fields off their default."""
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: kind(**given))


RECIPES = some(
    Recipe,
    target=TEXT,
    seed=st.integers(0, 2**32 - 1),
    model=some(
        ModelTable,
        path=TEXT,
        arch=TEXT,
        mean=st.lists(st.floats(-9, 9), max_size=3).map(tuple),
        std=st.lists(st.floats(0.1, 9), max_size=3).map(tuple),
        allow_class=st.lists(TEXT, max_size=2).map(tuple),
        trust_pickle=st.booleans(),
    ),
    data=some(DataTable, path=TEXT, use=st.sampled_from(["all", "evaluate"]), val_share=SHARES),
    prune=some(
        PruneTable,
        method=st.sampled_from(["auto", *plugins.names("methods")]),
        granularity=st.sampled_from(schema.GRANULARITIES),
        allocation=st.sampled_from(["global", "uniform"]),
        floor=SHARES,
        multiple_of=st.integers(0, 64),
        skip=st.lists(TEXT, max_size=2).map(tuple),
        repair=st.sampled_from(schema.REPAIRS),
    ),
    synthesize=some(SynthesizeTable, images=st.integers(0, 9999), steps=st.integers(0, 9999)),
    budget=st.dictionaries(st.sampled_from(["macs", "params", "size"]), st.just("50 %")),
    tune=some(
        TuneTable,
        epochs=st.integers(0, 99),
        lr=SHARES,
        distill=SHARES,
        augment=st.sampled_from(schema.AUGMENTS),
    ),
    export=some(ExportTable, precision=st.sampled_from(schema.PRECISIONS), opset=st.integers(0, 20)),
    measure=st.builds(
        lambda urls, table: dataclasses.replace(table, device=urls[0], beside=tuple(urls[1:])),
        st.lists(TEXT, min_size=1, max_size=3, unique=True),
        some(MeasureTable, threads=st.integers(0, 64), seconds=st.floats(0.1, 99)),
    ),
)


@given(RECIPES)
def test_a_recipe_comes_back_from_its_dict_and_from_its_toml(made: Recipe) -> None:
    assert parse.build(parse.to_dict(made), {}) == made
    assert parse.build(tomllib.loads(parse.to_toml(made)), {}) == made


def test_a_path_beyond_the_basic_plane_and_a_delete_character_survive_toml() -> None:
    made = parse.build({"model": {"path": 'models/\U0001f916\x7f\t"q".pt'}}, {})
    assert parse.build(tomllib.loads(parse.to_toml(made)), {}) == made


def test_every_default_is_written_out() -> None:
    written = tomllib.loads(parse.to_toml(Recipe()))
    for table in (f.name for f in dataclasses.fields(Recipe)):
        value = getattr(Recipe(), table)
        expected = {f.name for f in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else None
        assert table in written
        # Several devices are written as one list.
        assert expected is None or set(written[table]) == expected - {"beside"}


def test_nothing_given_gives_the_defaults() -> None:
    assert parse.build({}, {}) == Recipe()


def test_a_set_line_wins_over_a_flag_and_a_flag_over_the_file() -> None:
    file = {"seed": 1, "tune": {"epochs": 1, "lr": 0.1, "batch": 64}, "prune": {"method": "magnitude"}}
    made = parse.build(file, {"tune": {"epochs": 2, "lr": 0.2}}, ["tune.epochs=3"])
    assert (made.tune.epochs, made.tune.lr, made.tune.batch) == (3, 0.2, 64)
    assert (made.seed, made.prune.method) == (1, "magnitude")


@pytest.mark.parametrize(
    ("line", "table", "key", "value"),
    [
        ("prune.skip=conv1, fc", "prune", "skip", ("conv1", "fc")),
        ('prune.skip=["conv1", "fc"]', "prune", "skip", ("conv1", "fc")),
        ("model.mean=0.5, 0.4,0.3", "model", "mean", (0.5, 0.4, 0.3)),
        ("model.std=[1, 2, 3]", "model", "std", (1.0, 2.0, 3.0)),
        ("model.path=/data/a=b.pt", "model", "path", "/data/a=b.pt"),
        ('prune.allocation = "uniform" ', "prune", "allocation", "uniform"),
        ("prune.allocation=uniform", "prune", "allocation", "uniform"),
        ("tune.augment=false", "tune", "augment", "off"),
        ("tune.augment=true", "tune", "augment", "on"),
        ("tune.augment=shift", "tune", "augment", "shift"),
        ("tune.lr=1", "tune", "lr", 1.0),
        ("data.path=", "data", "path", ""),
        ("measure.threads=0", "measure", "threads", 0),
    ],
)
def test_a_set_line_is_read_as_toml_or_as_text(line: str, table: str, key: str, value: object) -> None:
    found = getattr(getattr(parse.build({}, {}, [line]), table), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("name", ["uniform_random", "uniform-random"])
def test_a_method_has_one_name_however_it_is_written(name: str) -> None:
    assert parse.build({"prune": {"method": name}}, {}).prune.method == "uniform-random"
    assert parse.build({"prune": {"method": "my_file.My_Method"}}, {}).prune.method == "my_file.My_Method"


def test_auto_takes_the_options_of_every_method_that_it_may_become() -> None:
    for name in schema.AUTO:
        for option, default in plugins.options("methods", name).items():
            given = {option: "some" if default.startswith("'") else 3}
            assert parse.build({"prune": given}, {}).prune.options == given


def test_a_set_line_without_a_table_sets_target_or_seed() -> None:
    made = parse.build({}, {}, ["seed=7", "target=jetson"])
    assert (made.seed, made.target) == (7, "jetson")


@pytest.mark.parametrize(
    ("tables", "message", "hint"),
    [
        ({"tunes": {}}, "unknown recipe key 'tunes'", "did you mean 'tune'?"),
        ({"tune": {"epoch": 3}}, "[tune] has no key 'epoch'", "did you mean 'epochs'?"),
        ({"tune": 3}, "[tune] must be a table, got 3", ""),
        ({"budget": 3}, "[budget] must be a table, got 3", ""),
        ({"budget": {"mac": "50 %"}}, "unknown metric 'mac' in the budget", "did you mean 'macs'?"),
        ({"prune": {"method": "magnitud"}}, "no method is named 'magnitud'", "did you mean 'magnitude'?"),
        ({"prune": {"method": "magnitude", "strength": 1}}, "magnitude has no option 'strength'", None),
        ({"prune": {"options": 3}}, "prune.options = 3 must be a table of the method's options", ""),
        ({"prune": {"options": "ab"}}, "prune.options = 'ab' must be a table of the method's options", ""),
        (
            {"prune": {"granularity": "4:8"}},
            "prune.granularity = '4:8' is not one of channel, weight, 2:4",
            None,
        ),
        ({"prune": {"repair": "no"}}, "prune.repair = 'no' is not one of auto, none, synthetic, data", None),
        (
            {"prune": {"imagse": 3}},
            "neither taylor nor data-free has an option 'imagse'",
            "did you mean 'images'?",
        ),
        ({"prune": {"method": "data-free", "mode": -1}}, "prune.mode = -1 must be of type str", ""),
        ({"prune": {"method": "data-free", "pool": "x"}}, "prune.pool = 'x' must be a number", ""),
        ({"synthesize": {"image": 3}}, "[synthesize] has no key 'image'", "did you mean 'images'?"),
        ({"synthesize": {"images": -1}}, "synthesize.images = -1 must be between 0 and 65536", ""),
        ({"synthesize": {"steps": 1.5}}, "synthesize.steps = 1.5 must be of type int", ""),
        ({"prune": {"floor": 1.5}}, "prune.floor = 1.5 must be between 0 and 1", ""),
        ({"tune": {"lr": float("nan")}}, "tune.lr = nan must be between 0 and 100", ""),
        ({"tune": {"temperature": 0}}, "tune.temperature = 0.0 must be between 0.01 and 1000", ""),
        ({"export": {"tolerance": float("nan")}}, "export.tolerance = nan must be between 0 and 1", ""),
        ({"tune": {"epochs": True}}, "tune.epochs = True must be of type int", ""),
        ({"tune": {"epochs": 1.5}}, "tune.epochs = 1.5 must be of type int", ""),
        ({"tune": {"augment": 1}}, "tune.augment = 1 must be of type str", ""),
        (
            {"tune": {"augment": "mirrors"}},
            "tune.augment = 'mirrors' is not one of auto, on, off, shift, mirror",
            "did you mean 'mirror'?",
        ),
        ({"model": {"path": 3}}, "model.path = 3 must be of type str", ""),
        ({"model": {"mean": "a,b"}}, "model.mean = 'a,b' must be numbers with commas between", ""),
        ({"model": {"mean": [[1]]}}, "model.mean = [[1]] must be numbers with commas between", ""),
        ({"model": {"mean": "nan"}}, "model.mean = 'nan' must be finite", ""),
        ({"model": {"std": "0.2,0,0.2"}}, "model.std = '0.2,0,0.2' must be finite, and more than 0", ""),
        ({"seed": "x"}, "seed = 'x' must be of type int", ""),
        ({"seed": -1}, "seed = -1 must be between 0 and 4294967295", ""),
        ({"tune": {"lr": 10**400}}, "tune.lr is a whole number of 1330 bits, accepted are 64", ""),
        ({"seed": 2**20000}, "seed is a whole number of 20002 bits, accepted are 64", ""),
        ({"target": 3}, "target = 3 must be of type str", ""),
        ({"measure": {"iterations": 3}}, "measure.iterations = 3 must be between 10 and 1000000", ""),
    ],
)
def test_a_wrong_recipe_says_what_was_found_and_what_is_accepted(
    tables: Any, message: str, hint: str | None
) -> None:
    with pytest.raises(UsageError) as caught:
        parse.build(tables, {})
    assert caught.value.message == message
    assert hint is None or caught.value.hint == hint


@pytest.mark.parametrize("line", ["tune.epochs", "=3", "tune.=3", ".epochs=3", ""])
def test_a_set_line_of_another_form_is_refused(line: str) -> None:
    with pytest.raises(UsageError):
        parse.build({}, {}, [line])


@pytest.mark.parametrize(
    ("file", "flags", "lines"),
    [
        ({"model": "x.pt"}, {"model": {"path": "y.pt"}}, []),
        ({"tune": {"epochs": 1}}, {"tune": 3}, []),
        ({}, {}, ["model=1", "model.path=x.pt"]),
        ({}, {}, ["model.path=x.pt", "model=1"]),
        ({}, {}, ["tune.lr=" + "[" * 5000]),
        ({}, {}, ["seed=0x" + "f" * 9000]),
        ({}, {}, [f"model.mean=[{10**400}]"]),
    ],
)
def test_layers_that_disagree_about_tables_never_crash(file: Any, flags: Any, lines: list[str]) -> None:
    try:
        parse.build(file, flags, lines)
    except UsageError as error:
        assert "must be" in error.message


@given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(Recipe)]) | TEXT,
        st.recursive(
            st.booleans() | st.integers() | st.floats() | TEXT,
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.dictionaries(
                    st.sampled_from(["path", "mean", "skip", "options", "epochs", "macs"]) | TEXT,
                    inner,
                    max_size=3,
                )
            ),
            max_leaves=6,
        ),
        max_size=4,
    )
)
def test_any_file_gives_a_recipe_or_a_usage_error(tables: Any) -> None:
    try:
        made = parse.build(tables, {})
    except UsageError:
        return
    assert parse.build(parse.to_dict(made), {}) == made


def test_the_default_budget_is_half_of_the_macs() -> None:
    assert parse.budget(Recipe()) == Budget({"macs": Limit("macs", "share", 0.5, "50 %")})


def test_a_budget_is_parsed_limit_by_limit() -> None:
    made = parse.build({"budget": {"size": "2 MB", "clean_accuracy": "-1 pp", "params": 70000}}, {})
    limits = parse.budget(made).limits
    assert {m: (v.kind, v.value) for m, v in limits.items()} == {
        "size": ("absolute", 2e6),
        "clean_accuracy": ("delta", -0.01),
        "params": ("absolute", 70000.0),
    }


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_every_metric_may_stand_in_a_budget(metric: str) -> None:
    limit = "50 %" if METRICS[metric].less_is_better else "20 dB" if METRICS[metric].unit == "dB" else "90 %"
    assert list(parse.budget(parse.build({"budget": {metric: limit}}, {})).limits) == [metric]


def test_with_defaults_changes_only_what_it_names() -> None:
    before = parse.build({"tune": {"epochs": 2}, "prune": {"floor": 0.2}}, {})
    after = parse.with_defaults(before, prune={"method": "taylor"})
    assert after.prune == dataclasses.replace(before.prune, method="taylor")
    assert dataclasses.replace(after, prune=before.prune) == before


def test_a_radius_may_be_a_number_and_is_held_to_the_same_rules() -> None:
    assert parse.build({}, {}, ["tune.eps=0.03"]).tune.eps == "0.03"
    assert parse.build({"attack": {"eps": 0.03}}, {}).attack.eps == "0.03"
    with pytest.raises(UsageError) as error:
        parse.build({}, {}, ["tune.eps=8"])
    assert "8/255" in error.value.hint
    with pytest.raises(UsageError, match=r"tune\.eps"):
        parse.build({}, {}, ["tune.eps=true"])
