"""All of FID beside the distance itself (:mod:`unclip_pl.metrics.frechet`): features, references, guidance scales.

:class:`FID` is ``fid`` of the test-modules that score one model. :class:`FidEvaluation` is ``fid@SCALE`` as the field
reports it, for ``unclip test --config configs/evaluate/coco-30k.yaml``. Features are those of torch-fidelity's
extractors, with weights from local files.
"""

import json
from hashlib import sha256 as hash_of
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from tqdm import tqdm

from unclip_pl.clip import ClipSpec
from unclip_pl.data.chosen import ChosenCaptions
from unclip_pl.diffusion import check_guidance
from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.evaluation.inputs import check_judge, judge_of, parts_of, streams_for
from unclip_pl.files import (
    load_plain,
    read_tensors,
    require_unpacked,
    sha256,
    why_not_plain,
    write_json,
    write_tensors,
)
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.generation.pictures import to_bytes
from unclip_pl.generation.priors import PriorSpec
from unclip_pl.metrics.clip_score import clip_scores
from unclip_pl.metrics.frechet import FeatureMoments, FrechetDistance, moments_distance
from unclip_pl.origin import commit
from unclip_pl.types import EvaluationBatch, PriorBatch

#: How real pictures are brought to their size; the extractors' own resizing comes after it, for both sides.
RESIZE, CROP = "shorter side, antialiased bicubic (Pillow)", "central square"

#: Side of the pictures that torch-fidelity shows to DINOv2, in patches of 14 px.
PATCHES = 16


class FID(FrechetDistance):
    """FID of pictures: the Fréchet distance of Inception's features.

    Args:
        weights: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``.
    """

    def __init__(self, weights: str) -> None:
        super().__init__(2048)
        self.weights = weights

    def load(self) -> None:
        """Load Inception onto the metric's device, see :func:`load_inception`."""
        self._net = (load_inception(self.weights).to(self.device),)  # a tuple keeps it out of the module tree

    def update(self, images: Tensor, *, real: bool) -> None:
        """Add pictures.

        Args:
            images: (B, 3, H, H) in [-1, 1], of any side.
            real: whether they are real ones.
        """
        super().update(self._net[0](to_bytes(images))[0], real=real)


class Extractor(NamedTuple):
    """A network whose features a distance reads."""

    net: nn.Module  # uint8 pictures → ((B, F),)
    width: int  # F
    sha256: str  # of its weights' file


class FidEvaluation(LightningModule):
    """One picture for each chosen caption, against all real images, at several guidance scales.

    It logs ``fid@SCALE``, ``fd_dinov2@SCALE`` and ``clip_score@SCALE``, and writes them with the protocol to
    ``out/fid.json``. The data are :class:`unclip_pl.data.chosen.ChosenCaptions`.

    Args:
        run: folder of the run; checkpoints are named relative to it.
        clip: the CLIP that conditions everything.
        judge: another CLIP, for the CLIP score.
        prior: draws one embedding a caption, the same at every scale.
        decoder: draws pictures as large as the real ones; its own guidance is not used.
        out: folder of the result.
        reference: folder in which the statistics of real images are kept for other runs.
        guidances: scales of the decoder's guidance.
        inception_weights: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``, for ``fid``.
        dinov2_weights: Meta's ``dinov2_vitl14_pretrain.pth``, for ``fd_dinov2``.
        seed: base seed of every random draw.

    Raises:
        InputError: no weights are named, a scale is negative, or the judge is the CLIP.
    """

    batch_type = EvaluationBatch

    def __init__(
        self,
        run: str,
        clip: ClipSpec,
        judge: ClipSpec,
        prior: PriorSpec,
        decoder: DecoderSpec,
        out: str,
        reference: str,
        guidances: list[float],
        inception_weights: str = "",
        dinov2_weights: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_judge(judge, clip)
        if not (inception_weights or dinov2_weights):
            raise InputError("Expected inception_weights or dinov2_weights. Got neither: name a file of weights.")
        if not guidances:
            raise InputError("Expected guidance scales. Got none: give guidances, such as [1.0, 2.0].")
        self.run = Path(run)
        self.clip = clip
        self.judge = judge
        self.prior = prior
        self.decoder = decoder
        self.out = Path(out)
        self.reference = Path(reference)
        self.guidances = [check_guidance(scale) for scale in guidances]
        self.weights = {"fid": inception_weights, "fd_dinov2": dinov2_weights}
        self.seed = seed

    def on_test_start(self) -> None:
        """Load every network, refuse to mix CLIPs, and see to the statistics of the real images."""
        if not isinstance(getattr(self.trainer, "datamodule", None), ChosenCaptions):
            raise InputError(
                "Expected unclip_pl.data.chosen.ChosenCaptions as data, which keeps the list of captions. Got others: "
                "start from configs/evaluate/coco-30k.yaml."
            )
        loaders = {"fid": load_inception, "fd_dinov2": load_dinov2}
        self._extractors: dict[str, Extractor] = {}
        for name, path in self.weights.items():
            if path:
                net = loaders[name](path).to(self.device)
                probe = torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=self.device)
                self._extractors[name] = Extractor(net, net(probe)[0].shape[1], sha256(Path(path)))
        self._parts = parts_of(self, decoder=self.decoder, priors={"prior": self.prior})
        self._judge = judge_of(self, self._parts.fingerprint)
        self._real = {name: self._reference(name) for name in self._extractors}
        self._fake = {scale: self._moments() for scale in self.guidances}
        self._scores = {scale: MeanMetric().to(self.device) for scale in self.guidances}

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Draw a picture for each caption at each scale, from the same noise."""
        decoder, prior, judge = self._parts.decoder, self._parts.priors["prior"], self._judge[0]
        assert decoder is not None
        pairs = PriorBatch(batch.image_embed, batch.text)
        z_i = prior.embed_batch(pairs, generator=streams_for(batch, self.seed))
        words = F.normalize(judge.describe(batch.captions).embed.float(), dim=-1)
        for scale in self.guidances:
            noise = streams_for(batch, self.seed, 1)
            images = decoder.decode(z_i, batch.text, guidance=scale, generator=noise)
            if images.shape != batch.image.shape:
                sides = images.shape[-1], batch.image.shape[-1]
                raise InputError(
                    f"Expected pictures as large as the real ones. Got {sides[0]} px and {sides[1]} px: set "
                    f"data.image_size to {sides[0]}, or add upsamplers."
                )
            for name, moments in self._fake[scale].items():
                moments.update(self._extractors[name].net(to_bytes(images))[0])
            looks = F.normalize(judge.encode_image(images).float(), dim=-1)
            self._scores[scale].update(clip_scores(looks, words))

    def on_test_epoch_end(self) -> None:
        """Log all scores, and write them beside the protocol."""
        found: dict[str, dict[str, float]] = {}
        drawn = 0
        for scale in self.guidances:
            fakes = {name: moments.compute() for name, moments in self._fake[scale].items()}
            scores = {name: moments_distance(self._real[name], fake).item() for name, fake in fakes.items()}
            found[f"{scale:g}"] = scores | {"clip_score": self._scores[scale].compute().item()}
            drawn = int(next(iter(fakes.values()))[0, 0])
        self.log_dict({f"{name}@{scale}": x for scale, scores in found.items() for name, x in scores.items()})
        if self.trainer.is_global_zero:
            protocol = self._facts() | {"captions": drawn, "prior": repr(self.prior), "decoder": repr(self.decoder)}
            weights = {name: extractor.sha256 for name, extractor in self._extractors.items()}
            list_hash = {"captions_sha256": sha256(Path(self._data.captions))}
            content = {"protocol": protocol | list_hash, "weights_sha256": weights, "scores": found}
            write_json(self.out / "fid.json", content | {"seed": self.seed, "commit": commit()}, indent=2)

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined] # Lightning attaches it without declaring it

    def _moments(self) -> dict[str, FeatureMoments]:
        return {name: FeatureMoments(part.width).to(self.device) for name, part in self._extractors.items()}

    def _facts(self) -> dict[str, Any]:
        """Return what the statistics of the real images depend on, beside the extractor."""
        images = self._data.embeddings
        shards = hash_of(json.dumps([record.source_sha256 for record in images.records]).encode()).hexdigest()
        sizes = {"image_size": images.image_size, "resize": RESIZE, "crop": CROP}
        return {"real_images": len(self._data.real_rows), "shards_sha256": shards} | sizes

    def _reference(self, name: str) -> Tensor:
        """Return the moments of all real images: those that are kept, or measured now."""
        extractor = self._extractors[name]
        facts = json.dumps(self._facts() | {"extractor": name, "weights": extractor.sha256}, sort_keys=True)
        path = self.reference / f"{name}-{hash_of(facts.encode()).hexdigest()[:12]}.safetensors"
        if path.is_file():
            command = "unclip test --config configs/evaluate/coco-30k.yaml"
            kept = read_tensors(path, ["moments"], what="statistics of real images", command=command)
            return kept.tensors["moments"].to(self.device)
        moments = FeatureMoments(extractor.width).to(self.device)
        for batch in tqdm(self._data.real_dataloader(), desc=f"real images, {name}", disable=self.global_rank > 0):
            moments.update(extractor.net(to_bytes(batch.image.to(self.device)))[0])
        total = moments.compute()
        if self.trainer.is_global_zero:
            write_tensors(path, {"moments": total.cpu()}, {"facts": facts})
        return total


def load_inception(path: str) -> nn.Module:
    """Load torch-fidelity's Inception of FID: uint8 pictures of any size → ((B, 2048),), resized as TensorFlow 1 did.

    Raises:
        MissingFileError: no weights there.
        InputError: the file holds more than tensors.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if not Path(path).is_file():
        raise MissingFileError(
            f"No Inception weights at {path}: download weights-inception-2015-12-05-6726825d.pth of torch-fidelity "
            "v0.2.0, or leave inception_weights empty and read fd_judge."
        )
    try:  # torch-fidelity unpickles any file: nothing but tensors may get there
        require_unpacked(path, "weights")
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} holds no plain weights ({why_not_plain(error)}): download it again.") from error
    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)


def load_dinov2(path: str) -> nn.Module:
    """Load torch-fidelity's DINOv2: uint8 pictures of any size → ((B, F),), resized to 224 px as TensorFlow 1 did.

    torch-fidelity takes the network from torch.hub, which needs the internet and runs the code that it gets. Here it is
    timm's, of the width and depth that the weights have.

    Args:
        path: weights as Meta publishes them, without registers: ``dinov2_vitl14_pretrain.pth`` is what the field
            reports, with F = 1024 (Stein et al. 2023).

    Raises:
        MissingFileError: no weights there.
        InputError: the file holds more than tensors, or another network's.
    """
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorBase, FeatureExtractorDinoV2

    if not Path(path).is_file():
        raise MissingFileError(
            f"No DINOv2 weights at {path}: download DINOv2's dinov2_vitl14_pretrain.pth, or leave dinov2_weights empty."
        )
    try:
        network = _dinov2(load_plain(path))
    except Exception as error:
        reason = " ".join(why_not_plain(error).split())
        raise InputError(
            f"{path} holds no weights of a DINOv2 ViT without registers ({reason:.200}): "
            "download dinov2_vitl14_pretrain.pth again."
        ) from error
    extractor = FeatureExtractorDinoV2.__new__(FeatureExtractorDinoV2)
    FeatureExtractorBase.__init__(extractor, "dinov2-vit-l-14", ["dinov2"])  # its own constructor downloads
    extractor.feature_extractor_internal_dtype = torch.float32
    extractor.model = network
    return extractor.requires_grad_(False).eval()


def _dinov2(state: dict[str, Tensor]) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    state = {name: value for name, value in state.items() if name != "mask_token"}  # of its training
    width = state["cls_token"].shape[-1]
    network = VisionTransformer(
        img_size=14 * PATCHES,
        patch_size=14,
        num_classes=0,
        embed_dim=width,
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        num_heads=width // 64,
        init_values=1.0,
    )
    network.load_state_dict(state | {"pos_embed": resized_positions(state["pos_embed"])})
    return network


def resized_positions(positions: Tensor) -> Tensor:
    """Resize position embeddings (1, 1 + n², W) to those of :data:`PATCHES` patches a side, as DINOv2 itself does.

    It scales by (PATCHES + 0.1) / n, bicubic and without antialiasing; exact sizes would move every position a little.
    """
    own, grid = positions[:, :1], positions[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    if side == PATCHES:
        return positions
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(PATCHES + 0.1) / side, mode="bicubic")
    return torch.cat([own, grid.flatten(2).mT], dim=1)
