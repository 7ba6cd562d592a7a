"""Small ONNX files: a classifier that looks at the mean of each channel, and files that are not what jobs take."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import NodeProto, TensorProto, helper

__all__ = ["classifier", "outside", "unlike"]

Axis = int | str


def classifier(
    figures: int = 2,
    *,
    shape: Sequence[Axis] = ("n", 1, 8, 8),
    bias: float = 0.0,
    softmax: bool = False,
    flat: bool = False,
    domains: Sequence[str] = (),
) -> bytes:
    """Means of the channels, a linear layer, and so many figures an image; ``flat`` gives (n) instead of (n, 1).

    ``domains`` are operator sets that it names and does not use.
    """
    channels = shape[1] if len(shape) > 1 and isinstance(shape[1], int) else 1
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["means"]),
        helper.make_node("Flatten", ["means"], ["features"]),
        helper.make_node("Gemm", ["features", "w", "b"], ["linear"]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["linear"], ["y"], axis=1))
    elif flat:
        nodes.append(helper.make_node("Squeeze", ["linear", "one"], ["y"]))
    else:
        nodes.append(helper.make_node("Identity", ["linear"], ["y"]))
    weights = [
        _tensor("w", (channels, figures), [float(i) for i in range(channels * figures)]),
        _tensor("b", (figures,), [bias] * figures),
        helper.make_tensor("one", TensorProto.INT64, (1,), [1]),
    ]
    return _file(nodes, weights, shape, ("n",) if flat else ("n", figures), domains=domains)


def unlike(
    operator: str = "Identity",
    *,
    domain: str = "",
    shape: Sequence[Axis] = ("n", 1, 8, 8),
    kind: int = TensorProto.FLOAT,
) -> bytes:
    """A file of one operator, whose output is no classifier's."""
    node = helper.make_node(operator, ["x"], ["y"], domain=domain)
    return _file([node], [], shape, None, kind=kind, domains=[domain] if domain else [])


def outside(location: str) -> bytes:
    """A classifier whose weights are said to lie in another file."""
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64, 2], data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value=location)
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    return _file(nodes, [weights], ("n", 1, 8, 8), ("n", 2))


def _tensor(name: str, shape: tuple[int, ...], values: list[float]) -> TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT, shape, values)


def _file(
    nodes: list[NodeProto],
    weights: list[TensorProto],
    takes: Sequence[Axis],
    gives: Sequence[Axis] | None,
    *,
    kind: int = TensorProto.FLOAT,
    domains: Sequence[str] = (),
) -> bytes:
    x, y = helper.make_tensor_value_info("x", kind, takes), helper.make_tensor_value_info("y", kind, gives)
    graph = helper.make_graph(nodes, "classifier", [x], [y], weights)
    sets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=sets, ir_version=9)
    return model.SerializeToString()
