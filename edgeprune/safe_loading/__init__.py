"""Files of strangers, opened so that no code in them runs."""

# fmt: off
from edgeprune.safe_loading.formats import kind_of
from edgeprune.safe_loading.names import LARGEST_STRIDE, check_names, check_strides
from edgeprune.safe_loading.pickle_loader import load_pickle
from edgeprune.safe_loading.pt2_archive import load_pt2
from edgeprune.safe_loading.user_code import USER_CODE_ERRORS, import_library, importable_here, prepare_torchvision
