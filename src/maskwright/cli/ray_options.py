"""The options of `--engine ray`, which several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter, Token, validators

from maskwright.cluster.ray_options import RayOptions, parse_resources
from maskwright.errors import MaskwrightError

Engine = Literal["local", "ray"]


def _resources(_type: object, tokens: Sequence[Token]) -> dict[str, float]:
    return parse_resources(tokens[0].value)


@dataclass(kw_only=True)
class EngineOptions:
    """The options of `--engine ray`."""

    engine: Engine = "local"
    """This process, or workers on Ray, on this machine or a cluster (see docs/scale.md)."""
    address: str | None = None
    """Ray cluster: auto, HOST:PORT or ray://HOST:PORT; default: start Ray on this machine."""
    workers: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None
    """Number of processes; default: one per core for many small images; on Ray one per GPU, or per four cores."""
    worker_resources: Annotated[dict[str, float] | None, Parameter(converter=_resources, n_tokens=1)] = None
    """Resources of each worker by Ray's names, such as cpu=4,gpu=0.5; default: the cores are divided."""
    ray_logs: bool = False
    """Show Ray's own messages."""

    def ray(self, local_workers: bool = False) -> RayOptions | None:
        """Return the options of Ray, None for the local engine, which takes --workers if it has `local_workers`.

        Raises:
            MaskwrightError: an option of Ray is given to the local engine.
        """
        if self.engine == "ray":
            return RayOptions(self.address, self.workers, self.worker_resources or {}, self.ray_logs)
        given: dict[str, object] = {"--address": self.address, "--worker-resources": self.worker_resources}
        given |= {"--ray-logs": self.ray_logs or None, "--workers": None if local_workers else self.workers}
        for name, value in given.items():
            if value is not None:
                raise MaskwrightError("is an option of the engine ray", where=name, remedy="add --engine ray")
        return None
