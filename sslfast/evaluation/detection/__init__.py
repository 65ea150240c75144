"""Object detection by Faster R-CNN R50-C4 on Pascal VOC and COCO-format data.

Imports what ``evaluation`` may, the other modules of ``evaluation``, and torchvision.
"""

from sslfast.evaluation.detection.evaluate import DetectionConfig, evaluate_detection

__all__ = ["DetectionConfig", "evaluate_detection"]
