"""
Train the generator: a language model that writes pictures in the tokenizer's codes (section 3.5, Table 9).

    python train_ar.py                              tiny: a small random Qwen3 on drawn shapes, after train_tokenizer.py. CPU
    torchrun --nproc_per_node=8 train_ar.py --config internvit_448 --data 'FOLDER or shards-{000..127}.tar' --micro_batch 8
    ... --lm FOLDER                                 a local copy of Qwen3-0.6B
    ... --resume                                    go on after a stop, bit for bit

A picture with its caption is one sequence. What is left of it is padding, what is right of it ends the picture:

    <pad> ... <pad>  a red circle  <|vision_start|>  v_1 v_2 ... v_N  <|vision_end|>         v = code + offset
                     caption       BOI               row by row       EOI
                                   |------ predict ------|           the loss is on v_1 ... v_N alone

Without a caption a sequence begins at BOI: that is the unconditional prompt of classifier-free guidance, which training
makes of one caption in ten. EOI is there for whatever may follow a picture; N is fixed, so nothing has to predict it.

In reading order: the configuration on one screen, language model and layout, codes computed once, training.
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torchvision.utils import make_grid, save_image
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from train_tokenizer import VALIDATION, Images, batches, captions, lr_factor, plan, uniforms
from vqrae import (Log, Ranks, UserError, check_finite, command_line, hub_file, load_tokenizer, open_run, parse_config, print_config,
                   resume_command, save_checkpoint, split_batch)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# ---- Configuration. Defaults are the paper's generator. Sources: [T9] the paper's Table 9, [LlamaGen], [ours].

@dataclass
class ARConfig:
    config: Literal["tiny", "siglip2_base_256", "siglip2_256", "siglip2_512", "internvit_448"] = "tiny"  # whose presets and run folder
    data: str = "shapes"                  # shapes, a folder of captioned images, or 'shards-{000..127}.tar'
    val_data: str = ""                    # the same for validation; "": every 20th image of the data is held out
    out_dir: str = ""                     # the run's folder; "": out/CONFIG
    tokenizer: str = ""                   # folder of the VQRAE tokenizer; "": out_dir/tokenizer
    resume: bool = False                  # go on from the last checkpoint
    overwrite: bool = False               # start over although there is a checkpoint
    overwrite_cache: bool = False         # compute the codes of --data again although they are cached
    device: str = ""                      # cuda, mps or cpu; "": the first of them that is there
    precision: Literal["bf16", "float32", "float64"] = "bf16"  # [T9] autocast; weights and loss stay float32
    seed: int = 0                         # of weights, order and dropped captions
    # model
    lm: str = "Qwen/Qwen3-0.6B"           # [T9] a Qwen3 with its text tokenizer, by hub name or local folder; or random
    lm_config: dict = None                # what Qwen3Config is made of for --lm random, whose words are those of the captions
    max_length: int = 1536                # [T9] tokens of caption and picture; longer captions are cut
    # data
    batch_size: int = 512                 # [T9] images a step, over all ranks and accumulation
    micro_batch: int = 0                  # images a rank takes at a time, the rest by accumulation; 0: all at once
    num_workers: int = 8                  # decoding processes a rank, while codes are computed
    caption_drop: float = 0.1             # [LlamaGen] share of captions left out, for guidance
    # optimisation
    total_steps: int = 100_000            # [ours] the paper gives none
    lr: float = 1e-4                      # [T9]
    end_lr: float = 1e-4                  # [T9] equal to lr: constant after the warmup; lower: cosine
    warmup_steps: int = 4000              # [T9]
    beta1: float = 0.9                    # [T9]
    beta2: float = 0.999                  # [T9]
    eps: float = 1e-15                    # [T9]
    weight_decay: float = 0.0             # [T9]
    clip: float = 1.0                     # [T9] gradient norm
    # once in a while
    log_every: int = 50                   # [ours] steps
    eval_every: int = 2500                # [ours] validation loss and a grid of samples
    save_every: int = 2500                # [ours]
    val_images: int = 256                 # [ours] images a validation

    def __post_init__(self):
        self.out_dir = self.out_dir or f"out/{self.config}"
        self.tokenizer = self.tokenizer or f"{self.out_dir}/tokenizer"
        for name in ("batch_size", "total_steps", "log_every", "eval_every", "save_every", "val_images"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is at least 1, not {getattr(self, name)}")
        if not 0 <= self.caption_drop <= 1:
            raise UserError(f"--caption_drop is a share between 0 and 1, not {self.caption_drop}")
        if self.resume and self.overwrite:
            raise UserError("--resume goes on and --overwrite starts over: choose one")

PRESETS = {
    "siglip2_base_256": dict(batch_size=128, micro_batch=16),                                                                        # [ours]
    "tiny": dict(lm="random", max_length=128, precision="float32", batch_size=16, num_workers=0, total_steps=1250, lr=4e-3,          # [ours]
                 end_lr=1e-4, warmup_steps=50, log_every=20, eval_every=500, save_every=500,
                 lm_config=dict(hidden_size=192, num_hidden_layers=4, intermediate_size=512, num_attention_heads=4, head_dim=48,
                                num_key_value_heads=4, tie_word_embeddings=True, initializer_range=0.05)),
}

# ---- Language model and layout. What sets ours apart from any other Qwen3 is written in its config as `visual`:
# offset and codes (the ids offset ... offset + codes - 1 are pictures), tokens (N), boi, eoi, max_length, and which tokenizer.

BOI, EOI = "<|vision_start|>", "<|vision_end|>"   # Qwen3's own names; other text tokenizers are given them
PAD, UNKNOWN = "<pad>", "<unk>"

def identity(folder):
    """What tells one trained tokenizer from another: a hash of its weights."""
    with open(Path(folder) / "model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]

def word_tokenizer(texts):
    """A text tokenizer of the words and punctuation marks in `texts`, in lower case."""
    split, lower = tokenizers.pre_tokenizers.Whitespace(), tokenizers.normalizers.Lowercase()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(lower.normalize_str(text))})
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate([PAD, UNKNOWN, *words])}, UNKNOWN))
    model.pre_tokenizer, model.normalizer = split, lower
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token=PAD, unk_token=UNKNOWN)

def build_lm(config, texts):
    """The language model as it was before pictures, in float32, and its text tokenizer."""
    if config.lm == "random":
        text_tokenizer = word_tokenizer(texts)
        strange = set(config.lm_config or {"nothing": 0}) - set(Qwen3Config().to_dict())      # it would take any name in silence
        if strange:
            raise UserError(f"--lm random needs --lm_config as JSON of Qwen3Config's values, which has no {', '.join(strange)}")
        return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(text_tokenizer), **config.lm_config)), text_tokenizer
    if not Path(config.lm).is_dir():                                          # fails within seconds where there is no network
        hub_file(config.lm, "config.json", f"run `hf download {config.lm}` there, and pass its folder with --lm FOLDER")
    try:
        lm = AutoModelForCausalLM.from_pretrained(config.lm, dtype=torch.float32)     # transformers would keep the saved bfloat16
        return lm, AutoTokenizer.from_pretrained(config.lm)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the language model {config.lm}: {' '.join(str(error).split())[:200]}") from error

@torch.no_grad()
def grow_vocabulary(lm, text_tokenizer, tokenizer, which, max_length):
    """Give `lm` a row for each code, and BOI and EOI where it lacks them.

    The offset is beyond the embedding's rows, of which Qwen3 has more (151936) than its tokenizer has tokens (151669). A new
    row is a random projection of its code's vector C W, so that codes that look alike begin alike, with the mean and spread
    of the old rows; left to itself, transformers makes all new rows nearly the same."""
    text_tokenizer.add_tokens([BOI, EOI], special_tokens=True)
    old, codes = lm.config.vocab_size, tokenizer.config.codebook_size
    offset = max(old, len(text_tokenizer))
    lm.resize_token_embeddings(offset + codes, mean_resizing=False)
    vectors = tokenizer.quantizer.lookup(torch.arange(codes, device=tokenizer.quantizer.codebook.device)).cpu()     # (k, e)
    vectors = F.layer_norm(vectors - vectors.mean(0), vectors.shape[1:])
    vectors = vectors @ torch.randn(vectors.shape[1], lm.config.hidden_size) / vectors.shape[1] ** 0.5     # (k, hidden), about N(0, 1)
    vectors = torch.cat([torch.randn(offset - old, lm.config.hidden_size), vectors])
    for table in {lm.get_input_embeddings().weight, lm.get_output_embeddings().weight}:       # one and the same where they are tied
        table[old:] = table[:old].mean(0) + table[:old].std() * vectors
    boi, eoi = text_tokenizer.convert_tokens_to_ids([BOI, EOI])
    lm.config.visual = dict(offset=offset, codes=codes, tokens=tokenizer.config.num_tokens, boi=boi, eoi=eoi,
                            max_length=max_length, tokenizer=which)

def layout(text_tokenizer, visual, texts, codes=None, width=0):
    """B captions and their codes (B, N) -> ids and mask (B, T + N + 2), as drawn at the top of this file; without codes
    (B, T + 1): a prompt, that ends with BOI. T is the longest caption's length, or `width` if that is more; padding is on the
    left. An empty caption is the unconditional prompt. Captions beyond max_length are cut."""
    room = visual["max_length"] - visual["tokens"] - 2
    rows = [ids[:room] for ids in text_tokenizer(texts, add_special_tokens=False).input_ids]
    width = max(width, *map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row + [visual["boi"]] for row in rows])     # masked, so any id will do
    mask = torch.tensor([[0] * (width - len(row)) + [1] * (len(row) + 1) for row in rows])
    if codes is not None:
        ends = torch.full((len(rows), 1), visual["eoi"])
        ids = torch.cat([ids, codes.cpu() + visual["offset"], ends], 1)
        mask = F.pad(mask, (0, codes.shape[1] + 1), value=1)
    return ids, mask

def positions_of(mask):
    """(B, L) -> position of each token in its own text (B, L): padding on the left does not count."""
    return (mask.cumsum(1) - 1).clamp(min=0)

def visual_logits(lm, hidden):                                                # (..., hidden)
    """Logits of the k codes alone (..., k). No other token can stand in a picture, in training as in sampling, and Qwen3's
    own 151936 would cost ten times as much."""
    first, codes = lm.config.visual["offset"], lm.config.visual["codes"]
    return F.linear(hidden, lm.get_output_embeddings().weight[first:first + codes])

class PictureLM(nn.Module):
    """The language model as it is trained: layouts (B, T + N + 2) -> logits of v_1 ... v_N (B, N, k)."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids, mask):                                             # (B, T + N + 2)
        ids, mask = ids[:, :-2], mask[:, :-2]                                 # nothing scored comes after v_N and EOI
        x = self.lm.model(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).last_hidden_state
        return visual_logits(self.lm, x[:, -self.lm.config.visual["tokens"]:])        # from BOI, v_1, ... v_{N-1}

def load_generator(out_dir, tokenizer_folder="", device="cpu", dtype=torch.float32):
    """-> language model, its text tokenizer, and the VQRAE tokenizer whose codes it writes, checked to belong together."""
    folder, tokenizer_folder = Path(out_dir) / "ar", Path(tokenizer_folder or f"{out_dir}/tokenizer")
    if not (folder / "config.json").is_file():
        raise UserError(f"no trained generator in {folder}: python train_ar.py makes one (--out_dir names the run)")
    tokenizer = load_tokenizer(tokenizer_folder, device)
    try:
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device).eval()
        text_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        visual = lm.config.visual
    except Exception as error:                                                # each kind of damage raises its own
        raise UserError(f"{folder} cannot be read as a generator ({' '.join(str(error).split())[:160]}): "
                        f"python train_ar.py --resume writes it anew from state.pt") from error
    if visual["tokenizer"] != identity(tokenizer_folder):
        raise UserError(f"{folder} learned the codes of another tokenizer than {tokenizer_folder}: pass --tokenizer with that one, "
                        f"or train it again with python train_ar.py --overwrite")
    return lm, text_tokenizer, tokenizer

# ---- Codes computed once. A data set of codes is a function fetch(positions) -> codes (b, N) int64, captions [b], with position
# 0, 1, 2, ... counting the images a run has seen. Shapes are drawn and tokenized when they are needed: that takes a tenth
# of the time of learning from them, and no picture comes twice.

CAPTION_BYTES = 1024                              # of UTF-8 a cached caption may have; the rest is cut

def open_codes(source, train, config, tokenizer, which, ranks):
    """-> fetch, and the number of images (None: endless)."""
    size, part = tokenizer.config.image_size, "train" if train else "val"
    if source == "shapes":
        def draw_and_tokenize(positions):
            batch = next(batches(None, size, positions, len(positions)))
            return tokenizer.tokenize(batch["image"].to(ranks.device)), batch["text"]
        return draw_and_tokenize, None

    dataset = Images(source, size, train=False, part=None if config.val_data else part)      # train=False: in order; centre crop [T9]
    rows = cached_codes(Path(config.out_dir) / f"codes-{part}", dataset, config, tokenizer, which, ranks)

    @functools.lru_cache(maxsize=2)
    def shuffle(epoch):
        return torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed + epoch))

    def fetch(positions):
        index = [int(shuffle(p // len(rows))[p % len(rows)]) if train else p for p in positions]
        found = rows[index]
        return torch.from_numpy(found["codes"].astype(np.int64)), [text.decode("utf-8", "ignore") for text in found["text"]]
    return fetch, len(rows)

def cached_codes(folder, dataset, config, tokenizer, which, ranks):
    """Codes and captions of `dataset` as one memory-mapped array of records, `folder`/codes.npy, made there if need be.
    fingerprint.json says of what; it is written last, so without it the rest is unfinished and made anew."""
    listing = hashlib.sha256()
    for record in dataset.records:
        file, _, size = record["image"]
        listing.update(repr((record, os.path.getsize(file) if size < 0 else size)).encode())
    fingerprint = dict(tokenizer=which, data=listing.hexdigest()[:16], images=len(dataset))
    path, marker = folder / "codes.npy", folder / "fingerprint.json"
    found = json.loads(marker.read_text()) if marker.is_file() and not config.overwrite_cache else None
    if found and found != fingerprint:
        what = f"another tokenizer than {config.tokenizer}" if found["tokenizer"] != which else f"other images than are now in {dataset.source}"
        raise UserError(f"{folder} was made with {what}: --overwrite_cache makes it anew, --out_dir keeps both")
    ranks.wait()                                                              # nobody writes before all have looked
    if found:
        return np.load(path, mmap_mode="r")

    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
        number = "<u2" if tokenizer.config.codebook_size <= 1 << 16 else "<u4"
        record = [("codes", number, tokenizer.config.num_tokens), ("text", f"S{CAPTION_BYTES}")]
        np.lib.format.open_memmap(path, "w+", record, (len(dataset),))
    ranks.wait()
    rows = np.load(path, mmap_mode="r+")
    at, end = (len(rows) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))      # this rank's share
    bar, lengths = tqdm(total=end - at, desc=folder.name, unit="image", disable=not ranks.first), []
    for batch in batches(dataset, tokenizer.config.image_size, range(at, end), 64, config.num_workers):
        new = [(text or label).encode() for text, label in zip(batch["text"], batch["label"])]       # no caption: its class
        rows[at:at + len(new)] = list(zip(tokenizer.tokenize(batch["image"].to(ranks.device)).tolist(), new))
        at += len(new)
        lengths += map(len, new)
        bar.update(len(new))
        for line in batch["skipped"]:
            tqdm.write(f"skipped {line}")
    bar.close()
    if not any(lengths):
        raise UserError(f"no image of {dataset.source} has a caption or a class: write metadata.jsonl with file_name and text, "
                        f"or a .txt beside each image")
    rows.flush()
    ranks.wait()
    if ranks.first:
        marker.write_text(json.dumps(fingerprint))
    return np.load(path, mmap_mode="r")

# ---- Training -------------------------------------------------------------------------------------------------------

def picture_loss(net, ids, mask, visual):
    """Mean cross-entropy (nats) of the N visual tokens of each layout; -> scalar, float32."""
    logits = net(ids, mask)                                                   # (B, N, k)
    codes = ids[:, -1 - visual["tokens"]:-1] - visual["offset"]               # (B, N)
    return F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), codes.flatten())

@torch.no_grad()
def draw(lm, text_tokenizer, tokenizer, prompts, seed):
    """Pictures of `prompts` (B, 3, H, W) by transformers' own generate, unguided; sample.py is several times faster."""
    visual = lm.config.visual
    ids, mask = (t.to(lm.device) for t in layout(text_tokenizer, visual, prompts))
    torch.manual_seed(seed)
    ids = lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=visual["tokens"], min_new_tokens=visual["tokens"],
                      do_sample=True, top_k=0, suppress_tokens=list(range(visual["offset"])))
    return tokenizer.detokenize(ids[:, -visual["tokens"]:] - visual["offset"]).float().clamp(0, 1)

def train(config, ranks):
    out, device, start = Path(config.out_dir), ranks.device, time.time()
    folder, path = out / "ar", out / "ar" / "state.pt"
    resumed = open_run(path, config)
    local, micro, accumulate = split_batch(config, ranks)
    tokenizer, which = load_tokenizer(config.tokenizer, device), identity(config.tokenizer)
    if tokenizer.quantizer is None:
        raise UserError(f"{config.tokenizer} has no codes to write (quantizer none): train one with --quantizer simvq")
    if config.max_length < (least := tokenizer.config.num_tokens + 3):
        raise UserError(f"--max_length {config.max_length} has no room for a picture, its two marks and a caption: at least {least}")
    if resumed and resumed["tokenizer"] != which:
        raise UserError(f"{path} learned the codes of another tokenizer than {config.tokenizer}: pass --tokenizer with that one, or --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    fetch, size = open_codes(config.data, True, config, tokenizer, which, ranks)
    val_fetch, val_size = open_codes(config.val_data or config.data, False, config, tokenizer, which, ranks)
    texts = captions(plan(torch.arange(10_000))) if size is None else fetch(range(size))[1] if config.lm == "random" else []
    torch.manual_seed(config.seed)
    lm, text_tokenizer = build_lm(config, texts)
    grow_vocabulary(lm, text_tokenizer, tokenizer, which, config.max_length)
    visual = lm.config.visual
    lm.to(device, torch.float64 if config.precision == "float64" else None)
    first_step = 0
    if resumed:
        lm.load_state_dict(resumed["model"])
        first_step = resumed["step"]
    net = ranks.run(PictureLM(lm))
    how = dict(lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay, fused=device.type != "mps")
    if ranks.size > 1:                                                        # ZeRO-1 [T9]: each rank keeps its share of the moments
        from torch.distributed.optim import ZeroRedundancyOptimizer           # a second to import
        optimizer = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=torch.optim.AdamW, **how)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), **how)
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])

    def save(step):
        if ranks.size > 1:
            optimizer.consolidate_state_dict(to=0)                            # all ranks send theirs
        if ranks.first:
            save_checkpoint(path, dict(model=lm.state_dict(), optimizer=optimizer.state_dict(), step=step, tokenizer=which, config=asdict(config)))

    @torch.no_grad()
    def validate():
        """Draws the first validation captions; -> mean loss of the validation images, captions and all, and those captions."""
        total = 0.0
        for at in range(0, len(val_at), micro):
            codes, texts = val_fetch(val_at[at:at + micro])
            ids, mask = (t.to(device) for t in layout(text_tokenizer, visual, texts, codes))
            total += picture_loss(PictureLM(lm), ids, mask, visual).item() * len(texts)
        prompts = val_fetch(val_at[:16])[1]
        save_image(make_grid(draw(lm, text_tokenizer, tokenizer, prompts, config.seed), nrow=8), out / "samples.png")
        return total / len(val_at), prompts

    log = Log(out / "log_ar.jsonl", first_step, ranks.first)
    bar = tqdm(total=config.total_steps, initial=first_step, desc="generator", unit="step", disable=not ranks.first)
    val_at = range(VALIDATION, VALIDATION + config.val_images) if val_size is None else range(min(config.val_images, val_size))
    amp = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    last_log = first_step, time.time()
    ranks.catch_stop()

    for step in range(first_step, config.total_steps + 1):
        # Once in a while: validate, draw, save.
        last = step == config.total_steps
        if ranks.first and (last or (step > first_step and step % config.eval_every == 0)):
            with amp:
                val_loss, prompts = validate()
            log(step=step, val_loss=val_loss)
        stop = ranks.stopping()
        if last or stop or (step > first_step and step % config.save_every == 0):
            save(step)
        if last or stop:
            break

        # --------------------------------------------------------------------------------------------------------------
        # One training step.
        factor = lr_factor(step, config.warmup_steps, config.total_steps, config.end_lr / config.lr)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * factor
        loss_sum = 0
        for i in range(accumulate):
            at = step * config.batch_size + ranks.rank * local + i * micro
            codes, texts = fetch(range(at, at + micro))                       # (b, N), [b]
            keep = uniforms(~torch.arange(at, at + micro) - (config.seed << 42), 1)[:, 0] >= config.caption_drop    # no picture has a negative number
            ids, mask = layout(text_tokenizer, visual, [text if k else "" for text, k in zip(texts, keep)], codes)
            ids, mask = ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)         # (b, T + N + 2)
            with contextlib.nullcontext() if ranks.size == 1 or i == accumulate - 1 else net.no_sync():       # reduce gradients once
                with amp:
                    loss = picture_loss(net, ids, mask, visual)
                (loss / accumulate).backward()
            loss_sum += loss.detach() / accumulate
        grad_norm = nn.utils.clip_grad_norm_(lm.parameters(), config.clip)
        loss, grad_norm = torch.stack([ranks.sum(loss_sum) / ranks.size, grad_norm]).tolist()        # the step's one wait for the GPU
        check_finite({"cross-entropy": loss, "gradient norm of the": grad_norm}, step)
        optimizer.step()
        optimizer.zero_grad()
        # --------------------------------------------------------------------------------------------------------------

        bar.update()
        if (step + 1) % config.log_every == 0:
            rate = (step + 1 - last_log[0]) * config.batch_size / (time.time() - last_log[1])
            last_log = step + 1, time.time()
            log(step=step + 1, loss=loss, grad_norm=grad_norm, lr=config.lr * factor, images_per_s=rate, tokens_per_s=rate * visual["tokens"])
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} images/s")
    bar.close()
    if ranks.first:
        lm.float().save_pretrained(folder)
        text_tokenizer.save_pretrained(folder)
    ranks.wait()
    if stop and not last:
        ranks.say(f"stopped at step {step}, all saved. Go on with: {resume_command()}")
        return
    if ranks.first:
        millions, chance = sum(p.numel() for p in lm.parameters()) / 1e6, math.log(visual["codes"])
        print(f"\n  {'parameters':24}{millions:.2f} million\n  {'validation loss':24}{val_loss:.3f} nats a token ({chance:.2f} is chance)\n"
              f"  {'time':24}{(time.time() - start) / 60:.1f} minutes\n  {'pictures':24}{out / 'samples.png'}\n  {'generator':24}{folder}\n\n"
              f"Next: python sample.py{'' if str(out) == 'out/tiny' else f' --out_dir {out}'} --prompt {shlex.quote(prompts[0])}")

def main():
    config, _, origin = parse_config(ARConfig, PRESETS, lambda values: [values["config"]])
    ranks = Ranks(config.device)
    if ranks.first:
        print_config(origin, config)
    train(config, ranks)

if __name__ == "__main__":
    command_line(main)
