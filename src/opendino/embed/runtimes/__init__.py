# SPDX-License-Identifier: Apache-2.0
"""Ways to compute vectors of images: PyTorch, and exported files in ONNX Runtime or OpenVINO."""
