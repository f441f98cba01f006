"""Makes a small checkpoint of every family of chat models: a tokenizer of its kind, its public chat template, a model.

The tokenizers are trained on a few sentences. They have the families' control tokens with the flags that these have
(Phi-3's take the white space behind them, Llama-2's put a space in front of text behind them), and a vocabulary in
which tokens merge as they do in large ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import trl
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from silva.engine.data.text.chat_template import EURUS

# TRL ships templates as the models' authors published them; `templates` has those of older models
_PUBLISHED = Path(trl.__file__).parent / "chat_templates"
TEXTS = [
    "What is 2 + 3? It is 5, because 2 and 3 make 5.",
    "Janet's ducks lay 16 eggs per day.  She eats three for breakfast.",
    "def f(x):\n    return x ** 2\n\n\nprint(f(3))\n",
    "Ünïcödé 梦 and 😀, tabs\tand  runs   of spaces.",
    "system user assistant model tool [INST] [/INST] <<SYS>> <</SYS>>\n\n",
    '{"name": "add", "arguments": {"a": 2, "b": 3}}\n',
    "add them first, then answer: 4. Observation: the answer is wrong.",
]


@dataclass(frozen=True)
class Family:
    """Describes a family.

    Attributes:
        template: its chat template.
        tokenizer: makes its tokenizer of its control tokens.
        control: the control tokens and their flags; those with `special=False` are recognised, but not special.
        bos: the BOS; None if it has none.
        eos: the EOS.
        pad: the padding token; None if it has none.
        system: whether the template takes a system message.
        tools: whether the template takes tools.
    """

    template: str
    tokenizer: Callable[[list[AddedToken]], Tokenizer]
    control: tuple[AddedToken, ...]
    bos: str | None
    eos: str
    pad: str | None = None
    system: bool = True
    tools: bool = False


def _template(name: str, folder: Path = Path(__file__).parent / "templates") -> str:
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def _special(*names: str, **flags: bool) -> tuple[AddedToken, ...]:
    return tuple(AddedToken(name, special=True, normalized=False, **flags) for name in names)


def _plain(*names: str) -> tuple[AddedToken, ...]:
    return tuple(AddedToken(name, special=False, normalized=False) for name in names)


def byte_level(control: list[AddedToken]) -> Tokenizer:
    """Make a byte-level BPE that splits text as Llama-3 and Qwen do."""
    tokenizer = Tokenizer(models.BPE())
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    blanks = r"\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{words}|{blanks}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.add_tokens(control)
    return tokenizer


def sentencepiece_like(control: list[AddedToken], *, legacy: bool, prefix: bool = True) -> Tokenizer:
    """Make a BPE over whole texts with byte fallback, as sentencepiece's models are once they are converted.

    Args:
        control: the first of them are <unk>, BOS and EOS.
        legacy: whether text behind a control token gets a leading space too.
        prefix: whether text gets a leading space at all.
    """
    model = models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=True)
    names = [token.content for token in control[:3]]
    trainer = trainers.BpeTrainer(
        vocab_size=720,
        special_tokens=[*names, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in TEXTS] * 4, trainer)
    content = json.loads(tokenizer.to_str())
    # the bytes are pieces of the model and no tokens that text is split at
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in names]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if legacy:
        tokenizer.pre_tokenizer = None  # type: ignore[assignment]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        tokenizer.pre_tokenizer = None  # type: ignore[assignment]
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens(control)
    bos = names[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


_LLAMA = _special("<unk>", "<s>", "</s>")
_QWEN = (
    *_special("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *_plain("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
FAMILIES = {
    "llama2": Family(_template("llama2"), partial(sentencepiece_like, legacy=True), _LLAMA, "<s>", "</s>"),
    "llama3.1": Family(
        _template("llama3_1", _PUBLISHED),
        byte_level,
        _special(
            "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"
        ),
        "<|begin_of_text|>",
        "<|eot_id|>",
        tools=True,
    ),
    "mistral-v0.1": Family(
        _template("mistral_v0_1"),
        partial(sentencepiece_like, legacy=True),
        _LLAMA,
        "<s>",
        "</s>",
        system=False,
    ),
    "mistral-v0.3": Family(
        _template("mistral_v0_3"),
        partial(sentencepiece_like, legacy=False),
        (
            *_LLAMA,
            *_special("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *_special("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        "<s>",
        "</s>",
        tools=True,
    ),
    "qwen2.5": Family(
        _template("qwen2_5", _PUBLISHED), byte_level, _QWEN, None, "<|im_end|>", "<|endoftext|>", tools=True
    ),
    "qwen3": Family(
        _template("qwen3", _PUBLISHED), byte_level, _QWEN, None, "<|im_end|>", "<|endoftext|>", tools=True
    ),
    "deepseek-r1-distill": Family(
        _template("deepseek_r1_distill", _PUBLISHED),
        byte_level,
        (
            *_special("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
            *_plain("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),  # noqa: RUF001
        ),
        "<｜begin▁of▁sentence｜>",  # noqa: RUF001
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
    ),
    "zephyr": Family(
        _template("zephyr"), partial(sentencepiece_like, legacy=True), _LLAMA, "<s>", "</s>", "</s>"
    ),
    "gemma2": Family(
        _template("gemma", _PUBLISHED),
        partial(sentencepiece_like, legacy=False, prefix=False),
        _special("<unk>", "<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<pad>",
        system=False,
    ),
    "phi3": Family(
        _template("phi3", _PUBLISHED),
        partial(sentencepiece_like, legacy=False),
        (
            *_LLAMA,
            *_special("<|endoftext|>"),
            *_special("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", rstrip=True),
        ),
        "<s>",
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "chatml": Family(_template("chatml"), byte_level, _QWEN, None, "<|im_end|>", "<|endoftext|>"),
    "eurus": Family(EURUS, partial(sentencepiece_like, legacy=True), _LLAMA, "<s>", "</s>"),
}


def checkpoint(name: str, folder: Path, *, seed: int = 0, rewards: bool = False) -> Path:
    """Write a small random Llama of a family, with its tokenizer.

    Args:
        name: of the family.
        folder: made if it does not exist.
        seed: of the weights.
        rewards: whether the model is a sequence classifier with one label.

    Returns:
        The folder.
    """
    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = family.tokenizer(list(family.control))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": family.bos,
        "eos_token": family.eos,
        "pad_token": family.pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": family.template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    number = {
        key: token and tokenizer.token_to_id(token) for key, token in settings.items() if key[-5:] == "token"
    }
    config = LlamaConfig(
        vocab_size=-(-tokenizer.get_vocab_size() // 8) * 8,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=number["bos_token"],
        eos_token_id=number["eos_token"],
        # transformers would never train the embedding of a padding token, which may be the EOS of every turn
        pad_token_id=number["pad_token"] if rewards else None,
        dtype="float32",
        **({"num_labels": 1} if rewards else {}),
    )
    torch.manual_seed(seed)
    kind = LlamaForSequenceClassification if rewards else LlamaForCausalLM
    model = kind(config)
    with torch.no_grad():
        # far from uniform, so that a wrong token changes the loss
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder
