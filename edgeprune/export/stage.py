"""Write the files of a run, model.onnx and what rebuilds the network in torch, and verify each of them."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.export import ExportedProgram

import edgeprune
from edgeprune import models, onnx_graph, serialization
from edgeprune.errors import (
    ROOM,
    EdgepruneError,
    ModelError,
    NoRoom,
    ParityError,
    UnsupportedModel,
    is_memory,
)
from edgeprune.export import sparsity_check, torch_to_onnx
from edgeprune.export.reload import PLAN, PROGRAM, WEIGHTS, PlanFile, Request, Response
from edgeprune.models import capture, check_logits, deployed, quiet
from edgeprune.recipe import ExportTable
from edgeprune.records import Artifact, Bundle, InputSpec, Reading

RESULT_VERSION = 1
SEED = 20
# The share of the file's weights that hold the 2:4 pattern.
PATTERN = "pattern_2:4"
RELOAD_TOLERANCE = 1e-5
RELOAD_TIMEOUT_S = 1800
_FILES = {"plan": f"{PLAN} and {WEIGHTS}", "program": PROGRAM}
_HINT = "accept it with --set export.tolerance=..., or take another --set export.opset=..."


def run(  # noqa: PLR0913
    module: nn.Module,
    spec: InputSpec,
    out: Path,
    *,
    opset: int,
    table: ExportTable,
    meta: Mapping[str, str],
    real: Tensor | None,
    pattern: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Artifact, tuple[Reading, ...], tuple[str, ...]]:
    """Write the network as one ONNX file whose logits are those of the module.

    Args:
        module: pixels float32 (N, C, H, W) in [spec.low, spec.high] -> logits (N, K), in eval mode.
        meta: metadata besides version, input and normalization: "labels", "parent".
        real: images to compare on besides random ones.
        pattern: parameter -> shape of those that hold the 2:4 pattern, which the file must hold then.

    Returns:
        The file; the differences of its logits from the module's on random and on real images, and with a pattern the
        share of the weights that hold it; notes.

    Raises:
        UnsupportedModel: the network can't be exported, or not at that opset.
        ParityError: the file's logits differ from the module's, or a weight breaks the pattern.
    """
    torch_to_onnx.check_size(module)
    check_logits(module, spec)
    job = _Job(module, spec, opset, table, _about(spec, meta), real, out.name, pattern)
    model, readings, notes = _first_valid(job)
    data = model.SerializeToString()
    with serialization.replace_file(out) as file:
        file.write(data)
    sha256 = hashlib.sha256(data).hexdigest()
    parent = meta.get("parent", "")
    artifact = Artifact(str(out), "onnx", "fp32", spec, sha256, len(data), parent=parent, opset=opset)
    return artifact, readings, notes


def save_modules(bundle: Bundle, folder: Path) -> None:
    """Write what rebuilds the network in torch.

    - model.pt2: the network with its normalization (pixels -> logits) as torch.export saves it, with an open
      batch dimension where the network allows one. Loading it needs nothing but torch.
    - weights.safetensors: the state dict of the bare network.
    - plan.json: the record `PlanFile`.
    """
    wrapped = deployed(bundle).eval()
    try:
        program = capture(wrapped, bundle.input, dynamic_batch=True)
    except UnsupportedModel:
        program = capture(wrapped, bundle.input, dynamic_batch=False)
    forget_origin(program)
    with quiet(), serialization.replace_file(folder / PROGRAM) as file:
        torch.export.save(program, file)
    models.save_network(bundle.module, folder / WEIGHTS)
    known = PlanFile(edgeprune.__version__, bundle.source, bundle.input, bundle.plans, bundle.labels)
    serialization.write(folder / PLAN, known)


def check_reload(folder: Path, spec: InputSpec, reference: nn.Module) -> tuple[Reading, ...]:
    """Verify that a fresh process can rebuild the network from the files of `save_modules`.

    Once from the original architecture, plan and weights, and once from model.pt2 alone. The first has no value for a
    network that came from memory.

    Args:
        reference: the network, pixels -> logits, in eval mode.

    Raises:
        ModelError: a fresh process can't rebuild it.
        ParityError: the logits of the rebuilt network differ.
    """
    source = serialization.read(PlanFile, folder / PLAN, ModelError).source
    ways = ("program",) if source.kind == "memory" else ("plan", "program")
    images = [pixels for _, pixels in onnx_graph.probes(spec, SEED)]
    with serialization.scratch_folder() as scratch:
        pixels, out = scratch / "pixels", scratch / "logits"
        models.save_tensors({"pixels": torch.cat(images)}, pixels)
        request = Request(str(folder.resolve()), str(pixels), str(out), ways, torch.get_num_threads())
        for way, (message, hint) in _run_fresh_process(request).errors.items():
            raise ModelError(f"a fresh process can't rebuild the network from {_FILES[way]}: {message}", hint)
        logits = models.load_tensors(out)
    readings = tuple(_reload_reading(way, logits[way], spec, reference) for way in ways)
    if "plan" in ways:
        return readings
    why = {"why": "the network came from memory: there is no file to take its architecture from"}
    missing = Reading(onnx_graph.METRIC, None, "fraction", 0, None, "not measured", _FILES["plan"], why)
    return (missing, *readings)


def forget_origin(program: ExportedProgram) -> None:
    """Remove the source paths and stack traces that torch.export notes at every operation, in place."""
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                for key in ("stack_trace", "from_node", "source_fn_stack"):
                    node.meta.pop(key, None)


@dataclass(frozen=True)
class _Job:
    module: nn.Module
    spec: InputSpec
    opset: int
    table: ExportTable
    about: Mapping[str, str]
    real: Tensor | None
    name: str
    pattern: Mapping[str, tuple[int, ...]] | None


_Verified = tuple[ModelProto, tuple[Reading, ...], tuple[str, ...]]


def _about(spec: InputSpec, meta: Mapping[str, str]) -> dict[str, str]:
    normalization = {"mean": spec.mean, "std": spec.std, "where": "inside the model"}
    pixels = {"layout": "NCHW", "shape": spec.shape, "type": "float32", "low": spec.low, "high": spec.high}
    own = {
        "version": edgeprune.__version__,
        "input": json.dumps(pixels),
        "normalization": json.dumps(normalization),
    }
    return {f"edgeprune.{key}": value for key, value in {**own, **meta}.items()}


def _first_valid(job: _Job) -> _Verified:
    failures: list[EdgepruneError] = []
    dynamic_batch = job.table.dynamic_batch
    for export in torch_to_onnx.candidates(job.module, job.spec, job.opset, dynamic_batch=dynamic_batch):
        try:
            return _simplified(job, export())
        except (UnsupportedModel, ParityError) as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    messages = "; ".join(dict.fromkeys(error.message for error in failures))
    raise type(failures[0])(messages, failures[0].hint) from failures[-1]


def _simplified(job: _Job, exported: torch_to_onnx.Exported) -> _Verified:
    """The simplified model if it is valid, else the model as it was exported."""
    notes = (f"{job.name} was {exported.note}",) if exported.note else ()
    try:
        slimmed = onnx_graph.slim(exported.model)
        return slimmed, _check(job, slimmed), notes
    except (UnsupportedModel, ParityError) as error:
        notes = (*notes, f"{job.name} was not simplified: {error.message}")
    return exported.model, _check(job, exported.model), notes


def _check(job: _Job, model: ModelProto) -> tuple[Reading, ...]:
    onnx_graph.finish(model, job.about)
    opset = onnx_graph.opset_of(model)
    if opset != job.opset:
        raise UnsupportedModel(
            f"{job.name} has opset {opset} where {job.opset} was asked for", f"--set export.opset={opset}"
        )
    torch_to_onnx.check_bytes(model.ByteSize(), f"{job.name} would have {{:.1f}} GB")
    made, made_from = onnx_graph.open_onnx(model), onnx_graph.reference(job.module)
    batches = (1, 3) if job.table.dynamic_batch else (1,)
    random = (probe for batch in batches for probe in onnx_graph.probes(job.spec, SEED, batch=batch))
    real = ((f"real image {i}", image[None]) for i, image in enumerate(() if job.real is None else job.real))
    readings: list[Reading] = []
    for kind, images in (("random", random), ("real", real)):
        difference = onnx_graph.compare(made_from, made, images, job.name)
        if difference.images:
            readings.append(
                onnx_graph.check(
                    difference, tolerance=job.table.tolerance, name=job.name, inputs=kind, hint=_HINT
                )
            )
    if job.pattern is not None:
        readings.append(_pattern_reading(model, job.pattern, job.name))
    return tuple(readings)


def _pattern_reading(model: ModelProto, promised: Mapping[str, tuple[int, ...]], name: str) -> Reading:
    share = sparsity_check.pattern_share(model)
    words = sparsity_check.check_pattern(share, promised, name)
    value = len(share.holding) / len(share.weights) if share.weights else 0.0
    without = [w.name for w in share.weights if w not in share.holding]
    facts = {"pattern": "2:4", "promised": len(promised), "words": words, "without": without}
    return Reading(PATTERN, value, "fraction", len(share.weights), None, "counted", name, facts)


def _run_fresh_process(request: Request) -> Response:
    # -P: a file such as random.py in the user's directory must not take the place of the standard library's.
    program = "import sys; sys.path.insert(0, sys.argv[1]); from edgeprune.export.reload import main; sys.exit(main())"
    package = str(Path(edgeprune.__file__).resolve().parents[1])
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, package],
            input=json.dumps(serialization.to_json(request)),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=RELOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"a fresh process did not rebuild the network in {RELOAD_TIMEOUT_S} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        if is_memory(done.stderr):
            raise NoRoom(f"out of memory in a fresh process: {last}", "free some memory")
        if done.returncode == NoRoom.exit_code:
            raise NoRoom(f"a fresh process that rebuilds the network has no room: {last}", ROOM)
        raise ModelError(f"a fresh process that was to rebuild the network failed: {last}")
    return serialization.read(Response, Path(request.out + ".json"), ModelError)


def _reload_reading(way: str, logits: Tensor, spec: InputSpec, reference: nn.Module) -> Reading:
    rebuilt = iter(logits)
    difference = onnx_graph.compare(
        onnx_graph.reference(reference),
        lambda _: next(rebuilt)[None],
        onnx_graph.probes(spec, SEED),
        _FILES[way],
    )
    return onnx_graph.check(
        difference, tolerance=RELOAD_TOLERANCE, name=_FILES[way], inputs="random", hint="please report this"
    )
