"""Pruning methods: one file each."""

# fmt: off
from edgeprune.methods._base import Method, PruneTask, ScoreMethod, Survey, SurveyMethod
from edgeprune.methods._base import Training, TrainingMethod, counts, group_shares, need_images, need_training, verify
