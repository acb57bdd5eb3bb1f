# SPDX-License-Identifier: Apache-2.0
"""Backbones as files for ONNX Runtime and OpenVINO, each proven against the torch model before it appears."""
