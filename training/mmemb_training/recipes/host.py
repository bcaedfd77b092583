"""What a run takes beside the GPUs: host memory, disk, and cores that decode images.

Per row and per image, the figures are those that `benchmarks/scale.py` measured, and are said to be.
"""

from __future__ import annotations

from mmemb_deploy.figures import Figure
from mmemb_training.recipes.machines import Machine
from mmemb_training.recipes.settings import RunRecipe
from mmemb_training.recipes.shapes import ModelShape

ROW_BYTES = 450  # of a pair on disk, in the layout of MMEB-train
DECODED = 25  # photographs of 1.9 megapixels that a core decodes and resizes in a second
RATIONALE_BYTES = 400  # of a rationale in memory, beside its text
CHARACTERS = 4  # of a token; assumed


def host_figures(
    shape: ModelShape, recipe: RunRecipe, machine: Machine, examples: int, fill: float, joint_hours: float | None
) -> dict[str, Figure]:
    """Return the host's terms; `joint_hours` are those of stage 3, None where they are not known."""
    pool, joint, control, gpus = recipe.pool, recipe.joint, recipe.control, machine.gpus
    read = recipe.selection.evaluator == "embedder"
    turns = -(-control.schedule.length // control.updates)
    mined = examples if read else min(examples, control.queries * turns)
    answers = examples * len(pool.workers) * pool.samples
    answer = RATIONALE_BYTES + fill * pool.max_tokens * CHARACTERS
    sides, share = 2 + joint.hard_negatives, -(-joint.batch // gpus)
    pixels = 3 * fill * recipe.model.max_pixels
    trained = shape.parameters()
    lora = recipe.weights.adapters
    kept = trained if lora is None else shape.lora_parameters(lora.rank, lora.targets)
    steps = joint.schedule.over(examples // joint.batch).length
    needed = None if joint_hours is None else steps * joint.batch * sides / (joint_hours * 3600)
    return {
        "samples, on disk": Figure(examples * ROW_BYTES, "B", f"{examples} x {ROW_BYTES} B, measured; mapped"),
        "rationales, in memory": Figure(
            answers * answer, "B", f"{answers} x {answer:.0f} B: of all processes, in stage 2"
        ),
        "embeddings, on disk": Figure(
            2 * mined * shape.text.hidden * 4, "B", f"{mined} questions and as many targets x 4 B x hidden; mapped"
        ),
        "images of two steps": Figure(
            2 * share * sides * pixels,
            "B",
            f"of each process: 2 x {share} x {sides} images x 3 B x {fill:g} x max_pixels",
        ),
        "images a second": Figure(needed, "", f"of stage 3: {steps} steps x {joint.batch} x {sides} / its hours"),
        "cores that decode": Figure(
            None if needed is None else needed / DECODED, "", f"that / {DECODED} a core, measured; beside the steps"
        ),
        "a state of stage 3, on disk": Figure(
            2 * 12 * kept, "B", "2, the old one and the new, x 12 B per trained weight: itself and AdamW's moments"
        ),
        "a trained model, on disk": Figure(4 * trained, "B", "4 B per weight; 4 GiB of it are in memory at a time"),
    }
