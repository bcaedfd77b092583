"""The rationale pool: workers are shown questions alone, and nothing that was written is lost or written twice."""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mmemb_deploy import BackendError, OptionError
from mmemb_deploy.inputs.prompts import IMAGE_PAD, VISION_END, VISION_START
from mmemb_training.pool.build import FAILURES, build_pool, print_report, read_pool
from mmemb_training.pool.endpoint import shown_parts
from mmemb_training.pool.workers import REQUEST, Worker, Written
from mmemb_training.processes import Processes
from mmemb_training.samples import Question


def ask(count: int) -> list[Question]:
    return [Question(key=f"q{index}", task=f"task{index % 2}", content=f"question {index}") for index in range(count)]


def test_processes_that_share_a_pool_ask_each_question_once_and_go_on_as_another_number(tmp_path: Path) -> None:
    asked: list[tuple[int, str]] = []

    class Echo:
        name, samples = "echo", 1

        def __init__(self, process: int) -> None:
            self._process = process

        def write(self, questions: Sequence[Question]) -> list[Written]:
            asked.extend((self._process, question.key) for question in questions)
            failed = "q5"
            return [Written((), "no") if one.key == failed else Written((one.key,)) for one in questions]

    barrier: Any = threading.Barrier(2, timeout=60)

    def work(index: int) -> Any:
        processes = Processes(index, 2, barrier.wait)
        return build_pool(ask(7), [Echo(index)], tmp_path, batch=2, processes=processes)

    with ThreadPoolExecutor(2) as threads:
        reports = list(threads.map(work, range(2)))
    assert sorted(asked) == [(index % 2, f"q{index}") for index in (0, 2, 4, 6, 1, 3, 5)]
    assert [(one["echo"]["questions"], one["echo"]["failed"]) for one in reports] == [(6, 1)] * 2
    asked.clear()
    build_pool(ask(7), [Echo(0)], tmp_path)
    assert asked == [(0, "q5")]
    assert sorted(read_pool(tmp_path)) == [f"q{index}" for index in (0, 1, 2, 3, 4, 6)]


def test_an_endpoint_is_shown_the_instruction_the_images_and_the_text(endpoint: Any) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    question = Question(key="q", task="t", content={"image": picture, "text": "what?"}, instruction="Find it.")
    assert endpoint.worker().write([question]) == [Written(("0: what?", "1: what?"), None)]
    (body,) = endpoint.received
    system, user = body["messages"]
    assert system == {"role": "system", "content": REQUEST}
    instruction, image, text = user["content"]
    assert (instruction["text"], text["text"]) == ("Find it.", "what?")
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"]) as decoded:
        np.testing.assert_array_equal(np.asarray(decoded), picture)
    assert (body["model"], body["n"]) == ("a-model", 2)


def test_a_long_video_is_shown_from_its_first_frame_to_its_last_with_their_times() -> None:
    frames = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 6, 6, 3), np.uint8)
    question = Question(key="q", task="t", content={"video": frames, "fps": 2.0})
    times = ["<0.0 seconds>", "<2.0 seconds>", "<4.0 seconds>"]
    parts = shown_parts(question, 3)
    assert parts[::2] == times
    assert [np.asarray(frame)[0, 0, 0] for frame in parts[1::2]] == [0, 4, 8]
    assert shown_parts(question, 1)[0] == times[0]
    assert len(shown_parts(question, 99)) == 18


@pytest.mark.parametrize(
    "message",
    [
        {"content": "so: 7", "reasoning": "3 + 4"},
        {"content": "so: 7", "reasoning_content": "3 + 4"},
        {"content": "<think>\n3 + 4\n</think>\n\nso: 7"},
        {"content": "3 + 4\n</think>\n\nso: 7"},  # the prompt itself ended in <think>
    ],
)
def test_reasoning_and_conclusion_are_one_rationale_whatever_the_server_parses(
    endpoint: Any, message: dict[str, Any]
) -> None:
    endpoint.reply = lambda body: endpoint.answer(body, message, {"content": None})
    assert endpoint.worker().write(ask(1)) == [Written(("3 + 4\nso: 7", ""), None)]


def test_as_many_requests_are_in_flight_as_allowed_and_no_more(endpoint: Any) -> None:
    endpoint.reply = endpoint.together(3, endpoint.answer)
    written = endpoint.worker(concurrency=3).write(ask(12))
    assert [one.rationales[0] for one in written] == [f"0: question {index}" for index in range(12)]
    assert endpoint.reply.peak == 3


def test_a_busy_or_failing_server_is_asked_again(endpoint: Any) -> None:
    statuses = iter([429, 500, 503])
    endpoint.reply = lambda body: (
        endpoint.answer(body) if (status := next(statuses, 200)) == 200 else (status, {"error": {}})
    )
    assert endpoint.worker(concurrency=1).write(ask(1))[0].error is None
    assert len(endpoint.received) == 4


@pytest.mark.parametrize(("status", "error"), [(401, "AuthenticationError"), (404, "NotFoundError")])
def test_a_refused_key_or_model_ends_the_job_at_once(endpoint: Any, status: int, error: str) -> None:
    endpoint.reply = lambda _: (status, {"error": {"message": "refused here"}})
    with pytest.raises(BackendError, match=r"model 'a-model': .*refused here.*Check the address") as raised:
        endpoint.worker(concurrency=1).write(ask(5))
    assert type(raised.value.__cause__).__name__ == error
    assert len(endpoint.received) == 1


def test_an_answer_without_its_samples_is_an_error_of_its_question(endpoint: Any) -> None:
    answers: dict[str, Any] = {
        "question 0": lambda body: endpoint.answer(body, {"content": "only one"}),
        "question 1": lambda _: (200, "<html>sign in</html>"),
        "question 2": endpoint.answer,
    }
    endpoint.reply = lambda body: answers[endpoint.asked(body)](body)
    first, second, third = endpoint.worker().write(ask(3))
    assert (first.rationales, second.rationales, len(third.rationales)) == ((), (), 2)
    assert "1 of 2 samples" in str(first.error)
    assert "no chat completion: Invalid JSON" in str(second.error)


def test_an_answer_that_was_cut_is_no_rationale(endpoint: Any) -> None:
    def cut(body: dict[str, Any]) -> Any:
        status, content = endpoint.answer(body)
        for choice in content["choices"][1 if endpoint.asked(body) == "question 0" else 0 :]:
            choice["finish_reason"] = "length"
        return status, content

    endpoint.reply = cut
    first, second = endpoint.worker().write(ask(2))
    assert (first.rationales, first.error) == (("0: question 0",), None)
    assert second.rationales == ()
    assert "each of 2 answers was cut after 1024 tokens: allow more" in str(second.error)


def test_the_key_comes_from_the_environment(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="MY_POOL_KEY is not set"):
        endpoint.worker(key="MY_POOL_KEY")
    monkeypatch.setenv("MY_POOL_KEY", "abc")
    endpoint.worker(key="MY_POOL_KEY").write(ask(1))
    assert endpoint.keys == {"Bearer abc"}


def test_what_fails_is_reported_and_asked_again_by_the_next_run(endpoint: Any, tmp_path: Path) -> None:
    questions = [*ask(5), Question(key="gone", task="task0", content={"image": "nowhere.png"})]
    endpoint.reply = lambda body: (
        (400, {"error": {"message": "no"}}) if "3" in endpoint.asked(body) else endpoint.answer(body)
    )
    report = build_pool(questions, [endpoint.worker()], tmp_path, batch=2)["served"]
    assert (report["questions"], report["failed"], report["missing"], report["candidates"]) == (4, 2, 0, 8)
    failures = [json.loads(line) for line in (tmp_path / FAILURES).read_text().splitlines()]
    assert [(failure["question"], failure["error"].split(":")[0]) for failure in failures] == [
        ("q3", "BadRequestError"),
        ("gone", "InputError"),
    ]
    endpoint.reply, endpoint.received = endpoint.answer, []
    report = build_pool(questions, [endpoint.worker()], tmp_path, batch=2)["served"]
    assert [endpoint.asked(body) for body in endpoint.received] == ["question 3"]
    assert (report["questions"], report["failed"]) == (5, 1)
    assert [one.text for one in read_pool(tmp_path)["q3"]] == ["0: question 3", "1: question 3"]


class Echo:
    """Repeats its question; remembers what it was asked; `stop` runs before a question."""

    def __init__(self, name: str, samples: int, stop: Callable[[Question], None] = lambda _: None) -> None:
        self.name = name
        self.samples = samples
        self.seen: list[str] = []
        self._stop = stop

    def write(self, questions: Sequence[Question]) -> list[Written]:
        written: list[Written] = []
        for question in questions:
            self._stop(question)
            self.seen.append(question.key)
            written.append(Written(tuple(f"{self.name} {index} {question.content}" for index in range(self.samples))))
        return written


def echoes(stop: Callable[[Question], None] = lambda _: None) -> list[Worker]:
    return [Echo("one", 2), Echo("two", 1, stop)]


def test_a_killed_job_goes_on_without_loss_or_duplicate(tmp_path: Path) -> None:
    folder, paths = tmp_path / "killed", os.pathsep.join(sys.path)
    command = [sys.executable, __file__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "at q6\n"
        with pytest.raises(OptionError, match="in use by another process"):
            build_pool(ask(11), echoes(), folder, batch=2)
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    (folder / ".part-00009.parquet.new").write_bytes(b"PAR1 and then the kill")
    assert {key: len(found) for key, found in read_pool(folder).items()} == {f"q{n}": 3 - (n > 5) for n in range(11)}
    one, two = Echo("one", 2), Echo("two", 1)
    build_pool(ask(11), [one, two], folder, batch=2)
    assert (one.seen, two.seen) == ([], ["q6", "q7", "q8", "q9", "q10"])
    build_pool(ask(11), echoes(), tmp_path / "whole", batch=4)
    assert read_pool(folder) == read_pool(tmp_path / "whole")


def test_what_a_worker_raises_passes_through_and_what_was_written_stays(tmp_path: Path) -> None:
    def stop(question: Question) -> None:
        if question.key == "q3":
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        build_pool(ask(5), echoes(stop), tmp_path, batch=2)
    assert {key: len(found) for key, found in read_pool(tmp_path).items()} == {
        "q0": 3,
        "q1": 3,
        "q2": 2,
        "q3": 2,
        "q4": 2,
    }


def test_a_pool_of_other_workers_samples_or_questions_is_refused(tmp_path: Path) -> None:
    build_pool(ask(3), echoes(), tmp_path, batch=2)
    before = read_pool(tmp_path)
    others: list[tuple[list[Question], list[Worker], str]] = [
        (ask(3), [Echo("one", 2)], "workers"),
        (ask(3), [Echo("one", 3), Echo("two", 1)], "workers"),
        (ask(4), echoes(), "questions"),
    ]
    for questions, workers, differing in others:
        with pytest.raises(OptionError, match=f"the work of another job, with another {differing}: "):
            build_pool(questions, workers, tmp_path, batch=2)
    assert read_pool(tmp_path) == before


def test_names_that_would_mix_candidates_up_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="several questions have the key 'q0'"):
        build_pool(ask(1) * 2, echoes(), tmp_path)
    with pytest.raises(OptionError, match="several workers have the name 'one'"):
        build_pool(ask(1), [Echo("one", 1), Echo("one", 2)], tmp_path)
    assert read_pool(tmp_path) == {}


def test_the_report_is_a_table_of_workers(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    report = build_pool(ask(3), echoes(), tmp_path)
    assert report["one"]["mean_characters"] == len("one 0 question 0")
    with console.capture() as shown:
        print_report(console, report)
    assert "task0 4, task1 2" in shown.get()


def test_a_part_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    build_pool(ask(3), echoes(), tmp_path, batch=4)
    part = tmp_path / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(OptionError, match=r"part-00001\.parquet cannot be read"):
        read_pool(tmp_path)


@pytest.fixture(scope="module")
def chat_model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random Qwen3-VL with a chat template, that writes letters, and none twice: else all look alike."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_checkpoint, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
        + "{% if part.type == 'image' %}"
        + f"{VISION_START}{IMAGE_PAD}{VISION_END}"
        + "{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}assistant: "
    )
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    mute = [token for token in range(len(tokenizer)) if not tokenizer.decode([token]).strip().isalpha()]
    settings |= {"suppress_tokens": mute, "no_repeat_ngram_size": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def local(source: Path, *, batch: int = 8, seed: int = 0, temperature: float = 1.0) -> Worker:
    from mmemb_training.pool.local import TransformersWorker  # brings torch, which the job that is killed does not need

    return TransformersWorker("local", source, samples=2, max_tokens=6, batch=batch, seed=seed, temperature=temperature)


def test_a_local_model_reads_text_images_and_video_alone_as_in_a_batch(
    chat_model: Path, mixed_inputs: list[Any]
) -> None:
    questions = [Question(key=str(index), task="t", content=content) for index, content in enumerate(mixed_inputs)]
    whole, alone = (local(chat_model, batch=batch, temperature=1e-4).write(questions) for batch in (8, 1))
    assert whole == alone  # at this temperature there is one likeliest text
    assert [len(one.rationales) for one in whole] == [2] * len(questions)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), np.uint8)
    shown = [Question(key="q", task="t", content={"image": picture, "text": "what is it?"}) for picture in pictures]
    one, other = local(chat_model, temperature=1e-4).write(shown)
    assert one != other


def test_a_local_model_is_told_which_tokens_are_of_images(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3VLForConditionalGeneration

    model_class: Any = Qwen3VLForConditionalGeneration
    given: dict[str, Any] = {}
    generate = model_class.generate

    def listening(model: Any, **inputs: Any) -> Any:
        given.update(inputs)
        return generate(model, **inputs)

    monkeypatch.setattr(model_class, "generate", listening)
    content = {"images": [np.zeros((16, 16, 3), np.uint8), np.zeros((12, 40, 3), np.uint8)]}
    worker = local(chat_model)
    worker.write([Question(key="q", task="t", content=content), *ask(1)])
    merged = given["image_grid_thw"].prod(dim=1) // 4  # a token per 2 x 2 patches
    of_images = given["mm_token_type_ids"].bool()
    assert of_images.sum(dim=1).tolist() == [int(merged.sum()), 0]
    assert len(given["input_ids"][of_images].unique()) == 1


def test_a_local_model_samples_by_its_seed_and_leaves_the_global_one(chat_model: Path) -> None:
    import torch

    state = torch.random.get_rng_state()
    first, again, other = (local(chat_model, seed=seed).write(ask(3)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(set(first[0].rationales)) == 2
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_a_local_model_cannot_be_shown_fails_alone(chat_model: Path) -> None:
    contents: list[Any] = ["fine", {"image": "nowhere.png"}, f"a text with {IMAGE_PAD}"]
    fine, gone, spelt = local(chat_model).write([Question(key=str(c), task="t", content=c) for c in contents])
    assert len(fine.rationales) == 2
    assert "no file" in str(gone.error)
    assert f"spells {IMAGE_PAD}" in str(spelt.error)


def test_a_model_that_cannot_chat_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    silent = Path(shutil.copytree(tiny_checkpoint, tmp_path / "silent"))
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(OptionError, match="no chat template"):
        local(silent)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(OptionError, match="model type 'llava' is not known"):
        local(tmp_path)


def _block(question: Question) -> None:
    """Report the question and wait to be killed."""
    if question.key == "q6":
        print("at q6", flush=True)
        signal.pause()


if __name__ == "__main__":
    build_pool(ask(11), echoes(_block), Path(sys.argv[1]), batch=2)
