"""Bias correction: the mean error of each output that rounding the weights causes is subtracted from its bias.

Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV
2019 (arXiv 1906.04721), section 4.2: E[W_q x] - E[W x] = (W_q - W) E[x], with observed means of the input channels
instead of those from batch-norm statistics. The means of the padding are taken as those of the image, as in the paper.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from edgeprune.onnx_graph import attribute

_Floats = npt.NDArray[np.float64]


def mean_correction(node: NodeProto, error: _Floats, mean: _Floats) -> _Floats | None:
    """(W - W_q) E[x], (O,), to be added to the bias of a Conv or Gemm; None where E[x] is not of the summed channels.

    Args:
        error: W - W_q, in the shape of the weight.
        mean: (C,) of the input channels.
    """
    if node.op_type == "Gemm":
        rows = error if attribute(node, "transB", 0) else error.T
        return rows @ mean if rows.shape[1] == mean.size else None
    groups = int(attribute(node, "group", 1))
    by_group = error.sum(tuple(range(2, error.ndim))).reshape(groups, -1, error.shape[1])
    if node.op_type != "Conv" or groups * by_group.shape[2] != mean.size:
        return None
    return np.einsum("goi,gi->go", by_group, mean.reshape(groups, -1)).ravel()
