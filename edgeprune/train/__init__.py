"""The training loop, objectives, adversarial examples, fine-tuning."""

# fmt: off
from edgeprune.train.adversarial import Ball, PGD_REACH, crafting, cross_entropy, pgd
from edgeprune.train.augmentation import choose_augmentation
from edgeprune.train.batchnorm import normalizers
from edgeprune.train.evaluation import accuracy, reading, robust_accuracy
from edgeprune.train.job import Hooks, TrainingJob, seeded_generator, momentum, lr_factor
from edgeprune.train.loop import fit
from edgeprune.train.objectives import Objective, kl_divergence, objective_of
from edgeprune.train.placement import CPU, ExecutionConfig, fastest_config, restored_device
from edgeprune.train.tune import TUNE_VERSION, masking_hooks, run
