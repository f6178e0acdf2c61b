"""The programs of `examples/` run on an exported file, and find what maskwright finds in it."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskwright.inference.predictor import Predictor
from tests.test_export_graph import SIZE
from tests.test_runtime import exported, run_bare

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def write_image(path):
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE[0] - 6, SIZE[1] - 9, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def expected_lines(image):
    """What an example prints: class, score and area of each segment."""
    result = Predictor(exported() / "decided.onnx")(image)
    assert len(result) > 2
    return list(zip(result.names, [f"{score:.2f}" for score in result.scores], result.areas.tolist(), strict=True))


def parse(text):
    lines = [line.rsplit(maxsplit=3) for line in text.splitlines()]
    return [(name, f"{float(score):.2f}", int(area)) for name, score, area, _ in lines]


def test_the_example_in_python_needs_no_maskwright(tmp_path):
    image = write_image(tmp_path / "image.png")
    done = run_bare(EXAMPLES / "predict.py", exported() / "decided.onnx", image)
    assert parse(done.stdout) == expected_lines(image), done.stderr


@pytest.mark.slow
def test_the_example_in_cpp_compiles_and_finds_the_same(tmp_path):
    """`ONNXRUNTIME` names a release of ONNX Runtime for C++: `include/` with its headers, and `lib/`."""
    home = Path(os.environ.get("ONNXRUNTIME", "/usr"))
    headers = [home / "include", home / "include/onnxruntime"]
    if shutil.which("g++") is None or not any((folder / "onnxruntime_cxx_api.h").is_file() for folder in headers):
        pytest.skip("needs g++ and the C++ headers of ONNX Runtime; name their folder in ONNXRUNTIME")
    image = write_image(tmp_path / "image.ppm")
    program = tmp_path / "predict"
    words = ["g++", "-std=c++17", EXAMPLES / "predict.cpp", *(f"-I{folder}" for folder in headers)]
    subprocess.run([*words, f"-L{home / 'lib'}", "-lonnxruntime", "-o", program], check=True)
    found = os.environ | {"LD_LIBRARY_PATH": str(home / "lib")}
    model = exported() / "decided.onnx"
    done = subprocess.run([program, model, image], capture_output=True, text=True, env=found)
    assert parse(done.stdout) == expected_lines(image), done.stderr
    done = subprocess.run([program, model, EXAMPLES / "predict.cpp"], capture_output=True, text=True, env=found)
    assert done.returncode == 1
    assert done.stderr.endswith("predict.cpp: not a binary PPM with 8 bits\n")
