"""Interval bound propagation, as the data-free paper uses it."""

# fmt: off
from edgeprune.bounds.interval import Interval, Unbounded
from edgeprune.bounds.propagation import Bounds, activation_bounds, consumer_impact, delta_from
