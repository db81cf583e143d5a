"""Engine for a Ray cluster: shards of vectors, trainings and evaluations are tasks that Ray distributes over its nodes.

Every node must see the run folder and the study's files under the same paths. If a worker or node is lost, its task is
repeated on another one, which resumes from the shards and checkpoints in the run folder.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from posmask.data.activations import StorageDtype
from posmask.data.harvest import Contexts, shards_here
from posmask.data.tokens import Tokens
from posmask.errors import BadSetting, DegenerateResult, MissingExtra, first_line
from posmask.evaluation.suite import EvaluationData
from posmask.kernels import devices, runtime
from posmask.progress import Show, Stage, progress_bars, shown_by, stages_finished, throttled
from posmask.storage.record import check_listed, claim_of
from posmask.study.cell import train_cell
from posmask.study.engines import make_target, needs, stages_of
from posmask.study.harvests import prepare
from posmask.study.saes import untrained
from posmask.study.settings import StudySettings
from posmask.study.source import Source
from posmask.study.targets import Target, state_of, targets_of

__all__ = ["Cluster", "connected"]

_RETRIES = 5
"""How often a task is repeated on another worker after its own is lost."""
_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 10
_HTTP2_SETTINGS = 4
"""The type of a frame that carries settings."""
Step = Literal["train", "evaluate"]


@contextmanager
def connected(study: StudySettings, n_jobs: int) -> Iterator["Cluster"]:
    """Connect to the cluster of RAY_ADDRESS or of this machine, or start one on this machine.

    Args:
        n_jobs: number of simultaneous tasks. They share the CPUs; on GPUs each task has its own.

    Raises:
        MissingExtra: Ray is not installed.
        BadSetting: the cluster cannot be reached, or has no GPU for a study that asks for one.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtra("--engine ray needs a package that is not installed: pip install 'posmask[ray]'") from None
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        if address not in ("", "auto", "local"):
            host, _, port = address.removeprefix("ray://").rpartition(":")
            _check_answers(host, int(port))
        ray.init(logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        raise BadSetting(
            f"no Ray cluster can be reached at {address or 'this machine'} ({first_line(error)}): "
            "correct RAY_ADDRESS, or unset it to start one on this machine"
        ) from None
    try:
        yield Cluster(ray, study, n_jobs)
    finally:
        ray.shutdown()


def _check_answers(host: str, port: int) -> None:
    """Check that a gRPC server listens, within seconds; Ray itself tries for many minutes.

    Such a server answers the first bytes of HTTP/2 (RFC 9113, section 3.4) with its settings.

    Raises:
        OSError: nothing listens, or what listens says nothing or something else.
    """
    with socket.create_connection((host, port), timeout=_ANSWER_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return  # It would speak after a handshake with certificates only.
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _HTTP2_SETTINGS, 0, 0, 0, 0, 0]))
        try:
            answer = connection.recv(4)
        except TimeoutError:
            raise OSError(f"what listens there said nothing for {_ANSWER_SECONDS} s") from None
    if len(answer) < 4 or answer[3] != _HTTP2_SETTINGS:
        raise OSError("what listens there is no Ray cluster")


class Cluster:
    """An engine; see `engines.Engine`."""

    def __init__(self, ray: Any, study: StudySettings, n_jobs: int) -> None:
        self._ray = ray
        self._n_jobs = n_jobs
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        n_gpus = int(study.device.startswith("cuda"))
        if n_gpus and study.device != "cuda":
            raise BadSetting(f"device = {study.device!r}, but Ray gives each task a GPU of its own: use device=cuda")
        if n_gpus and not any(node.get("GPU", 0) >= 1 for node in nodes):
            raise BadSetting(
                f"device = {study.device!r}, but no node of the Ray cluster has a GPU: take cpu, or add one"
            )
        n_processors = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        if not n_processors:
            raise BadSetting("no node of the Ray cluster has a processor to give: start nodes with --num-cpus above 0")
        n_cpus = max(1, min(*n_processors, sum(n_processors) // n_jobs))
        self._task = ray.remote(num_cpus=n_cpus, num_gpus=n_gpus, max_retries=_RETRIES)
        self._worker = _Worker(os.getcwd(), n_cpus, self._board(), study)

    def _board(self) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=False)
        return self._ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()

    def compute(
        self,
        tokens: Tokens,
        wanted: list[Contexts],
        label: str,
        storage_dtype: StorageDtype,
        advance: Callable[[int], None],
    ) -> Iterator[dict[str, Tensor]]:
        """See `activations.ComputeShards`. No more shards are under way than tasks may run at a time."""
        compute = self._task(_compute_shard).options(name=f"harvest {label}")
        everywhere = self._ray.put(tokens)
        under_way: list[Any] = []
        for number, contexts in enumerate(wanted):
            for ahead in wanted[number + len(under_way) : number + self._n_jobs]:
                under_way.append(compute.remote(self._worker, everywhere, ahead, label, storage_dtype))
            yield self._result(under_way.pop(0), f"harvest {label}")
            advance(sum(int(tokens.keep[chunk].sum()) for chunk in contexts))

    def make(
        self, study: StudySettings, todo: list[Target], data: EvaluationData, root: Path, say: Callable[[str], None]
    ) -> None:
        """See `engines.Engine`."""
        waiting: dict[str, tuple[Target, Step]] = {
            target.label: (target, "evaluate" if target.cell is None else "train") for target in todo
        }
        running: dict[Any, str] = {}
        try:
            with progress_bars() as show:
                while waiting:
                    missing = {target.folder for target, _ in waiting.values()}
                    for label, (target, step) in waiting.items():
                        ready = (
                            target.init_folder not in missing if step == "train" else not needs(target, root, missing)
                        )
                        if ready and label not in running.values() and len(running) < self._n_jobs:
                            task = self._task(_make).options(name=f"{step} {label}")
                            running[task.remote(self._worker, root.resolve(), label, step)] = label
                    finished, _ = self._ray.wait(list(running), timeout=_LOOK_SECONDS)
                    for stage in self._ray.get(self._worker.board.read.remote()):
                        show(stage)
                    for task in finished:
                        label = running.pop(task)
                        target, step = waiting.pop(label)
                        for line in self._result(task, f"{step} {label}"):
                            say(line)
                        if step == "train":
                            waiting[label] = target, "evaluate"
                        else:
                            stages_finished(stages_of(target))
        finally:
            for task in running:
                self._ray.cancel(task, force=True)

    def _result(self, task: Any, what: str) -> Any:
        """What a task gave.

        Raises:
            DegenerateResult: its worker was lost again and again. Else what the task raised.
        """
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._ray.get(task)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise DegenerateResult(
                f"the workers of {what!r} were lost {_RETRIES + 1} times ({type(error).__name__}): look at their "
                "nodes' memory, or lower --jobs; what is finished stays, and the same command goes on from there"
            ) from None


class _Board:
    """The latest state of each stage that workers report."""

    def __init__(self) -> None:
        self._at: dict[str, Stage] = {}

    def write(self, stage: Stage) -> None:
        self._at[stage.label] = stage

    def read(self) -> list[Stage]:
        """Return the states that are new since the last call."""
        news, self._at = self._at, {}
        return list(news.values())


class _Worker:
    """What a task must know of the process that asked for it."""

    def __init__(self, folder: str, n_threads: int, board: Any, study: StudySettings) -> None:
        self.board = board
        self.study = study
        self._folder = folder
        self._n_threads = n_threads

    @contextmanager
    def at_work(self) -> Iterator[None]:
        os.chdir(self._folder)  # Study files may name what lies beside them.
        runtime.keep_freed_memory()
        with runtime.threads(self._n_threads), shown_by(self._report()):
            yield

    def _report(self) -> Show:
        return throttled(lambda stage: self.board.write.remote(stage), _LOOK_SECONDS)


_at_hand: dict[tuple[str, str], Any] = {}
"""This worker's last model, and the last study's data: each is for many tasks."""


def _kept(kind: str, key: str, make: Callable[[], Any]) -> Any:
    if (kind, key) not in _at_hand:
        for other in [known for known in _at_hand if known[0] == kind]:
            del _at_hand[other]
        _at_hand[kind, key] = make()
    return _at_hand[kind, key]


def _source(study: StudySettings) -> Source:
    devices.check_device(study.device)
    key = f"{study.device} {study.model.model_dump_json()}"
    return _kept("source", key, lambda: Source(study.model, study.device))


def _compute_shard(
    worker: _Worker, tokens: Tokens, contexts: Contexts, label: str, storage_dtype: StorageDtype
) -> dict[str, Tensor]:
    with worker.at_work():
        (shard,) = shards_here(_source(worker.study).loaded, tokens, [contexts], label, storage_dtype, lambda n: None)
        return shard


def _make(worker: _Worker, root: Path, label: str, step: Step) -> list[str]:
    """Train a cell as far as the checkpoint at its end, or make the rest of its folder; return messages."""
    messages: list[str] = []
    study = worker.study
    with worker.at_work():
        source = _source(study)
        (target,) = (target for target in targets_of(study, source, root) if target.label == label)
        data = _kept("data", f"{root} {study.model_dump_json()}", lambda: prepare(study, source, root))
        with claim_of(root, target.folder, wait=True):
            if step == "evaluate":
                make_target(study, target, data, root, messages.append)
            elif state_of(target, verify=True) not in ("finished", "trained"):
                check_listed(root, label, target.made_from)
                sae, _ = untrained(study, target, data.training)
                train_cell(study, target, sae, data, keeps_end=True)
    return messages
