"""The records between processes: frozen, chosen by their keys, and able to make the journey."""

import dataclasses
import inspect
import multiprocessing
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from actors import messages
from actors.messages import CellPaths, CellReport, QueuedJob, Stage, TrainerReport, TrainingSample
from actors.posted import (
    ChatMessage,
    ChatSample,
    TextSample,
    TokenSample,
    TrainConfig,
    TrainRequest,
)

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
TEXT = {"context": "", "continuation": "b"}
TOKENS = {"context_ids": [], "continuation_ids": [2]}


def records() -> list[type[Any]]:
    own = [kind for _, kind in inspect.getmembers(messages, inspect.isclass)]
    return [kind for kind in own if kind.__module__ == messages.__name__]


@pytest.mark.parametrize("kind", records(), ids=lambda kind: kind.__name__)
def test_record_is_frozen(kind: type[Any]) -> None:
    if issubclass(kind, BaseModel):
        assert kind.model_config["frozen"] and kind.model_config["extra"] == "forbid"
    else:
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("posted", "kind"),
    [
        (CHAT, ChatSample),
        (CHAT | {"strip": ["system"], "id": "x", "source": "s", "weight": 2}, ChatSample),
        (TEXT, TextSample),
        (TOKENS, TokenSample),
        (ChatSample(messages=[ChatMessage(role="user", content="q")]), ChatSample),
        (TextSample(context="a", continuation="b"), TextSample),
        (TokenSample(context_ids=[], continuation_ids=[2]), TokenSample),
    ],
    ids=["chat", "chat with all keys", "text", "tokens", "a chat", "a text", "a list of tokens"],
)
def test_kind_of_sample_is_chosen_by_its_keys(posted: Any, kind: type[Any]) -> None:
    (sample,) = TrainRequest.model_validate({"samples": [posted]}).samples
    assert type(sample) is kind


@pytest.mark.parametrize(
    "posted",
    [{}, CHAT | TEXT, TEXT | TOKENS, CHAT | TOKENS, {"text": "x"}, 3, None, [], "messages"],
    ids=str,
)
def test_sample_of_no_kind_or_of_two_is_refused(posted: Any) -> None:
    with pytest.raises(ValidationError):
        TrainRequest.model_validate({"samples": [posted]})


def test_errors_of_a_sample_speak_of_the_kind_that_its_keys_chose() -> None:
    with pytest.raises(ValidationError) as refused:
        TrainRequest.model_validate({"samples": [{"continuation": "b"}]})
    (error,) = refused.value.errors()
    assert (error["type"], error["loc"]) == ("missing", ("samples", 0, "text", "context"))


def sample_records() -> list[Any]:
    sample = TrainingSample("s1", (1, 2), (3,), weight=0.5, source="test", content_hash="abc")
    paths = CellPaths("model", "run", "ledger")
    request = TrainRequest.model_validate({"samples": [CHAT, TEXT, TOKENS]})
    return [
        sample,
        QueuedJob("job", (sample, sample), TrainConfig(epochs=3), 2),
        request,
        CellReport(
            pid=1,
            state="ready",
            reason=None,
            paths=paths,
            stages=(Stage("weights", 1.5, True),),
            restarts=0,
            boot=1,
            trainer=TrainerReport(pid=1, weights_version=7, last_loss=0.5),
        ),
    ]


@pytest.mark.parametrize("record", sample_records(), ids=lambda record: type(record).__name__)
def test_record_arrives_as_it_was_sent(record: Any) -> None:
    here, there = multiprocessing.Pipe()
    here.send(record)
    arrived = there.recv()
    assert type(arrived) is type(record) and arrived == record


def test_fields_cannot_be_changed() -> None:
    sample, _, request, report = sample_records()
    with pytest.raises(FrozenInstanceError):
        sample.weight = 2.0
    with pytest.raises(FrozenInstanceError):
        report.state = "failed"
    with pytest.raises(ValidationError, match="frozen"):
        request.samples = []


def test_steps_of_a_job_are_samples_times_epochs() -> None:
    job = sample_records()[1]
    assert (job.total_steps, job.steps_done) == (6, 2)


def test_shared_files_of_a_boot_lie_in_its_private_directory() -> None:
    paths = CellPaths("/models/m", "/run/r", "/state/ledger")
    inside = [paths.weights, paths.versions, paths.layout, paths.progress, paths.vllm_files]
    inside.append(paths.socket)
    assert len(set(inside)) == 6 and all(path.startswith("/run/r/") for path in inside)
    assert len(paths.socket) < 100, "a Unix socket's path is short"
