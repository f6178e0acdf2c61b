"""Find segments with an exported file of contents "result", task panoptic: python predict.py MODEL.onnx IMAGE."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

model, image_file = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
metadata = json.loads(session.get_modelmeta().custom_metadata_map["maskwright"])
height, width = metadata["size"]

image = Image.open(image_file).convert("RGB")
image.thumbnail((width, height))  # only shrinks
images = np.empty((1, 3, height, width), np.float32)
images[:] = np.array(metadata["pixel_mean"])[:, None, None]  # padding
images[0, :, : image.height, : image.width] = np.asarray(image).transpose(2, 0, 1)

segment_map, labels, scores = (output[0] for output in session.run(None, {"images": images}))
for number in range(1, segment_map.max() + 1):  # 0 is no segment
    pixels = np.count_nonzero(segment_map[: image.height, : image.width] == number)
    print(f"{metadata['categories'][labels[number - 1]]['name']} {scores[number - 1]:.2f} {pixels} pixels")
