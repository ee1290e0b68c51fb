"""
Draw pictures for captions: text -> codes -> pixels, with a generator that train_ar.py made. Or answer questions about one.

    python sample.py --prompt "a red circle left of a blue square"            -> out/tiny/samples/
    python sample.py --prompts FILE --num_images 4 --guidance 3 --seed 1      one caption a line
    python sample.py --geneval evaluation_metadata.jsonl --out DIR            the folders GenEval's scorer reads
    python sample.py --dpg dpg_bench/prompts --out DIR                        the 2 x 2 grids DPG-Bench's scorer reads
    torchrun --nproc_per_node=8 sample.py ...                                 the ranks share the work
    python sample.py --image FILE --ask "how many circles are there?"         after train_ar.py --task understand

--geneval and --dpg go on where they stopped: what is there is not made again. Other settings, or a new model, want another --out.
In float32 on a CPU a picture depends on model, settings, caption, --seed and its number, not on batch, ranks or other captions.
"""
import collections, functools, json, re, zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torchvision.utils import save_image
from tqdm import tqdm
from transformers import AttentionInterface, StaticCache, TopKLogitsWarper

from train_ar import chat, layout, load_generator, load_mllm, pad_ids, square, valid, visual_logits
from vqrae import Ranks, UserError, bench, check_range, command_line, explained, full, parse_config, print_config, uniform

@dataclass
class SampleConfig:
    config: str = "tiny"                  # whose presets and run folder: a key of vqrae.MODELS
    out_dir: str = ""                     # the run's folder; "": out/CONFIG
    tokenizer: str = ""                   # folder of the VQRAE tokenizer; "": out_dir/tokenizer
    device: str = ""                      # cuda, mps or cpu; "": the first of them that is there
    precision: Literal["bf16", "float32"] = "bf16"  # of the language model; the tokenizer stays float32
    compile: bool = True                  # torch.compile, on a GPU alone
    prompt: list = None                   # a caption; may be given several times
    prompts: str = ""                     # a file of captions, one a line
    geneval: str = ""                     # GenEval's evaluation_metadata.jsonl
    dpg: str = ""                         # DPG-Bench's folder of .txt prompts
    image: str = ""                       # a picture to ask about
    ask: list = None                      # a question about --image; may be given several times
    out: str = ""                         # folder for the pictures; "": out_dir/samples, out_dir/geneval or out_dir/dpg
    num_images: int = 0                   # pictures a caption; 0: one, but four for --geneval and --dpg
    guidance: float = 7.5                 # [LlamaGen] s in u + s (c - u); 1: none
    temperature: float = 1.0              # [LlamaGen] 0: always the likeliest code
    top_k: int = 1000                     # [LlamaGen] draw among the k likeliest codes; 0: all
    top_p: float = 1.0                    # [LlamaGen] draw among the likeliest codes that hold this share of the probability
    seed: int = 0                         # of a caption's first picture; the next has seed + 1
    batch_size: int = 64                  # pictures at a time; with --dpg at least 4
    bench: int = 0                        # instead: time this many batches of the first caption, after three others
    def __post_init__(self):
        self.out_dir = self.out_dir or f"out/{self.config}"
        self.tokenizer = self.tokenizer or f"{self.out_dir}/tokenizer"
        if self.bench and not (self.prompt or self.prompts or self.geneval or self.dpg): self.prompt = ["a red circle"]
        given = [source for source in (self.prompt or self.prompts, self.geneval, self.dpg, self.ask) if source]
        if len(given) != 1 or bool(self.ask) != bool(self.image):
            raise UserError("nothing to do, or too much: --prompt or --prompts, or --geneval, or --dpg, or --image with --ask")
        check_range(vars(self), batch_size=1, num_images=0, bench=0, **OPTIONS)
        if self.dpg and self.num_images not in (0, 4): raise UserError("--dpg makes 4 pictures a prompt: leave --num_images out")
        self.dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32

PRESETS = {"config tiny": dict(precision="float32", guidance=2.0, top_k=0, top_p=0.6)}  # [ours] measured
OPTIONS = dict(guidance=(0, 100), temperature=(0, 100), top_k=(0, 1 << 20), top_p=(0, 1))  # of generate, and their ranges

# ---- Text -> codes --------------------------------------------------------------------------------------------------
def choose(logits, u, temperature, top_k, top_p):
    """Logits (B, k), uniform numbers (B,) -> codes (B,). Inverts the cumulative distribution: rounding changes few draws."""
    if temperature < 1e-6: return logits.argmax(1)
    logits = logits / temperature
    if top_k: logits = TopKLogitsWarper(top_k)(None, logits)  # transformers': what is out of the draw becomes -inf
    p = logits.softmax(1)  # (B, k)
    if top_p < 1:  # transformers' sorts all, which is half of a tiny step
        top = p.topk(min(256, p.shape[1])).values  # (B, 256), the largest first
        if (top.sum(1) < top_p).any(): top = p.sort(1, descending=True).values
        last = (top.cumsum(1) < top_p).sum(1, keepdim=True)  # (B, 1), where their sum reaches top_p
        p = p * (p >= top.gather(1, last.clamp(max=top.shape[1] - 1)))
    cumulative = p.cumsum(1)  # (B, k)
    return torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0].clamp(max=p.shape[1] - 1)

def attend(module, q, k, v, allowed, scaling, **_):
    """q (R, H, L, a) attends to the first n of the cached k, v (R, h, length, a) where `allowed` (R, 1, L, n). a: a head's width.
    Heads that share keys count as more queries: no key is copied. Plain products: fused kernels are slow for so few."""
    k, v = (t[:, :, :allowed.shape[-1]] for t in (k, v))  # (R, h, n, a)
    grouped = (q * scaling).reshape(*k.shape[:2], -1, q.shape[-1])  # (R, h, H / h * L, a)
    scores = (grouped @ k.transpose(2, 3)).unflatten(2, (-1, q.shape[2]))  # (R, h, H / h, L, n)
    weights = full(scores).masked_fill(~allowed[:, None], -torch.inf).softmax(-1).to(v.dtype)
    return (weights.flatten(2, 3) @ v).view_as(q).transpose(1, 2), None  # (R, L, H, a)
AttentionInterface.register("attend", attend)

def step(lm, ids, positions, allowed, cache, guidance):
    """Read ids (R, L) after what `cache` holds -> logits of the next code (B, k). allowed (R, 1, L, n): of its first n places."""
    # The cache goes by position, as its name changed within transformers 5; the mask in a dict, so that transformers builds none.
    x = lm.model(ids, dict(full_attention=allowed), positions, cache, use_cache=True).last_hidden_state[:, -1]  # (R, hidden)
    if guidance != 1:
        c, u = x.chunk(2)  # R = 2 B: with captions, then without; (B, hidden) each
        x = u + guidance * (c - u)  # equals mixing the logits, as the head is linear, at half the cost
    return full(visual_logits(lm, x))
@functools.lru_cache(maxsize=1)  # keeps the last: compiled code is bound to the tensors that it first saw
def cache_and_step(lm, length, compiled, *_):  # _: rows, dtype, device; a change of them makes a new cache
    """Keys and values in one allocation: a compiled step needs it, and transformers' growing cache copies all at each token."""
    cache = StaticCache(config=lm.config, max_cache_len=length)
    return cache, torch.compile(step, mode="reduce-overhead", fullgraph=True) if compiled else step

@torch.inference_mode()  # a tenth faster than no_grad where steps are small
def generate(lm, text_tokenizer, prompts, seeds, guidance=1, temperature=1, top_k=0, top_p=1, width=0, compiled=False, bar=None):
    """B captions ("": the unconditional prompt) and B seeds -> codes (B, N) int64; UserError for options or words that cannot be.
    width: least columns for captions: equal shapes spare compilations. compiled: by torch.compile, for GPUs. bar: tqdm."""
    check_range(dict(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p), **OPTIONS)
    visual, device, B, N = lm.config.visual, lm.device, len(prompts), lm.config.visual["tokens"]
    for text in filter(None, prompts): check_text(text, f"prompt {text[:40]!r}", text_tokenizer, visual["max_length"] - N - 2)
    chance = torch.stack([uniform(seed, N) for seed in seeds]).to(device)  # (B, N): the only randomness
    texts = [*prompts] + [""] * (B if guidance != 1 else 0)  # guided: the unconditional half comes second
    ids, mask = (F.pad(t, (max(0, width + 1 - t.shape[1]), 0)).to(device) for t in layout(text_tokenizer, visual, texts))
    R, P = ids.shape  # R = 2 B when guided; P: prompts, with BOI
    seen = F.pad(mask.bool(), (0, N - 1), value=True)[:, None, None]  # (R, 1, 1, P + N - 1): the last code is drawn, not read
    allowed = seen[..., :P].expand(-1, -1, P, -1).tril() | torch.eye(P, device=device).bool()  # (R, 1, P, P); itself too, or NaN
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (R, P): padding does not count
    cache, next_step = cache_and_step(lm, P + N - 1, compiled, R, lm.dtype, device)
    cache.reset()
    usual, codes = lm.config._attn_implementation, []
    lm.set_attn_implementation("attend")
    try:
        for n, read in enumerate([step] + [next_step] * (N - 1)):  # prompts are read uncompiled
            logits = read(lm, ids, positions, allowed, cache, guidance)  # (B, k)
            codes.append(choose(logits, chance[:, n], temperature, top_k, top_p))
            ids = (codes[-1] + visual["offset"]).repeat(R // B)[:, None]  # (R, 1)
            positions = positions[:, -1:] + 1
            allowed = F.pad(seen[..., :P + n + 1], (0, N - 2 - n if compiled else 0))  # (R, 1, 1, P + n + 1); compiled: one shape
            if bar is not None: bar.update(B)
    finally: lm.set_attn_implementation(usual)
    return torch.stack(codes, 1)  # (B, N)

# ---- Z_I -> answers -------------------------------------------------------------------------------------------------
@torch.no_grad()
def answer(mllm, text_tokenizer, Z_I, questions, max_new_tokens=64):
    """Features (B, N, d) of B images and a question about each -> B answers, the likeliest word by word."""
    room = mllm.lm.config.understand["max_length"] - Z_I.shape[1] - 12  # USER: ASSISTANT:
    for text in questions: check_text(text, f"question {text[:40]!r}", text_tokenizer, room)
    chats = [chat(text_tokenizer, Z_I.shape[1], None, False, [(f"<image>\n{text}", None)])["ids"] for text in questions]
    ids, mask = (t.to(Z_I.device) for t in pad_ids(chats))
    ids = mllm.lm.generate(inputs_embeds=mllm.embed(ids, Z_I), attention_mask=mask, max_new_tokens=max_new_tokens,
                           do_sample=False, eos_token_id=text_tokenizer.eos_token_id, pad_token_id=text_tokenizer.eos_token_id)
    return [text.strip() for text in text_tokenizer.batch_decode(ids, skip_special_tokens=True)]
def converse(config, device):  # answers --ask about --image; the tokenizer's encoder takes the place of the MLLM's VFM
    mllm, text_tokenizer, tokenizer = load_mllm(config.out_dir, config.tokenizer, device, config.dtype)
    with explained(f"--image {config.image} cannot be read as an image"): X = square(config.image, tokenizer.config.image_size)
    asked = [tidy(question.replace("<image>", "")) for question in config.ask]  # answer() puts it first itself
    Z_I = tokenizer.encode(X[None].to(device)).expand(len(asked), -1, -1)
    for question, text in zip(asked, answer(mllm, text_tokenizer, Z_I, asked)): print(question, text)

# ---- What to draw ---------------------------------------------------------------------------------------------------
def tidy(text): return " ".join(valid(text).split())
Job = collections.namedtuple("Job", "prompt numbers path where line", defaults=[""])  # a file of pictures of one prompt
def read_jobs(config):  # -> out folder and jobs
    kind = "geneval" if config.geneval else "dpg" if config.dpg else "samples"
    out, jobs = Path(config.out or f"{config.out_dir}/{kind}").absolute(), []
    each = config.num_images or (1 if kind == "samples" else 4)
    def read(file): return [line.rstrip("\n") for line in open(file, encoding="utf-8-sig", errors="replace")]
    if config.geneval:  # OUT/00003/metadata.jsonl, OUT/00003/samples/00000.png, ...
        for i, line in enumerate(read(config.geneval)):
            where = f"{config.geneval}, line {i + 1}"
            with explained(f"{where}: not JSON with a prompt: {line[:60]!r}; mend or remove that line"):
                prompt = tidy(json.loads(line)["prompt"])
            jobs += [Job(prompt, [j], out / f"{i:05d}/samples/{j:05d}.png", where, line + "\n") for j in range(each)]
    elif config.dpg:  # OUT/NAME.png, four pictures in two rows
        for file in sorted(Path(config.dpg).glob("*.txt")):
            jobs.append(Job(tidy(" ".join(read(file))), range(each), out / f"{file.stem}.png", str(file)))
    else:
        prompts = {tidy(text): f"--prompt {tidy(text)[:40]!r}" for text in config.prompt or []}  # each caption once
        for i, line in enumerate(read(config.prompts) if config.prompts else [], 1):
            if line.strip(): prompts[tidy(line)] = f"{config.prompts}, line {i}"
        for prompt, where in prompts.items():
            name = re.sub(r"\W+", "-", prompt)[:60].strip("-")
            if not re.fullmatch(r"[\w ]{0,60}", prompt): name += f"-{zlib.crc32(prompt.encode()):08x}"  # or two would share it
            jobs += [Job(prompt, [j], out / f"{name}-{config.seed + j}.png", where) for j in range(each)]
    if not jobs: raise UserError(f"no caption in {config.geneval or config.dpg or config.prompts} (--dpg reads .txt files)")
    return out, jobs
def check_text(text, where, text_tokenizer, room):
    encoded = text_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, unknown = encoded.input_ids, text_tokenizer.unk_token_id
    if not ids: raise UserError(f"{where} is empty: say what to draw or what to answer")
    if len(ids) > room: raise UserError(f"{where} has {len(ids)} tokens, {room} fit: shorten it, or train with more --max_length")
    if unknown in ids:
        word = text[slice(*encoded.offset_mapping[ids.index(unknown)])]
        known = sorted(entry for entry in text_tokenizer.get_vocab() if not entry.startswith("<"))
        raise UserError(f"{where}: this model never learned the word {word!r}, but {len(known)} like {' '.join(known[:60])}")

def main():
    config, _, origin = parse_config(SampleConfig, PRESETS)
    ranks = Ranks(config.device)
    if ranks.first: print_config(origin, config)
    if config.ask: return ranks.first and converse(config, ranks.device)
    out, jobs = read_jobs(config)
    lm, text_tokenizer, tokenizer = load_generator(config.out_dir, config.tokenizer, ranks.device, config.dtype)
    N = lm.config.visual["tokens"]
    for job in jobs: check_text(job.prompt, job.where, text_tokenizer, lm.config.visual["max_length"] - N - 2)
    resumes = config.geneval or config.dpg
    todo = [job for job in jobs if not (resumes and job.path.exists())]  # before any rank writes
    ranks.wait()
    out.mkdir(parents=True, exist_ok=True)
    compiled = config.compile and ranks.device.type == "cuda"
    width = max(map(len, text_tokenizer([job.prompt for job in jobs], add_special_tokens=False).input_ids)) if compiled else 0
    how = config.guidance, config.temperature, config.top_k, config.top_p, width, compiled
    if config.bench:
        timed, prompts = bench(config, ranks, steps=N, unit="codes"), [jobs[0].prompt] * config.batch_size
        while not next(timed): generate(lm, text_tokenizer, prompts, range(config.batch_size), *how)
        return
    todo, each, shown = todo[ranks.rank::ranks.size], len(jobs[0].numbers), []  # each: pictures a file; shown: in a grid
    at_once = max(1, min(config.batch_size // each, len(todo)))  # files
    bar = tqdm(total=len(todo) * each * N, desc=f"sampling {len(todo)} of {len(jobs)}", unit="code", disable=not ranks.first)
    for part in torch.utils.data.BatchSampler(todo, at_once, drop_last=False):
        fill = (part * at_once)[:at_once] if compiled else part  # repeats fill the last batch: a compiled step has one size
        prompts = [job.prompt for job in fill for _ in job.numbers]
        seeds = [zlib.crc32(f"{config.seed + j} {job.prompt}".encode()) for job in fill for j in job.numbers]  # by caption too
        codes = generate(lm, text_tokenizer, prompts, seeds, *how, bar)[:len(part) * each]
        images = tokenizer.detokenize(codes).clamp(0, 1).cpu()  # (b each, 3, H, W)
        for job, pictures in zip(part, images.split(each)):
            job.path.parent.mkdir(parents=True, exist_ok=True)
            if job.line: (job.path.parents[1] / "metadata.jsonl").write_text(job.line, "utf-8")
            partial = job.path.with_name(f".{job.path.stem}.partial.png")  # the whole file or none
            save_image(pictures, partial, nrow=2, padding=0)  # one picture, or a 2 x 2 grid without gaps
            partial.replace(job.path)
        shown.extend(images[:64 - len(shown)])
    bar.close()
    ranks.wait()
    if ranks.first and not resumes: save_image(shown, out / "grid.png", nrow=8)
    ranks.say(f"\n{len(jobs)} files in {out}" + ("" if resumes else f"; {len(shown)} of them together in grid.png"))

if __name__ == "__main__": command_line(main)
