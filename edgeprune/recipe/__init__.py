"""Everything that decides a run; defaults, choices and ranges stand at the field."""

# fmt: off
from edgeprune.recipe.parse import attack, budget, build, to_dict, to_toml, with_defaults
from edgeprune.recipe.schema import ALLOW_ESTIMATES, AttackTable, DataTable, ExportTable, KEEPS, MIXED, MeasureTable
from edgeprune.recipe.schema import ModelTable, NORMS, OBJECTIVES, OPTIMIZERS, PruneTable, QuantizeTable, Recipe
from edgeprune.recipe.schema import SynthesizeTable, TuneTable
