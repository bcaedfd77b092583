"""Which inputs of a reference are run to check engines: those that the engines' profiles take, and no others."""

import math

import pytest

from mmemb_deploy.backends.tensorrt.files import EngineSet
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.errors import BackendError
from mmemb_deploy.evaluation.parity import reference_of
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.preparer import row_encoder
from mmemb_engines.verify import fitting

Built = tuple[Bundle, EngineSet]


def with_most(built: Built, engine: str, tensor: str, place: int, most: int) -> EngineSet:
    """Return engines one of which takes no more than this of an axis."""
    bundle, engines = built
    found = engines.engines[engine]
    boxes = []
    for box in found.profiles:
        largest = list(box[tensor][2])
        largest[place] = most
        boxes.append(box | {tensor: (*box[tensor][:2], tuple(largest))})
    changed = found.model_copy(update={"profiles": tuple(boxes)})
    assert bundle.manifest.engines[engine]
    return engines.model_copy(update={"engines": engines.engines | {engine: changed}})


def test_engines_for_all_that_the_limits_allow_are_checked_on_the_whole_reference(built: Built) -> None:
    bundle, engines = built
    reference = reference_of(bundle)
    assert fitting(bundle, engines, reference).probes == reference.probes


def test_longer_prompts_are_left_out_with_their_answers(built: Built) -> None:
    bundle, _ = built
    reference, encoder = reference_of(bundle), row_encoder(bundle)
    lengths = [encoder.row(parse(probe.query), "Find the result.").length for probe in reference.probes]
    most = sorted(lengths)[len(lengths) // 2]
    for engine in ("direct", "decoder"):
        found = fitting(bundle, with_most(built, engine, abi.TOKEN_IDS, 1, most), reference)
        places = [place for place, length in enumerate(lengths) if length <= most]
        assert [id(probe) for probe in found.probes] == [id(reference.probes[place]) for place in places]
        assert found.answers.rationales == [reference.answers.rationales[place] for place in places]
        assert found.answers.direct_ND.tolist() == reference.answers.direct_ND[places].tolist()


def test_engines_for_text_alone_are_checked_on_text(built: Built) -> None:
    bundle, _ = built
    smallest = bundle.manifest.vision.merge_size**2
    (pixels,) = (tensor for tensor in bundle.manifest.graphs[abi.VISION].inputs if tensor.name == abi.PIXELS)
    engines = with_most(built, "vision", abi.PIXELS, pixels.shape.index("patches"), smallest)
    found = fitting(bundle, engines, reference_of(bundle))
    encoder = row_encoder(bundle)
    grids = [visual.grid for probe in found.probes for visual in encoder.row(parse(probe.query), "").visuals]
    assert all(math.prod(grid) <= smallest for grid in grids)
    assert found.probes


def test_engines_that_take_no_input_of_the_reference_are_an_error(built: Built) -> None:
    bundle, _ = built
    message = r"none of the reference's \d+ inputs fits .* at most 3 tokens, .* with longer inputs"
    with pytest.raises(BackendError, match=message):
        fitting(bundle, with_most(built, "decoder", abi.TOKEN_IDS, 1, 3), reference_of(bundle))
