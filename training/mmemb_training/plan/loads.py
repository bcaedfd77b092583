"""What a recipe's examples ask of a model: the longest prompt, which memory must hold, and a mean one, for time."""

from __future__ import annotations

from mmemb_deploy.errors import OptionError
from mmemb_training.plan.arithmetic import Load, patches_of, visual_tokens
from mmemb_training.plan.recipes import Joint, Recipe
from mmemb_training.plan.shapes import ModelShape

TEXT_TOKENS = 128  # system prompt, instruction and words of a prompt with an image; assumed
FILL = 0.5  # share of the limits on pixels and answers that a mean example uses; assumed


def longest_prompt(shape: ModelShape, joint: Joint) -> Load:
    """Return a prompt at its limit, filled with images or with one video, whichever has more patches.

    Raises OptionError for pixels whose visual tokens exceed the limit on tokens.
    """
    room = joint.max_tokens - TEXT_TOKENS
    image, frame = patches_of(shape, joint.max_pixels), patches_of(shape, joint.video_max_pixels)
    pairs = frame_pairs(shape, joint)
    for name, value, tokens in (
        ("max_pixels", joint.max_pixels, visual_tokens(shape, image)),
        ("video_max_pixels", joint.video_max_pixels, pairs * visual_tokens(shape, frame)),
    ):
        if tokens > room:
            raise OptionError(
                f"joint.{name} is {value}: that is {tokens} visual tokens, and joint.max_tokens ({joint.max_tokens}) "
                f"leaves {max(room, 0)} beside {TEXT_TOKENS} of text; lower it or raise max_tokens"
            )
    images = Load(tokens=joint.max_tokens, frames=room // visual_tokens(shape, image), patches=image)
    video = Load(tokens=joint.max_tokens, frames=pairs, patches=frame)
    return max(images, video, key=lambda load: load.frames * load.patches)


def frame_pairs(shape: ModelShape, joint: Joint) -> int:
    """Return how many patches in time a video at its limit has."""
    return -(-joint.video_frames // shape.vision.temporal_patch)


def mean_prompt(shape: ModelShape, joint: Joint, fill: float) -> Load:
    """Return a prompt with one image of `fill` times the most pixels, and TEXT_TOKENS of text."""
    patches = patches_of(shape, round(fill * joint.max_pixels))
    return Load(tokens=TEXT_TOKENS + visual_tokens(shape, patches), frames=1, patches=patches)


def with_paths(load: Load, paths: int, words: float) -> Load:
    """Return a prompt followed by rationales."""
    return Load(tokens=load.tokens, frames=load.frames, patches=load.patches, paths=paths, words=max(1, round(words)))


def check_dims(shape: ModelShape, recipe: Recipe) -> None:
    """Raise OptionError for an embedding size that the model does not have."""
    largest = recipe.joint.dims[0]
    if largest > shape.text.hidden:
        raise OptionError(f"joint.dims holds {largest}: {shape.name} has embeddings of {shape.text.hidden}")
