"""Makes the demo's model: a BPE tokenizer trained on the mini data set and a small random Llama.

    python -m silva.recipes.mini.make_model --data FOLDER --out FOLDER [--seed S]

The folder is an ordinary Hugging Face checkpoint; the same data, seed and library versions give the same one.
Nothing is downloaded.
"""

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from silva.engine.errors import UserError

# a multiple of 128 is split evenly by any tensor parallelism that a model this small can have
VOCABULARY = 1024
MAX_POSITION = 2048
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# Eurus' format, with Mistral's end of turn. The text of a message depends only on the messages before it, so that the
# text of the first k messages is a prefix of the text of k + 1: shared messages are shared tokens.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('expected a user or assistant message, found ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
)


def make(data: Path, out: Path, *, seed: int) -> Path:
    """Make tokenizer and model, and write them into a folder.

    Args:
        data: a folder with `pair.jsonl.gz`.
        out: the folder to write.
        seed: of the model's weights.

    Returns:
        `out`.

    Raises:
        UserError: the data is absent or has no rows.
    """
    tokenizer = train_tokenizer(_texts(data / "pair.jsonl.gz"))
    out.mkdir(parents=True, exist_ok=True)
    _save_tokenizer(tokenizer, out)
    _save_model(tokenizer, out, seed)
    return out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE of `VOCABULARY` tokens: decoding an encoded text gives the same text, whatever it is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _texts(path: Path) -> list[str]:
    """Return every message and action of the trees once, as the chat template frames it."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it with `python -m silva.recipes.mini.make_trees`")
    texts = list(dict.fromkeys(_framed(path)))
    if not texts:
        raise UserError(f"{path}: has no rows; make it with `python -m silva.recipes.mini.make_trees`")
    return texts


def _framed(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            for message in row["trajectory"]:
                if message["from"] == "user":
                    yield f"[INST] {message['value']} [/INST]"
            yield f" {row['chosen']}"
            yield f" {row['rejected']}"


def _save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json and a tokenizer_config.json that every transformers version reads the same way."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        # the chat template writes it
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITION,
        "padding_side": "right",
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _save_model(tokenizer: Tokenizer, out: Path, seed: int) -> None:
    bos, eos, pad = (tokenizer.token_to_id(token) for token in (BOS, EOS, PAD))
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITION,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    # the caller's random numbers stay as they are
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=eos, pad_token_id=pad, max_new_tokens=160, do_sample=False
    )
    # one file of 4 MB needs no progress bar beside those of the training that follows
    disable_progress_bar()
    model.save_pretrained(out)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description="Makes the tokenizer and the small random Llama of the demo."
    )
    parser.add_argument("--data", type=Path, default=Path(__file__).parent, help="folder with pair.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        print(make(arguments.data, arguments.out, seed=arguments.seed))
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
