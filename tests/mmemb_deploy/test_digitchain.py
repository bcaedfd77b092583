"""DigitChain is deterministic, split by image, and its answers are right."""

import re
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmemb_deploy import OptionError
from mmemb_deploy.evaluation.digitchain import FAMILIES, MIXED_SHARES, NAMES, DigitChain, Example, drawings, solve

SPLITS = ("train", "calibration", "test")


def test_the_splits_hold_all_digits_and_share_none() -> None:
    images = [drawings(split).images for split in SPLITS]
    assert [len(split) for split in images] == [1250, 150, 397]
    assert len({image.tobytes() for split in images for image in split}) == 1797


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_draws_the_same_examples(family: str) -> None:
    first, again, other = (list(map(asdict, DigitChain("test", seed).examples(family, 4))) for seed in (3, 3, 4))
    np.testing.assert_equal(first, again)
    with pytest.raises(AssertionError):
        np.testing.assert_equal(first, other)


def value_of(example: Example) -> int:
    """Evaluate an example from its own words, by Python's arithmetic; digits that are drawn come from the rationale."""
    words = example.content.get("text", "")
    chain = example.rationale.split(";")[0] if "image" in example.content or "images" in example.content else words
    for digit, name in enumerate(NAMES):
        chain = chain.replace(name, str(digit))
    chain = chain.replace("plus", "+").replace("minus", "-").replace("times", "*").replace("x", "*").replace(" ", "")
    if chain == "onedigit" or chain == "1digit":
        return int(re.findall(r"\d", example.rationale)[-1])
    value, *steps = re.findall(r"[-+*]?\d", chain)
    total = int(value)
    for step in steps:
        total = eval(f"{total} {step}")
    return int(total) % 10


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "match"])
def test_a_result_is_the_chain_evaluated_from_left_to_right(family: str) -> None:
    for example in DigitChain("test", 0).examples(family, 60):
        assert value_of(example) == example.value
        right = [shown.value for shown, relevant in zip(example.candidates, example.relevant, strict=True) if relevant]
        assert right == [example.value]
        assert sorted(shown.value for shown in example.candidates) == list(range(10))


def test_every_step_of_a_rationale_is_true() -> None:
    value, rationale = solve([3, 4, 5, 9], ["+", "x", "-"])
    assert (value, rationale) == (6, "3+4x5-9;3+4=7;7x5=5;5-9=6;")
    assert solve([7], []) == (7, "one digit; it is 7;")


def test_a_match_hides_its_drawing_among_look_alikes() -> None:
    for example in DigitChain("test", 0).examples("match", 20):
        assert {shown.value for shown in example.candidates} == {example.value}
        assert len({shown.drawing for shown in example.candidates}) == len(example.candidates) == 10
        assert sum(example.relevant) == 1
        assert not np.array_equal(example.content["image"], example.target.content["image"])


def test_a_chain_shows_as_many_digits_as_its_name_says() -> None:
    for terms in range(2, 6):
        (example,) = DigitChain("test", 0).examples(f"chain-{terms}", 1)
        assert len(example.content["images"]) == terms
        assert all(image.shape == (32, 32) and image.dtype == np.uint8 for image in example.content["images"])


def test_a_chain_shows_the_digits_of_its_rationale_in_their_order() -> None:
    known = drawings("train")
    flat = known.images.reshape(len(known.images), -1)

    def read(image: NDArray[np.uint8]) -> int:
        """Name a drawn digit by its nearest training drawing."""
        small = np.asarray(Image.fromarray(image).crop((3, 3, 29, 29)).resize((8, 8), Image.Resampling.BOX)).ravel()
        return int(known.values[(flat @ small / np.linalg.norm(flat, axis=1)).argmax()])

    examples = DigitChain("test", 0).examples("chain-5", 40)
    told = [int(digit) for example in examples for digit in re.findall(r"\d", example.rationale.split(";")[0])]
    shown = [read(image) for example in examples for image in example.content["images"]]
    assert np.mean(np.array(told) == shown) >= 0.85


def test_mixed_traffic_keeps_its_shares_in_every_twenty() -> None:
    families = [example.family for example in DigitChain("test", 5).mixed(60)]
    for start in range(0, 60, 20):
        assert Counter(families[start : start + 20]) == MIXED_SHARES


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'chain-3'"):
        DigitChain("test", 0).examples("chain3", 1)
    with pytest.raises(OptionError, match="did you mean 'test'"):
        DigitChain("tests", 0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
