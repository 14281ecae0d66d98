"""Every model of open_clip: our reading of its towers against open_clip's own, with sizes cut."""

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import timm
import torch
import transformers

from unclip_pl.clip.encoder import ClipEncoder, ClipSpec, _preprocessing_of_tags, architecture
from unclip_pl.errors import InputError
from unclip_pl.tasks.clip import ClipTask
from unclip_pl.types import TextFeatures

#: One config of each way to pool, to mask and to build the text tower.
KINDS = (
    *("RN50", "EVA02-B-16", "MobileCLIP2-S0", "ViT-B-16-SigLIP2", "ViT-L-14-CLIPA"),
    *("ViT-H-14-worldwide", "coca_ViT-B-32", "coca_roberta-ViT-B-32", "xlm-roberta-base-ViT-B-32"),
    *("mt5-base-ViT-B-32", "nllb-clip-base"),
)
OURS = {path.stem for path in Path("src/unclip_pl/clip/model_configs").glob("*.json")}
ALL = [name for name in open_clip.list_models() if name not in OURS]
VOCABULARY, WIDTH = 1000, 64
#: Small configs of the text towers that are transformers'. The padding's id is the published one.
TRANSFORMERS = {
    "roberta": {"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 80},
    "xlm-roberta": {"model_type": "xlm-roberta", "pad_token_id": 1, "max_position_embeddings": 80},
    "mt5": {"model_type": "mt5", "pad_token_id": 0, "d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1},
    "nllb": {"model_type": "m2m_100", "pad_token_id": 1, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1},
}
WIDTHS = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **{"num_hidden_layers": 1, "vocab_size": VOCABULARY},
}


def small_image_tower(name: str, create: Any = timm.create_model, **settings: Any) -> Any:
    """timm's model with one block a stage, and narrow where its family has one width."""
    small: dict[str, dict[str, Any]] = {
        "convnext": {"depths": (1,) * 4, "dims": (8, 16, 32, 64)},
        "swin": {"depths": (1,) * 4},
        "fastvit": {"layers": (1,) * (5 if name.endswith(("mci3", "mci4")) else 4)},
        "vitamin": {"depth": 1},
        "vit_base_mci": {"depth": 1},
    }
    family = next((family for family in small if name.startswith(family)), "")
    return create(name, **small.get(family, {"depth": 1, "embed_dim": WIDTH, "num_heads": 2}), **settings)


def shrink(name: str, folder: Path, **image: Any) -> dict[str, Any]:
    """Write open_clip's config of that name with fewer and narrower layers, and what it needs of transformers."""
    config = architecture(name) | {"embed_dim": WIDTH}
    text, vision = config["text_cfg"], config["vision_cfg"]
    if text.get("hf_model_name"):
        family = next(family for family in reversed(TRANSFORMERS) if family in text["hf_model_name"])
        inside = folder / text["hf_model_name"]
        inside.mkdir(parents=True)
        (inside / "config.json").write_text(json.dumps(WIDTHS | TRANSFORMERS[family]))
    else:
        text |= {"layers": 1, "heads": 2, "width": WIDTH, "vocab_size": VOCABULARY}
    if isinstance(vision.get("layers"), list):
        vision |= {"layers": [1, 1, 1, 1], "width": 16}
    elif "layers" in vision:
        vision |= {"layers": 1, "width": WIDTH, "head_width": 16}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 1, "width": WIDTH, "heads": 2}
    config |= {"vision_cfg": image} if image else {}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return config


def captions(text: dict[str, Any], padding: int, context: int) -> tuple[torch.Tensor, list[int]]:
    """Token ids drawn at random: a start, words, an end, and padding."""
    end = text["eos_id"] if text.get("pool_type") == "eos" else VOCABULARY - 1  # CLIP's own end is its largest id
    lengths = [2, 5, 9, context - 3, context]
    tokens = torch.full((len(lengths), context), padding)
    for row, length in enumerate(lengths):
        tokens[row, : length - 1] = torch.randint(3, VOCABULARY - 1, (length - 1,))
        tokens[row, length - 1] = end
    return tokens, lengths


@pytest.mark.parametrize(
    "name", [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in ALL if name not in KINDS)]
)
@torch.no_grad()
def test_embeddings_are_open_clips_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and in a batch, and from the states of the caption's own tokens."""
    monkeypatch.setattr(timm, "create_model", small_image_tower)
    config = shrink(name, tmp_path)
    torch.manual_seed(0)
    spec = ClipSpec(f"local-dir:{tmp_path}")
    encoder = ClipEncoder(spec)
    for parameter in encoder.parameters():  # biases, scales and positions that tell rows apart
        parameter += 0.02 * torch.randn_like(parameter)
    model, tower = encoder.model, encoder._text_model
    padding = tower.config.pad_token_id if hasattr(tower, "config") else 0
    tokens, lengths = captions(config["text_cfg"], padding, spec.context_length)

    seen: list[Any] = []
    last = tower.transformer if hasattr(tower, "config") else tower.ln_final
    hook = last.register_forward_hook(lambda module, args, out: seen.append(getattr(out, "last_hidden_state", out)))
    theirs = model.encode_text(tokens, normalize=False)
    hook.remove()
    ours = encoder.encode_text(tokens)
    torch.testing.assert_close(ours.embed, theirs, rtol=1e-4, atol=1e-5)
    assert ours.embed.shape == (len(tokens), spec.embed_dim)
    assert torch.pdist(ours.embed).min() > 1e-3
    reads_padding = config["text_cfg"].get("no_causal_mask", False)
    assert ours.mask.sum(1).tolist() == ([spec.context_length] * len(tokens) if reads_padding else lengths)
    assert ours.states.shape == (*ours.mask.shape, spec.text_width)
    if seen[0].ndim == 3:  # CoCa normalises its own token alone
        torch.testing.assert_close(
            ours.states[ours.mask], seen[0][:, : ours.mask.shape[1]][ours.mask], rtol=1e-4, atol=1e-5
        )
    assert not ours.states[~ours.mask].any()
    assert not ours.tokens[~ours.mask].any()
    monkeypatch.setattr(ClipEncoder, "_padding", padding)
    longest = int(ours.mask[:3].sum(1).max())
    few = TextFeatures(*(part[:3, :longest] for part in ours[:3]), ours.embed[:3])
    for kept in (ours, few):  # as a store keeps them, and some of them in a batch of their own
        again = encoder.with_states(kept._replace(states=kept.states[..., :0]))
        torch.testing.assert_close(again.states, kept.states, rtol=1e-4, atol=1e-5)
    for row, caption in enumerate(tokens):
        alone = encoder.encode_text(caption[None])
        torch.testing.assert_close(alone.embed[0], theirs[row], rtol=1e-4, atol=1e-5)
        states = ours.states[row][ours.mask[row]]
        torch.testing.assert_close(alone.states[0][alone.mask[0]], states, rtol=1e-4, atol=1e-5)

    images = torch.rand(2, 3, spec.image_size, spec.image_size)
    mean, std = (torch.tensor(model.visual.preprocess_cfg[key])[:, None, None] for key in ("mean", "std"))
    theirs = model.encode_image((images - mean) / std, normalize=False)
    torch.testing.assert_close(encoder.encode_image(images * 2 - 1), theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder.encode_image(images[:1] * 2 - 1)[0], theirs[0], rtol=1e-3, atol=1e-4)


PIECES = ["▁a", "▁red", "▁circle", "▁", *"abcdefghijklmnopqrstuvwxyz"]
#: A tiny tokenizer of the class that a config's tokenizer has.
TOKENIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT-B-16-SigLIP": (
        "T5Tokenizer",
        {"vocab": [(piece, -2.0) for piece in ["<pad>", "</s>", "<unk>", *PIECES]], "extra_ids": 0},
    ),
    "ViT-B-16-SigLIP2": (
        "GemmaTokenizer",
        {
            "vocab": {piece: row for row, piece in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *PIECES])},
            **{"merges": [], "padding_side": "right", "add_bos_token": False, "add_eos_token": True},
        },
    ),
    "ViT-L-14-CLIPA": (
        "BertTokenizer",
        {"vocab": {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle"])}},
    ),
    **dict.fromkeys(
        ("ViT-H-14-worldwide", "xlm-roberta-base-ViT-B-32"),
        (
            "XLMRobertaTokenizer",
            {"vocab": [(piece, -2.0) for piece in ["<s>", "<pad>", "</s>", "<unk>", *PIECES, "<mask>"]]},
        ),
    ),
    "nllb-clip-base": (
        "NllbTokenizer",
        {"vocab": {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *PIECES])}, "merges": []},
    ),
}
IMAGES = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}


@pytest.mark.parametrize("name", TOKENIZERS)
@torch.no_grad()
def test_captions_through_a_tokenizer_of_the_same_class(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = shrink(name, tmp_path, **IMAGES)
    kind, settings = TOKENIZERS[name]
    getattr(transformers, kind)(**settings).save_pretrained(tmp_path)
    encoder = ClipSpec(f"local-dir:{tmp_path}").load()
    long = "a red circle " * 40
    texts = ["", "a red circle", "red", long]
    tokens = encoder.tokenize(texts)
    assert tokens.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts))
    assert "1 caption(s) cut" in caplog.text

    text = encoder.describe(texts)
    theirs = encoder.model.encode_text(tokens, normalize=False)
    torch.testing.assert_close(text.embed, theirs, rtol=1e-4, atol=1e-5)
    raw = transformers.AutoTokenizer.from_pretrained(tmp_path)(texts, truncation=True, max_length=tokens.shape[1])
    real = [tokens.shape[1]] * 4 if config["text_cfg"].get("no_causal_mask") else [len(ids) for ids in raw["input_ids"]]
    assert text.mask.sum(1).tolist() == real
    assert torch.pdist(text.embed).min() > 1e-4


def test_what_has_to_be_fetched_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "clip").mkdir()
    shrink("ViT-H-14-worldwide", tmp_path / "clip", **IMAGES)
    named = ClipSpec(f"local-dir:{tmp_path}/clip")
    (tmp_path / "hf").mkdir()
    shrink("xlm-roberta-base-ViT-B-32", tmp_path / "hf", **IMAGES)
    (tmp_path / "hf" / "xlm-roberta-base" / "config.json").unlink()
    for spec, what in {
        named: f"tokenizer of .*facebook/xlm-v-base.*--include '.*' --local-dir {tmp_path}/clip` first",
        ClipSpec(
            f"local-dir:{tmp_path}/hf"
        ): f"download xlm-roberta-base --include config.json --local-dir {tmp_path}/hf/xlm-roberta-base`",
        ClipSpec("xlm-roberta-base-ViT-B-32"): "run `hf download xlm-roberta-base --include config.json` first",
    }.items():
        with pytest.raises(InputError, match=what) as error:
            spec.load()
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"needs transformers .*install transformers"):
        named.load()


def test_weights_in_a_file_are_preprocessed_as_published_ones() -> None:
    """A file says nothing about the mean that its pixels had."""
    assert _preprocessing_of_tags("ViT-B-16-SigLIP")["mean"] == (0.5, 0.5, 0.5)
    assert _preprocessing_of_tags("MobileCLIP2-S0") == {
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
        "interpolation": "bilinear",
    }
    assert _preprocessing_of_tags("ViT-L-14").keys() == {"interpolation"}, "its published weights differ"
    assert _preprocessing_of_tags("tiny-rn") == {}


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "coca_ViT-B-32"])
def test_another_loss_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="train it with open_clip"):
        ClipTask(name)
