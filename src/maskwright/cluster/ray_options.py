"""What a command says about Ray, and the number and the resources of the workers that follow from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from maskwright.errors import MaskwrightError

CORES_PER_WORKER = 4  # without accelerators and without --workers: more cores in one process are used less well
_CPU, _GPU = "CPU", "GPU"


@dataclass(frozen=True)
class RayOptions:
    """How to run on Ray.

    Attributes:
        address: "auto", "HOST:PORT" or "ray://HOST:PORT" of a running cluster; None starts Ray on this machine, unless
            the environment variable RAY_ADDRESS names a cluster.
        workers: number of workers; None fills the cluster.
        resources: of each worker, by Ray's names: CPU, GPU, or any other that the cluster has. What is missing is
            chosen by `plan_workers`.
        logs: whether Ray's own messages are shown.
    """

    address: str | None = None
    workers: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    logs: bool = False


@dataclass(frozen=True)
class WorkerPlan:
    """Number of workers, and what Ray reserves for each; `threads` is the number of PyTorch threads."""

    workers: int
    resources: Mapping[str, float]
    is_waiting: bool = False

    @property
    def threads(self) -> int:
        """Cores of each worker, at least 1."""
        return max(1, int(self.resources[_CPU]))


def parse_resources(text: str) -> dict[str, float]:
    """Parse "cpu=4,gpu=0.5,NPU=1"; cpu and gpu in any case, other names as the cluster has them.

    Raises:
        MaskwrightError: the text has another form.
    """
    resources = {}
    for part in text.split(","):
        name, _, amount = part.strip().partition("=")
        if not name or not re.fullmatch(r"\d+(\.\d+)?", amount):
            raise MaskwrightError(f"expected a list like cpu=4,gpu=1, found '{text}'", where="--worker-resources")
        resources[name.upper() if name.lower() in ("cpu", "gpu") else name] = float(amount)
    return resources


def plan_workers(nodes: Sequence[Mapping[str, float]], options: RayOptions, on_cpu: bool) -> WorkerPlan:
    """Divide the cores and accelerators of a cluster among workers.

    By default there is one worker for each GPU, or one for every `CORES_PER_WORKER` cores of a node without any. Each
    gets as many cores as fit, so that the workers of a node divide its cores.

    Args:
        nodes: resources of each node, by Ray's names.
        options: its workers and resources are kept.
        on_cpu: whether accelerators are not to be used.

    Raises:
        MaskwrightError: the cluster has no cores, or fewer than there are workers.
    """
    each = dict(options.resources)
    if not on_cpu and not set(each) - {_CPU} and any(node.get(_GPU) for node in nodes):
        each[_GPU] = 1
    uses_accelerators = any(amount for name, amount in each.items() if name != _CPU)
    workers = options.workers
    if workers is None:
        smallest = {_CPU: each.get(_CPU, 1 if uses_accelerators else CORES_PER_WORKER)}
        workers = _count(nodes, each | smallest) or sum(node.get(_CPU, 0) >= 1 for node in nodes)
    if _CPU in each:
        return WorkerPlan(workers or 1, each, is_waiting=_count(nodes, each) < workers)
    most = int(max((node.get(_CPU, 0) for node in nodes), default=0))
    for cores in range(most, 0, -1):
        if workers and _count(nodes, each | {_CPU: cores}) >= workers:
            return WorkerPlan(workers, each | {_CPU: cores})
    wanted = ", ".join(f"{name} {amount:g}" for name, amount in ({_CPU: 1} | each).items())
    total = {name: sum(node.get(name, 0) for node in nodes) for name in {_CPU: 1} | each}
    raise MaskwrightError(
        f"{workers or 1} workers with {wanted} each do not fit into the cluster, which has "
        + ", ".join(f"{name} {amount:g}" for name, amount in total.items()),
        remedy="lower --workers or --worker-resources; with cpu=N there, Ray waits for more nodes",
    )


def _count(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """Return the number of workers that fit into the nodes."""
    needed = {name: amount for name, amount in each.items() if amount}
    return sum(
        min((int(node.get(name, 0) / amount + 1e-9) for name, amount in needed.items()), default=0) for node in nodes
    )
