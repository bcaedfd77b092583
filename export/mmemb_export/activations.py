"""What a checkpoint's linear layers see: how large their inputs are, and what each loses when it is quantised.

Axes: R rows of activations, K input channels, N output channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn

from mmemb_deploy.evaluation.pairs import Pair
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_export.layers import Quantiser, Stored
from mmemb_export.reference import Reference
from mmemb_training.checkpoint import Checkpoint

ROWS = 64  # activations of one layer and probe that are looked at for its error

See = Callable[[str, nn.Linear, Floats], None]  # a weight's name, its layer, the layer's inputs (R, K)


def ranges(checkpoint: Checkpoint, probes: Sequence[Pair]) -> dict[str, float]:
    """Return the largest absolute input of every linear layer, by its weight's name in `mmemb_training.parts`."""
    found: defaultdict[str, float] = defaultdict(float)

    def see(name: str, _: nn.Linear, states_RK: Floats) -> None:
        found[name] = max(found[name], float(np.abs(states_RK).max()))

    _observe(checkpoint, probes, see)
    return dict(found)


def sensitivity(checkpoint: Checkpoint, probes: Sequence[Pair], quantiser: Quantiser) -> dict[str, float]:
    """Return the relative error of every linear layer's output once it is quantised, the largest first.

    The error is the root of the mean over probes of |quantised - exact|^2 / |exact|^2; the keys are as in `ranges`,
    without the layers that the quantiser leaves in the float type.
    """
    stored: dict[str, Stored] = {}
    found: defaultdict[str, list[float]] = defaultdict(list)

    def see(name: str, layer: nn.Linear, states_RK: Floats) -> None:
        if layer.in_features % quantiser.block:
            return
        states_RK = states_RK[:: -(-len(states_RK) // ROWS)]
        weight_KN: Floats = layer.weight.detach().float().numpy().T
        if name not in stored:
            stored[name] = quantiser.weight(weight_KN)
        exact_RN = states_RK @ weight_KN
        lost_RN = quantiser.product(states_RK, stored[name], name) - exact_RN
        found[name].append(float((lost_RN**2).sum() / max((exact_RN**2).sum(), 1e-30)))

    _observe(checkpoint, probes, see)
    errors = {name: float(np.sqrt(np.mean(each))) for name, each in found.items()}
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def _observe(checkpoint: Checkpoint, probes: Sequence[Pair], see: See) -> None:
    """Let the reference read every probe's query once, and show what goes into every linear layer."""

    def watch(name: str) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            see(f"{name.removeprefix('model.')}.weight", layer, inputs[0].detach().flatten(0, -2).float().numpy())

        return hook

    layers = {name: module for name, module in checkpoint.model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    reference = Reference(checkpoint)
    for probe in probes:
        request = parse(probe.query, vision=checkpoint.vision)
        reference.run(request, checkpoint.rows.row(request, checkpoint.instruction(probe.instruction)), ())
    for hook in hooks:
        hook.remove()
