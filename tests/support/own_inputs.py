"""Small inputs of the project's own making, in the files and schemas of the public ones that some tests also read.

The counts that tests expect of them stand here, written down and not computed by what is tested.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 600  # of the sentencepiece models
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
WORDS = [
    "apple",
    "pear",
    "river",
    "seven",
    "carries",
    "counts",
    "twice",
    "half",
    "market",
    "week",
    "price",
    "box",
    "train",
    "hour",
    "child",
    "coin",
    "ticket",
    "sells",
    "buys",
    "left",
    "right",
    "every",
    "other",
    "garden",
    "stone",
    "paper",
    "number",
    "total",
    "rest",
    "after",
    "before",
    "while",
    "then",
    "house",
    "bridge",
    "water",
    "dozen",
]


class Texts:
    """Draws sentences with numbers, signs, double spaces and letters beyond ASCII."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def sentence(self, words: int) -> str:
        drawn = [
            self.random.choice(WORDS) + self.random.choice(["", "", "", "s", "é", ","]) for _ in range(words)
        ]
        for place in range(0, words, 5):
            drawn[place] = str(self.random.randint(1, 4000))
        drawn[words // 2] += self.random.choice(["  ", " = ", ".  ", " $", "%"])
        return " ".join(drawn).capitalize() + self.random.choice([".", "?", "!\n"])

    def text(self, sentences: int) -> str:
        return " ".join(self.sentence(self.random.randint(8, 14)) for _ in range(sentences))


def make(folder: Path) -> Path:
    """Write everything into an empty folder."""
    texts = Texts(0)
    _gsm8k(folder / "gsm8k", texts)
    _mint(folder / "mint_trees", texts)
    _game24(folder / "tot_game24")
    _ultrainteract_page(folder / "ultrainteract_readme", texts)
    for seed, name in enumerate(("mistral-v1", "llama2")):
        _sentencepiece(folder / "tokenizers" / name, Texts(10 + seed))
    _trained_model(folder / "models" / "stories260K" / "hf")
    return folder


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _gsm8k(folder: Path, texts: Texts) -> None:
    """40 test questions, each solved by four models: one or two rightly in 30 of them, all in 6, none in 4."""
    test = [texts.text(3) for _ in range(40)]
    # three training questions share a sentence with a test question
    training = [texts.text(3) for _ in range(317)] + [f"{texts.text(1)} {question}" for question in test[:3]]
    for name, questions in (("test", test), ("train", training)):
        rows = ({"question": question, "answer": texts.text(2)} for question in questions)
        _write(folder / f"{name}.jsonl.gz", rows)
    right = [1, 2] * 15 + [4] * 6 + [0] * 4
    _write(
        folder / "example_model_solutions.jsonl.gz",
        (
            {"question": question, "ground_truth": texts.text(1)}
            | {
                model: {"is_correct": place < correct, "solution": texts.text(2)}
                for place, model in enumerate(MODELS)
            }
            for question, correct in zip(test, right, strict=True)
        ),
    )


# questions with both kinds; pairs: 15 x 1 x 3 + 15 x 2 x 2; questions; right solutions: 15 + 30 + 24
GSM8K = {"both": 30, "pairs": 105, "questions": 40, "right": 69}


def _mint(folder: Path, texts: Texts) -> None:
    """Each file: 5 tasks of 6 trajectories, of which 2 are successful, one task with none of them, one with all."""
    for name in ("gsm8k", "math", "mbpp"):
        rows = []
        for task, wins in enumerate([2, 2, 2, 2, 2, 0, 6]):
            trajectories = []
            for number in range(6):
                turns = []
                for _ in range(1 + (task + number) % 3):
                    turns += [
                        {"role": "assistant", "content": texts.text(2)},
                        {"role": "user", "content": texts.text(1)},
                    ]
                # a trajectory that fails may end with what the environment said
                success = number < wins
                trajectories.append(
                    {
                        "model": f"model-{number}",
                        "success": success,
                        "turns": turns if not success and number % 2 else turns[:-1],
                    }
                )
            rows.append(
                {"task": name, "task_id": str(task), "prompt": texts.text(20), "trajectories": trajectories}
            )
        _write(folder / f"mint_{name}_open15.jsonl.gz", rows)


MINT = {"tasks": 5, "pairs": 5 * 2 * 4, "successes": 5 * 2 + 6}


def _game24(folder: Path) -> None:
    """12 trees of depth 3 with 8 judged leaves each: 0, 1 or 2 of them right."""
    rows = []
    for number in range(12):
        nodes: list[dict[str, Any]] = [{"id": 0, "parent": None, "depth": 0, "text": ""}]
        level = [0]
        for depth in (1, 2, 3):
            below = []
            for parent in level:
                for branch in range(2):
                    nodes.append(
                        {
                            "id": len(nodes),
                            "parent": parent,
                            "depth": depth,
                            "text": f"{number} + {len(nodes)} = {number + len(nodes)} (left: {branch})\n",
                        }
                    )
                    below.append(len(nodes) - 1)
            level = below
        for place, leaf in enumerate(level):
            nodes[leaf]["correct"] = place < number % 3
        rows.append({"idx": 900 + number, "input": f"{number} 5 6 10", "nodes": nodes})
    _write(folder / "trees.jsonl.gz", rows)


# trees with both kinds; pairs: 4 x 1 x 7 + 4 x 2 x 6; right leaves: 4 + 8
GAME24 = {"both": 8, "pairs": 76, "right": 12}


def _ultrainteract_page(folder: Path, texts: Texts) -> None:
    """A page with a row printed as UltraInteract's authors do: comments in it, a comma left out."""
    turns = [
        {"from": ("user", "assistant")[place % 2], "value": f"{place}: {texts.text(2)}"} for place in range(5)
    ]
    lines = ["# A page", "", "## Preference Learning", "", "```JSONC", "{"]
    lines += [
        '\t"id": "0123456789abcdef_5_3", // unique id',
        '\t"parent_id": "0123456789abcdef", // of the tree',
    ]
    lines += [f'\t"trajectory": {json.dumps(turns, indent=8)} // the interaction']
    lines += [
        f'\t"chosen": {json.dumps(texts.text(1))},',
        f'\t"rejected": {json.dumps(texts.text(1))},',
        "}",
        "```",
    ]
    folder.mkdir(parents=True)
    (folder / "Eurus_README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sentencepiece(folder: Path, texts: Texts) -> None:
    """A model of Llama's kind: BPE with byte fallback over unchanged text."""
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["[INST] def f(x):    return x  ** 2 [/INST]", *(texts.text(2) for _ in range(400))]
        ),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def _trained_model(folder: Path) -> None:
    """A small tied Llama that has learned to count, so that its logits are far from those of random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8}
    config = LlamaConfig(
        vocab_size=512, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, **shape
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        tokens = (torch.arange(48)[None] + 37 * torch.arange(8)[:, None] + step) % 512
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
