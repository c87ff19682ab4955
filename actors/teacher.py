"""The live model as its own teacher: what it thinks of a continuation with the instruction in view.

Asks vLLM on its private socket, as any client would. Knows HTTP and token ids, not weights.
"""

from typing import TYPE_CHECKING, Final

import httpx

from actors.errors import Unavailable
from actors.messages import TrainingSample

if TYPE_CHECKING:
    from apollo.learning.samples import TopLogprobs

NUM_LOGPROBS: Final = 20
"""Entries per token; vLLM's own bound without further settings."""
TIMEOUT_S: Final = 120.0


def ask_teacher(socket: str, model: str, sample: TrainingSample) -> "TopLogprobs":
    """Top log-probabilities of each continuation token after `teacher_context_ids`.

    Blocks for one prefill in vLLM. Raises Unavailable if vLLM does not answer.
    """
    from apollo.learning.samples import TopLogprobs

    prompt = [*sample.teacher_context_ids, *sample.continuation_ids]
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": NUM_LOGPROBS}
    try:
        transport = httpx.HTTPTransport(uds=socket)
        with httpx.Client(transport=transport, timeout=TIMEOUT_S) as client:
            reply = client.post("http://engine/v1/completions", json=body | {"temperature": 0})
        reply.raise_for_status()
    except httpx.HTTPError as error:
        raise Unavailable(f"the teacher did not answer: {type(error).__name__}") from None
    rows = reply.json()["choices"][0]["prompt_logprobs"][-len(sample.continuation_ids) :]
    # vLLM puts the prompt's own token beside the k likeliest: k or k + 1 entries.
    tops = [
        sorted(((row[key]["logprob"], int(key)) for key in row), reverse=True)[:NUM_LOGPROBS]
        for row in rows
    ]
    return TopLogprobs(
        ids_tk=tuple(tuple(token for _, token in top) for top in tops),
        logprobs_tk=tuple(tuple(logprob for logprob, _ in top) for top in tops),
    )
