"""Triton's own protobuf reads the configurations, and the Python model answers requests of a fake Triton on the CPU."""

import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmemb_deploy import Embedder
from mmemb_deploy.backends.tensorrt.api import TENSORRT, TENSORRT_RTX
from mmemb_deploy.backends.tensorrt.files import ENGINES, Built, EngineSet, write_set
from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.errors import BackendError, OptionError
from mmemb_engines.profiles import demand_of_limits, profiles
from mmemb_engines.triton import most_rows, write_repository
from mmemb_engines.triton_model import TritonPythonModel

ALONE = (abi.VISION, abi.DIRECT, abi.GATE)  # graphs without a cache; each is a file, and so an engine, by itself


def config(model: Path) -> Any:
    """Return a model's configuration as Triton reads it; an unknown field or value fails."""
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is in the extra dev")
    text_format: Any = import_module("google.protobuf.text_format")
    return text_format.Parse((model / "config.pbtxt").read_text(), messages.ModelConfig())


def as_json(model: Path) -> dict[str, Any]:
    """Return a model's configuration as Triton hands it to the Python model."""
    json_format: Any = import_module("google.protobuf.json_format")
    found: dict[str, Any] = json_format.MessageToDict(config(model), preserving_proto_field_name=True)
    return found


def built(bundle: Bundle, library: str, device: str = "NVIDIA L4") -> EngineSet:
    """Return engines of a few bytes and two profiles at least, for batches of 4, as `mmemb build` would list them."""
    demand = demand_of_limits(bundle.manifest, 4)
    engines = {
        name: Built(
            key="k",
            file=f"{name}.engine",
            sha256="",
            graph="",
            precision="float32",
            profiles=profiles(name, bundle.manifest, demand) * 2,
            options=BuildOptions(),
            decomposed=False,
            seconds=1,
            size=4,
        )
        for name in bundle.manifest.engines
    }
    made = EngineSet(library=library, version="11.4.0", device=device, target="sm89", engines=engines)
    folder = bundle.folder / ENGINES / made.folder
    folder.mkdir(parents=True)
    for name in engines:
        (folder / f"{name}.engine").write_bytes(name.encode())
    write_set(bundle, made)
    return made


@dataclass
class Tensor:
    """As the Python backend's."""

    name: str
    array: NDArray[Any]

    def as_numpy(self) -> NDArray[Any]:
        return self.array


@dataclass
class Request:
    """As the Python backend's: tensors, and parameters in JSON."""

    tensors: dict[str, Tensor]
    given: dict[str, Any] = field(default_factory=dict[str, Any])

    def parameters(self) -> str:
        return json.dumps(self.given)


@dataclass
class Response:
    """As the Python backend's: tensors, or an error."""

    output_tensors: Sequence[Tensor] = ()
    error: Any = None

    def __getitem__(self, name: str) -> NDArray[Any]:
        assert self.error is None, self.error
        return next(tensor.array for tensor in self.output_tensors if tensor.name == name)


@dataclass(frozen=True)
class TritonError:
    """As the Python backend's."""

    message: str
    code: int
    INTERNAL = 1
    INVALID_ARG = 3


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return request.tensors.get(name)


def request(*texts: str | bytes, images: Sequence[bytes] = (), **parameters: Any) -> Request:
    """Return a request with a tensor for texts and one for images, where there are any."""
    columns = {"TEXT": [text.encode() if isinstance(text, str) else text for text in texts], "IMAGE": list(images)}
    tensors = {
        name: Tensor(name, np.array(column, object).reshape(-1, 1)) for name, column in columns.items() if column
    }
    return Request(tensors, parameters)


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def linked(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    """A bundle whose files may get second names."""
    return Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("linked") / "bundle"))


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory, linked: Path) -> Path:
    """A repository of a bundle without engines, for the CPU."""
    folder = tmp_path_factory.mktemp("triton")
    assert write_repository(Bundle.open(linked), [], folder, None) == ["mmemb"]
    return folder


Start = Callable[..., TritonPythonModel]


@pytest.fixture
def start(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start the model as Triton does: model.py is executed, and its class told what and where it is."""
    fake = SimpleNamespace(
        Tensor=Tensor,
        InferenceResponse=Response,
        TritonError=TritonError,
        get_input_tensor_by_name=get_input_tensor_by_name,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)

    def start(**changed: str) -> TritonPythonModel:
        names: dict[str, Any] = {}
        exec((repository / "mmemb" / "1" / "model.py").read_text(), names)
        model: TritonPythonModel = names["TritonPythonModel"]()
        told = {
            "model_config": json.dumps(as_json(repository / "mmemb")),
            "model_repository": str(repository / "mmemb"),
            "model_version": "1",
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
        }
        model.initialize(told | changed)
        return model

    return start


def test_triton_reads_the_configuration_of_the_python_model(repository: Path) -> None:
    found = config(repository / "mmemb")
    assert (found.name, found.backend, found.max_batch_size) == ("mmemb", "python", 32)
    assert [(each.name, list(each.dims), each.optional) for each in found.input] == [
        ("TEXT", [1], True),
        ("IMAGE", [1], True),
    ]
    types = type(found.output[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    assert [(each.name, types[each.data_type].name, list(each.dims)) for each in found.output] == [
        ("EMBEDDING", "TYPE_FP32", [48]),
        ("ROUTE", "TYPE_STRING", [1]),
        ("GATE_SCORE", "TYPE_FP32", [1]),
        ("RATIONALE", "TYPE_STRING", [1]),
    ]
    assert found.HasField("dynamic_batching")
    (group,) = as_json(repository / "mmemb")["instance_group"]
    assert group == {"count": 1, "kind": "KIND_CPU"}
    assert found.parameters["backend"].string_value == "onnxruntime"
    assert {path.name for path in (repository / "mmemb" / "1").iterdir()} == {"model.py", "bundle"}


def test_the_bundle_takes_no_room_twice(repository: Path, linked: Path) -> None:
    copied = repository / "mmemb" / "1" / "bundle" / "decoder.onnx.data"
    assert copied.samefile(linked / "decoder.onnx.data")


def test_engines_without_a_cache_become_models_of_their_own(bundle: Bundle, tmp_path: Path) -> None:
    made = built(bundle, TENSORRT)
    names = write_repository(bundle, [made], tmp_path / "models", 2)
    assert names == ["mmemb", *(f"mmemb_{name}" for name in ALONE)]
    for name in ALONE:
        model, graph = tmp_path / "models" / f"mmemb_{name}", bundle.manifest.graphs[name]
        found = config(model)
        assert (found.name, found.platform, found.max_batch_size) == (f"mmemb_{name}", "tensorrt_plan", 0)
        for tensors, shown in ((graph.inputs, found.input), (graph.outputs, found.output)):
            dims = [[size if isinstance(size, int) else -1 for size in tensor.shape] for tensor in tensors]
            assert [(each.name, list(each.dims)) for each in shown] == [
                (tensor.name, sizes) for tensor, sizes in zip(tensors, dims, strict=True)
            ]
        (group,) = as_json(model)["instance_group"]
        profile = [str(index) for index in range(len(made.engines[name].profiles))]
        assert group == {"count": 1, "kind": "KIND_GPU", "gpus": [2], "profile": profile}
        assert (model / "1" / found.default_model_filename).read_bytes() == name.encode()
    model = config(tmp_path / "models" / "mmemb")
    assert (model.max_batch_size, model.parameters["backend"].string_value) == (4, TENSORRT)
    copied = tmp_path / "models" / "mmemb" / "1" / "bundle" / ENGINES / made.folder
    assert {path.name for path in copied.iterdir()} >= {"engines.json", "gate.engine"}


def test_without_an_engine_for_prompts_alone_batches_are_as_large_as_the_decoder_s(bundle: Bundle) -> None:
    made = built(bundle, TENSORRT)
    less = {name: engine for name, engine in made.engines.items() if name != abi.DIRECT}
    assert most_rows(bundle.manifest, [made.model_copy(update={"engines": less})]) == 4


def test_engines_of_tensorrt_for_rtx_are_for_the_python_model_alone(bundle: Bundle, tmp_path: Path) -> None:
    assert write_repository(bundle, [built(bundle, TENSORRT_RTX)], tmp_path / "models", 0) == ["mmemb"]


def test_what_does_not_go_together_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    first, second = built(bundle, TENSORRT), built(bundle, TENSORRT, "NVIDIA H100")
    with pytest.raises(OptionError, match="for 2 devices"):
        write_repository(bundle, [first, second], tmp_path / "models", 0)
    with pytest.raises(OptionError, match="a GPU's index"):
        write_repository(bundle, [first], tmp_path / "models", None)
    with pytest.raises(OptionError, match="tensorrt and tensorrt-rtx"):
        write_repository(bundle, [first, built(bundle, TENSORRT_RTX)], tmp_path / "models", 0)
    (tmp_path / "models" / "mmemb_gate").mkdir(parents=True)
    with pytest.raises(OptionError, match="mmemb_gate is there already"):
        write_repository(bundle, [first], tmp_path / "models", 0)
    assert not (tmp_path / "models" / "mmemb").exists()


def test_requests_are_answered_as_the_embedder_answers_them(start: Start, tiny_embedder: Embedder) -> None:
    model = start()
    asked = [
        request("three plus four", "one"),
        request(images=[png(9)]),
        request("a photo", "", images=[b"", png(200)], reasoning="always"),
        request("four", document=True),
    ]
    first, second, third, fourth = model.execute(asked)
    expected = tiny_embedder.encode_detailed(["three plus four", "one", {"image": png(9)}])
    answered = np.concatenate([first["EMBEDDING"], second["EMBEDDING"]])
    np.testing.assert_allclose(answered, expected.embeddings, atol=1e-5)
    assert first["EMBEDDING"].dtype == np.float32
    for response, details in ((first, expected.details[:2]), (second, expected.details[2:])):
        for row, detail in enumerate(details):
            assert detail is not None
            assert response["ROUTE"][row, 0] == detail.route.encode()
            assert response["RATIONALE"][row, 0] == (detail.rationale or "").encode()
            np.testing.assert_allclose(response["GATE_SCORE"][row, 0], detail.gate_score, atol=1e-5)
    reasoned = tiny_embedder.encode(["a photo", {"image": png(200)}], reasoning="always")
    np.testing.assert_allclose(third["EMBEDDING"], reasoned, atol=1e-5)
    assert third["ROUTE"].tolist() == [[b"reason"], [b"reason"]]
    np.testing.assert_allclose(fourth["EMBEDDING"], tiny_embedder.encode_document(["four"]), atol=1e-5)
    model.finalize()


def test_requests_of_the_same_options_run_in_one_call(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    model = start()
    calls: list[tuple[int, dict[str, Any]]] = []
    encode = Embedder.encode_detailed

    def counted(embedder: Embedder, inputs: Sequence[Any], **options: Any) -> Any:
        calls.append((len(inputs), options))
        return encode(embedder, inputs, **options)

    monkeypatch.setattr(Embedder, "encode_detailed", counted)
    asked = [
        request("a", reasoning="never"),
        request("b", threshold=0.9),
        request("c", "d", reasoning="never"),
        request("e"),
    ]
    model.execute(asked)
    common = {"errors": "return", "batch_size": 32}
    assert calls == [(3, common | {"reasoning": "never"}), (1, common | {"threshold": 0.9}), (1, common)]


def test_an_error_answers_its_own_request_alone(start: Start) -> None:
    asked = [
        request("one"),
        request("two", "", images=[b"", b"no image"]),
        request(b"\xff"),
        request(),
        request("three", tresholds=0.5),
        request("four", threshold="high"),
        request("five", reasoning="sometimes"),
        request("six", document="yes"),
        request(""),
    ]
    fine, *wrong = start().execute(asked)
    assert fine["EMBEDDING"].shape == (1, 48)
    errors = [response.error for response in wrong]
    assert {error.code for error in errors} == {TritonError.INVALID_ARG}
    parts = [
        "input 1: 'image' is no image",
        "input 0: TEXT is not UTF-8",
        "pass TEXT, IMAGE or both",
        "did you mean 'threshold'",
        "threshold is 'high'",
        "reasoning 'sometimes' is not known",
        "document is 'yes'",
        "there is nothing to embed",
    ]
    for error, part in zip(errors, parts, strict=True):
        assert part in error.message


def test_an_engine_that_fails_is_triton_s_internal_error(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    model = start()

    def fail(*_: Any, **__: Any) -> Any:
        raise BackendError("out of memory")

    monkeypatch.setattr(Embedder, "encode_detailed", fail)
    (response,) = model.execute([request("one")])
    assert response.error == TritonError("out of memory", TritonError.INTERNAL)


def test_the_instance_s_gpu_is_the_embedder_s(start: Start) -> None:
    with pytest.raises(OptionError, match="device is 3"):
        start(model_instance_kind="GPU", model_instance_device_id="3")
