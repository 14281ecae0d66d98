"""Networks whose features the field's distances read: torch-fidelity's extractors, with weights from local files."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_pl.errors import InputError, MissingFileError
from unclip_pl.files import load_plain, require_unpacked, why_not_plain

#: Side of the pictures that torch-fidelity shows to DINOv2, in patches of 14 px.
PATCHES = 16


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
