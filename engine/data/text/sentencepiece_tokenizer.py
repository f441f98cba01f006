"""Reads Llama's and Mistral's `tokenizer.model` and tokenizes text by the sentencepiece library itself.

transformers 5 ranks the merges of a bare `tokenizer.model` by piece number instead of piece score, and so splits runs
of spaces differently. Here sentencepiece gives the ids used in training, and `backend` builds the equal `tokenizers`
pipeline (merges ranked by score, ties as sentencepiece breaks them) that exported checkpoints are served with.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import sentencepiece.sentencepiece_model_pb2
import tokenizers
from google.protobuf.message import DecodeError
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from silva.engine.errors import UserError

SPACE = "▁"
# generated code, without type information
_PB2: Any = sentencepiece.sentencepiece_model_pb2
_Piece = _PB2.ModelProto.SentencePiece


def read(file: Path) -> Any | None:
    """Read a sentencepiece model.

    Args:
        file: called tokenizer.model; Llama 3 keeps tiktoken ranks under this name.

    Returns:
        The model's protobuf; None where the file is no sentencepiece model.
    """
    proto = _PB2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError:
        return None
    return proto if len(proto.pieces) else None


def is_llama_style(proto: Any) -> bool:
    """Tell whether the model is byte-fallback BPE over unchanged text with a space in front.

    For such models `backend` is exact.
    """
    kinds = {piece.type for piece in proto.pieces}
    return (
        proto.trainer_spec.model_type == _PB2.TrainerSpec.BPE
        and proto.trainer_spec.byte_fallback
        and not proto.trainer_spec.treat_whitespace_as_suffix
        and proto.normalizer_spec.add_dummy_prefix
        and not proto.normalizer_spec.remove_extra_whitespaces
        and not proto.normalizer_spec.precompiled_charsmap
        and kinds <= {_Piece.NORMAL, _Piece.BYTE, _Piece.CONTROL, _Piece.UNKNOWN}
    )


class SentencePieceText:
    """Tokenizes text by two processors: sentencepiece's own, and one that puts no space in front.

    Neither gives a control token for a text: "</s>" in a text becomes the pieces of its characters.

    Args:
        proto: the model's protobuf.
    """

    def __init__(self, proto: Any) -> None:
        self._start = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        bare = _PB2.ModelProto()
        bare.CopyFrom(proto)
        bare.normalizer_spec.add_dummy_prefix = False
        self._middle = sentencepiece.SentencePieceProcessor(model_proto=bare.SerializeToString())

    def encode(self, text: str, *, prefix: bool) -> list[int]:
        """Return the ids of `text`; `prefix` puts sentencepiece's dummy space in front."""
        return (self._start if prefix else self._middle).encode(text)


def backend(
    proto: Any, added: Sequence[Mapping[str, Any]], *, prefix_after_special: bool, bos: str | None
) -> tokenizers.Tokenizer:
    """Build the `tokenizers` pipeline that gives sentencepiece's ids.

    Args:
        proto: the model's protobuf.
        added: tokens outside the model as {id, content, special, ...}, in the order of their ids.
        prefix_after_special: whether text after a special token starts with a space, as in Llama's and Mistral's own
            code and in transformers' `legacy` tokenizers, or only text at the very start.
        bos: the token that the post-processor puts in front of every text, if any.

    Raises:
        UserError: an added token's id is not the one that the vocabulary leaves for it.
    """
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    pipeline = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=_merges(proto), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    if prefix_after_special:
        pipeline.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    else:
        pipeline.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    pipeline.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inside = [piece.piece for piece in proto.pieces if piece.type in (_Piece.UNKNOWN, _Piece.CONTROL)]
    pipeline.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in inside])
    _add(pipeline, added)
    if bos is not None:
        pipeline.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, pipeline.token_to_id(bos))]
        )
    return pipeline


def _add(pipeline: tokenizers.Tokenizer, added: Sequence[Mapping[str, Any]]) -> None:
    for token in added:
        flags = {name: token.get(name, False) for name in ("lstrip", "rstrip", "normalized", "special")}
        entry = AddedToken(token["content"], **flags)
        (pipeline.add_special_tokens if flags["special"] else pipeline.add_tokens)([entry])
        if pipeline.token_to_id(token["content"]) != token["id"]:
            raise UserError(
                f"tokenizer.model leaves id {pipeline.token_to_id(token['content'])} for the added token "
                f"{token['content']!r}, the folder's other files say {token['id']}; they do not fit"
            )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """List all ways to build a piece from two pieces, the best score first.

    sentencepiece merges the pair whose result scores best, and the leftmost of equal ones. Only runs of spaces score
    equal; for these, leftmost means that the longest left part grows first.
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL}
    ranked = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    ranked.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in ranked]
