"""Training in a team of two processes: as one process trains, the same in both, and after an interruption too."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import paths
import pytest
import torch
from image_sets import PLAIN, Unnormalized, same, stripes, weights

from edgeprune import distributed
from edgeprune.errors import UsageError
from edgeprune.train.job import TrainingJob
from edgeprune.train.loop import fit

# Of 15 images one process gets 8 and the other 7.
SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from edgeprune import distributed as team; from edgeprune.train import loop as train
from image_sets import Small, stripes, weights
from image_sets import PLAIN, Unnormalized
torch.set_num_threads(1)
store = team.start()
rank, out = team.rank(), Path(sys.argv[1])
# Only process 0 has the folder of the checkpoints.
here = out / f"scratch-{rank}"
plain = Unnormalized(rank)
history = train.fit(plain, train.TrainingJob(stripes(), PLAIN, 1, here / "plain"))

table = replace(PLAIN, objective="pgd", attack_steps=2, keep="best")
course = train.TrainingJob(stripes(), table, 2, here / "whole", validation=stripes(21, "val", 1))
whole = Small(rank)
first = train.fit(whole, course)

train.CHECKPOINT_SECONDS = 0.0
course = replace(course, scratch=here / "broken")
steps = []
def stop(optimizer, lr):
    steps.append(lr)
    if len(steps) == 6:
        raise KeyboardInterrupt
try:
    train.fit(Small(rank), course, train.Hooks(after_step=stop))
except KeyboardInterrupt:
    pass
steps = []
resumed = Small(rank)
second = train.fit(resumed, course, train.Hooks(after_step=lambda *_: steps.append(1)))
files = sorted(path.name for path in out.glob(f"scratch-{rank}/*/*"))
torch.save({"plain": weights(plain), "losses": list(history.losses), "whole": weights(whole),
            "resumed": weights(resumed), "steps": len(steps), "files": files,
            "alike": first.losses == second.losses and first.validation == second.validation,
            "validation": list(first.validation)}, out / f"{rank}.pt")
team.stop(store)
"""


def test_two_processes_train_as_one_and_go_on_after_an_interruption(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += [str(script), str(tmp_path), str(paths.SUPPORT)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in ("plain", "whole", "resumed"):
        assert same(found[0][name], found[1][name])
    alone = Unnormalized()
    history = fit(alone, TrainingJob(stripes(), PLAIN, 1, tmp_path / "alone"))
    for name, value in weights(alone).items():
        assert torch.allclose(found[0]["plain"][name], value, atol=1e-6), name
    assert found[0]["losses"] == found[1]["losses"] == pytest.approx(history.losses, abs=1e-6)
    # Eight steps, of which five have a checkpoint.
    assert [part["steps"] for part in found] == [3, 3]
    assert same(found[0]["resumed"], found[0]["whole"]) and found[0]["alike"] and found[1]["alike"]
    assert found[0]["validation"] == found[1]["validation"]
    assert all((value * 21) % 1 == pytest.approx(0, abs=1e-9) for value in found[0]["validation"])
    assert found[0]["files"] == ["training.pt"] * 3 and found[1]["files"] == []


def test_a_batch_that_leaves_a_process_one_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "size", lambda: 3)
    with pytest.raises(UsageError, match="a batch of 4 is too small for 3 processes") as caught:
        fit(Unnormalized(), TrainingJob(stripes(), replace(PLAIN, batch=4), 0, tmp_path))
    assert "tune.batch=6" in caught.value.hint
