"""Pruning methods: one file each."""

# fmt: off
from edgeprune.methods._base import Method, PruneTask, Survey, SurveyMethod, Training, TrainingMethod, counts, verify
