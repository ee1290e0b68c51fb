"""
Train the VQRAE tokenizer: the paper's two stages, and before them a stage 0 for the tiny config alone.

    python train_tokenizer.py                       tiny: pretrain a small VFM on drawn shapes, then stage 1. CPU, no download
    python train_tokenizer.py --stage 2             encoder, codebook and decoder, with self-distillation
    torchrun --nproc_per_node=8 train_tokenizer.py --config siglip2_256 --data 'shards-{000..127}.tar'
    ... --resume                                    go on after a stop (on a CPU bit-identical to never having stopped)
    ... --quantizer none                            the RAE baseline; every field of TrainConfig and of VQRAEConfig is a flag

    stage 0   a stand-in for SigLIP2: the tiny encoder learns captions and objects      -> stage0.pt
    stage 1   encoder frozen; codebook and decoder learn to reconstruct       (eq. 4)   -> stage1.pt, tokenizer-stage1/
    stage 2   encoder too, held to its old features by distillation           (eq. 6)   -> stage2.pt, tokenizer-stage2/
"""
import collections, contextlib, copy, functools, hashlib, io, itertools, json, math, os, re, shutil, tarfile, time, zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image
from tqdm import tqdm

from vqrae import (VQRAE, Discriminator, Encoder, Log, PerceptualLoss, Ranks, UserError, VQRAEConfig, bench, check_finite,
                   check_run, check_same, command_line, compile_parts, distill_loss, due, explained, full, hinge_d_loss,
                   ignore_signals, lecam, load_checkpoint, load_encoder_weights, lr_factor, next_command, open_run, parse_config,
                   print_config, report, resize, save_checkpoint, save_tokenizer, split_batch, uniform, weights_file)

# ---- Configuration. Defaults: stage 1 of SigLIP2-so400m 256. [T7]: the paper's Table 7, [TiTok]: the code it adapts, [ours].
@dataclass
class TrainConfig:
    config: str = "tiny"            # model and its presets: a key of vqrae.MODELS
    stage: Literal[0, 1, 2] = 1     # 0: pretrain tiny's stand-in VFM, 1: encoder frozen, 2: all
    data: str = "shapes"            # shapes, a folder of images, or 'shards-{000..127}.tar'
    val_data: str = ""              # the same for validation; "": every 20th image, held out (shapes: new ones)
    out_dir: str = ""               # the run's folder; "": out/CONFIG
    init_from: str = ""             # the run whose earlier stages this one starts from; "": out_dir; none: no stage 1
    resume: bool = False            # go on from this stage's last checkpoint
    overwrite: bool = False         # start over although this stage has a checkpoint
    device: str = ""                # cuda, mps or cpu; "": the first of them that is there
    bench: int = 0                  # time that many steps of stage 1 or 2 on one batch, and stop; saves no progress
    profile: bool = False           # with --bench: torch.profiler's table of where the time goes
    precision: Literal["bf16", "float32", "float64"] = "bf16"  # [T7] autocast of the model; float32 decides on codes
    loss_precision: Literal["bf16", "float32"] = "float32"  # [TiTok] perceptual networks, discriminator; bf16: faster on GPUs
    compile: bool = False           # torch.compile, block by block: a minute or two first, then faster steps on a GPU
    checkpointing: bool = False     # recompute activations in the backward pass: less memory, more time
    tf32: bool = False              # float32 products in TensorFloat-32 on a GPU, those of the code search included
    seed: int = 0                   # of weights, files' order and crops
    log_every: int = 50             # [ours] steps
    eval_every: int = 5000          # [ours] validation PSNR and a grid
    save_every: int = 5000          # [ours]
    val_images: int = 256           # [ours] images a validation
    # data
    batch_size: int = 1024          # [T7] images a step, over all ranks and accumulation
    micro_batch: int = 0            # images a rank takes at a time, the rest by accumulation; 0: all at once
    num_workers: int = 8            # decoding processes a rank
    random_crop: bool = True        # [T7] else centre crop
    random_flip: bool = True        # [T7] horizontal
    # optimisation
    total_steps: int = 100_000      # [T7]
    lr: float = 4e-4                # [T7] decoder, W, to_code and from_code
    encoder_lr: float = 0.0         # [T7] 0: frozen
    end_lr: float = 1e-4            # [T7] where lr's cosine ends; the other rates fall by the same factor [TiTok]
    warmup_steps: int = 2000        # [T7]
    beta1: float = 0.9              # [T7]
    beta2: float = 0.999            # [T7]
    weight_decay: float = 1e-4      # [T7] on matrices only [TiTok]
    clip: float = 1.0               # [T7] gradient norm; the discriminator's separately
    bottleneck_start: Literal["data", "random"] = "data"  # [ours] to_code and the codes begin on the data, or as SimVQ makes them
    stage0_steps: int = 1500        # [ours] of stage 0, of 16 pictures of shapes each
    ema_decay: float = 0.999        # [TiTok] of the weights that are evaluated and saved as the tokenizer
    # losses
    perceptual: Literal["lpips_convnext", "lpips", "vfm", "none"] = "lpips_convnext"  # [T7] "convnext-s"
    perceptual_weight: float = 1.0  # [TiTok] T7's 1.1 is divided by 1 + 0.1 there
    lpips_weights: str = ""         # a file of torchvision's vgg16; "": download
    convnext_weights: str = ""      # a file of torchvision's convnext_small; "": download
    distill_weight: float = 0.0     # [T7] lambda_d, eq. 6
    disc_start: int = -1            # [T7] step at which discriminator and adversarial term start; -1: never
    disc_weight: float = 0.1        # [T7] lambda_G, eq. 2
    disc_lr: float = 4e-5           # [T7]
    disc_width: int = 128           # [TiTok]
    lecam_weight: float = 0.001     # [TiTok]
    from_stage1 = property(lambda self: self.stage == 2 and self.init_from != "none")
    def __post_init__(self):
        check_run(self, ema_decay=0, disc_width=1, encoder_lr=0, disc_lr=0, distill_weight=0, disc_weight=0, stage0_steps=1)

PRESETS = {
    # [T7] Stage 2: the encoder learns too, slowly and held by distillation; a discriminator joins late.
    "stage 2": dict(encoder_lr=1e-5, lr=1e-4, end_lr=1e-5, distill_weight=1.0, disc_start=50_000, total_steps=70_000),
    "config internvit_448": dict(batch_size=768, total_steps=45_000),
    "config internvit_448, stage 2": dict(disc_start=30_000, total_steps=60_000),
    "config siglip2_base_256": dict(batch_size=256, micro_batch=32),  # [ours]
    # [ours] Tiny takes minutes, not days: fewer steps, higher rates, other weights, no download.
    "config tiny": dict(batch_size=16, total_steps=1100, lr=2e-3, end_lr=1e-4, warmup_steps=50, beta2=0.95, precision="float32",
        num_workers=0, perceptual="vfm", perceptual_weight=0.005, disc_width=16, log_every=20, eval_every=300, save_every=300),
    "config tiny, stage 2": dict(total_steps=1150, encoder_lr=1e-3, distill_weight=0.05, disc_start=1090, disc_weight=0.001),
}
CARRIED = {f.name for f in fields(TrainConfig) + fields(VQRAEConfig)} - {  # by the next stage: all but what is a stage's own
    "stage", "init_from", "resume", "overwrite", "bench", "profile", "stage0_steps", *PRESETS["stage 2"]}

# ---- Data: a function of seed and position (the count of images seen), the same for any ranks and workers, and when resumed.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

def decode(data):
    """Bytes of any image PIL reads -> upright RGB PIL image; transparency on white, the first frame of an animation."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode == "F" or (image.mode == "I" and image.getextrema()[1] < 256): raise ValueError("pixels of unknown range")
    if image.mode.startswith("I"): image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))  # of 16 bits
    if image.has_transparency_data: image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

def crop(image, size, u=(0.5, 0.5, 1.0), flip=False):
    """A PIL image's largest square, u[0] across and u[1] down -> (3, size, size) uint8; mirrored if `flip` and u[2] < 0.5."""
    side = min(image.size)
    left, top = (round(at * ((n - side) * size // side)) * side / size for n, at in zip(image.size, u))  # whole pixels of `size`
    image = TF.pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)))
    return image.flip(-1) if flip and u[2] < 0.5 else image
@functools.lru_cache(maxsize=2)
def shuffle(n, seed): return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
def shuffled(position, n, seed): return int(shuffle(n, seed + position // n)[position % n])  # each of n once an epoch

class Images(Dataset):
    """Images of a folder or of shards by position, with caption and class. part: "val" is every 20th, "train" all others."""
    def __init__(self, source, size, seed=0, in_order=False, random_crop=False, random_flip=False, part="all", folder="out"):
        self.source, self.size, self.seed, self.in_order = source, size, seed, in_order
        self.random_crop, self.random_flip = random_crop, random_flip
        self.records, self.skipped = self.read(str(source), folder), set()  # folder: for the shards' index; a JSON's pictures
        self.chosen = np.arange(len(self.records))  # numbers, no copies: there may be millions
        if part != "all": self.chosen = self.chosen[(self.chosen % 20 == 0) == (part == "val")]
        if not len(self): raise UserError(f"{source}: no images, or too few to hold every 20th out: --val_data names others")
    def read(self, source, folder): return Shards(source, folder) if source.endswith(".tar") else read_folder(source)
    def __len__(self): return len(self.chosen)
    def record(self, position):
        at = position % len(self) if self.in_order else shuffled(position, len(self), self.seed)
        return self.records[self.chosen[at]]
    def load(self, record, u):
        where = u if self.random_crop else (0.5, 0.5, u[2])
        image = crop(decode(read_bytes(*record["image"])), self.size, where, self.random_flip)
        text = record["text"] if isinstance(record["text"], str) else read_bytes(*record["text"]).decode("utf-8-sig", "replace")
        return dict(image=image, text=text.strip(), label=record["label"], name=record["name"])
    def __getitem__(self, position):
        u, skipped = uniform(self.seed * 1_000_003 + position, 3).tolist(), []
        for record in map(self.record, range(position, position + 2 * len(self))):  # an unreadable image gives way to the next
            try:
                return self.load(record, u) | dict(skipped="\n".join(skipped))
            except Exception as error:  # PIL raises anything on damaged files
                skipped.append(f"{record['name']}: {' '.join(str(error).split())}".partition(" <_io")[0])  # without PIL's address
        raise UserError(f"no readable image in {self.source}: the first is {skipped[0]}")

def read_bytes(path, offset, size): return np.fromfile(path, np.uint8, size, offset=offset).tobytes()  # size -1: to the end
def read_folder(folder):
    """Images below `folder`, sorted; caption and class from metadata.jsonl, else a .txt beside it and its folder's name."""
    folder = Path(folder or "''")  # no name is not the current folder
    if not folder.is_dir(): raise UserError(f"{folder}: no such folder (data is shapes, a folder, or 'shards-{{000..127}}.tar')")
    paths, seen = [], {}
    for where, folders, names in os.walk(folder, followlinks=True, onerror=lambda error: note(f"skipped {error}")):
        folders.sort()  # so that of two links to one folder the same counts everywhere
        if seen.setdefault(os.path.realpath(where), where) != where: folders[:] = names = []  # seen: no files, nothing below
        paths += [Path(where, name) for name in names]
    files = sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files: raise UserError(f"{folder}: no images in it ({' '.join(sorted(IMAGE_SUFFIXES))}); or 'NAME-{{000..127}}.tar'")
    rows, records = {}, []
    for metadata in (path for path in paths if path.name == "metadata.jsonl"):
        for number, line in enumerate(metadata.open(encoding="utf-8-sig", errors="replace"), 1):
            if not line.strip(): continue
            with explained(f"{metadata}, line {number}: not JSON with a file_name and a text: {line[:60]!r}; mend or remove it"):
                row = json.loads(line)
                rows[metadata.parent / row["file_name"]] = row | dict(text=row.get("text") and row["text"].strip())  # or no text
    if lost := sorted({*rows} - {*files}): note(f"metadata.jsonl: {len(lost)} of {len(rows)} rows name no image: {lost[0]}")
    for path in files:
        row, beside = rows.get(path, {}), path.with_suffix(".txt")
        text, label = row.get("text"), row.get("label")
        if text is None: text = (str(beside), 0, -1) if beside.is_file() else ""
        if label is None: label = path.parent.name if path.parent != folder else ""
        records.append(dict(name=str(path), image=(str(path), 0, -1), text=text, label=str(label)))
    return records
def fingerprint(files, *more):  # a hash of files' names, sizes and times
    facts = [(file, os.path.exists(file) and (os.path.getsize(file), os.path.getmtime(file))) for file in files]
    return hashlib.sha256(repr((facts, *more)).encode()).hexdigest()[:16]
def save_array(path, rows): save_checkpoint(path, rows, lambda rows, file: np.save(file, rows))  # whole or not at all

class Shards:
    """Webdataset shards (key.jpg, key.txt) as a sequence of records. Their index is kept, memory-mapped, until one changes."""
    def __init__(self, pattern, index_dir):
        self.paths, errors = [pattern], []
        while match := re.search(r"\{(\d+)\.\.(\d+)\}", self.paths[0]):
            low, high = sorted(map(int, match.groups()))
            numbers = [str(n).zfill(len(match[1])) for n in range(low, high + 1)]
            self.paths = [path.replace(match[0], number, 1) for path in self.paths for number in numbers]
        file = Path(index_dir) / f"index-{fingerprint(self.paths)}.npy"
        if not file.exists():
            rows = [self.listing(path, number, errors) for number, path in enumerate(tqdm(self.paths, "index", unit="tar"))]
            if not any(map(len, rows)):
                raise UserError(f"{pattern}: no readable shard with images; the pattern is like {{000..127}}{''.join(errors)}")
            if errors: print(f"skipped, from the damage on, {len(errors)} of {len(self.paths)} shards{''.join(errors)}")
            file.parent.mkdir(parents=True, exist_ok=True)
            save_array(file, np.concatenate(rows))
        self.rows = np.load(file, mmap_mode="r")
    def listing(self, path, number, errors):
        """-> a row for each image of a shard: its number, offset and size of image and caption, key. Damage goes to `errors`."""
        members, rows = {}, []
        try:
            with tarfile.open(path, "r:") as tar:  # not compressed: offsets are those in the file
                for member in tar:
                    key, suffix = os.path.splitext(member.name)
                    with contextlib.suppress(KeyError): member = tar.getmember(member.linkname) if member.islnk() else member
                    members.setdefault(key, {})[suffix.lower()] = (member.offset_data, member.size)
        except (OSError, tarfile.TarError) as error:
            errors.append(f"; {path}, as an uncompressed tar: {error}")
        for key, parts in members.items():
            images, name = sorted(IMAGE_SUFFIXES & parts.keys()), key.encode("utf-8", "surrogateescape")
            whole = IMAGE_SUFFIXES & members.get(key.rpartition(".")[0], {}).keys()  # key.jpg's key.mask.png is no other picture
            if images and not whole: rows.append((number, *parts[images[0]], *parts.get(".txt", (0, 0)), name))
        return np.array(rows, f"u4, u8, u4, u8, u4, S{max((len(name) for *_, name in rows), default=1)}")
    def __len__(self): return len(self.rows)
    def __getitem__(self, i):
        shard, at, size, text_at, text_size, key = self.rows[i].item()
        path, key = self.paths[shard], key.decode("utf-8", "replace")
        text = (path, text_at, text_size) if text_size else ""
        return dict(name=f"{path}:{key}", image=(path, at, size), text=text, label=Path(key).parent.name)

note = functools.cache(tqdm.write)  # writes a text once, however often it is called with it
def batches(dataset, size, positions, batch, num_workers=0, device="cpu"):
    """Yield dicts: image (batch, 3, size, size; a dataset's own size) in [0, 1] on `device`, text; label, name or scene."""
    if dataset is None:  # shapes, drawn when they are needed
        for index in BatchSampler(positions, batch, drop_last=False):
            scene = plan(torch.tensor(index))
            yield dict(image=resize(render(scene), size).to(device), text=captions(scene), scene=scene)
        return
    loader = DataLoader(dataset, batch, sampler=positions, num_workers=num_workers, worker_init_fn=ignore_signals,
                        pin_memory=torch.device(device).type == "cuda", generator=torch.Generator())  # its own: iter() draws
    for item in loader:
        lines = {line for text in item["skipped"] for line in text.splitlines()}
        for line in lines: note(f"skipped {line}")
        dataset.skipped |= lines
        yield item | dict(image=item["image"].to(device, non_blocking=loader.pin_memory).float().div_(255))  # bytes until here

# ---- Stage 0 (ours): a small ViT learns captions, by SigLIP's sigmoid loss, and what is where; no pixels: it may forget tints.
class Pretrainer(nn.Module):
    def __init__(self, encoder, dim, width=128, words=8192):
        super().__init__()
        self.encoder, self.norm, self.image_head = encoder, nn.LayerNorm(dim), nn.Linear(dim, width)
        self.words = nn.EmbeddingBag(words, width, mode="mean")
        self.text_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.scale, self.bias = nn.Parameter(torch.tensor(math.log(10.0))), nn.Parameter(torch.tensor(-10.0))
        self.segment = nn.ModuleList(nn.Linear(dim, 4 * (len(names) + 1)) for names in (SHAPES, COLORS))  # 2 x 2 cells a patch
        self.place = nn.Linear(dim, 2)
    def embed_text(self, texts):
        """Bag of hashed words and word pairs -> (B, width): enough for short captions, whatever their words."""
        bags = []
        for text in texts:
            words = ["", *text.lower().split()]  # "": no bag is empty
            pairs = map(" ".join, zip(words, words[1:]))
            ids = [zlib.crc32(word.encode()) % self.words.num_embeddings for word in (*words, *pairs)]
            bags.append(self.words(torch.tensor([ids], device=self.bias.device)))  # (1, width)
        return self.text_head(torch.cat(bags))
    def forward(self, images, texts, scene):
        z = self.norm(self.encoder(images))                                # (B, N, d)
        image = F.normalize(self.image_head(z.mean(1)), dim=-1)            # (B, width)
        text = F.normalize(self.embed_text(texts), dim=-1)                 # (B, width)
        logits = self.scale.exp() * image @ text.T + self.bias             # (B, B)
        sign = torch.tensor([[1.0 if a == b else -1.0 for b in texts] for a in texts], device=z.device)  # equal ones match too
        losses = dict(sigmoid=-F.logsigmoid(sign * logits).sum(1).mean() / 10)  # about as large as the others
        shape, color, middle = (t.to(z.device) for t in segments(scene, math.isqrt(z.shape[1])))  # (B, N, 4) twice, (B, N, 4, 2)
        for head, name, target in zip(self.segment, ("shape", "color"), (shape, color)):
            losses[name] = F.cross_entropy(head(z).unflatten(-1, (4, -1)).flatten(0, 2), target.flatten())
        return losses | dict(place=0.3 * (self.place(z)[:, :, None] - middle)[shape > 0].abs().mean())  # shape 0: background

def pretrain(config, model_config, device, path):  # stage 0 -> path; always on shapes: README, "Stage 0 and your own images"
    torch.manual_seed(config.seed)
    net = Pretrainer(Encoder(model_config), model_config.dim).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(config.beta1, config.beta2), weight_decay=0.05)
    stream = batches(None, model_config.image_size, range(16 * config.stage0_steps), 16, device=device)
    for step, batch in enumerate(bar := tqdm(stream, "stage 0", config.stage0_steps, unit="step")):
        optimizer.param_groups[0]["lr"] = 2e-3 * lr_factor(step, 30, config.stage0_steps, 0.01)
        losses = net(batch["image"], batch["text"], batch["scene"])
        values = {name: loss.item() for name, loss in losses.items()}
        check_finite(values, step, "try another --seed")
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), config.clip)
        optimizer.step()
        bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
    save_checkpoint(path, dict(encoder=net.encoder.vit.state_dict(), model_config=asdict(model_config)))

# ---- Stages 1 and 2 -------------------------------------------------------------------------------------------------
def parameter_groups(model, discriminator, config):
    """Encoder and discriminator have rates of their own; the latter starts late. Weight decay is for matrices alone."""
    rates = dict(encoder=config.encoder_lr, discriminator=config.disc_lr)
    for part, module in (*model.named_children(), ("discriminator", discriminator or nn.Module())):
        for decays in (True, False):
            params = [p for name, p in module.named_parameters()
                      if p.requires_grad and decays == (p.ndim > 1 and not name.endswith(("embed", "token")))]  # position, class
            if params: yield dict(params=params, base_lr=rates.get(part, config.lr), weight_decay=config.weight_decay * decays,
                                  start=config.disc_start if part == "discriminator" else 0)

def encoder_source(config, model_config, resumed):
    """Where the VFM's weights are: a file, "stage0" or "random". None: in stage 1's checkpoint."""
    if config.bench or resumed: return "random"  # speed does not depend on them; a resumed run's are in its own checkpoint
    if config.from_stage1: return None
    if model_config.encoder_weights in ("stage0", "random"): return model_config.encoder_weights
    with torch.device("meta"): return weights_file(Encoder(model_config), model_config.encoder_weights)

def starting_point(config, model_config, ranks, source):
    """The model as its stage begins, from encoder_source's source; and the frozen teacher T."""
    run = Path(config.out_dir if config.init_from in ("", "none") else config.init_from)
    with ranks.device: model = VQRAE(model_config)  # there: a CPU needs half a minute for random weights
    if source == "stage0":
        source = run / "stage0.pt"
        if not source.exists() and run != Path(config.out_dir):
            raise UserError(f"no {source}: --init_from names a run that has one")
        with ranks.first_alone():
            if source.exists(): ranks.say(f"encoder from {source}; --stage 0 --overwrite makes another in {config.out_dir}")
            else: pretrain(config, model_config, ranks.device, source)
        there = load_checkpoint(source, "encoder", "model_config")["model_config"]
        here = {name: getattr(model_config, name) for name in ("encoder", "encoder_kwargs", "patch_size", "dim")}
        check_same(there, here, f"{source} is of another encoder, choose another --out_dir")
    if source is None:
        path = run / "stage1.pt"
        if not path.exists():
            command = next_command("train_tokenizer.py", config, CARRIED, out_dir=config.init_from or False)
            raise UserError(f"stage 2 starts from {path}, which is not there: run `{command}` first, or pass --init_from")
        stage1 = load_checkpoint(path, "step", "config", "model_config", "ema")
        check_same(asdict(VQRAEConfig()) | stage1["model_config"], asdict(model_config), f"{path} is of another model")
        if stage1["config"]["encoder_lr"]: raise UserError(f"{path} moved its encoder, the teacher: train it with --encoder_lr 0")
        ranks.say(f"from step {stage1['step']} of {stage1['config']['total_steps']} in {path}")
        model.load_state_dict(stage1["ema"])
    elif source != "random": load_encoder_weights(model.encoder, source)
    return model, copy.deepcopy(model.encoder).requires_grad_(False).eval()  # before anything moves

@torch.no_grad()
def start_bottleneck(model, config, dataset):
    """Start to_code and codes on this data's own features and pixels; on rank 0 alone: DDP copies them to the others."""
    p, k, Z_I, pixels, device = model.config.patch_size, model.config.codebook_size, [], [], model.from_code.weight.device
    patches = min(128 * k, max(32 * k, 1 << 19))  # half a million, but 32 to 128 a code
    positions = range(max(64, patches // model.config.num_tokens))
    for batch in batches(dataset, model.config.image_size, positions, min(64, config.batch_size), config.num_workers, device):
        X = resize(batch["image"], model.config.image_size)
        Z_I.append(model.encode(X).flatten(0, 1))  # (B N, d)
        pixels.append(F.unfold(X, p, stride=p).transpose(1, 2).unflatten(2, (3, -1)).flatten(0, 1))  # (B N, 3, p p)
    print(f"the bottleneck starts on {len(positions)} pictures, which takes a while for many codes", flush=True)
    model.start_on(torch.cat(Z_I), torch.cat(pixels))

def as_file(images): return (full(images).clamp(0, 1) * 255).round() / 255  # in [0, 1], in a picture file's 8 bits
def psnr(x, y):  # (B, 3, H, W) in [0, 1], both rounded to 8 bits -> (B,) dB
    return -10 * (as_file(x) - as_file(y)).square().mean((1, 2, 3)).clamp(min=1e-10).log10()
def code_usage(counts):
    """How often each code was used (k,) -> share of codes in use, effective number of codes, entropy of a token in bits."""
    entropy = torch.special.entr(counts / counts.sum().clamp(min=1)).sum()
    return (counts > 0).float().mean().item(), entropy.exp().item(), entropy.item() / math.log(2)

@torch.no_grad()
def validate(model, dataset, config, device, path):
    """-> mean PSNR of val_images images, share of codes they use. Draws originals over reconstructions -> path."""
    psnrs, used, n = [], torch.zeros(model.config.codebook_size, dtype=torch.bool), config.val_images
    positions = range(VALIDATION, VALIDATION + n) if dataset is None else shuffle(len(dataset), 0)[:n].tolist()  # of all folders
    for batch in batches(dataset, model.config.image_size, positions, 32, device=device):
        X_hat, _, indices, _ = model(resize(batch["image"], model.config.image_size))
        X = resize(batch["image"], model.config.output_size)
        if not psnrs: save_image(torch.cat([F.pad(X, (0, 0, 0, 2)), X_hat.clamp(0, 1)], 2)[:16], path)  # 8 a row
        psnrs.append(psnr(X_hat, X))
        if indices is not None: used[indices.flatten().cpu()] = True
    return torch.cat(psnrs).mean().item(), used.float().mean().item()

def train(config, model_config, ranks):
    out, device, start = Path(config.out_dir), ranks.device, time.time()
    path, pictures = out / f"stage{config.stage}.pt", out / f"recon_stage{config.stage}.png"
    resumed = open_run(path, config, ranks)  # its checkpoint, or None
    if resumed: check_same(resumed["model_config"], asdict(model_config), f"{path} is of another model")
    local, micro, accumulate = split_batch(config, ranks)
    native, size, val_source = model_config.image_size, model_config.output_size, config.val_data or config.data
    hold_out = config.data != "shapes" and not config.val_data
    train_part, val_part = ("train", "val") if hold_out else ("all", "all")
    with ranks.first_alone():
        read = functools.partial(Images, size=max(native, size), folder=out)
        data = None if config.data == "shapes" else read(config.data, seed=config.seed, part=train_part,
                                                         random_crop=config.random_crop, random_flip=config.random_flip)
        val_data = None if val_source == "shapes" else read(val_source, in_order=True, part=val_part)
        for images in filter(None, (data, val_data)): images[0]  # raises if none is readable, before old runs are deleted
        source = encoder_source(config, model_config, resumed)  # a missing file is told before weights are made
        kind = config.perceptual
        perceptual = None if kind == "none" else PerceptualLoss(kind, config.lpips_weights, config.convnext_weights)
    torch.manual_seed(config.seed)
    model, teacher = starting_point(config, model_config, ranks, source)
    if perceptual: perceptual.vfm = teacher
    torch.manual_seed(config.seed)  # again: the same whether stage 0 ran just now or not
    discriminator = Discriminator(config.disc_width) if config.disc_start >= 0 else None
    frozen = config.encoder_lr == 0
    model.encoder.requires_grad_(not frozen)
    if ranks.first and config.bottleneck_start == "data" and not (config.from_stage1 or resumed or config.bench):
        start_bottleneck(model, config, data)
    dtype = torch.float64 if config.precision == "float64" else None  # None: as it is
    nn.ModuleList(filter(None, (model, teacher, perceptual, discriminator))).to(device, dtype)
    nn.ModuleList(filter(None, (perceptual, discriminator))).to(memory_format=torch.channels_last)  # faster convolutions
    ema = copy.deepcopy(model).requires_grad_(False).eval()  # its weights, `averaged`, follow those that are `learned`
    averaged, learned = zip(*[(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad])
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32
    for part in (model.encoder, model.decoder): part.vit.set_grad_checkpointing(config.checkpointing)
    if config.compile: compile_parts(model, teacher, perceptual, discriminator)
    groups = [*parameter_groups(model, discriminator, config)]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=device.type != "mps")
    parts = dict(model=model, ema=ema, teacher=teacher, optimizer=optimizer, discriminator=discriminator)
    first_step = 0
    if resumed:
        first_step, old_lr = resumed["step"], resumed["config"]["encoder_lr"]
        if (old_lr == 0) != frozen: raise UserError(f"{path} had --encoder_lr {old_lr}: go on with that, or --overwrite it")
        old, new = resumed["optimizer"]["param_groups"], optimizer.state_dict()["param_groups"]  # rates are this run's
        resumed["optimizer"]["param_groups"] = [b | dict(params=a["params"]) for a, b in zip(old, new)] + new[len(old):]
        with explained(f"{path} does not fit these flags"):  # another --disc_width
            for name, part in parts.items():
                if part and resumed[name]: part.load_state_dict(resumed[name])
        torch.set_rng_state(resumed["rng"])
        del resumed  # it holds as much as model and optimiser
    net, d_net = ranks.ddp(model), discriminator and ranks.ddp(discriminator)
    counts = torch.zeros(model_config.codebook_size, device=device)  # each code's uses since the last log line
    steps = range(first_step, config.total_steps)
    positions = (step * config.batch_size + ranks.rank * local + i for step in steps for i in range(local))
    stream = batches(data, native, positions, micro, config.num_workers, device)
    bar = tqdm(range(first_step, config.total_steps + 1), f"stage {config.stage}", config.total_steps, initial=first_step,
               unit="step", disable=not ranks.first)  # the last round only validates and saves
    loss_weights = dict(perceptual=config.perceptual_weight, distill=config.distill_weight, adversarial=config.disc_weight)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    loss_amp = torch.autocast(device.type, torch.bfloat16, enabled=config.loss_precision == "bf16")
    stop, floor = False, config.end_lr / config.lr
    if config.bench:
        called = dict(model.named_children(), teacher=teacher, perceptual=perceptual, discriminator=discriminator)
        stream, timed = itertools.repeat(next(stream)), bench(config, ranks, called)
    else: ranks.begin([path] if config.overwrite else [])
    log = Log(out / f"log_stage{config.stage}.jsonl", first_step, config, ranks.first and not config.bench)
    for step in bar:
        if config.bench and next(timed): return  # False: one more step
        # Once in a while: save, validate, draw.
        last = step == config.total_steps  # a round without a step
        if ranks.first and step > first_step and (stop or due(step, config.save_every, config)):
            state = {name: part and part.state_dict() for name, part in parts.items()}
            state |= dict(step=step, rng=torch.get_rng_state(), config=asdict(config), model_config=asdict(model_config))
            save_checkpoint(path, state)
        if ranks.first and due(step, config.eval_every, config):
            val_psnr, val_usage = validate(ema, val_data, config, device, pictures)
            log(step=step, val_psnr=val_psnr, **(dict(val_codebook_usage=val_usage) if model.quantizer else {}))
        if last or stop: break
        # ---- One training step --------------------------------------------------------------------------------------
        factor = lambda since: lr_factor(max(0, step - since), config.warmup_steps, config.total_steps - since, floor)
        for group in optimizer.param_groups: group["lr"] = group["base_lr"] * factor(group["start"])  # D's warmup: at disc_start
        adversarial = 0 <= config.disc_start <= step
        logged = {}
        for i in range(accumulate):
            net.require_backward_grad_sync = i == accumulate - 1       # DDP averages gradients: once a step is enough
            X = next(stream)["image"].to(dtype=dtype)                  # as read, in the larger of the two sizes
            images, X = resize(X, native), resize(X, size)             # (b, 3, h, w) to see, (b, 3, H, W) to rebuild
            with amp: X_hat, Z_I, indices, vq_loss = net(images)       # (b, 3, H, W), (b, N, d), (b, N), ()
            X_hat = full(X_hat)                                        # not in bf16
            terms = dict(l2=F.mse_loss(X_hat, X), quant=vq_loss)       # eq. 2, 3
            if perceptual:
                with loss_amp: terms["perceptual"] = perceptual(X, X_hat)
            if config.distill_weight and not frozen:
                with torch.no_grad(), amp: T_X = teacher(images)       # (b, N, d)
                terms["distill"] = distill_loss(Z_I, T_X)              # eq. 5
            if adversarial:
                discriminator.requires_grad_(False)                    # only X_hat gets its gradient, no weight: so no DDP
                with loss_amp: terms["adversarial"] = -full(discriminator(X_hat)).mean()
            loss = sum(loss_weights.get(name, 1) * term for name, term in terms.items())  # eq. 4, 6; l2, quant: 1
            (loss / accumulate).backward()
            if adversarial:
                discriminator.requires_grad_(True)                     # now it learns, by a backward pass of its own
                d_net.require_backward_grad_sync = net.require_backward_grad_sync
                with loss_amp: real, fake = full(d_net(torch.cat([X, X_hat.detach()]))).chunk(2)  # (b, 1, 16, 16) each
                real_mean, fake_mean = ranks.mean_with_grad(real.mean()), ranks.mean_with_grad(fake.mean())
                terms |= dict(discriminator=hinge_d_loss(real, fake), real_logit=real_mean, fake_logit=fake_mean)
                terms["lecam"] = lecam(real_mean, fake_mean, *discriminator.means)
                ((terms["discriminator"] + config.lecam_weight * terms["lecam"]) / accumulate).backward()
            terms["loss"] = loss
            for name, term in terms.items(): logged[name] = logged.get(name, 0) + full(term.detach()) / accumulate
            if indices is not None:  # bincount would wait for the GPU
                counts.index_add_(0, indices.flatten(), torch.ones(indices.numel(), device=device))
        logged["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        if adversarial: logged["disc_grad_norm"] = nn.utils.clip_grad_norm_(discriminator.parameters(), config.clip)
        if adversarial: discriminator.means.lerp_(torch.stack([logged["real_logit"], logged["fake_logit"]]), 0.001)  # [TiTok]
        logged["stop"] = loss.new_full((), ranks.stop_asked)  # one rank asked to stop stops all, in the same step
        means = ranks.sum(torch.stack([*logged.values()])) / ranks.size
        optimizer.step()
        optimizer.zero_grad(set_to_none=ranks.size == 1)  # DDP's buckets hold gradients: None would double them
        decay = min(config.ema_decay, (1 + step) / (10 + step))  # a short memory at first
        get_ema_multi_avg_fn(decay)(averaged, learned, None)
        for kept, buffer in zip(ema.buffers(), model.buffers()): kept.copy_(buffer)  # none changes here: for those who fork
        logged = dict(zip(logged, means.tolist()))  # waits for the GPU, all work queued
        check_finite(logged, f"{step} (images {step * config.batch_size} to {(step + 1) * config.batch_size - 1})")
        stop = logged.pop("stop") > 0
        # -------------------------------------------------------------------------------------------------------------
        if (step + 1) % config.log_every == 0:
            usage, perplexity, _ = code_usage(ranks.sum(counts))
            counts.zero_()
            codes = dict(codebook_usage=usage, perplexity=perplexity) if model.quantizer else {}
            rate, skipped = config.batch_size * (bar.format_dict["rate"] or 0), len(data.skipped if data else ())
            log(step=step + 1, **logged, lr=config.lr * factor(0), images_per_s=rate, **codes, skipped=skipped)
            PSNR, shown = -10 * math.log10(logged["l2"]), f"codes {usage:.0%}, " if codes else ""
            bar.set_postfix_str(f"loss {logged['loss']:.4f}, PSNR {PSNR:.1f}, {shown}{rate:.0f} images/s")
            if ranks.first and codes and usage < 0.1 and step > config.warmup_steps:
                note("warning: under 10% of the codes are in use. Try more --warmup_steps or a lower --lr")
    if ranks.first and last:  # save the tokenizer, tell what comes next
        folder, newest = out / f"tokenizer-stage{config.stage}", out / "tokenizer"
        save_tokenizer(ema.float(), folder, None if model_config.encoder_weights == "hub" else teacher)
        if newest.is_dir() and not newest.is_symlink(): newest.rename(f"{newest}-{start:.0f}")  # some copies follow the link
        if not newest.exists() or newest.stat().st_mtime < path.stat().st_mtime:  # else a finished stage was resumed
            newest.unlink(missing_ok=True)
            try: newest.symlink_to(folder.name)
            except OSError: shutil.copytree(folder, newest)  # no links here: a copy; an older one was moved aside
        report({"stage": config.stage, "validation PSNR": f"{val_psnr:.2f} dB",
                "validation codebook use": ema.quantizer and f"{val_usage:.1%} of {model_config.codebook_size} codes",
                "time": f"{(time.time() - start) / 60:.1f} minutes", "pictures": pictures, "tokenizer": folder,
                "unreadable images": sum(len(images.skipped) for images in (data, val_data) if images)})
        how = dict(data=val_source, out_dir=out, part=hold_out and "val")
        if config.stage == 2: then = next_command("eval.py", config, {"device", "lpips_weights"}, **how)
        else: then = next_command("train_tokenizer.py", config, CARRIED, stage=2, overwrite=(out / "stage2.pt").exists())
        print("\nNext:", then)
    ranks.wait()
    if not last: ranks.end_early(step, config)

def main():
    config, model_config, origin = parse_config(TrainConfig, PRESETS, VQRAEConfig)
    ranks = Ranks(config.device)
    if ranks.first: print_config(origin, config, model_config)
    path = Path(config.out_dir) / "stage0.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if config.stage > 0: return train(config, model_config, ranks)
    if config.bench or config.resume: raise UserError("--bench and --resume are for stages 1 and 2: stage 0 starts over")
    if model_config.encoder_weights != "stage0": raise UserError("stage 0 is for --encoder_weights stage0 alone")
    if path.exists() and not config.overwrite: raise UserError(f"{path} exists: --overwrite makes it anew")
    if ranks.first: pretrain(config, model_config, ranks.device, path)
    then = next_command("train_tokenizer.py", config, CARRIED, overwrite=path.with_name("stage1.pt").exists())
    ranks.say(f"wrote {path}\nNext: {then}")

# ---- The shapes world: 64 x 64 pictures of one to four objects, drawn by the thousand a second. Picture i is a function of i
# alone. From VALIDATION on they are for validation, and only there do HELD_OUT pairs of shape and colour appear.
VALIDATION = 1 << 40
SIDE, WINDOW, EXTENT = 64, 30, 1.3  # pixels a picture; pixels a window that holds any one object; half of ATLAS's side in radii
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {"red": (0.86, 0.16, 0.16), "orange": (0.98, 0.56, 0.10), "yellow": (0.98, 0.88, 0.20), "green": (0.20, 0.65, 0.25),
          "cyan": (0.20, 0.80, 0.85), "blue": (0.16, 0.32, 0.86), "purple": (0.55, 0.20, 0.72), "pink": (0.98, 0.50, 0.75)}
PALETTE = torch.tensor(list(COLORS.values()))
HELD_OUT = (torch.arange(6)[:, None] + 3) % 8 == torch.arange(8)  # (shape, color): green circle, cyan square, ...
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "scene")  # GenEval's six, and one more
MIX = torch.tensor([0, 0, 1, 2, 2, 3, 4, 4, 4, 5, 5, 6, 6, 6, 6, 6])  # of TASKS: more where words must find their object
RELATIONS, NUMBERS = ("left of", "right of", "above", "below"), ("zero", "one", "two", "three", "four")
PLURAL = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}

class Scene(collections.namedtuple("Scene", "task count relation shape color x y radius angle rgb background slope")):
    """What is in B pictures; objects in four places of which the first `count` are taken. Tensors:
    task (B,) index into TASKS; count (B,) 1 to 4; relation (B,) index into RELATIONS, of a position task's first two objects;
    shape, color (B, 4) indices into SHAPES, COLORS; x, y, radius (B, 4) pixels; angle (B, 4) radians;
    rgb (B, 4, 3) each object's own tint; background (B, 3) RGB at the centre; slope (B, 2) its change across and down."""
    present = property(lambda self: torch.arange(4) < self.count[:, None])  # (B, 4) bool

def hashed(index, n):
    """(B,) int64 -> (B, n) numbers in [0, 1), by the splitmix64 hash of (index, column)."""
    x = index.numpy()[:, None].astype(np.uint64) * 0x9E3779B97F4A7C15 + np.arange(1, n + 1, dtype=np.uint64) * 0xD1B54A32D192ED03
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)): x = (x ^ (x >> shift)) * factor
    return torch.from_numpy((x >> 40).astype(np.float32)) / (1 << 24)

def plan(index, task=None):
    """Picture numbers (B,) int64 -> Scene. task: an index into TASKS, or one each (B,), to have that and no other."""
    u = hashed(index, 48)  # (B, 48), a choice each
    task = MIX[(u[:, 0] * len(MIX)).long()] if task is None else torch.as_tensor(task).expand_as(index)
    counting, position = ((task == TASKS.index(name))[:, None] for name in ("counting", "position"))  # (B, 1)
    least, choices = torch.tensor([[1, 2, 2, 1, 2, 2, 3], [1, 1, 3, 1, 1, 1, 2]])[:, task]  # of objects
    count = least + (u[:, 1] * choices).long()
    shape, color = u[:, 2:8].argsort(1)[:, :4], u[:, 8:16].argsort(1)[:, :4]  # (B, 4): all different in a picture,
    shape, color = (torch.where(counting, kind[:, :1], kind) for kind in (shape, color))  # but all alike for counting
    color = torch.where(HELD_OUT[shape, color] & (index < VALIDATION)[:, None], (color + 1) % 8, color)  # none in training
    relation = (u[:, 1] * 4).long()
    cells = u[:, 16:20].argsort(1)  # (B, 4) quadrants: 0 1 over 2 3,
    cells = torch.where(torch.arange(4) < count[:, None], cells, cells + 4).sort(1).values % 4  # the taken first, as one reads
    pairs = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 0], [2, 3], [3, 2], [1, 3], [3, 1]])  # first, second by relation
    cells[:, :2] = torch.where(position, pairs[relation + 4 * (u[:, 20] < 0.5)], cells[:, :2])
    radius = 10 + 2 * u[:, 21:25]
    room = 13 - radius  # objects never touch each other or the edge
    x = 16 + 32 * (cells % 2) + room * (2 * u[:, 25:29] - 1)
    y = 16 + 32 * (cells // 2) + room * (2 * u[:, 29:33] - 1)
    rgb = (PALETTE[color] * (0.98 + 0.04 * u[:, 37:41, None])).clamp(max=1)
    background = 0.80 + 0.12 * u[:, 41:42] + 0.02 * (u[:, 42:45] - 0.5)  # greyish, so that every object stands out
    angle, slope = 0.1 * u[:, 33:37] - 0.05, 0.06 * (u[:, 45:47] - 0.5)
    return Scene(task, count, relation, shape, color, x, y, radius, angle, rgb, background, slope)

def article(thing): return f"{'an' if thing[0] == 'o' else 'a'} {thing}"
def captions(scene):
    """Scene -> B captions in GenEval's wording, without its "a photo of"."""
    out = []
    for task, n, relation, shapes, colors in zip(*(column.tolist() for column in scene[:5])):
        plain = TASKS[task] in ("single_object", "two_object")
        things = [article(SHAPES[s] if plain else f"{list(COLORS)[c]} {SHAPES[s]}") for s, c in zip(shapes[:n], colors)]
        if TASKS[task] == "counting": out.append(f"{NUMBERS[n]} {PLURAL[SHAPES[shapes[0]]]}")
        elif TASKS[task] == "position": out.append(f"{things[0]} {RELATIONS[relation]} {things[1]}")
        else: out.append(", ".join(things[:-1]) + (" and " if n > 1 else "") + things[-1])
    return out

def draw_atlas(side=64):
    """(6, 1, side, side): how far inside each shape's outline a point lies, in radii; negative outside."""
    y, x = torch.meshgrid(*[torch.linspace(-EXTENT, EXTENT, side)] * 2, indexing="ij")
    r, angle = x.hypot(y), torch.atan2(x, -y)  # from straight up
    off = lambda n: angle % (2 * math.pi / n) - math.pi / n  # from the middle of a regular n-gon's side
    bar = lambda a, b: torch.minimum(0.33 - a.abs(), 1 - b.abs())
    tip, a, b = 1.15, 0.5 * math.cos(math.pi / 5), 0.5 * math.sin(math.pi / 5)  # a star's side runs from (tip, 0) to (a, b)
    beside = math.pi / 5 - off(5).abs()  # angle to the nearest tip
    star = (b * (tip - r * beside.cos()) - (tip - a) * r * beside.sin()) / math.hypot(tip - a, b)
    return torch.stack([0.93 - r, 0.84 - torch.maximum(x.abs(), y.abs()), 0.56 - r * off(3).cos(), star,
                        torch.maximum(bar(x, y), bar(y, x)), 0.22 - (r - 0.78).abs()])[:, None]
ATLAS = draw_atlas()
PIXELS = torch.cartesian_prod(torch.arange(WINDOW) + 0.5, torch.arange(WINDOW) + 0.5).flip(1)  # (W W, 2): x, y
def masks(shape, x, y, radius, angle):
    """M objects, (M,) each -> coverage (M, WINDOW, WINDOW) in [0, 1], its rows (M, WINDOW, 1) and columns (M, 1, WINDOW)."""
    left, top = ((c - WINDOW / 2).round().clamp(0, SIDE - WINDOW) for c in (x, y))
    cos, sin = angle.cos() / radius / EXTENT, angle.sin() / radius / EXTENT
    turn = torch.stack([cos, -sin, sin, cos], -1).view(-1, 2, 2)
    center = torch.stack([x - left, y - top], -1)[:, None]  # (M, 1, 2)
    grid = torch.baddbmm(-center @ turn, PIXELS.expand(len(x), -1, -1), turn)  # (M, W W, 2): where in the atlas each pixel lies
    distance = F.grid_sample(ATLAS[shape], grid.view(-1, WINDOW, WINDOW, 2), padding_mode="border", align_corners=True)[:, 0]
    rows, columns = (torch.arange(WINDOW) + corner.long()[:, None] for corner in (top, left))
    return distance.mul_(radius[:, None, None]).add_(0.5).clamp_(0, 1), rows[:, :, None], columns[:, None]

def draw_layers(scene):
    """Scene -> (B, 6, 64, 64): how much of each pixel four objects and the background cover, and the background's slope there."""
    b, k = scene.present.nonzero(as_tuple=True)
    cover, rows, columns = masks(*(t[b, k] for t in (scene.shape, scene.x, scene.y, scene.radius, scene.angle)))
    layers = torch.zeros(len(scene.count), 6, SIDE, SIDE)
    layers[b[:, None, None], k[:, None, None], rows, columns] = cover
    layers[:, 4] = 1 - layers[:, :4].sum(1)
    at = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    layers[:, 5] = layers[:, 4] * (scene.slope[:, 0, None, None] * at + scene.slope[:, 1, None, None] * at[:, None])
    return layers
def render(scene):
    """Scene -> images (B, 3, 64, 64) in [0, 1]."""
    layers = draw_layers(scene)
    rgb = torch.cat([scene.rgb, scene.background[:, None], torch.ones(len(layers), 1, 3)], 1)  # (B, 6, 3)
    return (rgb.transpose(1, 2) @ layers.flatten(2)).view(-1, 3, SIDE, SIDE).clamp_(0, 1)

def segments(scene, grid):
    """In the 2 x 2 cells of N = grid^2 patches: shape, color (B, N, 4), 0 or index + 1; middle (B, N, 4, 2) in [-1, 1]."""
    cells = F.interpolate(draw_layers(scene)[:, :4], size=2 * grid, mode="area")  # (B, 4, 2 grid, 2 grid)
    cover, who = F.unfold(cells, 2, stride=2).unflatten(1, (4, 4)).transpose(2, 3).max(1)  # (B, N, 4)
    shape, color, x, y = (what.gather(1, who.flatten(1)).view_as(who) for what in (scene.shape, scene.color, scene.x, scene.y))
    return (shape + 1) * (cover > 0.5), (color + 1) * (cover > 0.5), torch.stack([x, y], -1) / 32 - 1

if __name__ == "__main__": command_line(main)
