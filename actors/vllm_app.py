"""vLLM's own command line, engine client and HTTP application, with what Reverie adds to them.

0.32 keeps them in `entrypoints.launchers`; 0.26, the oldest we support, in
`entrypoints.openai.api_server`. Imported only by the engine actor, after its environment is set.
"""

import inspect
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from uvicorn import Server
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from actors.versions import VersionCounter

try:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
except ImportError:
    from vllm.entrypoints.openai.api_server import build_app, init_app_state
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args


def parse_arguments(arguments: list[str]) -> Namespace:
    """Arguments of `vllm serve`, validated as vLLM does."""
    parsed: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    validate_parsed_serve_args(parsed)
    return parsed


async def build_vllm_app(llm: Any, arguments: Namespace) -> Any:
    """The ASGI application with all of vLLM's OpenAI routes over `llm`."""
    tasks = await llm.get_supported_tasks()
    num_parameters = len(inspect.signature(build_app).parameters)
    app = build_app(*(arguments, tasks, llm.model_config)[:num_parameters])
    await init_app_state(llm, app.state, arguments, tasks)
    for path in app.state.openai_serving_models.base_model_paths:
        path.model_path = path.name  # `/v1/models` shows it, and this machine's paths stay inside.
    return app


class EpochLLM(AsyncLLM):
    """An AsyncLLM that never answers a request from another epoch's prefix cache.

    The KV cache does not know that weights change, but a cached block is only shared between
    requests of equal `cache_salt`. All of vLLM's routes pass through `add_request`: it salts there.
    """

    versions: VersionCounter

    async def add_request(self, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, with the current epoch put in front of the client's own salt."""
        if not isinstance(prompt, dict):
            raise TypeError(f"cannot salt a prompt of type {type(prompt).__name__}")
        salt = f"epoch-{self.versions.epoch}:{prompt.get('cache_salt') or ''}"
        return await super().add_request(
            request_id, {**prompt, "cache_salt": salt}, *args, **kwargs
        )


class NoSignalServer(Server):
    """uvicorn's server without its signal handlers: the actor decides when it ends."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
