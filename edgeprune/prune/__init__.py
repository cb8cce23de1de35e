"""Which units go, so that the budget holds, and the cut itself."""

# fmt: off
from edgeprune.prune.budget_search import Probe
from edgeprune.prune.cut import CUT_VERSION, run_cut
from edgeprune.prune.stage import PruningInputs, RESULT_VERSION, method_name, limits_only_macs, read, run, trains, write
