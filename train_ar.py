"""
Train a language model on the tokenizer's two outputs: to write pictures in codes (section 3.5, Table 9), or to read features (section 3.4, Table 8).

    python train_ar.py                              tiny: a small random Qwen3 on drawn shapes, after train_tokenizer.py. CPU
    torchrun --nproc_per_node=8 train_ar.py --config internvit_448 --data 'FOLDER or shards-{000..127}.tar' --micro_batch 8
    python train_ar.py --task understand            tiny: answer questions about drawn shapes; both phases
    torchrun --nproc_per_node=8 train_ar.py --config siglip2_256 --task understand --phase pretrain --data LLAVA.json --images DIR     and --phase sft

--task generate. A caption and its picture are one sequence:
    a red circle  <|vision_start|>  v_1 v_2 ... v_N  <|vision_end|>  <pad> ... <pad>         v = code + offset
    caption       BOI               row by row       EOI
                  |------ predict ------|            the loss is on v_1 ... v_N alone: N is fixed, no EOI to predict
Without a caption a sequence begins at BOI: the unconditional prompt of classifier-free guidance, which training makes of one caption in ten.

--task understand. LLaVA-1.5's layout: N features Z_I, through a connector, in the place of <image>; the loss is on the answers:
    USER: z_1 z_2 ... z_N how many rings are there? ASSISTANT: two </s> USER: ... ASSISTANT: ... </s> <pad> ...       phase sft
          z_1 z_2 ... z_N a red circle </s> <pad> ...                                                                 phase pretrain
"""
import contextlib, functools, hashlib, io, itertools, json, shlex, time, zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torchvision.utils import save_image
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, logging

from train_tokenizer import (COLORS, NUMBERS, PLURAL, SHAPES, VALIDATION, Images, article, batches, captions, crop, decode, fingerprint, hashed, note,
                             plan, render, shuffled)
from vqrae import (Encoder, Log, Ranks, UserError, bench, check_finite, check_run, check_same, command_line, compile_parts, due, explained, full,
                   hub_file, ignore_signals, load_checkpoint, load_tokenizer, lr_factor, next_command, no_autocast, open_run, parse_config,
                   print_config, report, resize, save_checkpoint, split_batch, timm_key, uniform)

logging.set_verbosity_error(), logging.disable_progress_bar()                 # transformers' own

# ---- Configuration. Defaults are the paper's generator. Sources: [T9] the paper's Table 9, [LlamaGen], [ours].
@dataclass
class ARConfig:
    config: str = "tiny"                  # whose presets and run folder: a key of vqrae.MODELS
    task: Literal["generate", "understand"] = "generate"  # write pictures, or answer questions about them
    phase: Literal["pretrain", "sft"] = ""  # [T8] of understanding: connector on captions, then LLM too on conversations; none given: both
    data: str = "shapes"                  # shapes; generate: folder of captioned images or 'shards-{000..127}.tar'; understand: LLaVA's JSON
    val_data: str = ""                    # the same for validation; "": every 20th image, held out; shapes: pictures never trained on
    images: str = ""                      # understand: the folder that the JSON's image paths start from; "": the JSON's own
    out_dir: str = ""                     # the run's folder; "": out/CONFIG
    tokenizer: str = ""                   # folder of the VQRAE tokenizer; "": out_dir/tokenizer
    resume: bool = False                  # go on from the last checkpoint
    overwrite: bool = False               # start over although there is a checkpoint
    device: str = ""                      # cuda, mps or cpu; "": the first of them that is there
    bench: int = 0                        # time that many steps on one batch, and stop; saves no progress, but makes missing codes-*.npy
    profile: bool = False                 # with --bench: torch.profiler's table of where the time goes
    precision: Literal["bf16", "float32", "float64"] = "bf16"  # [T9] autocast; weights and loss stay float32
    compile: bool = False                 # torch.compile, block by block: a minute or two first, then faster steps on a GPU
    checkpointing: bool = False           # recompute activations in the backward pass: less memory, more time
    seed: int = 0                         # of weights, files' order and dropped captions
    log_every: int = 50                   # [ours] steps
    eval_every: int = 2500                # [ours] validation loss and a grid of samples
    save_every: int = 2500                # [ours]
    val_images: int = 256                 # [ours] images a validation
    # model
    lm: str = "Qwen/Qwen3-0.6B"           # [T9] a language model of transformers by hub name or local folder, Qwen3 to generate; or random
    lm_config: dict = None                # with --lm random: the values of its Qwen3Config; its words are those of the captions
    max_length: int = 1536                # [T9] tokens of caption and picture, or of a conversation; longer texts are cut
    # data
    batch_size: int = 512                 # [T9] images a step, over all ranks and accumulation
    micro_batch: int = 0                  # images a rank takes at a time, the rest by accumulation; 0: all at once
    num_workers: int = 8                  # decoding processes a rank
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
    def __post_init__(self):
        check_run(self, eps=0)
        self.tokenizer = self.tokenizer or f"{self.out_dir}/tokenizer"
        if not 0 <= self.caption_drop <= 1: raise UserError(f"--caption_drop is a share between 0 and 1, not {self.caption_drop}")
        if (self.phase or self.images) and self.task == "generate": raise UserError("--phase and --images are of --task understand")
        if (self.val_data or self.images) and self.task == "understand" and self.data == "shapes": raise UserError("--val_data, --images want --data")

TINY_LM = dict(hidden_size=128, num_hidden_layers=4, intermediate_size=256, num_attention_heads=8, num_key_value_heads=8, head_dim=16,
               initializer_range=0.06, rope_parameters=dict(rope_type="default", rope_theta=1000.0))                                  # [ours]
PRESETS = {
    # [T8] Understanding, the LLaVA-1.5 recipe: an epoch of 595 thousand captions, then of 665 thousand conversations; warmup is 3% of the steps.
    "task understand": dict(lm="lmsys/vicuna-7b-v1.5", end_lr=0.0, eps=1e-8, max_length=2048),
    "phase pretrain": dict(lr=1e-3, total_steps=2325, warmup_steps=70, batch_size=256),
    "phase sft": dict(lr=2e-5, total_steps=5195, warmup_steps=156, batch_size=128),
    "config siglip2_base_256, task generate": dict(batch_size=128, micro_batch=16),                                                   # [ours]
    "config tiny": dict(lm="random", max_length=128, precision="float32", batch_size=16, num_workers=0, total_steps=2900, lr=3e-3,    # [ours]
                        end_lr=1e-4, weight_decay=0.1, warmup_steps=50, log_every=20, eval_every=1000, save_every=1000, lm_config=TINY_LM),
    "config tiny, task understand": dict(max_length=192, weight_decay=0.05, lm_config=TINY_LM | dict(                                 # [ours]
        intermediate_size=384, num_attention_heads=4, num_key_value_heads=4, head_dim=32)),
    "config tiny, phase pretrain": dict(total_steps=60, warmup_steps=10, lr=3e-4),                                                    # [ours]
    "config tiny, phase sft": dict(total_steps=1500, lr=1e-3),                                                                        # [ours]
}

SHARED = {"config", "out_dir", "device", "tokenizer"}                         # flags that the next command takes over; CARRIED: SFT
CARRIED = SHARED | set("data val_data images lm lm_config max_length micro_batch num_workers precision compile checkpointing seed".split())

# ---- Language model and layout. What a generator has beyond any Qwen3 stands in its config as `visual`:
# offset and codes (the ids offset ... offset + codes - 1 are pictures), tokens (N), boi, eoi, max_length, and which tokenizer.
BOI, EOI = "<|vision_start|>", "<|vision_end|>"   # Qwen3's own names; other text tokenizers are given them
PAD, UNKNOWN, END, IMAGE = "<pad>", "<unk>", "</s>", -1       # IMAGE: one feature of Z_I among the ids

def identity(path):                               # what tells one tokenizer (folder) or teacher (file) from another: a hash of its weights
    return hashlib.sha256(np.memmap(path if Path(path).is_file() else Path(path) / "model.safetensors", mode="r")).hexdigest()[:16]

def word_tokenizer(texts):
    """A text tokenizer of the words and punctuation marks in `texts`, in lower case."""
    split, lower = tokenizers.pre_tokenizers.Whitespace(), tokenizers.normalizers.Lowercase()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(lower.normalize_str(text))})
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate([PAD, UNKNOWN, END, *words])}, UNKNOWN))
    model.pre_tokenizer, model.normalizer = split, lower
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token=PAD, unk_token=UNKNOWN, eos_token=END)

def build_lm(config, texts):
    """The language model as it was before pictures, in float32, and its text tokenizer."""
    torch.manual_seed(config.seed)
    if config.lm == "random":
        text_tokenizer = word_tokenizer(texts)
        with explained(f"--lm random needs --lm_config, JSON of Qwen3Config's values, not {config.lm_config}"):
            if strange := set(config.lm_config) - set(Qwen3Config().to_dict()): raise ValueError(f"it has no {', '.join(strange)}")
            lm = Qwen3ForCausalLM(Qwen3Config(**config.lm_config | dict(vocab_size=len(text_tokenizer))))     # takes any name in silence
            lm(torch.zeros(1, 2, dtype=torch.int64))                          # heads that do not go with one another fail here
        nn.init.normal_(lm.get_input_embeddings().weight)                     # larger than usual, or the first layer drowns the words: README
        return lm, text_tokenizer
    if not Path(config.lm).is_dir():                                          # a name on the hub; fails within seconds where there is no network
        with explained(f"--lm {config.lm} is neither a folder nor a name on the hub"):
            hub_file(config.lm, "config.json", f"run `hf download {config.lm}` there, and pass its folder with --lm FOLDER")
    return read_lm(config.lm, f"cannot load the language model {config.lm}")
def read_lm(name, problem, dtype=torch.float32, **how):                       # transformers would keep the saved type, Qwen3's bfloat16
    with explained(problem): return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **how), AutoTokenizer.from_pretrained(name, **how)

@torch.no_grad()
def grow_vocabulary(lm, text_tokenizer, tokenizer, which, max_length):
    """Give `lm` a row for each code, and BOI and EOI where it lacks them. The offset is beyond the embedding's rows, of which Qwen3 has more
    (151936) than its tokenizer has tokens (151669). A new row is a random projection of its code's vector C W, so that codes that look alike
    begin alike (README), with the mean and spread of the old rows. By itself transformers would make all new rows nearly the same."""
    text_tokenizer.add_tokens([BOI, EOI], special_tokens=True)
    old, k = lm.config.vocab_size, tokenizer.config.codebook_size
    offset = max(old, len(text_tokenizer))
    lm.resize_token_embeddings(offset + k, mean_resizing=False)
    vectors = tokenizer.quantizer.lookup(torch.arange(k, device=tokenizer.quantizer.codebook.device)).cpu()     # (k, e)
    vectors = F.layer_norm(vectors - vectors.mean(0), vectors.shape[1:])
    vectors = vectors @ torch.randn(vectors.shape[1], lm.config.hidden_size) / vectors.shape[1] ** 0.5     # (k, hidden), about N(0, 1)
    vectors = torch.cat([torch.randn(offset - old, lm.config.hidden_size), vectors])
    for table in {lm.get_input_embeddings().weight, lm.get_output_embeddings().weight}:       # one and the same where they are tied
        table[old:] = table[:old].mean(0) + table[:old].std() * vectors
    boi, eoi = text_tokenizer.convert_tokens_to_ids([BOI, EOI])
    lm.config.visual = dict(offset=offset, codes=k, tokens=tokenizer.config.num_tokens, boi=boi, eoi=eoi, max_length=max_length, tokenizer=which)

def pad(rows, side):                              # B lists -> (B, L). torch 2.8's pad_sequence fails while FLOP are counted
    gaps = [max(map(len, rows)) - len(row) for row in rows]
    return torch.stack([F.pad(torch.tensor(row), (gap, 0) if side == "left" else (0, gap)) for row, gap in zip(rows, gaps)])
def pad_ids(rows, side="left"):                   # B lists of ids -> ids and mask, (B, L) each; the mask hides the padding's 0
    return pad(rows, side), pad([[1] * len(row) for row in rows], side)

def layout(text_tokenizer, visual, texts, codes=None):
    """B captions and their codes (B, N) -> ids and mask (B, T + N + 2), as drawn at the top of this file; without codes (B, T + 1): prompts,
    padded on the left to end with BOI. T is the longest caption's length. Captions beyond max_length are cut."""
    encoded = text_tokenizer(texts, add_special_tokens=False).input_ids
    rows = [ids[:visual["max_length"] - visual["tokens"] - 2] + [visual["boi"]] for ids in encoded]
    if codes is None: return pad_ids(rows)
    return pad_ids([row + picture + [visual["eoi"]] for row, picture in zip(rows, (codes + visual["offset"]).tolist())], "right")
def visual_logits(lm, hidden):                                                # (..., hidden)
    """Logits of the k codes alone (..., k), in training as in sampling: a picture has no other token, and Qwen3's 151936 cost ten times as much."""
    return F.linear(hidden, lm.get_output_embeddings().weight[lm.config.visual["offset"]:][:lm.config.visual["codes"]])

class PictureLM(nn.Module):
    """The language model as it is trained: layouts (B, T + N + 2) -> logits of v_1 ... v_N (B, N, k)."""
    def __init__(self, lm):
        super().__init__()
        self.lm = lm
    def forward(self, ids, mask):                                             # (B, T + N + 2) each
        # Padding comes last, where causal attention never looks: so no mask, and the fastest kernels. v_N and EOI predict nothing.
        x = self.lm.model(ids[:, :-2], dict(full_attention=None), use_cache=False).last_hidden_state            # (B, T + N, hidden)
        at = mask.sum(1, keepdim=True) - 2 + torch.arange(-self.lm.config.visual["tokens"], 0, device=ids.device)     # (B, N): BOI ... v_{N-1}
        return visual_logits(self.lm, x.take_along_dim(at[..., None], 1))

def load_generator(out_dir, tokenizer_folder, device="cpu", dtype=torch.float32):
    """-> language model, its text tokenizer, and the VQRAE tokenizer whose codes it writes, checked to belong together."""
    folder, tokenizer = Path(out_dir) / "ar", load_tokenizer(tokenizer_folder, device)
    if not (folder / "config.json").is_file(): raise UserError(f"no generator in {folder}: train_ar.py makes one, --resume finishes one")
    lm, text_tokenizer = read_lm(folder, f"{folder} cannot be read as a generator: train_ar.py --resume writes it anew", dtype, local_files_only=True)
    check_same(getattr(lm.config, "visual", {}), dict(tokenizer=identity(tokenizer_folder)), f"{folder} learned other codes: pass their --tokenizer")
    return lm.to(device).eval(), text_tokenizer, tokenizer

# ---- Codes are computed once, and kept: those of files on disk, those of shapes (which takes a fifth of a step) as they first come.
REPEAT = 25_600                                   # pictures of shapes; then the first comes again
def open_codes(source, part, config, tokenizer, which, ranks):
    """Codes and captions of `source` as one memory-mapped array of records, codes-PART-TOKENIZER-DATA.npy, made if need be; None for shapes."""
    if source == "shapes": return None
    with ranks.first_alone():                                                 # in order; centre crop [T9]
        dataset = Images(source, tokenizer.config.image_size, in_order=True, part="all" if config.val_data else part, folder=config.out_dir)
    if not any(record["label"] or record["text"] for record in map(dataset.record, range(len(dataset)))):
        raise UserError(f"no {part} image of {source} has caption or class: give it metadata.jsonl (file_name, text) or .txt (also in shards)")
    records = dataset.records
    if source.endswith(".tar"): images = fingerprint(records.paths, len(dataset))
    else: images = fingerprint([place[0] for r in records for place in (r["image"], r["text"]) if isinstance(place, tuple)], len(dataset), records)
    path = Path(config.out_dir) / f"codes-{part}-{which}-{images}.npy"
    if path.is_file(): return np.load(path, mmap_mode="r")
    if other := next(path.parent.glob(f"codes-{part}-*.npy"), None):
        what = f"other images, path or --val_data than {source}" if which in other.name else f"another tokenizer than {config.tokenizer}"
        raise UserError(f"{other} was made with {what}: delete it to replace it, or keep the runs apart with --out_dir")
    partial = path.with_suffix(".partial")
    if ranks.first and not partial.exists():                                  # else a killed run's is gone on with
        codes = ("codes", "<u2" if tokenizer.config.codebook_size <= 1 << 16 else "<u4", tokenizer.config.num_tokens)
        np.lib.format.open_memmap(partial, "w+", [codes, ("text", "S1024"), ("done", "?")], (len(dataset),))
    ranks.wait()
    rows = np.load(partial, mmap_mode="r+")
    first, end = (len(rows) * (ranks.rank + i) // ranks.size for i in (0, 1))                                 # this rank's share
    todo = (first + np.flatnonzero(~rows["done"][first:end])).tolist()
    bar = tqdm(todo, f"codes-{part}", unit="image", disable=not ranks.first)
    for i, batch in enumerate(batches(dataset, tokenizer.config.image_size, bar, 64, config.num_workers, ranks.device)):
        texts = [(text or label).encode(errors="replace") for text, label in zip(batch["text"], batch["label"])]     # no caption: its class
        if max(map(len, texts)) > 1024: note("note: captions are cut after 1,024 bytes")
        here = todo[64 * i:64 * (i + 1)]
        rows["codes"][here], rows["text"][here], rows["done"][here] = tokenizer.tokenize(batch["image"]).cpu(), texts, True
    rows.flush()
    if skipped := int(ranks.sum(torch.tensor(len(dataset.skipped)))): ranks.say(f"{skipped} unreadable images, in whose place the next ones stand")
    ranks.wait()
    if ranks.first: partial.replace(path)
    ranks.wait()
    return np.load(path, mmap_mode="r")

# ---- Conversations about images, in LLaVA's layout
def chat(text_tokenizer, tokens, max_length, plain, turns):
    """[(question, answer), ...] of one image -> ids, and which of them an answer is made of: [int], [bool] of equal length. <image> in a
    question becomes `tokens` times IMAGE. An answer of None is left to the model. plain: image and first answer alone. Longer ones are cut."""
    encode = lambda text: text_tokenizer(text, add_special_tokens=False).input_ids
    ids, scored = [text_tokenizer.bos_token_id] * (text_tokenizer.bos_token_id is not None), []
    for question, answer in turns[:1] if plain else turns:
        for i, piece in enumerate(("<image>" if plain else f"USER: {question} ASSISTANT:").split("<image>")):
            ids += [IMAGE] * (tokens * (i > 0)) + encode(piece)
        scored += [False] * (len(ids) - len(scored))
        if answer is not None:
            ids += encode(answer) + [text_tokenizer.eos_token_id]
            scored += [True] * (len(ids) - len(scored))
    ids, scored = ids[:max_length], scored[:max_length]
    if ids.count(IMAGE) == tokens and (any(scored) or answer is None): return dict(ids=ids, scored=scored)
    raise UserError(f"image and answer do not fit into --max_length {max_length}")

def collate(rows):                                # B dicts of ids, scored and image -> (B, L) twice, (B, 3, h, w)
    for line in (line for row in rows for line in row.get("skipped", "").splitlines()): note(f"skipped {line}")
    return *(pad([row[name] for row in rows], "right") for name in ("ids", "scored")), torch.stack([row["image"] for row in rows])

class MLLM(nn.Module):
    """LLaVA-1.5: a language model that reads Z_I (B, N, d) through a two-layer connector, in the place of <image>."""
    def __init__(self, lm, dim):
        super().__init__()
        self.lm, width = lm, lm.get_input_embeddings().embedding_dim
        self.connector = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width))        # [T8] mlp2x_gelu
    def embed(self, ids, Z_I):                                                # (B, L), (B, N, d) -> (B, L, width)
        x = self.lm.get_input_embeddings()(ids.clamp(min=0))
        return x.masked_scatter((ids == IMAGE)[..., None], self.connector(Z_I.to(self.connector[0].weight.dtype)).to(x.dtype))
    def forward(self, ids, scored, Z_I):                                      # (B, L) twice, padded on the right, where no token looks; (B, N, d)
        x = self.lm.base_model(inputs_embeds=self.embed(ids, Z_I), use_cache=False)
        return self.lm.get_output_embeddings()(x.last_hidden_state[:, :-1][scored[:, 1:]])     # (answer tokens, vocabulary)

def swap_encoder(mllm, encoder):
    """Put `encoder` in the place of the vision tower of a transformers MLLM built on the same ViT (InternVL3, a LLaVA with SigLIP):
    section 3.4, no training. A final norm or a pooling head, which come after Z_I, stay. README, "Into a published MLLM"."""
    if mllm.config.vision_feature_layer != -1:
        raise UserError(f"the MLLM reads layer {mllm.config.vision_feature_layer} of its vision tower, and Z_I, which was distilled, is layer -1")
    ours, tower, state = encoder.vit.state_dict(), mllm.model.vision_tower, {}
    for key in [key for key in ours if ".qkv." in key]:
        ours |= zip([key.replace("qkv", f"{letter}_proj") for letter in "qkv"], ours.pop(key).chunk(3))
    with explained("the MLLM's vision tower is another ViT than the encoder", KeyError, RuntimeError):
        for key, old in tower.state_dict().items():
            name = timm_key(key.removeprefix("vision_model."))
            state[key] = old if name.startswith(("norm.", "layernorm.", "head.")) else ours.pop(name).reshape(old.shape)
        if ours: raise KeyError(f"it lacks {', '.join(sorted(ours)[:3])}")
        tower.load_state_dict(state)
    return mllm

class Conversations(Images):
    """LLaVA's JSON by position: [{"image": path, "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", ...}]}, ...]."""
    def read(self, file, folder):
        folder, records = Path(folder or Path(file).parent), []
        with explained(f"{file}: not LLaVA's JSON, a list of objects"): rows = list.copy(json.loads(Path(file).read_text("utf-8-sig")))
        for number, row in enumerate(rows):
            with explained(f"{file}, conversation {number} (from 0): not LLaVA's JSON, image and conversations, human and gpt in turn"):
                if "image" not in row: continue
                turns = [(q["value"].strip(), a["value"].strip()) for q, a in zip(row["conversations"][::2], row["conversations"][1::2], strict=True)]
                who = [turn.get("from") for turn in row["conversations"]]
                if "gpt" in who[::2] or "human" in who[1::2]: raise ValueError("they do not take turns")
                marks = sum(question.count("<image>") for question, _ in turns)
                if marks != 1: raise ValueError(f"<image> must stand in its questions exactly once, not {marks} times")
                records.append(dict(name=folder / row["image"], turns=turns))
        if records and not records[0]["name"].is_file(): raise UserError(f"{file}: no file {records[0]['name']}; --images DIR names the folder")
        return records
    def load(self, record, _): return self.encode(record["turns"]) | dict(image=square(record["name"], self.size))

def square(file, size):
    """An image file, padded with grey to a square, as LLaVA-1.5 has it: nothing is cut off. -> (3, size, size) in [0, 1]."""
    return crop(ImageOps.pad(decode(Path(file).read_bytes()), (size, size), Image.Resampling.BICUBIC, color=(127, 127, 127)), size) / 255

def questions(index, scene):
    """Picture numbers (B,) and their Scene -> for each picture its {question: (kind, answer)}, shuffled: one of presence, one of counting, up to two
    of color and of position, about different objects. With more, one would answer another, and a model could do without the picture. The
    object's name comes last, except in counting: a small model that has learned to look for the last word can use that for all kinds."""
    out = []
    facts = zip(hashed(index, 60)[:, 48:].tolist(), *(t.tolist() for t in (scene.count, scene.shape, scene.color, scene.x, scene.y)))
    for u, n, shapes, colors, xs, ys in facts:
        asked, things = {}, [(list(COLORS)[c], SHAPES[s]) for c, s in zip(colors[:n], shapes)]
        drawn = [shape for _, shape in things]
        i = int(u[0] * n)
        j = (i + 1 + int(u[1] * (n - 1))) % n                                 # another one, if there is another
        color, shape = things[i]
        if u[2] < 0.5:                                                        # POPE asks half its questions about what is not there,
            color, shape = list(COLORS)[int(u[3] * 8)], (SHAPES[int(u[4] * 6)] if u[5] < 0.5 else shape)      # half of those with something right
        asked[f"is there {article(color)} {shape}?"] = "presence", "yes" if (color, shape) in things else "no"
        if u[6] < 0.4 and len(set(drawn)) == n:                               # of one shape, all answers would be "one"
            asked["how many objects are there?"] = "counting", NUMBERS[n]
        else:
            shape = drawn[i] if u[6] < 0.8 else SHAPES[int(u[7] * 6)]
            asked[f"how many {PLURAL[shape]} are there?"] = "counting", NUMBERS[drawn.count(shape)]
        alone = [o for o in dict.fromkeys((i, j)) if drawn.count(drawn[o]) == 1]       # only their shape tells which is meant
        asked |= {f"what color is the {drawn[o]}?": ("color", things[o][0]) for o in alone}
        dx, dy = xs[i] - xs[j], ys[i] - ys[j]
        if u[8] < 0.3 and len(alone) == 2 and max(abs(dx), abs(dy)) > 8:
            across = abs(dx) > abs(dy)
            asked[f"is the {drawn[i]} {'left or right of' if across else 'above or below'} the {drawn[j]}?"] = (
                "position", ("left" if dx < 0 else "right") if across else "above" if dy < 0 else "below")
        else:
            for o, across in zip(alone, (u[9] < 0.5, u[9] >= 0.5)):
                asked[f"{'left or right' if across else 'top or bottom'}: where is the {drawn[o]}?"] = (
                    "position", ("left" if xs[o] < 32 else "right") if across else "top" if ys[o] < 32 else "bottom")
        out.append(dict(sorted(asked.items(), key=lambda item: zlib.crc32(f"{u[-1]} {item[0]}".encode()))))
    return out

def shapes_turns(index, size, phase):
    """Picture numbers (B,) -> images (B, 3, size, size) and the turns of each: a caption to pretrain on, else questions of four kinds."""
    scene = plan(index)
    turns = [[(question, answer) for question, (_, answer) in them.items()] for them in questions(index, scene)]
    if phase == "pretrain": turns = [[("", caption)] for caption in captions(scene)]
    return resize(render(scene), size), [[("<image>\n" + question, answer), *more] for (question, answer), *more in turns]

def teacher_file(folder): return next(Path(folder).glob("teacher.safetensors"), None)       # save_tokenizer's; None: a hub has it
def load_teacher(folder, config):
    """The frozen VFM that the tokenizer in `folder` began from: from the file beside it, or from where its config says."""
    source = str(teacher_file(folder) or config.encoder_weights)
    if source == "stage0": raise UserError(f"{folder} lacks teacher.safetensors, which save_tokenizer(model, folder, teacher) writes")
    return Encoder(config, source).requires_grad_(False).eval()
def reads(folder, model_config):
    """What an MLLM trained on a tokenizer's teacher reads, for its config. VFMs go by their name on the hub, else by a hash of the weights."""
    teacher = identity(beside) if (beside := teacher_file(folder)) else f"{model_config.encoder}, {model_config.encoder_weights}"
    return dict(dim=model_config.dim, tokens=model_config.num_tokens, image_size=model_config.image_size, teacher=teacher)

def load_mllm(out_dir, tokenizer_folder, device="cpu", dtype=torch.float32):
    """-> MLLM that `--task understand` made, its text tokenizer, and the VQRAE tokenizer, checked to have begun from the VFM that it learned from."""
    folder, tokenizer = Path(out_dir) / "mllm", load_tokenizer(tokenizer_folder, device)
    if not (folder / "connector.safetensors").is_file():
        raise UserError(f"no trained MLLM in {folder}: python train_ar.py --task understand makes one (--out_dir names the run)")
    lm, text_tokenizer = read_lm(folder, f"{folder} cannot be read as an MLLM: train it again", dtype, local_files_only=True)
    check_same(getattr(lm.config, "understand", {}), reads(tokenizer_folder, tokenizer.config), f"{folder} reads another VFM than {tokenizer_folder}")
    net = MLLM(lm, tokenizer.config.dim)
    net.connector.load_state_dict(load_file(folder / "connector.safetensors"))
    return net.to(device, dtype).eval(), text_tokenizer, tokenizer

# ---- Training. Each task has a network, batches by position, a loss, a validation and files; the loop below is the same.
class Generate:
    """Captions -> codes. The whole language model learns."""
    def __init__(self, config, ranks, folder, resumed):
        self.config, self.device, self.folder, self.encoder = config, ranks.device, folder, None
        self.tokenizer, self.which = load_tokenizer(config.tokenizer, ranks.device), identity(config.tokenizer)
        if resumed: check_same(resumed, dict(tokenizer=self.which), f"{folder} learned from another tokenizer, pass that one or --overwrite")
        if self.tokenizer.quantizer is None: raise UserError(f"{config.tokenizer} has no codes (quantizer none): train one with --quantizer simvq")
        if config.max_length < (least := self.tokenizer.config.num_tokens + 18):
            raise UserError(f"--max_length {config.max_length} has no room for a picture, its two marks and a caption of 16 tokens: at least {least}")
        self.draw = functools.cache(self.draw)                                # a batch of shapes is drawn once
        if config.lm != "random":                                             # before the codes, which may take hours: a wrong --lm fails at once
            self.lm, self.text_tokenizer = build_lm(config, [])
            if self.lm.config.model_type != "qwen3": raise UserError(f"--lm {config.lm} is no Qwen3, which --task generate is made for")
        self.val = open_codes(config.val_data or config.data, "val", config, self.tokenizer, self.which, ranks)         # few: a refusal comes early
        self.data = open_codes(config.data, "train", config, self.tokenizer, self.which, ranks)
        if config.lm == "random":
            texts = captions(plan(torch.arange(10_000))) if self.data is None else self.fetch(range(len(self.data)))[1]
            self.lm, self.text_tokenizer = build_lm(config, texts)
        grow_vocabulary(self.lm, self.text_tokenizer, self.tokenizer, self.which, config.max_length)
        self.net, self.visual = PictureLM(self.lm), self.lm.config.visual
    def fetch(self, positions, val=False):
        """b positions -> codes (b, N) int64, captions [b]."""
        if (rows := self.val if val else self.data) is None:
            batch = self.config.batch_size                                    # REPEAT in whole batches: each part of one is one entry of draw's cache
            first = positions[0] if val else positions[0] % max(batch, REPEAT // batch * batch)
            return self.draw(range(first, first + len(positions)))
        found = rows[[shuffled(p, len(rows), 0 if val else self.config.seed) for p in positions]]      # validation too: files are sorted
        return torch.from_numpy(found["codes"].astype(np.int64)), [text.decode("utf-8", "ignore") for text in found["text"]]
    def draw(self, positions):                                                # fetch's answer for shapes, cached
        batch = next(batches(None, self.tokenizer.config.image_size, positions, len(positions), device=self.device))
        with no_autocast(batch["image"]): return self.tokenizer.tokenize(batch["image"]).cpu(), batch["text"]      # also while validating
    def stream(self, parts, val=False):
        """Ranges of b positions -> iterator over ids and mask (b, T + N + 2), and codes (b, N)."""
        dropped = lambda p: not val and uniform(self.config.seed * 1_000_003 + p, 1).item() < self.config.caption_drop
        for part in parts:
            codes, texts = self.fetch(part, val)
            ids, mask = layout(self.text_tokenizer, self.visual, ["" if dropped(p) else text for p, text in zip(part, texts)], codes)
            yield ids, mask, codes
    def loss(self, net, ids, mask, codes):
        """Mean cross-entropy (nats) of the N codes of each layout; -> scalar, float32."""
        return F.cross_entropy(full(net(ids, mask)).flatten(0, 1), codes.flatten())                         # of logits (b, N, k)
    def validate(self, parts):
        """Mean loss of the validation images, no caption left out; draws the first of them, unguided (sample.py is faster)."""
        total, texts, N, offset = 0.0, self.fetch(self.val_at[:16], val=True)[1], self.visual["tokens"], self.visual["offset"]
        for batch in self.stream(parts, val=True):
            total += self.loss(self.net, *(t.to(self.device) for t in batch)).item() * len(batch[0]) / len(self.val_at)
        ids, mask = (t.to(self.device) for t in layout(self.text_tokenizer, self.visual, texts))
        torch.manual_seed(self.config.seed)
        ids = self.lm.generate(ids, attention_mask=mask, max_new_tokens=N, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                               suppress_tokens=list(range(offset)))           # all words, and the end of a text
        save_image(self.tokenizer.detokenize(ids[:, -N:] - offset).float().clamp(0, 1), self.folder.parent / "samples.png", nrow=8)
        return dict(val_loss=total)
    def next(self):                                                           # to draw the first caption there is
        return next_command("sample.py", self.config, SHARED, prompt=" ".join(max(self.fetch(range(16))[1], key=bool).split()[:12]))

class Understand:
    """Questions about images -> answers, by a language model that reads the frozen VFM's Z_I. The connector learns, in SFT the LLM too."""
    def __init__(self, config, ranks, folder, resumed):
        self.config, self.device, model_config = config, ranks.device, load_tokenizer(config.tokenizer).config      # only its teacher matters here
        understand = reads(config.tokenizer, model_config)
        self.which, self.size, self.tokens = understand["teacher"], model_config.image_size, model_config.num_tokens
        if resumed: check_same(resumed, dict(tokenizer=self.which), f"{folder} learned from another VFM, pass its --tokenizer or --overwrite")
        self.encoder = load_teacher(config.tokenizer, model_config).to(ranks.device)
        if config.max_length <= self.tokens: raise UserError(f"--max_length {config.max_length} cannot hold {self.tokens} features and a question")
        if config.data == "shapes":
            self.data, self.val, index = None, None, torch.arange(5_000)
            texts = captions(scene := plan(index)) + [f"{q} {a}" for asked in questions(index, scene) for q, (_, a) in asked.items()]
        else:
            self.data, self.val = (Conversations(file, self.size, config.seed, part="all" if config.val_data else part, folder=config.images)
                                   for file, part in ((config.data, "train"), (config.val_data or config.data, "val")))
            texts = [text.replace("<image>", "") for i in range(len(self.data) if config.lm == "random" else 0)
                     for turn in self.data.record(i)["turns"] for text in turn]
        self.lm, self.text_tokenizer = build_lm(config, texts + ["USER: ASSISTANT:"])
        self.lm.config.understand = understand | dict(max_length=config.max_length)
        self.encode = functools.partial(chat, self.text_tokenizer, self.tokens, config.max_length, config.phase == "pretrain")
        for data in filter(None, (self.data, self.val)):
            data.encode = self.encode                                         # what it refuses is skipped, as unreadable images are
            data[0]                                                           # if none is left, before anything old is deleted
        self.net = MLLM(self.lm, model_config.dim)
        if config.phase == "sft" and not resumed:
            before = folder / "pretrain.pt"
            if not before.exists(): raise UserError(f"SFT starts from {before}, which is not there: run --phase pretrain first")
            with explained(f"{before} is of another language model, or of other texts"):
                self.net.load_state_dict((pretrained := load_checkpoint(before, "model", "tokenizer"))["model"])
            check_same(pretrained, dict(tokenizer=self.which), f"{before} learned from another VFM")
        self.lm.requires_grad_(config.phase == "sft")
    def stream(self, parts, val=False):
        """Ranges of positions -> iterator over ids, scored (b, L) and images (b, 3, h, w)."""
        if self.data is None:
            for part in parts:
                images, turns = shapes_turns(torch.tensor(part), self.size, self.config.phase)
                yield collate([self.encode(each) | dict(image=image) for image, each in zip(images, turns)])
        else: yield from torch.utils.data.DataLoader(self.val if val else self.data, batch_sampler=parts, num_workers=self.config.num_workers,
                                                     collate_fn=collate, worker_init_fn=ignore_signals, generator=torch.Generator())
    def loss(self, net, ids, scored, images):
        """Mean cross-entropy (nats) of a micro-batch's S answer tokens, as LLaVA's: so --micro_batch changes their weights a little."""
        return F.cross_entropy(full(net(ids, scored, self.encoder(images))), ids[:, 1:][scored[:, 1:]])      # (S, vocabulary), (S,)
    def validate(self, parts):
        """Mean loss of all answers' tokens; their share of right answers is eval.py's."""
        losses = [(self.loss(self.net, *(t.to(self.device) for t in batch)), batch[1][:, 1:].sum()) for batch in self.stream(parts, val=True)]
        return dict(val_loss=(sum(loss * n for loss, n in losses) / sum(n for _, n in losses)).item())
    def next(self):
        sft = dict(task="understand", phase="sft", overwrite=(Path(self.config.out_dir) / "mllm/sft.pt").exists())
        if self.config.phase == "pretrain": return next_command("train_ar.py", self.config, CARRIED, **sft)
        if self.val is None: return next_command("eval.py", self.config, SHARED - {"tokenizer"}, vqa=True) + f" {shlex.quote(self.config.tokenizer)}"
        ask = self.data.record(0)["turns"][0][0].replace("<image>", "").strip() or "what?"        # a small LM knows its words
        return next_command("sample.py", self.config, SHARED, image=self.data.record(0)["name"], ask=ask)

def send(message, src_rank, group, device):
    """Send ZeRO's moments from one rank to all; the first saves them. Replaces torch's own function, which takes a minute a gigabyte."""
    buffer = io.BytesIO()
    if torch.distributed.get_rank() == src_rank: torch.save(message, buffer)
    box = [buffer.getvalue()]
    torch.distributed.broadcast_object_list(box, src_rank, group, device)
    if torch.distributed.get_rank() == 0: return torch.load(io.BytesIO(box[0]), map_location="cpu", weights_only=True)

def train(config, ranks):
    out, device, start = Path(config.out_dir), ranks.device, time.time()
    local, micro, accumulate = split_batch(config, ranks)
    folder = out / ("mllm" if config.phase else "ar")                         # phase is "" for --task generate alone
    path, sft_follows = folder / f"{config.phase or 'state'}.pt", config.phase == "pretrain" and "phase" not in config.given
    folder.mkdir(parents=True, exist_ok=True)
    resumed = open_run(path, config, ranks)
    first_step = resumed["step"] if resumed else 0
    task = (Understand if config.phase else Generate)(config, ranks, folder, resumed)
    task.val_at = range(VALIDATION, VALIDATION + config.val_images) if task.val is None else range(min(config.val_images, len(task.val)))
    task.net.to(device, torch.float64 if config.precision == "float64" else None).train()
    learning = [p for p in task.net.parameters() if p.requires_grad]
    how = dict(lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay,
               fused=device.type != "mps" and ranks.size == 1)                 # ZeRO's load puts the step count on the CPU, which fused CUDA refuses
    optimizer = torch.optim.AdamW(learning, **how)
    if ranks.size > 1:                                                        # ZeRO-1 [T9]: each rank keeps its share of the moments
        from torch.distributed.optim import zero_redundancy_optimizer as zero       # a second to import
        zero._broadcast_object = send
        optimizer = zero.ZeroRedundancyOptimizer(learning, optimizer_class=torch.optim.AdamW, **how)
    if resumed:
        with explained(f"{path} is of another language model, or of other texts"): task.net.load_state_dict(resumed["model"])
        resumed["optimizer"]["param_groups"][0].update(how)                   # rates and the like are this run's
        optimizer.load_state_dict(resumed["optimizer"])
        if ranks.size > 1: optimizer.state.clear()                            # ZeRO's load keeps this rank's share twice
        del resumed                                                           # it holds as much as model and optimiser
    if config.checkpointing: task.lm.gradient_checkpointing_enable(dict(use_reentrant=False))
    if config.compile: compile_parts(task.lm, task.encoder)
    net = ranks.ddp(task.net)
    starts = (step * config.batch_size + ranks.rank * local + i * micro for step in range(first_step, config.total_steps) for i in range(accumulate))
    stream = task.stream(range(at, at + micro) for at in starts)
    amp, stop = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"), False
    bar = tqdm(range(first_step, config.total_steps + 1), config.phase or "generator", config.total_steps, initial=first_step, unit="step",
               disable=not ranks.first)                                       # the last round only validates and saves
    if config.bench: stream, timed = itertools.repeat(next(stream)), bench(config, ranks, dict(lm=task.lm.base_model, teacher=task.encoder))
    else: ranks.begin([path, *[folder / "sft.pt"] * sft_follows] if config.overwrite else [])
    log = Log(out / f"log_{config.phase or 'ar'}.jsonl", first_step, config, ranks.first and not config.bench)
    for step in bar:
        if config.bench and next(timed): return
        # Once in a while: save, validate.
        last = step == config.total_steps
        if step > first_step and (stop or due(step, config.save_every, config)):
            if ranks.size > 1: optimizer.consolidate_state_dict(to=0)         # all ranks send theirs
            if ranks.first:
                save_checkpoint(path, dict(model=task.net.state_dict(), optimizer=optimizer.state_dict(), step=step, tokenizer=task.which,
                                           config=asdict(config)))
        if ranks.first and due(step, config.eval_every, config):
            task.net.eval()
            with amp, torch.no_grad(), torch.compiler.set_stance("force_eager") if config.compile else contextlib.nullcontext():       # many lengths
                found = task.validate(task.val_at[i:i + micro] for i in range(0, len(task.val_at), micro))
            task.net.train()
            log(step=step, **found)
        if last or stop: break

        # ---- One training step -----------------------------------------------------------------------------------------
        factor = lr_factor(step, config.warmup_steps, config.total_steps, config.end_lr / config.lr)
        for group in optimizer.param_groups: group["lr"] = config.lr * factor
        mean_loss = 0
        for i in range(accumulate):
            batch = [t.to(device, non_blocking=device.type == "cuda") for t in next(stream)]
            net.require_backward_grad_sync = i == accumulate - 1              # DDP averages gradients in backward: once a step is enough
            with amp: loss = task.loss(net, *batch)
            (loss / accumulate).backward()
            mean_loss += loss.detach() / accumulate
        grad_norm = nn.utils.clip_grad_norm_(learning, config.clip)
        means = ranks.sum(torch.stack([mean_loss, grad_norm, mean_loss.new_full((), ranks.stop_asked)])) / ranks.size
        optimizer.step()
        optimizer.zero_grad(set_to_none=ranks.size == 1)                      # DDP keeps gradients in its buckets: None would allocate them twice
        loss, grad_norm, stop = means.tolist()                                # the only wait for the GPU in a step; one rank asked to stop stops all
        check_finite({"cross-entropy": loss, "gradient norm": grad_norm}, f"{step} (images from {step * config.batch_size} on)")
        # ----------------------------------------------------------------------------------------------------------------
        if (step + 1) % config.log_every == 0:
            rate = config.batch_size * (bar.format_dict["rate"] or 0)
            log(step=step + 1, loss=loss, grad_norm=grad_norm, lr=config.lr * factor, images_per_s=rate)
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} images/s")
    if ranks.first and last:
        with explained(f"cannot write {folder}: free some space, then --resume"):
            for part in (task.lm.float(), task.text_tokenizer) if config.phase != "pretrain" else (): part.save_pretrained(folder)
            if config.phase == "sft": save_file(task.net.connector.state_dict(), folder / "connector.safetensors")
        report({what: f"{x:.3f}" for what, x in found.items()} | dict(parameters=f"{sum(p.numel() for p in task.net.parameters()) / 1e6:.2f} million",
               time=f"{(time.time() - start) / 60:.1f} minutes", pictures="" if config.phase else out / "samples.png", model=folder))
        if not sft_follows: print(f"\nNext: {task.next()}")
    ranks.wait()
    if not last: ranks.end_early(step, config)
    return last

def main():
    config, _, _ = parse_config(ARConfig, PRESETS)
    ranks, phases = Ranks(config.device), [config.phase]
    if config.task == "understand" and not config.phase:
        phases = ["sft"] if config.resume and (Path(config.out_dir) / "mllm/sft.pt").exists() else ["pretrain", "sft"]
    for phase in phases:
        config, _, origin = parse_config(ARConfig, PRESETS, phase=phase)
        config.resume = config.resume and phase == phases[0]                  # what comes after it was not begun
        if ranks.first: print_config(origin, config)
        if not train(config, ranks): break

if __name__ == "__main__":
    command_line(main)
