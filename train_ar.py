"""
Train a language model on the tokenizer's two outputs: to write codes (3.5, Table 9), or to read Z_I (3.4, Table 8).

    python train_ar.py                    tiny: a small random Qwen3 on drawn shapes, after train_tokenizer.py. CPU
    python train_ar.py --task understand  tiny: another answers questions about them; both phases
    torchrun --nproc_per_node=8 train_ar.py --config internvit_448 --data 'FOLDER or shards-{000..127}.tar' --micro_batch 8
    torchrun --nproc_per_node=8 train_ar.py --config siglip2_256 --task understand --phase pretrain --data LLAVA.json, then sft

--task generate. A caption and its picture are one sequence:
    a red circle  <|vision_start|>  v_1 v_2 ... v_N  <|vision_end|>  <pad> ... <pad>         v = code + offset
    caption       BOI               row by row       EOI
                  |------ predict ------|         the loss is on v_1 ... v_N alone: N is fixed, no EOI to predict
One caption in ten is left out: a sequence from BOI on is the unconditional prompt of classifier-free guidance.

--task understand. LLaVA-1.5's layout: N features Z_I, through a connector, for <image>; the loss is on the answers:
    USER: z_1 z_2 ... z_N how many rings are there? ASSISTANT: two </s> USER: ... ASSISTANT: ... </s>   phase sft
          z_1 z_2 ... z_N a red circle </s>                                                             phase pretrain
"""
import functools, hashlib, io, itertools, json, shlex, time, zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageOps
from safetensors.torch import load_file, save_file
from torchvision.utils import save_image
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, logging

from train_tokenizer import (COLORS, NUMBERS, PLURAL, SHAPES, VALIDATION, Images, article, batches, captions, crop, decode,
                             fingerprint, hashed, note, plan, render, save_array, shuffled)
from vqrae import (Encoder, Log, Ranks, UserError, bench, check_finite, check_run, check_same, command_line, compile_parts, due,
                   explained, full, hub_file, ignore_signals, load_checkpoint, load_tokenizer, lr_factor, next_command, open_run,
                   no_autocast, parse_config, print_config, report, resize, save_checkpoint, split_batch, timm_key, uniform)

logging.set_verbosity_error()  # transformers' own
logging.disable_progress_bar()

# ---- Configuration. Defaults: the paper's generator. Sources: [T8], [T9] the paper's Tables 8, 9, [LlamaGen], [ours].
@dataclass
class ARConfig:
    config: str = "tiny"                  # whose presets and run folder: a key of vqrae.MODELS
    task: Literal["generate", "understand"] = "generate"  # write pictures, or answer questions about them
    phase: Literal["pretrain", "sft"] = ""  # [T8] understand: connector on captions, then LLM too on conversations; "": both
    data: str = "shapes"                  # shapes, a folder of images, 'shards-{000..127}.tar', or (understand) LLaVA's JSON
    val_data: str = ""                    # the same for validation; "": every 20th image, or shapes not trained on
    images: str = ""                      # understand: the folder where the JSON's image paths start; "": its own
    out_dir: str = ""                     # the run's folder; "": out/CONFIG
    tokenizer: str = ""                   # folder of the VQRAE tokenizer; "": out_dir/tokenizer
    resume: bool = False                  # go on from the last checkpoint
    overwrite: bool = False               # start over although there is a checkpoint
    device: str = ""                      # cuda, mps or cpu; "": the first of them that is there
    bench: int = 0                        # time that many steps on one batch; saves nothing but missing codes-*.npy
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
    lm: str = "Qwen/Qwen3-0.6B"           # [T9] hub name or folder of a language model (generate: a Qwen3); or random
    lm_config: dict = None                # of --lm random: Qwen3Config's values; its words are those of the training texts
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
        check_run(self, eps=0, caption_drop=(0, 1))
        self.tokenizer = self.tokenizer or f"{self.out_dir}/tokenizer"
        if self.task == "generate":
            if self.phase or self.images: raise UserError("--phase and --images are of --task understand")
        elif self.data == "shapes" and (self.val_data or self.images): raise UserError("--val_data, --images want --data")

TINY_LM = dict(hidden_size=128, num_hidden_layers=4, intermediate_size=256, num_attention_heads=8, num_key_value_heads=8,
               head_dim=16, initializer_range=0.06, rope_parameters=dict(rope_type="default", rope_theta=1000.0))
TINY_MLLM = TINY_LM | dict(intermediate_size=384, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
PRESETS = {
    # [T8] LLaVA-1.5: an epoch of 595 thousand captions, one of 665 thousand conversations; 3% warmup. The others: [ours]
    "task understand": dict(lm="lmsys/vicuna-7b-v1.5", end_lr=0.0, eps=1e-8, max_length=2048),
    "phase pretrain": dict(lr=1e-3, total_steps=2325, warmup_steps=70, batch_size=256),
    "phase sft": dict(lr=2e-5, total_steps=5195, warmup_steps=156, batch_size=128),
    "config siglip2_base_256, task generate": dict(batch_size=128, micro_batch=16),
    "config tiny": dict(lm="random", lm_config=TINY_LM, max_length=128, precision="float32", num_workers=0, lr=3e-3, end_lr=1e-4,
        batch_size=16, weight_decay=0.1, total_steps=2900, warmup_steps=50, log_every=20, eval_every=1000, save_every=1000),
    "config tiny, task understand": dict(lm_config=TINY_MLLM, max_length=192, weight_decay=0.05),
    "config tiny, phase pretrain": dict(lr=3e-4, total_steps=60, warmup_steps=10),
    "config tiny, phase sft": dict(lr=1e-3, total_steps=1500),
}
SHARED = {"config", "out_dir", "device", "tokenizer"}  # flags that the next command takes over; CARRIED: if it is SFT's
CARRIED = SHARED | set(
    "data val_data images lm lm_config max_length micro_batch num_workers precision compile checkpointing seed".split())

# ---- Language model and layout. What a generator has beyond any Qwen3 stands in its config as `visual`:
# offset and codes (the ids offset ... offset + codes - 1 are pictures), tokens (N), boi, eoi, max_length, and which tokenizer.
BOI, EOI = "<|vision_start|>", "<|vision_end|>"  # Qwen3's own names; other text tokenizers are given them
PAD, UNKNOWN, END, IMAGE = "<pad>", "<unk>", "</s>", -1  # IMAGE: one feature of Z_I among the ids

def valid(text): return text.encode(errors="replace").decode()  # half characters, which tokenizers refuse, become "?"
def word_tokenizer(texts):  # a text tokenizer of their words and punctuation marks, in lower case
    split, lower = tokenizers.pre_tokenizers.Whitespace(), tokenizers.normalizers.Lowercase()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(lower.normalize_str(text))}
    ids = {word: i for i, word in enumerate([PAD, UNKNOWN, END, *sorted(words)])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, UNKNOWN))
    model.pre_tokenizer, model.normalizer = split, lower
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token=PAD, unk_token=UNKNOWN, eos_token=END)
def build_lm(config, texts):  # the language model as it was before pictures, and its text tokenizer
    torch.manual_seed(config.seed)
    if config.lm == "random":
        text_tokenizer = word_tokenizer(texts)
        with explained(f"--lm random needs --lm_config, JSON of Qwen3Config's values, not {config.lm_config}"):
            if strange := {*config.lm_config} - {*Qwen3Config().to_dict()}: raise ValueError(f"it has no {', '.join(strange)}")
            lm = Qwen3ForCausalLM(Qwen3Config(**config.lm_config | dict(vocab_size=len(text_tokenizer))))
            lm(torch.zeros(1, 2, dtype=torch.int64))  # numbers of heads that do not go together fail here
        nn.init.normal_(lm.get_input_embeddings().weight)  # smaller ones drown in the first layer: README
        return lm, text_tokenizer
    with explained(f"--lm {config.lm} is neither a folder nor a name on the hub of a whole language model"):
        if not Path(config.lm).is_dir():  # without network this fails within seconds
            hub_file(config.lm, "config.json", f"run `hf download {config.lm}` there, and pass its folder with --lm FOLDER")
        return read_lm(config.lm)
def read_lm(name, dtype=torch.float32):  # by itself transformers would keep the saved type, Qwen3's bfloat16
    here = Path(name).is_dir()  # then what a folder lacks is not looked for on the hub
    lm = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=here)
    return lm, AutoTokenizer.from_pretrained(name, local_files_only=here)

@torch.no_grad()
def grow_vocabulary(lm, text_tokenizer, tokenizer, which, max_length):
    """Append rows to the embedding table of `lm`: BOI and EOI if it lacks them, then the k codes, random projections of C W, so
    that codes alike begin alike (README). Its own rows are more (Qwen3: 151936) than its tokens (151669). which: its hash."""
    text_tokenizer.add_tokens([BOI, EOI], special_tokens=True)
    k, e, N = tokenizer.config.codebook_size, tokenizer.config.codebook_dim, tokenizer.config.num_tokens
    old, hidden, offset = lm.config.vocab_size, lm.config.hidden_size, max(lm.config.vocab_size, len(text_tokenizer))
    lm.resize_token_embeddings(offset + k, mean_resizing=False)
    vectors = tokenizer.quantizer.lookup(torch.arange(k, device=tokenizer.from_code.weight.device)).cpu()  # (k, e)
    vectors = F.layer_norm(vectors - vectors.mean(0), (e,)) @ torch.randn(e, hidden) / e ** 0.5  # (k, hidden), N(0, 1)
    vectors = torch.cat([torch.randn(offset - old, hidden), vectors])
    for table in {lm.get_input_embeddings().weight, lm.get_output_embeddings().weight}:  # one where they are tied
        table[old:] = table[:old].mean(0) + table[:old].std() * vectors
    boi, eoi = text_tokenizer.convert_tokens_to_ids([BOI, EOI])
    lm.config.visual = dict(offset=offset, codes=k, tokens=N, boi=boi, eoi=eoi, max_length=max_length, tokenizer=which)

def pad(rows, side):  # B lists -> (B, L). torch 2.8's pad_sequence fails while FLOP are counted
    gaps = [max(map(len, rows)) - len(row) for row in rows]
    return torch.stack([F.pad(torch.tensor(row), (gap, 0) if side == "left" else (0, gap)) for row, gap in zip(rows, gaps)])
def pad_ids(rows, side="left"):  # B lists of ids -> ids and mask, (B, L) each; the mask hides the padding's 0
    return pad(rows, side), pad([[1] * len(row) for row in rows], side)
def layout(text_tokenizer, visual, texts, codes=None):
    """B captions, their codes (B, N) -> ids and mask (B, T + N + 2), as drawn above; without codes (B, T + 1): prompts,
    padded on the left to end with BOI. T: the longest caption's length. Captions beyond max_length are cut."""
    room, encoded = visual["max_length"] - visual["tokens"] - 2, text_tokenizer(texts, add_special_tokens=False).input_ids
    if max(map(len, encoded)) > room: note(f"note: captions are cut after {room} tokens, for --max_length")
    rows = [ids[:room] + [visual["boi"]] for ids in encoded]
    if codes is None: return pad_ids(rows)
    pictures = (codes + visual["offset"]).tolist()
    return pad_ids([row + picture + [visual["eoi"]] for row, picture in zip(rows, pictures)], "right")
def visual_logits(lm, hidden):  # (..., hidden) -> (..., k): a picture has no words, and Qwen3's 151936 cost ten times as much
    return F.linear(hidden, lm.get_output_embeddings().weight[lm.config.visual["offset"]:][:lm.config.visual["codes"]])

class PictureLM(nn.Module):  # the language model as it is trained
    def __init__(self, lm):
        super().__init__()
        self.lm = lm
    def forward(self, ids, mask):  # layouts, (B, T + N + 2) each -> logits of v_1 ... v_N, (B, N, k)
        # Padding comes last, where causal attention never looks: no mask, faster. `at`: BOI, v_1 ... v_(N-1), which predict.
        x = self.lm.model(ids[:, :-2], dict(full_attention=None), use_cache=False).last_hidden_state  # (B, T + N, hidden)
        at = mask.sum(1, keepdim=True) - 2 + torch.arange(-self.lm.config.visual["tokens"], 0, device=ids.device)  # (B, N)
        return visual_logits(self.lm, x.take_along_dim(at[..., None], 1))

def weights_hash(path):  # of a tokenizer (folder) or a teacher (file)
    if Path(path).is_dir(): path = Path(path, "model.safetensors")
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()[:16]
def load_generator(out_dir, tokenizer_folder, device="cpu", dtype=torch.float32):
    """-> language model, its text tokenizer, and the VQRAE tokenizer of its codes, checked to belong together."""
    folder, tokenizer = Path(out_dir) / "ar", load_tokenizer(tokenizer_folder, device)
    with explained(f"no whole generator in {folder}: train_ar.py makes one, --resume finishes one"):
        (folder / "config.json").stat()  # what is not here, transformers would look for on the hub
        lm, text_tokenizer = read_lm(folder, dtype)
        which = dict(tokenizer=weights_hash(tokenizer_folder))
        check_same(lm.config.visual, which, f"{folder} is of another tokenizer: pass that")
    return lm.to(device).eval(), text_tokenizer, tokenizer

# ---- Codes are computed once and kept: a file's on disk, those of shapes (to draw them costs a fifth of a step) in memory.
def open_codes(source, part, config, tokenizer, which, ranks):
    """Codes and captions of `source`, a memory-mapped array of records: codes-PART-TOKENIZER-DATA.npy. None for shapes."""
    if source == "shapes": return None
    with ranks.first_alone():  # in order; centre crop [T9]
        dataset = Images(source, tokenizer.config.image_size, in_order=True, folder=config.out_dir,
                         part="all" if config.val_data else part)
    if not any(record["label"] or record["text"] for record in map(dataset.record, range(len(dataset)))):
        raise UserError(f"no {part} image of {source} has caption or class: add metadata.jsonl or .txt (README)")
    if source.endswith(".tar"): images = fingerprint(dataset.records.paths, len(dataset))
    else:  # a text that is no file stands in the records
        files = [place[0] for row in dataset.records for place in (row["image"], row["text"]) if isinstance(place, tuple)]
        images = fingerprint(files, len(dataset), [*dataset.records])
    path = Path(config.out_dir) / f"codes-{part}-{which}-{images}.npy"
    if path.is_file(): return np.load(path, mmap_mode="r")
    if other := next(path.parent.glob(f"codes-{part}-*.npy"), None):
        what = "other images, captions, path or --val_data" if which in other.name else "another tokenizer"
        raise UserError(f"{other} is of {what}: delete it to replace it, or keep the runs apart with --out_dir")
    partial = path.with_suffix(".partial")
    if ranks.first and not partial.exists():  # else a killed run's is gone on with
        codes = ("codes", "<u2" if tokenizer.config.codebook_size <= 1 << 16 else "<u4", tokenizer.config.num_tokens)
        empty = np.broadcast_to(np.zeros((), [codes, ("text", "S1024"), ("done", "?")]), len(dataset))  # takes no memory
        save_array(partial, empty)  # in full: a disk that fills later is a bus error
    ranks.wait()
    rows = np.load(partial, mmap_mode="r+")
    todo = np.array_split(np.flatnonzero(~rows["done"]), ranks.size)[ranks.rank].tolist()  # this rank's share
    ranks.wait()  # until all have read what is done
    bar = tqdm(todo, f"codes-{part}", unit="image", disable=not ranks.first)
    for i, batch in enumerate(batches(dataset, tokenizer.config.image_size, bar, 64, config.num_workers, ranks.device)):
        here = todo[64 * i:64 * (i + 1)]
        texts = [(text or label).encode(errors="replace") for text, label in zip(batch["text"], batch["label"])]
        if max(map(len, texts)) > 1024: note("note: captions are cut after 1,024 bytes")
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.precision == "bf16"):  # as it was trained
            rows["codes"][here], rows["text"][here] = tokenizer.tokenize(batch["image"]).cpu(), texts
        rows["done"][here] = True
    rows.flush()
    skipped = int(ranks.sum(torch.tensor(len(dataset.skipped))))  # waits for all ranks
    if skipped: ranks.say(f"{skipped} unreadable images, in whose place the next ones stand")
    if ranks.first: partial.replace(path)
    ranks.wait()
    return np.load(path, mmap_mode="r")

# ---- Conversations about images, in LLaVA's layout
def chat(text_tokenizer, tokens, max_length, plain, turns):
    """[(question, answer), ...] of one image -> ids [int], cut at max_length, and scored [bool]: which are an answer's.
    <image> becomes `tokens` times IMAGE. An answer of None is left to the model. plain: image and first answer alone."""
    encode = lambda text: text_tokenizer(text, add_special_tokens=False).input_ids
    ids, scored = [text_tokenizer.bos_token_id] if text_tokenizer.bos_token_id is not None else [], []
    for question, answer in turns[:1] if plain else turns:
        prompt = "<image>" if plain else f"USER: {question} ASSISTANT:"
        for i, piece in enumerate(prompt.split("<image>")):
            ids += [IMAGE] * tokens * (i > 0) + encode(piece)
        scored += [False] * (len(ids) - len(scored))
        if answer is not None:
            ids += encode(answer) + [text_tokenizer.eos_token_id]
            scored += [True] * (len(ids) - len(scored))
    ids, scored = ids[:max_length], scored[:max_length]
    if ids.count(IMAGE) == tokens and (any(scored) or answer is None): return dict(ids=ids, scored=scored)
    raise UserError(f"image and answer do not fit into --max_length {max_length}")
def collate(rows):  # B dicts of ids, scored and image -> (B, L) twice, (B, 3, h, w)
    for row in rows:
        for line in row.get("skipped", "").splitlines(): note(f"skipped {line}")
    ids, scored = (pad([row[name] for row in rows], "right") for name in ("ids", "scored"))
    return ids, scored, torch.stack([row["image"] for row in rows])

class MLLM(nn.Module):  # LLaVA-1.5: a language model that reads Z_I (B, N, d), through a connector, for <image>
    def __init__(self, lm, dim):
        super().__init__()
        self.lm, width = lm, lm.get_input_embeddings().embedding_dim
        self.connector = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width))  # [T8] mlp2x_gelu
    def embed(self, ids, Z_I):  # (B, L), (B, N, d) -> (B, L, width)
        x = self.lm.get_input_embeddings()(ids.clamp(min=0))  # for IMAGE, -1, any word
        z = self.connector(Z_I.to(self.connector[0].weight.dtype))  # (B, N, width)
        return x.masked_scatter((ids == IMAGE)[..., None], z.to(x.dtype))  # z_1 ... z_N in the places of IMAGE, in order
    def forward(self, ids, scored, Z_I):  # (B, L) twice, padded on the right, where no token looks; (B, N, d)
        x = self.lm.base_model(inputs_embeds=self.embed(ids, Z_I), use_cache=False).last_hidden_state  # (B, L, width)
        return self.lm.get_output_embeddings()(x[:, :-1][scored[:, 1:]])  # (answer tokens, vocabulary)

def swap_encoder(mllm, encoder):
    """Put `encoder` in place of the vision tower of a transformers MLLM with the same ViT (InternVL3, LLaVA with SigLIP):
    section 3.4, no training. A final norm or a pooling head, after Z_I, stays. README, "Into a published MLLM"."""
    layer = mllm.config.vision_feature_layer
    if layer != -1: raise UserError(f"the MLLM reads layer {layer} of its vision tower; Z_I, which was distilled, is layer -1")
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

class Conversations(Images):  # those of LLaVA's JSON (README shows one) by position; Understand sets its `encode`
    def read(self, file, folder):
        folder, records = Path(folder or Path(file).parent), []
        with explained(f"{file}: not LLaVA's JSON, a list of objects"): rows = list.copy(json.loads(Path(file).read_bytes()))
        for number, row in enumerate(rows):
            with explained(f"{file}, conversation {number} (from 0): not LLaVA's JSON (image; conversations of human and gpt)"):
                if "image" not in row: continue
                said = [valid(turn["value"]).strip() for turn in row["conversations"]]
                turns = [*zip(said[::2], said[1::2], strict=True)]
                who = [turn.get("from") for turn in row["conversations"]]
                if "gpt" in who[::2] or "human" in who[1::2]: raise ValueError("they do not take turns")
                marks = "".join(said[::2]).count("<image>")
                if marks != 1: raise ValueError(f"<image> must stand in its questions exactly once, not {marks} times")
                records.append(dict(name=folder / row["image"], turns=turns))
        if records and not records[0]["name"].is_file():
            raise UserError(f"{file}: no file {records[0]['name']}; --images DIR names the folder")
        return records
    def load(self, record, _): return self.encode(record["turns"]) | dict(image=square(record["name"], self.size))
def square(file, size):  # an image file -> (3, size, size) in [0, 1], padded with grey [LLaVA-1.5]: nothing is cut off
    return crop(ImageOps.pad(decode(Path(file).read_bytes()), (size, size), color=(127, 127, 127)), size) / 255

def questions(index, scene):
    """Picture numbers (B,), their Scene -> for each {question: (kind, answer)}, shuffled: presence, counting, up to two of color
    and position, about different objects: more would answer one another. Names come last, where a small model learns to look."""
    out, names = [], list(COLORS)
    columns = (t.tolist() for t in (scene.count, scene.shape, scene.color, scene.x, scene.y))
    for u, n, shapes, colors, xs, ys in zip(hashed(index, 60)[:, 48:].tolist(), *columns):  # plan uses 48
        drawn = [SHAPES[s] for s in shapes[:n]]
        things = [(names[c], shape) for c, shape in zip(colors, drawn)]
        i = int(u[0] * n)
        j = (i + 1 + int(u[1] * (n - 1))) % n  # another one, if there is another
        color, shape = things[i]
        if u[2] < 0.5:  # POPE asks half its questions about what is not there, half of those with something right
            color, shape = names[int(u[3] * 8)], SHAPES[int(u[4] * 6)] if u[5] < 0.5 else shape
        asked = {f"is there {article(color)} {shape}?": ("presence", "yes" if (color, shape) in things else "no")}
        if u[6] < 0.4 and len(set(drawn)) == n:  # of one shape, all answers would be "one"
            asked["how many objects are there?"] = "counting", NUMBERS[n]
        else:
            shape = drawn[i] if u[6] < 0.8 else SHAPES[int(u[7] * 6)]
            asked[f"how many {PLURAL[shape]} are there?"] = "counting", NUMBERS[drawn.count(shape)]
        alone = [o for o in ([i] if i == j else [i, j]) if drawn.count(drawn[o]) == 1]  # their shape tells which is meant
        asked |= {f"what color is the {drawn[o]}?": ("color", things[o][0]) for o in alone}
        dx, dy = xs[i] - xs[j], ys[i] - ys[j]
        if u[8] < 0.3 and len(alone) == 2 and max(abs(dx), abs(dy)) > 8:
            ways, d = (("left", "right"), dx) if abs(dx) > abs(dy) else (("above", "below"), dy)
            of = " of" if "left" in ways else ""
            asked[f"is the {drawn[i]} {' or '.join(ways)}{of} the {drawn[j]}?"] = "position", ways[d >= 0]
        else:
            for o, across in zip(alone, (u[9] < 0.5, u[9] >= 0.5)):  # of two one across, one down
                sides, at = (("left", "right"), xs[o]) if across else (("top", "bottom"), ys[o])
                asked[f"{' or '.join(sides)}: where is the {drawn[o]}?"] = "position", sides[at >= 32]
        out.append(dict(sorted(asked.items(), key=lambda item: zlib.crc32(f"{u[-1]} {item[0]}".encode()))))
    return out
def shapes_turns(index, size, phase):  # picture numbers (B,) -> images (B, 3, size, size) and the turns of each
    scene = plan(index)
    turns = [[(question, answer) for question, (_, answer) in asked.items()] for asked in questions(index, scene)]
    if phase == "pretrain": turns = [[("", caption)] for caption in captions(scene)]
    return resize(render(scene), size), [[("<image>\n" + question, answer), *more] for (question, answer), *more in turns]

def teacher_file(folder): return next(Path(folder).glob("teacher.safetensors"), None)  # None: a hub has it
def load_teacher(folder, config):  # the frozen VFM that the tokenizer in `folder` began from
    source = str(teacher_file(folder) or config.encoder_weights)
    if source == "stage0": raise UserError(f"{folder} lacks teacher.safetensors: save_tokenizer(model, folder, teacher)")
    return Encoder(config, source).requires_grad_(False).eval()
def reads(folder, config):  # what an MLLM of its teacher reads; VFMs go by name on the hub, else by weights
    file = teacher_file(folder)
    teacher = weights_hash(file) if file else f"{config.encoder}, {config.encoder_weights}"
    return dict(dim=config.dim, tokens=config.num_tokens, image_size=config.image_size, teacher=teacher)
def load_mllm(out_dir, tokenizer_folder, device="cpu", dtype=torch.float32):
    """-> MLLM, its text tokenizer, and the VQRAE tokenizer, checked to have begun from the VFM that the MLLM reads."""
    folder, tokenizer = Path(out_dir) / "mllm", load_tokenizer(tokenizer_folder, device)
    with explained(f"no whole MLLM in {folder}: train_ar.py --task understand makes one (--out_dir names the run)"):
        connector = load_file(folder / "connector.safetensors")
        lm, text_tokenizer = read_lm(folder, dtype)
        check_same(lm.config.understand, reads(tokenizer_folder, tokenizer.config), f"{folder} reads another VFM")
    net = MLLM(lm, tokenizer.config.dim)
    net.connector.load_state_dict(connector)
    return net.to(device, dtype).eval(), text_tokenizer, tokenizer

# ---- Training. A task has a network, batches by position, a loss, a validation (of val_at, set below), files; one loop for all.
class Generate:  # captions -> codes. The whole language model learns
    def __init__(self, config, ranks, folder, resumed):
        self.config, self.device, self.folder, self.encoder = config, ranks.device, folder, None
        self.tokenizer, self.which = load_tokenizer(config.tokenizer, ranks.device), weights_hash(config.tokenizer)
        if resumed: check_same(resumed, dict(tokenizer=self.which), f"{folder} is of another tokenizer: pass it, or --overwrite")
        if self.tokenizer.quantizer is None: raise UserError(f"{config.tokenizer} has no codes: it wants --quantizer simvq")
        least = self.tokenizer.config.num_tokens + 18  # two marks and a caption of 16 tokens
        if config.max_length < least: raise UserError(f"--max_length is at least {least} here, not {config.max_length}")
        self.draw = functools.cache(self.draw)  # a batch of shapes is drawn once
        if config.lm != "random":  # before the codes, which may take hours: a wrong --lm fails at once
            self.lm, self.text_tokenizer = build_lm(config, [])
            if self.lm.config.model_type != "qwen3": raise UserError(f"--lm {config.lm} is no Qwen3, as --task generate wants")
        self.val = open_codes(config.val_data or config.data, "val", config, self.tokenizer, self.which, ranks)
        self.data = open_codes(config.data, "train", config, self.tokenizer, self.which, ranks)  # last: may take hours
        if config.lm == "random":
            texts = captions(plan(torch.arange(10_000))) if self.data is None else self.fetch(range(len(self.data)))[1]
            self.lm, self.text_tokenizer = build_lm(config, texts)
        grow_vocabulary(self.lm, self.text_tokenizer, self.tokenizer, self.which, config.max_length)
        self.net, self.visual = PictureLM(self.lm), self.lm.config.visual
    def fetch(self, positions, val=False):  # b positions -> codes (b, N) int64, captions [b]
        rows = self.val if val else self.data
        if rows is None:
            batch, first = self.config.batch_size, positions[0]
            if not val: first %= max(1, 25_600 // batch) * batch  # after 25,600 pictures the first come again, from draw's cache
            return self.draw(range(first, first + len(positions)))
        found = rows[[shuffled(p, len(rows), 0 if val else self.config.seed) for p in positions]]  # files are sorted
        return torch.from_numpy(found["codes"].astype(np.int64)), [text.decode("utf-8", "ignore") for text in found["text"]]
    def draw(self, positions):  # fetch's answer for shapes, cached
        batch = next(batches(None, self.tokenizer.config.image_size, positions, len(positions), device=self.device))
        with no_autocast(batch["image"]): return self.tokenizer.tokenize(batch["image"]).cpu(), batch["text"]
    def stream(self, parts, val=False):  # ranges of b positions -> ids and mask (b, T + N + 2), and codes (b, N)
        seed, drop = self.config.seed * 1_000_003, 0 if val else self.config.caption_drop
        for part in parts:
            codes, texts = self.fetch(part, val)
            texts = [text if uniform(seed + p, 1).item() >= drop else "" for p, text in zip(part, texts)]
            yield *layout(self.text_tokenizer, self.visual, texts, codes), codes
    def loss(self, net, ids, mask, codes):  # mean cross-entropy (nats) of the N codes of each layout, float32
        return F.cross_entropy(full(net(ids, mask)).flatten(0, 1), codes.flatten())  # of logits (b, N, k)
    def validate(self, parts):  # mean loss; draws the first pictures, unguided (sample.py is faster)
        total, N, offset = 0.0, self.visual["tokens"], self.visual["offset"]
        for batch in self.stream(parts, val=True):
            total += self.loss(self.net, *(t.to(self.device) for t in batch)).item() * len(batch[0]) / len(self.val_at)
        texts = self.fetch(self.val_at[:16], val=True)[1]
        ids, mask = (t.to(self.device) for t in layout(self.text_tokenizer, self.visual, texts))
        torch.manual_seed(self.config.seed)
        ids = self.lm.generate(ids, attention_mask=mask, max_new_tokens=N, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                               suppress_tokens=list(range(offset)))  # all words, and the end of a text
        save_image(self.tokenizer.detokenize(ids[:, -N:] - offset).float().clamp(0, 1), self.folder.parent / "samples.png")
        return total
    def next(self):
        caption = next(filter(None, self.fetch(range(16))[1]), "")  # the first there is
        return next_command("sample.py", self.config, SHARED, prompt=" ".join(caption.split()[:12]))

class Understand:  # questions -> answers, from the teacher's Z_I. The connector learns, in SFT the LLM too
    def __init__(self, config, ranks, folder, resumed):
        self.config, self.device = config, ranks.device
        model_config = load_tokenizer(config.tokenizer).config  # only its teacher matters here
        understand = reads(config.tokenizer, model_config)
        self.which, self.size, self.tokens = understand["teacher"], model_config.image_size, model_config.num_tokens
        if resumed: check_same(resumed, dict(tokenizer=self.which), f"{folder} is of another VFM than --tokenizer: --overwrite?")
        self.encoder = load_teacher(config.tokenizer, model_config).to(ranks.device)
        if config.max_length <= self.tokens: raise UserError(f"--max_length must exceed the {self.tokens} features of an image")
        if config.data == "shapes":
            self.data, self.val, index = None, None, torch.arange(5_000)
            texts = captions(plan(index)) + [f"{q} {a}" for asked in questions(index, plan(index)) for q, (_, a) in asked.items()]
        else:
            train, val = ("all", "all") if config.val_data else ("train", "val")
            self.data = Conversations(config.data, self.size, config.seed, part=train, folder=config.images)
            self.val = Conversations(config.val_data or config.data, self.size, config.seed, part=val, folder=config.images)
            records = map(self.data.record, range(len(self.data) if config.lm == "random" else 0))
            texts = [text.replace("<image>", "") for record in records for turn in record["turns"] for text in turn]
        self.lm, self.text_tokenizer = build_lm(config, texts + ["USER: ASSISTANT:"])
        self.lm.config.understand = understand | dict(max_length=config.max_length)
        self.lm.generation_config.do_sample = True  # Vicuna's own has a temperature without, which transformers may not save
        self.encode = functools.partial(chat, self.text_tokenizer, self.tokens, config.max_length, config.phase == "pretrain")
        for data in filter(None, (self.data, self.val)):
            data.encode = self.encode  # what it refuses is skipped, as unreadable images are
            data[0]  # if none is left, before anything old is deleted
        self.net = MLLM(self.lm, model_config.dim)
        if config.phase == "sft" and not resumed:
            before = folder / "pretrain.pt"
            if not before.exists(): raise UserError(f"SFT starts from {before}, which is not there: run --phase pretrain first")
            pretrained = load_checkpoint(before, "model", "tokenizer")
            with explained(f"{before} is of another LM or other texts"): self.net.load_state_dict(pretrained["model"])
            check_same(pretrained, dict(tokenizer=self.which), f"{before} learned from another VFM")
        self.lm.requires_grad_(config.phase == "sft")
    def stream(self, parts, val=False):  # ranges of b positions -> ids, scored (b, L) and images (b, 3, h, w)
        if self.data is None:
            for part in parts:
                images, turns = shapes_turns(torch.tensor(part), self.size, self.config.phase)
                yield collate([self.encode(each) | dict(image=image) for image, each in zip(images, turns)])
        else:
            yield from torch.utils.data.DataLoader(
                self.val if val else self.data, batch_sampler=parts, num_workers=self.config.num_workers, collate_fn=collate,
                worker_init_fn=ignore_signals, generator=torch.Generator())
    def loss(self, net, ids, scored, images):  # mean cross-entropy (nats) of a micro-batch's S answer tokens, as LLaVA's
        return F.cross_entropy(full(net(ids, scored, self.encoder(images))), ids[:, 1:][scored[:, 1:]])  # (S, vocabulary), (S,)
    def validate(self, parts):  # mean loss of all answers' tokens; their share of right answers is eval.py's
        moved = ([t.to(self.device) for t in batch] for batch in self.stream(parts, val=True))
        losses = [(self.loss(self.net, *batch), batch[1][:, 1:].sum()) for batch in moved]
        return (sum(loss * n for loss, n in losses) / sum(n for _, n in losses)).item()
    def next(self):
        sft = dict(task="understand", phase="sft", overwrite=(Path(self.config.out_dir) / "mllm/sft.pt").exists())
        if self.config.phase == "pretrain": return next_command("train_ar.py", self.config, CARRIED, **sft)
        folder = shlex.quote(self.config.tokenizer)
        if self.val is None: return f"{next_command('eval.py', self.config, SHARED - {'tokenizer'}, vqa=True)} {folder}"
        record = self.data.record(0)
        ask = record["turns"][0][0].replace("<image>", "").strip() or "what?"  # a small LM knows its words
        return next_command("sample.py", self.config, SHARED, image=record["name"], ask=ask)

def send(message, src_rank, group, device):  # ZeRO's moments to rank 0; torch's own takes a minute a gigabyte
    buffer = io.BytesIO()
    if torch.distributed.get_rank() == src_rank: torch.save(message, buffer)
    box = [buffer.getvalue()]
    torch.distributed.broadcast_object_list(box, src_rank, group, device)
    if torch.distributed.get_rank() == 0: return torch.load(io.BytesIO(box[0]), map_location="cpu", weights_only=True)
def train(config, ranks):
    out, device, start, phase = Path(config.out_dir), ranks.device, time.time(), config.phase
    local, micro, accumulate = split_batch(config, ranks)
    folder = out / ("mllm" if phase else "ar")  # phase is "" for --task generate alone
    path = folder / f"{phase or 'state'}.pt"
    later = [folder / "sft.pt"] if phase == "pretrain" and "phase" not in config.given else []  # SFT follows
    folder.mkdir(parents=True, exist_ok=True)
    resumed = open_run(path, config, ranks)
    first_step, total_steps = resumed["step"] if resumed else 0, config.total_steps
    task = (Understand if phase else Generate)(config, ranks, folder, resumed)
    task.val_at = (range(VALIDATION, 2 * VALIDATION) if task.val is None else range(len(task.val)))[:config.val_images]
    task.net.to(device, torch.float64 if config.precision == "float64" else None).train()
    learning = [p for p in task.net.parameters() if p.requires_grad]
    how = dict(lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay,
               fused=device.type != "mps" and ranks.size == 1)  # ZeRO loads the step count to the CPU, which fused CUDA refuses
    optimizer = torch.optim.AdamW(learning, **how)
    if ranks.size > 1:  # ZeRO-1 [T9]: each rank keeps its share of the moments
        from torch.distributed.optim import zero_redundancy_optimizer as zero  # a second to import
        zero._broadcast_object = send
        optimizer = zero.ZeroRedundancyOptimizer(learning, optimizer_class=torch.optim.AdamW, **how)
    if resumed:
        with explained(f"{path} is of another LM or other texts"): task.net.load_state_dict(resumed["model"])
        resumed["optimizer"]["param_groups"][0].update(how)  # rates and the like are this run's
        optimizer.load_state_dict(resumed["optimizer"])
        if ranks.size > 1: optimizer.state.clear()  # ZeRO's load keeps this rank's share twice
        del resumed  # it holds as much as model and optimiser
    if config.checkpointing: task.lm.gradient_checkpointing_enable(dict(use_reentrant=False))
    if config.compile: compile_parts(task.lm, task.encoder)
    net = ranks.ddp(task.net)
    firsts = range(first_step * config.batch_size + ranks.rank * local, total_steps * config.batch_size, config.batch_size)
    stream = task.stream(range(at, at + micro) for first in firsts for at in range(first, first + local, micro))
    amp = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    bar = tqdm(range(first_step, total_steps + 1), phase or "generator", total_steps, initial=first_step, unit="step",
               disable=not ranks.first)  # the last round only validates and saves
    if config.bench:
        stream, timed = itertools.repeat(next(stream)), bench(config, ranks, dict(lm=task.lm.base_model, teacher=task.encoder))
    else: ranks.begin([path, *later] if config.overwrite else [])
    log, stop = Log(out / f"log_{phase or 'ar'}.jsonl", first_step, config, ranks.first and not config.bench), False
    for step in bar:
        if config.bench and next(timed): return  # False: one more step
        # Once in a while: save, validate.
        last = step == total_steps  # a round without a step
        if step > first_step and (stop or due(step, config.save_every, config)):
            if ranks.size > 1: optimizer.consolidate_state_dict(to=0)  # all ranks send theirs
            if ranks.first:
                save_checkpoint(path, dict(model=task.net.state_dict(), optimizer=optimizer.state_dict(), step=step,
                                           tokenizer=task.which, config=asdict(config)))  # kept in no variable: it is large
        if ranks.first and due(step, config.eval_every, config):
            task.net.eval()
            with amp, torch.no_grad(), torch.compiler.set_stance("force_eager"):  # of many lengths
                val_loss = task.validate(task.val_at[i:i + micro] for i in range(0, len(task.val_at), micro))
            task.net.train()
            log(step=step, val_loss=val_loss)
        if last or stop: break
        # ---- One training step --------------------------------------------------------------------------------------
        factor = lr_factor(step, config.warmup_steps, total_steps, config.end_lr / config.lr)
        for group in optimizer.param_groups: group["lr"] = config.lr * factor
        mean_loss = 0
        for i in range(accumulate):
            batch = [t.to(device, non_blocking=device.type == "cuda") for t in next(stream)]
            net.require_backward_grad_sync = i == accumulate - 1  # DDP averages gradients in backward: once a step
            with amp: loss = task.loss(net, *batch)
            (loss / accumulate).backward()
            mean_loss += loss.detach() / accumulate
        grad_norm = nn.utils.clip_grad_norm_(learning, config.clip)
        means = ranks.sum(torch.stack([mean_loss, grad_norm, mean_loss.new_full((), ranks.stop_asked)])) / ranks.size
        optimizer.step()
        optimizer.zero_grad(set_to_none=ranks.size == 1)  # DDP keeps them in buckets: None would allocate them twice
        loss, grad_norm, stop = means.tolist()  # waits for the GPU, all work queued; one rank asked to stop stops all
        check_finite({"cross-entropy": loss, "gradient norm": grad_norm}, f"{step} (images from {step * config.batch_size} on)")
        # -------------------------------------------------------------------------------------------------------------
        if (step + 1) % config.log_every == 0:
            rate = config.batch_size * (bar.format_dict["rate"] or 0)
            log(step=step + 1, loss=loss, grad_norm=grad_norm, lr=config.lr * factor, images_per_s=rate)
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} images/s")
    if ranks.first and last:
        with explained(f"cannot write {folder}: free some space, then --resume"):
            if phase != "pretrain":
                task.lm.float().save_pretrained(folder)
                task.text_tokenizer.save_pretrained(folder)
            if phase == "sft": save_file(task.net.connector.state_dict(), folder / "connector.safetensors")
        millions, minutes = sum(p.numel() for p in task.net.parameters()) / 1e6, (time.time() - start) / 60
        report(dict(val_loss=f"{val_loss:.3f}", parameters=f"{millions:.2f} million", time=f"{minutes:.1f} minutes",
                    pictures="" if phase else out / "samples.png", model=folder))
        if not later: print(f"\nNext: {task.next()}")
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
        config.resume = config.resume and phase == phases[0]  # what comes after it was not begun
        if ranks.first: print_config(origin, config)
        if not train(config, ranks): break

if __name__ == "__main__": command_line(main)
