"""Published linear-classification results on ImageNet against the number of parameters (PIRL paper, Figure 2).

Sources: Misra & van der Maaten, CVPR 2020, table 2 and Figure 2 (including their results of other methods); MoCo: He et
al., CVPR 2020, table of the linear protocol. Trunk parameters in millions.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One point: a method's top-1 accuracy in percent with a linear classifier on frozen features."""

    method: str
    parameters: float
    top1: float
    is_pirl: bool = False


PUBLISHED = (
    Published("Colorization", 25.6, 39.6),
    Published("Jigsaw", 25.6, 45.7),
    Published("Rotation", 25.6, 48.9),
    Published("NPID", 25.6, 54.0),
    Published("NPID++", 25.6, 59.0),
    Published("MoCo", 24.0, 60.6),
    Published("CPC", 44.5, 48.7),
    Published("CPC-Huge", 305.0, 61.0),
    Published("PIRL", 25.6, 63.6, is_pirl=True),
    Published("PIRL ensemble", 51.1, 65.7, is_pirl=True),
    Published("PIRL-c2x", 98.0, 67.4, is_pirl=True),
)
