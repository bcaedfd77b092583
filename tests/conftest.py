"""Keeps ONNX Runtime from contacting its vendor, skips GPU tests without a GPU; makes tiny models, servers, a GPU."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the first import of onnxruntime, by whichever test that is

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    allowed = sorted(os.sched_getaffinity(0))  # processes that share cores wait for one another's threads
    os.sched_setaffinity(0, {allowed[int(worker.removeprefix("gw")) % len(allowed)]})

import ctypes
import gc
import hashlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.inputs.preprocess import VisionSpec
from mmemb_deploy.inputs.prompts import PromptFormat

gc.set_threshold(50_000, 20, 50)  # torch makes objects by the million, and among them is little to collect
TINY_PROMPT = PromptFormat("Represent the user's input.", "Find the result.", "")
TINY_TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
}
TINY_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 48,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}


LONG = (
    "test_cli.py",
    "test_nano_bundle.py",
    "test_wheel.py",
)  # few tests of a minute: first, or a core waits for the last


def cuda_works() -> bool:
    """Ask the driver itself: torch may be absent or a CPU build, and ONNX Runtime lists CUDA where there is none."""
    try:
        status: int = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError:
        return False
    return status == 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    there = cuda_works()
    missing = pytest.mark.skip(reason="no NVIDIA GPU with a working driver")
    present = pytest.mark.skip(reason="there is a GPU")
    for item in items:
        if not there and item.get_closest_marker("gpu"):
            item.add_marker(missing)
        if there and item.get_closest_marker("no_gpu"):
            item.add_marker(present)


@pytest.fixture(scope="session")
def captured_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let torch capture equal graphs once, for all tests and processes of a run: it takes most of an export's time."""
    import onnx_ir as ir
    from filelock import FileLock

    from mmemb_export import trace

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if worker else own) / "captured"
    folder.mkdir(exist_ok=True)
    capture = trace.capture

    def once(graph: Any) -> ir.Model:
        file = folder / f"{graph.name}-{digest_of(graph)}.onnx"
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                ir.save(capture(graph), file)
        return ir.load(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "capture", once)
        yield


def digest_of(graph: Any) -> str:
    """Return a hash of all that a capture depends on: modules, configuration, sizes and types."""
    part = graph.part
    configs = {module.config.to_json_string() for module in part.modules() if hasattr(module, "config")}
    tensors = [(name, tuple(each.shape), each.dtype) for name, each in part.state_dict().items()]
    inputs = [(name, tuple(each.shape), each.dtype, axes) for name, (each, axes) in graph.inputs.items()]
    own = {name: value for name, value in vars(part).items() if isinstance(value, int | str | tuple | VisionSpec)}
    return hashlib.sha256(repr((repr(part), sorted(configs), tensors, inputs, own)).encode()).hexdigest()[:16]


MakeCheckpoint = Callable[[Path, dict[str, Any], dict[str, Any]], Path]


@pytest.fixture(scope="session")
def make_checkpoint(captured_once: None) -> MakeCheckpoint:  # noqa: ARG001 - for whoever exports it
    """Write a checkpoint of a random Qwen3-VL; the dicts change TINY_TEXT and TINY_VISION."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from mmemb_deploy.inputs import prompts
    from mmemb_training.checkpoint import new_checkpoint, save_checkpoint
    from mmemb_training.tokenizer import train_tokenizer

    def make(folder: Path, text: dict[str, Any], vision: dict[str, Any]) -> Path:
        tokenizer = train_tokenizer(["a tiny corpus", "Represent the user's input. Find the result."], 300)
        ids = prompts.PromptEncoder(tokenizer, TINY_PROMPT).ids
        text = TINY_TEXT | text | {"vocab_size": tokenizer.get_vocab_size()}
        config = Qwen3VLConfig(
            text_config=text,
            vision_config=TINY_VISION | vision,
            image_token_id=ids[prompts.IMAGE_PAD],
            video_token_id=ids[prompts.VIDEO_PAD],
            vision_start_token_id=ids[prompts.VISION_START],
            vision_end_token_id=ids[prompts.VISION_END],
            tie_word_embeddings=text["tie_word_embeddings"],
        )
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.mul_(4)  # or all inputs look alike
        size = text["hidden_size"]
        checkpoint = new_checkpoint(
            model,
            tokenizer,
            TINY_PROMPT,
            pixels=(256, 256),
            video_pixels=1024,
            dims=(size, size // 2),
            max_rationale_tokens=9,
            provenance={"data": "random"},
        )
        save_checkpoint(checkpoint, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> Path:
    """A random checkpoint with 6 heads over 3, two DeepStack levels and untied embeddings."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", {}, {})


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The bundle of `tiny_checkpoint`. Tests that change it copy it first."""
    from mmemb_export.write import export_bundle

    target = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle(tiny_checkpoint, target, report=lambda _: None)
    return target


@pytest.fixture(scope="session")
def uneven_checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> Path:
    """A checkpoint of one layer with 64 inputs, but for the last of every MLP, which no blocks fill."""
    text = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 112}
    widths = {"hidden_size": 64, "intermediate_size": 72, "out_hidden_size": 64}
    vision = {"depth": 1, "deepstack_visual_indexes": [0], **widths}
    return make_checkpoint(tmp_path_factory.mktemp("uneven") / "checkpoint", text, vision)


@pytest.fixture(scope="session")
def fused_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The tiny checkpoint's bundle in ONNX Runtime's own operators."""
    from mmemb_export.recipe import Recipe
    from mmemb_export.write import export_bundle

    target = tmp_path_factory.mktemp("fused") / "bundle"
    export_bundle(tiny_checkpoint, target, recipe=Recipe(form="fused"), probes=24, report=lambda _: None)
    return target


@pytest.fixture(scope="session")
def tiny_embedder(tiny_bundle: Path) -> Embedder:
    """`tiny_bundle`, loaded."""
    return Embedder.load(tiny_bundle, threads=2)  # so that it has a lane


@pytest.fixture
def mixed_inputs() -> list[Any]:
    """Inputs of every modality and several lengths and grids."""
    rng = np.random.default_rng(0)

    def picture(height: int, width: int) -> Any:
        return rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)

    return [
        "three plus four",
        {"image": picture(20, 20), "text": "what is it?"},
        {"images": [picture(16, 16), picture(12, 40), picture(30, 20)], "text": "a + b x c"},
        "a much longer text, which needs many more tokens than its neighbours in the batch do",
        {"video": [picture(24, 24) for _ in range(5)], "fps": 2.0},
        {"image": picture(40, 12)},
        "one",
    ]


Reply = Callable[[dict[str, Any]], tuple[int, Any]]  # a request's body -> status and body of the answer
HANG_UP = 0  # a status: the connection is closed without an answer


def asked(body: dict[str, Any]) -> str:
    """Return the last text that a request shows."""
    text: str = body["messages"][-1]["content"][-1]["text"]
    return text


def answer(body: dict[str, Any], *messages: dict[str, Any]) -> tuple[int, Any]:
    """Answer with the messages, or with as many as were asked for, each saying what it was asked."""
    said = messages or tuple({"content": f"{place}: {asked(body)}"} for place in range(body.get("n", 1)))
    choices = [
        {"index": place, "finish_reason": "stop", "message": {"role": "assistant", **message}}
        for place, message in enumerate(said)
    ]
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices}


class Together:
    """A reply that lets so many requests go by together: with fewer in flight, none would ever pass."""

    def __init__(self, requests: int, reply: Reply) -> None:
        self._gate = threading.Barrier(requests, timeout=20)
        self._reply, self._lock = reply, threading.Lock()
        self._flying = self.peak = 0

    def __call__(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            self._flying += 1
            self.peak = max(self.peak, self._flying)
        self._gate.wait()
        with self._lock:
            self._flying -= 1
        return self._reply(body)


class Endpoint(ThreadingHTTPServer):
    """Speaks /v1/chat/completions as `reply` says, and remembers what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Reply = answer
        self.answer, self.asked, self.together = answer, asked, Together
        self.received: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), BrokenPipeError):  # a client that did not wait for its answer
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def worker(self, *, samples: int = 2, concurrency: int = 4, key: str | None = None) -> Any:
        from mmemb_training.pool.endpoint import EndpointWorker

        return EndpointWorker(
            "served",
            base_url=self.url,
            model="a-model",
            samples=samples,
            concurrency=concurrency,
            api_key_variable=key,
            max_retries=3,
            max_frames=3,
            timeout=30,
        )


class Handler(BaseHTTPRequestHandler):
    """One request of an Endpoint."""

    def do_POST(self) -> None:
        endpoint = cast("Endpoint", self.server)
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        endpoint.received.append(body)
        endpoint.keys.add(self.headers["Authorization"])
        status, content = endpoint.reply(body)
        if status == HANG_UP:
            return
        page = isinstance(content, str)
        payload = content.encode() if page else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if page else "application/json")
        self.send_header("Retry-After-Ms", "1")  # or the client waits half a second and more
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that http.server gives it
        """Say nothing."""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


FAKE_GPU = Path(__file__).parent / "fake_gpu"  # on PYTHONPATH, it gives every Python process a GPU
PlugIn = Callable[..., AbstractContextManager[Any]]  # TensorRT's version and options of a fake machine to it, meanwhile


@pytest.fixture(scope="session")
def plug_in() -> PlugIn:
    """Give this process a fake GPU and TensorRT for a while; what breaks a rule of theirs fails the test."""
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings: pip install 'mmemb-deploy[rtx]'")
    from mmemb_deploy.backends.tensorrt.api import load_library

    @contextmanager
    def plugged_in(version: str | None = None, **options: Any) -> Generator[Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(FAKE_GPU)
            if version is not None:
                patch.setenv("FAKE_TENSORRT", version)
            import fakegpu
            from fakegpu.machine import Machine

            load_library.cache_clear()
            try:
                with fakegpu.plugged_in(Machine(**options)) as gpu:
                    yield gpu
                    assert gpu.misuses == []
            finally:
                load_library.cache_clear()
                for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
                    del sys.modules[name]

    return plugged_in


@pytest.fixture
def gpu(plug_in: PlugIn) -> Iterator[Any]:
    """A fake GPU, as a `fakegpu.machine.Machine`."""
    with plug_in() as machine:
        yield machine


class Served:
    """`mmemb serve` in a thread, and a client for it."""

    def __init__(self, service: Any, port: int) -> None:
        self.service, self.port = service, port
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(path, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@pytest.fixture(scope="session")
def serve() -> Callable[..., AbstractContextManager[Served]]:
    """Serve the embedded bundle with these settings.

    `service`, `reader`, `traces`, `digest` and `gallery` go to the application.
    """
    from mmemb_deploy.serve.app import create_app
    from mmemb_deploy.serve.server import server_of
    from mmemb_deploy.serve.service import Service
    from mmemb_deploy.serve.settings import settings_of

    embedder = Embedder.load()

    @contextmanager
    def serving(**options: Any) -> Generator[Served]:
        parts = {name: options.pop(name) for name in ("reader", "traces", "digest", "gallery") if name in options}
        service = options.pop("service", None) or Service.in_thread(embedder)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            settings = settings_of(port=port, drain_seconds=5, **options)
            server = server_of(create_app(service, settings, **parts), service, settings)
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            running = Served(service, port)
            try:
                yield running
            finally:
                running.client.close()
                server.should_exit = True
                thread.join()

    return serving
