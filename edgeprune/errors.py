"""Every error a user can meet, and the exit code each one owns.

EdgepruneError                     70 unless a subclass says otherwise
├── UsageError                      2  an option, a recipe or a name is wrong
├── MissingDependency               3  a package is not installed; says the pip line
├── ModelError                      4  the model can't be loaded, traced, cut or exported
│   ├── UnsafeModel                    loading it would run code that nobody allowed
│   ├── UnsupportedModel               it has a part that can't be handled; names the layer
│   └── InfeasibleBudget               no cut of this model meets the budget; says how far it got
├── ParityError                     5  an exported or built file answers differently from its source
├── DeviceError                     6  a device can't be reached, or a command on it failed
│   └── NoLayerTimes                   it does not tell how long each layer takes
└── WorkdirError                    7  the run directory is locked, corrupt or of another model
"""

from __future__ import annotations

from typing import ClassVar


class EdgepruneError(Exception):
    """Root of the tree. `hint` is one sentence that says what to do next."""

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, hint: str = "") -> None:
        """Keep the message (what was found, what is accepted) and the hint (what to do)."""
        Exception.__init__(self, message)
        self.message = message
        self.hint = hint


class UsageError(EdgepruneError):
    """An option, a recipe, a data set or a name is wrong."""

    exit_code = 2


class MissingDependency(EdgepruneError):
    """A package that this needs is not installed."""

    exit_code = 3


class ModelError(EdgepruneError):
    """The model can't be loaded, traced, cut or exported."""

    exit_code = 4


class UnsafeModel(ModelError):
    """Loading the file would run code, or asks for classes that nobody allowed."""


class UnsupportedModel(ModelError):
    """The model has a part that can't be handled; the message names it."""


class InfeasibleBudget(ModelError):
    """No allowed cut of this model meets the budget; the message says how far it got."""


class ParityError(EdgepruneError):
    """A file that was made from a model answers differently from it; the message says by how much."""

    exit_code = 5


class DeviceError(EdgepruneError):
    """A device can't be reached, took too long, or a command on it failed."""

    exit_code = 6


class NoLayerTimes(DeviceError):
    """A device does not tell how long each layer takes, so that it has no latency table."""


class WorkdirError(EdgepruneError):
    """The run directory is in use, corrupt, or belongs to another model."""

    exit_code = 7
