"""What a bundle's engines would take of a device that need not be here, and what of it fits; all of it estimated."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmemb_deploy.backends.tensorrt.budget import Budget
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.bundle.precision import FLOATS
from mmemb_deploy.devices import GIB, Device
from mmemb_deploy.errors import BackendError, OptionError
from mmemb_deploy.figures import Figure
from mmemb_engines.build import check_portable
from mmemb_engines.estimates import PROMPTS, Estimator, Time
from mmemb_engines.profiles import Demand


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a demand takes of a device."""

    device: Device
    demand: Demand
    rationale: int  # tokens
    budget: Budget
    most_rows: int  # inputs at once, of so many tokens; 0 where not even one fits
    most_tokens: int  # of a prompt, with so many inputs at once
    times: Mapping[str, Time]  # of a batch of prompts by either graph, of a step, of an image
    runs: Mapping[str, int]  # in which either graph reads the prompts of a batch

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.budget.total <= self.device.usable_bytes

    @property
    def verdict(self) -> str:
        """Say what fits."""
        rows, tokens = self.demand.rows, self.demand.tokens
        asked = f"{rows} inputs at once, prompts of up to {tokens} tokens"
        if self.fits:
            return f"fits: {asked}"
        figures = self.budget.figures()
        size, name = max((figure.value or 0, name) for name, figure in figures.items() if name != "all")
        over = (self.budget.total - self.device.usable_bytes) / GIB
        return (
            f"does not fit: {asked} need {over:.2f} GiB more than {self.device.name} has; the largest term is {name}, "
            f"{size / GIB:.2f} GiB. {self._remedy()}"
        )

    def _remedy(self) -> str:
        found = []
        if self.most_rows:
            found.append(f"--batch {self.most_rows}")
        if self.most_tokens:
            found.append(f"--tokens {self.most_tokens}")
        if not found:
            return "Export the checkpoint again in a smaller precision, such as --precision int8"
        return f"It fits with {', or with '.join(found)}"

    def figures(self) -> dict[str, dict[str, Figure]]:
        """Return all figures, by section and name."""
        device, demand, rows = self.device, self.demand, self.demand.rows
        usable = "memory less what the driver takes" + (", and the system, which shares it" if device.shared else "")
        memory = self.budget.figures() | {"usable": Figure(device.usable_bytes, "B", f"{usable}; assumed")}
        times, found = self.times, dict[str, Figure]()
        for role, what in PROMPTS.items():
            if role in times:
                time = times[role]
                found[what] = time.figure(f"{rows} of {demand.tokens} tokens, in {self.runs[role]} run(s)")
                found[f"{what}, a second"] = Figure(_rate(rows, time.expected), "", "one batch after the other")
        if "step" in times:
            step, written, together = times["step"], self.rationale, min(rows, demand.cache_rows)
            found |= {
                "step": step.figure(f"a token of each of {together} rows, which read {demand.slots} slots each"),
                "tokens a second": Figure(_rate(together, step.expected), "", "of all rows"),
                "rationales": Figure(_times(written, step.expected), "s", f"{written} steps, after the prompts"),
            }
        found["image"] = times["image"].figure(f"one of {demand.opt_patches} patches")
        return {
            "memory": memory,
            "limits": {
                "inputs at once": Figure(self.most_rows, "", f"most that fit, with prompts of {demand.tokens} tokens"),
                "tokens of a prompt": Figure(self.most_tokens, "", f"most that fit, {rows} at once"),
            },
            "time": found,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the plan in JSON's types."""
        return {
            "estimate": True,
            "device": asdict(self.device) | {"target": self.device.target},
            "batch": self.demand.rows,
            "tokens": self.demand.tokens,
            "rationale": self.rationale,
            "slots": self.demand.slots,
            "fits": self.fits,
            "verdict": self.verdict,
            "most_batch": self.most_rows,
            "most_tokens": self.most_tokens,
            "times": {name: asdict(time) for name, time in self.times.items()},
            "figures": {
                section: {name: figure._asdict() for name, figure in figures.items()}
                for section, figures in self.figures().items()
            },
        }


def make_plan(
    bundle: Bundle, device: Device, *, rows: int, tokens: int | None = None, rationale: int | None = None
) -> Plan:
    """Plan a bundle's engines for batches of `rows` prompts of up to `tokens` tokens; None takes the bundle's limits.

    Raises BackendError for a bundle without graphs that TensorRT reads, OptionError for values beyond the bundle's
    limits and for a precision that the device does not take, MissingExtraError without onnx.
    """
    check_portable(bundle)
    if bundle.manifest.engines_of is not None:
        raise BackendError(f"{bundle.folder} holds engines without their graphs: plan the bundle they were built from")
    check_precisions(bundle.manifest, device)
    longest = bundle.manifest.model.max_rationale_tokens
    if rationale is not None and not 0 <= rationale <= longest:
        raise OptionError(f"rationale is {rationale}: it must be at least 0 and, in this bundle, at most {longest}")
    estimator = Estimator(bundle, device)
    if not 1 <= rows <= estimator.most_rows:
        raise OptionError(f"batch is {rows}: it must be at least 1 and, in this bundle, at most {estimator.most_rows}")
    demand = estimator.demand(rows, tokens)
    return Plan(
        device=device,
        demand=demand,
        rationale=longest if rationale is None else rationale,
        budget=estimator.budget(demand),
        most_rows=_most(estimator.most_rows, lambda each: estimator.fits(each, demand.tokens)),
        most_tokens=_most(estimator.demand(rows).tokens, lambda each: estimator.fits(rows, each)),
        times=estimator.times(demand),
        runs={role: estimator.runs(role, demand) for role in PROMPTS},
    )


def check_precisions(manifest: Manifest, device: Device) -> None:
    """Raise OptionError, with the fix, for the first precision that a device does not take."""
    for name, graph in manifest.graphs.items():
        for precision in (graph.compute, graph.precision):
            if not device.takes(precision):
                option = "--precision" if precision == graph.precision else "--compute"
                raise OptionError(
                    f"the graph {name} is in {precision}, which {device.name} ({device.target}) cannot multiply: "
                    f"export the checkpoint again with {option} {'float16' if precision in FLOATS else 'int8'}"
                )


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to `limit` that fits, 0 where none does; what fits a number fits any smaller one."""
    return bisect_left(range(1, limit + 1), True, key=lambda each: not fits(each))


def _rate(count: int, seconds: float | None) -> float | None:
    return None if seconds is None else count / seconds


def _times(count: int, seconds: float | None) -> float | None:
    return None if seconds is None else count * seconds
