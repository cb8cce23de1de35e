"""load: a model file or a run directory becomes a Bundle, and no code in the file runs."""

from __future__ import annotations

from edgeprune.nn.bundle import load_bundle
from edgeprune.nn.probing import text_of
from edgeprune.quantities import show
from edgeprune.recipe import ModelTable
from edgeprune.records import Bundle


def run(table: ModelTable) -> Bundle:
    """Load what [model] of the recipe names; see `nn.bundle.load_bundle` for what it raises."""
    return load_bundle(table)


def describe(bundle: Bundle) -> str:
    """The bundle in a line: its class, parameters, input and number of classes."""
    module, spec = bundle.module, bundle.input
    params = sum(p.numel() for p in module.parameters())
    inside = "" if not spec.mean else f", normalized with mean {_row(spec.mean)} and std {_row(spec.std)}"
    return (
        f"{type(module).__name__}: {show(float(params), '')} parameters, "
        f"{text_of(spec.shape)} images{inside}, {spec.classes} classes"
    )


def _row(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
