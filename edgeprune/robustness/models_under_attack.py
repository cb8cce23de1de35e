"""Models to attack: a network in torch, an ONNX file, or the file of a run with gradients of its network."""

import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from edgeprune import models, recipe, serialization, targets
from edgeprune.devices import Device, ShellDevice
from edgeprune.errors import EdgepruneError, UnsafeModel, UnsupportedModel, UsageError
from edgeprune.measure import RUNTIME, built_engines, choose, predict
from edgeprune.measure import Place as BuildPlace
from edgeprune.models import Logits, deployed, load_bundle, sha256_file
from edgeprune.onnx_graph import ONNX_ERRORS, ORT_ERRORS, freed, open_session
from edgeprune.recipe import ModelTable
from edgeprune.records import Artifact, Bundle, InputSpec, Target
from edgeprune.robustness.job import ModelUnderAttack
from edgeprune.robustness.onnx_module import module, plan
from edgeprune.robustness.remote_model import Asked
from edgeprune.robustness.remote_model import Place as AskedPlace
from edgeprune.runtimes import OnnxRuntime, Session

# How far the copy may be from the file, relative to the largest logit; rounding in another order gives 1e-6.
TOLERANCE = 1e-4
_TRIED = 3
# Images that a thread computes at a time, by itself: threads that share a batch wait for each other after every
# operator, and the activations of more images exceed the processor's caches.
ROWS = 24
# Fewer are not worth a thread.
LEAST = 2


def open_file(path: Path, folder: Path, threads: int) -> tuple[Logits, Logits | None]:
    """The logits of an ONNX file, and those of a session for large batches, or None.

    Where the file's batch is fixed, a copy with a free batch is used, provided that its outputs are the file's.
    """
    if not path.is_file():
        raise UsageError(f"no file {str(path)!r}", "give an .onnx file or a finished run directory")
    session = OnnxRuntime().open(path, threads)
    if session.input_shape[0] is None:
        return _answers(session), _opened(path, session, threads) if threads > 1 else None
    copy = _freed(path, folder / "free-batch.onnx")
    if copy is None:
        return _answers(session), None
    try:
        return _answers(session), _opened(copy, session, threads)
    finally:
        copy.unlink()


def _answers(session: Session) -> Logits:
    def answers(x: Tensor) -> Tensor:
        pixels = np.ascontiguousarray(x.detach().cpu().numpy(), dtype=np.float32)
        return torch.from_numpy(session(pixels))

    return answers


def _opened(path: Path, session: Session, threads: int) -> Logits | None:
    """The answers on several threads, or None where it fails or answers otherwise."""
    try:
        answers = _shared_out(open_session(path, threads=1), threads)
        return answers if _same(session, answers) else None
    except (UnsupportedModel, *ORT_ERRORS):
        return None


def _shared_out(many: Any, threads: int) -> Logits:
    name, pool = many.get_inputs()[0].name, ThreadPoolExecutor(threads)

    def some(pixels: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.asarray(many.run(None, {name: pixels})[0], dtype=np.float32)

    def answers(x: Tensor) -> Tensor:
        pixels = np.ascontiguousarray(x.detach().cpu().numpy(), dtype=np.float32)
        replicas = min(threads, len(pixels) // LEAST)
        if replicas < 2:
            return torch.from_numpy(some(pixels))
        rounds = -(-len(pixels) // (replicas * ROWS))
        parts = np.array_split(pixels, replicas * rounds)
        return torch.from_numpy(np.concatenate(list(pool.map(some, parts))))

    return answers


def _freed(path: Path, out: Path) -> Path | None:
    """A copy with a free batch, also in reshapes; None where it can't be written."""
    try:
        model = onnx.load(str(path))
    except ONNX_ERRORS:
        return None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(freed(model), str(out))
    except (OSError, ValueError):
        return None
    return out


def _same(session: Session, answers: Logits) -> bool:
    one = session.image()
    batch = np.concatenate([np.mod(one + np.float32(0.37 * i), np.float32(1.0)) for i in range(_TRIED)])
    old, new = session(batch), answers(torch.from_numpy(batch)).numpy()
    if old.shape != new.shape or not np.isfinite(old).all():
        return False
    scale = float(np.abs(old).max()) or 1.0
    return float(np.abs(old - new).max()) <= TOLERANCE * scale


FILE = "model.onnx"
# As long as measuring waits for the device.
WAIT_S = 600.0
# Architectures that import nothing but their package, whoever names them.
HARMLESS = re.compile(r"|(timm|torchvision):[\w.]+(\?(num_classes|in_chans)=\d{1,5}(&in_chans=\d{1,5})?)?")
HINT = "Give the run directory or the torch model for attacks with gradients."


def of_network(
    name: str, module: nn.Module, sha256: str, *, others: Mapping[str, nn.Module] | None = None
) -> ModelUnderAttack:
    """A network in torch."""
    return ModelUnderAttack(
        name, sha256, module, module, dict(others or {}), where=f"local torch {torch.__version__}"
    )


def of_bundle(bundle: Bundle, name: str) -> ModelUnderAttack:
    """A model that was loaded."""
    return of_network(name, deployed(bundle), bundle.source.sha256)


def of_file(
    name: str,
    path: Path,
    scratch: Path,
    where: str,
    *,
    twin: nn.Module | None = None,
    others: Mapping[str, nn.Module] | None = None,
) -> ModelUnderAttack:
    """An ONNX file, run by ONNX Runtime on this machine.

    Where `twin` is not given it is read from the file, of a quantized one without the rounding. A quantized file also
    gets a straight-through form. `proven` checks both.
    """
    answers, fast = open_file(path, scratch, torch.get_num_threads())
    victim = ModelUnderAttack(name, sha256_file(path), answers, twin, dict(others or {}), fast, where)
    try:
        model = onnx.load(str(path))
    except ONNX_ERRORS as error:
        # ONNX Runtime opened it: what is missing are weights beside the file, or it is not in ONNX's own format.
        return _without(victim, f"the file can't be read by the onnx package ({error})")
    quantized = plan.is_quantized(model)
    if twin is not None and not quantized:
        return victim
    try:
        straight = module.to_torch(model) if quantized else None
        own = twin or module.to_torch(model, rounding=False)
    except UnsupportedModel as error:
        return _without(victim, error.message)
    return replace(victim, twin=own, straight=straight, own=twin is None)


@dataclass(frozen=True)
class OnDevice:
    """A device that judges a file. target: names its runtime (None: ONNX Runtime). scratch: for engines built there."""

    device: Device
    target: Target | None
    scratch: Path
    log: Callable[[str], None] = lambda message: None
    wait_s: float = WAIT_S


def elsewhere(device: Device) -> bool:
    """Whether a device has a runtime other than this process's own ONNX Runtime."""
    if device.name in ("local", "fake"):
        return device.name == "local" and device.agent()[0] != sys.executable
    return True


def on_device(victim: ModelUnderAttack, path: Path, spec: InputSpec, there: OnDevice) -> ModelUnderAttack:
    """The same file judged by a device: an image is broken when the device misclassifies it.

    Square queries the device too, in a session that stays open. A device whose agent can't stay open gives only
    verdicts, and Square queries this machine's copy. Of one without outputs the file is judged here; the notes say so.
    """
    device = there.device
    if device.times_alone:
        note = f"Every verdict is that of ONNX Runtime on this machine, not of {device.name}: {device.times_alone}."
        return replace(victim, notes=(*victim.notes, note))
    runtime, notes = choose(there.target, device) if there.target else (RUNTIME, ())

    def file() -> Path:
        return path if runtime == RUNTIME else _engine(victim, path, there)

    judged = replace(victim, where=device.where(), notes=(*victim.notes, *notes))
    if isinstance(device, ShellDevice) and device.talks:
        asked = Asked(AskedPlace(device, runtime, cache(file), there.wait_s, there.log))
        note = f"Square asked the device: a session of {runtime} that stayed open on {device.name}."
        return replace(judged, answers=asked, fast=None, asked=asked.open, notes=(*judged.notes, note))
    artifact = Artifact(str(path), "onnx", "", spec, victim.sha256, path.stat().st_size)

    def answers(x: Tensor) -> Tensor:
        pixels = x.detach().cpu().contiguous().numpy()
        label = f"answers of {device.name}"
        return torch.from_numpy(
            predict(artifact, [pixels], device, total=len(x), label=label, runtime=runtime)
        )

    note = f"Square asked a copy of the file here; every verdict is that of {device.name}."
    return replace(judged, answers=answers, fast=victim.fast or victim.answers, notes=(*judged.notes, note))


def _engine(victim: ModelUnderAttack, path: Path, there: OnDevice) -> Path:
    assert there.target is not None
    there.log(f"attack: build an engine of {path.name} on {there.device.name}")
    there.scratch.mkdir(parents=True, exist_ok=True)
    name = victim.sha256[:16]
    return built_engines({name: path}, BuildPlace(there.device, there.target, there.scratch))[name].path


def _without(victim: ModelUnderAttack, why: str) -> ModelUnderAttack:
    if victim.twin is None:
        note = f"No gradients were had from the file: {why}. It was only asked, which overstates robustness. {HINT}"
    else:
        note = (
            f"Attacks that see the quantization were not tried: {why}. Images made against the float network alone "
            "overstate robustness."
        )
    return replace(victim, notes=(*victim.notes, note))


def of_run(
    run: Path, scratch: Path, where: str, given: ModelTable, *, trusted: bool = False
) -> ModelUnderAttack:
    """The file of a run, with gradients of its network and images made against the dense one where it is available."""
    bundle = load_bundle(ModelTable(path=str(run)))
    dense, why = _dense(run, given, trusted)
    others = {} if dense is None else {"dense": deployed(dense)}
    victim = of_file(FILE, run / FILE, scratch, where, twin=deployed(bundle), others=others)
    if dense is not None:
        return victim
    note = f"Images made against the dense model were not tried: {why}."
    return replace(victim, notes=(*victim.notes, note))


def _dense(run: Path, given: ModelTable, trusted: bool) -> tuple[Bundle | None, str]:
    try:
        table = recipe.build({"model": targets.read_toml(run / "recipe.toml")["model"]}, {}).model
        sha256 = str(serialization.load(run / "edgeprune.lock")["model"]["sha256"])
    except (EdgepruneError, OSError, ValueError, LookupError, TypeError) as error:
        return None, f"its recipe or its lock file can't be read ({error})"
    path = Path(table.path)
    if not table.path:
        return None, "it was in memory"
    try:
        if (path.exists() and not path.is_file()) or sha256_file(path) != sha256:
            return None, f"{path} is not the file any more that was compressed"
    except UsageError as error:
        return None, error.message
    if not trusted:
        _check_named(run, table, given)
    try:
        return load_bundle(table), ""
    except EdgepruneError as error:
        return None, f"{path} can't be loaded: {error.message}"


def _check_named(run: Path, table: ModelTable, given: ModelTable) -> None:
    """Refuse code that only the recipe of a run names: a stranger may have written it."""
    ours = table.arch and given.arch and models.canonical(table.arch) == models.canonical(given.arch)
    named = [f"arch = {table.arch!r}"] if not (ours or HARMLESS.fullmatch(table.arch)) else []
    named += [f"allow_class = {name!r}" for name in table.allow_class if name not in given.allow_class]
    named += ["trust_pickle = true"] if table.trust_pickle and not given.trust_pickle else []
    if named:
        raise UnsafeModel(
            f"{run / 'recipe.toml'} says {', '.join(named)}, which runs code that this command does not name",
            f"give --trust-run if the run is your own, or attack {run / FILE} alone",
        )
