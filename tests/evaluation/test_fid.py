"""FID as the field reports it, with random weights: against transformers' DINOv2 and torch-fidelity's pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_fidelity
import transformers
from lightning import Trainer
from torch import Tensor
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorBase, FeatureExtractorDinoV2

from unclip_pl.cli import main
from unclip_pl.clip import ClipSpec
from unclip_pl.data.chosen import ChosenCaptions
from unclip_pl.data.datamodule import UnclipDataModule
from unclip_pl.data.sampler import RowBatch
from unclip_pl.errors import InputError
from unclip_pl.evaluation.fid import FidEvaluation, load_dinov2, resized_positions
from unclip_pl.generation.pictures import to_bytes
from unclip_pl.generation.priors import TrueEmbeddingSpec

NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.": "blocks.",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm.": "norm.",
}


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' DINOv2, two blocks of width 128."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    net = transformers.Dinov2Model(config).eval()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


@pytest.fixture(scope="module")
def weights(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights under Meta's names."""
    state: dict[str, Tensor] = {}
    for name, value in reference.state_dict().items():
        for theirs, metas in NAMES.items():
            name = name.replace(theirs, metas)
        state[name] = value
    for block in range(2):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{block}.attention.{x}_proj.{kind}") for x in "qkv"]
            state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    path = tmp_path_factory.mktemp("dinov2") / "dinov2.pth"
    torch.save(state, path)
    return path


@torch.no_grad()
def test_dinov2_is_transformers(reference: Any, weights: Path) -> None:
    images = torch.randint(256, (3, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    theirs = reference((images / 255 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(load_dinov2(str(weights))(images)[0], theirs, rtol=1e-3, atol=1e-3)


def test_positions_are_resized_as_dinov2_does() -> None:
    """A ramp of 37 patches is read at (i + ½) 37 / 16.1 − ½: with 16 instead of 16.1 the last would lie .22 further."""
    ramp = torch.arange(37.0).expand(37, 37)
    grid = resized_positions(torch.cat([torch.full((1, 1, 2), 7.0), torch.stack([ramp, ramp.T], -1).view(1, -1, 2)], 1))
    assert grid[0, 0].tolist() == [7, 7]
    columns, rows = grid[0, 1:].view(16, 16, 2).unbind(-1)
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    torch.testing.assert_close(columns[5], expected, rtol=0, atol=0.1)
    torch.testing.assert_close(columns.T, rows)
    same = torch.randn(1, 257, 4)
    assert resized_positions(same) is same


@pytest.mark.parametrize("content", [{"trap": Path("x")}, {"cls_token": torch.zeros(1, 1, 128)}, [1]])
def test_dinov2_takes_nothing_but_its_weights(content: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No DINOv2 weights"):
        load_dinov2(str(tmp_path / "none.pth"))
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"holds no weights of a DINOv2 .* download") as error:
        load_dinov2(str(tmp_path / "other.pth"))
    assert "\n" not in str(error.value)


def data(run: Path, captions: Path, **settings: Any) -> ChosenCaptions:
    clip = ClipSpec("tiny-rn", f"{run}/clip/checkpoints/last.ckpt")
    fixed = {"source": f"{run}/data", "store": f"{run}/store", "clip": clip, "batch_size": 5, "image_size": 32}
    return ChosenCaptions(str(captions), **({"count": 12} | fixed | settings))


def chosen(module: ChosenCaptions) -> list[RowBatch]:
    return list(module.test_dataloader().sampler)  # type: ignore[call-overload]


def test_the_list_is_the_seeds_and_is_kept(mini_run: Path, tmp_path: Path) -> None:
    first = data(mini_run, tmp_path / "a.tsv")
    batches = chosen(first)
    lines = (tmp_path / "a.tsv").read_text().splitlines()
    assert len(set(lines)) == 12 == sum(len(batch.rows) for batch in batches)
    again = chosen(data(mini_run, tmp_path / "a.tsv", choice_seed=9, count=3))
    texts = [
        [module.embeddings.captions(batch) for batch in found] for module, found in ((first, batches), (first, again))
    ]
    assert texts[0] == texts[1], "a list that is there is the choice"
    for name, seed in (("b", 0), ("c", 1)):
        chosen(data(mini_run, tmp_path / f"{name}.tsv", choice_seed=seed))
    assert (tmp_path / "b.tsv").read_text().splitlines() == lines
    assert (tmp_path / "c.tsv").read_text().splitlines() != lines
    place = dict(zip(first.embeddings.keys(first.real_rows), reversed(first.real_rows.tolist()), strict=True))
    keys = {key for key, row in place.items() if row in first._choose(place).rows}
    assert keys == {line.split("\t")[0] for line in lines}, "keys alone decide"


def test_lists_that_do_not_fit(mini_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    with pytest.raises(InputError, match=r"Expected 30 held-out images .* Got 24: lower data.count"):
        data(mini_run, path, count=30).test_dataloader()
    data(mini_run, path).test_dataloader()
    key = path.read_text().partition("\t")[0]
    for line, what in {"nobody\tx": "Got 'nobody", f"{key}\tx": "Got 'x', which its image does not have"}.items():
        path.write_text(f"{line}\n")
        with pytest.raises(InputError, match=what):
            data(mini_run, path).test_dataloader()


@pytest.fixture
def module(mini_run: Path, weights: Path, lookup: Any, tmp_path: Path) -> FidEvaluation:
    """Perfect pictures of the chosen captions' own images."""
    clip = ClipSpec("tiny-rn", "clip/checkpoints/last.ckpt")
    store = data(mini_run, tmp_path / "captions.tsv").embeddings
    everything = store.evaluation_batch(RowBatch(*(2 * [store.rows(2)])))
    decoder = type(lookup)("none", 32, _batches=[everything])
    judge = ClipSpec("tiny-judge", "judge/checkpoints/last.ckpt")
    folders = {"out": f"{tmp_path}/out", "reference": f"{tmp_path}/reference"}
    prior = TrueEmbeddingSpec(keep_norm=True)
    return FidEvaluation(
        str(mini_run), clip, judge, prior, decoder, **folders, guidances=[1, 2], dinov2_weights=str(weights)
    )


def run(module: FidEvaluation, source: UnclipDataModule) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.test(module, datamodule=source, verbose=False)


def test_distance_is_torch_fidelitys(
    module: FidEvaluation, reference: Any, mini_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their dataset, resizing, statistics and distance, and transformers' network."""
    source = data(mini_run, tmp_path / "captions.tsv")
    run(module, source)
    result = json.loads((tmp_path / "out" / "fid.json").read_text())
    assert result["protocol"]["captions"] == 12
    assert result["protocol"]["real_images"] == 24
    assert result["scores"]["1"] == result["scores"]["2"], "this decoder knows no guidance"

    class Theirs(FeatureExtractorDinoV2):
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            FeatureExtractorBase.__init__(self, name, features_list)
            self.feature_extractor_internal_dtype = torch.float32
            self.net = reference
            self.model = lambda x: self.net(x).last_hidden_state[:, 0]

    torch_fidelity.register_feature_extractor("dinov2-random", Theirs)
    rows = [
        torch.cat([source.embeddings.upsampler_batch(b).image for b in batches])
        for batches in (chosen(source), [RowBatch(source.real_rows, source.real_rows)])
    ]

    class Pictures(torch.utils.data.Dataset[Tensor]):
        def __init__(self, images: Tensor) -> None:
            self.images = to_bytes(images)

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> Tensor:
            return self.images[index]

    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(rows[0]), input2=Pictures(rows[1]), fid=True, cuda=False, verbose=False, cache=False,
        save_cpu_ram=True, batch_size=8, feature_extractor="dinov2-random", feature_layer_fid="dinov2",
    )  # fmt: skip
    assert result["scores"]["1"]["fd_dinov2"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)

    (kept,) = (tmp_path / "reference").iterdir()
    monkeypatch.setattr(ChosenCaptions, "real_dataloader", lambda self: pytest.fail("measured again"))
    run(module, data(mini_run, tmp_path / "captions.tsv"))
    assert json.loads((tmp_path / "out" / "fid.json").read_text())["scores"] == result["scores"]
    assert [*(tmp_path / "reference").iterdir()] == [kept]


def test_what_does_not_fit_the_protocol(module: FidEvaluation, mini_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set data\.image_size to 32"):
        run(module, data(mini_run, tmp_path / "captions.tsv", image_size=64))
    clip = ClipSpec("tiny-rn", f"{mini_run}/clip/checkpoints/last.ckpt")
    with pytest.raises(InputError, match=r"start from configs/evaluate/coco-30k\.yaml"):
        run(module, UnclipDataModule(f"{mini_run}/data", f"{mini_run}/store", clip))
    with pytest.raises(InputError, match="inception_weights or dinov2_weights"):
        FidEvaluation("", clip, ClipSpec("a"), module.prior, module.decoder, "", "", [1])


def test_the_config_runs(mini_run: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(
        f"""
model:
  class_path: unclip_pl.evaluation.fid.FidEvaluation
  init_args:
    run: {mini_run}
    clip: {{name: tiny-rn, pretrained: clip/checkpoints/last.ckpt}}
    judge: {{name: tiny-judge, pretrained: judge/checkpoints/last.ckpt}}
    inception_weights: ''
    dinov2_weights: {weights}
    guidances: [1.0, 3.0]
    prior:
      class_path: unclip_pl.generation.priors.DiffusionPriorSpec
      init_args: {{checkpoint: prior/checkpoints/last.ckpt}}
    decoder:
      class_path: unclip_pl.generation.decoding.DecoderSpec
      init_args:
        checkpoint: decoder/checkpoints/last.ckpt
        image_size: 32
        sampler: {{class_path: unclip_pl.diffusion.DDIM, init_args: {{steps: 2}}}}
        upsamplers: []
    reference: {tmp_path}/reference
    out: {tmp_path}/out
data:
  class_path: unclip_pl.data.chosen.ChosenCaptions
  init_args:
    captions: {tmp_path}/captions.tsv
    count: 12
    source: {mini_run}/data
    store: {mini_run}/store
    clip: {{name: tiny-rn, pretrained: {mini_run}/clip/checkpoints/last.ckpt}}
    num_workers: 0
    image_size: 32
trainer: {{logger: false}}
"""
    )
    words = ["test", "--config", "configs/evaluate/coco-30k.yaml", "--config", str(tmp_path / "small.yaml")]
    assert main(words) == 0
    scores = json.loads((tmp_path / "out" / "fid.json").read_text())["scores"]
    assert scores.keys() == {"1", "3"}
    assert scores["1"]["fd_dinov2"] != scores["3"]["fd_dinov2"]
