"""Batch-norm recalibration: exact statistics, and nothing else is touched."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import Small, stripes, weights
from torch import nn

from edgeprune.errors import ModelError, UsageError
from edgeprune.recipe.schema import TuneTable
from edgeprune.train.batchnorm import recalibrate_bn
from edgeprune.train.evaluation import accuracy
from edgeprune.train.job import TrainingJob
from edgeprune.train.loop import fit

TABLE = TuneTable(epochs=3, lr=0.05, batch=16, distill=0.0)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 70), batch=st.integers(2, 40))
def test_batch_norm_gets_the_exact_statistics_of_all_images(count: int, batch: int) -> None:
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count)) * 3
    module = Small()
    before = weights(module)
    module.eval()
    assert recalibrate_bn(module, images, batch=batch) == 2
    with torch.no_grad():
        seen = module.stem(images).double()
    variance, mean = torch.var_mean(seen, dim=(0, 2, 3), correction=1)
    assert torch.allclose(module.bn.running_mean.double(), mean, atol=1e-6)
    assert torch.allclose(module.bn.running_var.double(), variance, rtol=1e-5)
    after = weights(module)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in moved} == {"bn", "bn2"} and not any(
        "weight" in name for name in moved
    )
    assert not any(layer.training for layer in module.modules())
    assert module.bn.momentum == 0.1 and not module.bn._forward_pre_hooks


def test_recalibration_is_that_of_torch_for_one_batch_and_uses_no_dropout() -> None:
    images = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs = Small(), Small()
    for layer in (theirs.bn, theirs.bn2):
        layer.momentum = None
    theirs.train()
    with torch.no_grad():
        theirs(images)
    recalibrate_bn(ours, images)
    assert ours.drop.training and ours.training
    for name in ("bn", "bn2"):
        assert torch.allclose(
            ours.get_buffer(f"{name}.running_mean"), theirs.get_buffer(f"{name}.running_mean"), atol=1e-6
        )
        assert torch.allclose(
            ours.get_buffer(f"{name}.running_var"), theirs.get_buffer(f"{name}.running_var"), rtol=1e-5
        )
    assert int(ours.bn.num_batches_tracked) == 1


def test_recalibration_repairs_statistics_that_were_lost(tmp_path: Path) -> None:
    module, split = Small(), stripes()
    fit(module, TrainingJob(split, replace(TABLE, epochs=8), 0, tmp_path))
    good = accuracy(module, split)[0]
    for layer in (module.bn, module.bn2):
        layer.running_mean.fill_(5.0)  # type: ignore[union-attr]
    broken = accuracy(module, split)[0]
    recalibrate_bn(module, split.take(torch.arange(64)))
    assert accuracy(module, split)[0] >= good - 2 > broken


def test_networks_without_batch_norm_or_with_too_few_images() -> None:
    assert recalibrate_bn(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), torch.rand(4, 3, 8, 8)) == 0
    with pytest.raises(UsageError, match="at least 2"):
        recalibrate_bn(Small(), torch.rand(1, 3, 8, 8))
    with pytest.raises(ModelError, match="input of bn is not finite"):
        recalibrate_bn(Small(), torch.full((4, 3, 8, 8), math.inf))


def test_a_batch_norm_that_is_not_used_keeps_its_statistics() -> None:
    module = Small()
    module.spare = nn.BatchNorm2d(4)
    module.spare.running_mean.fill_(3.0)  # type: ignore[union-attr]
    assert recalibrate_bn(module, torch.rand(4, 3, 8, 8)) == 2
    assert module.spare.running_mean.tolist() == [3.0] * 4  # type: ignore[union-attr]
