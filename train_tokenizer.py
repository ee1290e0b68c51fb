"""
Train the VQRAE tokenizer: the paper's two stages, and before them a stage 0 for the tiny config alone.

    python train_tokenizer.py                       tiny: pretrain a small VFM on drawn shapes, then stage 1. CPU, no download
    python train_tokenizer.py --stage 2             everything, with self-distillation
    torchrun --nproc_per_node=8 train_tokenizer.py --config siglip2_256 --data 'FOLDER or shards-{000..127}.tar'
    ... --resume                                    go on after a stop (bit for bit on a CPU)
    ... --stage 2 --init_from none --distill_weight 0                     Table 6, first row
    ... --quantizer none                            the RAE baseline; every field of the model is a flag

    stage 0   a stand-in for SigLIP2: the tiny encoder learns captions and objects      -> stage0.pt
    stage 1   encoder frozen; codebook and decoder learn to reconstruct       (eq. 4)   -> stage1.pt, tokenizer-stage1/
    stage 2   encoder too, held to its old features by distillation           (eq. 6)   -> stage2.pt, tokenizer-stage2/

In reading order: the configuration on one screen, data, stage 0, stages 1 and 2; last the shapes world.
"""
import contextlib, copy, io, itertools, json, math, os, re, shlex, signal, sys, tarfile, time, zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from vqrae import (MODELS, VQRAE, Discriminator, Encoder, Log, PerceptualLoss, Ranks, UserError, VQRAEConfig, check_finite, command_line, explained,
                   distill_loss, full, hinge_d_loss, lecam, load_checkpoint, load_encoder_weights, open_run, parse_config,
                   print_config, psnr, resume_command, save_checkpoint, save_tokenizer, split_batch)

# ---- Configuration. Defaults are stage 1 of SigLIP2-so400m 256. Sources: [T7] the paper's Table 7, [TiTok] inherited from the
# code it adapts, [ours]. Every field, and every field of VQRAEConfig, is a flag.
@dataclass
class TrainConfig:
    config: Literal["tiny", "siglip2_base_256", "siglip2_256", "siglip2_512", "internvit_448"] = "tiny"  # model and its presets
    stage: Literal[0, 1, 2] = 1           # 0: pretrain tiny's stand-in VFM, 1: encoder frozen, 2: all
    data: str = "shapes"                  # shapes, a folder of images, or 'shards-{000..127}.tar'
    val_data: str = ""                    # the same for validation; "": every 20th image of a folder is held out
    out_dir: str = ""                     # the run's folder; "": out/CONFIG
    init_from: str = ""                   # a run to take the earlier stages from; "": out_dir; none: stage 2 without stage 1
    resume: bool = False                  # go on from this stage's last checkpoint
    overwrite: bool = False               # start over although this stage has a checkpoint
    device: str = ""                      # cuda, mps or cpu; "": the first of them that is there
    precision: Literal["bf16", "float32", "float64"] = "bf16"  # [T7] autocast; losses and code distances stay float32
    compile: bool = False                 # torch.compile of the tokenizer: some minutes first, then faster steps on a GPU
    checkpointing: bool = False           # recompute activations in the backward pass: less memory, more time
    tf32: bool = False                    # float32 products in TensorFloat-32 on a GPU, the code search included
    seed: int = 0                         # of weights, order and crops
    # data
    batch_size: int = 1024                # [T7] images a step, over all ranks and accumulation
    micro_batch: int = 0                  # images a rank takes at a time, the rest by accumulation; 0: all at once
    num_workers: int = 8                  # decoding processes a rank
    random_crop: bool = True              # [T7] else centre crop
    random_flip: bool = True              # [T7] horizontal
    # optimisation
    total_steps: int = 100_000            # [T7]
    lr: float = 4e-4                      # [T7] decoder, codebook projection and the two linears beside it
    encoder_lr: float = 0.0               # [T7] 0: frozen
    end_lr: float = 1e-4                  # [T7] where lr's cosine ends; the other rates fall by the same factor [TiTok]
    warmup_steps: int = 2000              # [T7]
    beta1: float = 0.9                    # [T7]
    beta2: float = 0.999                  # [T7]
    weight_decay: float = 1e-4            # [T7] on matrices only [TiTok]
    clip: float = 1.0                     # [T7] gradient norm; the discriminator's separately
    ema_decay: float = 0.999              # [TiTok] of the weights that are evaluated and saved as the tokenizer
    # losses
    l2_weight: float = 1.0                # [TiTok]
    perceptual: Literal["lpips_convnext", "lpips", "vfm", "none"] = "lpips_convnext"  # [T7] "convnext-s"
    perceptual_weight: float = 1.0        # [TiTok] T7's 1.1 is divided by 1 + 0.1 there
    lpips_weights: str = ""               # a file of torchvision's vgg16; "": download
    convnext_weights: str = ""            # a file of torchvision's convnext_small; "": download
    distill_weight: float = 0.0           # [T7] lambda_d, eq. 6
    disc_start: int = -1                  # [T7] step at which discriminator and adversarial term start; -1: never
    disc_weight: float = 0.1              # [T7] lambda_G, eq. 2
    disc_lr: float = 4e-5                 # [T7]
    disc_width: int = 128                 # [TiTok]
    lecam_weight: float = 0.001           # [TiTok]
    # stage 0
    stage0_steps: int = 500               # [ours] of 32 shapes pictures
    stage0_lr: float = 2e-3               # [ours]
    # once in a while
    log_every: int = 50                   # [ours] steps
    eval_every: int = 5000                # [ours] validation PSNR and a grid
    save_every: int = 5000                # [ours]
    val_images: int = 256                 # [ours] images a validation

    def __post_init__(self):
        self.out_dir = self.out_dir or f"out/{self.config}"
        for name in ("batch_size", "total_steps", "log_every", "eval_every", "save_every", "val_images", "disc_width"):
            if getattr(self, name) < 1: raise UserError(f"--{name} is at least 1, not {getattr(self, name)}")
        if self.lr <= 0 or min(self.encoder_lr, self.end_lr, self.micro_batch, self.num_workers, self.warmup_steps) < 0:
            raise UserError("--lr is above 0; the other rates, --micro_batch, --num_workers and --warmup_steps are not negative")
        if self.resume and self.overwrite: raise UserError("--resume goes on and --overwrite starts over: choose one")

PRESETS = {
    # What stage 2 changes: the encoder moves, slowly and on a leash; a discriminator comes in near the end.
    ("stage", 2): dict(encoder_lr=1e-5, lr=1e-4, end_lr=1e-5, distill_weight=1.0, disc_start=50_000, total_steps=70_000),            # [T7]
    "internvit_448": dict(batch_size=768, total_steps=45_000),                                                                       # [T7]
    ("internvit_448", 2): dict(disc_start=30_000, total_steps=60_000),                                                               # [T7]
    "siglip2_base_256": dict(batch_size=256, micro_batch=32),                                                                        # [ours]
    # A world of minutes, not days: everything shorter, rates higher, the losses the same but for the perceptual one.
    "tiny": dict(batch_size=16, total_steps=1100, lr=2e-3, end_lr=1e-4, warmup_steps=50, beta2=0.95, precision="float32",            # [ours]
                 num_workers=0, perceptual="vfm", perceptual_weight=0.005, disc_width=16, log_every=20, eval_every=300, save_every=300),
    ("tiny", 2): dict(total_steps=760, lr=1e-3, end_lr=1e-4, encoder_lr=1e-3, distill_weight=0.2, disc_start=700, disc_weight=0.001),     # [ours]
}

def preset_order(values):
    return [("stage", values["stage"]), values["config"], (values["config"], values["stage"])]

# ---- Data. Everything is a function of (seed, position): position 0, 1, 2, ... counts the images a run has seen, so that any
# number of ranks and workers, and a resumed run, see the same images in the same order with the same crops.
Image.MAX_IMAGE_PIXELS = 128 * 1024 * 1024        # more is refused as a decompression bomb
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

def decode(data):
    """Bytes of any image PIL reads -> upright RGB PIL image; transparency on white, the first frame of an animation."""
    image = Image.open(io.BytesIO(data))
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":                       # 16 bits: keep the upper eight
        values = np.asarray(image, np.float32)
        return Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def crop(image, size, u=(0.5, 0.5, 1.0), flip=False):
    """Shorter edge to `size` (bicubic, antialiased), then a crop -> (3, size, size) uint8. u in [0, 1]: where across, where
    down, and below 0.5 flipped where `flip` allows. The default is the centre."""
    scale = size / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (min(int(a * (room + 1)), room) for a, room in zip(u, (image.width - size, image.height - size)))
    image = TF.pil_to_tensor(image.crop((left, top, left + size, top + size)))
    return image.flip(-1) if flip and u[2] < 0.5 else image

class Images(torch.utils.data.Dataset):
    """Images of a folder or of tar shards by position, with caption and class. Unreadable ones are stepped over."""
    def __init__(self, source, size, seed=0, train=True, random_crop=False, random_flip=False, part=None):
        """part: None for all, "train" for all but every 20th image, "val" for those. size: pixels a side."""
        self.source, self.size, self.seed, self.train = source, size, seed, train
        self.random_crop, self.random_flip = random_crop, random_flip
        self.records = read_tars(source) if source.endswith(".tar") else read_folder(source)
        self.records = split_off(self.records, part)
        if not self.records: raise UserError(f"{source} is too small to hold validation images out: name some with --val_data")
        self.order = (-1, None)

    def __len__(self):
        return len(self.records)

    def record(self, position):
        epoch, i = divmod(position, len(self.records))
        if not self.train:
            return self.records[i]
        if self.order[0] != epoch:                                            # a new shuffle each epoch
            self.order = epoch, torch.randperm(len(self.records), generator=torch.Generator().manual_seed(self.seed + epoch))
        return self.records[self.order[1][i]]

    def __getitem__(self, position):
        u, skipped = torch.rand(3, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + position)).tolist(), []
        u = u if self.random_crop else [0.5, 0.5, u[2]]
        for attempt in range(len(self.records)):                              # an unreadable image's place goes to the next
            record = self.record(position + attempt)
            try:
                image = crop(decode(read_bytes(record["image"])), self.size, u, self.random_flip)
            except Exception as error:                                        # PIL raises anything on damaged files
                skipped.append(f"{record['name']}: {error}")
                continue
            text = record["text"] if isinstance(record["text"], str) else read_bytes(record["text"]).decode("utf-8", "replace")
            return dict(image=image, text=text.strip(), label=record["label"], name=record["name"], skipped=skipped)
        raise UserError(f"no readable image in {self.source}: the first is {skipped[0]}")

def split_off(records, part):
    """part: None for all, "train" for all but every 20th, "val" for those."""
    return [r for i, r in enumerate(records) if part is None or (i % 20 == 0) == (part == "val")]

def read_bytes(place):
    """(file, offset, size) -> bytes; size -1: the whole file."""
    path, offset, size = place
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)

def read_folder(folder):
    """Images below `folder`, sorted; caption and class from metadata.jsonl, else a .txt beside the image and the parent folder."""
    folder = Path(folder)
    if not folder.is_dir(): raise UserError(f"--data {folder}: no such folder (shapes, a folder of images, or 'shards-{{000..127}}.tar')")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files: raise UserError(f"--data {folder}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    captions = {}
    for metadata in folder.rglob("metadata.jsonl"):
        for number, line in enumerate(metadata.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            with explained(f"{metadata}, line {number}: not JSON with a file_name: {line[:60]!r}; mend or remove that line"):
                row = json.loads(line)
                captions[metadata.parent / row["file_name"]] = row
    records = []
    for path in files:
        row = captions.get(path, {})
        text = row.get("text")
        if text is None:
            text = (str(path.with_suffix(".txt")), 0, -1) if path.with_suffix(".txt").is_file() else ""
        label = row.get("label", path.parent.name if path.parent != folder else "")
        records.append(dict(name=str(path), image=(str(path), 0, -1), text=text, label=str(label)))
    return records

def read_tars(pattern):
    """Members of webdataset shards (key.jpg, key.txt) by file, offset and size. A damaged tar is named and left there."""
    paths = [pattern]
    while match := re.search(r"\{(\d+)\.\.(\d+)\}", paths[0]):
        numbers = [str(n).zfill(len(match[1])) for n in range(int(match[1]), int(match[2]) + 1)]
        paths = [p[:match.start()] + n + p[match.end():] for p in paths for n in numbers]
    records = []
    for path in paths:
        members = {}
        try:
            with tarfile.open(path) as tar:
                for m in tar:
                    stem, suffix = os.path.splitext(m.name)
                    members.setdefault(stem, {})[suffix.lower()] = (path, m.offset_data, m.size)
        except (OSError, tarfile.TarError) as error:
            print(f"skipped {path}: {error}")
        for stem, parts in members.items():
            image = next((parts[s] for s in sorted(IMAGE_SUFFIXES & parts.keys())), None)
            if image:
                records.append(dict(name=f"{path}:{stem}", image=image, text=parts.get(".txt", ""), label=os.path.basename(os.path.dirname(stem))))
    if not records: raise UserError(f"--data {pattern}: no readable shard with images")
    return records

def open_data(source, config, size, train):
    """The training or validation set that `config` asks for: None for shapes, which are drawn when they are needed."""
    if source == "shapes":
        return None
    part = None if config.val_data else "train" if train else "val"
    return Images(source, size, config.seed, train, config.random_crop and train, config.random_flip and train, part)

def batches(dataset, size, positions, batch, num_workers=0):
    """Yield dict(image (batch, 3, size, size) float in [0, 1], text, label, name, skipped) for consecutive `positions`."""
    if dataset is None:
        positions = iter(positions)
        while index := list(itertools.islice(positions, batch)):
            scene = plan(torch.tensor(index))
            yield dict(image=resize(render(scene), size), text=captions(scene), skipped=[], scene=scene)
        return
    loader = torch.utils.data.DataLoader(dataset, batch, sampler=positions, num_workers=num_workers, collate_fn=collate,
                                         worker_init_fn=ignore_signals, generator=torch.Generator())      # its own: iter() draws from it
    for item in loader:
        yield item | dict(image=item["image"].float() / 255)

def collate(items):
    joined = {key: [item[key] for item in items] for key in items[0]}
    return joined | dict(image=torch.stack(joined["image"]), skipped=sum(joined["skipped"], []))

def ignore_signals(_):
    """torchrun and Ctrl-C signal the workers too; the training process alone decides when to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

def resize(images, size):
    return images if images.shape[-1] == size else F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)

# ---- Stage 0 (ours; only where encoder_weights is "stage0"): a small ViT learns what SigLIP2 learns, in seconds. Captions by
# SigLIP's sigmoid loss, and what is where (SigLIP2 learns that from a captioning decoder, we from the renderer). No pixel loss:
# like any semantic encoder it may forget tints and shades, and stage 2 will have something to win back.
class Pretrainer(nn.Module):
    def __init__(self, encoder, dim, width=128, words=8192):
        super().__init__()
        self.encoder, self.norm = encoder, nn.LayerNorm(dim)
        self.image_head = nn.Linear(dim, width)
        self.words = nn.EmbeddingBag(words, width, mode="mean")
        self.text_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.scale, self.bias = nn.Parameter(torch.tensor(math.log(10.0))), nn.Parameter(torch.tensor(-10.0))
        self.segment = nn.ModuleList(nn.Linear(dim, 16 * (len(names) + 1)) for names in (SHAPES, COLORS))     # 4 x 4 cells a patch

    def embed_text(self, texts):
        """Bag of hashed words and word pairs -> (B, width): enough for short captions, whatever their words."""
        ids = []
        for text in texts:
            words = ["", *text.lower().split()]
            ids.append([zlib.crc32(w.encode()) % self.words.num_embeddings for w in [*words, *map(" ".join, zip(words, words[1:]))]])
        offsets = torch.tensor([0, *map(len, ids[:-1])]).cumsum(0)
        device = self.bias.device
        return self.text_head(self.words(torch.tensor(sum(ids, []), device=device), offsets.to(device)))

    def forward(self, images, texts, scene):
        z = self.norm(self.encoder(images))                                   # (B, N, d)
        image = F.normalize(self.image_head(z.mean(1)), dim=-1)               # (B, width)
        text = F.normalize(self.embed_text(texts), dim=-1)                    # (B, width)
        logits = self.scale.exp() * image @ text.T + self.bias                # (B, B)
        same = torch.tensor([[1.0 if a == b else -1.0 for b in texts] for a in texts], device=z.device)
        losses = dict(sigmoid=-F.logsigmoid(same * logits).sum(1).mean() / 10)   # about as large as the others
        for head, name, target in zip(self.segment, ("shape", "color"), segments(scene, math.isqrt(z.shape[1]))):
            losses[name] = F.cross_entropy(head(z).unflatten(-1, (16, -1)).flatten(0, 2), target.flatten().to(z.device))
        return losses

def pretrain(config, model_config, ranks, path):
    """Stage 0 -> `path`. Always on shapes: see README, "Stage 0 and your own images"."""
    if ranks.first:
        torch.manual_seed(config.seed)
        encoder = Encoder(model_config)
        net = Pretrainer(encoder, model_config.dim).to(ranks.device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=config.stage0_lr, weight_decay=0.05)
        bar = tqdm(range(config.stage0_steps), desc="stage 0", unit="step")
        stream = batches(None, model_config.image_size, range(32 * config.stage0_steps), 32)
        for step, batch in zip(bar, stream):
            for group in optimizer.param_groups:
                group["lr"] = config.stage0_lr * lr_factor(step, 30, config.stage0_steps, 0.01)
            losses = net(batch["image"].to(ranks.device), batch["text"], batch["scene"])
            values = {name: loss.item() for name, loss in losses.items()}
            check_finite(values, step)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(net.parameters(), config.clip)
            optimizer.step()
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
        save_checkpoint(path, dict(encoder=encoder.vit.state_dict()))
    ranks.wait()

# ---- Stages 1 and 2 -------------------------------------------------------------------------------------------------
def lr_factor(step, warmup, total, floor):
    """Linear warmup to 1, cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

def parameter_groups(model, config):
    """Encoder and the rest at their own rates; weight decay on matrices alone."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))
            groups.setdefault((name.startswith("encoder."), decays), []).append(p)
    return [dict(params=params, base_lr=config.encoder_lr if of_encoder else config.lr, weight_decay=config.weight_decay if decays else 0.0)
            for (of_encoder, decays), params in groups.items()]

def starting_point(config, model_config, ranks, resumed):
    """The model with the weights its stage begins from, and the frozen teacher T."""
    model = VQRAE(model_config)
    run = Path(config.out_dir if config.init_from in ("", "none") else config.init_from)
    if config.stage == 2 and config.init_from != "none":
        path = run / "stage1.pt"
        if not path.exists():
            raise UserError(f"stage 2 starts from {path}, which is not there: run `{command(config, model_config, 1)}` first, or pass --init_from")
        stage1 = load_checkpoint(path)
        check_same_model(stage1["model_config"], model_config, path)
        model.load_state_dict(stage1["ema"], strict=True)
    elif resumed and config.encoder_lr == 0:
        model.load_state_dict(resumed["model"], strict=True)                  # its encoder has not moved
    elif model_config.encoder_weights == "stage0":
        if not (run / "stage0.pt").exists():
            run = Path(config.out_dir)
        if not (run / "stage0.pt").exists():
            pretrain(config, model_config, ranks, run / "stage0.pt")
        load_encoder_weights(model.encoder, str(run / "stage0.pt"))
    else:
        load_encoder_weights(model.encoder, model_config.encoder_weights)
    teacher = copy.deepcopy(model.encoder).requires_grad_(False).eval()       # before anything moves
    return model, teacher

def check_same_model(saved, model_config, path):
    differ = [name for name, value in asdict(model_config).items() if saved.get(name) != value]
    if differ: raise UserError(f"{path} is of another model: " + ", ".join(f"{n} is {saved.get(n)} there, {getattr(model_config, n)} here" for n in differ))

@torch.no_grad()
def start_bottleneck(model, config, dataset, ranks):
    """Start to_code and the codes on this data's own features and pixels, looked at by rank 0 for all."""
    model.to(ranks.device)
    if ranks.first:
        size, p, Z_I, pixels = model.config.image_size, model.config.patch_size, [], []
        positions = range(max(64, 32 * model.config.codebook_size // model.config.num_tokens))
        for batch in batches(dataset, size, positions, min(64, config.batch_size), config.num_workers):
            images = batch["image"].to(ranks.device)
            Z_I.append(model.encode(images).flatten(0, 1))                                    # (B N, d)
            pixels.append(F.unfold(images, p, stride=p).transpose(1, 2).unflatten(2, (3, -1)).flatten(0, 1))      # (B N, 3, p p)
        model.start_on(torch.cat(Z_I), torch.cat(pixels))
    if ranks.size > 1:
        for tensor in (*model.to_code.state_dict().values(), *(model.quantizer.state_dict().values() if model.quantizer else [])):
            torch.distributed.broadcast(tensor, 0)

@torch.no_grad()
def validate(model, dataset, config, device):
    """-> mean PSNR of the validation images, codebook usage on them, and a grid of originals over reconstructions."""
    psnrs, used, grid = [], torch.zeros(model.config.codebook_size, dtype=torch.bool), None
    positions = range(VALIDATION, VALIDATION + config.val_images)
    if dataset is not None:                                                   # files are sorted: take some of every kind
        positions = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:config.val_images].tolist()
    for batch in batches(dataset, model.config.image_size, positions, 32):
        images = batch["image"].to(device)
        out = model(images)
        target = resize(images, model.config.output_size)
        psnrs.append(psnr(out.reconstruction, target))
        if out.indices is not None:
            used[out.indices.flatten().cpu()] = True
        if grid is None:
            across = min(8, len(images))
            pairs = zip(target[:16].split(across), out.reconstruction[:16].clamp(0, 1).split(across))
            grid = make_grid(torch.cat([row for pair in pairs for row in pair if len(row) == across]), nrow=across)
    return torch.cat(psnrs).mean().item(), used.float().mean().item(), grid

def command(config, model_config, stage):
    """The shell command of `stage` of this run, for messages."""
    kept = "config data val_data out_dir device precision seed batch_size micro_batch num_workers perceptual lpips_weights convnext_weights"
    given = {word.split("=")[0].removeprefix("--") for word in sys.argv}
    here = {name: getattr(config, name) for name in kept.split() if name in given} | ({} if stage == 1 else dict(stage=stage))
    here |= {name: value for name, value in asdict(model_config).items() if value != getattr(MODELS[config.config], name)}
    flags = [(f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)) for name, value in here.items()]
    return shlex.join(["python", "train_tokenizer.py", *itertools.chain(*flags)])

def train(config, model_config, ranks):
    out, device, start = Path(config.out_dir), ranks.device, time.time()
    path = out / f"stage{config.stage}.pt"
    resumed = open_run(path, config)
    if resumed:
        check_same_model(resumed["model_config"], model_config, path)
    local, micro, accumulate = split_batch(config, ranks)

    size = model_config.image_size
    data = open_data(config.data, config, size, train=True)
    val_data = open_data(config.val_data or config.data, config, size, train=False)
    torch.manual_seed(config.seed)
    model, teacher = starting_point(config, model_config, ranks, resumed)
    torch.manual_seed(config.seed)                                            # the same from here on, whether stage 0 ran just now or not
    perceptual = config.perceptual != "none" and PerceptualLoss(config.perceptual, config.lpips_weights, config.convnext_weights, vfm=teacher)
    discriminator = Discriminator(config.disc_width) if config.disc_start >= 0 else None
    if config.disc_start >= config.total_steps:
        ranks.say(f"note: the discriminator would start at step {config.disc_start}, after the last: it takes no part")

    frozen = config.encoder_lr == 0
    model.encoder.requires_grad_(not frozen)
    if not resumed and (config.stage == 1 or config.init_from == "none"):
        start_bottleneck(model, config, data, ranks)
    for part in filter(None, (model, teacher, perceptual, discriminator)):
        part.to(device, torch.float64 if config.precision == "float64" else None)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32
    model.encoder.vit.set_grad_checkpointing(config.checkpointing and not frozen)
    model.decoder.vit.set_grad_checkpointing(config.checkpointing)
    if config.compile:
        model.compile()
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(config.beta1, config.beta2), fused=device.type != "mps")
    d_optimizer = discriminator and torch.optim.AdamW(discriminator.parameters(), lr=config.disc_lr, betas=(config.beta1, config.beta2),
                                                      weight_decay=config.weight_decay)
    lecam_real, lecam_fake = torch.zeros(2, device=device)                    # running mean logits
    first_step = resumed["step"] if resumed else 0
    if resumed:
        model.load_state_dict(resumed["model"])
        ema.load_state_dict(resumed["ema"])
        if first_step > config.total_steps or (resumed["config"]["encoder_lr"] == 0) != frozen:
            raise UserError(f"{path} cannot go on like this: it is at step {resumed['step']} with --encoder_lr {resumed['config']['encoder_lr']}")
        optimizer.load_state_dict(resumed["optimizer"] | dict(param_groups=optimizer.state_dict()["param_groups"]))    # rates are this run's
        if discriminator and resumed["discriminator"]:
            discriminator.load_state_dict(resumed["discriminator"])
            d_optimizer.load_state_dict(resumed["d_optimizer"])
        lecam_real, lecam_fake = resumed["lecam"].to(device)
        torch.set_rng_state(resumed["rng"])
        del resumed                                                           # it holds as much as model and optimiser
    net, d_net = ranks.run(model), discriminator and ranks.run(discriminator)
    counts = torch.zeros(model_config.codebook_size, device=device)           # how often each code was used since the last log line

    def save(step):
        if ranks.first:
            save_checkpoint(path, dict(
                model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step,
                discriminator=discriminator and discriminator.state_dict(), d_optimizer=d_optimizer and d_optimizer.state_dict(),
                lecam=torch.stack([lecam_real, lecam_fake]), rng=torch.get_rng_state(), config=asdict(config), model_config=asdict(model_config)))

    firsts = (step * config.batch_size + ranks.rank * local for step in range(first_step, config.total_steps))
    positions = (at + i for at in firsts for i in range(local))               # of this rank's images
    stream = batches(data, size, positions, micro, config.num_workers)
    log = Log(out / f"log_stage{config.stage}.jsonl", first_step, ranks.first)
    bar = tqdm(total=config.total_steps, initial=first_step, desc=f"stage {config.stage}", unit="step", disable=not ranks.first)
    weights = dict(l2=config.l2_weight, perceptual=config.perceptual_weight, quant=1.0, distill=config.distill_weight,
                   adversarial=config.disc_weight)
    skipped, last_log, warned, val, floor = 0, (first_step, time.time()), False, None, min(1.0, config.end_lr / config.lr)
    ranks.catch_stop()

    for step in range(first_step, config.total_steps + 1):
        # Once in a while: validate, draw, save.
        last = step == config.total_steps
        if ranks.first and (last or (step > first_step and step % config.eval_every == 0)):
            *val, grid = validate(ema, val_data, config, device)
            save_image(grid, out / f"recon_stage{config.stage}.png")
            log(step=step, val_psnr=val[0], val_codebook_usage=val[1])
        stop = ranks.stopping()
        if last or stop or (step > first_step and step % config.save_every == 0):
            save(step)
        if last or stop:
            break

        # --------------------------------------------------------------------------------------------------------------
        # One training step.
        factor = lr_factor(step, config.warmup_steps, config.total_steps, floor)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        adversarial = 0 <= config.disc_start <= step
        sums = {}
        for i in range(accumulate):
            batch = next(stream)
            images = batch["image"].to(device, torch.float64 if config.precision == "float64" else None)   # (b, 3, h, w)
            for line in batch["skipped"]:
                skipped += 1
                tqdm.write(f"skipped {line}")
            alone = ranks.size == 1 or i == accumulate - 1                    # DDP averages gradients in backward: once a step is enough
            amp = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
            with contextlib.nullcontext() if alone else net.no_sync():
                with amp:
                    X, Z_I, indices, vq_loss = net(images)                    # (b, 3, H, W), (b, N, d), (b, N), ()
                X, target = full(X), resize(images, model_config.output_size)  # (b, 3, H, W) each; losses in float32 from here
                terms = dict(l2=F.mse_loss(X, target), quant=vq_loss)                                            # eq. 2, 3
                if perceptual:
                    terms["perceptual"] = perceptual(target, X)
                if config.distill_weight and not frozen:
                    with torch.no_grad(), amp:
                        T_X = teacher(images)                                 # (b, N, d)
                    terms["distill"] = distill_loss(Z_I, T_X)                                                    # eq. 5
                if adversarial:                                               # it only judges here: no gradient of its own, so no DDP
                    discriminator.requires_grad_(False)
                    terms["adversarial"] = -discriminator(X).mean()
                loss = sum(weights[name] * term for name, term in terms.items())                                 # eq. 4, 6
                (loss / accumulate).backward()
            if adversarial:
                discriminator.requires_grad_(True)
                with contextlib.nullcontext() if alone else d_net.no_sync():
                    real, fake = d_net(torch.cat([target, X.detach()])).chunk(2)              # (b, 1, 16, 16) each
                    real_mean, fake_mean = ranks.mean_with_grad(real.mean()), ranks.mean_with_grad(fake.mean())
                    terms["discriminator"] = hinge_d_loss(real, fake)
                    terms["lecam"] = lecam(real_mean, fake_mean, lecam_real, lecam_fake)
                    ((terms["discriminator"] + config.lecam_weight * terms["lecam"]) / accumulate).backward()
                lecam_real, lecam_fake = (0.999 * e + 0.001 * m.detach().float() for e, m in ((lecam_real, real_mean), (lecam_fake, fake_mean)))
            for name, term in dict(terms, loss=loss).items():
                sums[name] = sums.get(name, 0) + full(term.detach()) / accumulate
            if indices is not None:                                           # bincount would wait for the GPU
                counts.index_add_(0, indices.flatten(), torch.ones(indices.numel(), device=device))

        sums["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        mean = ranks.sum(torch.stack(list(sums.values()))) / ranks.size
        sums = dict(zip(sums, mean.tolist()))                                 # the step's one wait for the GPU
        check_finite(sums, step)
        optimizer.step()
        optimizer.zero_grad()
        if adversarial:
            since, span = step - config.disc_start, config.total_steps - config.disc_start
            for group in d_optimizer.param_groups:
                group["lr"] = config.disc_lr * lr_factor(since, config.warmup_steps, span, floor)
            nn.utils.clip_grad_norm_(discriminator.parameters(), config.clip)
            d_optimizer.step()
            d_optimizer.zero_grad()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for e, p in zip(ema.parameters(), model.parameters()):
                if p.requires_grad:                                           # what is frozen stays bit for bit
                    e.lerp_(p, 1 - decay)
        # --------------------------------------------------------------------------------------------------------------

        bar.update()
        if (step + 1) % config.log_every == 0:
            used = ranks.sum(counts)
            share = used / used.sum().clamp(min=1)
            usage, perplexity = (used > 0).float().mean().item(), torch.special.entr(share).sum().exp().item()
            counts = torch.zeros_like(counts)
            rate = (step + 1 - last_log[0]) * config.batch_size / (time.time() - last_log[1])
            last_log = step + 1, time.time()
            log(step=step + 1, **sums, lr=config.lr * factor, images_per_s=rate, codebook_usage=usage, perplexity=perplexity, skipped=skipped)
            bar.set_postfix_str(f"loss {sums['loss']:.4f}, PSNR {-10 * math.log10(sums['l2']):.1f}, codes {usage:.0%}, {rate:.0f} images/s")
            if model.quantizer and usage < 0.1 and step > config.warmup_steps and not warned:
                warned = True
                ranks.say(f"\nwarning: only {usage:.1%} of the codes are in use. Try a larger --codebook_dim (at least {model_config.dim}), "
                          f"a longer --warmup_steps, a lower --lr, or a smaller --codebook_size")
    bar.close()
    if stop and not last:
        ranks.say(f"stopped at step {step}, all saved. Go on with: {resume_command()}")
        return
    if ranks.first:
        finish(config, ema, teacher, val, time.time() - start, skipped)
    ranks.wait()

def finish(config, ema, teacher, val, seconds, skipped):
    """Save the tokenizer, print the short table and the next command."""
    out = Path(config.out_dir)
    folder = out / f"tokenizer-stage{config.stage}"
    save_tokenizer(ema.float(), folder, teacher if ema.config.encoder_weights in ("stage0", "random") else None)
    newest = out / "tokenizer"
    newest.unlink(missing_ok=True)
    newest.symlink_to(folder.name)
    print(f"\n  {'stage':24}{config.stage}\n  {'validation PSNR':24}{val[0]:.2f} dB")
    if ema.quantizer:
        print(f"  {'validation codebook use':24}{val[1]:.1%} of {ema.config.codebook_size} codes")
    print(f"  {'time':24}{seconds / 60:.1f} minutes\n  {'pictures':24}{out / f'recon_stage{config.stage}.png'}\n  {'tokenizer':24}{folder}"
          + f"\n  {'unreadable images':24}{skipped}" * (skipped > 0))
    scoring = shlex.join(["python", "eval.py", "--data", config.val_data or config.data, "--out_dir", str(out),
                          *["--part", "val"] * (config.data != "shapes" and not config.val_data)])
    print(f"\nNext: {command(config, ema.config, 2) if config.stage == 1 else scoring}")

def main():
    config, model_config, origin = parse_config(TrainConfig, PRESETS, preset_order, VQRAEConfig, MODELS)
    ranks = Ranks(config.device)
    if ranks.first:
        print_config(origin, config, model_config)
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    ranks.wait()
    if config.stage > 0:
        train(config, model_config, ranks)
        return
    if model_config.encoder_weights != "stage0":
        raise UserError(f"--config {config.config} has a pretrained encoder: stage 0 is for encoder_weights stage0, the tiny config's")
    path = Path(config.out_dir) / "stage0.pt"
    if path.exists() and not config.overwrite: raise UserError(f"{path} exists: --overwrite makes it anew")
    pretrain(config, model_config, ranks, path)
    ranks.say(f"wrote {path}\nNext: {command(config, model_config, 1)}")

# ---- The shapes world: 64 x 64 pictures of one to four objects, drawn by the thousand a second. Picture i is a function of i
# alone. From VALIDATION on they are for validation, and only there do HELD_OUT pairs of shape and colour appear.
VALIDATION = 1 << 40
SIDE, WINDOW = 64, 38                             # pixels a picture; pixels a window that holds any one object
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {"red": (0.86, 0.16, 0.16), "orange": (0.98, 0.56, 0.10), "yellow": (0.98, 0.88, 0.20), "green": (0.20, 0.65, 0.25),
          "cyan": (0.20, 0.80, 0.85), "blue": (0.16, 0.32, 0.86), "purple": (0.55, 0.20, 0.72), "pink": (0.98, 0.50, 0.75)}
PALETTE = torch.tensor(list(COLORS.values()))
HELD_OUT = (torch.arange(6)[:, None] + 3) % 8 == torch.arange(8)              # (shape, color): green circle, cyan square, ...
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "scene")    # GenEval's six, and one more
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four")

class Scene(NamedTuple):
    """What is in B pictures; objects in four places of which the first `count` are taken."""
    task: torch.Tensor          # (B,) index into TASKS
    count: torch.Tensor         # (B,) 1 to 4
    relation: torch.Tensor      # (B,) index into RELATIONS; holds for the first two objects of a position task
    shape: torch.Tensor         # (B, 4) index into SHAPES
    color: torch.Tensor         # (B, 4) index into COLORS
    x: torch.Tensor             # (B, 4) pixels from the left
    y: torch.Tensor             # (B, 4) pixels from the top
    radius: torch.Tensor        # (B, 4) pixels
    angle: torch.Tensor         # (B, 4) radians
    rgb: torch.Tensor           # (B, 4, 3) each object's own tint
    background: torch.Tensor    # (B, 3) RGB at the centre
    slope: torch.Tensor         # (B, 2) its change across and down the picture

    @property
    def present(self):          # (B, 4) bool
        return torch.arange(4) < self.count[:, None]

def uniforms(index, n):
    """(B,) int64 -> (B, n) numbers in [0, 1), by the splitmix64 hash of (index, column)."""
    signed = lambda x: x - (1 << 64)                                          # torch has no uint64 arithmetic; int64 wraps the same
    x = index[:, None] * signed(0x9E3779B97F4A7C15) + torch.arange(1, n + 1) * signed(0xD1B54A32D192ED03)
    for shift, factor in ((30, signed(0xBF58476D1CE4E5B9)), (27, signed(0x94D049BB133111EB)), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((x >> 40) & 0xFFFFFF).float() / (1 << 24)

def plan(index, task=None):
    """Picture numbers (B,) int64 -> Scene. task: an index into TASKS, or one each (B,), to have that and no other."""
    u = uniforms(index, 48)
    task = (u[:, 0] * len(TASKS)).long() if task is None else torch.as_tensor(task).expand_as(index)
    low = torch.tensor([1, 2, 2, 1, 2, 2, 3])[task]                           # objects a task has at least, and how many more
    count = low + (u[:, 1] * torch.tensor([1, 1, 3, 1, 1, 1, 2])[task]).long()
    shape, color = u[:, 2:8].argsort(1)[:, :4], u[:, 8:16].argsort(1)[:, :4]  # all different (but for the swap below),
    alike = (task == 2)[:, None]
    shape, color = torch.where(alike, shape[:, :1], shape), torch.where(alike, color[:, :1], color)   # but for counting
    training = (index < VALIDATION)[:, None]
    color = torch.where(training & HELD_OUT[shape, color], (color + 1) % 8, color)                # no HELD_OUT pair
    relation = (u[:, 1] * 4).long()
    cells = u[:, 16:20].argsort(1)                                            # quadrants: 0 1 over 2 3
    pairs = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 0], [2, 3], [3, 2], [1, 3], [3, 1]])            # first, second by relation
    cells[:, :2] = torch.where((task == 4)[:, None], pairs[relation + 4 * (u[:, 20] < 0.5)], cells[:, :2])
    alone = (count == 1)[:, None]
    radius = torch.where(alone, 11 + 2 * u[:, 21:25], 10 + 2 * u[:, 21:25])
    room = torch.where(alone, 4, 13 - radius)                                  # objects never touch each other or the edge
    x = torch.where(alone, 32, 16 + 32 * (cells % 2)) + room * (2 * u[:, 25:29] - 1)
    y = torch.where(alone, 32, 16 + 32 * (cells // 2)) + room * (2 * u[:, 29:33] - 1)
    angle = 0.1 * u[:, 33:37] - 0.05
    rgb = (PALETTE[color] * (0.98 + 0.04 * u[:, 37:41, None])).clamp(max=1)
    background = 0.80 + 0.12 * u[:, 41:42] + 0.02 * (u[:, 42:45] - 0.5)        # greyish, so that every object stands out
    return Scene(task, count, relation, shape, color, x, y, radius, angle, rgb, background, 0.06 * (u[:, 45:47] - 0.5))

def plural(shape):
    return shape + ("es" if shape == "cross" else "s")

def article(thing):
    return f"{'an' if thing[0] == 'o' else 'a'} {thing}"

def captions(scene):
    """Scene -> B captions in GenEval's wording, without its "a photo of"."""
    out = []
    for task, n, relation, shapes, colors in zip(*(t.tolist() for t in (scene.task, scene.count, scene.relation, scene.shape, scene.color))):
        shapes = [SHAPES[s] for s in shapes[:n]]
        named = [f"{list(COLORS)[c]} {s}" for c, s in zip(colors, shapes)]
        if TASKS[task] == "counting":
            out.append(f"{NUMBERS[n]} {plural(shapes[0])}")
            continue
        things = [article(t) for t in (shapes if TASKS[task] in ("single_object", "two_object") else named)]
        if TASKS[task] == "position":
            out.append(f"{things[0]} {RELATIONS[relation]} {things[1]}")
        else:
            out.append(" and ".join(filter(None, (", ".join(things[:-1]), things[-1]))))
    return out

def questions(index, scene, rounds=1):
    """Picture numbers (B,) and their Scene -> for each picture its {question: (kind, answer)}, up to four kinds a round, shuffled."""
    out = []
    facts = zip(uniforms(index, 48 + 12 * rounds)[:, 48:].tolist(), *(t.tolist() for t in (scene.count, scene.shape, scene.color, scene.x, scene.y)))
    for chance, n, shapes, colors, xs, ys in facts:
        asked, things = {}, [(list(COLORS)[c], SHAPES[s]) for c, s in zip(colors[:n], shapes)]
        drawn = [shape for _, shape in things]
        for u in zip(*[iter(chance)] * 12):
            i, j = int(u[0] * n), int(u[1] * n)
            color, shape = things[i]
            if u[2] < 0.5:                                                    # POPE asks half its questions about what is not there,
                color = list(COLORS)[int(u[3] * 8)]
                shape = SHAPES[int(u[4] * 6)] if u[5] < 0.5 else shape        # half of those with something right
            asked[f"is there {article(color)} {shape}?"] = "presence", "yes" if (color, shape) in things else "no"
            if u[6] < 0.4 and len(set(drawn)) == n:                           # else nearly all answers were "one"
                asked["how many objects are there?"] = "counting", NUMBERS[n]
            else:
                shape = drawn[i] if u[6] < 0.8 else SHAPES[int(u[7] * 6)]
                asked[f"how many {plural(shape)} are there?"] = "counting", NUMBERS[drawn.count(shape)]
            if drawn.count(drawn[i]) == 1:
                asked[f"what color is the {drawn[i]}?"] = "color", things[i][0]
            dx, dy = xs[i] - xs[j], ys[i] - ys[j]
            if drawn[i] != drawn[j] and max(abs(dx), abs(dy)) > 8:
                across = abs(dx) > abs(dy)
                asked[f"is the {drawn[i]} {'left or right of' if across else 'above or below'} the {drawn[j]}?"] = (
                    "position", ("left" if dx < 0 else "right") if across else "above" if dy < 0 else "below")
        out.append(dict(sorted(asked.items(), key=lambda item: zlib.crc32(f"{chance[-1]} {item[0]}".encode()))))
    return out

EXTENT = 1.3                                      # half the side of ATLAS, in radii

def draw_atlas(side=64):
    """(6, 1, side, side): signed distance to each shape's outline, positive inside, in radii."""
    axis = torch.linspace(-EXTENT, EXTENT, side)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    r = (x * x + y * y).sqrt()

    def polygon(points):
        a, p = torch.tensor(points), torch.stack([x, y], -1)[..., None, :]    # corners (V, 2), pixels (side, side, 1, 2)
        b = a.roll(-1, 0)
        edge, to = b - a, p - a
        along = ((to * edge).sum(-1) / edge.square().sum(-1)).clamp(0, 1)
        distance = (to - along[..., None] * edge).norm(dim=-1).amin(-1)
        crossing = (a[:, 1] <= p[..., 1]) != (b[:, 1] <= p[..., 1])           # edges that a ray to the right may cross
        right = p[..., 0] < a[:, 0] + to[..., 1] / torch.where(edge[:, 1] == 0, 1, edge[:, 1]) * edge[:, 0]
        return distance * ((crossing & right).sum(-1) % 2 * 2 - 1)

    def rays(*radii):                                                         # corners at equal angles, the first upward
        turn = 2 * math.pi / len(radii)
        return [(r * math.sin(i * turn), -r * math.cos(i * turn)) for i, r in enumerate(radii)]
    s, w = 0.84, 0.33
    cross = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
    return torch.stack([0.93 - r, polygon([(-s, -s), (s, -s), (s, s), (-s, s)]), polygon(rays(1.12, 1.12, 1.12)),
                        polygon(rays(*[1.15, 0.5] * 5)), polygon(cross), 0.22 - (r - 0.78).abs()])[:, None]

ATLAS = draw_atlas()
PIXELS = torch.cartesian_prod(torch.arange(WINDOW) + 0.5, torch.arange(WINDOW) + 0.5).flip(1)      # (W W, 2): x, y

def masks(shape, x, y, radius, angle):
    """M objects, (M,) each -> their coverage (M, WINDOW, WINDOW) in [0, 1], anti-aliased, and the window's left and top (M,)."""
    left, top = ((c - WINDOW / 2).round().clamp(0, SIDE - WINDOW) for c in (x, y))
    cos, sin = angle.cos() / radius / EXTENT, angle.sin() / radius / EXTENT
    turn = torch.stack([cos, -sin, sin, cos], -1).view(-1, 2, 2)
    center = torch.stack([x - left, y - top], -1)[:, None]                    # (M, 1, 2)
    grid = torch.baddbmm(-center @ turn, PIXELS.expand(len(x), -1, -1), turn)  # (M, W W, 2): where in the atlas each pixel lies
    distance = F.grid_sample(ATLAS[shape], grid.view(-1, WINDOW, WINDOW, 2), padding_mode="border", align_corners=True)[:, 0]
    return distance.mul_(radius[:, None, None]).add_(0.5).clamp_(0, 1), left.long(), top.long()

def draw_layers(scene):
    """Scene -> (B, 6, 64, 64): how much of each pixel four objects and the background cover, and the background's slope there."""
    b, k = scene.present.nonzero(as_tuple=True)
    cover, left, top = masks(*(t[b, k] for t in (scene.shape, scene.x, scene.y, scene.radius, scene.angle)))
    layers = torch.zeros(len(scene.count), 6, SIDE, SIDE)
    at = torch.arange(WINDOW)
    corner = ((b * 6 + k) * SIDE + top) * SIDE + left
    layers.view(-1)[(corner[:, None, None] + at[:, None] * SIDE + at).flatten()] = cover.flatten()
    torch.sub(1, layers[:, :4].sum(1), out=layers[:, 4])
    axis = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    slope = scene.slope[:, 0, None, None] * axis + scene.slope[:, 1, None, None] * axis[:, None]
    torch.mul(layers[:, 4], slope, out=layers[:, 5])
    return layers

def render(scene):
    """Scene -> images (B, 3, 64, 64) in [0, 1]."""
    layers = draw_layers(scene)
    rgb = torch.cat([scene.rgb, scene.background[:, None], torch.ones(len(layers), 1, 3)], 1)     # (B, 6, 3)
    return (rgb.transpose(1, 2) @ layers.flatten(2)).view(-1, 3, SIDE, SIDE).clamp_(0, 1)

def segments(scene, grid):
    """What is where: shape and color, (B, grid * grid, 16) each for the 4 x 4 cells of every patch; 0 for background, else index + 1."""
    cells = F.interpolate(draw_layers(scene)[:, :4], size=4 * grid, mode="area")                              # (B, 4, 4 grid, 4 grid)
    cover, who = cells.unflatten(3, (grid, 4)).unflatten(2, (grid, 4)).transpose(3, 4).flatten(4).flatten(2, 3).max(1)    # (B, N, 16)
    return [torch.where(cover > 0.5, what.gather(1, who.flatten(1)).view_as(who) + 1, 0) for what in (scene.shape, scene.color)]

if __name__ == "__main__":
    command_line(main)
