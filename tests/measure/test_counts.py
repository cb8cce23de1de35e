"""What is counted of files and networks: bytes after deflate, and shares of the dense network that are not zero."""

from __future__ import annotations

import zlib
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from reports import check, plain_report, reading
from torch import Tensor, nn

from edgeprune.errors import UsageError
from edgeprune.measure import counts
from edgeprune.measure.counts import densities, nonzero_weights
from edgeprune.quantities import limit


def test_the_compressed_size_is_that_of_a_zlib_stream_at_its_highest_level(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    # More than is read at once, half of it zeros.
    data = np.random.default_rng(0).bytes(1_600_000) + bytes(1_600_000)
    file.write_bytes(data)
    found = counts.compressed_size(file, name="compressed")
    assert found.value == len(zlib.compress(data, 9))
    assert (found.metric, found.unit, found.where, found.artifact) == (
        "compressed_size",
        "B",
        "counted",
        "compressed",
    )
    assert found.conditions == {"file": "m.onnx", "compression": "deflate level 9 (zlib)"}
    file.write_bytes(b"")
    assert counts.compressed_size(file).value == len(zlib.compress(b"", 9))
    with pytest.raises(UsageError, match="compressed size of .* can't be had"):
        counts.compressed_size(tmp_path / "nowhere.onnx")


def test_a_sparse_file_is_as_large_as_a_dense_one_and_compresses_to_less(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal(20000).astype(np.float32)
    sparse = np.where(np.abs(weights) < np.quantile(np.abs(weights), 0.9), np.float32(0), weights)
    for name, values in (("dense", weights), ("sparse", sparse)):
        (tmp_path / name).write_bytes(values.tobytes())
    assert counts.size(tmp_path / "dense").value == counts.size(tmp_path / "sparse").value == 80000
    sizes = [counts.compressed_size(tmp_path / name).value or 0.0 for name in ("dense", "sparse")]
    assert sizes[1] < 0.25 * sizes[0]


class Small(nn.Module):
    """24 + 20 weights, 4 and 5 biases, 4 + 4 of a batch-norm: 61 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, (1, 2)), nn.BatchNorm2d(4), nn.Linear(4, 5)
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


def test_densities_are_shares_of_the_dense_network() -> None:
    dense, sparse, cut = Small(), Small(), Small()
    with torch.no_grad():
        sparse.conv.weight[:, 0] = 0  # 8 of 24
        sparse.fc.bias[0] = 0
    cut.conv, cut.bn, cut.fc = nn.Conv2d(3, 2, (1, 2)), nn.BatchNorm2d(2), nn.Linear(2, 5)
    for parameter in cut.parameters():
        nn.init.ones_(parameter)
    found = densities({"dense": dense, "sparse": sparse, "cut": cut})
    values = {name: [r.value for r in readings] for name, readings in found.items()}
    assert values == {"dense": [1.0, 1.0], "sparse": [36 / 44, 52 / 61], "cut": [22 / 44, 33 / 61]}
    weight, params = found["sparse"]
    assert (weight.metric, weight.unit, weight.where, weight.artifact) == (
        "weight_density",
        "fraction",
        "counted",
        "sparse",
    )
    assert weight.conditions == {"nonzero": 36, "of": 44} and params.conditions == {"nonzero": 52, "of": 61}
    assert nonzero_weights(sparse) == {"conv": 16, "fc": 20}


def test_a_weight_that_two_layers_share_counts_once_and_nothing_is_no_share() -> None:
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    (weight, params) = densities({"dense": tied})["dense"]
    assert weight.conditions["of"] == params.conditions["of"] == 16
    (weight, _) = densities({"dense": nn.ReLU()})["dense"]
    assert weight.value is None and weight.conditions["why"] == "there are none"


@pytest.mark.parametrize("name", ["residual", "transposed", "grouped"])
def test_a_dense_network_is_all_there(name: str) -> None:
    network = nets.build(name)
    (weight, params) = densities({"dense": network})["dense"]
    assert weight.value == params.value == 1.0
    assert sum(nonzero_weights(network).values()) == weight.conditions["nonzero"]


@pytest.mark.parametrize(
    ("metric", "value", "text", "status"),
    [
        ("compressed_size", 500e3, "600 kB", "pass"),
        ("compressed_size", 500e3, "40 %", "fail"),
        ("weight_density", 0.1, "10 %", "pass"),
        ("weight_density", 0.1001, "10 %", "fail"),
        ("param_density", 0.2, "0.25", "pass"),
    ],
)
def test_the_gate_holds_them_against_a_limit(metric: str, value: float, text: str, status: str) -> None:
    dense = 1.0 if metric.endswith("density") else 1e6
    made = plain_report([reading(metric, dense, "dense")], [reading(metric, value)])
    assert check(made, metric, text).status == status


def test_a_density_is_no_accuracy_to_allow_points_of() -> None:
    with pytest.raises(UsageError, match="percentage points are for accuracies"):
        limit("weight_density", "-1 pp")
