"""A model of `densectx export -f onnx` on a picture: python onnx_without_densectx.py MODEL.onnx PICTURE FOLDER."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, picture, folder = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
about = json.loads(session.get_modelmeta().custom_metadata_map["densectx"])
image, channels = ImageOps.exif_transpose(Image.open(picture)), about["image"]["channels"]
if image.mode not in {1: ["L"], 3: ["L", "RGB"]}.get(channels, []):  # 16 bits and transparency would be cut off
    sys.exit(f"{picture}: is of mode {image.mode}; 8-bit L or RGB is expected, and {channels} channels by this model.")
pixels = np.asarray(image.convert("RGB") if channels == 3 else image, np.float32) / 255
feed = {"image": pixels.reshape(1, *pixels.shape[:2], -1).transpose(0, 3, 1, 2)}
given = {name: option["default"] for name, option in about["options"].items()}  # None: must be estimated
feed |= {name: np.array(-1 if value is None else value, np.float32) for name, value in given.items()}
for (key, task), answer in zip(about["tasks"].items(), session.run(list(about["tasks"]), feed), strict=True):
    if task["output"] == "classes" and len(task["palette"]) <= 256:
        drawn = Image.fromarray(answer[0].argmax(0).astype(np.uint8))
        drawn.putpalette(np.array(task["palette"], np.uint8).tobytes())
    elif task["output"] in ("restored", "image") and answer.shape[1] in (1, 3):
        levels = np.uint8(np.rint(answer[0].clip(0, 1) * 255))
        drawn = Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0))
    else:  # probabilities of labels, values in their units
        np.save(f"{folder}/{key}.npy", answer[0])
        continue
    drawn.save(f"{folder}/{key}.png")
