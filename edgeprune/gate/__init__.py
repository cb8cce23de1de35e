"""A report against a budget: the verdict and its four renderings."""

# fmt: off
from edgeprune.gate.budget import budget_from
from edgeprune.gate.formats import FORMATS, render
from edgeprune.gate.verdict import run
