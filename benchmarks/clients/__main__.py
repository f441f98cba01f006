"""Serves exported models with vLLM and compares tokens, log-probs and rewards with transformers.

    make test-clients

Policies and reward models are trained for a few steps from the demo's recipes and exported whole and sharded, in
float32 and bfloat16. vLLM runs in an environment of its own, whose Python `--python` names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers import AutoModelForCausalLM

from benchmarks import common
from benchmarks.fidelity import theirs as peers
from silva.engine.data.reading.messages import Message
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.recipe.loading import load
from silva.engine.training.trainer import train
from silva.recipes.mini.demo import DATA
from silva.recipes.mini.make_model import make

SIDE = Path(__file__).with_name("vllm_side.py")
# both compute in float32, with other kernels
LOG_PROB, REWARD = 1e-4, 1e-4
NEW_TOKENS = 40


@dataclass(frozen=True)
class Case:
    """Describes an exported model.

    Attributes:
        name: of the case.
        recipe: a packaged one.
        overrides: of the recipe.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()


SHARDED = ("model.dtype=bfloat16", "export.max_shard_size=1MB")
CASES = (
    Case("policy, float32", "mini-sft"),
    Case("policy, bfloat16, sharded", "mini-sft", SHARDED),
    Case("policy, template eurus", "mini-sft", ("tokenizer.chat_template=eurus",)),
    Case("reward model, float32", "mini-rm"),
    Case("reward model, bfloat16, sharded", "mini-rm", SHARDED),
)
CONVERSATIONS = [
    [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "It is 5."}],
    [
        {"role": "user", "content": "Step 1: add 4 and 5."},
        {"role": "assistant", "content": "9"},
        {"role": "user", "content": "Step 2: print it  twice."},
        {"role": "assistant", "content": "print(9)\nprint(9)"},
    ],
    [{"role": "user", "content": "Ünïcödé 梦?"}, {"role": "assistant", "content": "Yes."}],
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparisons and print them.

    Returns:
        The exit code: 1 if anything differs by more than rounding.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.clients", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--python", required=True, help="the interpreter of an environment that has vLLM")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    rows: list[tuple[object, ...]] = []
    mismatches, worst = 0, {"log_prob": 0.0, "reward": 0.0}
    version = ""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        start = make(DATA, work / "start", seed=0)
        for number, case in enumerate(CASES):
            output = work / f"run-{number}"
            steps = ["training.max_steps=20", "training.validate_every=0"]
            overrides = [f"model.path={start}", f"output={output}", *steps, *case.overrides]
            export = train(load(case.recipe, overrides)).export
            tokenizer = ChatTokenizer.load(str(export))
            rewards = case.recipe == "mini-rm"
            ids = [_ids(tokenizer, chat) for chat in CONVERSATIONS]
            theirs = _served(options.python, work, export, ids, rewards=rewards)
            version = theirs["version"]
            if rewards:
                ours = peers.rewards(export, ids)
                difference = max(abs(a - b) for a, b in zip(ours, theirs["rewards"], strict=True))
                worst["reward"] = max(worst["reward"], difference)
                rows.append((case.name, "", "", "", difference))
                continue
            prompts = [_ids(tokenizer, chat[:-1], generation=True) for chat in CONVERSATIONS]
            answers = _greedy(export, prompts)
            other = sum(a != b for a, b in zip(prompts, theirs["prompts"], strict=True))
            other_answers = sum(a != b for a, b in zip(answers, theirs["answers"], strict=True))
            mismatches += other + other_answers
            difference = max(
                abs(a - b)
                for mine, served in zip(_log_probs(export, ids), theirs["log_probs"], strict=True)
                for a, b in zip(mine, served, strict=True)
            )
            worst["log_prob"] = max(worst["log_prob"], difference)
            rows.append((case.name, other, f"{other_answers} of {len(answers)}", difference, ""))
    columns = ("export", "prompts differ", "greedy answers differ", "log-prob differs", "reward differs")
    common.show(f"vLLM {version} and transformers {transformers.__version__}", columns, rows)
    common.finish(
        {
            "cases": len(rows),
            "token_mismatches": mismatches,
            "worst_log_prob_difference": worst["log_prob"],
            "worst_reward_difference": worst["reward"],
        }
    )
    return 0 if not mismatches and worst["log_prob"] < LOG_PROB and worst["reward"] < REWARD else 1


def _ids(tokenizer: ChatTokenizer, chat: Sequence[dict[str, str]], *, generation: bool = False) -> list[int]:
    """Return the ids that training makes of a conversation, or of a prompt."""
    messages = tuple(Message(message["role"], message["content"]) for message in chat)
    if not generation:
        return list(tokenizer.whole(messages).paths[0].tokens.tolist())
    path = tokenizer.encode((*messages, Message("assistant", "x")), score="last").paths[0]
    return list(path.tokens[~path.scored].tolist())


def _served(
    python: str, work: Path, export: Path, ids: Sequence[Sequence[int]], *, rewards: bool
) -> dict[str, Any]:
    job, result = work / "job.json", work / "result.json"
    asked = {"model": str(export), "conversations": CONVERSATIONS, "ids": ids, "rewards": rewards}
    job.write_text(json.dumps(asked | {"new_tokens": NEW_TOKENS}))
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    subprocess.run([python, str(SIDE), str(job), str(result)], check=True, env=environment, cwd=work)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


@torch.no_grad()
def _greedy(export: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    found = []
    for prompt in prompts:
        whole = model.generate(torch.tensor([list(prompt)]), do_sample=False, max_new_tokens=NEW_TOKENS)
        found.append(whole[0, len(prompt) :].tolist())
    return found


@torch.no_grad()
def _log_probs(export: Path, ids: Sequence[Sequence[int]]) -> list[list[float]]:
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    found = []
    for sequence in ids:
        logits = model(torch.tensor([list(sequence)])).logits[0, :-1]
        each = functional.log_softmax(logits, -1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
        found.append(each.tolist())
    return found


if __name__ == "__main__":
    sys.exit(main())
