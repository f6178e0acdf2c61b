"""Starting or joining Ray, and running chunks of work on a pool of workers with Ray Data.

Only descriptions of the work and outcomes travel through Ray's object store, never images or masks, so its memory stays
small. Ray Data queues two chunks for each worker, and starts another worker where one dies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import signal
import sys
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from maskwright.cluster.ray_options import RayOptions, WorkerPlan, plan_workers
from maskwright.errors import MaskwrightError, one_line

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 15  # for an address to accept a connection
_START_SECONDS = 120  # for a node to run its first task
_STARTS = 3  # of a Ray on this machine: it gives up after 30 seconds, which a busy machine may need
_OBJECT_STORE_BYTES = 500_000_000  # of a Ray on this machine: holds the model and the outcomes
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # otherwise Ray warns about it
    "RAY_worker_niceness": "0",  # of 15 by default: beside other programs, workers would be far slower than `predict`
}
_QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # of the C++ part, which writes past sys.stderr
}
_PACKAGES = ("maskwright", "torch")  # whose versions decide the results


class Attempts:
    """A Ray actor that counts what was begun and not finished, and outlives the workers."""

    def __init__(self) -> None:
        self._count: Counter = Counter()

    def add(self, key: object, amount: int) -> int:
        """Add to the count of a key, and return it."""
        self._count[key] += amount
        return self._count[key]


class Session:
    """A connection to Ray; see `ray_session`."""

    def __init__(self, options: RayOptions, is_local: bool) -> None:
        self.options, self.is_local = options, is_local

    def plan(self, device: str | None) -> WorkerPlan:
        """Return the workers for a device name as `Predictor` takes it; see `plan_workers`."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        plan = plan_workers(nodes, self.options, on_cpu=device is not None and device.startswith("cpu"))
        if plan.is_waiting:
            logger.warning("%d workers do not fit into the cluster now; Ray waits for more nodes", plan.workers)
        return plan

    def check_nodes(self, paths: Sequence[str | Path]) -> None:
        """Check that every node has the same versions as this process, and sees these paths.

        Raises:
            MaskwrightError: one does not, or does not answer.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self.is_local:
            return
        ours, _ = _make_description()(_PACKAGES, [])
        describe = ray.remote(num_cpus=0)(_make_description())
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        strategy = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes}
        names = [str(path) for path in paths]
        answers = {
            node: describe.options(scheduling_strategy=strategy[node]).remote(_PACKAGES, names) for node in nodes
        }
        for node, answer in answers.items():
            with _ray_errors(f"node {nodes[node]}"):
                versions, missing = ray.get(answer, timeout=_START_SECONDS)
            check_node(nodes[node], ours, versions, missing)

    def run(self, worker: type, job: object, chunks: Sequence[object], plan: WorkerPlan) -> Iterator[Any]:
        """Run the chunks on a pool of workers and yield their outcomes, in any order.

        Args:
            worker: made once per process, by `worker(job, count)`; see `Attempts.add` for `count`. Called with the
                number and the content of a chunk, it returns the outcome. A worker that dies is replaced, and the chunk
                that it has not finished is run again.
            job: sent once to each node.
            chunks: pickled.
            plan: of the workers.

        Raises:
            MaskwrightError: Ray or a worker fails.
        """
        import pyarrow as pa
        import ray
        import ray.data
        import ray.util.client

        if ray.util.client.ray.is_connected():  # over which Ray Data does not work
            yield from self._run_inside(worker, job, chunks, plan)
            return
        with _ray_errors("Ray"):
            attempts = ray.remote(num_cpus=0, max_restarts=-1)(Attempts).remote()
            reference = ray.put(job)  # kept until all is done, so that workers can be replaced
            tables = [pa.table({"number": [i], "content": [pickle.dumps(chunk)]}) for i, chunk in enumerate(chunks)]
            resources = dict(plan.resources)
            dataset = ray.data.from_arrow(tables).map_batches(
                ChunkRunner,
                fn_constructor_args=(worker, [reference], attempts),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=resources.pop("CPU"),
                num_gpus=resources.pop("GPU", 0),
                resources=resources or None,
                compute=ray.data.ActorPoolStrategy(
                    size=min(plan.workers, len(chunks)), max_tasks_in_flight_per_actor=2
                ),
            )
            for row in dataset.iter_rows():
                yield pickle.loads(row["outcome"])
            del reference

    def _run_inside(self, *arguments: Any) -> Iterator[Any]:
        """Run the chunks from a process inside the cluster that a ray:// address leads to."""
        import ray

        with _ray_errors(str(self.options.address)):
            driver: Any = ray.remote(num_cpus=0)(InsideCluster).remote(*arguments)
            while (packed := ray.get(driver.next.remote())) is not None:
                yield pickle.loads(packed)


class InsideCluster:
    """A Ray actor that calls `Session.run`."""

    def __init__(self, *arguments: Any) -> None:
        self._outcomes = Session(RayOptions(), is_local=False).run(*arguments)

    def next(self) -> bytes | None:
        """Return the next outcome, pickled; None at the end."""
        outcome = next(self._outcomes, None)
        return None if outcome is None else pickle.dumps(outcome)


class ChunkRunner:
    """What Ray Data calls in a worker process: unpacks chunks, and packs outcomes."""

    def __init__(self, worker: type, references: list, attempts: Any) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        import ray

        self._worker = worker(ray.get(references[0]), lambda *change: ray.get(attempts.add.remote(*change)))

    def __call__(self, table: Any) -> dict[str, list]:
        """Run the chunks of a table."""
        chunks = zip(table.column("number").to_pylist(), table.column("content").to_pylist(), strict=True)
        return {"outcome": [pickle.dumps(self._worker(number, pickle.loads(chunk))) for number, chunk in chunks]}


@contextlib.contextmanager
def ray_session(options: RayOptions) -> Generator[Session]:
    """Start Ray on this machine, or join the cluster at an address, and leave it at the end.

    Raises:
        MaskwrightError: Ray is not installed, or nothing answers at the address.
    """
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    variables = _ENVIRONMENT | ({} if options.logs else _QUIET) | (_make_token() if address == "local" else {})
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    with contextlib.ExitStack() as stack:
        if not options.logs:
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        ray = _import_ray(options.logs)
        if ray.is_initialized():  # by a program that calls this function
            yield Session(options, address == "local")
            return
        if address != "local":
            _check_answers(address)
        with _ray_errors(address if address != "local" else "Ray"):
            _start(ray, address, options.logs)
        stack.callback(ray.shutdown)
        yield Session(options, address == "local")


def _make_token() -> dict[str, str]:
    """Return a token for a Ray on this machine, which listens on all addresses and runs any code that it is sent."""
    if "RAY_AUTH_MODE" in os.environ or "ray" in sys.modules:  # Ray reads them when it is imported
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _import_ray(logs: bool) -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise MaskwrightError("needs Ray", where="--engine ray", remedy="pip install 'maskwright[ray]'") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = logs
    context.print_on_execution_start = logs
    for name in () if logs else ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return ray


def _start(ray: Any, address: str, logs: bool) -> None:
    settings = {"log_to_driver": logs, "logging_level": logging.INFO if logs else logging.CRITICAL}
    if address == "local":
        settings |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    on_sigterm = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    for attempt in range(1, _STARTS + 1):
        try:
            with contextlib.nullcontext() if logs else _discarded_stderr():
                ray.init(address, **settings)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # that of Ray prints the addresses of its stack
            return
        except Exception as error:
            if address != "local" and isinstance(error, ConnectionError):
                raise _not_joined(address) from None
            if address != "local" or "timed out" not in str(error).lower() or attempt == _STARTS:
                raise
            ray.shutdown()


def _not_joined(address: str) -> MaskwrightError:
    """Return the error for a cluster that cannot be joined; at HOST:PORT, something answered before."""
    tokens = "if it uses tokens, set RAY_AUTH_MODE=token here as on its machines"
    if address == "auto":
        start = "start one with 'ray start --head', or name its address, HOST:6379"
        return MaskwrightError(
            "no Ray cluster that can be joined runs on this machine",
            where="--address auto",
            remedy=f"{start}; {tokens}",
        )
    return MaskwrightError("the Ray cluster refuses to be joined", where=address, remedy=tokens)


@contextlib.contextmanager
def _discarded_stderr() -> Generator[None]:
    """Discard what this process writes to file descriptor 2: Ray's C++ part reports its log level there."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as silence:
            os.dup2(silence.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _check_answers(address: str) -> None:
    """Check that something speaks gRPC at HOST:PORT; Ray itself tries for minutes.

    Raises:
        MaskwrightError: nothing answers.
    """
    target = address.removeprefix("ray://")
    if ":" not in target or os.environ.get("RAY_USE_TLS") == "1":
        return
    import grpc  # tensorboard depends on it

    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_ANSWER_SECONDS)
        except grpc.FutureTimeoutError:
            raise MaskwrightError(
                f"no Ray cluster answers within {_ANSWER_SECONDS} seconds",
                where=address,
                remedy="check --address: HOST:6379 inside the cluster, ray://HOST:10001 from outside",
            ) from None


@contextlib.contextmanager
def _ray_errors(where: str) -> Generator[None]:
    """Turn errors of Ray into one line."""
    try:
        yield
    except MaskwrightError:
        raise
    except Exception as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, MaskwrightError):
            raise cause from None
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        found = lines[-1] if len(lines) > 1 and lines[-1].split(":")[0].endswith("Error") else one_line(cause)
        raise MaskwrightError(
            f"failed ({type(cause).__name__}: {found[:500]})", where=where, remedy="--ray-logs shows Ray's own messages"
        ) from (error if sys.flags.dev_mode else None)


def _make_description() -> Any:
    """Return a function that Ray sends as code, since the node may not have maskwright."""

    def describe(packages, paths):
        import importlib.metadata
        import os

        versions = {}
        for name in packages:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = None
        return versions, [path for path in paths if not os.path.exists(path)]

    return describe


def check_node(node: str, ours: dict[str, str | None], theirs: dict[str, str | None], missing: Sequence[str]) -> None:
    """Check what a node answered: versions by package, and the paths that it does not see.

    Raises:
        MaskwrightError: a version differs, or a path is missing.
    """
    for name, version in ours.items():
        if theirs[name] != version:
            found = f"has {name} {theirs[name]}" if theirs[name] else f"does not have {name}"
            raise MaskwrightError(
                f"{found}, and this process has {version}", where=f"node {node}", remedy="install the same version"
            )
    if missing:
        raise MaskwrightError(
            f"does not see {missing[0]}", where=f"node {node}", remedy="use a path that all machines share, or a URL"
        )
