# SPDX-License-Identifier: Apache-2.0
"""A small writer of ONNX graphs: nodes by operator name, constants as numpy arrays, large ones in a file beside."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opendino.export.extras import require

OPSET = 17
"""The first opset with LayerNormalization; every runtime of the last years reads it."""
EXTERNAL_FROM_BYTES = 1_900_000_000
"""A protobuf file ends at 2 GiB; from here on the numbers go into a second file."""
INLINE_BELOW_BYTES = 4096
"""Small constants stay in the graph even then: shapes are needed while it is read."""

Array = npt.NDArray[Any]


class GraphBuilder:
    """Collects nodes and constants of one graph.

    Names of the values are handed out here; a method that adds a node gives the name of its first result.
    """

    def __init__(self) -> None:
        self.onnx = require("onnx", "Exporting to ONNX")
        self.nodes: list[Any] = []
        self.constants: dict[str, Array] = {}
        self._scalars: dict[float, str] = {}
        self._count = 0

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node and give the name of its result; `to` of a Cast is a numpy type name."""
        return self.ops(kind, *inputs, results=1, name=name, **attributes)[0]

    def ops(self, kind: str, *inputs: str, results: int, name: str | None = None, **attributes: Any) -> list[str]:
        """Add a node with several results and give their names."""
        if kind == "Cast":
            attributes["to"] = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(attributes["to"]))
        self._count += 1
        label = name or f"{kind}_{self._count}"
        outputs = [label] if results == 1 else [f"{label}.{i}" for i in range(results)]
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), outputs, name=label, **attributes))
        return outputs

    def const(self, value: Array, name: str | None = None) -> str:
        """Add a constant and give its name."""
        self._count += 1
        label = name or f"const_{self._count}"
        assert label not in self.constants, label
        self.constants[label] = np.asarray(value, order="C")  # ascontiguousarray would make scalars arrays
        return label

    def f32(self, value: float) -> str:
        """Give a float32 scalar, one for each value."""
        if value not in self._scalars:
            self._scalars[value] = self.const(np.array(value, np.float32))
        return self._scalars[value]

    def same(self, scalar: str, value: int) -> str:
        """Give 1.0 where an int64 scalar has this value, else 0.0."""
        return self.op("Cast", self.op("Equal", scalar, self.const(np.array(value))), to="float32")

    def nbytes(self) -> int:
        """Size of the constants, bytes."""
        return sum(a.nbytes for a in self.constants.values())

    def content_sha256(self) -> str:
        """Give the sha256 over the names, types, shapes and bytes of the constants."""
        return content_sha256(self.constants)

    def save(
        self, path: Path, inputs: Sequence[Any], outputs: Sequence[Any], metadata: Mapping[str, str],
        external_from: int = EXTERNAL_FROM_BYTES,
    ) -> None:  # fmt: skip
        """Write the graph; constants go to PATH.data when they take `external_from` bytes or more."""
        helper = self.onnx.helper
        beside = path.with_name(path.name + ".data") if self.nbytes() >= external_from else None
        tensors = self._tensors(beside)
        graph = helper.make_graph(self.nodes, "opendino", list(inputs), list(outputs), tensors)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="opendino", ir_version=8,
            producer_version=metadata["opendino.version"].strip('"'),
        )  # fmt: skip
        helper.set_model_props(model, dict(metadata))
        path.write_bytes(model.SerializeToString())

    def _tensors(self, beside: Path | None) -> list[Any]:
        if beside is None:
            return [self.onnx.numpy_helper.from_array(a, n) for n, a in self.constants.items()]
        tensors = []
        with beside.open("wb") as file:
            for name, array in self.constants.items():
                if array.nbytes < INLINE_BELOW_BYTES:
                    tensors.append(self.onnx.numpy_helper.from_array(array, name))
                    continue
                file.write(b"\0" * (-file.tell() % 4096))  # aligned, so that a runtime may map it
                tensors.append(self._external(name, array, beside.name, file.tell()))
                file.write(array.data)
        return tensors

    def _external(self, name: str, array: Array, location: str, offset: int) -> Any:
        tensor = self.onnx.TensorProto(name=name, dims=array.shape)
        tensor.data_type = self.onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor.data_location = self.onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def content_sha256(constants: Mapping[str, Array]) -> str:
    """Give the sha256 over the names, types, shapes and bytes of arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name, array in sorted(constants.items()):
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
