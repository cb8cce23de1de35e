"""A network as data: load, trace, run, cut, store."""

# fmt: off
from edgeprune.models.architectures import canonical
from edgeprune.models.batchnorm_folding import affine, folded
from edgeprune.models.bundle import deployed, from_module, image_shape, load_bundle, rebuild, sha256_file
from edgeprune.models.costs import CostModel, LAYERS, cost_model, layer_costs, normalized_example, total_macs
from edgeprune.models.costs import normalize, total_params
from edgeprune.models.inference import HINT, TWO_LINES, check_alone, differs, full, logits
from edgeprune.models.inference import modes, nudged, unfreeze
from edgeprune.models.queries import Advance, AttackResult, Logits, as_logits, by_image, in_parallel, lengths
from edgeprune.models.queries import loss_and_gradient, sequentially, wrong
from edgeprune.models.replicas import Replicas, on_replicas
from edgeprune.models.storage import Checkpoint, Progress, key, load_state, load_tensors
from edgeprune.models.storage import CutNetwork, save_network, save_state, save_tensors
from edgeprune.models.surgery import checked_logits, cut, disturbed, mask, proof_failure
from edgeprune.models.surgery import removed_positions, tensors
from edgeprune.models.torch_export import FORWARD_ERRORS, PREFIX, capture, check_logits, example, quiet, reason
from edgeprune.models.torch_export import temporary_hooks, title
from edgeprune.models.tracing import Call, Program, Ref, Weight, trace
