"""Run segmentation models that maskwright has exported, with NumPy, Pillow, and ONNX Runtime or OpenVINO."""

from maskwright.errors import MaskwrightError as MaskwrightError
from maskwright.inference.exported.predictor import ExportedPredictor as Predictor
from maskwright.results.segmentation import Segmentation as Segmentation

__version__ = "0.1.0"
__all__ = ["MaskwrightError", "Predictor", "Segmentation"]
