"""TEST USE ONLY: SGLang and transformers import names of it for image models."""

from enum import StrEnum, auto

from stand_in import stand_in


class InterpolationMode(StrEnum):
    NEAREST = auto()
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = auto()
    BICUBIC = auto()
    BOX = auto()
    HAMMING = auto()
    LANCZOS = auto()


stand_in("torchvision", __version__="0.0.0")

import torchvision.transforms  # noqa: E402

torchvision.transforms.InterpolationMode = InterpolationMode
