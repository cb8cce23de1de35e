"""why: what layers cost, how compressible their weights look, and why some stay whole."""

from __future__ import annotations

import nets
import pytest
import torch

from edgeprune.cli.tables import why_table
from edgeprune.diagnose import layers
from edgeprune.records import Bundle, InputSpec, Source
from edgeprune.structure.pq_index import pqi, sap_count


def bundle_of(name: str) -> Bundle:
    return Bundle(nets.build(name), Source("memory"), InputSpec(nets.SHAPE, 5))


@pytest.mark.parametrize("name", ["plain", "depthwise", "transposed"])
def test_every_layer_has_the_index_of_its_own_weights(name: str) -> None:
    bundle = bundle_of(name)
    rows = layers.explain_layers(bundle, {})
    assert rows
    for row in rows:
        weight = bundle.module.get_parameter(f"{row.layer}.weight")
        assert row.pqi == pqi(weight) == sap_count(weight).pqi
        # What SAP would prune first, as ABOUT_PQI says.
        assert sap_count(weight).pruned == int(row.pqi * weight.numel() + 1e-6)
    assert "nothing was trained" in layers.ABOUT_PQI


def test_a_layer_with_few_large_weights_looks_more_compressible() -> None:
    bundle = bundle_of("plain")
    before = {row.layer: row.pqi for row in layers.explain_layers(bundle, {})}
    with torch.no_grad():
        weight = bundle.module.get_parameter("b.0.weight")
        weight.mul_((torch.arange(weight.numel()) % 10 == 0).view(weight.shape))
    after = {row.layer: row.pqi for row in layers.explain_layers(bundle, {})}
    assert after["b.0"] > 0.85 > before["b.0"]
    assert all(after[name] == before[name] for name in before if name != "b.0")


def test_the_table_shows_the_index_beside_the_costs() -> None:
    rows = layers.explain_layers(bundle_of("plain"), {"a.0": 1.0})
    table = why_table(rows)
    headers = [str(column.header) for column in table.columns]
    assert headers[-2:] == ["PQI", "can go"]
    assert list(table.columns[-2].cells) == [f"{row.pqi:.2f}" for row in rows]
    assert all("pqi" in vars(row) for row in rows)
