"""Accuracy under attack, and signs that such an accuracy is wrong."""

# fmt: off
from edgeprune.robustness.gradient_masking import flags
from edgeprune.robustness.job import ModelUnderAttack, RESULT_VERSION, attack_job
from edgeprune.robustness.models_under_attack import OnDevice, elsewhere, of_bundle, of_file, of_network, of_run
from edgeprune.robustness.models_under_attack import on_device
from edgeprune.robustness.readings import merged, readings_of
from edgeprune.robustness.stage import Attacked, run, run_stages
from edgeprune.robustness.surrogate_check import proven
