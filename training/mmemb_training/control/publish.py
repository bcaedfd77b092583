"""The policy's weights on the vLLM server that writes its rollouts, brought up to date before every batch of them.

    adapters      a folder per batch, loaded under a name of its own, by which vLLM keeps its prefix cache apart; then
                  the last one is unloaded: POST /v1/load_lora_adapter, /v1/unload_lora_adapter
    all weights   a checkpoint folder per batch, from which the server reloads; then its caches of the old weights are
                  emptied: POST /collective_rpc (reload_weights), /reset_prefix_cache, /reset_encoder_cache

The server reads these folders, so it shares a file system with the run. Both are vLLM's own endpoints (0.32), off
unless it is started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora, or with VLLM_SERVER_DEV_MODE=1: let
nobody else reach it. vLLM can also take weights through NCCL (/update_weights), which needs its workers and ours in one
process group; files need nothing of the kind.
"""

from __future__ import annotations

import shutil
import uuid
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mmemb_deploy.errors import BackendError
from mmemb_deploy.reasoners.chat import ChatClient
from mmemb_training.checkpoint import Checkpoint, save_checkpoint
from mmemb_training.lora import save_lora
from mmemb_training.recipes.settings import LoraSettings, RolloutServer

if TYPE_CHECKING:
    import httpx

PUBLISHED = "published"  # the folder, in the stage's


def client_of(settings: RolloutServer) -> ChatClient:
    """Return the client of a recipe's server. Raises OptionError and MissingExtraError as ChatClient does."""
    return ChatClient(
        settings.base_url,
        model=settings.model,
        api_key_variable=settings.api_key_variable,
        timeout=settings.timeout,
        concurrency=settings.concurrency,
    )


class Publisher:
    """Brings a server up to date. `adapter` is what trains (`lora.trainable`), None where all weights do."""

    def __init__(
        self, checkpoint: Checkpoint, adapter: Any, client: ChatClient, folder: Path, accelerator: Accelerator
    ) -> None:
        self._checkpoint, self._adapter, self._client = checkpoint, adapter, client
        self._folder, self._accelerator = folder / PUBLISHED, accelerator
        self._loaded: str | None = None

    def publish(self) -> str:
        """Return the name under which the server now serves the weights as they are.

        Raises BackendError, in all processes, where it does not take them.
        """
        outcome: list[str | None] = [None, None]
        if self._accelerator.is_main_process:
            try:
                outcome[0] = self._publish()
            except BackendError as error:  # said by all processes, below
                outcome[1] = str(error)
        if self._accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        name, failure = outcome
        if name is None:
            raise BackendError(str(failure))
        return name

    def _publish(self) -> str:
        name = f"{self._client.model}-{uuid.uuid4().hex[:12]}"  # no run before this one has loaded it
        target = self._folder / name
        older = list(self._folder.glob("*"))
        if self._adapter is None:
            save_checkpoint(self._checkpoint, target)
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(target.resolve())}}
            self._post("collective_rpc", call)
            for cache in ("reset_prefix_cache", "reset_encoder_cache"):
                self._post(cache, {})
        else:
            save_lora(self._adapter, target)
            self._post("v1/load_lora_adapter", {"lora_name": name, "lora_path": str(target.resolve())})
            if self._loaded is not None:
                self._post("v1/unload_lora_adapter", {"lora_name": self._loaded})
            self._loaded = name
        for folder in older:
            shutil.rmtree(folder)
        return self._client.model if self._adapter is None else name

    def _post(self, path: str, body: Any) -> None:
        """Call one of the server's own endpoints, beside those of OpenAI's interface, which lie under /v1."""
        url = f"{self._client.base_url.rstrip('/').removesuffix('/v1')}/{path}"
        answer = _call(self._client, "POST", url, json=body)
        if "json" in answer.headers.get("content-type", "") and answer.json().get("success") is False:
            raise BackendError(f"{url} did not succeed: something else uses the server; let nobody else reach it")


def serve_command(checkpoint: Path, model: str, adapters: LoraSettings | None) -> str:
    """Return how to start a server that can be brought up to date."""
    serve = f"vllm serve {checkpoint} --served-model-name {model} --trust-request-mm-kwargs"
    if adapters is None:
        return f"VLLM_SERVER_DEV_MODE=1 {serve}"
    return f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True {serve} --enable-lora --max-lora-rank {adapters.rank}"


def check_served(client: ChatClient) -> None:
    """Raise BackendError unless the server is there and serves the model."""
    url = f"{client.base_url.rstrip('/')}/models"
    names = [str(one.get("id")) for one in _call(client, "GET", url).json().get("data", [])]
    if client.model not in names:
        raise BackendError(f"{url} has no {client.model!r}, but {', '.join(names) or 'nothing'}")


def _call(client: ChatClient, method: str, url: str, **options: Any) -> httpx.Response:
    import httpx

    headers = {"Authorization": f"Bearer {client.key}"}
    try:
        answer = httpx.request(method, url, headers=headers, timeout=client.timeout, **options)
    except httpx.HTTPError as error:
        raise BackendError(f"{url}: {type(error).__name__}: {error}") from error
    if answer.status_code == HTTPStatus.NOT_FOUND:
        raise BackendError(
            f"{url} is not there: start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora for "
            "adapters, with VLLM_SERVER_DEV_MODE=1 for all weights"
        )
    if answer.status_code != HTTPStatus.OK:
        raise BackendError(f"{url} answered {answer.status_code}: {answer.text.strip()[:500]}")
    return answer
