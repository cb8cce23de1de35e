"""What robust_pruning.py compares: every row with its method, options and budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# The objective of all other rows: adversarial images alone. By itself DNR takes clean images for half of its loss.
SAME = {"beta": 0.0}
ABLATIONS: dict[str, dict[str, Any]] = {
    "without stage A": {"stage_a": 0.0},
    "without stage B's constraints": {"rho_kd": 0.0, "init_kd": 0.0, "rho_adv": 0.0, "init_adv": 0.0},
    "without distillation": {"rho_kd": 0.0},
    "without the robust constraint": {"rho_adv": 0.0, "init_adv": 0.0},
}
BASELINES: dict[str, dict[str, Any]] = {
    "sap, layer": {"scope": "layer"},
    "sap, global": {"scope": "global"},
    "lottery ticket": {"scope": "global", "ratio": 0.2},
    "one-shot magnitude": {"scope": "global", "ratio": 0.2, "from_dense": True},
}


@dataclass(frozen=True)
class Row:
    """One row: a method with its options and a budget. share: epochs, times those of the setting."""

    part: str
    name: str
    method: str
    granularity: str
    density: float
    options: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False
    share: int = 1
    natural: bool = False


def rows() -> list[Row]:
    """Every row of every part."""
    out = []
    for density in (0.1, 0.05):
        part = f"weights, {density:.0%} of them"
        out += [
            Row(part, name, name, "weight", density, tuned=True)
            for name in ("magnitude", "taylor", "uniform-random")
        ]
        out += [
            Row(part, "sap", "sap", "weight", density, {"variant": "tune", "scope": "layer"}),
            Row(part, "dnr", "dnr", "weight", density, SAME),
            Row(part, "dnr, half of the loss on clean images", "dnr", "weight", density),
            Row(part, "dnr, scratch", "dnr", "weight", density, {"start": "scratch", **SAME}, share=2),
            Row(part, "static random mask, scratch", "dnr", "weight", density,
                {"start": "scratch", "rate": 0.0, **SAME}, share=2),
            Row(part, "deadwooding", "deadwooding", "weight", density),
        ]  # fmt: skip
    part = "Deadwooding without a part of it, 10% of the weights"
    for name, options in ABLATIONS.items():
        out.append(Row(part, name, "deadwooding", "weight", 0.1, options))
    part = "channels, 50% of the parameters"
    out += [
        Row(part, "magnitude", "magnitude", "channel", 0.5, tuned=True),
        Row(part, "taylor, shared out by scores", "taylor", "channel", 0.5, {"measured": False}, tuned=True),
        Row(part, "uniform-random", "uniform-random", "channel", 0.5, tuned=True),
    ]
    out += [
        Row(part, name, name, "channel", 0.5, options)
        for name, options in (("sap", {"variant": "tune"}), ("dnr", SAME), ("deadwooding", {}))
    ]
    for density in (0.1, 0.05):
        part = (
            f"SAP and its baselines, natural training from scratch, rewinding, {density:.0%} of the weights"
        )
        for name, options in BASELINES.items():
            given = {"variant": "paper", "start": "scratch", **options}
            out.append(Row(part, name, "sap", "weight", density, given, share=3, natural=True))
    return out
