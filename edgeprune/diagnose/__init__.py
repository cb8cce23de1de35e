"""Why a layer can't be pruned; what this machine and a device have. `doctor` must run where torch is missing."""

from typing import TYPE_CHECKING

from edgeprune.plugins import importer

if TYPE_CHECKING:
    from edgeprune.diagnose.environment import Finding, check_environment
    from edgeprune.diagnose.layers import ABOUT_PQI, explain_layers

__getattr__ = importer(__name__, environment="Finding check_environment", layers="ABOUT_PQI explain_layers")
