"""The one training loop; `module` takes pixels in [0, 1] to logits everywhere."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune import distributed, models
from edgeprune.data import Split
from edgeprune.errors import ModelError, UsageError
from edgeprune.models import Checkpoint, Progress, modes
from edgeprune.progress import bar
from edgeprune.quantities import check_choice
from edgeprune.recipe import KEEPS
from edgeprune.train.augmentation import KINDS, augment
from edgeprune.train.evaluation import attacked, some
from edgeprune.train.job import (
    NO_HOOKS,
    History,
    Hooks,
    TrainingJob,
    lr_factor,
    optimizer_of,
    seed_of,
    seeded_generator,
    trained,
)
from edgeprune.train.objectives import Objective, objective_of
from edgeprune.train.placement import (
    ExecutionConfig,
    fastest_config,
    repeatable,
    restored_device,
    set_memory_format,
)

MAX_GRAD_NORM = 5.0
CHECKPOINT = "training.pt"
# Between checkpoints within an epoch.
CHECKPOINT_SECONDS = 120.0
# Validation images under attack; 1,000 separate accuracies that differ by 3 points.
VALIDATED = 1000


@dataclass(frozen=True)
class _Loop:
    module: nn.Module
    job: TrainingJob
    hooks: Hooks
    placement: ExecutionConfig
    objective: Objective
    optimizer: torch.optim.Optimizer

    @property
    def batch(self) -> int:
        """Images of a step, over all processes."""
        return min(self.job.table.batch, len(self.job.split))

    @property
    def steps(self) -> int:
        """Steps of an epoch; a last incomplete batch is dropped."""
        return len(self.job.split) // self.batch


def fit(module: nn.Module, job: TrainingJob, hooks: Hooks = NO_HOOKS) -> History:
    """Train in place by SGD or AdamW, with warm-up and cosine; the last or the best epoch's weights stay.

    On a GPU when there is one. Every process of `distributed` works on its share of each batch, and all end with the
    same weights. Checkpoints go to `job.scratch` after each epoch and every two minutes. Called again with the same
    arguments after an interruption, the weights become bit for bit those of an uninterrupted run (same machine, same
    number of threads and processes). Parameters that require no gradient are not changed.
    """
    _check(job)
    with _prepared(module, job, hooks) as loop:
        saved = Checkpoint(job.scratch / CHECKPOINT, _key(loop))
        found = saved.restore(module, loop.optimizer, loop.placement.device)
        progress, state = found or (Progress(), {})
        if found:
            hooks.restore(state)
        resumed = progress.epoch
        with modes(module, job.teacher), bar(job.table.epochs * loop.steps, "training") as advance:
            advance(resumed * loop.steps + progress.step)
            while progress.epoch < job.table.epochs:
                _epoch(loop, progress, saved, advance)
                saved.save(module, loop.optimizer, progress, hooks.state())
        if progress.best not in {-1, progress.epoch - 1}:
            module.load_state_dict(progress.kept["module"])
            hooks.restore(progress.kept["hooks"])
        loop.optimizer.zero_grad(set_to_none=True)
    last = progress.epoch - 1 if progress.epoch else None
    best = progress.best if progress.best >= 0 else last
    return History(tuple(progress.losses), resumed, tuple(progress.validation), best)


def _check(job: TrainingJob) -> None:
    split, table = job.split, job.table
    if len(split) < 2:
        raise UsageError(f"{split.name} has {len(split)} image, training needs at least 2")
    least, batch = 2 * distributed.size(), min(table.batch, len(split))
    if batch < least:
        found = f"a batch of {batch} is too small for {distributed.size()} processes: each needs at least 2 images"
        raise UsageError(found, f"--set tune.batch={least}, or fewer processes")
    check_choice("tune.keep", table.keep, KEEPS)
    if table.keep == "best" and not job.validation:
        raise UsageError(
            'tune.keep = "best" chooses an epoch by its accuracy on validation images, and there are none',
            '--set tune.keep="last"',
        )


@contextmanager
def _prepared(module: nn.Module, job: TrainingJob, hooks: Hooks) -> Iterator[_Loop]:
    """Networks on their training device; it, their memory format and the global random state are restored."""
    table, teacher = job.table, job.teacher
    objective = objective_of(table, teacher if table.distill > 0 else None)
    networks = _networks(module, job)
    with restored_device(networks):
        for tensor in (*module.parameters(), *module.buffers()):
            distributed.broadcast_(tensor)
        placement = fastest_config(networks, job.split.take(torch.arange(2)), table.mixed)
        for network in networks:
            set_memory_format(network, placement.memory_format)
        try:
            with repeatable(placement.device):
                optimizer = optimizer_of(module, table)
                yield _Loop(module, job, hooks, placement, objective, optimizer)
        finally:
            for network in networks:
                set_memory_format(network, torch.contiguous_format)


def _epoch(loop: _Loop, progress: Progress, saved: Checkpoint, advance: Callable[..., None]) -> None:
    job, epoch = loop.job, progress.epoch
    order = torch.randperm(len(job.split), generator=seeded_generator(job.seed, epoch, "order"))
    last = time.monotonic()
    for step in range(progress.step, loop.steps):
        progress.total += _step(loop, epoch, step, order[step * loop.batch : (step + 1) * loop.batch])
        progress.step = step + 1
        mean = progress.total / progress.step
        advance(1, f"training, epoch {epoch + 1} of {job.table.epochs}, loss {mean:.3f}")
        # Not after the last step: `after_epoch` may use its gradients, which no checkpoint has.
        if progress.step < loop.steps and time.monotonic() - last >= CHECKPOINT_SECONDS:
            saved.save(loop.module, loop.optimizer, progress, loop.hooks.state())
            last = time.monotonic()
    loop.hooks.after_epoch(epoch, loop.optimizer)
    progress.losses.append(progress.total / loop.steps)
    if job.table.keep == "best" and job.validation is not None:
        _validate(loop, progress, job.validation)
    progress.epoch, progress.step, progress.total = epoch + 1, 0, 0.0


def _step(loop: _Loop, epoch: int, step: int, rows: Tensor) -> float:
    """One step on the images `rows` of all processes; returns their mean loss.

    Random numbers depend on the seed, the epoch, the step and, but for augmentation, the process.
    """
    table, rank, size = loop.job.table, distributed.rank(), distributed.size()
    mine = slice(rank, None, size)
    seed = (loop.job.seed, epoch, step)
    x, y = loop.job.split.take(rows[mine]), loop.job.split.labels[rows[mine]]
    # An "auto" that `augmentation.choose_augmentation` has not replaced changes no image.
    kinds = KINDS.get(table.augment, ())
    if kinds:
        x = augment(x, seeded_generator(*seed, "augment"), count=len(rows), part=mine, kinds=kinds)
    torch.manual_seed(seed_of(*seed, rank, "dropout"))
    images, labels = loop.placement.images(x), y.to(loop.placement.device)
    with loop.placement.autocast():
        loss = (loop.hooks.loss or loop.objective)(
            loop.module, images, labels, seeded_generator(*seed, rank, "attack")
        )
    if loop.hooks.penalty is not None:
        loss = loss + loop.hooks.penalty()
    loop.optimizer.zero_grad(set_to_none=True)
    # A process may have one image more than another.
    share = len(y) * size / len(rows)
    _backward(loss * share, tuple(x.shape))
    mean = loss.detach() * share
    if size > 1:
        distributed.all_reduce_mean_([mean, *_shared(loop.module)])
    loop.hooks.before_step()
    norm = nn.utils.clip_grad_norm_(trained(loop.module), MAX_GRAD_NORM)
    value = float(mean)
    _check_finite(loop, (value, float(norm)), f"epoch {epoch + 1}, step {step + 1} of {loop.steps}")
    rate = table.lr * lr_factor(epoch * loop.steps + step, table.epochs * loop.steps)
    for group in loop.optimizer.param_groups:
        group["lr"] = rate
    loop.optimizer.step()
    loop.hooks.after_step(loop.optimizer, rate)
    return value


def _backward(loss: Tensor, shape: tuple[int, ...]) -> None:
    try:
        loss.backward()
    except RuntimeError as error:
        raise ModelError(
            f"the loss of a batch {shape} has no gradient that can be computed: {error}",
            "look for detach() and in-place changes",
        ) from error


def _shared(module: nn.Module) -> list[Tensor]:
    """Gradients, and batch-norm statistics: attacks use these, and any step may be followed by a checkpoint."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)]
    statistics = [value for layer in layers for value in (layer.running_mean, layer.running_var)]
    return gradients + [value for value in statistics if value is not None]


def _check_finite(loop: _Loop, found: tuple[float, float], where: str) -> None:
    loss, norm = found
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    hint = f"lower the learning rate: --set tune.lr={loop.job.table.lr / 10:g}"
    raise ModelError(f"training diverged: {what} in {where}", hint)


def _validate(loop: _Loop, progress: Progress, split: Split) -> None:
    """Accuracy after an epoch, over all processes; of two equal best epochs the later one is kept."""
    seed = loop.job.seed
    rows = some(len(split), VALIDATED if loop.objective.attacks else 0, seed)
    mine = rows[distributed.rank() :: distributed.size()]
    counts = attacked(loop.module, split, mine, (loop.objective, seed), loop.placement)
    found = torch.tensor(counts, dtype=torch.float64)
    distributed.all_reduce_mean_([found])
    value = float(found[0] / found[1])
    progress.validation.append(value)
    if value >= max(progress.validation):
        progress.best = progress.epoch
        progress.kept = copy.deepcopy({"module": dict(loop.module.state_dict()), "hooks": loop.hooks.state()})


def _key(loop: _Loop) -> str:
    """The key of a checkpoint: settings, seed, all weights, the hooks' state, numbers of images, device."""
    job, placement = loop.job, loop.placement
    held = len(job.validation) if job.validation else 0
    where = (placement.device.type, placement.memory_format, placement.mixed, distributed.size())
    settings = repr((job.table, job.seed, len(job.split), held, where))
    key = models.key(settings, _networks(loop.module, job), loop.hooks.state())
    return distributed.broadcast_object(key)


def _networks(module: nn.Module, job: TrainingJob) -> list[nn.Module]:
    return [module] if job.teacher is None else [module, job.teacher]
