"""Pruning: the search for masks within a budget, and the cut."""

# fmt: off
from edgeprune.prune.budget_search import Probe
from edgeprune.prune.cut import CUT_VERSION, run_cut
from edgeprune.prune.stage import PruningInputs, RESULT_VERSION, method_name, limits_only_macs, read, run, trains, write
