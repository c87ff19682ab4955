"""Reverie's own numbers in Prometheus' text format; vLLM's follow them on the same route.

    actors' reports --> cell --> Door._report --+
    Latencies, where bytes pass ----------------+--> families --> text, at each scrape

Counters are kept where something happens, and travel in the reports, so no scrape is needed for
them to count. Each begins at 0 with the process that counts; within a boot none goes back.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from actors.distribution import Distribution
from actors.messages import CellReport, CheckpointReport, DreamReport, TrainerReport
from actors.settings import Settings
from actors.versions import VersionCounter
from door.latencies import Latencies

STATES: Final = ("starting", "ready", "recovering", "stopping", "failed")


@dataclass(frozen=True, eq=False)
class Metrics:
    """What the door knows at this moment."""

    settings: Settings
    report: CellReport | None
    versions: VersionCounter | None
    ongoing: int
    latencies: Latencies

    def text(self) -> str:
        """As Prometheus reads it."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry).decode()

    def collect(self) -> Iterator[Metric]:
        """All families; those of an actor that is away, or of what is not known, are left out."""
        report = self.report
        yield from self._of_door()
        if report is not None:
            yield from _of_cell(report)
            yield from filter(None, _of_trainer(report.trainer) if report.trainer else ())
            yield from filter(None, _of_checkpoint(report.checkpoint) if report.checkpoint else ())
            yield from filter(None, _of_dream(report.dream) if report.dream else ())
        yield from self.latencies.registry.collect()

    def _of_door(self) -> Iterator[Metric]:
        is_ready = self.report is not None and self.report.state == "ready"
        limit = self.settings.trainer.duty
        yield GaugeMetricFamily("reverie_ready", "Whether the model answers and learns", is_ready)
        yield GaugeMetricFamily("reverie_ongoing_requests", "Inside the ingress", self.ongoing)
        yield GaugeMetricFamily("reverie_duty_limit", "Share of the time to train in", limit)
        if self.versions is not None:
            version, epoch = self.versions.weights_version, self.versions.epoch
            yield GaugeMetricFamily("reverie_weights_version", "Of the live weights", version)
            yield GaugeMetricFamily("reverie_epoch", "Era of cached prefixes", epoch)


def _of_cell(report: CellReport) -> list[Metric]:
    states = {state: state == report.state for state in STATES}
    private = {role: of.private_bytes for role, of in report.memory.items()}
    return [
        _counter("restarts", "Restarts of the cell since it was started", report.restarts),
        _by("cell_state", "What the cell is doing", "state", states),
        _by("private_bytes", "Memory that is a role's alone", "role", private),
    ]


def _of_trainer(trainer: TrainerReport) -> list[Metric | None]:
    seconds, is_training = trainer.step_seconds, trainer.job_id is not None
    return [
        _counter("steps", "Optimizer steps", sum(seconds.counts)),
        _counter("learned_tokens", "Tokens of continuations", trainer.learned_tokens),
        _histogram("step_seconds", "Duration of an optimizer step", seconds),
        _gauge("duty", "Share of the time to train in, just now", trainer.duty),
        _gauge("loss", "Loss of the newest step", trainer.last_loss),
        _gauge("update_rms", "Newest update over its learning rate", trainer.last_update_rms),
        _gauge("changed_share", "Of the weights, by the newest step", trainer.last_changed),
        _gauge("limited_tensors", "Clipped in the newest step", trainer.last_limited),
        _gauge("queued_samples", "Accepted and not yet trained", trainer.queued_samples),
        _by("ledger_samples", "Samples that were accepted", "state", trainer.samples),
        _gauge("training", "Whether a job is being trained", is_training),
        _gauge("weights_bytes", "The one copy of the weights", trainer.weights_bytes),
        _gauge("optimizer_state_bytes", "The optimizer's state", trainer.state_bytes),
    ]


def _of_checkpoint(checkpoint: CheckpointReport) -> list[Metric | None]:
    return [
        _gauge("generation", "Newest that is durable", checkpoint.generation),
        _gauge("public_generation", "In the public directory", checkpoint.public_generation),
        _gauge("drift_changed_share", "Weights, by the newest commit", checkpoint.changed_share),
        _histogram("commit_seconds", "Duration of a commit", checkpoint.commit_seconds),
        _histogram("commit_stall_seconds", "The trainer waited", checkpoint.stall_seconds),
        _counter("commit_bytes", "What commits wrote to the journal", checkpoint.commit_bytes),
    ]


def _of_dream(dream: DreamReport) -> list[Metric | None]:
    return [
        _gauge("drift_kl_nats", "KL from the base on the canaries, a token", dream.kl),
        _gauge("dream_rounds_asked", "Rounds that wait", dream.asked),
        _gauge("dreaming", "Whether a round is open", dream.round_id is not None),
        _gauge("candidates_proposed", "Candidates that wait", dream.proposed),
    ]


def _gauge(name: str, text: str, value: float | None) -> Metric | None:
    return None if value is None else GaugeMetricFamily(f"reverie_{name}", text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"reverie_{name}", text, value)


def _by(name: str, text: str, label: str, values: Mapping[Any, float]) -> Metric:
    family = GaugeMetricFamily(f"reverie_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _histogram(name: str, text: str, values: Distribution) -> Metric:
    return HistogramMetricFamily(f"reverie_{name}", text, values.buckets(), values.total)
