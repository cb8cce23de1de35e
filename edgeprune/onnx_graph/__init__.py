"""An ONNX graph: index, sessions, clean-up, work per layer."""

# fmt: off
from edgeprune.onnx_graph.cleanup import WEIGHTED, finish, name_after_layers, slim
from edgeprune.onnx_graph.index import Array, HINT, ONNX_ERRORS, View, add_constant, add_node, attribute
from edgeprune.onnx_graph.index import batch_of, captured, copied, data_files, freed, inputs_of, moved
from edgeprune.onnx_graph.index import one_hot, opened, operand, opset_of, subgraphs, title, unique, unused, value_names
from edgeprune.onnx_graph.qdq_constants import QuantizationParameters, maker_of, parameters_of, quantized_constant
from edgeprune.onnx_graph.session import METRIC, Network, ORT_ERRORS, check, compare, open_onnx
from edgeprune.onnx_graph.session import open_session, probes, reference
from edgeprune.onnx_graph.work import INT8_OPERATORS, Layer, WIDTH, Work, layers, work_of
