from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.nn.codec import Chunks, EmbeddingCodec, Spacing


def embeddings(n: int = 3000, d: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Raw (image, text): off-centre, with a spectrum that falls by half at every axis, and arbitrary norms."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(99)))[0]
    image = (torch.randn(n, d, generator=g) * 0.5 ** torch.arange(d)) @ turn + turn[0] * 2
    text = image + 0.5 * torch.randn(n, d, generator=g)
    return image * (1 + torch.rand(n, 1, generator=g)), text


def chunks(image: Tensor, text: Tensor, size: int = 700) -> Chunks:
    def again() -> Iterable[tuple[Tensor, Tensor]]:
        return zip(image.split(size), text.split(size), strict=True)

    return again


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    return embeddings()


@pytest.fixture(scope="module")
def codec(data: tuple[Tensor, Tensor]) -> EmbeddingCodec:
    return EmbeddingCodec.fit(chunks(*data), fingerprint="tiny-3f2a", code_length=8, buckets=32, dot_buckets=16)


def test_axes_are_the_principal_ones(codec: EmbeddingCodec, data: tuple[Tensor, Tensor]) -> None:
    """Against numpy-style PCA (SVD of the centred matrix) of the same nine tenths."""
    unit = F.normalize(data[0].double(), dim=-1)
    train = unit[torch.arange(len(unit)) % 10 != 9]
    _, s, v = torch.linalg.svd(train - train.mean(0), full_matrices=False)
    torch.testing.assert_close(codec.mean, train.mean(0).float())
    torch.testing.assert_close(codec.std, (s[:8] / len(train) ** 0.5).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((codec.components @ v[:8].T.float()).abs(), torch.eye(8), atol=1e-3, rtol=0)
    assert (codec.std.diff() <= 0).all()


def test_chunking_changes_nothing(codec: EmbeddingCodec, data: tuple[Tensor, Tensor]) -> None:
    other = EmbeddingCodec.fit(chunks(*data, size=123), code_length=8, buckets=32, dot_buckets=16)
    torch.testing.assert_close(other.decode(other.encode(data[0])), codec.decode(codec.encode(data[0])))


def test_shapes_ranges_and_norms(codec: EmbeddingCodec, data: tuple[Tensor, Tensor]) -> None:
    codes = codec.encode(data[0])
    assert (codec.embed_dim, codec.code_length, codec.buckets, codec.dot_buckets) == (12, 8, 32, 16)
    assert codes.shape == (3000, 8)
    assert codes.dtype == torch.int64
    assert (codes.min(), codes.max()) == (0, 31)
    torch.testing.assert_close(codec.decode(codes).norm(dim=-1), torch.ones(3000))
    assert torch.equal(codec.encode(data[0] * 7), codes)  # norms in are ignored
    assert torch.equal(codec.encode(data[0][:5].double()), codes[:5])


def test_quantile_buckets_hold_equal_counts(codec: EmbeddingCodec, data: tuple[Tensor, Tensor]) -> None:
    for code in codec.encode(data[0]).T:
        counts = torch.bincount(code, minlength=32)
        assert counts.min() >= 3000 // 32 - 2
        assert counts.max() <= 3000 // 32 + 3
    dots = codec.encode_dot(F.cosine_similarity(*data, dim=-1))
    assert torch.bincount(dots, minlength=16).float().std() < 2


def test_uniform_buckets_have_equal_widths(data: tuple[Tensor, Tensor]) -> None:
    codec = EmbeddingCodec.fit(chunks(*data), code_length=5, buckets=16, spacing="uniform")
    widths = codec.edges.diff(dim=1)
    torch.testing.assert_close(widths, widths[:, :1].expand_as(widths), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("spacing", ["quantile", "uniform"])
def test_decodes_to_conditional_means(spacing: Spacing, data: tuple[Tensor, Tensor]) -> None:
    codec = EmbeddingCodec.fit(chunks(*data), code_length=3, buckets=64, spacing=spacing)
    y = (F.normalize(data[0], dim=-1) - codec.mean) @ codec.components.T
    codes = codec.encode(data[0])
    for axis in range(3):
        edges = torch.cat([y[:, axis].min()[None], codec.edges[axis], y[:, axis].max()[None]])
        for code in range(64):
            inside = y[codes[:, axis] == code, axis]
            expected = inside.mean() if len(inside) else edges[code : code + 2].mean()  # empty: the midpoint
            torch.testing.assert_close(codec.levels[axis, code], expected, atol=1e-5, rtol=1e-4)


def test_levels_are_ascending_and_in_their_buckets(codec: EmbeddingCodec) -> None:
    assert (codec.levels.diff(dim=1) > 0).all()
    assert (codec.levels[:, :-1] <= codec.edges + 1e-6).all()
    assert (codec.levels[:, 1:] >= codec.edges - 1e-6).all()


def test_values_are_levels_at_unit_variance(codec: EmbeddingCodec, data: tuple[Tensor, Tensor]) -> None:
    codes = codec.encode(data[0])
    values = codec.values(codes)
    torch.testing.assert_close(values, codec.value_table.T.gather(0, codes))
    torch.testing.assert_close(values.std(0), torch.ones(8), atol=0.06, rtol=0)
    torch.testing.assert_close(values.mean(0), torch.zeros(8), atol=0.06, rtol=0)


def test_errors_add_up(codec: EmbeddingCodec, data: tuple[Tensor, Tensor]) -> None:
    """Axes are orthogonal, so squared errors off the axes and in the buckets sum to the whole."""
    z, codes = F.normalize(data[0], dim=-1), codec.encode(data[0])
    decoded = (codec.values(codes) * codec.std) @ codec.components + codec.mean
    whole = (z - decoded).square().sum() / (z - codec.mean).square().sum()
    torch.testing.assert_close(codec.pca_error(z) + codec.quantisation_error(z), whole, rtol=1e-3, atol=1e-6)
    assert codec.quantisation_error(z) < 0.05
    assert codec.roundtrip_cosine(z).shape == (3000,)
    assert codec.roundtrip_cosine(z).mean() > 0.99


def test_more_buckets_and_axes_lose_less(data: tuple[Tensor, Tensor]) -> None:
    held_out = embeddings(seed=1)[0]
    fits = [
        EmbeddingCodec.fit(chunks(*data), code_length=n, buckets=b) for n, b in [(4, 16), (4, 64), (8, 64), (12, 256)]
    ]
    quantisation = [c.quantisation_error(held_out) for c in fits]
    pca = [c.pca_error(held_out) for c in fits]
    assert quantisation[0] > quantisation[1] > quantisation[3]
    assert pca[1] > pca[2] > pca[3]
    assert pca[3].abs() < 1e-4  # all axes kept
    assert fits[3].roundtrip_cosine(held_out).mean() > 0.999


def test_code_length_by_held_out_variance(data: tuple[Tensor, Tensor]) -> None:
    """The fewest axes below 1 %: one axis fewer would lose more, on the rows that were held out."""
    codec = EmbeddingCodec.fit(chunks(*data), buckets=4)
    held_out = data[0][9::10]
    fewer = EmbeddingCodec.fit(chunks(*data), code_length=codec.code_length - 1, buckets=4)
    assert codec.pca_error(held_out) < 0.01 <= fewer.pca_error(held_out)


def test_degenerate_data() -> None:
    """Rank one, repeated rows, fewer rows than buckets: nothing divides by zero."""
    image = torch.tensor([[1.0, 0, 0], [0.0, 1, 0]]).repeat(15, 1)
    codec = EmbeddingCodec.fit(chunks(image, image), code_length=3, buckets=64, dot_buckets=8)
    assert codec.value_table.isfinite().all()
    assert codec.decode(codec.encode(image)).isfinite().all()


def test_two_points_need_one_bit() -> None:
    image = torch.tensor([[1.0, 0, 0], [0.0, 1, 0]]).repeat(15, 1)
    codec = EmbeddingCodec.fit(chunks(image, image), code_length=1, buckets=2, dot_buckets=2)
    torch.testing.assert_close(codec.decode(codec.encode(image)), image, atol=1e-5, rtol=0)


def test_file_and_state_dict_round_trips(codec: EmbeddingCodec, data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    codec.save(tmp_path / "codec.safetensors")
    read, filled = EmbeddingCodec(str(tmp_path / "codec.safetensors")), EmbeddingCodec()
    filled.load_state_dict(codec.state_dict())
    for other in (read, filled):
        assert other.fingerprint == "tiny-3f2a"
        assert torch.equal(other.encode(data[0]), codec.encode(data[0]))
        assert torch.equal(other.decode(other.encode(data[0])), codec.decode(codec.encode(data[0])))
    assert [p.name for p in tmp_path.iterdir()] == ["codec.safetensors"]
    assert not list(codec.parameters())


def test_mixed_precision_does_not_blur_codes(codec: EmbeddingCodec, data: tuple[Tensor, Tensor]) -> None:
    codes = codec.encode(data[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codec.encode(data[0]), codes)
        assert codec.decode(codes).dtype == torch.float32


def test_errors(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="unclip codec"):
        EmbeddingCodec(str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match="at least 20 embeddings"):
        EmbeddingCodec.fit(chunks(data[0][:5], data[1][:5]))
    with pytest.raises(ValueError, match="embed_dim = 12"):
        EmbeddingCodec.fit(chunks(*data), code_length=13)
