"""
pytest                      everything but the slow ones, some minutes on two cores
VQRAE_SLOW=1 pytest -s      the measurements too

First the invariants of the method, then the shapes world and the data, last the scripts run as a user runs them.
"""
import contextlib
import gc
import gzip
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import LlamaConfig, TopPLogitsWarper

import eval as evaluation
import sample
import train_ar
import train_tokenizer as tt
import vqrae
from vqrae import MODELS, VQRAE, Decoder, Discriminator, Encoder, PerceptualLoss, SimVQ, UserError, VQRAEConfig

HERE = Path(__file__).parent
slow = pytest.mark.skipif("VQRAE_SLOW" not in os.environ, reason="slow: VQRAE_SLOW=1 pytest -s -k ...")
SMALL = replace(MODELS["tiny"], image_size=32, dim=32, encoder_kwargs=dict(depth=2, num_heads=2, class_token=False),
                codebook_size=24, codebook_dim=40)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return VQRAE(SMALL).eval()


def pictures(n=3, size=32):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------------------------
# The method

@pytest.mark.parametrize("name, tokens, dim, size", [("tiny", 64, 128, 64), ("siglip2_base_256", 256, 768, 256), ("siglip2_256", 256, 1152, 256),
                                                     ("siglip2_512", 1024, 1152, 512), ("internvit_448", 1024, 1024, 448)])
def test_every_model_has_the_papers_shapes(name, tokens, dim, size):
    with torch.device("meta"):                                                # shapes without memory
        model, images = VQRAE(MODELS[name]), torch.rand(2, 3, size, size)
        out = model(images)
        assert out.Z_I.shape == (2, tokens, dim)
        assert out.indices.shape == (2, tokens) and out.indices.dtype == torch.int64
        assert out.reconstruction.shape == images.shape
        assert out.vq_loss.shape == ()


def test_q_sets_the_output_resolution():
    with torch.device("meta"):                                                # grid 32 at 16 pixels a token
        config = replace(MODELS["internvit_448"], q=16)
        assert VQRAE(config)(torch.rand(1, 3, 448, 448)).reconstruction.shape == (1, 3, 512, 512)
    assert config.output_size == 512


def test_decoder_puts_each_token_at_its_place():
    """With the transformer blocks away, a token must decide its own q x q pixels and no others."""
    decoder = Decoder(replace(SMALL, encoder_kwargs=dict(depth=0, num_heads=2, class_token=False))).eval()
    z = torch.randn(1, 16, 32)
    other = z.clone()
    other[:, 6] += torch.randn(32)                                            # row 1, column 2
    changed = (decoder(z) != decoder(other)).any(1)[0]
    assert changed[8:16, 16:24].all()
    changed[8:16, 16:24] = False
    assert not changed.any()


def test_encoder_normalises_and_drops_the_class_token():
    config = replace(SMALL, encoder_kwargs=dict(depth=2, num_heads=2, class_token=True))
    encoder, images = Encoder(config).eval(), pictures()
    mean, std = (torch.tensor(encoder.vit.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    x = encoder.vit.patch_embed((images - mean) / std)
    x = encoder.vit.blocks(encoder.vit.norm_pre(encoder.vit._pos_embed(x)))   # before any final norm: what an MLLM reads
    torch.testing.assert_close(encoder(images), x[:, 1:])


def reference_simvq(z, C, W, beta):
    """Equation 1 and 3 as they stand: the whole codebook projected, all distances, autograd over everything."""
    codes = C @ W.T
    index = torch.cdist(z.flatten(0, 1).double(), codes.double()).argmin(1)
    z_q = codes[index].view_as(z)
    loss = ((z_q - z.detach()) ** 2).mean() + beta * ((z - z_q.detach()) ** 2).mean()
    return z + (z_q - z).detach(), index.view(z.shape[:2]), loss


@pytest.mark.parametrize("k", [7, 500])                                       # fewer codes than rows, and more: two paths
def test_simvq_equals_the_formulas(k):
    torch.manual_seed(k)
    vq, weight = SimVQ(k, 20, beta=0.3), torch.randn(4, 9, 20)
    z = torch.randn(4, 9, 20, requires_grad=True)
    z2, W2 = z.detach().clone().requires_grad_(), vq.proj.weight.detach().clone().requires_grad_()
    got, want = vq(z), reference_simvq(z2, vq.codebook, W2, 0.3)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    for (z_q, _, loss) in (got, want):
        ((z_q * weight).sum() + loss).backward()
    torch.testing.assert_close(z.grad, z2.grad)
    torch.testing.assert_close(vq.proj.weight.grad, W2.grad)
    assert not vq.codebook.requires_grad and "codebook" in vq.state_dict()


def test_nearest_does_not_depend_on_the_slices():
    z, codes = torch.randn(301, 16), torch.randn(50, 16)
    whole = vqrae.nearest(z, codes)
    assert torch.equal(whole, vqrae.nearest(z, codes, max_elements=350))
    assert torch.equal(whole, torch.cdist(z.double(), codes.double()).argmin(1))


@pytest.mark.parametrize("case", ["random", "clustered", "started", "far", "grouped", "crowded"])
def test_a_search_in_bf16_finds_what_float64_finds(case, monkeypatch):
    """As SimVQ makes them, near the latents, and far from them, where all distances are large and nearly equal; off the origin, few dimensions with
    most of the variance; as start_on makes them, in principal components whose variance falls fast, of flat patches and of detailed ones: there
    the products are up to a hundred times the distances; in tight groups of more codes than there are candidates, all alike in bfloat16."""
    k, e, n = 8192, 512, 400
    codes, z = torch.randn(k, e) / e ** 0.5, torch.randn(n, e) / e ** 0.5
    if case == "clustered":
        axes = torch.randn(32, e) * torch.linspace(1, 0.05, 32)[:, None]
        codes, z = (torch.randn(m, 32) @ axes / 5 + 0.05 * torch.randn(m, e) + 3 for m in (k, n))
    if case == "started":
        codes, z = (torch.randn(m, e) / torch.arange(1, e + 1) * torch.randn(m, 1).mul(0.8).exp() * 5 + 0.03 * torch.randn(m, e) for m in (k, n))
    if case in ("grouped", "crowded"):
        centres, spread = torch.randn(64, e) / e ** 0.5, 0.2 if case == "grouped" else 0.01
        codes, z = (centres[torch.randint(64, (m,))] + spread * torch.randn(m, e) / e ** 0.5 for m in (k, n))
    if case == "far": codes, z = codes / 3 ** 0.5, torch.randn(n, e) / 3 ** 0.5
    truth = torch.cdist(z.double(), codes.double()).argmin(1)
    found = {}
    for low in (False, True):
        monkeypatch.setattr(vqrae, "has_bf16", lambda device, low=low: low)
        found[low] = vqrae.nearest(z, codes)
    right = {low: (index == truth).float().mean() for low, index in found.items()}
    assert right[True] >= 0.9999 and (right[False] >= 0.9999 or case == "crowded")            # where float32's own products are too coarse


def test_straight_through_passes_the_gradient_and_exact_values():
    vq, z = SimVQ(30, 8), torch.randn(2, 5, 8, requires_grad=True)
    z_q, indices, _ = vq(z)
    torch.testing.assert_close(z_q, vq.lookup(indices), rtol=0, atol=1e-6)
    g = torch.randn_like(z_q)
    z_q.backward(g)
    assert torch.equal(z.grad, g)


def test_distances_stay_float32_under_autocast():
    vq, z = SimVQ(4000, 64), torch.randn(1, 200, 64)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, indices, _ = vq(z)
    assert z_q.dtype == torch.float32 and torch.equal(indices, vq(z)[1])
    assert torch.equal(vq(z[0])[1], indices[0]) and torch.equal(vq(z.view(10, 20, 1, 64))[1], indices.view(10, 20, 1))        # of any shape


def test_a_tokenizer_in_bfloat16_works():
    half, images = VQRAE(SMALL).bfloat16().eval(), pictures().bfloat16()
    out = half(images)
    assert torch.equal(half.tokenize(images), out.indices) and out.reconstruction.dtype == torch.bfloat16
    torch.testing.assert_close(half.detokenize(out.indices), out.reconstruction, rtol=0.05, atol=0.05)


def test_codebook_starts_on_the_latents():
    vq, z = SimVQ(16, 8), torch.randn(400, 8) * 3 + 5
    error = lambda codes: torch.cdist(z, codes).square().amin(1).mean()
    vq.init_codebook(z)
    assert torch.equal(vq.proj(vq.codebook), vq.codebook)                     # W = I
    assert len(vq(z[None])[1].unique()) == 16                                 # all used from the first step
    assert error(vq.codebook) < min(error(z[torch.randperm(400)[:16]]) for _ in range(10))


def test_latents_start_as_the_pixels_that_features_tell():
    """On features that hold the pixels linearly, distances between latents are distances between patches; few dimensions keep the largest."""
    pixels = torch.rand(6000, 3, 64) * torch.linspace(0.1, 1, 64)
    hidden = torch.randn(192, 300)
    for e in (192, 250, 40):
        model = VQRAE(replace(SMALL, dim=300, codebook_dim=e, encoder_kwargs=dict(depth=1, num_heads=2, class_token=False)))
        Z_I = pixels.flatten(1) @ hidden
        model.start_on(Z_I, pixels)
        z = model.to_code(Z_I).detach()
        assert 0.29 < z.square().mean().sqrt() < 0.31
        z = z[:, :192]
        ours, theirs = torch.pdist(z[:100]), torch.pdist(pixels[:100].flatten(1))
        assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > (0.8 if e >= 192 else 0.3)
        assert len(model.quantizer(model.to_code(Z_I)[None])[1].unique()) >= 22
    with pytest.raises(UserError, match="of one colour"): model.start_on(Z_I, torch.full_like(pixels, 0.3))


def test_tokens_round_trip(small, tmp_path):
    images = pictures()
    with torch.no_grad():
        out = small(images)
        indices = small.tokenize(images)
        assert torch.equal(indices, out.indices) and torch.equal(small.encode(images), out.Z_I)
        torch.testing.assert_close(small.detokenize(indices), out.reconstruction, rtol=0, atol=1e-5)
        vqrae.save_tokenizer(small, tmp_path / "t")
        (tmp_path / "link").symlink_to("t")
        vqrae.save_tokenizer(small, tmp_path / "link")                        # again, through a link
        again = vqrae.load_tokenizer(tmp_path / "t")
        assert again.config == small.config and torch.equal(again.quantizer.codebook, small.quantizer.codebook)
        torch.testing.assert_close(again(images).reconstruction, out.reconstruction, rtol=0, atol=0)
    (tmp_path / "t" / "stage1.pt").touch()
    with pytest.raises(UserError, match="holds stage1.pt"):                   # a run's folder, by mistake
        vqrae.save_tokenizer(small, tmp_path / "t")
    assert (tmp_path / "t" / "stage1.pt").exists()


def test_images_and_codes_of_another_kind_are_refused(small):
    images = pictures()
    for wrong in ((images * 255).byte(), images[0], images[:, :1], F.interpolate(images, size=64)):
        with pytest.raises(UserError, match="images are .* of .32, 32. pixels, not"):
            small.tokenize(wrong)
    with pytest.raises(IndexError):                                           # not the last code
        small.detokenize(torch.full((1, 16), -1))


def test_rae_baseline_differs_in_the_quantiser_alone(small):
    rae = VQRAE(replace(SMALL, quantizer="none"))
    missing = set(small.state_dict()) - set(rae.state_dict())
    assert missing == {"quantizer.codebook", "quantizer.proj.weight"} and set(rae.state_dict()) < set(small.state_dict())
    out = rae(pictures())
    assert out.indices is None and out.vq_loss == 0
    with pytest.raises(UserError, match="no tokens"):
        rae.tokenize(pictures())
    with pytest.raises(UserError, match="no tokens"):
        rae.detokenize(torch.zeros(1, 16, dtype=torch.int64))


def test_every_parameter_is_optimised_once_and_only_matrices_decay(small):
    discriminator, config = Discriminator(16), tt.TrainConfig(stage=2, encoder_lr=1e-5, disc_start=7)
    groups = list(tt.parameter_groups(small, discriminator, config))
    named = [*small.named_parameters(), *(("discriminator." + name, p) for name, p in discriminator.named_parameters())]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for _, p in named)
    for name, p in named:
        [group] = [g for g in groups if any(p is q for q in g["params"])]
        part = name.split(".")[0]
        assert group["weight_decay"] == (0 if p.ndim < 2 or name.endswith("pos_embed") else 1e-4), name
        assert (group["base_lr"], group["start"]) == dict(encoder=(1e-5, 0), discriminator=(4e-5, 7)).get(part, (4e-4, 0)), name


def test_every_parameter_gets_a_gradient_and_a_frozen_encoder_none():
    for frozen in (False, True):
        model = VQRAE(SMALL)
        model.encoder.requires_grad_(not frozen)
        out = model(pictures())
        (F.mse_loss(out.reconstruction, pictures()) + out.vq_loss).backward()
        for name, p in model.named_parameters():
            expected = not (frozen and name.startswith("encoder."))
            assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == expected, f"gradient of {name}"


def test_vfm_perceptual_loss_at_another_output_size(small):
    """q below p: the reconstruction is smaller than what the VFM sees."""
    out = VQRAE(replace(SMALL, q=4))(pictures()).reconstruction
    loss = PerceptualLoss("vfm", vfm=small.encoder)(pictures(size=16), out)
    assert out.shape[-1] == 16 and loss.isfinite() and loss > 0


def test_losses_equal_their_formulas():
    real, fake = torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16)
    want = 0.5 * (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean())
    torch.testing.assert_close(vqrae.hinge_d_loss(real, fake), want)
    r, f, er, ef = torch.tensor([0.7, -0.2, 0.1, 0.3])
    torch.testing.assert_close(vqrae.lecam(r, f, er, ef), max(r - ef, torch.tensor(0.0)) ** 2 + max(er - f, torch.tensor(0.0)) ** 2)
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(vqrae.distill_loss(a.bfloat16(), b), ((a.bfloat16().float() - b) ** 2).mean())


def test_discriminator_has_titoks_shape(monkeypatch):
    net = Discriminator(128)
    assert [tuple(c.weight.shape) for c in net.convs] == [(128, 128, 3, 3), (256, 128, 3, 3), (512, 256, 3, 3)]
    assert [n.num_groups for n in net.norms] == [32, 32, 32] and net.stem.weight.shape == (128, 3, 5, 5)
    for size in (64, 60, 63, 378): assert Discriminator(16)(torch.rand(2, 3, size, size)).shape == (2, 1, 16, 16)
    kernel, x = torch.tensor([1., 3., 3., 1.]) / 8, torch.rand(2, 128, 32, 32)
    for conv in net.convs: torch.nn.init.dirac_(conv.weight), torch.nn.init.zeros_(conv.bias)
    net.stem, net.convs, net.head = torch.nn.Identity(), net.convs[:1], torch.nn.Identity()
    monkeypatch.setattr(vqrae, "group_norm", lambda x, norm: x)
    blurred = F.conv2d(x, (kernel[:, None] * kernel).expand(128, 1, 4, 4), stride=2, padding=1, groups=128)          # all else does nothing
    torch.testing.assert_close(net(x), F.adaptive_max_pool2d(blurred, 16))


def test_discriminator_is_convolution_blur_and_group_norm(monkeypatch):
    net, x = Discriminator(32), torch.rand(2, 3, 64, 64, requires_grad=True)
    for norm in net.norms: torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    kernel = torch.tensor([1., 3., 3., 1.]) / 8
    conv, norm = net.convs[0], net.norms[0]
    y = F.leaky_relu(net.stem(x), 0.1)
    y = F.conv2d(F.pad(conv(y), (1, 1, 1, 1)), (kernel[:, None] * kernel).expand(32, 1, 4, 4), stride=2, groups=32)
    net.convs, net.head = net.convs[:1], torch.nn.Identity()
    inside = lambda t: t[..., 1:-1, 1:-1]                                     # past the edge one has zeros sooner than the other
    with monkeypatch.context() as patch:
        patch.setattr(F, "adaptive_max_pool2d", lambda x, _: x)
        patch.setattr(vqrae, "group_norm", lambda x, norm: x)
        torch.testing.assert_close(inside(net(x)), inside(F.leaky_relu(y, 0.1)))
    theirs = F.group_norm(y, norm.num_groups, norm.weight, norm.bias)
    torch.testing.assert_close(vqrae.group_norm(y, norm), theirs, atol=1e-5, rtol=1e-4)
    flat = 10 + 1e-3 * torch.randn(2, 32, 32, 32)                             # far from zero for its spread
    torch.testing.assert_close(vqrae.group_norm(flat, norm), F.group_norm(flat, norm.num_groups, norm.weight, norm.bias), atol=1e-2, rtol=1e-2)
    a, b = (torch.autograd.grad((z * torch.arange(32)[:, None]).sin().sum(), x, retain_graph=True)[0] for z in (vqrae.group_norm(y, norm), theirs))
    torch.testing.assert_close(a, b, atol=1e-3 * b.abs().max().item(), rtol=1e-3)


def test_perceptual_losses_are_frozen_and_fit_local_files(tmp_path):
    from torchvision.models import convnext_small, vgg16
    torch.save(vgg16().state_dict(), tmp_path / "vgg.pt")
    torch.save(convnext_small().state_dict(), tmp_path / "convnext.pt")
    loss = PerceptualLoss("lpips_convnext", str(tmp_path / "vgg.pt"), str(tmp_path / "convnext.pt"))
    assert not any(p.requires_grad for p in loss.parameters()) and not any(m.training for m in loss.modules())
    x, y = pictures(4, 64).split(2)
    y = y.requires_grad_()
    logits = [loss.convnext((F.interpolate(i, size=224, mode="bilinear", antialias=True) - loss.mean) / loss.std) for i in (x, y)]
    want = loss.lpips(x, y, normalize=True).mean() + 0.1 * F.mse_loss(*logits)
    torch.testing.assert_close(loss(x, y), want)
    loss(x, y).backward()
    assert y.grad.abs().sum() > 0 and loss(x, x) == 0
    state = torch.load(tmp_path / "vgg.pt")
    assert torch.equal(loss.lpips.net.slice5[-2].weight, state["features.28.weight"])     # not LPIPS's random start
    with pytest.raises(UserError, match="--lpips_weights"):
        PerceptualLoss("lpips", str(tmp_path / "convnext.pt"))


def test_vfm_perceptual_loss(small):
    loss, x, y = PerceptualLoss("vfm", vfm=small.encoder), pictures(2), pictures(4)[2:].requires_grad_()
    assert loss(x, x) == 0 and loss(x, y) > 0
    loss(x, y).backward()
    assert y.grad.abs().sum() > 0


def test_encoder_weights_in_transformers_format(tmp_path):
    """Random small models in transformers' key names give the same features through ours."""
    from safetensors.torch import save_file
    from transformers import InternVLVisionConfig, InternVLVisionModel, SiglipVisionConfig, SiglipVisionModel
    images = pictures()
    siglip = SiglipVisionModel(SiglipVisionConfig(hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                                                  patch_size=8)).eval()
    intern = InternVLVisionModel(InternVLVisionConfig(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                                                      image_size=[32, 32], patch_size=[8, 8], attention_bias=True)).eval()
    for p in intern.parameters():                                             # layer scale and class token start constant: no test of anything
        torch.nn.init.normal_(p, std=0.2)
    cases = [("vit_base_patch16_siglip_256.v2_webli", dict(depth=2, num_heads=2, mlp_ratio=3, act_layer="gelu_tanh"), siglip, 0.5, 0.5, 0),
             ("vit_intern300m_patch14_448.ogvl_2pt5", dict(depth=2, num_heads=2), intern, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1)]
    for name, kwargs, model, mean, std, prefix in cases:
        file = str(tmp_path / "weights.safetensors")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
        encoder = Encoder(replace(SMALL, encoder=name, encoder_kwargs=kwargs)).eval()
        vqrae.load_encoder_weights(encoder, file)
        x = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        with torch.no_grad():
            want = model(x, output_hidden_states=True).hidden_states[-1][:, prefix:]
            torch.testing.assert_close(encoder(images), want, rtol=0, atol=1e-4)
        save_file({f"vision_tower.{key}": value.contiguous() for key, value in model.state_dict().items()}, file)      # as an MLLM has it
        vqrae.load_encoder_weights(encoder, file)
        with torch.no_grad():
            torch.testing.assert_close(encoder(images), want, rtol=0, atol=1e-4)


@slow
@pytest.mark.parametrize("name", ["siglip2_base_256", "siglip2_256", "siglip2_512", "internvit_448"])
def test_real_towers_give_our_features(name, tmp_path):
    """VQRAE_SLOW=1 pytest -s -k real_towers: transformers' vision towers in their real sizes, random weights, and our encoder filled from their file."""
    from safetensors.torch import save_file
    from transformers import InternVLVisionConfig, InternVLVisionModel, SiglipVisionConfig, SiglipVisionModel
    config, (width, depth, heads, mlp) = MODELS[name], {768: (768, 12, 12, 3072), 1152: (1152, 27, 16, 4304), 1024: (1024, 24, 16, 4096)}[MODELS[name].dim]
    shape = dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=mlp)
    if name == "internvit_448":
        tower = InternVLVisionModel(InternVLVisionConfig(**shape, image_size=[448, 448], patch_size=[14, 14], attention_bias=True))
    else:
        tower = SiglipVisionModel(SiglipVisionConfig(**shape, image_size=config.image_size, patch_size=16))
    for p in tower.parameters():                                              # some start at zero or one, and would test nothing
        torch.nn.init.normal_(p, std=0.02)
    save_file({key: value.contiguous() for key, value in tower.state_dict().items()}, tmp_path / "weights.safetensors")
    encoder, images = Encoder(config).eval(), pictures(1, config.image_size)
    vqrae.load_encoder_weights(encoder, str(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        want = tower.eval()((images - encoder.mean) / encoder.std, output_hidden_states=True).hidden_states[-1][:, encoder.vit.num_prefix_tokens:]
        off = (encoder(images) - want).abs().max().item()
    print(f"\n{name}: features of about {want.abs().mean():.2f}, at most {off:.1e} apart")
    assert off < 1e-4


def test_swap_into_a_published_mllm(small, tmp_path):
    """The stage-2 encoder in transformers' own MLLMs gives the features it gives here, and survives their save and load."""
    from transformers import (AutoModelForImageTextToText, InternVLConfig, InternVLForConditionalGeneration, LlavaConfig, LlavaForConditionalGeneration,
                              Qwen2Config)
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = Qwen2Config(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    llava = LlavaConfig(vision_config=dict(vision, model_type="siglip_vision_model", intermediate_size=96, image_size=32, patch_size=8), text_config=text, vision_feature_layer=-1)
    intern = InternVLConfig(vision_config=dict(vision, intermediate_size=128, image_size=[32, 32], patch_size=[8, 8], attention_bias=True), text_config=text)
    cases = [("vit_base_patch16_siglip_256.v2_webli", dict(depth=2, num_heads=2, mlp_ratio=3, act_layer="gelu_tanh"), LlavaForConditionalGeneration(llava), 0),
             ("vit_intern300m_patch14_448.ogvl_2pt5", dict(depth=2, num_heads=2), InternVLForConditionalGeneration(intern), 1)]
    for name, kwargs, mllm, prefix in cases:
        encoder = Encoder(replace(SMALL, encoder=name, encoder_kwargs=kwargs)).eval()
        for p in encoder.parameters():
            torch.nn.init.normal_(p, std=0.2)
        train_ar.swap_encoder(mllm, encoder).save_pretrained(tmp_path / name)
        tower = AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype=torch.float32).eval().model.vision_tower
        images = pictures()
        with torch.no_grad():
            found = tower((images - encoder.mean) / encoder.std, output_hidden_states=True).hidden_states[-1][:, prefix:]
            torch.testing.assert_close(encoder(images), found, rtol=0, atol=1e-4)
        mllm.config.vision_feature_layer = -2
        with pytest.raises(UserError, match="reads layer -2"):
            train_ar.swap_encoder(mllm, encoder)
        mllm.config.vision_feature_layer = -1
        for other in (dict(kwargs, depth=1), dict(kwargs, depth=3), dict(kwargs, mlp_ratio=2)):
            with pytest.raises(UserError, match="another ViT"):
                train_ar.swap_encoder(mllm, Encoder(replace(SMALL, encoder=name, encoder_kwargs=other)))


def test_encoder_weights_must_fit(small, tmp_path):
    state = dict(small.encoder.vit.state_dict())
    torch.save(state, tmp_path / "timm.pt")
    fresh = Encoder(SMALL)
    vqrae.load_encoder_weights(fresh, str(tmp_path / "timm.pt"))
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), small.encoder.state_dict().values()))
    state.pop("blocks.1.mlp.fc1.weight")
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(UserError, match="does not fit"):
        vqrae.load_encoder_weights(fresh, str(tmp_path / "short.pt"))
    larger, finer = (Encoder(replace(SMALL, **sizes)) for sizes in (dict(image_size=64), dict(patch_size=4)))
    vqrae.load_encoder_weights(larger, str(tmp_path / "timm.pt"))             # position embeddings are resampled, patches never
    assert larger.vit.pos_embed.shape[1] == 64 and torch.equal(larger.vit.blocks[0].mlp.fc1.weight, small.encoder.vit.blocks[0].mlp.fc1.weight)
    assert (larger.vit.pos_embed.mean() - small.encoder.vit.pos_embed.mean()).abs() < 1e-3
    with pytest.raises(UserError, match="patch_size is 8 there, 4 here"):
        vqrae.load_encoder_weights(finer, str(tmp_path / "timm.pt"))
    with pytest.raises(UserError, match="no file"):
        vqrae.load_encoder_weights(fresh, "nowhere.safetensors")
    (tmp_path / "saved").mkdir()
    vqrae.save_file({key: value.contiguous() for key, value in small.encoder.vit.state_dict().items()}, tmp_path / "saved" / "model.safetensors")
    again = Encoder(SMALL, encoder_weights=str(tmp_path / "saved"))           # as transformers saves a model: in a folder
    assert torch.equal(again(pictures()), small.encode(pictures()))


def test_offline_answer_is_quick_and_names_the_file(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(vqrae, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(vqrae.torch.hub, "load_state_dict_from_url", refuse)
    with torch.device("meta"):
        encoder = Encoder(MODELS["siglip2_base_256"])
    start = time.time()
    with pytest.raises(UserError, match="timm/vit_base_patch16_siglip_256.v2_webli.*--encoder_weights FILE"):
        vqrae.load_encoder_weights(encoder, "hub")
    for folder in ("./nowhere", "no/where"):
        with pytest.raises(UserError, match=f"{folder} is neither a folder|fetch it where there is a network"):
            VQRAE.from_pretrained(folder)
    with pytest.raises(UserError, match="vgg16.*--lpips_weights FILE"):
        PerceptualLoss("lpips")
    config, model_config, _ = vqrae.parse_config(tt.TrainConfig, tt.PRESETS, VQRAEConfig, argv=["--config", "siglip2_256"])
    with pytest.raises(UserError, match="siglip_256.v2_webli.*--encoder_weights FILE"):       # before 800 million random weights are made
        tt.encoder_source(config, model_config, None)
    assert time.time() - start < 5


def test_a_malicious_checkpoint_executes_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harm",)
    torch.save(dict(model=Bomb()), tmp_path / "bad.pt")
    torch.save([torch.zeros(3)], tmp_path / "list.pt"), torch.save(dict(a=torch.zeros(3)), tmp_path / "other.pt")
    for name in ("bad.pt", "list.pt", "other.pt"):
        with pytest.raises(UserError, match=r"of another kind.*: not loaded \(\w+\)$"):   # without torch's advice to run it
            vqrae.load_checkpoint(tmp_path / name, "step")
    assert not (tmp_path / "harm").exists()


def test_a_failed_write_leaves_the_last_checkpoint_whole(tmp_path):
    path = tmp_path / "c.pt"
    vqrae.save_checkpoint(path, dict(step=1))

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="what is saved is whole"):
        vqrae.save_checkpoint(path, dict(step=2), full_disk)
    assert vqrae.load_checkpoint(path) == dict(step=1) and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------------------------
# Configuration

def resolved(*argv):
    return vqrae.parse_config(tt.TrainConfig, tt.PRESETS, VQRAEConfig, list(argv))


@pytest.mark.parametrize("config, stage, want", [
    ("siglip2_256", 1, dict(batch_size=1024, total_steps=100_000, lr=4e-4, end_lr=1e-4, encoder_lr=0, disc_start=-1, distill_weight=0)),
    ("siglip2_256", 2, dict(batch_size=1024, total_steps=70_000, lr=1e-4, end_lr=1e-5, encoder_lr=1e-5, disc_start=50_000, distill_weight=1)),
    ("siglip2_512", 1, dict(batch_size=1024, total_steps=100_000, image_size=512)),
    ("siglip2_512", 2, dict(batch_size=1024, total_steps=70_000, disc_start=50_000)),
    ("internvit_448", 1, dict(batch_size=768, total_steps=45_000, lr=4e-4, image_size=448, patch_size=14)),
    ("internvit_448", 2, dict(batch_size=768, total_steps=60_000, disc_start=30_000, lr=1e-4, encoder_lr=1e-5))])
def test_presets_are_table_7(config, stage, want):
    train, model, _ = resolved("--config", config, "--stage", str(stage))
    same = dict(warmup_steps=2000, beta1=0.9, beta2=0.999, weight_decay=1e-4, clip=1.0, precision="bf16", perceptual="lpips_convnext", perceptual_weight=1.0,
                disc_weight=0.1, disc_lr=4e-5, random_crop=True, random_flip=True, codebook_size=16384, codebook_dim=1536, beta=0.25,
                **(dict(lr=4e-4, end_lr=1e-4, encoder_lr=0.0, distill_weight=0.0, disc_start=-1) if stage == 1 else
                   dict(lr=1e-4, end_lr=1e-5, encoder_lr=1e-5, distill_weight=1.0)))
    values = asdict(train) | asdict(model)
    assert {key: values[key] for key in same | want} == same | want


def test_flags_win_and_origins_are_told():
    train, model, origin = resolved("--stage", "2", "--lr", "0.5", "--codebook_dim", "64", "--no-random_flip")
    assert (train.lr, model.codebook_dim, train.random_flip) == (0.5, 64, False)
    assert (origin["lr"], origin["encoder_lr"], origin["disc_start"], origin["codebook_dim"], origin["seed"]) == \
        ("flag", "config tiny, stage 2", "config tiny, stage 2", "flag", "default")
    assert origin["dim"] == "model" and resolved("--config", "siglip2_256", "--stage", "2")[2]["distill_weight"] == "stage 2"


def test_every_field_is_read_somewhere():
    source = "".join((HERE / name).read_text() for name in ("vqrae.py", "train_tokenizer.py", "eval.py", "train_ar.py", "sample.py"))
    for cls in (tt.TrainConfig, VQRAEConfig, evaluation.EvalConfig, train_ar.ARConfig, sample.SampleConfig):
        for f in fields(cls):
            assert re.search(rf"\bconfig\.{f.name}\b", source), f"nothing reads {cls.__name__}.{f.name}"


@pytest.mark.parametrize("argv, message", [
    (["--colour", "red"], "unrecognized arguments: --colour"), (["--stage", "7"], "invalid choice"), (["--lr", "fast"], "invalid float"),
    (["--image_size", "60"], "--image_size 64"), (["--batch_size", "0"], "at least 1"), (["--encoder_kwargs", "{depth"], "encoder_kwargs"),
    (["--resume", "--overwrite"], "choose one"), (["--quantizer", "fsq"], "simvq or none"), (["--lr", "nan"], "at least 1e-12"),
    (["--beta2", "1"], "below 1"), (["--profile"], "goes with --bench"), (["--seed", "9" * 23], "too large")])
def test_bad_flags_get_one_line(argv, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        resolved(*argv)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The shapes world

def test_a_picture_is_a_function_of_its_number():
    numbers = torch.tensor([5, 123456789, tt.VALIDATION + 3])
    together, alone = tt.plan(numbers), [tt.plan(n[None]) for n in numbers]
    for i, scene in enumerate(alone):
        assert all(torch.equal(a[i:i + 1], b) for a, b in zip(together, scene))
        assert tt.captions(together)[i] == tt.captions(scene)[0]
        torch.testing.assert_close(tt.render(together)[i:i + 1], tt.render(scene), rtol=0, atol=1e-6)
    assert 0 <= tt.render(together).min() and tt.render(together).max() <= 1


def test_held_out_pairs_appear_in_validation_only():
    for first, expected in ((0, False), (tt.VALIDATION, True)):
        scene = tt.plan(torch.arange(4000) + first)
        pairs = set(zip(scene.shape[scene.present].tolist(), scene.color[scene.present].tolist()))
        assert bool(pairs & set(map(tuple, tt.HELD_OUT.nonzero().tolist()))) == expected
        assert len(pairs) == (48 if expected else 42)
        assert set(scene.task.tolist()) == set(range(len(tt.TASKS)))


def test_captions_say_what_is_drawn():
    scene = tt.plan(torch.arange(500))
    for i, text in enumerate(tt.captions(scene)):
        n, shapes = int(scene.count[i]), [tt.SHAPES[s] for s in scene.shape[i]]
        words = text.replace(",", "").replace("crosses", "cross").split()
        if tt.TASKS[scene.task[i]] == "counting":
            assert words == [tt.NUMBERS[n], shapes[0] if shapes[0] == "cross" else shapes[0] + "s"]
            continue
        assert [w for w in words if w in tt.SHAPES] == shapes[:n]
        if tt.TASKS[scene.task[i]] == "position":
            dx, dy = (scene.x[i, 0] - scene.x[i, 1]).item(), (scene.y[i, 0] - scene.y[i, 1]).item()
            truth = ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
            assert truth in text


def test_checker_reads_real_renders():
    right = total = found = 0
    for at in range(0, 512, 64):
        scene = tt.plan(torch.arange(64) + tt.VALIDATION + at)
        images = (tt.render(scene) * 255).round() / 255
        right += int(evaluation.objects_right(images, scene).sum())
        total += int(scene.count.sum())
        found += len(evaluation.find_objects(images)[0])
    assert right / total >= 0.995 and found == total


def test_checker_can_fail():
    scene = tt.plan(torch.arange(64) + tt.VALIDATION)
    wrong = scene._replace(shape=(scene.shape + 1) % 6)
    assert evaluation.objects_right(tt.render(scene), wrong).sum() == 0
    assert evaluation.objects_right(tt.render(scene), scene._replace(color=(scene.color + 1) % 8)).sum() == 0
    assert len(evaluation.find_objects(torch.full((2, 3, 64, 64), 0.5))[0]) == 0


def test_real_renders_fulfil_their_captions_and_others_do_not():
    for task in range(6):
        scene = tt.plan(torch.arange(64) + tt.VALIDATION, task=task)
        images = tt.render(scene)
        assert evaluation.fulfilled(images, scene).float().mean() >= 0.98, tt.TASKS[task]
        wrong = {2: scene._replace(count=scene.count % 4 + 1), 4: scene._replace(relation=scene.relation ^ 1)}.get(task, scene._replace(shape=(scene.shape + 1) % 6))
        assert evaluation.fulfilled(images, wrong).float().mean() <= 0.05, tt.TASKS[task]


def test_questions_have_the_scenes_answers():
    index = torch.arange(1200) + tt.VALIDATION
    scene, seen = tt.plan(index), {}
    one = lambda word: next(s for s in tt.SHAPES if word.startswith(s))
    for i, asked in enumerate(train_ar.questions(index, scene)):
        n = int(scene.count[i])
        things = [(tt.SHAPES[s], list(tt.COLORS)[c], x, y) for s, c, x, y in zip(*(t[i, :n].tolist() for t in (scene.shape, scene.color, scene.x, scene.y)))]
        for question, (kind, answer) in asked.items():
            words = question.rstrip("?").split()
            if kind == "presence":
                truth = "yes" if (words[-1], words[-2]) in [t[:2] for t in things] else "no"
            elif kind == "counting":
                truth = tt.NUMBERS[n if words[2] == "objects" else sum(t[0] == one(words[2]) for t in things)]
            elif kind == "color":
                [truth] = [t[1] for t in things if t[0] == words[-1]]
            elif words[3] == "where":
                [(x, y)] = [t[2:] for t in things if t[0] == words[-1]]
                truth = {"left": x < 32, "right": x > 32, "top": y < 32, "bottom": y > 32}[answer] and answer
                assert answer in question
            else:
                (a, b), (dx, dy) = [next(t for t in things if t[0] == w) for w in (words[2], words[-1])], (0, 0)
                dx, dy = a[2] - b[2], a[3] - b[3]
                truth = {"left": dx < 0, "right": dx > 0, "above": dy < 0, "below": dy > 0}[answer] and answer
                assert answer in words
            assert answer == truth
            seen.setdefault(kind, set()).add(answer)
    assert {kind: len(answers) for kind, answers in seen.items()} == dict(presence=2, counting=5, color=8, position=6)


def test_segments_lie_under_the_objects():
    scene = tt.plan(torch.arange(20))
    shape, color, middle = tt.segments(scene, 8)
    assert shape.shape == (20, 64, 4) and torch.equal(shape > 0, color > 0)
    for i in range(20):
        cells = color[i].view(8, 8, 2, 2).transpose(1, 2).reshape(16, 16)     # one cell is four pixels
        for k in range(int(scene.count[i])):
            if tt.SHAPES[scene.shape[i, k]] != "ring":
                row, column = int(scene.y[i, k] / 4), int(scene.x[i, k] / 4)
                assert cells[row, column] == scene.color[i, k] + 1
                assert torch.allclose(middle[i].view(8, 8, 4, 2)[row // 2, column // 2, row % 2 * 2 + column % 2] * 32 + 32, torch.stack([scene.x[i, k], scene.y[i, k]]))


# ---------------------------------------------------------------------------------------------------------------------
# Image files

def encoded(image, format="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def test_every_kind_of_picture_decodes():
    red = Image.new("RGB", (40, 30), (250, 10, 20))
    near = lambda image, rgb: max(abs(a - b) for a, b in zip(image.getpixel((20, 15)), rgb)) <= 6
    for data in (encoded(red), encoded(red, "JPEG"), encoded(red, "WEBP"), encoded(red.convert("P", palette=Image.Palette.ADAPTIVE)), encoded(red, "GIF"),
                 encoded(red, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 30), "blue")]), encoded(red.convert("CMYK"), "TIFF"),
                 encoded(red, "BMP")):
        image = tt.decode(data)
        assert image.mode == "RGB" and near(image, (250, 10, 20))
    assert near(tt.decode(encoded(Image.new("RGBA", (40, 30), (0, 0, 255, 0)))), (255, 255, 255))
    assert near(tt.decode(encoded(Image.new("LA", (40, 30), (0, 0)))), (255, 255, 255))
    assert near(tt.decode(encoded(Image.new("L", (40, 30), 77))), (77, 77, 77))
    assert near(tt.decode(encoded(Image.new("I;16", (40, 30), 200 * 257))), (200, 200, 200))
    assert near(tt.decode(encoded(Image.new("I;16", (40, 30), 200))), (1, 1, 1))       # dark, not eight bits
    assert near(tt.decode(encoded(Image.new("I", (40, 30), 200 * 257), "TIFF")), (200, 200, 200))
    for mode, value in (("F", 0.5), ("I", 200)):                              # skipped and named, not black
        with pytest.raises(ValueError, match="unknown range"): tt.decode(encoded(Image.new(mode, (40, 30), value), "TIFF"))
    exif = Image.Exif()
    exif[0x0112] = 6                                                          # stored on its side
    assert tt.decode(encoded(red, "JPEG", exif=exif)).size == (30, 40)


def png_header(width, height):
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", __import__("zlib").crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def bad_files():
    good = encoded(Image.new("RGB", (64, 64), "green"))
    return dict(empty=b"", cut=good[:60], text=b"not an image", huge=png_header(60000, 60000))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for i in range(24):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50 + i, 40), (10 * i, 100, 50)).save(root / "ab"[i % 2] / f"{i:02d}.png")
    return root


def test_unreadable_images_are_stepped_over(folder):
    for name, data in bad_files().items():
        (folder / "a" / f"{name}.png").write_bytes(data)
        with pytest.raises(Exception):
            tt.decode(data)
    data = tt.Images(str(folder), 32)
    items = [data[i] for i in range(len(data))]
    assert len(items) == 28 and all(item["image"].shape == (3, 32, 32) for item in items)
    assert {line.split(":")[0].rsplit("/")[-1] for item in items for line in item["skipped"].splitlines()} == {f"{n}.png" for n in bad_files()}


@slow
def test_two_thousand_mangled_files_crash_nothing(folder):
    """VQRAE_SLOW=1 pytest -s -k two_thousand: bytes changed, cut out and put in, in every format that is read."""
    chance, picture = random.Random(0), tt.TF.to_pil_image(pictures(1)[0])
    formats = [encoded(picture, name) for name in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")]
    for i in range(2000):
        data = bytearray(formats[i % 6])
        for _ in range(chance.choice((1, 3, 30))):
            at = chance.randrange(len(data))
            data[at:at + chance.randrange(9)] = chance.randbytes(chance.randrange(9))
        (folder / "a" / f"mangled{i}.png").write_bytes(data)
    data = tt.Images(str(folder), 32)
    items = [data[i] for i in range(len(data))]
    skipped = {line.split(":")[0] for item in items for line in item["skipped"].splitlines()}
    assert len(items) == 2024 and all(item["image"].shape == (3, 32, 32) for item in items)
    print(f"\n{len(skipped)} of 2,000 mangled files could not be read, and were stepped over")
    assert 100 < len(skipped) < 2000 and all("mangled" in name for name in skipped)


def test_no_readable_image_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        tt.Images(str(tmp_path / "none"), 32)
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(UserError, match="no images in it"):
        tt.Images(str(tmp_path), 32)
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(UserError, match="no readable image"):
        tt.Images(str(tmp_path), 32)[0]


def test_bad_images_among_few_good_ones_are_stepped_over_and_named_once(tmp_path):
    for i in range(3):
        (tmp_path / f"bad{i}.png").write_bytes(b"x")
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    data = tt.Images(str(tmp_path), 16)
    assert sum(len(batch["image"]) for batch in tt.batches(data, 16, range(100), 4)) == 100
    assert sorted(line.split(":")[0][-8:-4] for line in data.skipped) == ["bad0", "bad1", "bad2"]


def test_captions_and_classes(folder, capsys):
    (folder / "a" / "metadata.jsonl").write_text(json.dumps(dict(file_name="00.png", text="zero\u2028", label="cat"), ensure_ascii=False) + '\n{"file_name": "02.png", "label": null}\n')
    (folder / "b" / "01.txt").write_text("\ufeffone\n")                          # as some editors on Windows save it
    items = {item["name"][-6:-4]: item for item in map(tt.Images(str(folder), 32, in_order=True).__getitem__, range(24))}
    assert (items["00"]["text"], items["00"]["label"]) == ("zero", "cat")
    assert (items["01"]["text"], items["01"]["label"]) == ("one", "b")
    assert (items["02"]["text"], items["02"]["label"]) == ("", "a")
    links = folder.with_name("li*nks [1]")                                    # found through links, in folders of any name
    links.mkdir()
    (links / "there").symlink_to(folder / "b")
    assert [item["text"] for item in map(tt.Images(str(links), 32, in_order=True).__getitem__, range(12))].count("one") == 1
    (links / "back").symlink_to("."), (links / "too").symlink_to("there"), (folder / "b" / "up").symlink_to(links)
    assert len(tt.Images(str(links), 32)) == 12                               # each folder once, or held-out pictures would be trained on
    (folder / "b" / "up").unlink()
    (folder / "a" / "metadata.jsonl").write_text('\ufeff{"file_name": "00.png", "text": "zero"}\n{"file_name": "01.PNG", "text": "lost"}\n')
    tt.Images(str(folder), 32)
    assert f"1 of 2 rows name no image: {folder / 'a' / '01.PNG'}" in capsys.readouterr().out
    for second in ('{"file_na', '{"file_name": "01.png", "text": ["a", "list"]}'):
        (folder / "a" / "metadata.jsonl").write_text('{"file_name": "00.png"}\n\n' + second)
        with pytest.raises(UserError, match="metadata.jsonl, line 3"):
            tt.Images(str(folder), 32)


def test_order_and_crops_depend_on_the_position_alone(folder):
    make = lambda seed=0: tt.Images(str(folder), 32, seed, random_crop=True, random_flip=True)
    first, second = make(), make()
    epoch = [first[i]["name"] for i in range(24)]
    assert sorted(epoch) == sorted(first.record(i)["name"] for i in range(24)) and epoch != [first[24 + i]["name"] for i in range(24)]
    for position in (30, 3, 17):                                              # in any order
        assert torch.equal(first[position]["image"], second[position]["image"])
    two = [b["name"] for part in (range(0, 4), range(4, 8)) for b in tt.batches(make(), 32, part, 4, num_workers=0)]
    assert sum(two, []) == epoch[:8]
    workers = [b["image"] for b in tt.batches(make(), 32, range(8), 4, num_workers=2)]
    assert torch.equal(torch.cat(workers), torch.stack([first[i]["image"] for i in range(8)]) / 255)
    assert epoch != [make(1)[i]["name"] for i in range(24)]
    held = [{data.record(i)["name"] for i in range(len(data))} for data in (tt.Images(str(folder), 32, part=p) for p in ("train", "val"))]
    assert not held[0] & held[1] and len(held[0] | held[1]) == 24


def test_flips_do_not_need_random_crops(folder):
    plain, flips = (tt.Images(str(folder), 32, random_flip=flip) for flip in (False, True))
    turned = [torch.equal(flips[i]["image"], plain[i]["image"].flip(-1)) for i in range(24)]
    assert 0 < sum(turned) and all(t or torch.equal(flips[i]["image"], plain[i]["image"]) for i, t in enumerate(turned))


def test_centre_crop():
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, :, 10:30] = 255
    assert (tt.crop(tt.TF.to_pil_image(image), 20) == 255).all()


def test_crops_are_of_whole_pixels_after_the_resize():
    """As torchvision's Resize and RandomCrop do it: bit for bit where nothing is resized, and nearly so where the crop comes first."""
    image = torch.randint(0, 256, (3, 20, 33), dtype=torch.uint8)
    large = F.interpolate(image[None].float(), scale_factor=4, mode="bicubic").clamp(0, 255).byte()[0]
    resized = tt.TF.pil_to_tensor(tt.TF.to_pil_image(large).resize((33, 20), tt.Image.Resampling.BICUBIC)).float()
    for u in (0.0, 0.11, 0.5, 0.77, 0.999):
        x = round(u * 13)
        assert torch.equal(tt.crop(tt.TF.to_pil_image(image), 20, (u, 0.3, 1)), image[:, :, x:x + 20])
        assert torch.equal(tt.crop(tt.TF.to_pil_image(image.transpose(1, 2)), 20, (0.3, u, 1)), image.transpose(1, 2)[:, x:x + 20])
        difference = (tt.crop(tt.TF.to_pil_image(large), 20, (u, 0.3, 1)) - resized[:, :, x:x + 20])[:, :, 2:-2]       # at the crop's edge it sees less
        assert difference.abs().max() <= 1


def test_tar_shards_hold_the_same_images(folder, tmp_path, capsys, monkeypatch):
    files = sorted(folder.rglob("*.png"))
    for shard in range(2):
        with tarfile.open(tmp_path / f"s-{shard:02d}.tar", "w") as tar:
            for i, path in list(enumerate(files))[shard::2]:
                for name, data in ((f"{i:05d}.png", path.read_bytes()), (f"{i:05d}.txt", f"picture {i}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (tmp_path / "s-02.tar").write_bytes(b"damaged")
    read = lambda: tt.Images(str(tmp_path / "s-{00..02}.tar"), 32, in_order=True, folder=str(tmp_path / "run"))
    shards, said = read(), capsys.readouterr().out
    assert len(shards) == 24 and "1 of 3 shards" in said and "s-02.tar" in said
    for item in map(shards.__getitem__, range(24)):
        i = int(item["name"].rsplit(":")[-1])
        assert item["text"] == f"picture {i}" and torch.equal(item["image"], tt.crop(tt.decode(files[i].read_bytes()), 32))
    with monkeypatch.context() as patch:                                      # the second time the index is there
        patch.setattr(tt.tarfile, "open", None)
        assert [read()[i]["name"] for i in range(24)] == [shards[i]["name"] for i in range(24)]
    (tmp_path / "s-02.tar").write_bytes((tmp_path / "s-00.tar").read_bytes())
    assert len(read()) == 36                                                  # mended: listed anew
    (tmp_path / "z.tar").write_bytes(gzip.compress((tmp_path / "s-00.tar").read_bytes()))      # whose offsets are not those in the file
    with pytest.raises(UserError, match="no readable shard.*z.tar, as an uncompressed tar"):
        tt.Images(str(tmp_path / "z.tar"), 32, folder=str(tmp_path / "run"))
    for name in ("one.png", "two.png"): shutil.copy(files[0], tmp_path / name)
    (tmp_path / "one.txt").write_text("the same")
    (tmp_path / "two.txt").hardlink_to(tmp_path / "one.txt")                  # which tar stores by name alone
    with tarfile.open(tmp_path / "linked.tar", "w") as tar:
        for name in ("one.png", "one.txt", "two.png", "two.txt"): tar.add(tmp_path / name, name)
        for name in ("one.mask.png", "two.seg.JPG"): tar.add(tmp_path / "one.png", name)                            # which belong to the others
    linked = tt.Images(tmp_path / "linked.tar", 32, folder=str(tmp_path / "run"))
    assert len(linked) == 2
    assert [linked[i]["text"] for i in (0, 1)] == ["the same"] * 2
    with tarfile.open(tmp_path / "lost.tar", "w") as tar:                     # a link to nothing takes no other with it
        for name in ("one.png", "one.txt", "two.txt", "two.png"):
            if name != "one.txt": tar.add(tmp_path / name, name)
            else: tar.inodes[os.stat(tmp_path / name).st_ino, os.stat(tmp_path / name).st_dev] = name
    assert len(tt.Images(str(tmp_path / "lost.tar"), 32, folder=str(tmp_path / "run"))) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

def test_psnr_and_ssim_equal_scikit_images():
    """Values of scikit-image 0.26.0's peak_signal_noise_ratio and structural_similarity on these pictures."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    a = torch.stack([torch.sin(x / 5 + c) * torch.cos(y / (7 - c)) for c in range(3)]) * 0.4 + 0.5
    b = (a + 0.1 * torch.sin(x * y / 9)).clamp(0, 1)
    a, b = ((i * 255).round() / 255 for i in (a[None], b[None]))
    assert abs(tt.psnr(a, b).item() - 23.112960) < 1e-4
    assert abs(evaluation.ssim(a, b).item() - 0.774688) < 1e-4
    assert abs(evaluation.ssim(a, b, 2.0).item() - 0.801803) < 1e-4


def test_frechet_distance_of_known_gaussians():
    import numpy as np
    from scipy.linalg import sqrtm
    x, y = torch.randn(5000, 6) @ torch.randn(6, 6), torch.randn(4000, 6) @ torch.randn(6, 6) + 1
    found = evaluation.frechet(*(sum(map(evaluation.moments, data.split(777))) for data in (x, y)))
    m, c = zip(*((d.double().mean(0).numpy(), np.cov(d.double().numpy().T)) for d in (x, y)))
    want = ((m[0] - m[1]) ** 2).sum() + np.trace(c[0] + c[1] - 2 * sqrtm(c[0] @ c[1]).real)
    assert abs(found - want) < 1e-6 * want


def test_codebook_statistics():
    assert tt.code_usage(torch.tensor([4.0, 4.0, 0, 0])) == (0.5, pytest.approx(2), pytest.approx(1))


def test_a_step_counts_every_product_of_attention(capsys):
    """Four query heads share two key heads: of the seven products two are the forward pass's, and each is that of four heads. Where there is no
    fused kernel for shared keys (torch 2.8 on a CPU) the scores are kept, and the backward pass has one product less."""
    config = type("Config", (), dict(profile=False, bench=1, batch_size=1))
    timed = vqrae.bench(config, vqrae.Ranks("cpu"), {})
    next(timed)
    q, k = (torch.randn(2, heads, 50, 16, requires_grad=True) for heads in (4, 2))
    F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True).sum().backward()
    assert True in timed
    products = 6 if torch.__version__ < "2.9" else 7
    assert f"{products * 2 * (2 * 4) * 50 * 50 * 16 / 1e12:.3g} TFLOP" in capsys.readouterr().out


def test_what_is_compiled():
    lm = train_ar.Qwen3ForCausalLM(train_ar.Qwen3Config(**train_ar.TINY_LM, vocab_size=9))
    model, discriminator = VQRAE(SMALL), Discriminator(16)
    vqrae.compile_parts(lm, model, discriminator, None, False)
    blocks = [*lm.model.layers, *model.encoder.vit.blocks, *model.decoder.vit.blocks]
    assert len(blocks) == 4 + 2 + 2 and all(part._compiled_call_impl for part in (*blocks, discriminator))


def straightforward_simvq(vq, z):
    """The formula with autograd over everything and all N x k distances at once."""
    codes, flat = vq.proj(vq.codebook), z.flatten(0, 1)
    distance = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
    indices = distance.argmin(1)
    z_q = F.embedding(indices, codes).view_as(z)
    return z + (z_q - z).detach(), indices, F.mse_loss(z_q, z.detach()) + vq.beta * F.mse_loss(z, z_q.detach())


def clock(f):
    """Seconds of f(), a GPU's work included."""
    start = time.time()
    f()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.time() - start


def simvq_cost(which, n, device="cpu"):
    """Seconds of the best of five forwards and backwards, MB of memory beyond what was there before, the matmul's GFLOP/s."""
    import resource
    vq, z = SimVQ(16384, 1536).to(device), torch.randn(1, n, 1536, device=device, requires_grad=True)
    if which == "ours in float32": vqrae.has_bf16 = lambda device: False
    step = vq if which.startswith("ours") else lambda z: straightforward_simvq(vq, z)
    peak = lambda: torch.cuda.max_memory_allocated() / 2 ** 20 if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def there_and_back():
        z_q, _, loss = step(z)
        (z_q.sum() + loss).backward()
    a, before = torch.randn(2048, 1536, device=device), peak()
    seconds = min(clock(there_and_back) for _ in range(5))
    memory = peak() - before
    return seconds, memory, 2 * a.numel() * 16384 / min(clock(lambda: a @ vq.codebook.T) for _ in range(5)) / 1e9


@slow
@pytest.mark.parametrize("which, n, faster, memory", [("ours in float32", 2048, 1.2, 0.6), ("ours in float32", 8192, 1.0, 0.3), ("ours", 2048, 1.2, 0.6), ("ours", 8192, 2.0, 0.3)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_simvq_is_fast_and_lean(which, n, faster, memory, device):
    """VQRAE_SLOW=1 pytest -s -k fast_and_lean: the paper's codebook against the formula in float32, each in a process of its own; "ours" searches
    in bf16 where there are units for that."""
    if device == "cuda" and not torch.cuda.is_available(): pytest.skip("no GPU")
    if which == "ours" and not vqrae.has_bf16(torch.device(device)): pytest.skip(f"this {device} has no bf16 units")
    cost = {name: json.loads(subprocess.run([sys.executable, "-c", f"import json, test_vqrae as t; print(json.dumps(t.simvq_cost({name!r}, {n}, {device!r})))"],
                                            cwd=HERE, text=True, capture_output=True, check=True).stdout) for name in ("straightforward", which)}
    work = (2 * n * 16384 * 1536 + 2 * 16384 * 1536 ** 2) / 1e9
    (t0, m0, _), (t1, m1, rate) = cost["straightforward"], cost[which]
    print(f"\nSimVQ on {device}, {which}, N {n}: {t0 / t1:.2f} times as fast, {m1 / m0:.2f} of the extra memory, {work / t1 / rate:.0%} of the float32 matmul rate")
    assert t0 / t1 >= faster and m1 / m0 <= memory


@slow
def test_the_bottleneck_starts_well(tmp_path, monkeypatch):
    """VQRAE_SLOW=1 pytest -s -k starts_well, after train_tokenizer.py: the first 300 steps of stage 1 from different starts of to_code and codes."""
    ours = VQRAE.start_on

    def some(pixels, even):
        n = 16 * 2048
        return torch.randperm(len(pixels))[:n] if even else torch.multinomial((pixels.var(2).mean(1) + 5e-4) ** 0.85, n, replacement=True)

    @torch.no_grad()
    def random_map(model, Z_I, pixels, even=True):
        model.quantizer.init_codebook(model.to_code(Z_I[some(pixels, even)]))

    @torch.no_grad()
    def all_alike(model, Z_I, pixels):
        ours(model, Z_I, pixels)
        random_map(model, Z_I, pixels)

    @torch.no_grad()
    def at_unit_variance(model, Z_I, pixels):
        ours(model, Z_I, pixels)
        for tensor in (*model.to_code[1].parameters(), model.quantizer.codebook):
            tensor.div_(0.3)
    starts = {f"--bottleneck_start random --codebook_dim {dim}": ours for dim in (8, 32, 192)} | {"to_code random, codes k means": random_map,
              "the same, k means weighted by detail": lambda *a: random_map(*a, even=False), "to_code from pixels, codes k means": all_alike,
              "to_code from pixels at unit variance, k means weighted by detail": at_unit_variance, "the same at 0.3 (ours)": ours}
    found = {}
    for i, (name, start) in enumerate(starts.items()):
        monkeypatch.setattr(VQRAE, "start_on", start)
        flags = name.split() if name.startswith("--") else []
        run_inside("train_tokenizer.py", "--init_from", str(HERE / "out/tiny"), "--out_dir", str(tmp_path / str(i)), "--total_steps", "300", *flags)
        found[name] = json.loads((tmp_path / str(i) / "log_stage1.jsonl").read_text().splitlines()[-1])
        print(f"\n{name}: {found[name]['val_psnr']:.2f} dB, {found[name]['val_codebook_usage']:.1%} of the codes on 256 pictures")
    *others, unit, ours = (row["val_psnr"] for row in found.values())         # what unit variance costs is seen in stage 2: README
    assert ours > max(others) + 0.3 and ours > unit - 0.2


def qwen3_generator():
    """Qwen3-0.6B's architecture with random weights, in bf16 on the GPU, with words for shapes and the paper's codes: 1,024 of 16,384."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        tokenizer = VQRAE(replace(MODELS["tiny"], image_size=512, patch_size=16, codebook_size=16384, codebook_dim=1536, encoder_weights="random"))
        lm = train_ar.Qwen3ForCausalLM(train_ar.Qwen3Config(
            vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
            tie_word_embeddings=True))
    words = train_ar.word_tokenizer(train_ar.captions(tt.plan(torch.arange(10_000))))
    train_ar.grow_vocabulary(lm.cpu(), words, tokenizer, "random", 1536)
    return lm.to("cuda", torch.bfloat16).eval(), words


def ours_and_theirs(lm, text_tokenizer, batch, new=64):
    """Sampling for `batch` captions as sample.py's options are (tiny's on a CPU): whole pictures by us, `new` codes of each by transformers."""
    visual, prompts = lm.config.visual, ["a red circle left of a blue square"] * batch
    argv = ["--prompt", prompts[0], "--config", "tiny" if lm.device.type == "cpu" else "siglip2_256"]
    config, _, _ = vqrae.parse_config(sample.SampleConfig, sample.PRESETS, argv=argv)
    how = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)

    def theirs():
        ids, mask = (t.to(lm.device) for t in train_ar.layout(text_tokenizer, visual, prompts))
        nothing, nothing_mask = (t.to(lm.device) for t in train_ar.layout(text_tokenizer, visual, [""] * batch))
        return lm.generate(input_ids=ids, attention_mask=mask, negative_prompt_ids=nothing, negative_prompt_attention_mask=nothing_mask, guidance_scale=config.guidance,
                           do_sample=True, **how, min_new_tokens=new, max_new_tokens=new, suppress_tokens=list(range(visual["offset"])))

    def ours(): return sample.generate(lm, text_tokenizer, prompts, range(batch), config.guidance, **how, compiled=lm.device.type == "cuda")
    return ours, theirs


@slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sampling_beats_transformers_generate(device):
    """VQRAE_SLOW=1 pytest -s -k beats, after train_ar.py: guided sampling a code, the best of three, against transformers' generate: the tiny generator
    on a CPU; Qwen3-0.6B with random weights on a GPU, where ours draws whole pictures of 1,024 codes and theirs the first 64 of them, the quickest."""
    if device == "cuda" and not torch.cuda.is_available(): pytest.skip("no GPU")
    lm, text_tokenizer, *_ = train_ar.load_generator(HERE / "out/tiny", HERE / "out/tiny/tokenizer") if device == "cpu" else qwen3_generator()
    N, rates = lm.config.visual["tokens"], []
    for batch in (1, 16, 64):
        ours, theirs = ours_and_theirs(lm, text_tokenizer, batch)
        ours()                                                                # on a GPU the first compiles
        ours, theirs = (min(times) for times in zip(*((clock(ours) / N, clock(theirs) / 64) for _ in range(3))))           # in turn
        rates.append(theirs / ours)
        print(f"\n{device}, batch {batch}: {batch / ours:.0f} codes a second, {ours * 1e3:.2f} ms a step, {batch / ours / N:.2f} pictures a second, "
              f"{rates[-1]:.2f} times transformers' generate")
    assert min(rates) > 1


@slow
def test_shapes_are_drawn_fast():
    """VQRAE_SLOW=1 pytest -s -k drawn_fast: pictures a second on one core."""
    code = ("import time, torch, train_tokenizer as t; torch.set_num_threads(1); t.render(t.plan(torch.arange(64))); s = time.time();"
            "[t.render(t.plan(torch.arange(64) + i)) for i in range(100)]; print(6400 / (time.time() - s))")
    rate = float(subprocess.run([sys.executable, "-c", code], cwd=HERE, text=True, capture_output=True, check=True).stdout)
    print(f"\n{rate:.0f} pictures a second on one core")
    assert rate >= 5000


@slow
def test_detokenizing_hardly_waits_for_the_codebook():
    """VQRAE_SLOW=1 pytest -s -k hardly_waits: the quantiser's share of detokenize, SigLIP2-so400m 256 with random weights; 4 images, as for 64."""
    model, indices = VQRAE(MODELS["siglip2_256"]).eval(), torch.randint(16384, (4, 256))
    model.detokenize(indices[:1])
    share = clock(lambda: model.quantizer.lookup(indices)) / clock(lambda: model.detokenize(indices))
    print(f"\nquantiser's share of detokenize: {share:.2%}")
    assert share < 0.01


@slow
def test_codes_in_bf16_rebuild_as_well():
    """VQRAE_SLOW=1 pytest -s -k codes_in_bf16, after the quick start: train_ar.py tokenizes in its --precision; 512 validation pictures."""
    model = vqrae.load_tokenizer(HERE / "out/tiny/tokenizer")
    X = tt.render(tt.plan(torch.arange(512) + tt.VALIDATION))
    codes = model.tokenize(X)
    with torch.autocast("cpu", torch.bfloat16): low = model.tokenize(X)
    full, lower = (tt.psnr(model.detokenize(which), X).mean() for which in (codes, low))
    print(f"\nin bf16 {(codes != low).float().mean():.1%} of the codes are others; {full:.3f} dB, in bf16 {lower:.3f} dB")
    assert full - lower < 0.05


@slow
def test_a_folder_is_read_as_fast_as_pil_reads_it(tmp_path):
    """VQRAE_SLOW=1 pytest -s -k pil_reads: 1,000 JPEGs of 400 x 300 to 256 px by two workers, against two processes of PIL's decode and resize alone."""
    for i in range(1000):
        noise = torch.rand(1, 3, 30, 40, generator=torch.Generator().manual_seed(i))
        tt.TF.to_pil_image(F.interpolate(noise, size=(300, 400), mode="bicubic").clamp(0, 1)[0]).save(tmp_path / f"{i}.jpg", quality=90)
    code = ("import sys; from PIL import Image; "
            "[Image.open(f'{sys.argv[1]}/{i % 1000}.jpg').convert('RGB').resize((341, 256), 3) for i in range(int(sys.argv[2]), 4000, 2)]")
    data, rates = tt.Images(str(tmp_path), 256, random_crop=True), {"meta": [], "cpu": []}            # meta: bytes are floats elsewhere, as on a GPU
    for _ in range(3):
        alone = clock(lambda: [p.wait() for p in [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)]) for i in range(2)]])
        for device, found in rates.items():
            found.append(alone / clock(lambda: [None for _ in tt.batches(data, 256, range(4000), 50, num_workers=2, device=device)]))
    for device, found in rates.items():
        print(f"\ndata, floats on {device}: {max(found):.2f} of PIL's own rate ({', '.join(f'{r:.2f}' for r in found)})")
    assert max(rates["meta"]) > 0.9


def test_knn_and_probe_on_a_case_with_a_known_answer():
    labels = torch.arange(200) // 2 % 4
    x = F.one_hot(labels, 4) * 5 + torch.randn(200, 4) * 0.1
    for metric in (evaluation.knn, evaluation.probe):
        assert metric(x[::2], labels[::2], x[1::2], labels[1::2]) == 1.0
        assert metric(x[::2], labels[::2], x[1::2], labels[1::2].roll(1)) < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The scripts as a user runs them

WEE = ["--image_size", "32", "--dim", "32", "--encoder_kwargs", '{"depth": 2, "num_heads": 2, "class_token": false}', "--codebook_size", "24",
       "--codebook_dim", "40", "--stage0_steps", "3", "--batch_size", "4", "--device", "cpu",
       "--log_every", "1", "--eval_every", "3", "--save_every", "2", "--val_images", "8", "--total_steps", "6"]


def run(*argv, ranks=0, fails=False):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else [sys.executable]
    done = subprocess.run([*launch, *map(str, argv)], cwd=HERE, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"), timeout=300)
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
    if fails:
        assert "Traceback" not in done.stderr or ranks, done.stderr[-3000:]
    return done.stdout + done.stderr


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(path):
    return {row["step"]: row["loss"] for row in map(json.loads, path.read_text().splitlines()) if "loss" in row}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Stages 0, 1 and 2, a few steps each, with adversarial term from step 3 on."""
    out = tmp_path_factory.mktemp("run")
    first = run("train_tokenizer.py", *WEE, "--out_dir", out)
    command = shlex.split(re.search(r"^Next: python (.*)$", first, re.M)[1])  # as it was told, model flags and all
    said = [first, run(*command, *WEE[-10:], "--disc_start", 3)]
    return out, said


def test_both_stages_leave_what_they_promise(trained):
    out, said = trained
    for stage in (1, 2):
        assert Image.open(out / f"recon_stage{stage}.png").size[0] > 8 * 32
        rows = [json.loads(line) for line in (out / f"log_stage{stage}.jsonl").read_text().splitlines()]
        assert {"step", "l2", "quant", "perceptual", "loss", "lr", "images_per_s", "codebook_usage", "perplexity"} <= rows[0].keys()
        assert any("val_psnr" in row for row in rows)
        assert (out / f"tokenizer-stage{stage}" / "teacher.safetensors").exists()
    assert (out / "tokenizer").resolve() == out / "tokenizer-stage2"
    assert "--stage 2" in said[0] and re.search("python eval.py .*--data shapes --out_dir", said[1]) and "validation PSNR" in said[0]
    assert {"discriminator", "lecam", "adversarial"} <= json.loads((out / "log_stage2.jsonl").read_text().splitlines()[-2]).keys()


def test_stage_1_freezes_the_encoder_bit_for_bit_and_stage_2_moves_everything(trained):
    out, _ = trained
    stage0, stage1, stage2 = (vqrae.load_checkpoint(out / f"stage{i}.pt") for i in range(3))
    saved = vqrae.load_tokenizer(out / "tokenizer-stage1").state_dict()
    for name, value in stage0["encoder"].items():
        assert all(torch.equal(value, s[f"encoder.vit.{name}"]) for s in (stage1["model"], stage1["ema"], saved)), name
    assert torch.equal(stage1["model"]["quantizer.codebook"], stage2["model"]["quantizer.codebook"])       # C never learns
    for name, value in stage1["ema"].items():
        if name != "quantizer.codebook":
            assert not torch.equal(value, stage2["model"][name]), f"{name} did not move in stage 2"
    teacher = train_ar.load_teacher(out / "tokenizer-stage2", vqrae.load_tokenizer(out / "tokenizer-stage2").config)
    assert states_equal(teacher.vit.state_dict(), stage0["encoder"])                                       # T is the encoder as it was


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_and_resumed_ends_bit_identical(trained, tmp_path, stage):
    out, _ = trained
    flags = ["train_tokenizer.py", *WEE, "--out_dir", "", "--init_from", out, "--stage", stage, "--total_steps", 40] + ["--disc_start", 3] * (stage == 2)
    undisturbed, resumed = tmp_path / "a", tmp_path / "b"
    at = flags.index("--out_dir") + 1
    flags[at] = undisturbed
    run(*flags)
    flags[at] = resumed
    process = subprocess.Popen([sys.executable, *map(str, flags)], cwd=HERE, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               env=os.environ | dict(OMP_NUM_THREADS="1"))
    while not (resumed / f"stage{stage}.pt").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    run(*flags, "--resume")
    a, b = (vqrae.load_checkpoint(d / f"stage{stage}.pt") for d in (undisturbed, resumed))
    assert states_equal(a["model"], b["model"]) and states_equal(a["ema"], b["ema"]) and states_equal(a["discriminator"] or {}, b["discriminator"] or {})
    assert losses(undisturbed / f"log_stage{stage}.jsonl") == losses(resumed / f"log_stage{stage}.jsonl")


@slow
def test_killed_at_twenty_random_steps(trained, tmp_path):
    """VQRAE_SLOW=1 pytest -s -k killed_at_twenty: SIGKILL, resume, SIGKILL, ...; the end is that of an undisturbed run, bit for bit."""
    flags = ["train_tokenizer.py", *WEE, "--init_from", trained[0], "--stage", 2, "--disc_start", 3, "--total_steps", 400, "--save_every", 7]
    run(*flags, "--out_dir", tmp_path / "a")
    chance, log, at = torch.Generator().manual_seed(0), tmp_path / "b" / "log_stage2.jsonl", []
    for kill in range(20):
        go_on = ["--resume"] if (tmp_path / "b" / "stage2.pt").exists() else ["--overwrite"]
        before = log.stat().st_mtime if log.exists() else 0
        process = subprocess.Popen([sys.executable, *map(str, [*flags, "--out_dir", tmp_path / "b", *go_on])], cwd=HERE, stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1"))
        while process.poll() is None and not (log.exists() and log.stat().st_mtime > before):
            time.sleep(0.01)
        time.sleep(0.5 * torch.rand((), generator=chance).item())             # somewhere in the steps that follow
        assert process.poll() is None, "it ended before the kill: more steps, please"
        process.kill()
        process.wait()
        at += [json.loads(line)["step"] for line in log.read_text().splitlines() if line.endswith("}")][-1:]
    run(*flags, "--out_dir", tmp_path / "b", "--resume")
    a, b = (vqrae.load_checkpoint(tmp_path / name / "stage2.pt") for name in "ab")
    assert states_equal(a["model"], b["model"]) and states_equal(a["ema"], b["ema"]) and states_equal(a["discriminator"], b["discriminator"])
    assert losses(tmp_path / "a" / "log_stage2.jsonl") == losses(log)
    print(f"\nkilled after steps {at}: bit-identical at the end")


def test_bench_times_steps_and_saves_nothing(trained, tmp_path, capsys):
    bench = [*WEE, "--out_dir", str(tmp_path), "--init_from", str(trained[0]), "--stage", "2", "--bench", "2"]
    said = run("train_tokenizer.py", *bench)
    assert re.search(r"[\d.]+ images/s, [\d.]+ ms a step of 4; a rank: [\d.e-]+ TFLOP a step", said)
    assert run_inside("train_tokenizer.py", *bench, "--disc_start", "0", "--profile") == "no error"
    parts = capsys.readouterr().out
    assert all(f"forward of {part}" in parts for part in ("encoder", "quantizer", "decoder", "teacher", "perceptual", "discriminator"))
    assert "images/s" in run("train_tokenizer.py", *WEE, "--out_dir", tmp_path / "nothing", "--stage", "2", "--bench")       # of random weights
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("tokenizer*"))
    flops = float(re.search(r"a rank: ([\d.e-]+) TFLOP", said)[1]) * 1e12
    weights = sum(p.numel() for p in vqrae.load_tokenizer(trained[0] / "tokenizer").parameters())
    assert 0.5 < flops / (6 * weights * 4 * 16) < 4                           # 6 x weights x tokens, and then attention, losses and the search


def test_a_validation_that_was_cut_off_is_made_again_and_one_that_was_not_stays_one(trained, tmp_path, monkeypatch):
    flags, rows = [*WEE, "--out_dir", str(tmp_path), "--init_from", str(trained[0])], lambda: [json.loads(line) for line in log.read_text().splitlines()]
    log, validate, calls = tmp_path / "log_stage1.jsonl", tt.validate, []
    assert run_inside("train_tokenizer.py", *flags, "--save_every", "3") == "no error"
    whole = rows()
    def cut(*args):
        calls.append(args)
        if len(calls) == 2: raise UserError("cut off")
        return validate(*args)
    with monkeypatch.context() as patch:
        patch.setattr(tt, "validate", cut)
        assert run_inside("train_tokenizer.py", *flags, "--save_every", "3", "--overwrite") == "cut off"
    for _ in range(2):                                                        # it goes on; and once more, with no step left
        before = vqrae.load_checkpoint(tmp_path / "stage1.pt")
        assert run_inside("train_tokenizer.py", *flags, "--save_every", "3", "--resume") == "no error"
        assert [row | dict(images_per_s=0) for row in rows()] == [row | dict(images_per_s=0) for row in whole]
    assert states_equal(vqrae.load_checkpoint(tmp_path / "stage1.pt")["model"], before["model"])
    assert vqrae.load_checkpoint(tmp_path / "stage1.pt")["optimizer"]["param_groups"] == before["optimizer"]["param_groups"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_with_one_line(tmp_path, number):
    process = subprocess.Popen([sys.executable, "train_tokenizer.py", *WEE, "--stage0_steps", "100000", "--out_dir", tmp_path], cwd=HERE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    while "stage 0" not in process.stderr.readline(): assert process.poll() is None
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and said.endswith("interrupted: what was written before is whole\n") and "Traceback" not in said


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(trained, tmp_path, number, code):
    flags = ["train_tokenizer.py", *WEE, "--out_dir", tmp_path, "--init_from", trained[0], "--total_steps", 5000, "--save_every", 5000]
    process = subprocess.Popen([sys.executable, *map(str, flags)], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               env=os.environ | dict(OMP_NUM_THREADS="1"))
    log = tmp_path / "log_stage1.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.05)
    assert "another run is writing" in run_inside("train_tokenizer.py", *map(str, flags[1:]))
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code and "Go on with: python train_tokenizer.py" in said and "--resume" in said
    assert 3 <= vqrae.load_checkpoint(tmp_path / "stage1.pt")["step"] < 5000


def test_two_ranks_equal_one(trained, tmp_path):
    """A few float64 steps of stage 2, discriminator and LeCAM included; and again with gradient accumulation."""
    states = []
    for name, ranks, micro in (("one", 0, 0), ("two", 2, 0), ("accumulated", 2, 1)):
        run("train_tokenizer.py", *WEE, "--out_dir", tmp_path / name, "--init_from", trained[0], "--stage", 2, "--disc_start", 1, "--total_steps", 4,
            "--precision", "float64", "--micro_batch", micro, "--lecam_weight", 0.0 if name == "accumulated" else 0.1, ranks=ranks)
        states.append(vqrae.load_checkpoint(tmp_path / name / "stage2.pt"))
    for part in ("model", "ema", "discriminator"):
        for name, value in states[0][part].items():
            torch.testing.assert_close(value, states[1][part][name], rtol=1e-9, atol=1e-10, msg=f"{part} {name}")
    for name, value in states[0]["model"].items():                            # LeCAM compares means of a micro-batch, so it was off there
        torch.testing.assert_close(value, states[2]["model"][name], rtol=1e-3, atol=1e-5, msg=f"accumulated {name}")
    for other, rtol in ((states[1], 1e-9), (states[2], 1e-3)):
        torch.testing.assert_close(states[0]["discriminator"]["means"], other["discriminator"]["means"], rtol=rtol, atol=1e-8)
    logs = [json.loads((tmp_path / name / "log_stage2.jsonl").read_text().splitlines()[0]) for name in ("one", "two")]
    assert logs[0]["codebook_usage"] == logs[1]["codebook_usage"]


def test_two_ranks_from_nothing(tmp_path):
    run("train_tokenizer.py", *WEE, "--out_dir", tmp_path, "--precision", "float64", ranks=2)
    assert (tmp_path / "tokenizer-stage1" / "model.safetensors").exists()


def test_folder_of_images_both_baselines(folder, tmp_path):
    (folder / "a" / "bad.png").write_bytes(b"nothing")
    (tmp_path / "x/tokenizer").mkdir(parents=True)                            # a run copied here by a program that follows links
    said = run("train_tokenizer.py", *WEE, "--out_dir", tmp_path / "x", "--data", folder, "--num_workers", 2, "--quantizer", "none", "--total_steps", 12)
    assert (tmp_path / "x/tokenizer").resolve().name == "tokenizer-stage1"
    assert "skipped" in said and "bad.png" in said and "unreadable images" in said and "codebook use" not in said
    run("train_tokenizer.py", *WEE, "--out_dir", tmp_path / "y", "--data", folder, "--init_from", "none", "--stage", 2, "--distill_weight", 0)
    said = run("eval.py", tmp_path / "x/tokenizer", tmp_path / "y/tokenizer", "--data", folder, "--out_dir", tmp_path)
    assert f"| metric | {tmp_path}/x/tokenizer | {tmp_path}/y/tokenizer |" in said
    results = json.loads((tmp_path / "eval.json").read_text())
    x, y = results[f"{tmp_path}/x/tokenizer"], results[f"{tmp_path}/y/tokenizer"]
    assert x["codebook_usage"] is None and 0 < y["codebook_usage"] <= 1 and x["num_images"] == 25
    assert all(set(r["knn_top1"]) == {"teacher", "features", "tokens"} for r in (x, y)) and x["knn_top1"]["tokens"] is None is not y["knn_top1"]["tokens"]


@pytest.fixture(scope="module")
def generator(trained):
    """A generator beside that tokenizer, resumed once."""
    out, _ = trained
    flags = ["train_ar.py", "--out_dir", out, "--batch_size", 4, "--log_every", 1, "--eval_every", 3, "--save_every", 3, "--val_images", 8, "--device", "cpu"]
    run(*flags, "--total_steps", 6)
    run(*flags, "--total_steps", 9, "--resume")
    return out


def test_generator_end_to_end(generator):
    """Sample as a user does; then: one picture a seed whatever the batch, and greedy equal to transformers' generate."""
    out = generator
    rows = [json.loads(line) for line in (out / "log_ar.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10)) and math.isfinite(rows[-1]["val_loss"])
    said = run("sample.py", "--out_dir", out, "--prompt", "four stars", "--bench", "--batch_size", 3, "--device", "cpu")
    gflop = float(re.search(r"codes/s, [\d.]+ ms a step of 3; a rank: ([\d.e-]+) TFLOP a step", said)[1]) * 1e3
    weights = sum(p.numel() for p in train_ar.load_generator(out, out / "tokenizer")[0].model.layers.parameters())
    assert 1 < gflop / (2e-9 * weights * 2 * 3) < 2                           # 2 x weights x rows (guided: 2 x 3), the prompt, attention and the head
    said = run("sample.py", "--out_dir", out, *["--prompt", "a red circle left of a blue square"] * 2, "--prompt", "four stars", "--device", "cpu")
    assert "2 files in" in said                                               # each caption once
    assert Image.open(out / "samples" / "four-stars-0.png").size == (32, 32)
    assert "never learned the word" in run("sample.py", "--out_dir", out, "--prompt", "a mauve circle", fails=True)
    assert "never learned the word" in run_inside("sample.py", "--out_dir", str(out), "--prompt", "a red circle \udce9", "--device", "cpu")     # invalid bytes

    lm, text_tokenizer, tokenizer = train_ar.load_generator(out, out / "tokenizer")
    prompts, options = ["a red circle left of a blue square", "four stars", "a ring"], dict(guidance=2.0, temperature=0.8, top_k=20, top_p=0.95)
    together = sample.generate(lm, text_tokenizer, prompts, [1, 2, 3], **options)
    alone = [sample.generate(lm, text_tokenizer, [prompt], [seed], **options) for seed, prompt in enumerate(prompts, 1)]
    assert torch.equal(together, torch.cat(alone)) and together.shape == (3, 16) and 0 <= together.min() and together.max() < 24
    ids, mask = train_ar.layout(text_tokenizer, lm.config.visual, prompts)
    offset = lm.config.visual["offset"]
    want = lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False, suppress_tokens=list(range(offset)))[:, -16:] - offset
    assert torch.equal(sample.generate(lm, text_tokenizer, prompts, [0, 0, 0], temperature=0), want)
    with pytest.raises(UserError, match="never learned the word 'giraffe'"): sample.generate(lm, text_tokenizer, ["a giraffe"], [0])
    assert tokenizer.detokenize(together).shape == (3, 3, 32, 32)
    assert sample.generate(lm.bfloat16(), text_tokenizer, prompts, [1, 2, 3], **options).shape == (3, 16)             # the cache follows the type

    class Stop:
        def update(self, _):
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        sample.generate(lm, text_tokenizer, prompts, [1, 2, 3], bar=Stop())
    assert lm.config._attn_implementation == "sdpa"                           # as it was


def test_heads_that_share_keys_attend_without_copies():
    q, k, v = torch.randn(2, 6, 3, 8), *torch.randn(2, 2, 2, 9, 8)            # six heads on two, a cache of nine places
    allowed = torch.rand(2, 1, 3, 9) < 0.7
    allowed[..., 0] = True
    want = F.scaled_dot_product_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), allowed, scale=0.3)
    torch.testing.assert_close(sample.attend(None, q, k, v, allowed, 0.3)[0], want.transpose(1, 2))


@pytest.mark.parametrize("scale", [0.1, 4])                                    # flat: more than 256 codes hold the share; and peaked
@pytest.mark.parametrize("top_p", [0.3, 0.85, 1.0])
def test_draws_are_those_of_transformers_warpers(scale, top_p):
    logits, u = torch.randn(64, 1000, dtype=torch.float64) * scale, torch.rand(64, dtype=torch.float64)
    kept = TopPLogitsWarper(top_p)(None, logits / 0.9).softmax(1) if top_p < 1 else (logits / 0.9).softmax(1)
    want = (kept.cumsum(1) / kept.sum(1, keepdim=True) <= u[:, None]).sum(1)
    assert torch.equal(sample.choose(logits, u, 0.9, 0, top_p), want)
    assert torch.equal(sample.choose(logits, u, 1e-40, 0, top_p), logits.argmax(1))            # not NaN


def test_the_layout_scores_pictures_alone():
    visual = dict(boi=6, eoi=7, offset=10, tokens=16, max_length=40, codes=24)

    class Words:                                                              # a text tokenizer of letters
        def __call__(self, texts, **_):
            return type("Ids", (), dict(input_ids=[[ord(c) % 6 for c in text] for text in texts]))
    codes = torch.randint(24, (2, 16))
    ids, mask = train_ar.layout(Words(), visual, ["abc", ""], codes)
    assert ids.shape == (2, 3 + 1 + 16 + 1) and mask.tolist()[1][-3:] == [0, 0, 0] and mask[0].all()
    assert ids[0].tolist() == [1, 2, 3, 6, *(codes[0] + 10), 7] and ids[1, :18].tolist() == [6, *(codes[1] + 10), 7]
    assert [row.tolist() for row in train_ar.layout(Words(), visual, ["abc", ""])] == [[[1, 2, 3, 6], [0, 0, 0, 6]], [[1] * 4, [0, 0, 0, 1]]]
    logits = torch.randn(2, 16, 24, requires_grad=True)
    loss = train_ar.Generate.loss(None, lambda ids, mask: logits, ids, mask, codes)
    torch.testing.assert_close(loss, F.cross_entropy(logits.reshape(-1, 24), codes.flatten()))


def test_cached_logits_equal_uncached_ones_and_guidance_1_is_none(generator, monkeypatch):
    lm, text_tokenizer, _ = train_ar.load_generator(generator, generator / "tokenizer")
    prompts, seen, choose = ["a red circle left of a blue square", "four stars"], [], sample.choose
    monkeypatch.setattr(sample, "choose", lambda logits, *how: seen.append(logits) or choose(logits, *how))
    codes = sample.generate(lm, text_tokenizer, prompts, [1, 2])
    ids, mask = train_ar.layout(text_tokenizer, lm.config.visual, prompts, codes)
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(seen, 1), train_ar.PictureLM(lm)(ids, mask), rtol=0, atol=1e-4)
        alone = train_ar.PictureLM(lm)(*train_ar.layout(text_tokenizer, lm.config.visual, prompts[1:], codes[1:]))
        torch.testing.assert_close(torch.stack(seen, 1)[1:], alone, rtol=0, atol=1e-4)              # padding changes nothing
    assert torch.equal(codes, sample.generate(lm, text_tokenizer, prompts, [1, 2], guidance=1 + 1e-9))


def test_checkpointing_changes_nothing_but_memory(trained, tmp_path):
    out, _ = trained
    found = {}
    for flag in ("--checkpointing", "--no-checkpointing"):
        run("train_tokenizer.py", *WEE, "--stage", 2, "--init_from", out, "--out_dir", tmp_path / flag, "--total_steps", 3, flag)
        run("train_ar.py", "--tokenizer", out / "tokenizer", "--out_dir", tmp_path / flag, "--batch_size", 4, "--total_steps", 3, "--log_every", 1, "--val_images", 8,
            "--device", "cpu", flag)
        found[flag] = [losses(tmp_path / flag / f"log_{name}.jsonl") for name in ("stage2", "ar")]
    assert all(abs(a[step] - b[step]) < 1e-5 for a, b in zip(*found.values()) for step in (1, 2, 3))


def test_generator_on_two_ranks_equals_one(trained, tmp_path):
    out, _ = trained
    flags = ["train_ar.py", "--tokenizer", out / "tokenizer", "--batch_size", 4, "--end_lr", 4e-3, "--log_every", 1, "--val_images", 8, "--device", "cpu",
             "--precision", "float64"]
    run(*flags, "--total_steps", 4, "--out_dir", tmp_path / "one")
    run(*flags, "--total_steps", 2, "--out_dir", tmp_path / "two", ranks=2)
    run(*flags, "--total_steps", 4, "--out_dir", tmp_path / "two", "--resume", "--micro_batch", 1, ranks=2)    # each rank's moments are read back
    one, two = (losses(tmp_path / name / "log_ar.jsonl") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(abs(one[step] - two[step]) < 1e-9 for step in one)


def test_understanding_on_two_ranks_equals_one(trained, tmp_path):
    out, _ = trained
    flags = ["train_ar.py", "--task", "understand", "--tokenizer", out / "tokenizer", "--batch_size", 4, "--total_steps", 2, "--log_every", 1, "--val_images", 8,
             "--device", "cpu", "--precision", "float64"]
    run(*flags, "--out_dir", tmp_path / "one", "--micro_batch", 2)            # the mean over answers' tokens is taken by micro-batch
    run(*flags, "--out_dir", tmp_path / "two", ranks=2)
    for name in ("log_pretrain.jsonl", "log_sft.jsonl"):
        one, two = (losses(tmp_path / n / name) for n in ("one", "two"))
        assert one.keys() == two.keys() == {1, 2} and all(abs(one[step] - two[step]) < 1e-9 for step in one)


def test_codes_of_a_folder_are_cached_and_refused_when_they_should_be(trained, folder, tmp_path):
    out, _ = trained
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    caption = data / "b" / "01.txt"
    caption.write_text("one\n")
    flags = ["--data", str(data), "--batch_size", "4", "--total_steps", "2", "--val_images", "2", "--device", "cpu", "--out_dir", str(tmp_path / "run"), "--max_length", "64"]
    stage1, stage2 = (["--tokenizer", str(out / f"tokenizer-stage{stage}")] for stage in (1, 2))
    assert run_inside("train_ar.py", *flags, *stage2) == "no error"
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("codes-*.npy")}
    assert run_inside("train_ar.py", *flags, *stage2, "--overwrite") == "no error"
    assert len(made) == 2 and all(path.stat().st_mtime_ns == at for path, at in made.items())         # found, not made again
    assert "another tokenizer" in run_inside("train_ar.py", *flags, *stage1, "--overwrite")
    stat = caption.stat()
    caption.write_text("two\n")                                               # of the same length, and still noticed
    assert "other images" in run_inside("train_ar.py", *flags, *stage2, "--overwrite")
    caption.write_text("one\n")
    os.utime(caption, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run_inside("train_ar.py", *flags, *stage2, "--overwrite") == "no error"
    assert "is of another tokenizer: pass it" in run_inside("train_ar.py", *flags, *stage1, "--resume")
    assert all(path.stat().st_mtime_ns == at for path, at in made.items())    # hours of codes are not lost to a command that is refused
    next(data.rglob("*.png")).unlink()
    assert "other images" in run_inside("train_ar.py", *flags, *stage2, "--overwrite")
    for path in made: path.unlink()                                           # what the message advises
    assert run_inside("train_ar.py", *flags, *stage1, "--overwrite") == "no error"
    caption.write_text("one " * 60)
    flags[-3] = str(tmp_path / "long")
    said = run("train_ar.py", *flags, *stage2, "--total_steps", "8")
    assert "captions are cut after 46 tokens" in said
    prompt = shlex.split(re.search("Next: python (.*)", said)[1])
    assert "error" not in run(*prompt, "--device", "cpu")
    flags[1], flags[-3] = str(tmp_path / "0.tar"), str(tmp_path / "run of shards")
    for caption in (b"one", b"two"):                                          # a shard of the same size and other content
        with tarfile.open(flags[1], "w") as tar:
            for i in range(24):
                for name, content in ((f"{i}.jpg", (folder / "a" / "00.png").read_bytes()), (f"{i}.txt", caption)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        os.utime(flags[1], (1e9, 1e9 + (caption == b"two")))
        assert ("no error" if caption == b"one" else "other images") in run_inside("train_ar.py", *flags, *stage2, "--overwrite")
    shutil.rmtree(data / "a"), shutil.rmtree(data / "b")
    Image.new("RGB", (9, 9)).save(data / "bare.png"), Image.new("RGB", (9, 9)).save(data / "bald.png")
    flags[1], flags[-3] = str(data), str(tmp_path / "bare")
    assert "has caption or class" in run_inside("train_ar.py", *flags, *stage2) and not [*(tmp_path / "bare").glob("codes*")]


def test_tokenizing_goes_on_where_it_was_killed(trained, tmp_path, monkeypatch):
    (tmp_path / "data" / "a cat").mkdir(parents=True)
    for i in range(160):
        Image.new("RGB", (8, 8), (i, 255 - i, 0)).save(tmp_path / "data" / "a cat" / f"{i:03d}.png")
    seen, tokenize = [], VQRAE.tokenize

    def counts(model, images):
        if seen == [8, 64] and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise OSError("killed")
        seen.append(len(images))
        return tokenize(model, images)
    monkeypatch.setattr(VQRAE, "tokenize", counts)
    flags = ["--data", str(tmp_path / "data"), "--batch_size", "4", "--total_steps", "1", "--val_images", "2", "--device", "cpu",
             "--tokenizer", str(trained[0] / "tokenizer"), "--out_dir"]
    with files_of_at_most(10_000): assert "free some space" in run_inside("train_ar.py", *flags, str(tmp_path / "one"))
    assert seen == [8] and not [*(tmp_path / "one").glob("codes-train*")]     # those of validation are few
    assert run_inside("train_ar.py", *flags, str(tmp_path / "one")) == "killed"
    assert run_inside("train_ar.py", *flags, str(tmp_path / "one")) == "no error" and seen == [8, 64, 64, 24]
    assert run_inside("train_ar.py", *flags, str(tmp_path / "two")) == "no error" and sum(seen[4:]) == 160
    one, two = (next((tmp_path / run).glob("codes-train-*.npy")).read_bytes() for run in ("one", "two"))
    assert one == two and not [*(tmp_path / "one").glob("*.partial")]


def test_generated_pictures_are_scored(generator, tmp_path):
    out = tmp_path / "run"
    said = run("train_tokenizer.py", *WEE[4:], "--dim", 32, "--encoder_kwargs", WEE[5], "--stage0_steps", 2, "--out_dir", out, "--total_steps", 2)
    assert "tokenizer" in said
    run("train_ar.py", "--out_dir", out, "--batch_size", 4, "--total_steps", 2, "--val_images", 8, "--device", "cpu")
    for which, kept in (("another", False), (train_ar.weights_hash(out / "tokenizer"), True)):       # of the same tokenizer side by side, of others never
        (out / "eval.json").write_text(json.dumps(dict(psnr=1.0, tokenizer=which)))
        said = run("eval.py", "--generation", "--num_images", 24, "--out_dir", out) if kept else run_inside(
            "eval.py", "--generation", "--num_images", "24", "--out_dir", str(out), "--device", "cpu")
        found = json.loads((out / "eval.json").read_text())
        assert found.get("psnr") == (1.0 if kept else None)
        assert json.loads((out / "eval.old.json").read_text()) == dict(psnr=1.0, tokenizer=which)
    (out / "eval.json").rename(out / "kept.json")
    (out / "eval.json").write_text("[]")                                      # none of ours
    assert run_inside("eval.py", "--num_images", "8", "--out_dir", str(out), "--device", "cpu") == "no error"
    (out / "kept.json").replace(out / "eval.json")
    assert run_inside("eval.py", str(out / "tokenizer"), str(out / "tokenizer-stage1"), "--num_images", "8", "--out_dir", str(out), "--device", "cpu") == "no error"
    for both in json.loads((out / "eval.json").read_text()).values():         # the generator's scores stay
        assert both["psnr"] != 1 and both["geneval"] == found["geneval"]
    assert "| geneval overall |" in said and Image.open(out / "geneval.png").size[1] > 6 * 64
    for key in ("geneval", "geneval_ceiling"):
        assert set(found[key]) == {*tt.TASKS[:6], "overall", "held_out_pairs"} and 0 <= found[key]["overall"] <= 1
    assert "of 64 px" in run("eval.py", "--generation", "--out_dir", generator, fails=True)


def test_chat_puts_features_where_image_stood_and_scores_answers_alone():
    words = train_ar.word_tokenizer(["USER: ASSISTANT: how many rings are there? two is it red? no"])
    chat = lambda plain, *turns: tuple(train_ar.chat(words, 3, 30, plain, turns).values())
    chats = [chat(False, ("<image>\nhow many rings are there?", "two"), ("is it red?", "no")), chat(True, ("<image>", "two rings"), ("is it red?", "no")),
             chat(False, ("is it <image> red?", None))]
    spell = lambda ids: " ".join("z" if i == train_ar.IMAGE else words.convert_ids_to_tokens(i) for i in ids)
    assert spell(chats[0][0]) == "user : z z z how many rings are there ? assistant : two </s> user : is it red ? assistant : no </s>"
    assert [spell([i for i, s in zip(*c) if s]) for c in chats] == ["two </s> no </s>", "two rings </s>", ""]
    assert spell(chats[1][0]) == "z z z two rings </s>" and spell(chats[2][0]) == "user : is it z z z red ? assistant :"
    ids, scored = (train_ar.pad(rows, "right") for rows in zip(*chats))
    lm, _ = train_ar.build_lm(train_ar.ARConfig(**train_ar.PRESETS["config tiny"]), ["USER: ASSISTANT: how many rings are there? two is it red? no"])
    net, Z_I = train_ar.MLLM(lm, 8), torch.randn(3, 3, 8)
    x = net.embed(ids, Z_I)
    for b in range(3):
        torch.testing.assert_close(x[b, ids[b] == train_ar.IMAGE], net.connector(Z_I)[b])
    logits = net(ids, scored, Z_I)
    assert logits.shape == (4 + 3, len(words))
    alone = net(torch.tensor([chats[1][0]]), torch.tensor([chats[1][1]]), Z_I[1:2])
    torch.testing.assert_close(logits[4:], alone, rtol=0, atol=1e-4)          # padding changes nothing
    Z_I.requires_grad_(True)
    net(ids, scored, Z_I)[:2].sum().backward()                                # the first answer sees its own features only
    assert Z_I.grad[0].abs().sum() > 0 and Z_I.grad[1:].abs().sum() == 0


@torch.no_grad()
def test_a_code_means_the_mean_feature_of_its_patches():
    model = VQRAE(replace(SMALL, codebook_size=300)).eval()
    Z_I = model.encode(vqrae.resize(tt.render(tt.plan(torch.arange(70))), 32))
    indices, meanings = model.quantizer(model.to_code(Z_I))[1], evaluation.code_meanings(model, "cpu", 70)
    for code in indices.unique():
        torch.testing.assert_close(meanings[code], Z_I[indices == code].mean(0), rtol=1e-4, atol=1e-5)


def test_answers_in_a_batch_equal_answers_alone():
    """Also where id 0, with which others would fill a row that ends early, is a word."""
    model = train_ar.tokenizers.Tokenizer(train_ar.tokenizers.models.WordLevel({word: i for i, word in enumerate("red </s> <unk> USER ASSISTANT is it".split())}, "<unk>"))
    model.pre_tokenizer = train_ar.tokenizers.pre_tokenizers.Whitespace()
    words = train_ar.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="</s>")
    lm, _ = train_ar.build_lm(train_ar.ARConfig(**train_ar.PRESETS["config tiny"]), ["one two three"])
    lm.resize_token_embeddings(len(words))
    torch.nn.init.normal_(lm.get_output_embeddings().weight)
    mllm, Z_I, lm.config.understand = train_ar.MLLM(lm, 8), torch.randn(12, 3, 8) * 9, dict(max_length=30)
    together = sample.answer(mllm, words, Z_I, ["is it"] * 12, 8)
    assert together == [sample.answer(mllm, words, z[None], ["is it"], 8)[0] for z in Z_I]
    assert len({len(text.split()) for text in together}) > 2
    with pytest.raises(UserError, match="never learned the word 'blue'"): sample.answer(mllm, words, Z_I[:1], ["is it blue"])


def test_understanding_end_to_end(trained, tmp_path):
    """Both phases as a user runs them; what is frozen stays bit for bit; questions, scores and bad inputs."""
    out, _ = trained
    flags = ["train_ar.py", "--task", "understand", "--out_dir", out, "--batch_size", 4, "--log_every", 1, "--val_images", 8, "--device", "cpu"]
    said = run(*flags, "--total_steps", 3)
    assert re.search("Next: python eval.py .*--vqa", said) and losses(out / "log_pretrain.jsonl").keys() == losses(out / "log_sft.jsonl").keys() == {1, 2, 3}
    config, _, _ = vqrae.parse_config(train_ar.ARConfig, train_ar.PRESETS, argv=[*map(str, flags[1:]), "--phase", "pretrain"])
    task = train_ar.Understand(config, vqrae.Ranks("cpu"), out / "mllm", None)
    fresh, states = task.net.state_dict(), [vqrae.load_checkpoint(out / "mllm" / f"{phase}.pt")["model"] for phase in ("pretrain", "sft")]
    moved = [{name.split(".")[0] for name in state if not torch.equal(state[name], before[name])} for before, state in ((fresh, states[0]), states)]
    assert moved == [{"connector"}, {"connector", "lm"}]
    assert all(not p.requires_grad for p in task.encoder.parameters())
    assert "nowhere is not a tokenizer folder" in run_inside(*map(str, flags), "--overwrite", "--tokenizer", "nowhere")
    assert (out / "mllm/sft.pt").exists()                                     # nothing is lost by a mistake
    run(*flags, "--total_steps", 5, "--resume")                               # SFT goes on, pretraining is over
    assert losses(out / "log_sft.jsonl").keys() == {1, 2, 3, 4, 5} and losses(out / "log_pretrain.jsonl").keys() == {1, 2, 3}

    file = tmp_path / "picture.png"
    Image.new("RGB", (50, 40), "red").save(file)
    assert "how many rings are there?" in run("sample.py", "--out_dir", out, "--image", file, "--ask", "how many rings are there?", "--device", "cpu")
    for argv, message in [(["--image", str(out / "stage1.pt"), "--ask", "how many rings are there?"], "cannot be read as an image"),
                          (["--image", str(file), "--ask", "how many zebras are there?"], "never learned the word 'zebras'"), (["--image", str(file)], "nothing to do"),
                          (["--geneval", os.devnull], "no caption in"), (["--dpg", str(tmp_path)], "no caption in"), (["--prompts", os.devnull], "no caption in")]:
        assert message in run_inside("sample.py", "--out_dir", str(out), "--device", "cpu", *argv)
    run("eval.py", out / "tokenizer-stage1", out / "tokenizer", "--vqa", "--num_images", 16, "--out_dir", out)
    found = json.loads((out / "vqa.json").read_text())
    from safetensors.torch import load_file, save_file
    other = shutil.copytree(out / "tokenizer-stage1", tmp_path / "other")     # with a teacher that is not the one the MLLM learned from
    state = load_file(other / "teacher.safetensors")
    save_file({name: value * 1.01 for name, value in state.items()}, other / "teacher.safetensors")
    assert "reads another VFM" in run_inside("eval.py", str(other), "--vqa", "--num_images", "16", "--out_dir", str(out), "--device", "cpu")
    assert "reads another VFM" in run_inside("eval.py", str(out / "tokenizer"), str(other), "--vqa", "--num_images", "512", "--out_dir", str(out), "--device", "cpu")
    assert "another VFM" in run_inside("train_ar.py", *map(str, flags[1:]), "--overwrite", "--phase", "sft", "--tokenizer", str(other))
    for source in ("gone.safetensors", "random"):                             # never another VFM in silence
        with pytest.raises(UserError, match=f"no file {source}"):
            train_ar.load_teacher(tmp_path, replace(SMALL, encoder_weights=source))
    begun = ["--out_dir", str(tmp_path / "from file"), "--encoder_weights", str(tmp_path / "vfm.pt"), "--total_steps", "2"]
    shutil.copy(out / "stage0.pt", tmp_path / "vfm.pt")
    assert run_inside("train_tokenizer.py", *WEE, *begun) == "no error"       # of a VFM from a file, which then may go
    (tmp_path / "vfm.pt").unlink()
    run("sample.py", "--out_dir", out, "--tokenizer", tmp_path / "from file/tokenizer", "--image", file, "--ask", "how many rings are there?", "--device", "cpu")
    stage1, stage2 = found.values()
    assert stage1["vqa_teacher"] == stage2["vqa_teacher"] == stage1["vqa_features"]                 # stage 1's encoder is the teacher
    assert set(stage2["vqa_tokens"]) == {"presence", "counting", "color", "position", "overall"} and set(stage2["pope_features"]) == {"accuracy", "precision", "recall", "f1"}

    row = dict(image="picture.png", conversations=[{"from": "human", "value": "<image>\nis it red?"}, {"from": "gpt", "value": "yes"}])
    flags = [*map(str, flags[1:]), "--data", str(tmp_path / "data.json"), "--total_steps", "2", "--overwrite"]
    for rows, message in [([row] * 30 + [dict(conversations=[])], "no error"), ([dict(row, image="none.png")] * 30, "no file"), ("{", "not LLaVA's JSON"),
                          ([dict(row, conversations=row["conversations"][:1])] * 30, "not LLaVA's JSON"),
                          ([row] * 20 + [dict(row, conversations=[{"value": None}, {"value": "yes"}])], "conversation 20 (from 0): not LLaVA's JSON"),
                          ([dict(row, conversations=row["conversations"][::-1])] * 30, "do not take turns"),
                          ([dict(row, conversations=[{"value": "is it?"}, {"value": "yes"}])] * 30, "exactly once"), ([row], "too few to hold")]:
        (tmp_path / "data.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
        assert message in run_inside("train_ar.py", *flags)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "data.json").write_text(json.dumps([row] * 10 + [dict(row, image="bad.png")]))
    said = run("train_ar.py", *flags)
    assert "bad.png" in said and re.search(r"Next: python sample.py .*--image .*picture.png --ask 'is it red\?'", said)
    long = dict(row, conversations=[{"from": "human", "value": "<image>\n" + "is it red " * 99}, row["conversations"][1]])
    (tmp_path / "data.json").write_text(json.dumps([row] * 10 + [long] * 11))
    said = run("train_ar.py", *flags, "--max_length", "64", "--micro_batch", "1")         # alone in its micro-batch, it gives way to the next
    assert "do not fit into --max_length 64" in said
    (tmp_path / "data.json").write_text(json.dumps([long] * 30))
    assert "do not fit into --max_length 64" in run_inside("train_ar.py", *flags, "--max_length", "64")
    kept = lambda: {path: path.read_bytes() for pattern in ("mllm/*.pt", "log_*") for path in out.glob(pattern)}
    before = kept()
    file.write_bytes(b"no picture")
    (tmp_path / "data.json").write_text(json.dumps([row] * 30))
    assert "no readable image" in run_inside("train_ar.py", *flags) and before == kept()         # though the flags have --overwrite


def test_eval_writes_the_fixed_keys_and_two_ranks_agree(trained):
    out, _ = trained
    results = []
    for ranks in (0, 2):
        run("eval.py", "--out_dir", out, "--num_images", 70, "--device", "cpu", ranks=ranks)
        results.append(json.loads((out / "eval.json").read_text()))
    one, two = results
    assert {"psnr", "ssim", "ssim_dr2", "lpips", "rfid", "fd_vfm", "codebook_usage", "codebook_perplexity", "token_entropy_bits", "num_images", "protocol",
            "cosine_to_teacher", "knn_top1", "probe_top1", "objects_right"} <= one.keys()
    assert one["num_images"] == 70 and one["objects_right_originals"] > 0.99
    assert all((one[name] is None) == (name in one["reasons"]) for name in ("lpips", "rfid"))
    for key, value in one.items():
        if isinstance(value, float) and key != "seconds":
            assert two[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_the_distance_in_the_vfms_features_is_taken_at_its_own_size(trained, tmp_path):
    found = []
    for size in ("0", "16"):
        assert run_inside("eval.py", str(trained[0] / "tokenizer"), "--num_images", "16", "--size", size, "--out_dir", str(tmp_path), "--device", "cpu") == "no error"
        found.append(json.loads((tmp_path / "eval.json").read_text()))
    assert found[0]["fd_vfm"] == found[1]["fd_vfm"] and found[0]["psnr"] != found[1]["psnr"]


def test_bad_input_gets_one_line_and_harms_nothing(trained, folder, tmp_path):
    out, _ = trained
    kept = lambda: {path.name: path.read_bytes() for pattern in ("*.pt", "*.jsonl") for path in out.glob(pattern)}
    before = kept()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "evil").mkdir()
    (tmp_path / "bad").mkdir()
    for name in "abc":
        (tmp_path / "bad" / f"{name}.png").write_bytes(b"x")

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harm",)
    torch.save(Bomb(), tmp_path / "evil" / "stage1.pt")
    torch.save({"encoder.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}, tmp_path / "half.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    stage2, new = ["--stage", "2"], ["--out_dir", str(tmp_path / "new")]
    for flags, message in [
            (new + stage2, "run `python train_tokenizer.py"), (new + ["--resume"], "nothing to resume"), (["--out_dir", str(out)], "--overwrite"),
            (new + ["--init_from", str(out)] + stage2 + ["--codebook_size", "20"], "codebook_size is 24 there, 20 here"),
            (new + ["--init_from", str(tmp_path / "evil")] + stage2, "not loaded"), (["--out_dir", str(tmp_path / "file" / "x")], "Not a directory"),
            (new + ["--init_from", str(tmp_path / "none")], "names a run that has one"), (new + ["--data", str(tmp_path / "none")], "no such folder"), (new + ["--data", ""], "no such folder"), (new + ["--disc_lr", "-1"], "at least 0"), (new + ["--q", "1"], "pictures of 4 pixels are too small"),
            (["--out_dir", str(out), "--overwrite", "--val_data", str(tmp_path / "bad")], "no readable image"), (["--out_dir", str(out), "--overwrite", "--data", str(tmp_path / "bad"), "--val_data", "shapes"], "no readable image"),
            (new + ["--data", str(tmp_path / "empty")], "no images in it"),
            (new + ["--batch_size", "6", "--micro_batch", "4"], "multiple of 1 ranks times --micro_batch 4"), (new + ["--ema_decay", "nan"], "at least 0"),
            (new + ["--encoder_weights", str(tmp_path / "half.pt")], "does not fit the encoder"), (new + ["--encoder_weights", str(tmp_path / "list.pt")], "cannot be read"), (new + ["--perceptual", "lpips", "--lpips_weights", "none.pt"], "no file none.pt"),
            (new + ["--encoder", "no_such_vit"], "timm cannot build no_such_vit"), (new + ["--device", "cuda:9"], "--device cuda:9"),
            (new + ["--clip", "0"], "--clip is at least"), (new + ["--data", str(tmp_path / "x-{5..2}.tar")], "no readable shard"),
            (new + ["--encoder_weights", "none.pt"], "no file none.pt"), (new + ["--stage", "0", "--encoder_weights", "random"], "stage 0 is for")]:
        said = run_inside("train_tokenizer.py", *WEE, *flags)
        assert message in said and "\n" not in said, said
    said = run("train_tokenizer.py", *WEE, *new, *stage2, fails=True)         # and once for real
    assert said.strip().splitlines()[-1].startswith("error: stage 2 starts from") and "Traceback" not in said
    for flags, message in [([str(tmp_path)], "is not a tokenizer folder"), (["--data", "nowhere", str(out / "tokenizer")], "no such folder"),
                           (["--size", "5"], "at least 7"), (["--vqa", "--generation"], "only one"), (["--num_workers", "-1"], "--num_workers is at least 0"), (["--vqa", "--data", "nowhere"], "only one"),
                           (["--num_images", "2", str(out / "tokenizer")], "no error")]:
        assert message in run_inside("eval.py", *flags, "--out_dir", str(tmp_path))
    llama = train_ar.AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    llama.save_pretrained(tmp_path / "llama")
    train_ar.word_tokenizer(["a word"]).save_pretrained(tmp_path / "llama")
    for flags, message in [(["--lm", "./nowhere"], "neither a folder nor a name"), (["--lm_config", "5"], "JSON of Qwen3Config's values, not 5"), (["--lm_config", "{'a': 5}"], "invalid JSON value"),
                           (["--lm_config", '{"hidden_sise": 8}'], "it has no hidden_sise"),
                           (["--lm_config", '{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 2, "head_dim": 8}'], "--lm random needs"), (["--lm_config", '{"hidden_size": "x"}'], "not {'hidden_size': 'x'}"),
                           (["--lm", str(tmp_path / "llama")], "is no Qwen3"), (["--eps", "-1"], "--eps is at least 0")]:
        said = run_inside("train_ar.py", *flags, *new, "--tokenizer", str(out / "tokenizer"))
        assert message in said and "\n" not in said, said
    assert before == kept() and not (tmp_path / "harm").exists()


def run_inside(script, *argv):
    """A script's main() in this process, for speed -> the one line it ends with."""
    module = {"train_tokenizer.py": tt, "train_ar.py": train_ar, "sample.py": sample, "eval.py": evaluation}[script]
    arguments, sys.argv = sys.argv, [script, *argv]
    try:
        module.main()
    except (UserError, OSError) as error:
        return str(error)
    finally:
        sys.argv = arguments
        signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.collect()                                                          # the end of a process would unlock the run's folder
    return "no error"


def test_a_nan_stops_the_run_with_its_term_named(trained, tmp_path, monkeypatch):
    nan, quantize = torch.tensor(math.nan, requires_grad=True), SimVQ.forward
    for name, target in (("l2", (Decoder, "forward", lambda decoder, z: z.sum() * nan * torch.ones(len(z), 3, 32, 32))),
                         ("quant", (SimVQ, "forward", lambda *a: (*quantize(*a)[:2], nan * 1))),
                         ("perceptual", (tt.PerceptualLoss, "forward", lambda *_: nan * 1)), ("distill", (tt, "distill_loss", lambda a, b: a.sum() * math.inf)),
                         ("adversarial", (Discriminator, "forward", lambda d, x: d.head[0].weight.sum() * nan * x[:, :1])),
                         ("discriminator", (tt, "hinge_d_loss", lambda a, b: a.sum() * nan)), ("lecam", (tt, "lecam", lambda a, *_: a * nan))):
        with monkeypatch.context() as patch:
            patch.setattr(*target)
            said = run_inside("train_tokenizer.py", *WEE, "--out_dir", str(tmp_path / name), "--init_from", str(trained[0]), "--stage", "2", "--disc_start", "0")
        assert said.startswith(f"{name} is ") and "step 0 (images 0 to 3)" in said, said
        assert not (tmp_path / name / "stage2.pt").exists()


def test_a_rank_that_fails_ends_all_with_one_message(trained, tmp_path):
    code = ("import sys, train_tokenizer as t, vqrae; ours = t.lr_factor\n"
            "def fails(step, *a):\n    if step == 2 and vqrae.os.environ['RANK'] == '1': raise vqrae.UserError('the GPU melted')\n    return ours(step, *a)\n"
            "t.lr_factor = fails; vqrae.command_line(t.main)")
    (tmp_path / "breaks.py").write_text(code)
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "breaks.py", *WEE, "--init_from", trained[0], "--out_dir", tmp_path]
    done = subprocess.run([*map(str, argv)], cwd=HERE, text=True, capture_output=True, timeout=120, env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HERE)))
    assert done.returncode and "error: the GPU melted" in done.stderr and "error: another rank failed" in done.stderr
    assert "train_tokenizer.py\", line" not in done.stderr                   # no traceback of ours


@contextlib.contextmanager
def files_of_at_most(size):
    """A full disk, nearly: what writes more bytes to a file fails."""
    if sys.platform != "linux": pytest.skip("limits a file's size as Linux does")
    import resource
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_tokenizer_is_written_or_said_not_to_be_and_read_whole_or_not(small, tmp_path):
    with files_of_at_most(10_000), pytest.raises(UserError, match="cannot write"): vqrae.save_tokenizer(small, tmp_path / "tokenizer")
    vqrae.save_tokenizer(small, tmp_path / "tokenizer")
    torch.testing.assert_close(VQRAE.from_pretrained(str(tmp_path / "tokenizer")).state_dict(), small.state_dict())
    state = vqrae.load_file(tmp_path / "tokenizer" / "model.safetensors")
    del state["quantizer.codebook"]
    vqrae.save_file(state, tmp_path / "tokenizer" / "model.safetensors")
    with pytest.raises(Exception, match="codebook"): VQRAE.from_pretrained(str(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match="holds no config.json"): VQRAE.from_pretrained(str(tmp_path))


def test_a_resumed_run_takes_the_new_rates(trained, tmp_path, monkeypatch, capsys):
    flags = [*WEE, "--out_dir", str(tmp_path), "--init_from", str(trained[0]), "--stage", "2"]
    assert run_inside("train_tokenizer.py", *flags) == "no error"
    assert run_inside("train_tokenizer.py", *flags, "--resume", "--total_steps", "8", "--lr", "0.004", "--end_lr", "0.004", "--warmup_steps", "1") == "no error"
    assert "other flags: --total_steps 8 (was 6), --lr 0.004 (was 0.002), --end_lr 0.004 (was 0.0001), --warmup_steps 1 (was " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "log_stage2.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows if "lr" in row and row["step"] > 6] == [0.004, 0.004]
    groups = vqrae.load_checkpoint(tmp_path / "stage2.pt")["optimizer"]["param_groups"]
    assert sorted({group["lr"] for group in groups}) == [4e-5, 1e-3, 4e-3]    # discriminator, encoder and the rest
    for more, message in ((["--total_steps", "4"], "is at step 8, beyond --total_steps 4"), (["--encoder_lr", "0"], "go on with that")):
        assert message in run_inside("train_tokenizer.py", *flags, "--resume", "--total_steps", "9", *more)
    monkeypatch.setattr(tt, "distill_loss", lambda a, b: a.sum() * math.inf)  # a run that starts over leaves nothing of the old one to resume
    assert "distill is" in run_inside("train_tokenizer.py", *flags, "--overwrite")
    assert "nothing to resume" in run_inside("train_tokenizer.py", *flags, "--resume")


def test_a_bug_ends_the_run_though_workers_live(trained, folder, tmp_path):
    """Its traceback is printed and the process gone: the loader's workers, which ignore signals, would be waited for without end."""
    code = ("import sys, torch, vqrae, train_tokenizer\ndef fail(*_, **__): raise RuntimeError('cuDNN is unhappy')\n"
            "torch.optim.AdamW.step = fail; sys.argv[0] = 'train_tokenizer.py'; vqrae.command_line(train_tokenizer.main)")
    flags = [*WEE, "--out_dir", str(tmp_path / "run"), "--init_from", str(trained[0]), "--data", str(folder), "--num_workers", "2"]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=HERE, capture_output=True, text=True, timeout=100, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 1 and "Traceback" in done.stderr and "cuDNN is unhappy" in done.stderr


def test_scores_are_kept_though_nobody_reads_the_output(trained, tmp_path):
    process = subprocess.Popen([sys.executable, "eval.py", str(trained[0] / "tokenizer"), "--num_images", "8", "--out_dir", str(tmp_path), "--device", "cpu"],
                               cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1"))
    for line in process.stdout:                                               # as `| head`, gone once the settings are told
        if b"top_p" in line: break
    process.stdout.close()
    process.wait(100)
    assert json.loads((tmp_path / "eval.json").read_text())["num_images"] == 8


def test_unusual_surroundings(trained, tmp_path, monkeypatch):
    """A file system without links; a cluster's own launcher, which tells less than torchrun."""
    def refuse(*_): raise OSError(95, "Operation not supported")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "symlink_to", refuse)
        assert run_inside("train_tokenizer.py", *WEE, "--out_dir", str(tmp_path), "--init_from", str(trained[0])) == "no error"
    assert not (tmp_path / "tokenizer").is_symlink() and vqrae.load_tokenizer(tmp_path / "tokenizer").config.dim == 32
    config = resolved("--config", "tiny")[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert vqrae.Ranks("cpu").size == 1
    monkeypatch.setenv("RANK", "0")
    assert vqrae.next_command("train_tokenizer.py", config, resume=True).startswith("python ")


def test_stage_2_wants_the_stage_1_that_it_began_from_with_its_encoder_frozen(trained, tmp_path):
    new = [*WEE, "--out_dir", str(tmp_path), "--init_from", str(trained[0])]
    assert run_inside("train_tokenizer.py", *new) == "no error"
    stage2 = [*WEE, "--out_dir", str(tmp_path), "--stage", "2"]
    assert run_inside("train_tokenizer.py", *stage2) == "no error"
    assert run_inside("train_tokenizer.py", *new, "--resume") == "no error"   # finished long ago:
    assert (tmp_path / "tokenizer").resolve().name == "tokenizer-stage2"      # not the newest
    assert run_inside("train_tokenizer.py", *new, "--overwrite", "--seed", "1") == "no error"
    assert (tmp_path / "tokenizer").resolve().name == "tokenizer-stage1"
    assert run_inside("train_tokenizer.py", *stage2, "--resume", "--total_steps", "8") == "no error"        # of the same VFM: all else is in stage2.pt
    assert "does not fit these flags" in run_inside("train_tokenizer.py", *stage2, "--resume", "--total_steps", "9", "--disc_width", "8")
    assert run_inside("train_tokenizer.py", *new, "--overwrite", "--encoder_lr", "0.01") == "no error"
    assert "moved its encoder" in run_inside("train_tokenizer.py", *stage2, "--overwrite")
    shutil.copytree(tmp_path / "tokenizer-stage2", tmp_path / "tokenizer-stage2-8")
    for argv in (["--stage", "0", "--seed", "9"], ["--overwrite"]):           # another VFM, and a stage 1 of it
        assert run_inside("train_tokenizer.py", *WEE, "--out_dir", str(tmp_path), *argv) == "no error"
    assert run_inside("train_tokenizer.py", *stage2, "--resume", "--total_steps", "9") == "no error"            # its own is in stage2.pt
    assert states_equal(*(vqrae.load_file(tmp_path / f"tokenizer-stage2{old}" / "teacher.safetensors") for old in ("", "-8")))


def test_larger_output_learns_from_larger_pictures(trained, tmp_path):
    """q > patch_size: files are read at the output's size, so training's validation scores what eval.py does; the encoder sees them small."""
    (tmp_path / "fine").mkdir()
    for i in range(40):                                                       # stripes that 32 px cannot hold
        stripes = torch.arange(64).add(i % 2).remainder(2).float().expand(3, 64, 64)
        tt.save_image(0.2 + 0.6 * (stripes if i % 3 else stripes.mT), tmp_path / "fine" / f"{i}.png")
    argv = ["--q", "16", "--data", str(tmp_path / "fine"), "--out_dir", str(tmp_path / "run"), "--init_from", str(trained[0])]
    assert run_inside("train_tokenizer.py", *WEE, *argv) == "no error"
    assert run_inside("eval.py", "--data", str(tmp_path / "fine"), "--part", "val", "--out_dir", str(tmp_path / "run"), "--device", "cpu") == "no error"
    logged = [row["val_psnr"] for row in vqrae.read_log(tmp_path / "run/log_stage1.jsonl") if "val_psnr" in row]
    scores = json.loads((tmp_path / "run/eval.json").read_text())
    assert scores["psnr"] == pytest.approx(logged[-1], abs=1e-3) and scores["psnr"] < 13                 # against 32 px it would be above 20


def test_other_weights_that_learn_are_not_resumed(trained, tmp_path, monkeypatch):
    """A fork that freezes a block and resumes without: moments must not reach other weights."""
    def freeze(model, *rest): model.decoder.vit.blocks[0].requires_grad_(False); yield from groups(model, *rest)
    groups, argv = tt.parameter_groups, [*WEE, "--out_dir", str(tmp_path), "--init_from", str(trained[0])]
    assert run_inside("train_tokenizer.py", *argv) == "no error"
    monkeypatch.setattr(tt, "parameter_groups", freeze)
    assert "does not fit these flags" in run_inside("train_tokenizer.py", *argv, "--resume", "--total_steps", "9")


def test_a_collapsed_codebook_is_called_out(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tt, "start_bottleneck", lambda model, *_: model.quantizer.codebook.mul_(0).add_(9).__setitem__(0, 0.0))
    run_inside("train_tokenizer.py", *WEE, "--out_dir", str(tmp_path), "--init_from", str(trained[0]), "--warmup_steps", "2")
    assert "of the codes are in use. Try more --warmup_steps or" in capsys.readouterr().out
