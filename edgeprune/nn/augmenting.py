"""Random shifts and mirrors of a batch of images, decided by a generator alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

EVERY = slice(None)


def augment(
    x: Tensor, generator: torch.Generator, *, count: int | None = None, part: slice = EVERY
) -> Tensor:
    """Shift each image by up to an eighth of its height, with mirrored borders, and mirror every second one.

    Args:
        x: (N, C, H, W).
        generator: on the CPU; decides the shifts and mirrors.
        count: of how many images `x` is a part; N when not given. What an image gets does not depend on which
            part it comes in.
        part: which of those images `x` has.
    """
    whole = len(x) if count is None else count
    height, width = x.shape[2:]
    reach = min(height // 8, width - 1)
    if reach:
        down, right = torch.randint(0, 2 * reach + 1, (whole, 2), generator=generator)[part].unbind(1)
        padded = functional.pad(x, (reach, reach, reach, reach), mode="reflect")
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        x = windows[torch.arange(len(x)), :, down, right]
    mirrored = (torch.rand(whole, 1, 1, 1, generator=generator) < 0.5)[part]
    return torch.where(mirrored, x.flip(3), x)
