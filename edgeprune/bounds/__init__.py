"""Interval bound propagation, as the data-free paper uses it."""

# fmt: off
from edgeprune.bounds.interval import Interval, Unbounded, Value
from edgeprune.bounds.linear import TRANSPOSED
from edgeprune.bounds.propagation import Bounds, Weights, activation_bounds, changes_of, consumer_impact, delta_from
from edgeprune.bounds.propagation import outward
