"""The order of the stages, the run directory, and the other commands; a module is imported when it is first used."""

from typing import TYPE_CHECKING

from edgeprune.plugins import importer

if TYPE_CHECKING:
    from edgeprune.pipeline.checkup import doctor, doctor_status
    from edgeprune.pipeline.compression import budget_pairs, compress, recipe_from
    from edgeprune.pipeline.context import Result, load
    from edgeprune.pipeline.demonstration import demo
    from edgeprune.pipeline.evaluation import evaluate, warnings
    from edgeprune.pipeline.gating import gate
    from edgeprune.pipeline.inspection import why
    from edgeprune.pipeline.listing import members
    from edgeprune.pipeline.profiling import profile, table

__getattr__ = importer(__name__, compression="budget_pairs compress recipe_from", context="Result load",
    demonstration="demo", evaluation="evaluate warnings", gating="gate", inspection="why", listing="members",
    profiling="profile table", checkup="doctor doctor_status")  # fmt: skip
