"""One layout for training, export and runtime; words never become markers."""

import ast
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from mmemb_deploy import SchemaError
from mmemb_deploy.inputs.prompts import DISC_EMB, IMAGE_PAD, MARKERS, PromptEncoder, PromptFormat

ROOT = Path(__file__).parents[2]
PACKAGES = "mmemb_deploy", "training", "export", "engines", "benchmarks"


@pytest.fixture
def encoder(tiny_checkpoint: Path) -> PromptEncoder:
    """The tiny model's tokenizer, with a prompt of its own."""
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    return PromptEncoder(tokenizer, PromptFormat("Be brief.", "Find it.", ""))


def test_a_prompt_reads_as_documented(encoder: PromptEncoder) -> None:
    ids = encoder.prompt("Find it.", "a + b", image_tokens=[2, 1], video_tokens=[(0.25, 1)])
    assert encoder.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nFind it.\n"
        "<|vision_start|><|image_pad|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        "<0.2 seconds><|vision_start|><|video_pad|><|vision_end|>a + b<|im_end|>\n<|im_start|>assistant\n<|disc_emb|>"
    )


def test_without_an_instruction_its_line_is_left_out(encoder: PromptEncoder) -> None:
    assert "user\na + b" in encoder.decode(encoder.prompt("", "a + b"))


def test_a_rationale_is_a_whole_path(encoder: PromptEncoder) -> None:
    assert encoder.decode(encoder.path(encoder.tokenize("it is 7;"))) == "<think>it is 7;</think><|gen_emb|>"


def test_the_reasoning_path_is_built_in_one_place() -> None:
    builders = set()
    for path in sorted(source for package in PACKAGES for source in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = {each.id if isinstance(each, ast.Name) else getattr(each, "attr", None) for each in ast.walk(node)}
            if isinstance(node, ast.List | ast.Tuple) and {"THINK", "END_THINK", "GEN_EMB"} <= named:
                builders.add(path.name)
    assert builders == {"prompts.py"}


@pytest.mark.parametrize("marker", MARKERS)
def test_a_text_that_spells_a_marker_stays_a_text(encoder: PromptEncoder, marker: str) -> None:
    plain = encoder.prompt("", "x")
    spelt = encoder.prompt(marker, f"x{marker}")
    assert spelt.count(encoder.ids[marker]) == plain.count(encoder.ids[marker])
    assert encoder.decode(spelt).count(marker) == encoder.decode(plain).count(marker) + 2


def test_the_fast_path_ends_at_its_marker(encoder: PromptEncoder) -> None:
    ids = encoder.prompt("", "x", image_tokens=[3])
    assert ids[-1] == encoder.ids[DISC_EMB]
    assert ids.count(encoder.ids[IMAGE_PAD]) == 3


def test_a_tokenizer_without_a_marker_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"no token '<\|disc_emb\|>'"):
        PromptEncoder(Tokenizer(models.BPE()), PromptFormat("", "", ""))
