"""Agreement of two files on synthetic images, where there are no labels."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from edgeprune.devices import Device, device_from_url
from edgeprune.errors import DeviceError, MissingDependency, UsageError
from edgeprune.measure.answers import BATCH, RUNTIME, Logits, absent, agreement, predict
from edgeprune.records import Artifact, InputSpec, Reading

RESAMPLES = 2000
AT_ONCE = 2**22
# Of the resamples for the interval only: the images are those of the run's own seed.
SEED = 0


@dataclass(frozen=True)
class Pictures:
    """Synthetic images float32 (N, C, H, W). facts: how they were made.

    fitted: the compressed network was repaired on these very images, which flatters it.
    """

    images: Tensor
    facts: Mapping[str, Any]
    fitted: bool

    def batches(self) -> Iterator[npt.NDArray[np.float32]]:
        """The images in their order, a few at a time."""
        for batch in self.images.split(BATCH):
            yield batch.numpy()


def measure_unlabelled(
    spec: InputSpec,
    files: Mapping[str, Path],
    pictures: Pictures | None,
    device: Device,
    log: Callable[[str], None],
) -> tuple[Reading, ...]:
    """Agreement and divergence on a device; on this machine where the device lacks ONNX Runtime."""
    readings: tuple[Reading, ...] = ()
    if pictures is not None and device.times_alone:
        about = {"images": "synthetic", "fitted": pictures.fitted}
        units = {"synthetic_agreement": "fraction", "synthetic_kl": "nats"}
        missing = (absent(metric, unit, device, "compressed") for metric, unit in units.items())
        readings = tuple(replace(r, conditions={**about, **r.conditions}) for r in missing)
    elif pictures is not None:
        log(f"measure: dense and compressed on {len(pictures.images)} synthetic images")
        try:
            readings = answers(files, spec, pictures, device)
        except MissingDependency:
            log(f"measure: {device.where()} has no ONNX Runtime: asked on this machine")
            readings = answers(files, spec, pictures, device_from_url("local"))
    return readings


def answers(
    files: Mapping[str, Path], spec: InputSpec, pictures: Pictures, device: Device
) -> tuple[Reading, ...]:
    """How alike the files "dense" and "compressed" answer synthetic images, both run on the device."""
    logits = {
        name: predict(
            Artifact(str(path), "onnx", "fp32", spec, "", path.stat().st_size), pictures.batches(), device,
            total=len(pictures.images), label=f"synthetic images through the {name} model",
        )
        for name, path in files.items()
    }  # fmt: skip
    for name, found in logits.items():
        if found.shape[1] != spec.classes:
            raise DeviceError(
                f"{device.name} answered logits of {found.shape[1]} classes, the {name} network has {spec.classes}"
            )
    about = {"images": "synthetic", "fitted": pictures.fitted, "runtime": RUNTIME, **pictures.facts}
    same = agreement(logits["dense"], logits["compressed"])
    readings = (
        replace(same, metric="synthetic_agreement"),
        divergence(logits["dense"], logits["compressed"]),
    )
    return tuple(replace(r, where=device.where(), conditions={**r.conditions, **about}) for r in readings)


def divergence(dense: Logits, compressed: Logits) -> Reading:
    """Mean KL(dense || compressed) of the class probabilities in nats, with a bootstrap 95 % interval of the mean.

    Images with an answer that is not finite are left out and counted.
    """
    if dense.shape != compressed.shape or dense.ndim != 2 or len(dense) == 0:
        raise UsageError(
            f"a divergence needs logits (N, K) of the same images, got {dense.shape} and {compressed.shape}"
        )
    finite = np.isfinite(dense).all(axis=1) & np.isfinite(compressed).all(axis=1)
    log_p, log_q = (_log_softmax(logits[finite].astype(np.float64)) for logits in (dense, compressed))
    # Never negative (Gibbs), but for rounding where the two are alike.
    each = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0)
    n = len(each)
    conditions: dict[str, Any] = {"not_finite": len(dense) - n} if n < len(dense) else {}
    if n == 0:
        why = "no image had finite answers from both files"
        return Reading(
            "synthetic_kl", None, "nats", 0, None, "counted", "compressed", {**conditions, "why": why}
        )
    spread = None
    if n > 1:
        spread = interval_of_mean(each)
        conditions |= {"interval": f"bootstrap, {RESAMPLES} resamples", "largest": float(each.max())}
    return Reading("synthetic_kl", float(each.mean()), "nats", n, spread, "counted", "compressed", conditions)


def interval_of_mean(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of the means of resamples with replacement (Efron, percentile method)."""
    generator, rows = np.random.default_rng(SEED), max(1, AT_ONCE // len(values))
    means = [
        values[generator.integers(0, len(values), (min(rows, RESAMPLES - start), len(values)))].mean(axis=1)
        for start in range(0, RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
