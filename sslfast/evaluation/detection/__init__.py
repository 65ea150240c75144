"""Object detection by Faster R-CNN R50-C4 on VOC and COCO-format data.

Imports what ``evaluation`` may, and torchvision.
"""

__all__ = ["data", "evaluate", "model", "scores", "train"]
