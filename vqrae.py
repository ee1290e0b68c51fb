"""
VQRAE: one tokenizer, two outputs. (CVPR 2026, "Representation Quantization Autoencoders")

    images X (B, 3, h, w) in [0, 1]
        |     Encoder E: a pretrained ViT (the VFM), patch p; its frozen copy is the teacher T       section 3.2
    Z_I (B, N, d)   N = (h/p)(w/p)   ------------>  understanding: an MLLM reads Z_I = VQRAE.encode(X)
        |     to_code: LayerNorm, Linear d -> e     e >= d
    Z_c (B, N, e)
        |     SimVQ: nearest row of C W   C (k, e) = codebook, frozen; W (e, e) = proj, learned      eq. 1, 3
    Z_q (B, N, e)   indices (B, N) in [0, k)  --->  generation: a language model writes indices; Z_q = SimVQ.lookup(indices)
        |     from_code: Linear e -> d
    Z_bot (B, N, d)
        |     Decoder D: the same ViT at patch size 1, then Linear d -> 3 q q     q = p keeps the resolution
    X' (B, 3, hq/p, wq/p)            <------------  VQRAE.detokenize(indices)

Losses: L_P PerceptualLoss, L_G -mean Discriminator(X') (eq. 2); L_quant SimVQ (eq. 3); L_distill distill_loss (eq. 5).
Config: p patch_size, d dim, k codebook_size, e codebook_dim, q, beta; lambda_G disc_weight, lambda_d distill_weight.
"""
import argparse, contextlib, datetime, fcntl, inspect, io, json, math, os, re, resource, shlex, shutil, signal, sys, time
import traceback, warnings, zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, get_args

import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, get_hf_file_metadata, hf_hub_download, hf_hub_url
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ConvNeXt_Small_Weights, VGG16_Weights, convnext_small

class UserError(ValueError):
    """A mistake the user can mend. It says what is wrong, where, and what to do; the scripts print it as one line."""

@contextlib.contextmanager
def explained(message, *kinds):  # an error of these kinds (none: any) becomes a UserError: message and its own first words
    try:
        yield
    except kinds or Exception as error:
        if isinstance(error, UserError): raise
        raise UserError(f"{message} ({' '.join(str(error).split())[:200]})") from error

def check_range(values, **ranges):  # {name: value} of flags, {name: its least value, or the least and the most}
    for name, limits in ranges.items():
        least, most = limits if isinstance(limits, tuple) else (limits, math.inf)
        also = f" and at most {most}" if most < math.inf else ""
        if not least <= values[name] <= most: raise UserError(f"--{name} is at least {least}{also}, not {values[name]}")

# ---- Configuration --------------------------------------------------------------------------------------------------
@dataclass
class VQRAEConfig:
    encoder: str = "vit_so400m_patch16_siglip_256.v2_webli"  # a timm VisionTransformer; the decoder is the same architecture
    encoder_weights: str = "hub"      # hub (timm's), stage0 (tiny's stand-in), random, or a file: timm's or transformers' keys
    encoder_kwargs: dict = field(default_factory=dict)       # more of timm's arguments, say depth and num_heads
    image_size: int = 256             # h = w in pixels
    patch_size: int = 16              # p, a patch's side in pixels
    dim: int = 1152                   # d, width of Z_I
    q: int = 0                        # pixels a side that a token decodes to; 0: q = p, which keeps the resolution; more: finer
    quantizer: str = "simvq"          # simvq, or none: continuous latents, the RAE baseline
    codebook_size: int = 16384        # k
    codebook_dim: int = 1536          # e; the paper's finding: at least d
    beta: float = 0.25                # weight of the commitment term in eq. 3
    def __post_init__(self):
        check_range(vars(self), image_size=1, patch_size=1, dim=1, q=0, codebook_size=1, codebook_dim=1, beta=0)
        h, p, out = self.image_size, self.patch_size, self.output_size
        if h % p: raise UserError(f"image_size {h} is no multiple of patch_size {p}: try --image_size {max(1, round(h / p)) * p}")
        if out < 8: raise UserError(f"pictures of {out} pixels are too small: raise --q or --image_size")
        if self.quantizer not in ("simvq", "none"): raise UserError(f"quantizer is simvq or none, not {self.quantizer!r}")
    grid = property(lambda self: self.image_size // self.patch_size)              # tokens a side
    num_tokens = property(lambda self: self.grid ** 2)                            # N
    output_size = property(lambda self: self.grid * (self.q or self.patch_size))  # pixels a side of X'

MODELS = {  # tiny: a stand-in VFM that train_tokenizer.py pretrains itself, small enough for a laptop's CPU
    "tiny": VQRAEConfig(encoder="vit_tiny_patch16_224", encoder_weights="stage0", image_size=64, patch_size=8, dim=128,
                        encoder_kwargs=dict(depth=3, num_heads=2, class_token=False), codebook_size=2048, codebook_dim=192),
    "siglip2_base_256": VQRAEConfig(encoder="vit_base_patch16_siglip_256.v2_webli", dim=768,  # ours, for one 24 GB GPU
                                    encoder_kwargs=dict(act_layer="gelu_tanh")),  # as it was trained, unlike timm's
    "siglip2_256": VQRAEConfig(),  # from here Table 7's three
    "siglip2_512": VQRAEConfig(encoder="vit_so400m_patch16_siglip_512.v2_webli", image_size=512),
    "internvit_448": VQRAEConfig(encoder="vit_intern300m_patch14_448.ogvl_2pt5", image_size=448, patch_size=14, dim=1024),
}

# ---- Encoder --------------------------------------------------------------------------------------------------------
def create_vit(config, **changes):  # timm's ViT, random; no pooling head: it would get no gradient, which DDP refuses
    sizes = dict(img_size=config.image_size, patch_size=config.patch_size, embed_dim=config.dim)
    with explained(f"timm cannot build {config.encoder} as a ViT with {config.encoder_kwargs}, dim {config.dim}"):
        return timm.create_model(config.encoder, num_classes=0, global_pool="", **(config.encoder_kwargs | sizes | changes))

class Encoder(nn.Module):
    """The vision foundation model E (section 3.2): images (B, 3, h, w) in [0, 1] -> Z_I (B, N, d), the last block's output
    *before* a final norm (SigLIP's; InternViT has none): what an MLLM reads, transformers' hidden_states[-1]."""
    def __init__(self, config, encoder_weights=""):  # "": random; hub or a file as in load_encoder_weights
        super().__init__()
        self.vit = create_vit(config, final_norm=False)
        for name in ("mean", "std"):  # the VFM's own normalisation
            self.register_buffer(name, torch.tensor(self.vit.pretrained_cfg[name]).view(1, 3, 1, 1), persistent=False)
        if encoder_weights: load_encoder_weights(self, encoder_weights)
    def forward(self, images):  # (B, 3, h, w) in [0, 1]
        size = self.vit.patch_embed.img_size
        if images.shape[1:] != (3, *size) or not images.is_floating_point():
            raise UserError(f"images are (B, 3, h, w) floats of {size} pixels, not {images.dtype} {tuple(images.shape)}")
        x = self.vit.forward_features((images - self.mean) / self.std)  # (B, N, d), or N + 1 with a class token
        return x[:, self.vit.num_prefix_tokens:]                        # (B, N, d)

# ---- Quantiser ------------------------------------------------------------------------------------------------------
def full(x): return x if x.dtype == torch.float64 else x.float()  # float32 after autocast; float64 stays
def no_autocast(x): return contextlib.nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)

class SimVQ(nn.Module):
    """SimVQ (Zhu et al. 2024), eq. 1: the codes are C W. C is frozen, only W learned: one used code moves all of them, so none
    is left behind. forward's z_q has the codes' values and hands its gradient straight to z: W learns from L_quant alone."""
    def __init__(self, codebook_size, codebook_dim, beta=0.25):
        super().__init__()
        self.beta = beta
        self.register_buffer("codebook", torch.randn(codebook_size, codebook_dim) / codebook_dim ** 0.5)  # C (k, e)
        self.proj = nn.Linear(codebook_dim, codebook_dim, bias=False)  # W (transposed); a bias would repeat to_code's

    def forward(self, z):  # (B, N, e) -> z_q (B, N, e), indices (B, N) int64, loss (scalar, eq. 3)
        with no_autocast(z):  # distances in float32, whatever the rest is in
            z_c = full(z)
            codes = F.linear(full(self.codebook), full(self.proj.weight))  # C W (k, e)
            indices = nearest(z_c.flatten(0, -2), codes).view(z.shape[:-1])  # (B, N)
            # One value; W's gradient goes through the chosen rows (projected again: twice the work) or all k: whichever is less.
            if 2 * indices.numel() < len(codes): z_q = full(self.lookup(indices))  # (B, N, e)
            else: z_q = F.embedding(indices, codes)
            loss = F.mse_loss(z_q, z_c.detach()) + self.beta * F.mse_loss(z_c, z_q.detach())  # eq. 3: codes to z, z to codes
        z_q = z_q.detach() + (z_c - z_c.detach())  # straight through; the usual z_c + (z_q - z_c).detach() would round
        return z_q.to(z.dtype), indices, loss
    def lookup(self, indices):  # (...) int64 -> (..., e)
        with no_autocast(indices): return self.proj(F.embedding(indices, self.codebook))
    @torch.no_grad()
    def init_codebook(self, latents, iterations=5):
        """Start the codes on data: C = the k-means centres of latents Z_c (M, e), M >= k, and W = I."""
        k = len(self.codebook)
        draw = lambda: latents[torch.randperm(len(latents), device=latents.device)[:k]]  # (k, e), some latents
        C = draw()
        for _ in range(iterations):
            indices = nearest(latents, C)                               # (M,)
            counts = torch.bincount(indices, minlength=k)[:, None]      # (k, 1)
            sums = torch.zeros_like(C).index_add_(0, indices, latents)  # (k, e)
            C = torch.where(counts > 0, sums / counts, draw())          # an empty cluster restarts
        self.codebook.copy_(C)
        nn.init.eye_(self.proj.weight)

def has_bf16(device):  # does it multiply bfloat16 matrices faster than float32 ones?
    if device.type == "cpu": return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

@torch.no_grad()
def nearest(z, codes, max_elements=1 << 23, candidates=24):
    """The index (M,) of the code (k, e) nearest (l2) to each row of z (M, e). With m the mean code, which keeps rounding small,
    |z - c|^2 / 2 = |c - m|^2 / 2 - (z - m).c + what all codes share. At most `max_elements` of these exist at once (on a GPU
    8 times as many). A large codebook is searched in bfloat16 where that is fast; float32 decides among the best `candidates`."""
    if z.is_cuda: max_elements *= 8
    z_slices, mean = z.split(max(1, max_elements // len(codes))), codes.mean(0)  # (r, e) each, (e,)
    slices = codes.split(max(1, max_elements // 8 // codes.shape[1]))            # (s, e) each: so many are copied at a time
    half_norms = torch.cat([(c - mean).square().sum(1) for c in slices]) / 2     # (k,)
    def scored(rows): return torch.addmm(half_norms, rows - mean, codes.T, alpha=-1)  # (r, e) -> (r, k)
    if z.dtype != torch.float32 or codes.numel() < 1 << 22 or not has_bf16(z.device):
        return torch.cat([scored(rows).argmin(1) for rows in z_slices])
    # So much for the method; from here on the same, faster. A result in bfloat16 has 8 bits, and may be a hundred times the
    # differences to be told apart. So the product, summed in float32, also adds half a code's norm and takes away a row's best
    # score among every 256th code: the least end near 0.
    def two(x): return torch.stack([x.bfloat16(), (x - x.bfloat16()).bfloat16()], 1)  # (n,) -> (n, 2), whose sum is x
    def low(x, a, b): return F.pad(torch.cat([x.bfloat16(), a, b], 1), (0, 4))  # -> (n, e + 8), a width GPUs like
    low_codes = torch.cat([low(mean - c, h, torch.ones_like(h)) for c, h in zip(slices, two(half_norms).split(len(slices[0])))])
    def decide(rows, scores):  # (r, e), (r, k) -> indices (r,), the candidates' scores
        scores, best = scores.topk(min(candidates, len(codes)), largest=False)  # (r, candidates) each
        index, n = [], max(1, len(slices[0]) // candidates)
        for z, best in zip(rows.split(n), best.split(n)):
            c, first = F.embedding(best, codes), F.embedding(best[:, :1], codes)  # (n, candidates, e), (n, 1, e)
            more = (c - first).mul_(c.add_(first - 2 * z[:, None])).sum(2)  # |z - c|^2 - |z - first|^2, hardly rounded
            index.append(best.gather(1, more.argmin(1, keepdim=True))[:, 0])
        return torch.cat(index), scores
    def search(rows):  # (r, e) -> indices (r,); and where they are unsure (r,): the candidates are all alike to bfloat16
        x = rows - mean
        near = two(-torch.addmm(half_norms[::256], x, (codes[::256] - mean).T, alpha=-1).amin(1))  # (r, 2)
        index, scores = decide(rows, low(x, torch.ones_like(near), near) @ low_codes.T)
        error = ((x * (codes[index] - mean)).norm(dim=1) + scores.abs().amax(1)) / 128  # about five deviations of bfloat16's
        return index, scores[:, -1] - scores[:, 0] < error
    index, unsure = map(torch.cat, zip(*map(search, z_slices)))
    for part in unsure.nonzero()[:, 0].split(len(z_slices[0])): index[part] = decide(z[part], scored(z[part]))[0]  # GPUs wait
    return index

# ---- Decoder --------------------------------------------------------------------------------------------------------
class Decoder(nn.Module):
    """The encoder's mirror D: Z_bot (B, N, d) -> X' (B, 3, grid q, grid q), about [0, 1], not clamped."""
    def __init__(self, config):
        super().__init__()
        self.grid, self.q = config.grid, config.q or config.patch_size
        self.vit = create_vit(config, img_size=config.grid, patch_size=1, in_chans=config.dim, final_norm=True)  # for to_pixels
        self.to_pixels = nn.Linear(config.dim, 3 * self.q ** 2)
        nn.init.constant_(self.to_pixels.bias, 0.5)  # start at mid grey
    def forward(self, z_bot):  # (B, N, d)
        x = z_bot.transpose(1, 2).unflatten(2, (self.grid, self.grid))          # (B, d, grid, grid): a pixel a token
        x = self.vit.forward_features(x)[:, self.vit.num_prefix_tokens:]        # (B, N, d)
        x = self.to_pixels(x).transpose(1, 2)                                   # (B, 3 q q, N)
        return F.pixel_shuffle(x.unflatten(2, (self.grid, self.grid)), self.q)  # (B, 3 q q, grid, grid) -> (B, 3, grid q, grid q)

# ---- The whole ------------------------------------------------------------------------------------------------------
class Output(NamedTuple):
    reconstruction: torch.Tensor  # X' (B, 3, H, W), not clamped
    Z_I: torch.Tensor             # (B, N, d)
    indices: torch.Tensor | None  # (B, N) int64; None without a quantiser
    vq_loss: torch.Tensor         # L_quant, scalar; 0 without a quantiser

class VQRAE(nn.Module, PyTorchModelHubMixin, paper_url="https://arxiv.org/abs/2511.23386"):
    """The tokenizer. Images are (B, 3, h, w) float in [0, 1] (X' about), RGB, h = w = config.image_size; tokens (B, N) int64.
    `VQRAE(config)` has random weights; `VQRAE.from_pretrained(folder)` reads what a script here saved."""
    def __init__(self, config: VQRAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        # Z_I comes from before the final norm and may have a few huge channels: normalised, it suits an l2 search.
        d, e = config.dim, config.codebook_dim
        self.to_code = nn.Sequential(nn.LayerNorm(d, elementwise_affine=False), nn.Linear(d, e))
        self.quantizer = SimVQ(config.codebook_size, e, config.beta) if config.quantizer == "simvq" else None
        self.from_code = nn.Linear(e, d)
        self.decoder = Decoder(config)
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, strict=True, **how):  # not strict: missing weights stay random
        name = str(pretrained_model_name_or_path)
        if Path(name).is_dir() and not Path(name, "config.json").is_file(): raise UserError(f"{name} holds no config.json")
        if not Path(name).is_dir() and not how:  # how: a revision and the like
            with explained(f"{name} is neither a folder nor a hub's model"): hub_file(name, "config.json", "pass its folder")
        return super().from_pretrained(name, strict=strict, **how)

    def encode(self, images): return self.encoder(images)  # X (B, 3, h, w) -> Z_I (B, N, d)
    def forward(self, images):  # X (B, 3, h, w)
        Z_I = self.encode(images)                                  # (B, N, d)
        Z_c = self.to_code(Z_I)                                    # (B, N, e)
        if self.quantizer is None: Z_q, indices, vq_loss = Z_c, None, Z_c.new_zeros(())  # RAE
        else: Z_q, indices, vq_loss = self.quantizer(Z_c)          # (B, N, e), (B, N), ()
        Z_bot = self.from_code(Z_q)                                # (B, N, d)
        return Output(self.decoder(Z_bot), Z_I, indices, vq_loss)  # X' (B, 3, H, W)

    @torch.no_grad()
    def start_on(self, Z_I, pixels):  # M patches: features (M, d), pixels (M, 3, p p)
        """Start the bottleneck on data (README: "Bottleneck start"). to_code: ridge regression from a patch's features to
        its pixels, in principal components: latents close together look alike. Standard deviation 0.3: at 1, L_quant drowns
        the other losses. Codes: k-means of 16 latents a code, of detailed patches more often: flat ones would take most."""
        norm, linear = self.to_code
        x, y = norm(Z_I), pixels.flatten(1)  # (M, d), (M, 3 p p)
        mean = x.mean(0)
        x = x - mean
        ridge = 1e-3 * len(x) * torch.eye(x.shape[1])  # solved on the CPU: small, and torch 2.8 has no eigh on mps
        A = torch.linalg.solve((x.T @ x).cpu() + ridge, (x.T @ (y - y.mean(0))).cpu()).to(x)  # (d, 3 p p)
        y_hat = x @ A                                              # (M, 3 p p), pixels as Z_I predicts them
        if (std := y_hat.std()) < 1e-6: raise UserError("pictures all of one colour: other --data or --bottleneck_start random")
        variances, axes = (t.flip(-1).to(x) for t in torch.linalg.eigh((y_hat.T @ y_hat).cpu()))  # times M; largest first
        n = min(linear.out_features, len(axes))
        gain = variances[:n].sum() / variances.sum() * len(axes) / linear.out_features  # the latents' variance over y_hat's
        T = (A @ axes * (0.3 / std / gain.sqrt()))[:, :n]          # (d, n)
        linear.weight.mul_(0.1)                                    # dimensions beyond n stay small and random
        linear.bias.zero_()
        linear.weight[:n], linear.bias[:n] = T.T, -mean @ T
        if self.quantizer:
            detail = (pixels.var(2).mean(1) + 5e-4) ** 0.85  # (M,) variance in a patch [ours]; flat ones come too, rarely
            drawn = torch.multinomial(detail, 16 * self.config.codebook_size, replacement=True)
            self.quantizer.init_codebook(self.to_code(Z_I[drawn]))
    @torch.no_grad()
    def tokenize(self, images):  # X (B, 3, h, w)
        if self.quantizer is None: raise UserError("quantizer none (RAE) has no tokens: train with --quantizer simvq")
        return self.quantizer(self.to_code(self.encode(images)))[1]  # (B, N)
    @torch.no_grad()
    def detokenize(self, indices):  # (B, N)
        if self.quantizer is None: raise UserError("quantizer none (RAE) has no tokens to decode")
        return self.decoder(self.from_code(self.quantizer.lookup(indices)))  # X' (B, 3, H, W), as forward's: not clamped

# ---- Losses: means over elements, in float32; perceptual networks and discriminator run in --loss_precision ---------
def distill_loss(Z_I, teacher_Z_I):  # eq. 5: keeps the features (B, N, d) where an MLLM expects them
    return F.mse_loss(full(Z_I), full(teacher_Z_I))
def torchvision_weights(path, url, flag):  # a model's state dict, from the file `path` or downloaded (once)
    with explained(f"cannot download {url}: fetch it elsewhere and pass {flag} FILE (training knows --perceptual vfm)", OSError):
        return load_checkpoint(path) if path else torch.hub.load_state_dict_from_url(url, map_location="cpu")
def build_lpips(weights=""):
    """LPIPS(VGG16). The lpips package has its five linear layers; VGG16 is torchvision's, downloaded or a local file."""
    state = torchvision_weights(weights, VGG16_Weights.IMAGENET1K_V1.url, "--lpips_weights")
    import lpips  # here, for it takes seconds; it calls torchvision the old way
    with warnings.catch_warnings(action="ignore"): net = lpips.LPIPS(net="vgg", verbose=False, pnet_rand=True)
    with explained("not the weights that --lpips_weights wants"):  # its five slices keep torchvision's numbers
        net.net.load_state_dict({key: state[re.sub(r"^slice\d", "features", key)] for key in net.net.state_dict()})
    return net

class PerceptualLoss(nn.Module):
    """L_P of eq. 2. (x, y) images (B, 3, H, W) in [0, 1], y the reconstruction, not clamped -> scalar. All networks are frozen.
    "lpips_convnext": LPIPS(VGG16) + 0.1 * MSE of ConvNeXt-Small's ImageNet logits at 224 px: Table 7's "convnext-s, 1.1", read as
    TA-TiTok's setting of that weight (README). "lpips": its first half. "vfm": MSE of the VFM's features (no download)."""
    def __init__(self, kind="lpips_convnext", lpips_weights="", convnext_weights="", vfm=None):
        super().__init__()
        self.kind, self.vfm = kind, vfm
        if "lpips" in kind: self.lpips = build_lpips(lpips_weights)
        if kind == "lpips_convnext":
            self.convnext = convnext_small()
            state = torchvision_weights(convnext_weights, ConvNeXt_Small_Weights.IMAGENET1K_V1.url, "--convnext_weights")
            with explained("not the weights that --convnext_weights wants"): self.convnext.load_state_dict(state)
            self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()
    def features(self, x):  # (B, 3, H, W) -> [(B, N, d)] of the first and the middle block, which know edges and colours
        vit = self.vfm.vit
        x = (resize(x, vit.patch_embed.img_size[0], limit=False) - self.vfm.mean) / self.vfm.std
        x = vit.forward_intermediates(x, [0, len(vit.blocks) // 2], intermediates_only=True, output_fmt="NLC", stop_early=True)
        return [F.layer_norm(f, f.shape[-1:]) for f in x]
    def logits(self, x):  # (B, 3, H, W) -> (B, 1000)
        x = F.interpolate(x, size=224, mode="bilinear", antialias=True)
        return self.convnext((x - self.mean) / self.std)
    def forward(self, x, y):
        if self.kind == "vfm":
            return torch.stack([F.mse_loss(a, b) for a, b in zip(self.features(x), self.features(y))]).mean()
        loss = self.lpips(x * 2 - 1, y * 2 - 1).mean()  # LPIPS wants [-1, 1]
        if self.kind == "lpips_convnext": loss = loss + 0.1 * F.mse_loss(self.logits(x), self.logits(y))
        return loss

def group_norm(x, norm):  # nn.GroupNorm, but channel by channel first: faster when compiled in channels-last
    groups = full(x).unflatten(1, (norm.num_groups, -1))  # (B, G, C / G, H, W)
    groups = groups - groups.mean((3, 4), keepdim=True).mean(2, keepdim=True)
    groups = groups * (groups.square().mean((3, 4), keepdim=True).mean(2, keepdim=True) + norm.eps).rsqrt()
    return (groups.flatten(1, 2) * norm.weight[:, None, None] + norm.bias[:, None, None]).to(x.dtype)  # (B, C, H, W)

class Discriminator(nn.Module):
    """TiTok's patch discriminator: images (B, 3, H, W) in [0, 1] -> logits (B, 1, 16, 16). PyTorch's initialisation."""
    def __init__(self, width=128):  # TiTok's; smaller for tiny
        super().__init__()
        widths, last = (width, width, 2 * width, 4 * width), 4 * width
        self.stem = nn.Conv2d(3, width, 5, padding="same")
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding="same") for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(b, max(1, min(32, b // 4))), b) for b in widths[1:])  # mostly 32
        self.head = nn.Sequential(nn.Conv2d(last, last, 1), nn.LeakyReLU(0.1), nn.Conv2d(last, 1, 5, padding="same"))
        self.register_buffer("means", torch.zeros(2))  # running means of real and fake logits, for lecam
        blur = torch.tensor([[1.0, 0, 0], [3, 1, 0], [3, 3, 1], [1, 3, 3], [0, 1, 3], [0, 0, 1]]) / 8  # a column: (1, 3, 3, 1)
        self.register_buffer("blur", blur, persistent=False)
    def forward(self, images):  # (B, 3, H, W)
        x = F.leaky_relu(self.stem(images), 0.1)  # (B, width, H, W)
        for conv, norm in zip(self.convs, self.norms):
            # TiTok: 3 x 3, then a (1, 3, 3, 1) / 8 blur at stride 2. The same, but at edges: one 6 x 6, folded into a 3 x 3
            weight = torch.einsum("oiab,xa,yb->oixy", conv.weight, self.blur, self.blur)  # (o, i, 6, 6)
            x = F.pixel_unshuffle(x[..., :x.shape[2] // 2 * 2, :x.shape[3] // 2 * 2], 2)  # (B, 4 i, H / 2, W / 2)
            x = F.conv2d(x, F.pixel_unshuffle(weight, 2), conv.bias, padding=1)  # (B, o, H / 2, W / 2)
            x = F.leaky_relu(group_norm(x, norm), 0.1)
        x = F.adaptive_max_pool2d(x.cpu() if x.device.type == "mps" else x, 16).to(x.device)  # mps's pool is wrong
        return self.head(x)  # (B, 1, 16, 16)

def hinge_d_loss(real_logits, fake_logits):  # the discriminator's: real above 1, fake below -1
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
def lecam(real_mean, fake_mean, ema_real, ema_fake):  # Tseng et al. 2021 [TiTok]: pulls each mean to the other's running mean
    return F.relu(real_mean - ema_fake).square() + F.relu(ema_real - fake_mean).square()

# ---- Files ----------------------------------------------------------------------------------------------------------
def to_timm_keys(state):  # a ViT's state dict in timm's or transformers' names (alone or in an MLLM) -> timm's, q, k, v stacked
    for prefix in ("model.vision_tower.", "vision_tower.", "vision_model."):  # in this order: they nest
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)} or state
    out = {timm_key(key): value for key, value in state.items()}
    if "pos_embed" in out and out["pos_embed"].ndim == 2: out["pos_embed"] = out["pos_embed"][None]  # SigLIP's
    for key in [key for key in out if ".q_proj." in key]:
        out[key.replace("q_proj", "qkv")] = torch.cat([out.pop(key.replace("q_proj", f"{letter}_proj")) for letter in "qkv"])
    return out
def timm_key(key):  # a weight's name in transformers' vision towers -> timm's; timm's own pass unchanged
    renames = ((r"\bembeddings\.", ""), (r"patch_embedding(s\.projection)?", "patch_embed.proj"), ("layernorm_before", "norm1"),
               (r"position_embedding(s|\.weight)", "pos_embed"), (r"encoder\.layers?\.", "blocks."), ("layernorm_after", "norm2"),
               ("post_layernorm|layer_norm", "norm"), (r"lambda_([12])", r"ls\1.gamma"),
               (r"(self_attn|attention)\.", "attn."), (r"attn\.(out_proj|projection_layer)", "attn.proj"))
    for pattern, name in renames: key = re.sub(pattern, name, key)
    return key
def hub_file(repo, name, remedy="pass --encoder_weights FILE"):  # cached or downloaded; offline it fails within seconds
    with contextlib.suppress(FileNotFoundError): return hf_hub_download(repo, name, local_files_only=True)  # if cached
    url = hf_hub_url(repo, name)
    with explained(f"cannot get {url}: fetch it where there is a network, then {remedy}"): get_hf_file_metadata(url, timeout=3)
    return hf_hub_download(repo, name)
def weights_file(encoder, source):  # the path: `source`, or for "hub" that of timm's file, downloaded if need be
    repo = encoder.vit.pretrained_cfg.get("hf_hub_id")
    path = Path(hub_file(repo, "model.safetensors") if source == "hub" and repo else source)
    if path.is_dir(): path /= "model.safetensors"  # transformers' save_pretrained
    if path.is_file(): return path
    raise UserError(f"no file {path} of encoder weights: give --encoder_weights FILE, random or hub (if timm has them)")
def load_encoder_weights(encoder, source):  # "hub" or a file. Every weight must be there: a partial load would go unnoticed
    path, vit = weights_file(encoder, source), encoder.vit
    with explained(f"{path} cannot be read, or does not fit the encoder {vit.pretrained_cfg['architecture']}"):
        state = load_file(path) if path.suffix == ".safetensors" else load_checkpoint(path)
        state = to_timm_keys(state.get("encoder", state))
        after_Z_I = ("attn_pool.", "head.", "norm.", "fc_norm.")  # pooling head and final norm, not used here
        state = {key: value for key, value in state.items() if not key.startswith(after_Z_I)}
        ours, theirs = vit.patch_embed.proj.weight.shape[-1], state["patch_embed.proj.weight"].shape[-1]
        if ours != theirs: raise ValueError(f"patch_size is {theirs} there, {ours} here")  # timm would resample those too
        state = timm.models.vision_transformer.checkpoint_filter_fn(state, vit)  # position embeddings for this image size
        vit.load_state_dict(state, strict=True)
def save_tokenizer(model, folder, teacher=None):
    """`folder`/config.json and model.safetensors, and teacher.safetensors of a `teacher` that no hub has; all or nothing."""
    folder = Path(folder).resolve()  # a link's own folder
    ours = {"config.json", "model.safetensors", "teacher.safetensors", "README.md"}
    strange = {path.name for path in folder.glob("[!.]*")} - ours
    if strange: raise UserError(f"{folder} holds {min(strange)}, which no tokenizer does: move it away (a run: then --resume)")
    partial = Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with explained(f"cannot write {folder}: free some space, then --resume"):
        model.save_pretrained(partial)
        if teacher: save_file({k: v.contiguous() for k, v in teacher.vit.state_dict().items()}, partial / "teacher.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
def load_tokenizer(folder, device="cpu"):  # in eval mode; downloads nothing
    if not all(Path(folder, name).is_file() for name in ("config.json", "model.safetensors")):
        raise UserError(f"{folder} is not a tokenizer folder (config.json, model.safetensors): train one, same --config")
    with explained(f"{folder} cannot be read as a tokenizer"), contextlib.redirect_stdout(io.StringIO()):  # the mixin prints
        return VQRAE.from_pretrained(str(folder)).to(device).eval()
def save_checkpoint(path, state, write=torch.save):  # to a temporary name, then renamed: a full disk leaves the old file whole
    partial = Path(f"{path}.partial")
    try:
        with explained(f"cannot write {path}: free some space, what is saved is whole (--resume)"), open(partial, "wb") as file:
            write(state, file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
    finally: partial.unlink(missing_ok=True)
def load_checkpoint(path, *keys):
    """Tensors, numbers and dicts only: a pickle that would run code is refused. So is what lacks one of the `keys`."""
    if not Path(path).is_file(): raise UserError(f"no file {path}")
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # all ranks share it
        for key in keys: state[key]
        return state
    except Exception as error:  # torch's own words would advise to run that code
        raise UserError(f"{path} is damaged, of another kind or unsafe: not loaded ({type(error).__name__})") from error

# ---- What the scripts share: command line, processes, log -----------------------------------------------------------
def resize(images, size, limit=True):  # (B, 3, h, h) -> (B, 3, size, size), its overshoot clamped to [0, 1] by `limit`
    if images.shape[-1] == size: return images
    images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
    return images.clamp(0, 1) if limit else images
def compile_parts(*networks):
    """torch.compile of each block in `networks` by itself: equal ones share a compilation. It takes a minute or two."""
    torch._dynamo.config.optimize_ddp = False  # it would cut each block into pieces as large as DDP's buckets
    options = dict(comprehensive_padding=False)  # else so400m's rows of 4,304 are padded, and biases copied
    for part in nn.ModuleList(filter(None, networks)).modules():
        name = type(part).__name__  # timm's and transformers' blocks; the losses' networks
        if name in ("Block", "ConvNeXt", "LPIPS", "Discriminator"): part.compile(dynamic=False, options=options)
        if name.endswith("DecoderLayer"): part.compile(options=options)  # texts vary in length

def uniform(seed, n): return torch.rand(n, generator=torch.Generator().manual_seed(seed % 2 ** 63))  # in [0, 1)
def lr_factor(step, warmup, total, floor):  # warmup to 1, then cosine to `floor`, at most 1: no rate rises again
    if step < warmup: return (step + 1) / warmup
    progress, floor = min(1.0, (step - warmup) / max(1, total - warmup)), min(1.0, floor)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
def ignore_signals(_):  # torchrun and Ctrl-C signal a loader's workers too, but the training process alone decides
    for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)

def parse_config(cls, presets={}, model_class=None, argv=None, **implied):
    """The command line -> config, model config (None without a model_class), {field: where its value comes from}. Each field is a
    flag, its comment the help. presets: {"config tiny, stage 2": values where these flags are so}. implied: more defaults."""
    classes = [c for c in (cls, model_class) if c]
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", "".join(map(inspect.getsource, classes)), re.M))
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    def refuse(message): raise UserError(f"{message} (--help lists every flag; a value with braces or spaces wants quotes)")
    def JSON(text): return json.loads(text)  # by this name argparse says "invalid JSON value"
    parser.error = refuse                    # without a page of usage
    kinds = {bool: dict(action=argparse.BooleanOptionalAction), dict: dict(type=JSON, metavar="JSON"),
             list: dict(action="append", metavar="TEXT"), tuple: dict(nargs="*")}  # a flag to repeat, and words without a flag
    for f in [f for c in classes for f in fields(c)]:
        choices = tuple(MODELS) if f.name == "config" else get_args(f.type)
        how = dict(type=type(choices[0]), choices=choices) if choices else kinds.get(f.type, dict(type=f.type))
        if f.name == "bench": how |= dict(nargs="?", const=5)  # --bench alone
        parser.add_argument(f.name if f.type is tuple else f"--{f.name}", help=comments.get(f.name, "").replace("%", "%%"), **how)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value != []}
    layers = dict(default={f.name: f.default for f in fields(cls)} | implied)  # {source: {field: value}}; later ones win
    known = layers["default"] | given
    facts = {f"{name} {value}" for name, value in known.items()}
    if model_class: layers["model"] = asdict(MODELS[known["config"]])
    layers |= {key: preset for key, preset in presets.items() if facts.issuperset(key.split(", "))}
    other = model_class and given.get("encoder", layers["model"]["encoder"]) != layers["model"]["encoder"]
    layers["flag"] = (dict(encoder_kwargs={}) if other else {}) | given  # another encoder does not take the old one's arguments
    values = {name: value for layer in layers.values() for name, value in layer.items()}
    origin = {name: source for source, layer in layers.items() for name in layer}
    configs = [c(**{f.name: values[f.name] for f in fields(c)}) for c in classes]
    configs[0].given = given  # for next_command
    return configs[0], configs[1] if model_class else None, origin

def read_log(path): return [json.loads(line) for line in path.open() if line.endswith("}\n")]  # the last may be cut
def due(step, every, config): return step == config.total_steps or (step > 0 and step % every == 0)  # and at the end
def report(rows): print(*(f"\n  {what:24}{value}" for what, value in rows.items() if value), sep="")  # at a run's end
def print_config(origin, *configs):
    for config in configs:
        for name, value in asdict(config).items(): print(f"  {name:18} {str(value):44} {origin[name]}")

class Ranks:
    """This process among the others: one without torchrun, else as torchrun says (nccl on GPUs, else gloo)."""
    def __init__(self, device=""):
        launched = {"RANK", "WORLD_SIZE"} <= os.environ.keys()  # by torchrun, or a cluster's own launcher
        self.rank, self.size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if launched else (0, 1)
        self.first, self.stop_asked = self.rank == 0, False
        device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
        if device == "cuda": device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        with explained(f"--device {device} cannot be used here"): self.device = torch.empty(1, device=device).device
        if self.device.type == "cuda": torch.cuda.set_device(self.device)
        # GPUs' defaults would choose other codes: convolutions in TensorFloat-32, and sums of bfloat16 products not in float32.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if launched and not dist.is_initialized():  # hours: rank 0 validates and saves alone
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=6))
    def begin(self, old):
        """Delete `old` checkpoints. From now on SIGTERM and Ctrl-C ask for a stop between steps; the same again stops at once."""
        for path in old: path.unlink(missing_ok=True)
        def ask(number, _):
            self.stop_asked = number
            signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, ask)
    def say(self, *text):
        if self.first: print(*text, flush=True)
    def end_early(self, step, config):  # after all ranks have waited for the checkpoint
        self.say(f"stopped at step {step}, all saved. Go on with: {next_command(sys.argv[0], config, resume=True)}")
        if self.stop_asked == signal.SIGINT: sys.exit(130)  # Ctrl-C stops `this && the next` too
    def wait(self):
        if self.size > 1: dist.barrier()
    def sum(self, tensor):  # over ranks; no gradient
        if self.size == 1: return tensor
        total = tensor.to(self.device, copy=True)  # nccl knows no CPU tensors
        dist.all_reduce(total)
        return total.to(tensor.device)
    def mean_with_grad(self, tensor):  # over ranks; its gradient is this rank's alone: DDP averages those
        return tensor + (self.sum(tensor.detach()) / self.size - tensor.detach())
    @contextlib.contextmanager
    def first_alone(self):  # rank 0 does what is inside before the others, who find the files it made
        if not self.first: self.wait()
        yield
        if self.first: self.wait()
    def ddp(self, network):  # `network` with its gradients averaged over the ranks
        if self.size == 1: return network
        network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
        network.broadcast_buffers = False  # once was enough: the codebook is large and never changes
        return network

class Log:
    """log_*.jsonl, an object a line. A resumed run cuts what came after its checkpoint, and a validation due again."""
    def __init__(self, path, step, config, enabled):
        rows = read_log(path) if enabled and step and path.exists() else []  # before the file is opened anew
        self.file = open(path, "w", buffering=1) if enabled else io.StringIO()
        for row in rows:
            redone = row["step"] == step and "loss" not in row and due(step, config.eval_every, config)  # a validation's row
            if row["step"] <= step and not redone: self(**row)
    def __call__(self, **values): print(json.dumps(values), file=self.file)

def bench(config, ranks, parts={}, steps=1, unit="images"):
    """--bench N: how fast is a step? Ask next() of this generator before each step (or each `steps` of them). It says False
    3 + N times: the first step, uncompiled, counts FLOP, two warm up, N are timed. Then it prints the result and says True."""
    cuda = ranks.device.type == "cuda"
    profiler = torch.profiler.profile() if parts and config.profile else None
    for name, part in parts.items():     # {name: network or None}: the table names the forward passes of those called
        if profiler and part: part.forward = torch.profiler.record_function(f"forward of {name}")(part.forward)
    formulas, aten = {}, torch.ops.aten  # FLOP: two products, backward five; torch 2.11 fails at shared keys
    for kind in ("flash_attention", "cudnn_attention", "efficient_attention", "flash_attention_for_cpu"):
        formulas[getattr(aten, f"_scaled_dot_product_{kind}")] = lambda q, k, *_, **__: 4 * math.prod(q) * k[2]
        formulas[getattr(aten, f"_scaled_dot_product_{kind}_backward")] = lambda _, q, k, *__, **___: 10 * math.prod(q) * k[2]
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False, custom_mapping=formulas) as counter: yield False
    yield from [False] * 2
    if cuda: torch.cuda.synchronize()
    if cuda: torch.cuda.reset_peak_memory_stats()
    with profiler or contextlib.nullcontext():
        start = time.time()
        yield from [False] * config.bench
        if cuda: torch.cuda.synchronize()
        seconds = (time.time() - start) / config.bench / steps
    if profiler: ranks.say(profiler.key_averages().table(sort_by="cuda_time_total" if cuda else "cpu_time_total", row_limit=80))
    flops, chip = counter.get_total_flops() / steps, torch.cuda.get_device_name() if cuda else ranks.device.type
    peaks = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165e12}  # dense FLOP/s, by NVIDIA
    shares = [f" ({flops / seconds / peak:.1%} of its bf16 peak)" for name, peak in peaks.items() if name in chip]
    memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(0).ru_maxrss * 1024 ** (sys.platform != "darwin")
    ranks.say(f"{config.batch_size / seconds:.1f} {unit}/s, {seconds * 1e3:.2f} ms a step of {config.batch_size}; a rank: "
              f"{flops / 1e12:.3g} TFLOP a step in products, convolutions and attention on {chip}{''.join(shares)}, "
              f"at most {memory / 1e9:.1f} GB")
    yield True

def check_run(config, **ranges):  # fills in out_dir, checks flags, shortens a --bench
    config.out_dir = config.out_dir or f"out/{config.config}"
    check_range(vars(config), batch_size=1, total_steps=1, log_every=1, eval_every=1, save_every=1, val_images=1, lr=1e-12,
                end_lr=0, micro_batch=0, num_workers=0, warmup_steps=0, bench=0, weight_decay=0, clip=1e-12, beta1=0, beta2=0,
                **ranges)
    if max(config.beta1, config.beta2) >= 1: raise UserError(f"--beta1 {config.beta1}, --beta2 {config.beta2}: below 1")
    if abs(config.seed) >= 1 << 40: raise UserError(f"--seed {config.seed} is too large: below {1 << 40}")
    if config.profile and not config.bench: raise UserError("--profile goes with --bench N")
    if config.resume and config.overwrite: raise UserError("--resume goes on and --overwrite starts over: choose one")
    if config.bench: config.total_steps = config.eval_every = config.save_every = config.bench + 4  # no save, no validation
def check_same(there, here, what):  # two {name: value}: what `here` has must be so `there`
    differ = [f"{name} is {there.get(name)} there, {value} here" for name, value in here.items() if there.get(name) != value]
    if differ: raise UserError(f"{what}: {', '.join(differ)}")
def open_run(path, config, ranks):
    """The checkpoint to go on from, or None to start. Refuses to start over by accident, or beside a living run."""
    if ranks.first and not config.bench:
        ranks.lock = open(path.with_suffix(".lock"), "w")  # locked until this process ends, where the file system can
        busy = explained(f"another run is writing {path}: wait for it, or choose another --out_dir", BlockingIOError)
        with contextlib.suppress(OSError), busy: fcntl.lockf(ranks.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # busy's is no OSError
    if config.resume and not config.bench:
        if not path.exists(): raise UserError(f"nothing to resume: {path} is not there; leave --resume out to start")
        saved, total = load_checkpoint(path, "step", "optimizer"), config.total_steps
        if saved["step"] > total: raise UserError(f"{path} is at step {saved['step']}, beyond --total_steps {total}")
        was = saved.get("config", {})
        changed = [f"--{name} {value} (was {was[name]})" for name, value in asdict(config).items()
                   if was.get(name, value) != value and name not in ("resume", "overwrite")]
        if changed: ranks.say("note: this run goes on with other flags:", ", ".join(changed))
        return saved
    if path.exists() and not (config.overwrite or config.bench):
        raise UserError(f"{path} exists: --resume goes on, --overwrite starts over, --out_dir starts elsewhere")
def split_batch(config, ranks):  # the batch as (images a rank a step, images a rank at a time, accumulation steps)
    local = config.batch_size // ranks.size
    micro = min(config.micro_batch or local, local)
    if config.batch_size % ranks.size or local % micro:
        raise UserError(f"--batch_size must be a multiple of {ranks.size} ranks times --micro_batch {config.micro_batch or 1}")
    return local, micro, local // micro

def next_command(script, config, keep=None, **more):
    """The command to type next: `script`, started like this run if it trains, with its flags in `keep` (None: all) and `more`."""
    script = Path(sys.argv[0]).with_name(Path(script).name)
    words, ranks = ["python", str(script)], os.environ.get("LOCAL_WORLD_SIZE")  # torchrun's
    if ranks and "train" in script.name: words[:1] = ["torchrun", f"--nproc_per_node={ranks}"]
    if keep is None: keep = config.given.keys() - {"overwrite"}
    flags = {name: value for name, value in config.given.items() if name in keep}
    flags |= {name: value for name, value in more.items() if value is not False}
    for name, value in flags.items():
        if isinstance(value, bool): words.append(f"--{name}" if value else f"--no-{name}")
        else: words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return shlex.join(words)
def check_finite(losses, step, remedy="try a lower --lr, more --warmup_steps or --precision float32; what was saved is whole"):
    for name, value in losses.items():  # the first NaN or infinite one is named
        if not math.isfinite(value): raise UserError(f"{name} is {value} at step {step}: stopped; {remedy}")

def command_line(main):
    """Run a script's main(). A user's mistake ends as one line and exit status 1, under torchrun one line in all."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)                     # as Ctrl-C, until Ranks.begin
    for stream in (sys.stdout, sys.stderr): stream.reconfigure(errors="replace")  # names of files may be of any bytes
    if sys.platform == "linux": torch.multiprocessing.set_start_method("fork", force=True)  # workers share the data
    try:
        main()
        if dist.is_initialized(): dist.destroy_process_group()
        return
    except (UserError, OSError) as error:
        text = "error: " + str(error).rpartition("UserError: ")[2].strip()  # a worker wraps it in a traceback
        if isinstance(error, OSError): text += "; is that path right?"
    except torch.OutOfMemoryError: text = "error: out of GPU memory, lower --micro_batch or --batch_size"
    except KeyboardInterrupt: text = "interrupted: what was written before is whole"
    except Exception as error:
        text = traceback.format_exc()  # not raised: Python would then wait for the loader's workers, which ignore its signal
        if dist.is_initialized() and isinstance(error, RuntimeError) and re.search("gloo|nccl|peer", str(error), re.I):
            text = f"error: another rank failed: killed, or it says why ({' '.join(str(error).split())[:200]})"
    if os.environ.get("RANK", "0") != "0":  # rank 0 most often says the same: let it, and be ended by torchrun
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    with contextlib.suppress(OSError): sys.stdout.flush()  # its reader may be gone
    print(text, file=sys.stderr, flush=True)
    os._exit(1)  # no waiting for ranks that will never answer
