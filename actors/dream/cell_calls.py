"""The rest of the cell, as a dream round asks for it: calls of the trainer and the checkpoint."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError, RayTaskError

from actors.calls import within
from actors.errors import Conflict, ReverieError, TooBusy, Unavailable
from actors.messages import GenerationView, JobView, TakeBack
from actors.posted import ChatSample, CheckpointRequest, TrainConfig, TrainRequest
from actors.settings import Settings
from actors.versions import VersionCounter

RETRIES: tuple[float, ...] = (1.0, 5.0, 20.0)
"""Pauses, in seconds, before something that could not be had just then is asked for again."""


class CellCalls:
    """Each call waits with a limit, and asks again where the answer was to try later."""

    def __init__(
        self, settings: Settings, versions: VersionCounter, trainer: Any, checkpoint: Any
    ) -> None:
        self._settings, self._versions = settings, versions
        self._trainer, self._checkpoint = trainer, checkpoint

    def weights_version(self) -> int:
        return self._versions.weights_version

    async def commit(self) -> int:
        made = await self._ask(self._checkpoint.commit, CheckpointRequest(publish=False))
        return int(made.generation)

    async def train(
        self, round_id: str | None, samples: Sequence[ChatSample], config: TrainConfig
    ) -> str:
        request = TrainRequest(samples=list(samples), config=config)
        accepted = await self._ask(self._trainer.submit, request, round_id)
        return str(accepted.job_id)

    async def job(self, job_id: str) -> JobView:
        view: JobView = await self._ask(self._trainer.job, job_id)
        return view

    async def cancel(self, job_id: str) -> None:
        with suppress(Conflict):  # It has come to its end meanwhile.
            await self._ask(self._trainer.cancel, job_id)

    async def generations(self) -> list[GenerationView]:
        views: list[GenerationView] = await self._ask(self._checkpoint.history)
        return views

    async def keep(self, round_id: str) -> None:
        await self._ask(self._trainer.pass_round, round_id)
        await self.commit()

    async def take_back(self, round_id: str, sample_ids: Sequence[str]) -> None:
        await self._ask(self._checkpoint.take_back, TakeBack(tuple(sample_ids)))

    async def _ask(self, method: Any, *arguments: Any) -> Any:
        limit = self._settings.cell.checkpoint_timeout_s
        for pause in (*RETRIES, None):
            try:
                return await within(method.remote(*arguments), limit)
            except RayTaskError as error:
                if not isinstance(error.cause, ReverieError):
                    raise
                if pause is None or not isinstance(error.cause, Unavailable | TooBusy):
                    raise error.cause from None
            except (RayError, TimeoutError):
                raise Unavailable("an actor of the cell went away; it restarts") from None
            await asyncio.sleep(pause)
        raise AssertionError("the last try returns or raises")
