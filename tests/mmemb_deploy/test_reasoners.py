"""Rationales from a server: asked as the bundle's own generator is, followed, and never missing without a word."""

import asyncio
import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmemb_deploy import BackendError, Detail, Embedder, InputError, MissingExtraError, OptionError, RemoteReasoner
from mmemb_deploy.inputs import images
from mmemb_deploy.inputs import parse as parsing
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.prompts import END_THINK, IMAGE_PAD, MARKERS, THINK
from mmemb_deploy.jobs.job import Job
from mmemb_deploy.jobs.run import embed_source
from mmemb_deploy.jobs.source import read_source
from mmemb_deploy.reasoners import remote

MakeEmbedder = Callable[..., Embedder]


@pytest.fixture
def served(tiny_bundle: Path, endpoint: Any) -> MakeEmbedder:
    """Load the tiny bundle with a reasoner of these options. The server says "ab" until told otherwise."""
    endpoint.reply = lambda body: endpoint.answer(body, {"content": "ab"})

    def load(**options: Any) -> Embedder:
        return Embedder.load(tiny_bundle, reasoner=RemoteReasoner(endpoint.url, model="tiny", **options))

    return load


@pytest.fixture
def stills(mixed_inputs: list[Any]) -> list[Any]:
    """Mixed inputs that a chat can carry."""
    return [item for item in mixed_inputs if "video" not in item]


def detailed(embedder: Embedder, inputs: list[Any], **options: Any) -> tuple[Any, list[Detail]]:
    """Embed, and return the vectors and the details, none of which is missing."""
    result = embedder.encode_detailed(inputs, **options)
    return result.embeddings, [detail for detail in result.details if detail is not None]


def pictures(body: dict[str, Any]) -> Iterator[Image.Image]:
    """Yield the images that a request shows."""
    for part in body["messages"][-1]["content"]:
        if part["type"] == "image_url":
            head, _, data = part["image_url"]["url"].partition(",")
            assert head == "data:image/png;base64"
            yield Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"])


def test_an_answer_is_followed_as_the_same_rationale_of_the_caller_is(
    served: MakeEmbedder, tiny_embedder: Embedder, stills: list[Any], endpoint: Any
) -> None:
    vectors, details = detailed(served(), stills, reasoning="always")
    expected, given = detailed(tiny_embedder, stills, rationales=["ab"] * len(stills))
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert {(one.route, one.rationale, one.truncated, one.fallback) for one in details} == {
        ("reason", "ab", False, None)
    }
    assert {one.rationale_source for one in details} == {f"tiny at {endpoint.url}"}
    assert {one.rationale_source for one in given} == {"caller"}


def test_the_server_continues_from_the_very_prompt_of_the_bundle(
    served: MakeEmbedder, tiny_embedder: Embedder, tiny_checkpoint: Path, stills: list[Any], endpoint: Any
) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_checkpoint)
    markers = tiny_embedder.manifest.markers
    encoder = tiny_embedder.encoder
    for instruction in (None, "Find the answer."):
        served(concurrency=1).encode(stills, reasoning="always", instruction=instruction)
        bodies = {json.dumps(body["messages"]): body for body in endpoint.received}.values()
        rendered: list[list[int]] = []
        for body in bodies:
            assert (body["model"], body["temperature"], body["stop"], body["max_tokens"]) == ("tiny", 0, END_THINK, 9)
            rendered.append(
                tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
            )
        expected: list[list[int]] = []
        for item in stills:
            row = encoder.row(parse(item), instruction or "Find the result.")
            ids = row.token_ids_S.tolist()
            seen = row.visual_index_S  # of every run of pads, a chat holds one
            expected.append(
                [token for place, token in enumerate(ids) if not (seen[place] and seen[place - 1])] + [markers[THINK]]
            )
        assert sorted(rendered) == sorted(expected)
        endpoint.received.clear()


def test_the_server_sees_the_caller_s_own_pixels(served: MakeEmbedder, stills: list[Any], endpoint: Any) -> None:
    item = next(item for item in stills if "images" in item)
    served().encode([item], reasoning="always")
    (body,) = endpoint.received
    for sent, given in zip(pictures(body), item["images"], strict=True):
        np.testing.assert_array_equal(np.asarray(sent), given)


@pytest.mark.parametrize(("held", "decoded"), [(remote.HELD_BYTES, 1), (0, 2)])
def test_an_image_is_decoded_once_while_its_pixels_fit_what_is_held(
    served: MakeEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int, decoded: int
) -> None:
    Image.new("RGB", (20, 30), "teal").save(tmp_path / "teal.png")
    opened: list[object] = []
    load = images.load_image

    def counting(value: object, *arguments: Any) -> Image.Image:
        opened.append(value)
        return load(value, *arguments)

    monkeypatch.setattr(parsing, "load_image", counting)
    monkeypatch.setattr(remote, "HELD_BYTES", held)
    item = {"image": str(tmp_path / "teal.png"), "text": "what is it?"}
    served().encode([item], reasoning="always")
    assert len(opened) == decoded
    opened.clear()
    served().encode([item], reasoning="never")
    assert len(opened) == 1


def test_a_server_of_the_checkpoint_writes_what_the_bundle_would_have_written(
    served: MakeEmbedder, tiny_embedder: Embedder, tiny_checkpoint: Path, stills: list[Any], endpoint: Any
) -> None:
    written: list[list[int]] = []
    endpoint.reply = transformers_server(tiny_checkpoint, endpoint, written)
    _, own = detailed(tiny_embedder, stills, reasoning="always")
    served(on_failure="direct").encode(stills, reasoning="always")  # random tokens need be no text
    assert sorted(written) == sorted(list(one.rationale_ids) for one in own)
    assert any(written)


def transformers_server(
    folder: Path, endpoint: Any, written: list[list[int]]
) -> Callable[[dict[str, Any]], tuple[int, Any]]:
    """Answer chats as a server of the checkpoint does: its template, its image processor, its model, greedily.

    `written` receives the token ids of every rationale.
    """
    import torch
    from transformers import AutoTokenizer

    from mmemb_training.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = checkpoint.rows.prompt.ids

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        images = list(pictures(body))
        vision: dict[str, Any] = dict(checkpoint.image_processor(images, return_tensors="pt")) if images else {}
        counts = iter([int(grid.prod()) // 4 for grid in vision["image_grid_thw"]] if images else [])
        expanded = [one for token in prompt for one in [token] * (next(counts) if token == ids[IMAGE_PAD] else 1)]
        tokens = torch.tensor([expanded])
        output = checkpoint.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            **vision,
            mm_token_type_ids=(tokens == ids[IMAGE_PAD]).int(),
            do_sample=False,
            max_new_tokens=body["max_tokens"],
            eos_token_id=list(ids.values()),
            pad_token_id=0,
        )
        words = output[0, len(expanded) :].tolist()
        ended = words[-1] in ids.values()
        written.append(words[:-1] if ended else words)
        status, content = endpoint.answer(body, {"content": tokenizer.decode(written[-1])})
        content["choices"][0]["finish_reason"] = "stop" if ended else "length"
        return status, content

    return reply


def test_only_what_the_gate_sends_to_reasoning_is_asked(
    served: MakeEmbedder, tiny_embedder: Embedder, stills: list[Any], endpoint: Any
) -> None:
    direct, before = detailed(tiny_embedder, stills, reasoning="never")
    threshold = sorted(one.gate_score for one in before)[3]
    vectors, after = detailed(served(), stills, threshold=threshold)
    assert len(endpoint.received) == sum(one.gate_score >= threshold for one in before)
    for place, one in enumerate(after):
        assert one.route == ("reason" if one.gate_score >= threshold else "fast")
        if one.route == "fast":
            np.testing.assert_allclose(vectors[place], direct[place], atol=1e-6)
            assert (one.rationale_source, one.fallback) == (None, None)
    endpoint.received.clear()
    _, ranked = detailed(served(), stills, reasoning_rate=0.5)
    assert len(endpoint.received) == sum(one.route == "reason" for one in ranked) == 3


def test_a_caller_s_rationale_and_a_document_ask_nothing(
    served: MakeEmbedder, stills: list[Any], endpoint: Any
) -> None:
    embedder = served()
    _, (given, asked) = detailed(embedder, stills[:2], rationales=["cd", None], reasoning="always")
    assert (given.rationale, given.rationale_source, asked.rationale) == ("cd", "caller", "ab")
    assert len(endpoint.received) == 1
    embedder.encode_document(stills)
    assert len(endpoint.received) == 1


def test_as_many_rows_are_asked_together_as_allowed_and_no_more(served: MakeEmbedder, endpoint: Any) -> None:
    endpoint.reply = endpoint.together(3, lambda body: endpoint.answer(body, {"content": endpoint.asked(body)}))
    texts = [f"t{place}" for place in range(6)]
    _, details = detailed(served(concurrency=3), texts, reasoning="always")
    assert [one.rationale for one in details] == texts
    assert endpoint.reply.peak == 3


@pytest.mark.parametrize(
    "message",
    [
        {"content": "ab"},
        {"content": "<think>ab</think>and an answer"},
        {"content": "ab</think>"},
        {"content": "and an answer", "reasoning": "ab"},
        {"content": None, "reasoning_content": "ab"},
    ],
)
def test_the_rationale_is_what_was_thought_however_the_server_returns_it(
    served: MakeEmbedder, endpoint: Any, message: dict[str, Any]
) -> None:
    endpoint.reply = lambda body: endpoint.answer(body, message)
    _, (detail,) = detailed(served(), ["a text"], reasoning="always")
    assert detail.rationale == "ab"


def test_an_answer_that_its_length_ended_is_truncated(served: MakeEmbedder, endpoint: Any) -> None:
    def cut(body: dict[str, Any]) -> tuple[int, Any]:
        status, content = endpoint.answer(body, {"content": "ab"})
        content["choices"][0]["finish_reason"] = "length"
        return status, content

    endpoint.reply = cut
    _, (detail,) = detailed(served(), ["a text"], reasoning="always", max_rationale_tokens=4)
    assert (detail.rationale, detail.truncated) == ("ab", True)
    assert endpoint.received[0]["max_tokens"] == 4


def test_an_answer_above_the_limit_is_cut_to_it_and_truncated(served: MakeEmbedder, endpoint: Any) -> None:
    endpoint.reply = lambda body: endpoint.answer(body, {"content": "qz" * 9})
    _, (detail,) = detailed(served(), ["a text"], reasoning="always", max_rationale_tokens=4)
    assert (detail.rationale, detail.truncated) == ("qzqz", True)


def test_a_busy_or_failing_server_is_asked_again(served: MakeEmbedder, endpoint: Any) -> None:
    statuses = iter([429, 503])
    endpoint.reply = lambda body: (
        endpoint.answer(body, {"content": "ab"}) if (status := next(statuses, 200)) == 200 else (status, {"error": {}})
    )
    _, (detail,) = detailed(served(max_retries=2), ["a text"], reasoning="always")
    assert (detail.rationale, len(endpoint.received)) == ("ab", 3)


FAILURES: dict[str, tuple[tuple[int, Any], str]] = {
    "server error": ((500, {"error": {"message": "out of memory"}}), r"InternalServerError: .*out of memory"),
    "busy": ((429, {"error": {"message": "slow down"}}), r"RateLimitError: .*slow down"),
    "refused request": ((400, {"error": {"message": "too long"}}), r"BadRequestError: .*too long"),
    "hangs up": ((0, None), r"APIConnectionError: .*\(.+\)"),
    "page": ((200, "<html>sign in</html>"), r"no chat completion: Invalid JSON"),
    "broken JSON": ((200, '{"choices": [{"mess'), r"no chat completion: Invalid JSON"),
    "other JSON": ((200, {"models": []}), r"no chat completion: choices: Field required"),
    "no message": ((200, {"choices": [{"index": 0}]}), r"no chat completion: choices\.0\.message: Field required"),
    "no choices": ((200, {"choices": []}), r"the answer has no choices"),
    "numbers": ((200, {"choices": [{"message": {"content": 7}}]}), r"choices\.0\.message\.content"),
    "lone surrogate": (
        (200, {"choices": [{"message": {"content": "\ud800"}, "finish_reason": "stop"}]}),
        r"no chat completion: Invalid JSON",
    ),
    "nothing": ((200, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}), r"the answer is empty"),
    "blank": ((200, {"choices": [{"message": {"content": " \n"}, "finish_reason": "stop"}]}), r"the answer is empty"),
    "given up": (
        (200, {"choices": [{"message": {"content": "a"}, "finish_reason": "abort"}]}),
        r"the answer ended by 'abort'",
    ),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_gives_the_direct_embedding_where_that_is_allowed_and_says_why(
    served: MakeEmbedder, tiny_embedder: Embedder, endpoint: Any, kind: str
) -> None:
    reply, reason = FAILURES[kind]
    endpoint.reply = lambda body: reply if endpoint.asked(body) == "bad" else endpoint.answer(body, {"content": "ab"})
    inputs = ["good", "bad", "fine"]
    with pytest.raises(BackendError, match=rf"input 1: no rationale from tiny at http.*{reason}.*on_failure='direct'"):
        served(max_retries=0).encode(inputs, reasoning="always")
    vectors, details = detailed(served(max_retries=0, on_failure="direct"), inputs, reasoning="always")
    np.testing.assert_allclose(vectors[1], tiny_embedder.encode(inputs, reasoning="never")[1], atol=1e-6)
    assert [one.route for one in details] == ["reason", "fast", "reason"]
    assert (details[0].fallback, details[1].rationale, details[1].rationale_source) == (None, None, None)
    assert details[1].fallback is not None
    assert re.search(reason, details[1].fallback)


@pytest.fixture
def hung(served: MakeEmbedder, endpoint: Any) -> Iterator[MakeEmbedder]:
    """Of a server that answers "bad" only when the test is over."""
    over = threading.Event()

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if endpoint.asked(body) == "bad":
            over.wait(20)
        said: tuple[int, Any] = endpoint.answer(body, {"content": "ab"})
        return said

    endpoint.reply = reply
    yield served
    over.set()


def test_a_server_that_does_not_answer_is_given_up(hung: MakeEmbedder) -> None:
    inputs = ["good", "bad"]
    with pytest.raises(BackendError, match=r"input 1: no rationale .*TimeoutError"):
        hung(timeout=0.5, max_retries=0).encode(inputs, reasoning="always")
    _, details = detailed(hung(timeout=0.5, max_retries=99, on_failure="direct"), inputs, reasoning="always")
    assert [one.route for one in details] == ["reason", "fast"]
    assert "TimeoutError" in str(details[1].fallback)


def test_a_server_that_is_not_there_is_named(tiny_bundle: Path, tiny_embedder: Embedder) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        strict, lenient = (
            Embedder.load(tiny_bundle, reasoner=RemoteReasoner(url, model="m", max_retries=0, on_failure=on_failure))
            for on_failure in ("raise", "direct")
        )
        with pytest.raises(BackendError, match=rf"from m at {url}: APIConnectionError"):
            strict.encode(["a text"], reasoning="always")
        vectors, (detail,) = detailed(lenient, ["a text"], reasoning="always")
    np.testing.assert_allclose(vectors, tiny_embedder.encode(["a text"], reasoning="never"), atol=1e-6)
    assert "APIConnectionError" in str(detail.fallback)


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_key_or_model_raises_whatever_is_allowed(served: MakeEmbedder, endpoint: Any, status: int) -> None:
    endpoint.reply = lambda _: (status, {"error": {"message": "refused here"}})
    with pytest.raises(BackendError, match=r"model 'tiny': .*refused here.*Check the address"):
        served(on_failure="direct").encode(["a text"], reasoning="always")
    assert len(endpoint.received) == 1


def test_a_video_is_refused_before_anything_is_asked(
    served: MakeEmbedder, mixed_inputs: list[Any], endpoint: Any
) -> None:
    embedder, place = served(), next(n for n, item in enumerate(mixed_inputs) if "video" in item)
    with pytest.raises(InputError, match=rf"input {place}: 'video' cannot be sent to a reasoner"):
        embedder.encode(mixed_inputs, reasoning="always")
    assert endpoint.received == []
    result = embedder.encode_detailed(mixed_inputs, reasoning="always", errors="return")
    assert [error.index for error in result.errors] == [place]
    assert len(endpoint.received) == len(mixed_inputs) - 1
    video = [mixed_inputs[place]]
    assert detailed(embedder, video, reasoning="never")[1][0].route == "fast"
    assert detailed(embedder, video, rationales=["cd"])[1][0].route == "reason"


@pytest.mark.parametrize("marker", MARKERS)
def test_words_that_a_server_would_read_as_a_marker_are_refused(served: MakeEmbedder, marker: str) -> None:
    with pytest.raises(InputError, match=rf"input 0: 'text' spells {re.escape(marker)}"):
        served().encode([f"a text with {marker} in it"])
    with pytest.raises(InputError, match=rf"the instruction spells {re.escape(marker)}"):
        served().encode(["a text"], instruction=f"Find {marker}")
    served().encode([f"a text with {marker} in it"], reasoning="never")


def test_a_reasoner_works_from_inside_an_event_loop(served: MakeEmbedder) -> None:
    embedder = served()

    async def notebook() -> list[Detail]:
        return detailed(embedder, ["a text"], reasoning="always")[1]

    assert [one.rationale for one in asyncio.run(notebook())] == ["ab"]


def test_the_key_comes_from_the_environment(
    served: MakeEmbedder, endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_REASONER_KEY", "abc")
    served(api_key_variable="MY_REASONER_KEY").encode(["a text"], reasoning="always")
    assert endpoint.keys == {"Bearer abc"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, r"base_url is 'localhost:8000': pass an address such as"),
        ({"base_url": "http://host:port/v1"}, r"base_url is 'http://host:port/v1': pass an address such as"),
        ({"base_url": "http://[host/v1"}, r"base_url is .*: pass an address such as"),
        ({"base_url": "http://me:secret@host/v1"}, r"put the key into an environment variable"),
        ({"timeout": 0.0}, r"timeout is 0\.0: pass seconds"),
        ({"timeout": float("inf")}, r"timeout is inf: pass seconds"),
        ({"max_retries": -1}, r"max_retries is -1: it must be at least 0"),
        ({"concurrency": 0}, r"concurrency is 0: it must be at least 1"),
        ({"api_key_variable": "NO_SUCH_KEY"}, r"NO_SUCH_KEY is not set"),
        ({"on_failure": "ignore"}, r"on_failure 'ignore' is not known: choose from raise, direct"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"base_url": "http://host/v1", "model": "m"} | options
    with pytest.raises(OptionError, match=message) as raised:
        RemoteReasoner(**given)
    assert "secret" not in str(raised.value)


def test_a_limit_of_no_tokens_is_refused(served: MakeEmbedder) -> None:
    with pytest.raises(OptionError, match="a reasoner writes at least 1; pass reasoning='never'"):
        served().encode(["a text"], max_rationale_tokens=0)


def test_without_openai_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"'openai'.*mmemb-deploy\[remote\]"):
        RemoteReasoner("http://host/v1", model="m")


def test_a_written_file_says_where_rationales_came_from_and_which_rows_fell_back(
    served: MakeEmbedder, endpoint: Any, tmp_path: Path
) -> None:
    endpoint.reply = lambda body: (
        (500, {"error": {}}) if endpoint.asked(body) == "bad" else endpoint.answer(body, {"content": "ab"})
    )
    (tmp_path / "inputs.jsonl").write_text('"good"\n"bad"\n')
    source, output = read_source(tmp_path / "inputs.jsonl"), tmp_path / "out.npz"
    embedder = served(max_retries=0, on_failure="direct")
    job = Job(source, output, {"reasoning": "always"}, document=False, keep_going=False)
    summary = embed_source(embedder, job, lambda _: None)
    assert (summary.rows, summary.reasoned, summary.fallbacks) == (2, 1, 1)
    written = np.load(output)
    assert written["rationale_source"].tolist() == [f"tiny at {endpoint.url}", ""]
    assert written["fallback"][0] == ""
    assert written["fallback"][1].startswith("InternalServerError")


def test_embed_takes_a_reasoner_on_the_command_line(tiny_bundle: Path, endpoint: Any, tmp_path: Path) -> None:
    endpoint.reply = lambda body: endpoint.answer(body, {"content": "ab"})
    (tmp_path / "inputs.jsonl").write_text('"one"\n"two"\n')

    def embed(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mmemb_deploy", "embed", "inputs.jsonl", "out.npz", "--json"]
        command += ["--bundle", str(tiny_bundle), "--reasoning", "always", *options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)

    lone = embed("--reasoner", endpoint.url)
    assert (lone.returncode, "--reasoner-model" in lone.stderr) == (2, True)
    done = embed("--reasoner", endpoint.url, "--reasoner-model", "tiny", "--on-failure", "direct")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["reasoning_rate"], summary["fallbacks"]) == (1.0, 0)
    assert np.load(tmp_path / "out.npz")["rationale"].tolist() == ["ab", "ab"]
