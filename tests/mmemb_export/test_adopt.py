"""A public Qwen3-VL-Embedding becomes a bundle that embeds as its own inference script does, and refuses to reason."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from typer.testing import CliRunner

from mmemb_deploy import Embedder, OptionError
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.cli.main import application
from mmemb_deploy.evaluation.pairs import Pair
from mmemb_export.recipe import Recipe
from mmemb_export.write import export_bundle
from mmemb_training.adopt import adopt
from mmemb_training.checkpoint import load_checkpoint, save_checkpoint

# the public chat template in short: roles, videos, images and text, and nothing after the assistant's turn begins
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
    "{% else %}<|vision_start|><|{{ c.type }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PUBLIC = "public"
# methods that use no `self`, of classes that need torchvision to be made
calculate_timestamps = vars(Qwen3VLProcessor)["_calculate_timestamps"]
patchify = vars(Qwen3VLVideoProcessor)["patchify"]
Size = tuple[int, int]  # height, width


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The tiny model as if it were public: the public chat template, and a tokenizer that knows none of our markers."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("public") / PUBLIC))
    (folder / "mmemb.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        for marker, other in (("<|disc_emb|>", "<|a|>"), ("<|gen_emb|>", "<|b|>"), ("think>", "thought>")):
            text = text.replace(marker, other)
        (folder / name).write_text(text)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=["portable", "fused"])
def bundle(request: pytest.FixtureRequest, public: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adopted")
    adopt(public, folder / "checkpoint")
    recipe = Recipe(form=request.param)
    export_bundle(folder / "checkpoint", folder / "bundle", recipe=recipe, probes=8, report=lambda _: None)
    return folder / "bundle"


@dataclass(frozen=True)
class Clip:
    """Frames, and the sizes that qwen-vl-utils 0.0.14 gives them with the script's bounds: each alone, then all."""

    frames: list[Image.Image]
    alone: Size
    together: Size
    fps: float = 2.0

    def patches(self) -> tuple[Any, list[int]]:
        """Resize as qwen-vl-utils does, by Pillow and, an even number of frames, by torchvision; and make patches."""
        height, width = self.alone
        alone = [np.asarray(frame.resize((width, height))) for frame in self.frames]
        stack = torch.from_numpy(np.stack(alone + alone[-1:] * (len(alone) % 2))).permute(0, 3, 1, 2).float()
        stack = F.interpolate(stack, self.together, mode="bicubic", antialias=True).clamp(0, 255).round()
        patches, *grid = patchify(None, (stack / 255 * 2 - 1)[None], 4, 2, 2)
        return patches[0], grid


def as_the_script_does(public: Path, inputs: list[dict[str, Any]]) -> NDArray[np.float32]:
    """Render, tokenise, resize, forward and pool as the public inference script does, one input at a time.

    The script's lock file names transformers 4.57.3, which writes each temporal patch of a video between marks of its
    own, and none around the video.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(public)
    processor: Any = Qwen2VLImageProcessorPil.from_pretrained(public, do_resize=False)
    model: Any = AutoModelForImageTextToText.from_pretrained(public, dtype="float32").eval()
    embeddings = []
    for each in inputs:
        images: list[tuple[Image.Image, Size]] = each.get("images", [])
        clip: Clip | None = each.get("clip")
        content = [*[{"type": "video"}] * (clip is not None), *[{"type": "image"}] * len(images)]
        if each.get("text") or not content:
            content.append({"type": "text", "text": each.get("text") or "NULL"})
        chat = [
            {"role": "system", "content": [{"type": "text", "text": each["system"]}]},
            {"role": "user", "content": content},
        ]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        pixels: dict[str, Any] = {}
        if clip:
            patches, grid = clip.patches()
            pixels |= {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([grid])}
            pads = "<|vision_start|>" + "<|video_pad|>" * (grid[1] * grid[2] // 4) + "<|vision_end|>"
            times = calculate_timestamps(None, list(range(2 * grid[0])), clip.fps, 2)
            shown = "".join(f"<{seconds:.1f} seconds>{pads}" for seconds in times)
            text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", shown)
        if images:
            resized = [image.resize((width, height)) for image, (height, width) in images]
            pixels |= processor(images=resized, return_tensors="pt")
            for grid in pixels["image_grid_thw"]:
                text = text.replace("<|image_pad|>", "<|hole|>" * int(grid.prod() // 4), 1)
            text = text.replace("<|hole|>", "<|image_pad|>")
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
        with torch.no_grad():
            hidden = model.model(input_ids=ids, mm_token_type_ids=kinds, **pixels).last_hidden_state[0, -1]
        embeddings.append(torch.nn.functional.normalize(hidden, dim=-1).numpy())
    return np.stack(embeddings)


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


Case = tuple[Any, str | None, dict[str, Any]]  # an input and its instruction to us; both to the script
DEFAULT = "Represent the user's input."


def assert_equal_to_the_script(bundle: Path, public: Path, cases: list[Case], atol: float) -> None:
    embedder = Embedder.load(bundle)
    ours = np.concatenate([embedder.encode([content], instruction=instruction) for content, instruction, _ in cases])
    theirs = as_the_script_does(public, [each for _, _, each in cases])
    np.testing.assert_allclose(ours, theirs, atol=atol)


def test_embeddings_equal_the_public_script_s(bundle: Path, public: Path) -> None:
    image, wide, wider, high = picture(40, 24), picture(9, 70), picture(3, 300), picture(300, 3)
    cases: list[Case] = [
        ("a text", None, {"text": "a text", "system": DEFAULT}),
        ("\n\n a text that begins with lines", None, {"text": "\n\n a text that begins with lines", "system": DEFAULT}),
        ("find me", "Find it", {"text": "find me", "system": "Find it."}),
        ("find me", "  Find it!  ", {"text": "find me", "system": "Find it!"}),
        ("find me", "", {"text": "find me", "system": DEFAULT}),
        ({"image": image}, None, {"images": [(image, (40, 24))], "system": DEFAULT}),
        (
            {"image": wide, "text": "what?"},
            "Answer it.",
            {"images": [(wide, (8, 72))], "text": "what?", "system": "Answer it."},
        ),
        ({"images": [wider, high]}, None, {"images": [(wider, (8, 304)), (high, (304, 8))], "system": DEFAULT}),
    ]
    assert_equal_to_the_script(bundle, public, cases, atol=2e-5)


def test_videos_embed_as_in_the_public_script(bundle: Path, public: Path) -> None:
    image = picture(40, 24)
    clip = Clip([picture(24, 40 + index).crop((0, 0, 40, 24)) for index in range(3)], (32, 32), (96, 96))
    narrow = Clip([picture(3, 150)] * 4, (16, 144), (32, 272), fps=1.0)
    frame = Clip([picture(50, 90)], (48, 96), (64, 128))
    cases: list[Case] = [
        ({"video": clip.frames}, None, {"clip": clip, "system": DEFAULT}),
        ({"video": narrow.frames, "fps": 1.0, "text": "x"}, None, {"clip": narrow, "text": "x", "system": DEFAULT}),
        (
            {"video": frame.frames, "image": image, "text": "x"},
            None,
            {"clip": frame, "images": [(image, (40, 24))], "text": "x", "system": DEFAULT},
        ),
    ]
    assert_equal_to_the_script(bundle, public, cases, atol=1e-4)  # one sample in a thousand differs by one of 255


def test_resizing_outlives_another_save(public: Path, tmp_path: Path) -> None:
    adopt(public, tmp_path / "adopted")
    adopted = load_checkpoint(tmp_path / "adopted")
    save_checkpoint(adopted, tmp_path / "saved")
    assert load_checkpoint(tmp_path / "saved").vision == adopted.vision
    assert adopted.vision.resize == "qwen-vl-utils"


def test_a_bundle_that_never_reasons_has_neither_gate_nor_generator(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert tuple(opened.manifest.graphs) in [(abi.VISION, abi.DIRECT), (abi.VISION, abi.EMBEDDER)]
    assert opened.manifest.gate is None
    certificate = opened.manifest.certificate
    assert certificate is not None
    assert certificate.reasoned is None
    outputs = {tensor.name for tensor in opened.manifest.decoder.outputs if not tensor.name.startswith("present.")}
    assert outputs == {abi.EMBEDDING, abi.STATE}
    assert not (bundle / "gate.onnx").exists()


def test_auto_is_direct_and_the_score_is_absent(bundle: Path) -> None:
    embedder = Embedder.load(bundle)
    result = embedder.encode_detailed(["a", "b"], truncate_dim=48)
    assert not embedder.reasons
    assert [detail.route.value for detail in result.details if detail] == ["fast", "fast"]
    assert all(np.isnan(detail.gate_score) for detail in result.details if detail)
    np.testing.assert_allclose(result.embeddings, embedder.encode(["a", "b"], reasoning="never"), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reasoning": "always"}, "reasoning is 'always': bundle embeds without reasoning"),
        ({"threshold": 0.5}, "threshold is 0.5"),
        ({"reasoning_rate": 0.5}, "reasoning_rate is 0.5"),
        ({"rationales": ["so"]}, r"rationales is \['so'\]"),
        ({"reasoning": "alway"}, "did you mean 'always'"),
    ],
)
def test_reasoning_is_refused_by_name(bundle: Path, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Embedder.load(bundle).encode(["a"], **options)


def test_commands_say_what_such_a_bundle_has_not(bundle: Path, public: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(application(), ["verify", str(bundle)]).exit_code == 0
    assert "gate" not in run(application(), ["inspect", str(bundle)]).output.split("certificate")[0]
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"query": "a", "candidates": ["b", "c"], "relevant": [True, False]}) + "\n"
    )
    refused = run(application(), ["calibrate", str(bundle), "--data", str(tmp_path / "pairs.jsonl")])
    assert isinstance(refused.exception, OptionError)
    assert "it has no gate" in str(refused.exception)
    adopt(public, tmp_path / "checkpoint")
    with pytest.raises(OptionError, match="does not reason, and has no gate"):
        export_bundle(
            tmp_path / "checkpoint",
            tmp_path / "new",
            pairs=[Pair(query="a", candidates=["b"], relevant=[True])],
            pairs_name="pairs",
        )


def test_a_model_that_is_not_of_this_kind_is_refused(public: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OptionError, match="there exists: choose another folder"):
        adopt(public, tmp_path / "there")
    with pytest.raises(OptionError, match=r"there is not a Qwen3-VL-Embedding: it has no config.json"):
        adopt(tmp_path / "there", tmp_path / "new")
    other = Path(shutil.copytree(public, tmp_path / "other"))
    (other / "chat_template.jinja").write_text(TEMPLATE + "<think>")
    with pytest.raises(OptionError, match="which is not the layout of Qwen3-VL-Embedding"):
        adopt(other, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_public_folder_is_told_how_to_become_a_checkpoint(public: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no mmemb\.json; of a public Qwen3-VL-Embedding, `mmemb train adopt`"):
        export_bundle(public, tmp_path / "bundle")


def test_a_video_comes_before_an_image(bundle: Path) -> None:
    embedder = Embedder.load(bundle)
    encoder = embedder.encoder
    from mmemb_deploy.inputs.parse import parse

    frames = [np.asarray(picture(24, 24))] * 2
    row = encoder.row(parse({"video": frames, "fps": 1.0, "image": picture(16, 32), "text": "x"}), "")
    ids = encoder.prompt.ids
    shown = [token for token in row.token_ids_S if token in (ids["<|video_pad|>"], ids["<|image_pad|>"])]
    assert shown == sorted(shown, key=lambda token: token == ids["<|image_pad|>"])
    assert row.visual_tokens == len(shown)
