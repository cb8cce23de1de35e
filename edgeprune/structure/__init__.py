"""What can be removed from a network: dependency groups, units, allocation of a budget."""

# fmt: off
from edgeprune.structure.allocation import Allocation, BOTTLENECK, Choice, Rules, allocate, fitting_levels
from edgeprune.structure.allocation import keep_largest, levels, losses_of, shared_counts, timed_levels
from edgeprune.structure.channel_paths import Path, follow, following_batch_norm
from edgeprune.structure.groups import Graph, find_groups, provable_groups
from edgeprune.structure.pq_index import ROUNDING, check_rule, keep_shares, pqi, share_out, superfluous
from edgeprune.structure.units import BLOCK, KEPT_OF_BLOCK, Units, channel_sums, drop_smallest, exactly, of_channels
from edgeprune.structure.units import of_weights
