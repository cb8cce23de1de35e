"""A model of a device's layer times, and allocation by it."""

# fmt: off
from edgeprune.latency.allocation import allocate_timed, refine
from edgeprune.latency.layer_table import LatencyTable, SurveyOptions, run
from edgeprune.latency.sampling import TimingBackend, subject, survey
from edgeprune.latency.table import Predictor, TIME, TimedCosts
