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
from mmemb_export.quantise import BLOCK, int4, int8, paired_int8
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


def sensitivity(checkpoint: Checkpoint, probes: Sequence[Pair], precision: str) -> dict[str, float]:
    """Return the relative error of every linear layer's output under `precision`, the largest first.

    The error is the root of the mean over probes of |quantised - exact|^2 / |exact|^2; the keys are as in `ranges`.
    """
    found: defaultdict[str, list[float]] = defaultdict(list)

    def see(name: str, layer: nn.Linear, states_RK: Floats) -> None:
        states_RK = states_RK[:: -(-len(states_RK) // ROWS)]
        weight_KN: Floats = layer.weight.detach().float().numpy().T
        exact_RN = states_RK @ weight_KN
        lost_RN = _quantised_product(states_RK, weight_KN, precision) - exact_RN
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
        request = parse(probe.query)
        reference.run(request, checkpoint.rows.row(request, checkpoint.instruction(probe.instruction)), ())
    for hook in hooks:
        hook.remove()


def _quantised_product(states_RK: Floats, weight_KN: Floats, precision: str) -> Floats:
    if precision == "int8":
        states_KR, scale_R = int8(states_RK.T)
        values_KN, scale_N = paired_int8(weight_KN)
        return (states_KR.T.astype(np.float32) @ values_KN.astype(np.float32)) * scale_R[:, None] * scale_N
    packed_NGS, scale_NG = int4(weight_KN)
    values_NGS = np.stack([packed_NGS & 15, packed_NGS >> 4], axis=-1).reshape(*packed_NGS.shape[:2], BLOCK)
    coarse_NGS: Floats = (values_NGS.astype(np.float32) - np.float32(8)) * scale_NG.reshape(*packed_NGS.shape[:2], 1)
    coarse_KN = coarse_NGS.reshape(len(coarse_NGS), -1)[:, : weight_KN.shape[0]].T
    return (states_RK @ coarse_KN).astype(np.float32)
