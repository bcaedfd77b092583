"""A graph, parsed by TensorRT and built into an engine. As in `api`, variables are called after what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmemb_deploy.backends.device import Shape
from mmemb_deploy.backends.tensorrt.api import TENSORRT_RTX, Library
from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.errors import BackendError

Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # input -> min, opt and max shape


class Watcher(Protocol):
    """Hears of a build's phases, which nest."""

    def started(self, phase: str, parent: str | None, steps: int) -> None:
        """Hear that a phase of so many steps begins."""
        ...

    def stepped(self, phase: str, step: int) -> None:
        """Hear that a step, counted from 0, is done."""
        ...

    def finished(self, phase: str) -> None:
        """Hear that a phase ends."""
        ...


@dataclass(frozen=True)
class Plan:
    """An engine's bytes, and what was learned about its kernels' speed, to be passed as `timings` again.

    `decomposed` says that attention in half precision found no kernel of its own, and was written out.
    """

    content: memoryview
    timings: bytes
    decomposed: bool


class Network:
    """A parsed graph, ready to be built. Raises BackendError, naming the operator, if the parser refuses the graph.

    `model` is the graph's content where it is not that of the file, beside which its weights still lie. `lengths` names
    the tensor that says how many slots of a row its attention may read; the parsers drop it without a word.
    """

    def __init__(
        self, library: Library, graph: Path, model: bytes | None = None, *, lengths: str | None = None
    ) -> None:
        trt = library.trt
        self._library, self._graph = library, graph
        library.errors.clear()
        try:
            builder = trt.Builder(library.log)
        except (RuntimeError, TypeError) as error:
            raise library.failure("has no builder here") from error
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, library.log)
        self._builder, self._network, self._parser = builder, network, parser
        if not (parser.parse_from_file(str(graph)) if model is None else parser.parse(model, str(graph))):
            found = [parser.get_error(index) for index in range(parser.num_errors)]
            reasons = [f"{problem.node_operator() or 'the graph'}: {problem.desc()}" for problem in found]
            raise BackendError(f"{library.name} {library.version} cannot parse {graph.name}: {'; '.join(reasons)}")
        self._let_attention_decompose(half=False)
        if lengths is not None:
            self._attend_by_lengths(lengths)

    def _attentions(self) -> Iterator[tuple[Any, bool]]:
        """Yield every attention, and whether it is in half precision."""
        trt, network = self._library.trt, self._network
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                tensor = layer.get_input(0)
                half = tensor.dtype != trt.DataType.FLOAT
                layer.__class__ = trt.IAttentionInputLayer
                yield layer.attention, half

    def _let_attention_decompose(self, *, half: bool) -> None:
        """Let the builder write attention out, in half precision or in float32, which has no kernels of its own."""
        for attention, is_half in self._attentions():
            if is_half is half:
                attention.decomposable = True

    def _attend_by_lengths(self, name: str) -> None:
        trt, network = self._library.trt, self._network
        newer = trt
        cast = network.add_cast(self._tensor(name), trt.DataType.INT32)
        counts = cast.get_output(0)
        for newer_attention, _ in self._attentions():
            newer_attention.causal_kind = newer.CausalMaskKind.LOWER_RIGHT  # the last token sees all of its row's slots
            newer_attention.key_value_lengths = counts

    def _tensor(self, name: str) -> Any:
        network = self._network
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            for place in range(layer.num_outputs):
                tensor = layer.get_output(place)
                if tensor.name == name:
                    return tensor
        raise BackendError(f"{self._library.name} {self._library.version} lost the tensor {name} of {self._graph.name}")

    def build(
        self, profiles: Sequence[Profile], options: BuildOptions, *, target: str, timings: bytes, watcher: Watcher
    ) -> Plan:
        """Build an engine for the GPU at hand, or with TensorRT for RTX for `target`. Raises BackendError.

        Where the library has no kernel for an attention in half precision, it is built again, written out.
        """
        library, builder, network = self._library, self._builder, self._network
        library.errors.clear()
        config = self._configured(options)
        for shapes in profiles:
            profile = builder.create_optimization_profile()
            for name, (smallest, usual, largest) in shapes.items():
                profile.set_shape(name, smallest, usual, largest)
            if config.add_optimization_profile(profile) < 0:
                raise library.failure(f"refuses the profile {dict(shapes)} of {self._graph.name}")
        timing = None
        if library.name == TENSORRT_RTX:  # it has no timing cache
            _aim(library.trt, config, target)
        else:
            timing = self._timing_cache(config, timings)
        monitor, interrupted = _monitor(library.trt, watcher)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        lacking = plan is None and any("decomposable" in error for error in library.errors)
        if lacking and not interrupted:
            library.errors.clear()
            self._let_attention_decompose(half=True)
            plan = builder.build_serialized_network(network, config)
        if interrupted:
            raise KeyboardInterrupt
        if plan is None:
            raise library.failure(f"cannot build {self._graph.name}")
        return Plan(memoryview(plan), b"" if timing is None else bytes(timing.serialize()), decomposed=lacking)

    def _configured(self, options: BuildOptions) -> Any:
        """Return a builder's configuration with the options in it; `Library.check_options` has seen them."""
        trt, builder = self._library.trt, self._builder
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 in the graph means float32
        verbosities = {
            "none": trt.ProfilingVerbosity.NONE,
            "names": trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
            "detailed": trt.ProfilingVerbosity.DETAILED,
        }
        config.profiling_verbosity = verbosities[options.profiling]
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.hardware == "capability":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
        elif options.hardware == "ampere+":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        flags = {
            trt.BuilderFlag.VERSION_COMPATIBLE: options.version_compatible,
            trt.BuilderFlag.REFIT: options.refit,
            trt.BuilderFlag.STRIP_PLAN: options.strip,
        }
        for flag, wanted in flags.items():
            if wanted:
                config.set_flag(flag)
        return config

    def _timing_cache(self, config: Any, timings: bytes) -> Any:
        """Attach a timing cache: the given one, or an empty one if it comes from another device or version."""
        for content in (timings, b""):
            timing = config.create_timing_cache(content)
            if timing is not None and config.set_timing_cache(timing, False):
                return timing
        raise self._library.failure("refuses an empty timing cache")


def _aim(rtx: Any, rtx_config: Any, target: str) -> None:
    """Build for a compute capability, with all memory from the caller, without which no run can be recorded."""
    rtx_config.num_compute_capabilities = 1
    rtx_config.set_compute_capability(getattr(rtx.ComputeCapability, target.upper()), 0)
    rtx_config.set_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)


def _monitor(trt: Any, watcher: Watcher) -> tuple[Any, list[bool]]:
    """Return a progress monitor, and a list that fills when the user interrupts it: the library must not see that."""
    interrupted: list[bool] = []

    def step_complete(_: Any, phase: str, step: int) -> bool:
        try:
            watcher.stepped(phase, step)
        except KeyboardInterrupt:
            interrupted.append(True)
        return not interrupted

    def phase_start(_: Any, phase: str, parent: str | None, steps: int) -> None:
        watcher.started(phase, parent, steps)

    def phase_finish(_: Any, phase: str) -> None:
        watcher.finished(phase)

    methods = {"phase_start": phase_start, "step_complete": step_complete, "phase_finish": phase_finish}
    return type("Monitor", (trt.IProgressMonitor,), methods)(), interrupted
