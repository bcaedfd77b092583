"""Exports a checkpoint, builds TensorRT engines for this machine's GPU, verifies them, and embeds with them.

It does what these commands do, by the functions behind them:

    mmemb export CHECKPOINT BUNDLE --form portable --precision bfloat16
    mmemb build BUNDLE --batch 32
    mmemb embed inputs.jsonl vectors.npz BUNDLE --backend tensorrt

Needs an NVIDIA GPU and `pip install 'mmemb-deploy[cpu,tensorrt,export]'`; without a GPU it stops before it builds, with
an error that says so. Run it with

    python examples/tensorrt_engine.py CHECKPOINT BUNDLE
"""

import sys
from pathlib import Path

from mmemb_deploy import Embedder
from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.evaluation.parity import reference_of
from mmemb_engines.build import build_engines, check_portable, device_sets
from mmemb_engines.profiles import demand_of_limits
from mmemb_engines.verify import verify_engines
from mmemb_engines.watch import watching
from mmemb_export.recipe import Recipe
from mmemb_export.write import export_bundle

checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
if not folder.exists():
    export_bundle(checkpoint, folder, recipe=Recipe(form="portable", precision="bfloat16"))

bundle = Bundle.open(folder)
check_portable(bundle)
options = BuildOptions()  # beside the shapes: optimisation level, compatible hardware, and more
library, (device,) = device_sets(bundle, "tensorrt", (), options)  # the GPU at hand; a BackendError where there is none
with watching(shown=True) as watch:
    engines = build_engines(bundle, library, device, demand_of_limits(bundle.manifest, 32), options, watch)
verify_engines(bundle, engines, reference_of(bundle))  # run, and compared with what the bundle's reference answered

embedder = Embedder.load(folder, backend="tensorrt")
print(embedder.backend, embedder.encode(["three plus four"]).shape)
