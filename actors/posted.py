"""What a client posts: made from JSON by the ingress, which refuses unknown keys and bad values."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

MAX_ID_CHARS = 128


class _Posted(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Span = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
"""Start and end of a piece of text, in characters, the end not included."""


class ChatMessage(_Posted):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    strip: bool | list[Span] = False
    """True: the whole message is an instruction; or the spans of its content that are. Instructions
    were in view when the answer was written and are absent when it is learned."""


class _Sample(_Posted):
    id: str | None = Field(default=None, min_length=1, max_length=MAX_ID_CHARS)
    """The client's name for the sample; the same id is accepted once."""
    source: str | None = Field(default=None, max_length=512)
    """Where the sample comes from, so that it can be found and excluded later."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """Factor on the sample's loss."""


class ChatSample(_Sample):
    """The last assistant message is learned, after the messages before it."""

    messages: list[ChatMessage] = Field(min_length=1)
    strip: list[Literal["system", "developer", "user", "assistant", "tool"]] = []
    """Roles whose messages are instructions, as if each were marked `strip`."""
    rejected: str | None = Field(default=None, min_length=1)
    """A worse answer to the same messages, for the objective `preference`."""
    is_finished: bool = True
    """False: the answer was cut short, so that where it ends is not learned."""


class TextSample(_Sample):
    """`continuation` is learned after `context`; neither passes through the chat template."""

    context: str
    continuation: str
    rejected: str | None = Field(default=None, min_length=1)
    """A worse continuation, for the objective `preference`."""
    teacher_context: str | None = None
    """What the teacher reads instead of `context`, for the objective `distill`."""


class TokenSample(_Sample):
    """As TextSample, already in token ids."""

    context_ids: list[Annotated[int, Field(ge=0)]]
    continuation_ids: list[Annotated[int, Field(ge=0)]]
    rejected_ids: list[Annotated[int, Field(ge=0)]] = []
    teacher_context_ids: list[Annotated[int, Field(ge=0)]] = []


def _kind_of_sample(value: Any) -> str:
    if isinstance(value, TextSample | TokenSample | ChatSample):
        value = value.__dict__
    if not isinstance(value, dict):
        return "chat"
    if "continuation_ids" in value or "context_ids" in value:
        return "tokens"
    if "continuation" in value or "context" in value:
        return "text"
    return "chat"


Sample = Annotated[
    Annotated[ChatSample, Tag("chat")]
    | Annotated[TextSample, Tag("text")]
    | Annotated[TokenSample, Tag("tokens")],
    Discriminator(_kind_of_sample),
]


class TrainConfig(_Posted):
    """How one job is trained."""

    learning_rate: float = Field(default=1e-5, gt=0, le=1e-2)
    epochs: int = Field(default=1, ge=1, le=1000)
    warmup_steps: int = Field(default=0, ge=0, le=100_000)
    objective: Literal["sft", "distill", "preference"] = "sft"
    """`sft` learns the continuation; `distill` the distribution that the live model gives to it
    with the instruction in view; `preference` the continuation against a rejected one."""
    grad_context: int = Field(default=64, ge=0, le=1_048_576)
    """Last context tokens through which the gradient flows; the tokens before them are only read.
    More is dearer and closer to the exact gradient."""
    anchor: float = Field(default=0.0, ge=0, le=100)
    """Strength of staying what the model was when the job began: each step also lowers the KL
    divergence from that on one of a few everyday facts."""
    duty: float | None = Field(default=None, ge=0.01, le=1)
    """Share of the time the trainer computes; None takes the cell's setting."""


class TrainRequest(_Posted):
    """Body of `POST /train`."""

    samples: list[Sample] = Field(min_length=1)
    config: TrainConfig = TrainConfig()


class _AfterTrial(_Posted):
    """What cannot be done while the live weights hold a dream that the gate has not judged."""

    wait_s: float = Field(default=60, ge=0, le=600)
    """How long to wait for the gate where a dream is on trial; after that, and with 0 at once, the
    answer is 503."""


class CheckpointRequest(_AfterTrial):
    """Body of `POST /checkpoint`."""

    publish: bool = True
    """Whether the public directory shall hold it too; it is durable either way."""


class DreamRequest(_Posted):
    """Body of `POST /dream`."""

    rounds: int = Field(default=1, ge=1, le=1000)
    """How many rounds, one after another."""
    behaviour: str | None = None
    """Of which behaviour; None: drawn for each round, by how often they fail."""


class MemoryRequest(_Posted):
    """One of the `memories` of `POST /memories`."""

    id: str | None = Field(default=None, min_length=1, max_length=MAX_ID_CHARS)
    """The client's name for it; the same id with the same text is kept once."""
    text: str = Field(min_length=1, max_length=4000)
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(
        default=[], max_length=32
    )
    created: float | None = Field(default=None, ge=0, le=1e11)
    """When it came about, in seconds since 1970; None: now."""


class MemoriesRequest(_Posted):
    """Body of `POST /memories`."""

    memories: list[MemoryRequest] = Field(min_length=1, max_length=1000)


class DecisionRequest(_Posted):
    """Body of `POST /candidates/{id}`."""

    decision: Literal["approve", "reject"]
    """`approve`: its answer is learned, once, without its instructions."""


class ScoreRequest(_Posted):
    """Body of `POST /score`: how much an instruction makes an answer likelier."""

    messages: list[ChatMessage] = Field(min_length=2, max_length=1000)
    """The last one is the assistant's, and is scored."""
    strip: list[Literal["system", "developer", "user", "assistant", "tool"]] = ["system"]
    """Roles whose messages are the instruction, as in `POST /train`."""


class ForgetRequest(_AfterTrial):
    """Body of `POST /forget`."""

    item: str = Field(min_length=1, max_length=MAX_ID_CHARS)
    """Id of the sample that shall never have been learned."""


class RollbackRequest(_Posted):
    """Body of `POST /rollback`."""

    generation: int = Field(ge=0)
    """Whose weights shall be live again; `GET /checkpoints` lists them."""
