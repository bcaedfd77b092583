"""Linear layers in fewer bits: integers that every CPU multiplies exactly, and how much of a weight they keep."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mmemb_deploy.inputs.preprocess import Floats
from mmemb_export.quantise import int4, int8, paired_int8

NANO = [(128, 384), (384, 128), (96, 288), (128, 494)]
REAL = [(1024, 3072), (6144, 96), (1153, 520), (1, 3)]  # of 0.2B and 2B, and odd numbers of input channels


def weights(shape: tuple[int, int]) -> dict[str, Floats]:
    """Weights (K, N) of several distributions; with all of one size, every pair is as large as it may be."""
    rng = np.random.default_rng(0)
    found = {
        "normal": rng.normal(size=shape),
        "heavy-tailed": rng.standard_t(3, size=shape),
        "all of one sign": np.abs(rng.normal(size=shape)),
        "all of one size": np.where(np.arange(shape[1]) % 2, 1.0, -1.0) * np.ones(shape),
        "all zero": np.zeros(shape),
    }
    return {name: weight.astype(np.float32) for name, weight in found.items()}


def activations(values_KN: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Rows (8, K) of uint8: the ends of the range, mixtures of them, and what makes the pairs of a channel largest."""
    rng = np.random.default_rng(1)
    inputs = len(values_KN)
    busiest_K = values_KN[:, np.abs(values_KN.astype(int)).sum(axis=0).argmax()]
    rows = [
        np.full(inputs, 255),
        np.full(inputs, 1),
        np.where(np.arange(inputs) % 2, 255, 1),
        np.where(np.arange(inputs) // 2 % 2, 255, 1),
        np.where(busiest_K > 0, 255, 1),
        np.where(busiest_K < 0, 255, 1),
        rng.choice([1, 255], size=inputs),
        rng.integers(1, 256, size=inputs),
    ]
    return np.stack(rows).astype(np.uint8)


def integer_product(values_KN: NDArray[np.int8]) -> onnxruntime.InferenceSession:
    """Return ONNX Runtime's own product of uint8, 128 standing for 0, and these weights, before any scale."""
    inputs, outputs = values_KN.shape
    held = [
        helper.make_tensor("values", TensorProto.INT8, values_KN.shape, values_KN.tobytes(), raw=True),
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("scales", TensorProto.FLOAT, [outputs], np.ones(outputs, np.float32)),
        helper.make_tensor("middle", TensorProto.UINT8, [], [128]),
    ]
    names = ["states", "values", "one", "scales", "middle"]
    graph = helper.make_graph(
        [helper.make_node("MatMulIntegerToFloat", names, ["product"], domain="com.microsoft")],
        "product",
        [helper.make_tensor_value_info("states", TensorProto.UINT8, ["rows", inputs])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, ["rows", outputs])],
        held,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, states_RK: NDArray[np.uint8]) -> Any:
    return session.run(None, {"states": states_RK})[0]


@pytest.mark.parametrize("shape", NANO + REAL)
def test_int8_products_are_exact_on_every_cpu_whatever_the_activations(shape: tuple[int, int]) -> None:
    for name, weight_KN in weights(shape).items():
        values_KN, _ = paired_int8(weight_KN)
        session, states_RK = integer_product(values_KN), activations(values_KN)
        # float64 holds these sums exactly, and float32 is what the operator makes of its own
        exact_RN = ((states_RK.astype(np.float64) - 128) @ values_KN.astype(np.float64)).astype(np.float32)
        for row in range(len(states_RK)):
            np.testing.assert_array_equal(run(session, states_RK[row : row + 1]), exact_RN[row : row + 1], name)
        np.testing.assert_array_equal(run(session, states_RK), exact_RN, name)
        np.testing.assert_array_equal(run(session, np.tile(states_RK, (32, 1))), np.tile(exact_RN, (32, 1)), name)


@pytest.mark.parametrize("shape", NANO + REAL)
def test_two_neighbouring_int8_weights_never_exceed_16_bits_together(shape: tuple[int, int]) -> None:
    for name, weight_KN in weights(shape).items():
        values_KN = paired_int8(weight_KN)[0].astype(int)
        paired = values_KN[: len(values_KN) // 2 * 2].reshape(-1, 2, shape[1]).sum(axis=1)
        assert np.abs(values_KN).max() <= 127, name
        assert np.abs(paired).max(initial=0) * 255 <= np.iinfo(np.int16).max, name


@pytest.mark.parametrize(("name", "more"), [("normal", 1.35), ("heavy-tailed", 1.05), ("all of one size", 1.0)])
def test_int8_in_pairs_loses_little_more_than_int8_that_overflows(name: str, more: float) -> None:
    weight_KN = weights((1024, 512))[name]

    def error(values_KN: NDArray[np.int8], scale_N: Floats) -> float:
        return float(np.linalg.norm(values_KN * scale_N - weight_KN))

    assert error(*paired_int8(weight_KN)) <= more * error(*int8(weight_KN)) + 1e-3


def test_int8_of_rows_is_off_by_half_a_step_at_most() -> None:
    weight_KN = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    values_KN, scale_N = int8(weight_KN)
    assert np.abs(values_KN * scale_N - weight_KN).max() <= scale_N.max() / 2 + 1e-6
    assert np.abs(values_KN).max(axis=0).tolist() == [127] * 10


def test_int4_is_off_by_half_a_step_at_most_but_for_the_far_end() -> None:
    weight_KN = np.random.default_rng(0).normal(size=(70, 10)).astype(np.float32)
    packed_NGS, scale_NG = int4(weight_KN)
    values_NGS = np.stack([packed_NGS & 15, packed_NGS >> 4], axis=-1).reshape(10, 3, 32).astype(np.float32) - 8
    coarse_KN = (values_NGS * scale_NG.reshape(10, 3, 1)).reshape(10, -1)[:, :70].T
    steps_KN = np.repeat(np.abs(scale_NG).reshape(10, 3), 32, axis=1)[:, :70].T
    assert (np.abs(coarse_KN - weight_KN) <= steps_KN * 1.01).all()
    assert np.mean(np.abs(coarse_KN - weight_KN) <= steps_KN * 0.501) > 0.97
