"""The mixture prior: its density by torch's and by quadrature, samples by moments, its cache by the full pass."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from unclip_pl.evaluation.callbacks import prior_of
from unclip_pl.generation.priors import MixturePrior, MixturePriorSpec
from unclip_pl.nn.ar_prior import ARPriorTransformer
from unclip_pl.nn.codec import EmbeddingCodec
from unclip_pl.nn.mixture_prior import Mixture, MixturePriorTransformer, sample
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.tasks import ARPriorTask, MixturePriorTask
from unclip_pl.types import PriorBatch, TextFeatures

D, W, CONTEXT, N, K = 6, 5, 7, 4, 3
#: Nats of a standard normal.
ENTROPY = 0.5 * math.log(2 * math.pi * math.e)


def net() -> MixturePriorTransformer:
    """Far from a fresh one: wrong outputs are to show in the draws."""
    torch.manual_seed(0)
    made = MixturePriorTransformer(D, W, CONTEXT, N, K, width=16, layers=2, heads=2).double()
    torch.nn.init.normal_(made.head.weight, std=0.3)
    return made


def captions(*lengths: int, seed: int = 0) -> TextFeatures:
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(len(lengths), max(lengths), W, generator=g, dtype=torch.float64)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextFeatures(mask.long(), states, mask, torch.randn(len(lengths), D, generator=g, dtype=torch.float64))


def mixtures(*shape: int) -> Mixture:
    g = torch.Generator().manual_seed(1)
    logits, mean, spread = torch.randn(3, *shape, K, generator=g, dtype=torch.float64)
    return Mixture(logits, mean, (spread - 0.5).exp())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_density_is_torchs_and_integrates_to_one() -> None:
    mixture = mixtures(5)
    y = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    found = Mixture(*(part[:, None] for part in mixture)).log_prob(y)  # (5, points)
    torch.testing.assert_close(torch.trapezoid(found.exp(), y), torch.ones(5, dtype=torch.float64))
    theirs = MixtureSameFamily(Categorical(logits=mixture.logits), Normal(mixture.mean, mixture.std))
    torch.testing.assert_close(found, theirs.log_prob(y[:, None]).T)


def test_right_parameters_of_a_gaussian_source_reach_its_entropy() -> None:
    """The chain rule: y_j given those before it is normal. Components that agree are one, however they are weighed."""
    g = seeded(2)
    root = torch.randn(N, N, generator=g, dtype=torch.float64).tril(-1) + torch.diag(torch.tensor([1.0, 0.5, 2.0, 0.3]))
    noise = torch.randn(100_000, N, generator=g, dtype=torch.float64)
    y, std = noise @ root.T, root.diagonal()
    mean = noise @ root.tril(-1).T  # of y_j given the noise, and so the numbers, before it
    logits = torch.randn(N, K, generator=g, dtype=torch.float64)
    said = Mixture(logits.expand(len(y), -1, -1), mean[..., None].expand(-1, -1, K), std[:, None].expand(len(y), N, K))
    source = MultivariateNormal(torch.zeros(N, dtype=torch.float64), scale_tril=root)
    torch.testing.assert_close(said.log_prob(y).sum(1), source.log_prob(y))
    nats = -said.log_prob(y).sum(1).mean().item()
    entropy = N * ENTROPY + root.diagonal().log().sum().item()
    assert nats == pytest.approx(entropy, abs=4 * math.sqrt(N / 2 / len(y)))
    assert source.entropy().item() == pytest.approx(entropy)


def test_a_fresh_network_says_mean_0_and_variance_1() -> None:
    fresh = MixturePriorTransformer(D, W, CONTEXT, N, 16, width=16, layers=1, heads=2).double()
    said = fresh(captions(4, 2), torch.randn(2, N, dtype=torch.float64))
    weight = said.logits.softmax(-1)
    mean = (weight * said.mean).sum(-1)
    variance = (weight * (said.mean.square() + said.std.square())).sum(-1) - mean.square()
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    torch.testing.assert_close(variance, torch.ones_like(mean))


def test_coordinates_are_said_from_those_before_and_padding_is_not_heard() -> None:
    made, text, y = net(), captions(4), torch.randn(1, N, dtype=torch.float64)
    before = made(text, y)
    for j in range(N):
        other = y.clone()
        other[:, j] += 1
        changed = made(text, other)
        torch.testing.assert_close(changed.mean[:, : j + 1], before.mean[:, : j + 1])
        assert (changed.mean[:, j + 1 :] - before.mean[:, j + 1 :]).abs().amax(-1).gt(1e-6).all()
    padded = text.pad(CONTEXT)._replace(states=torch.cat([text.states, torch.full((1, 3, W), 1e3)], 1))
    for got, wanted in zip(made(padded, y), before, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("guidance", "temperature"), [(1.0, 1.0), (2.5, 1.0), (0.0, 1.0), (1.0, 0.7)])
def test_cached_drawing_equals_the_full_pass(guidance: float, temperature: float) -> None:
    """Two candidates of each caption, every number drawn from the whole sequence worked out again."""
    made, text, null = net(), captions(4, 2, 6), captions(2, seed=9)
    repeated, g, y = text.repeat(2), seeded(7), torch.zeros(6, N, dtype=torch.float64)
    for j in range(N):
        with torch.no_grad():
            said = [made(repeated, y)] + ([made(null.repeat(6), y)] if guidance != 1 else [])
        halves = Mixture(*(torch.cat([part[:, j] for part in parts]) for parts in zip(*said, strict=True)))
        y[:, j] = sample(halves, guidance, temperature, generator=g)
    got = made.generate(
        text, unconditional=null, guidance=guidance, temperature=temperature, candidates=2, generator=seeded(7)
    )
    torch.testing.assert_close(got.flatten(0, 1), y)


def moments(y: Tensor) -> tuple[float, float]:
    return y.mean().item(), y.std().item()


def test_samples_have_the_moments_of_the_mixture() -> None:
    n = 100_000
    one = mixtures(1)
    drawn = sample(Mixture(*(part.expand(n, -1) for part in one)), 1, 1, generator=seeded(0))
    theirs = MixtureSameFamily(Categorical(logits=one.logits[0]), Normal(one.mean[0], one.std[0]))
    mean, std = moments(drawn)
    assert mean == pytest.approx(theirs.mean.item(), abs=4 * theirs.stddev.item() / math.sqrt(n))
    assert std == pytest.approx(theirs.stddev.item(), rel=0.02)


@pytest.mark.parametrize(("guidance", "temperature"), [(2.0, 1.0), (0.5, 1.0), (0.0, 1.0), (1.0, 0.25), (3.0, 2.0)])
def test_guidance_and_temperature_are_the_line_of_log_densities(guidance: float, temperature: float) -> None:
    """For Gaussians u and c, p ∝ (u · (c / u)^g)^(1/T) is one: precisions and weighed means add up."""
    n, c, u = 5000, (1.0, 0.5), (-0.5, 0.8)
    halves = Mixture(*(torch.tensor(x).repeat_interleave(n)[:, None] for x in ((0.0, 0.0), (c[0], u[0]), (c[1], u[1]))))
    if guidance == 1:
        halves = Mixture(*(part[:n] for part in halves))
    precision = guidance / c[1] ** 2 + (1 - guidance) / u[1] ** 2
    mean = (guidance * c[0] / c[1] ** 2 + (1 - guidance) * u[0] / u[1] ** 2) / precision
    std = (temperature / precision) ** 0.5
    found = moments(sample(halves, guidance, temperature, generator=seeded(0)))
    assert found[0] == pytest.approx(mean, abs=4 * std / math.sqrt(n))
    assert found[1] == pytest.approx(std, rel=0.05)


def test_guidance_does_not_follow_a_tail_to_the_ends() -> None:
    """A component of weight e^-9 is wider than the density without a caption; their ratio grows without end."""
    n, logits = 4000, torch.tensor([[0.0, -9.0], [0.0, -99.0]])
    mean, std = torch.zeros(2, 2), torch.tensor([[0.5, 2.0], [1.0, 1.0]])
    halves = Mixture(*(part.repeat_interleave(n, 0) for part in (logits, mean, std)))
    found = sample(halves, 2.0, 1.0, generator=seeded(0))
    assert found.std().item() == pytest.approx((2 / 0.25 - 1) ** -0.5, rel=0.05)  # of the narrow component alone


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[PriorBatch, str, str]:
    """Embeddings whose principal coordinates are all but normal and independent; statistics and codec of 64 buckets."""
    folder = tmp_path_factory.mktemp("mixture")
    g = seeded(3)
    z_i = torch.randn(20_000, D, generator=g) * torch.tensor([0.0, 1.0, 0.8, 0.6, 0.4, 0.2]) * 0.02
    z_i[:, 0] = 1.0
    text = TextFeatures(*(part[:1].repeat(len(z_i), *[1] * (part.ndim - 1)).to(
        part.dtype if part.dtype != torch.float64 else torch.float32) for part in captions(3)))  # fmt: skip
    statistics, codec = folder / "s.safetensors", folder / "codec.safetensors"
    write_statistics(statistics, moments=Moments.of(z_i), null_text=text.rows(slice(1)), fingerprint="c")
    EmbeddingCodec.fit(
        lambda: [(z_i, text.embed)], fingerprint="c", code_length=N, buckets=64, dot_buckets=1
    ).save(codec)  # fmt: skip
    return PriorBatch(z_i, text), str(statistics), str(codec)


def test_nats_of_buckets_and_of_mixtures_are_of_one_kind(source: tuple[PriorBatch, str, str]) -> None:
    """Fresh networks: uniform over buckets of equal counts, and mixtures as wide as the data, on normal coordinates."""
    batch, statistics, path = source
    few = PriorBatch(batch.image_embed[:4000], batch.text.rows(slice(4000)))
    sizes = {"width": 8, "layers": 1, "heads": 2}
    buckets = ARPriorTask(ARPriorTransformer(D, W, CONTEXT, N, 64, 1, **sizes), path, statistics)
    mixed = MixturePriorTask(MixturePriorTransformer(D, W, CONTEXT, N, 16, **sizes), path, statistics)
    for task in (buckets, mixed):
        found = task.nats(few)
        assert found.shape == (4000,)
        assert found.mean().item() == pytest.approx(N * ENTROPY, rel=0.02)
    mixed.text_drop = 0.0
    torch.testing.assert_close(mixed.loss(few) * N, mixed.nats(few).mean())


def test_a_codecs_densities_integrate_to_its_buckets(source: tuple[PriorBatch, str, str]) -> None:
    """Along one axis, at equal shares of all buckets: 1, with the tails."""
    codec = EmbeddingCodec(source[2]).double()
    grid = torch.linspace(-15, 15, 60_001, dtype=torch.float64)
    y = torch.zeros(len(grid), N, dtype=torch.float64)
    y[:, 1] = grid
    codec._project = lambda embed: embed * codec.std  # type: ignore[method-assign] # of coordinates themselves
    density = codec.log_density(y)[:, 1].exp() / codec.buckets
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-3)


def test_coordinates_go_there_and_back(source: tuple[PriorBatch, str, str]) -> None:
    codec, z_i = EmbeddingCodec(source[2]), source[0].image_embed
    y = codec.coordinates(z_i)
    torch.testing.assert_close(y.std(0), torch.ones(N), rtol=0.03, atol=0)
    torch.testing.assert_close(codec.coordinates(codec.place(y)), y, rtol=0.01, atol=0.01)


def test_the_prior_draws_what_its_network_says(source: tuple[PriorBatch, str, str], tmp_path: Path) -> None:
    batch, statistics, path = source
    torch.manual_seed(0)
    made = MixturePriorTransformer(D, W, CONTEXT, N, 16, width=8, layers=1, heads=2)
    prior = prior_of(MixturePriorTask(made, path, statistics).eval(), steps=1)
    assert isinstance(prior, MixturePrior)
    z_i = prior.embed(batch.text.rows(slice(4000)), generator=seeded(0))
    torch.testing.assert_close(z_i.norm(dim=-1), torch.ones(4000))
    y = prior.part.codec.coordinates(z_i)  # a fresh network: mean 0, variance 1
    torch.testing.assert_close(y.mean(0), torch.zeros(N), rtol=0, atol=0.07)
    torch.testing.assert_close(y.var(0), torch.ones(N), rtol=0.1, atol=0)
    assert prior.evaluations == N
    assert prior.adjusted(guidance=2.0, candidates=3).evaluations == 6 * N
    for bad in ({"guidance": -1.0}, {"temperature": 0.0}, {"candidates": 0}):
        with pytest.raises(ValueError, match="Expected"):
            MixturePriorSpec("", **bad)  # type: ignore[arg-type]
    other = MixturePriorTransformer(D, W, CONTEXT, N + 1, 4, width=8, layers=1, heads=2)
    with pytest.raises(ValueError, match=r"codec of \(code_length\) = \(5,\), as the network's.* has \(4,\)"):
        MixturePriorTask(other, path, statistics)
