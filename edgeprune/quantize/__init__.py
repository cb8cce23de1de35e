"""A float ONNX file to int8 or fp16: calibrated, evaluated, verified."""

# fmt: off
from edgeprune.quantize.evaluation import check_skipped, judged
from edgeprune.quantize.finalize import rough, size_of
from edgeprune.quantize.job import CalibrationSet, Job
from edgeprune.quantize.stage import RESULT_VERSION, check_precision, read, run, shipped, wants_images
