"""Attacks: one file each."""

# fmt: off
from edgeprune.attacks._apgd import Task, climb, cross_entropies
from edgeprune.attacks._base import Attack, Inputs, Model, STANDARD
