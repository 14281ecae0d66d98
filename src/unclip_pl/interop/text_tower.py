"""CLIP's text tower and tokenizer as transformers keeps them, in JSON and tensors. transformers is not needed."""

import json
from collections.abc import Iterator
from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from unclip_pl.clip import ClipEncoder

TOKENIZER = "CLIPTokenizer"
#: open_clip's names of a block's tensors, and transformers'.
_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TOWER = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
#: What is no part of the text tower, beside ``visual.``.
_BESIDE = ("logit_scale", "logit_bias", "attn_mask")


def _state(clip: ClipEncoder) -> dict[str, Tensor]:
    """Return the tensors of the text tower, which open_clip keeps in one of two places."""
    state = clip.model.state_dict()
    inner = {key.removeprefix("text."): value for key, value in state.items() if key.startswith("text.")}
    found = inner or {key: value for key, value in state.items() if not key.startswith("visual.")}
    return {key: value for key, value in found.items() if key not in _BESIDE}


def _tower(clip: ClipEncoder) -> Any:
    return clip.model if hasattr(clip.model, "positional_embedding") else clip.model.text


def _blocks(clip: ClipEncoder) -> nn.ModuleList:
    return _tower(clip).transformer.resblocks


def why_not(clip: ClipEncoder) -> Iterator[str]:
    """Yield what keeps a CLIP's text from being transformers' CLIP, in words."""
    tower = _tower(clip)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", ""))
    if type(clip.tokenizer) is not SimpleTokenizer or pool != "argmax" or getattr(tower, "attn_mask", None) is None:
        yield f"the CLIP {clip.spec.name} has another tokenizer, pooling or mask of its text than OpenAI's"
        return
    ours = {f"{name}.{leaf}" for name in _BLOCK for leaf in ("weight", "bias")}
    ours |= {"attn.in_proj_weight", "attn.in_proj_bias"}
    wanted = {*_TOWER, "text_projection"}
    wanted |= {f"transformer.resblocks.{i}.{name}" for i in range(len(_blocks(clip))) for name in ours}
    if others := _state(clip).keys() ^ wanted:
        yield f"the text tower of the CLIP {clip.spec.name} differs from OpenAI's in {', '.join(sorted(others)[:3])}"


def weights_of(clip: ClipEncoder) -> dict[str, Tensor]:
    """Return the text tower under transformers' names, in float32."""
    state = {key: value.float() for key, value in _state(clip).items()}
    found = {there: state[here] for here, there in _TOWER.items()}
    found["text_projection.weight"] = state["text_projection"].T.contiguous()
    for i in range(len(_blocks(clip))):
        here, there = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            found |= {f"{there}.{b}.{leaf}": state[f"{here}.{a}.{leaf}"] for a, b in _BLOCK.items()}
            parts = state[f"{here}.attn.in_proj_{leaf}"].chunk(3)
            found |= {f"{there}.self_attn.{x}_proj.{leaf}": part.clone() for x, part in zip("qkv", parts, strict=True)}
    return found


def config_of(clip: ClipEncoder) -> dict[str, Any]:
    """Return ``config.json`` of ``CLIPTextModelWithProjection``."""
    block: Any = _blocks(clip)[0]
    tokenizer: Any = clip.tokenizer
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": _tower(clip).token_embedding.num_embeddings,
        "hidden_size": clip.text_width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "projection_dim": clip.embed_dim,
        "num_hidden_layers": len(_blocks(clip)),
        "num_attention_heads": block.attn.num_heads,
        "max_position_embeddings": clip.context_length,
        "hidden_act": "quick_gelu" if isinstance(block.mlp.gelu, QuickGELU) else "gelu",
        "layer_norm_eps": block.ln_1.eps,
        "bos_token_id": tokenizer.sot_token_id,
        "eos_token_id": tokenizer.eot_token_id,
        "pad_token_id": tokenizer.eot_token_id,
    }


def tokenizer_files(clip: ClipEncoder) -> dict[str, str]:
    """Return the files of ``CLIPTokenizer`` by name: the same words and merges."""
    tokenizer: Any = clip.tokenizer
    start, end = "<|startoftext|>", "<|endoftext|>"
    names = {tokenizer.sot_token_id: start, tokenizer.eot_token_id: end}
    vocabulary = {names.get(number, word): number for word, number in tokenizer.encoder.items()}
    merges = [" ".join(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)]
    tokens = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    config = {"tokenizer_class": TOKENIZER, "model_max_length": clip.context_length, **tokens}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "special_tokens_map.json": json.dumps(tokens, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
