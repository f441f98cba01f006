"""Answers a job with vLLM. It runs in an environment of its own, which has vLLM and not Silva.

    python vllm_side.py JOB RESULT

The job is JSON: `model` (a folder), `conversations` (lists of messages), `ids` (the token ids of each), `rewards`
(whether the model is a reward model), `new_tokens`. The result is JSON, too; see `answer`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Compute what the job asks for.

    Returns:
        `version` of vLLM and, of a reward model, `rewards` of each conversation. Of a policy: `prompts`, the ids that
        vLLM makes of each conversation without its last message; `answers`, greedy tokens behind these; `finished`,
        whether each ended by itself; `log_probs` of every token of `ids` but the first.
    """
    import vllm

    settings = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True}
    if job["rewards"]:
        model = vllm.LLM(job["model"], runner="pooling", **settings)
        # without the activation: it is a sigmoid
        plain = vllm.PoolingParams(use_activation=False)
        found = model.classify([{"prompt_token_ids": ids} for ids in job["ids"]], pooling_params=plain)
        return {"version": vllm.__version__, "rewards": [each.outputs.probs[0] for each in found]}
    model = vllm.LLM(job["model"], **settings)
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=job["new_tokens"])
    chats = model.chat([chat[:-1] for chat in job["conversations"]], greedy, use_tqdm=False)
    scoring = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    scored = model.generate([{"prompt_token_ids": ids} for ids in job["ids"]], scoring, use_tqdm=False)
    return {
        "version": vllm.__version__,
        "prompts": [list(chat.prompt_token_ids) for chat in chats],
        "answers": [list(chat.outputs[0].token_ids) for chat in chats],
        "finished": [chat.outputs[0].finish_reason == "stop" for chat in chats],
        "log_probs": [
            [at[number].logprob for at, number in zip(each.prompt_logprobs[1:], ids[1:], strict=True)]
            for each, ids in zip(scored, job["ids"], strict=True)
        ],
    }


if __name__ == "__main__":
    asked, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(answer(json.loads(asked.read_text()))))
