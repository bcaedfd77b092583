"""The command `mmemb build`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmemb_deploy.backends.tensorrt.api import LIBRARIES, TENSORRT
from mmemb_deploy.backends.tensorrt.options import Attention, BuildOptions, Hardware, Profiling
from mmemb_deploy.cli.options import Device
from mmemb_deploy.errors import OptionError

if TYPE_CHECKING:
    from mmemb_deploy.backends.tensorrt.files import EngineSet
    from mmemb_deploy.bundle.folder import Bundle
    from mmemb_engines.check import Checked

Direct = Annotated[
    bool, typer.Option(help="Whether prompts that nothing follows get an engine of their own: faster, and its weights.")
]
DECOMPOSED = "its attention found no kernel of its own in half precision, and was written out, which is slower"


def register(app: typer.Typer) -> None:
    """Add the build command to `mmemb`."""
    app.command("build")(build)


def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, with portable graphs.")],
    library: Annotated[str, typer.Option("--library", "--flavour", help=f"{' or '.join(LIBRARIES)}.")] = TENSORRT,
    targets: Annotated[
        str | None,
        typer.Option(help="Compute capabilities to build for without a GPU, as sm80,sm89: tensorrt-rtx only."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Most inputs that run together.")] = 32,
    tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a prompt; as many as the bundle allows by default.")
    ] = None,
    cache: Annotated[
        float | None, typer.Option(help="GiB of the KV cache, at most; what the bundle says by default.")
    ] = None,
    direct: Direct = True,
    traffic: Annotated[
        Path | None,
        typer.Option(help="A sample of inputs, as `mmemb embed` reads them, to fit the engines to instead of limits."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="A float32 bundle of the same checkpoint to verify against; what BUNDLE keeps by default."),
    ] = None,
    workspace: Annotated[int | None, typer.Option(help="Most MiB of scratch memory of a layer.")] = None,
    optimization_level: Annotated[
        int | None, typer.Option(help="0 builds fastest, 5 searches longest; 3 by default. Not with tensorrt-rtx.")
    ] = None,
    hardware: Annotated[
        Hardware, typer.Option(help="What runs the engines: this GPU's model, its capability, or any from Ampere on.")
    ] = "exact",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later releases of this major version load the engines.")
    ] = False,
    refit: Annotated[bool, typer.Option("--refit", help="Let the engines' weights be exchanged.")] = False,
    strip: Annotated[bool, typer.Option("--strip", help="Leave the weights out; loading reads the bundle's.")] = False,
    profiling: Annotated[Profiling, typer.Option(help="What the engines tell of their layers.")] = "detailed",
    attention: Annotated[
        Attention, typer.Option(help="How attention knows which slots of the cache are filled.")
    ] = "mask",
    triton: Annotated[
        Path | None, typer.Option(help="Also write a model repository for Triton Inference Server there.")
    ] = None,
    device: Device = 0,
    engines_only: Annotated[
        Path | None, typer.Option(help="Also write a bundle there that holds the engines, and no ONNX graphs.")
    ] = None,
    commands: Annotated[
        Path | None,
        typer.Option(help="Write the graphs there as TensorRT reads them, print trtexec's commands, and stop."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Print what parses and builds, and keep nothing; exit 1 if a graph fails.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Build a bundle's graphs into TensorRT engines for this machine, and verify them against the bundle's reference.

    Engines lie in the bundle, by GPU and version; those whose graph, profiles, options and version have not changed are
    kept. Of a bundle that holds engines alone, they are verified.
    """
    from mmemb_deploy.bundle.folder import Bundle
    from mmemb_deploy.evaluation.parity import reference_of
    from mmemb_engines.build import build_engines, built_here, check_portable, device_sets, without_direct
    from mmemb_engines.by_hand import write_commands
    from mmemb_engines.check import check_graphs
    from mmemb_engines.engines_only import check_engines_only, write_engines_only
    from mmemb_engines.profiles import demand_of_limits, demand_of_traffic, read_traffic
    from mmemb_engines.triton import write_repository
    from mmemb_engines.verify import verify_engines
    from mmemb_engines.watch import watching

    opened = Bundle.open(bundle)
    check_portable(opened)
    manifest, chosen = opened.manifest, opened if direct else without_direct(opened)
    options = BuildOptions(
        workspace=workspace,
        optimization_level=optimization_level,
        hardware=hardware,
        version_compatible=version_compatible,
        refit=refit,
        strip=strip,
        profiling=profiling,
        attention=attention,
    )
    if engines_only is not None:
        check_engines_only(engines_only, options)
    cache_bytes = None if cache is None else int(cache * 2**30)
    if traffic is not None and tokens is not None:
        raise OptionError(f"--tokens is {tokens} beside --traffic, which says how long prompts are: pass one of them")
    if traffic is None:
        demand = demand_of_limits(manifest, batch, tokens=tokens, cache_bytes=cache_bytes)
    else:
        demand = demand_of_traffic(manifest, batch, read_traffic(opened, traffic), cache_bytes=cache_bytes)
    if commands is not None:
        print("\n".join(write_commands(chosen, demand, options, commands)))
        raise typer.Exit
    against = None
    if not check and not targets:  # the GPU at hand can run what is built
        against = reference_of(opened, None if reference is None else Bundle.open(reference))
    if manifest.engines_of is not None and against is not None:
        sets = [built_here(opened, library, device)]
    else:
        loaded, devices = device_sets(opened, library, tuple(targets.split(",")) if targets else (), options, device)
        with watching(shown=not as_json) as watch:
            if check:
                rows = list(check_graphs(chosen, loaded, devices, demand, options, watch))
                _print_checked(rows, f"{library} {loaded.version}", as_json=as_json)
                raise typer.Exit(0 if all(row.built for row in rows) else 1)
            sets = [build_engines(chosen, loaded, device, demand, options, watch) for device in devices]
    if against is not None:
        sets = [verify_engines(opened, engines, against, device) for engines in sets]
    if engines_only is not None:
        opened = write_engines_only(opened, sets, engines_only)
    if triton is not None:
        write_repository(opened, sets, triton, device)
    _print_built(opened, sets, as_json=as_json)


def _print_checked(rows: Sequence[Checked], library: str, *, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if as_json:
        print(json.dumps({"library": library, "graphs": [asdict(row) for row in rows]}))
        return
    table = Table(title=f"{library} build")
    for column in ("graph", "precision", "target", "parsed", "built", "seconds", "MiB"):
        table.add_column(column, justify="right" if column in ("seconds", "MiB") else "left")
    for row in rows:
        size = f"{row.size / 2**20:.2f}" if row.built else "-"
        answers = ("yes" if answer else "[red]no[/]" for answer in (row.parsed, row.built))
        table.add_row(row.graph, row.precision, row.target, *answers, f"{row.seconds:.2f}", size)
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        if row.decomposed:
            console.print(f"{row.graph}, {row.target}: {DECOMPOSED}")
        if row.error is not None:
            console.print(f"{row.graph}, {row.target}: {row.error}", markup=False, soft_wrap=True)


def _print_built(bundle: Bundle, sets: Sequence[EngineSet], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"engines": [engines.model_dump() for engines in sets]}))
        return
    from mmemb_deploy.backends.tensorrt.budget import budget_of

    for engines in sets:
        print(f"{bundle.folder / 'engines' / engines.folder}")
        for name, built in engines.engines.items():
            print(f"  {name}: {built.precision}, {built.seconds:.1f} s, {built.size / 2**20:.2f} MiB")
        for name in engines.decomposed:
            print(f"  {name}: {DECOMPOSED}")
        if engines.certificate is None:
            print("  not verified: these engines were built ahead of time, for a GPU that is not here")
        else:
            parities = engines.certificate.parities.values()
            worst, flips = min(each.min_cosine for each in parities), sum(each.gate_flips for each in parities)
            inputs = sum(each.inputs for each in engines.certificate.modalities.values())
            print(f"  verified on {inputs} inputs: min cosine {worst:.7f}, {flips} gate flips")
        for line in budget_of(bundle.manifest, engines).lines():
            print(f"  {line}")
