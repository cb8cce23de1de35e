"""Square: random search with square patches; it needs only logits, so it runs on any file or device.

M. Andriushchenko, F. Croce, N. Flammarion and M. Hein, Square Attack: a query-efficient black-box adversarial attack
via random search, ECCV 2020. The defaults are those of AutoAttack's standard evaluation. A square may lie anywhere,
as in the paper; the reference's never touches the last row and column.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from edgeprune.attacks._base import Attack, Inputs
from edgeprune.attacks._onnx_session import onnx_inference
from edgeprune.attacks._square import search
from edgeprune.errors import UsageError
from edgeprune.models import as_logits


@dataclass(frozen=True)
class Square(Attack):
    """Options of Square.

    queries: of each image, at most. first: share of the image in the first squares. rescale: whether the squares
    shrink as fast for few queries as the paper's do for 10,000; the standard evaluation does not.
    """

    gradients: ClassVar[bool] = False

    queries: int = 5000
    first: float = 0.8
    rescale: bool = False

    def __post_init__(self) -> None:
        if self.queries < 1 or not 0 < self.first <= 1:
            raise UsageError(
                f"square can't search with queries = {self.queries}, first = {self.first}",
                "queries must be at least 1, first more than 0 and at most 1",
            )

    def perturb(self, given: Inputs) -> tuple[Tensor, Tensor]:
        """Search until an image is broken or the queries are spent."""
        tried = search(
            as_logits(given.model),
            given.x,
            given.y,
            given.ball,
            queries=self.queries,
            first=self.first,
            rescale=self.rescale,
            generator=given.generator,
            advance=given.advance,
            faster=onnx_inference(given.model, given.x, len(given.x) * self.queries),
        )
        return tried.images, tried.queries
