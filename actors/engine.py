"""The only actor that starts vLLM: an AsyncLLM, its child process, vLLM's own HTTP application.

    ingress --bytes--> engine.sock (0600) --> vLLM's app --> AsyncLLM --> engine process (weights)

Owns the child's life and the socket. Knows nothing of keys, limits or training.
"""

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any, Final

import psutil
import ray

from actors import logs
from actors.errors import BootFailed
from actors.messages import CellPaths, EngineReport
from actors.run_dir import SHARED_MEMORY, VLLM_FILES
from actors.settings import Settings
from actors.versions import VersionCounter

KEEP_ALIVE_S: Final = 600
"""Idle time of the ingress's pooled connections; longer than any pause of a client's."""
CLOSE_TIMEOUT_S: Final = 2
"""Who is still answered then has been waited for already, see `Cell.stop`."""
SOCKET_BACKLOG: Final = 1024
MAX_ANSWERS_PER_REQUEST: Final = 64
MIN_BATCH_TOKENS: Final = 2048
"""Of all prompts that are read at once."""


class Engine:
    """One vLLM engine over the cell's shared weight memory."""

    def __init__(self, settings: Settings, paths: CellPaths) -> None:
        self._settings = settings
        self._paths = paths
        self._llm: Any = None
        self._server: Any = None
        self._serving: asyncio.Task[None] | None = None
        self._end_of_pause: asyncio.Task[None] | None = None
        self._max_model_len = 0
        self._version = ""
        # vLLM reads these when it is imported, and its child inherits them.
        os.environ.update(_environment(settings))

    def __repr__(self) -> str:
        return f"engine of {self._paths.model}"

    @ray.method
    async def start(self) -> EngineReport:
        """Load the public model into shared memory and serve it on the socket.

        Blocks this actor until vLLM is up (10 to 30 s for a small model). Raises BootFailed.
        """
        from uvicorn import Config
        from vllm import __version__
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform

        from actors.vllm_app import EpochLLM, NoSignalServer, build_vllm_app, parse_arguments

        self._version = __version__
        versions = VersionCounter(self._paths.versions)
        logs.configure(self._settings.logs, "engine", lambda: versions.weights_version)
        if self._settings.engine.enforce_eager and current_platform.is_cpu():
            # Else all wait for a compiler, some 20 s, when log-probabilities are first asked for.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        arguments = parse_arguments(self._arguments())
        try:
            engine_args = AsyncEngineArgs.from_cli_args(arguments)
            self._llm = EpochLLM.from_engine_args(engine_args)
            self._llm.versions = versions
        except Exception as error:
            raise BootFailed(f"vLLM did not start: {error}") from None
        Path(self._paths.vllm_files).write_text("\n".join(_shared_files()))
        app = await build_vllm_app(self._llm, arguments)
        listener = _listen(self._paths.socket)
        config = Config(app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_S)
        self._server = app.state.server = NoSignalServer(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            if self._serving.done():
                raise BootFailed(f"vLLM's application did not start: {self._serving.exception()}")
            await asyncio.sleep(0.02)
        return self._report()

    def _arguments(self) -> list[str]:
        from vllm.platforms import current_platform

        engine = self._settings.engine
        model_dir = Path(self._paths.model_dir)
        self._max_model_len = _max_model_len(model_dir, engine.max_model_len)
        extra = {
            "weights": self._paths.weights,
            "layout": self._paths.layout,
            "progress": self._paths.progress,
        }
        arguments = {
            "--model": str(model_dir),
            "--served-model-name": model_dir.name,
            "--load-format": "reverie",
            "--model-loader-extra-config": json.dumps(extra),
            "--worker-extension-cls": "apollo.weights.plugin.WorkerExtension",
            "--dtype": _dtype(model_dir),
            "--max-model-len": str(self._max_model_len),
            "--max-num-seqs": str(engine.max_num_seqs),
            "--kv-cache-memory-bytes": str(engine.kv_cache_bytes),
        }
        flags = ["--disable-fastapi-docs"]
        if current_platform.is_cpu():
            # vLLM winds the generator of a seeded request back after a part of its prompt, which a
            # CPU's generator cannot do: its process would end. So prompts are read in one go.
            flags.append("--no-enable-chunked-prefill")
            arguments["--max-num-batched-tokens"] = str(max(self._max_model_len, MIN_BATCH_TOKENS))
        if engine.enforce_eager:
            flags.append("--enforce-eager")
        if engine.tool_call_parser:
            flags += ["--enable-auto-tool-choice", "--tool-call-parser", engine.tool_call_parser]
        return [part for pair in arguments.items() for part in pair] + flags

    @ray.method
    async def report(self) -> EngineReport:
        """The engine's health as of now; `is_healthy` is False as soon as the child is gone."""
        return self._report()

    def _report(self) -> EngineReport:
        children = tuple(
            child.pid
            for child in psutil.Process().children(recursive=True)
            if child.status() != psutil.STATUS_ZOMBIE
        )
        reason = None
        if self._llm is None:
            reason = "vLLM has not started"
        elif self._llm.errored:
            reason = "vLLM's engine process died"
        elif self._serving is None or self._serving.done():
            reason = "vLLM's application stopped"
        return EngineReport(
            pid=os.getpid(),
            child_pids=children,
            is_healthy=reason is None,
            max_model_len=self._max_model_len,
            reason=reason,
            vllm_version=self._version,
        )

    @ray.method
    async def digest(self, name: str) -> str:
        """SHA-256 of the engine parameter `name`, computed in vLLM's process."""
        answers = await self._llm.collective_rpc("reverie_digest", args=(name,))
        return str(answers[0])

    @ray.method
    async def pause(self, limit_s: float) -> None:
        """Run no forward pass until `resume`, or until `limit_s` have passed; requests wait.

        Blocks this call until the pass in progress has ended.
        """
        await self._resume()
        # First the end, so that there is one whatever becomes of this call and its caller.
        self._end_of_pause = asyncio.create_task(self._resume_after(limit_s))
        await self._llm.pause_generation(mode="keep", clear_cache=False)

    @ray.method
    async def resume(self) -> None:
        """End a pause. Idempotent."""
        await self._resume()

    async def _resume(self) -> None:
        if self._end_of_pause is not None:
            self._end_of_pause.cancel()
            self._end_of_pause = None
            await self._llm.resume_generation()

    async def _resume_after(self, limit_s: float) -> None:
        await asyncio.sleep(limit_s)
        await self._llm.resume_generation()

    @ray.method
    async def stop(self) -> None:
        """End vLLM's application and its process, whoever is still answered. Idempotent."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await asyncio.wait([self._serving], timeout=CLOSE_TIMEOUT_S)
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None


def _environment(settings: Settings) -> dict[str, str]:
    engine = settings.engine
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if settings.device == "cpu" else {}
    return hidden | {
        "OMP_NUM_THREADS": str(engine.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
        "VLLM_SERVER_DEV_MODE": "0",
        "VLLM_MAX_N_SEQUENCES": str(MAX_ANSWERS_PER_REQUEST),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _shared_files() -> list[str]:
    """Shared-memory files that vLLM's processes have mapped for the queues between them."""
    this = psutil.Process()
    inodes = set()
    for process in [this, *this.children(recursive=True)]:
        for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
            if f" {SHARED_MEMORY}/" in line:
                inodes.add(int(line.split(maxsplit=5)[4]))
    # By inode: a semaphore is mapped under a temporary name.
    own_names = [path for path in SHARED_MEMORY.iterdir() if path.name.startswith(VLLM_FILES)]
    return sorted(str(path) for path in own_names if path.stat().st_ino in inodes)


def _config(model_dir: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    return config


def _max_model_len(model_dir: Path, wanted: int) -> int:
    config = _config(model_dir)
    text = config.get("text_config") or config
    return min(wanted, int(text.get("max_position_embeddings") or wanted))


def _dtype(model_dir: Path) -> str:
    config = _config(model_dir)
    text = config.get("text_config") or config
    return str(text.get("dtype") or text.get("torch_dtype") or "float32")


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The directory is 0700 already, so nobody can connect between bind and chmod.
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(SOCKET_BACKLOG)
    return listener
