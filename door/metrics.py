"""Reverie's own numbers in Prometheus' text format; vLLM's follow them on the same route."""

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from actors.messages import CellReport
from actors.versions import VersionCounter


def render(report: CellReport | None, versions: VersionCounter | None, ongoing: int) -> str:
    """The state of the cell right now; nothing is kept between two scrapes."""
    registry = CollectorRegistry()

    def show(name: str, text: str, value: float | None) -> None:
        if value is not None:
            Gauge(f"reverie_{name}", text, registry=registry).set(value)

    is_ready = report is not None and report.state == "ready"
    show("ready", "Whether the model answers and learns", float(is_ready))
    show("ongoing_requests", "Requests inside the ingress", ongoing)
    if versions is not None:
        show(
            "weights_version",
            "Optimizer steps that the live weights hold",
            versions.weights_version,
        )
        show("epoch", "Era of cached prefixes", versions.epoch)
    if report is not None:
        show("restarts", "Restarts of the cell since it was started", report.restarts)
        if report.trainer is not None:
            trainer = report.trainer
            show("queued_samples", "Accepted samples not yet trained", trainer.queued_samples)
            show("last_loss", "Loss of the newest step", trainer.last_loss)
            show("step_seconds", "Duration of the newest step", trainer.last_step_s)
            show("update_rms", "Newest update over its learning rate", trainer.last_update_rms)
            show("changed_share", "Share of weights the newest step changed", trainer.last_changed)
            show("limited_tensors", "Tensors whose newest update was clipped", trainer.last_limited)
            show("weights_bytes", "Size of the one copy of the weights", trainer.weights_bytes)
            show("optimizer_state_bytes", "Size of the optimizer's state", trainer.state_bytes)
        if report.checkpoint is not None:
            show("generation", "Newest published generation", report.checkpoint.generation)
    return generate_latest(registry).decode()
