"""
How good is a tokenizer? Every number with its protocol.

    python eval.py                           out/tiny/tokenizer on drawn shapes -> out/tiny/eval.json
    python eval.py A B ... --data FOLDER     several side by side, as a Markdown table
    ... --data FOLDER --part val             the images that training without --val_data held out
    python eval.py --vqa A B ...             the MLLM's answers, with each tokenizer's encoder swapped in -> vqa.json
    python eval.py --curves                  the logs of a run as curves.png
    python eval.py --generation              pictures that train_ar.py's generator draws -> geneval in eval.json
"""
import collections, contextlib, itertools, json, math, os, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from sample import PRESETS, SampleConfig, answer, generate
from train_ar import load_generator, load_mllm, load_teacher, questions, weights_hash
from train_tokenizer import (ATLAS, EXTENT, HELD_OUT, PALETTE, SHAPES, SIDE, TASKS, VALIDATION, WINDOW, Images, as_file, batches,
                             captions, code_usage, masks, plan, psnr, render)
from vqrae import (Ranks, SimVQ, UserError, build_lpips, check_range, command_line, explained, load_checkpoint, load_tokenizer,
                   nearest, parse_config, print_config, read_log, resize)

@dataclass
class EvalConfig:
    tokenizers: tuple = ()                # tokenizer folders; none: out_dir/tokenizer
    config: str = "tiny"                  # whose run folder: a key of vqrae.MODELS
    data: str = "shapes"                  # shapes, a folder of images, or 'shards-{000..127}.tar'
    part: Literal["all", "val"] = "all"   # of a folder or shards; val: those that training without --val_data held out
    num_images: int = 0                   # how many (files: evenly spread; all, if fewer); 0: 2048, 512 for --vqa, --generation
    size: int = 0                         # read files and score at this many pixels a side, 7 or more (paper: 256); 0: as decoded
    out_dir: str = ""                     # the run's folder, where eval.json goes; "": out/CONFIG
    batch_size: int = 64                  # images at a time on each rank
    num_workers: int = 0                  # decoding processes a rank
    device: str = ""                      # cuda, mps or cpu; "": the first of them that is there
    lpips_weights: str = ""               # a file of torchvision's vgg16; "": download
    inception_weights: str = ""           # a file of pytorch-fid's Inception; "": torch-fidelity downloads it
    vqa: bool = False                     # instead: out_dir's MLLM answers questions about shapes, on each tokenizer's features
    generation: bool = False              # instead: score out_dir's generator on prompts of the shapes world
    curves: bool = False                  # instead: draw loss, PSNR and codebook usage from out_dir's logs
    guidance: float = SampleConfig.guidance  # with --generation: as in sample.py, presets too, but without top_k
    temperature: float = SampleConfig.temperature  # with --generation
    top_p: float = SampleConfig.top_p     # with --generation
    def __post_init__(self):
        self.out_dir = self.out_dir or f"out/{self.config}"
        self.num_images = self.num_images or (512 if self.generation or self.vqa else 2048)
        check_range(vars(self), num_images=24 if self.generation else 2, batch_size=1, size=7 if self.size else 0, num_workers=0)
        if self.vqa + self.generation + self.curves + (self.data != "shapes") > 1:
            raise UserError("--vqa, --generation, --curves, --data: only one")

# ---- Reconstruction -------------------------------------------------------------------------------------------------
def ssim(x, y, data_range=1.0):
    """(B, 3, H, W) in [0, 1] -> (B,), scikit-image's. data_range 1 is right for [0, 1]; LlamaGen's and UniLIP's tables use 2."""
    x, y = (as_file(i if i.device.type == "mps" else i.double()) for i in (x, y))  # mps has no float64
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my, xx, yy, xy = (F.avg_pool2d(i, 7, stride=1) for i in (x, y, x * x, y * y, x * y))  # in 7 x 7 windows
    vx, vy, cov = ((mean - product) * 49 / 48 for mean, product in ((xx, mx * mx), (yy, my * my), (xy, mx * my)))
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).mean((1, 2, 3))
def moments(features):
    """(B, f) -> (f + 2, f) float64: products, sum, count. Added up over all images they give mean and covariance."""
    f = features.cpu().double()
    return torch.cat([f.T @ f, f.sum(0)[None], torch.full_like(f[:1], len(f))])
def frechet(*sides):
    """Two sums of moments -> |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), with the sample covariances."""
    m1, m2 = (s[-2] / s[-1] for s in sides)
    c1, c2 = ((s[:-2] - s[-2, :, None] * s[-2] / s[-1]) / (s[-1] - 1) for s in sides)
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C1^(1/2)
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross).item()
def inception(weights):  # -> pytorch-fid's network, by torch-fidelity: images (B, 3, H, W) uint8 -> ((B, 2048),)
    with explained("torch-fidelity is not installed: pip install torch-fidelity", ImportError):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    if weights: load_checkpoint(weights)  # refuses a pickle that torch-fidelity would run
    with explained("Inception weights cannot be had: pass --inception_weights FILE"):
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights or None).eval()

@torch.no_grad()
def reconstruction(model, nets, dataset, positions, config, ranks):
    """One pass over this rank's positions -> metrics, and codes' counts (k,). nets: of lpips, rfid, teacher those there are."""
    native, size, teacher = model.config.image_size, config.size or model.config.output_size, nets.get("teacher")
    features = collections.defaultdict(lambda: [0, 0])  # moments of originals and reconstructions
    sums, counts, objects = collections.Counter(), torch.zeros(model.config.codebook_size, dtype=torch.float64), 0
    loader = batches(dataset, native, positions, config.batch_size, config.num_workers, ranks.device)
    for batch in tqdm(loader, "reconstruct", math.ceil(len(positions) / config.batch_size), disable=not ranks.first):
        X = resize(batch["image"], native)
        result = model(X)
        x, y = (as_file(resize(i, size)) for i in (batch["image"], result.reconstruction.clamp(0, 1)))
        sums.update(psnr=psnr(x, y).sum().item(), ssim=ssim(x, y).sum().item(), ssim_dr2=ssim(x, y, 2.0).sum().item())
        if "lpips" in nets: sums["lpips"] += nets["lpips"](x * 2 - 1, y * 2 - 1).sum().item()
        if teacher:
            T_X = teacher(X)
            sums["cosine_to_teacher"] += F.cosine_similarity(result.Z_I, T_X, dim=-1).mean(1).sum().item()
            features["fd_vfm"][0] += moments(T_X.mean(1))
            features["fd_vfm"][1] += moments(teacher(resize(as_file(result.reconstruction), native)).mean(1))
        if "rfid" in nets:
            for side, i in enumerate((x, y)): features["rfid"][side] += moments(nets["rfid"]((i * 255).round().byte())[0])
        if result.indices is not None: counts += torch.bincount(result.indices.flatten().cpu(), minlength=len(counts))
        if dataset is None:
            scene = batch["scene"]
            unseen = scene.present & HELD_OUT[scene.shape, scene.color]
            originals, right = (objects_right(resize(i, SIDE).cpu(), scene) for i in (x, y))
            objects += torch.stack([scene.present, originals, right, unseen, right & unseen]).sum((1, 2))
    out = {name: frechet(*map(ranks.sum, sides)) for name, sides in features.items()}
    totals = ranks.sum(torch.tensor([*sums.values()], dtype=torch.float64)).tolist()
    n, counts, reasons = ranks.sum(torch.tensor(len(positions))).item(), ranks.sum(counts), {}
    out |= {name: total / n for name, total in zip(sums, totals)} | dict(num_images=n)
    small = [name for name, least in (("fd_vfm", 2 * model.config.dim), ("rfid", 2048)) if name in out and n < least]
    if small: reasons["few_images"] = f"{n} images are too few for a steady {' and '.join(small)}"
    if dataset is None:
        present, originals, right, unseen, right_unseen = ranks.sum(objects).tolist()
        out["objects_right"], out["objects_right_originals"] = right / present, originals / present
        out["objects_right_held_out"] = right_unseen / max(1, unseen)
    elif skipped := ranks.sum(torch.tensor(len(dataset.skipped))).item():
        reasons["skipped"] = f"{skipped} unreadable images: those after them are scored again"
    protocol = (f"{config.data}: {n} images, shorter edge to {dataset.size if dataset else native} px (bicubic, antialiased), "
                f"centre crop; reconstructed at {native} px, scored at {size} px, clamped and rounded to 8 bits; "
                "PSNR per image, then mean; reference set: the same images; kNN of 20 and probe: even images fit, odd test")
    return out | dict(reasons=reasons, protocol=protocol), counts

# ---- Semantics without a language model: classes from mean-pooled features
def knn(train, train_labels, test, test_labels, k=20):
    """Top-1 accuracy of a vote of the k nearest by cosine. (n, f), (n,), (m, f), (m,) -> float."""
    train, right = F.normalize(train, dim=1), 0
    for part, labels in zip(test.split(1024), test_labels.split(1024)):  # never all n x m similarities
        weight, index = (F.normalize(part, dim=1) @ train.T).topk(min(k, len(train)), dim=1)
        votes = train.new_zeros(len(part), train_labels.max() + 1).scatter_add(1, train_labels[index], (weight / 0.07).exp())
        right += (votes.argmax(1) == labels).sum().item()
    return right / len(test)
def probe(train, train_labels, test, test_labels, steps=100, decay=1e-3):
    """Top-1 accuracy of a logistic regression on standardised features, by L-BFGS."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = ((x - mean) / std for x in (train, test))
    weight = train.new_zeros(train.shape[1] + 1, int(train_labels.max()) + 1).requires_grad_()
    score = lambda x: x @ weight[:-1] + weight[-1]
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(score(train), train_labels) + decay * weight[:-1].square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return (score(test).argmax(1) == test_labels).float().mean().item()

@torch.no_grad()
def semantics(model, teacher, dataset, total, config, device):
    """kNN and probe accuracy of teacher, Z_I and Z_q: even images to fit, odd to test. Shapes: one each, 48 classes."""
    rows, labels, small, size = dict(features=[], teacher=[], tokens=[]), [], [], model.config.image_size
    scenes = (plan(part + 2 * VALIDATION, task=0) for part in torch.arange(total).split(config.batch_size))
    singles = (dict(image=render(s), label=(s.shape[:, 0] * 8 + s.color[:, 0]).tolist()) for s in scenes)
    for batch in singles if dataset is None else batches(dataset, size, range(total), config.batch_size, config.num_workers):
        images = resize(batch["image"].to(device), size)
        found = dict(features=model.encode(images))  # (B, N, d)
        if teacher: found["teacher"] = teacher(images)
        if model.quantizer: found["tokens"] = model.quantizer(model.to_code(found["features"]))[0]
        for name, z in found.items(): rows[name].append(z.mean(1).float())  # (B, N, d) -> (B, d)
        if len(labels) <= 4096: small.append((resize(images, 64) * 255).round().byte().cpu())
        labels += batch["label"]
    rows = {name: torch.cat(z) if z else None for name, z in rows.items()}  # (total, d)
    if model.quantizer and len(labels) >= 8:  # one image a cluster at least
        draw_clusters((rows["features"].cpu(), rows["tokens"].cpu()), torch.cat(small), Path(config.out_dir) / "clusters.png")
    classes = {label: i for i, label in enumerate(sorted(set(labels)))}
    missing = f"{config.data}: needs 2 classes (folders, or label in metadata.jsonl), 4 images"
    if len(classes) < 2 or len(labels) < 4: return dict(knn_top1=None, probe_top1=None), dict(semantics=missing)
    y = torch.tensor([classes[label] for label in labels], device=device)
    def accuracy(score): return {name: z if z is None else score(z[::2], y[::2], z[1::2], y[1::2]) for name, z in rows.items()}
    return dict(knn_top1=accuracy(knn), probe_top1=accuracy(probe)), {}
def draw_clusters(rows, images, path, k=8, across=8):
    """The paper's Figure 4: k-means on features (left) and on tokens (right); a row a cluster, its most central images."""
    sides = []
    torch.manual_seed(0)
    for z in rows:
        z, clusters, shown = F.normalize(z[:len(images)], dim=1), SimVQ(k, z.shape[1]), []
        clusters.init_codebook(z, iterations=30)  # SimVQ starts on k means; no more of it is used here
        own, far = nearest(z, clusters.codebook), torch.cdist(z, clusters.codebook)
        for c in own.bincount(minlength=k).argsort(descending=True):
            distance, i = far[:, c].masked_fill(own != c, math.inf).topk(across, largest=False)
            shown.append(torch.where(distance.isinf()[:, None, None, None], 1, images[i] / 255))  # (across, 3, 64, 64)
        sides.append(make_grid(torch.cat(shown), nrow=across, pad_value=1))
    save_image(torch.cat(sides, 2), path)

# ---- The checker reads objects back from pictures of shapes: cuts out what has a colour, and draws every shape to see which fits
def find_objects(images, least_area=25):
    """(B, 3, 64, 64) in [0, 1] -> for M found objects: picture, shape, color (M,) int64, x, y (M,) pixels."""
    delta, base = images - images.mean(1, keepdim=True), SIDE ** 2 + 1  # (B, 3, H, W); what has a colour is no background
    foreground = (delta.norm(dim=1, keepdim=True) > 0.14).float()
    label, before = torch.arange(1.0, base).view(1, 1, SIDE, SIDE) * foreground, None
    while before is None or not torch.equal(label, before):  # connected regions take their largest number
        before, label = label, F.max_pool2d(label, 3, 1, 1) * foreground
    number, area = (label.flatten(1).long() + torch.arange(len(images))[:, None] * base).unique(return_counts=True)
    number = number[(number % base > 0) & (area >= least_area)]  # (M,)
    picture = number // base
    own = (label[picture] == (number % base).view(-1, 1, 1, 1)).float()  # (M, 1, H, W)
    strength = (delta[picture] * own).norm(dim=1, keepdim=True) ** 3  # the colour counts where it is strong, not at the edge
    mean = lambda x: (x * strength).sum((2, 3)) / strength.sum((2, 3))  # (M, 3, H, W) -> (M, 3)
    rgb, contrast = mean(images[picture]), mean(delta[picture])
    gain = ((rgb[:, None] * PALETTE).sum(-1, keepdim=True) / PALETTE.square().sum(-1, keepdim=True)).clamp(0.9, 1.1)
    color = (rgb[:, None] - PALETTE * gain).norm(dim=-1).argmin(1)  # (M,)
    cover = (delta[picture] * contrast[:, :, None, None]).sum(1) / contrast.square().sum(1)[:, None, None]
    cover = cover.clamp(0, 1) * F.max_pool2d(own, 3, 1, 1)[:, 0]  # (M, H, W) in [0, 1], its soft edge included
    mass, at = cover.sum((1, 2)), torch.arange(SIDE) + 0.5
    x, y = (cover.sum(1) @ at) / mass, (cover.sum(2) @ at) / mass
    unit_area, s = (ATLAS > 0).float().mean((1, 2, 3)) * (2 * EXTENT) ** 2, len(SHAPES)  # (6,) at radius 1
    radius = (mass[:, None] / unit_area).sqrt().clamp(4, 13)  # (M, 6): each shape in the size of that area
    centers, straight = (i.repeat_interleave(s) for i in (x, y)), torch.zeros(len(x) * s)
    drawn, rows, columns = masks(torch.arange(s).repeat(len(x)), *centers, radius.flatten(), straight)
    seen = cover[torch.arange(len(x))[:, None, None], rows[::s], columns[::s]]  # (M, W, W)
    error = (drawn.view(-1, s, WINDOW ** 2) - seen.view(-1, 1, WINDOW ** 2)).square().sum(-1)  # (M, 6)
    return picture, error.argmin(1), color, x, y
def objects_right(images, scene, near=6.0):
    """Which of the scene's objects are found in place, shape and colour: (B, 4) bool, within scene.present."""
    b, *found = find_objects(images)
    shape, color, x, y = (t[:, None] for t in found)  # (M, 1) each, beside the scene's (M, 4)
    fits = ((scene.x[b] - x).hypot(scene.y[b] - y) < near) & (scene.shape[b] == shape) & (scene.color[b] == color)
    return (torch.zeros(scene.present.shape).index_add(0, b, fits.float()) > 0) & scene.present

# ---- Generation: GenEval's six tasks in the shapes world's words, judged by the checker
COLORED = ("colors", "position", "color_attr")  # the tasks whose captions name colours
def fulfilled(images, scene, least=6.0):
    """Does each picture (B, 3, 64, 64) show what its caption names? -> (B,) bool. As in GenEval, only counting forbids more."""
    found, right = [[] for _ in images], []
    for picture, *thing in zip(*(t.tolist() for t in find_objects(images))): found[picture].append(thing)
    for things, task, n, relation, shapes, colors in zip(found, *(t.tolist() for t in scene[:5])):
        places, task = [], TASKS[task]  # places: where each of the n named is found
        for shape, color in zip(shapes[:n], colors):
            places.append([(x, y) for s, c, x, y in things if s == shape and (c == color or task not in COLORED)])
        if task == "counting": right.append(len(places[0]) == n)
        elif task == "position":
            way = lambda a, b: (b[0] - a[0], a[0] - b[0], b[1] - a[1], a[1] - b[1])[relation]  # pixels from a to b
            right.append(any(way(a, b) > least for a in places[0] for b in places[1]))
        else: right.append(all(places))
    return torch.tensor(right)

@torch.no_grad()
def generation(folder, config, ranks):
    """-> shares of prompts fulfilled: by drawn pictures (geneval), by reconstructions of the renderer's (geneval_ceiling)."""
    lm, text_tokenizer, tokenizer = load_generator(config.out_dir, folder, ranks.device)
    if {tokenizer.config.image_size, tokenizer.config.output_size} != {SIDE}:
        raise UserError(f"--generation is for pictures of shapes, of {SIDE} px: score others with sample.py --geneval")
    number, drawn, rebuilt, out = torch.arange(config.num_images), [], [], {}
    pictured = lambda i: plan(i + 3 * VALIDATION, task=i % 6)  # pictures that no other score uses
    with tqdm(total=len(number) * lm.config.visual["tokens"], desc="sampling", unit="code") as bar:
        for part in number.split(config.batch_size):
            scene = pictured(part)
            codes = generate(lm, text_tokenizer, captions(scene), part.tolist(), guidance=config.guidance,
                             temperature=config.temperature, top_p=config.top_p, bar=bar)
            drawn.append(tokenizer.detokenize(codes).clamp(0, 1).cpu())
            rebuilt.append(tokenizer(render(scene).to(ranks.device)).reconstruction.clamp(0, 1).cpu())
    drawn, scene = torch.cat(drawn), pictured(number)
    novel = (HELD_OUT[scene.shape, scene.color] & scene.present).any(1) & torch.tensor([TASKS[t] in COLORED for t in scene.task])
    for name, images in (("geneval", drawn), ("geneval_ceiling", torch.cat(rebuilt))):
        right = fulfilled(images, scene).float()
        out[name] = {task: right[(scene.task == t) & ~novel].mean().item() for t, task in enumerate(TASKS[:6])}
        out[name]["overall"] = sum(out[name].values()) / 6
        out[name]["held_out_pairs"] = right[novel].mean().item() if novel.any() else None
    shown = drawn[:min(60, len(drawn) // 6 * 6)].unflatten(0, (-1, 6)).transpose(0, 1)  # (6, n, 3, 64, 64)
    save_image(make_grid(shown.flatten(0, 1), nrow=shown.shape[1]), Path(config.out_dir) / "geneval.png")
    return out | dict(geneval_protocol=f"{len(number)} validation prompts, a sixth each; guidance {config.guidance}, "
                      f"temperature {config.temperature}, top_p {config.top_p}; {int(novel.sum())} name a pair of shape and "
                      "colour never trained on, scored apart; pictures: geneval.png, a row a task")

# ---- Understanding: questions to an MLLM that reads the teacher's features or, untrained, another encoder's
def code_meanings(model, device, pictures=2048):
    """-> (k, d): each code's mean Z_I on training pictures, or 0. Not Z_bot, which no loss ties to Z_I."""
    sums = torch.zeros(model.config.codebook_size, model.config.dim + 1, device=device)  # and their count
    for batch in batches(None, model.config.image_size, range(pictures), 64, device=device):
        Z_I = model.encode(batch["image"])  # (B, N, d)
        sums.index_add_(0, model.quantizer(model.to_code(Z_I))[1].flatten(), F.pad(Z_I, (0, 1), value=1).flatten(0, 1))
    return sums[:, :-1] / sums[:, -1:].clamp(min=1)

@torch.no_grad()
def vqa(folder, config, ranks):
    """-> PSNR, and shares of right answers by kind of question, on the teacher, Z_I (features), code_meanings (tokens)."""
    mllm, text_tokenizer, model = load_mllm(config.out_dir, folder, ranks.device)
    n, size, psnrs, answers = config.num_images, model.config.image_size, [], collections.defaultdict(list)
    teacher = load_teacher(folder, model.config).to(ranks.device)
    meanings = code_meanings(model, ranks.device) if model.quantizer else None
    for part in tqdm((torch.arange(n) + VALIDATION).split(config.batch_size), desc="ask"):
        scene = plan(part)
        images = resize(render(scene), size).to(ranks.device)
        result = model(images)
        psnrs.append(psnr(images, resize(result.reconstruction, size)))
        features = dict(teacher=teacher(images), features=result.Z_I)
        if meanings is not None: features["tokens"] = meanings[result.indices]
        asked = [(i, text, *fact) for i, known in enumerate(questions(part, scene)) for text, fact in known.items()]
        pictures, texts, kinds, truths = zip(*asked)
        for name, z in features.items():
            answers[name] += zip(kinds, truths, answer(mllm, text_tokenizer, z[list(pictures)], texts, 4))
    out = dict(psnr=torch.cat(psnrs).mean().item())
    for name, rows in answers.items():
        right = collections.defaultdict(list)
        for kind, truth, said in sorted(rows): right[kind].append(truth == said)
        right["overall"] = sum(right.values(), [])
        out[f"vqa_{name}"] = {kind: sum(hits) / len(hits) for kind, hits in right.items()}
        yes = [(truth == "yes", said != "no") for kind, truth, said in rows if kind == "presence"]  # (true, claimed), as POPE
        both, true, claimed = yes.count((True, True)), sum(a for a, _ in yes), sum(b for _, b in yes)
        out[f"pope_{name}"] = dict(accuracy=sum(a == b for a, b in yes) / len(yes), precision=both / max(1, claimed),
                                   recall=both / max(1, true), f1=2 * both / max(1, true + claimed))
    return out | dict(protocol=f"{len(rows)} questions about {n} validation pictures, each asked alone; right is the same text")

# ---- The command line
def evaluate(folder, config, ranks):
    """Everything about one tokenizer -> a dict with the fixed keys."""
    model, start, nets, reasons = load_tokenizer(folder, ranks.device), time.time(), {}, {}
    dataset, first, total = None, VALIDATION, config.num_images
    if config.data != "shapes":
        first, size = 0, config.size or max(model.config.image_size, model.config.output_size)
        with ranks.first_alone(): dataset = Images(config.data, size, in_order=True, part=config.part, folder=config.out_dir)
        total = min(total, len(dataset))
        dataset.chosen = dataset.chosen[[i * len(dataset) // total for i in range(total)]]
    if total < max(2, ranks.size): raise UserError(f"{total} images are too few: give at least 2, and one a rank")
    with ranks.first_alone():  # it may download
        for name, build, *source in (("teacher", load_teacher, folder, model.config),
                                     ("lpips", build_lpips, config.lpips_weights), ("rfid", inception, config.inception_weights)):
            try: nets[name] = build(*source).requires_grad_(False).to(ranks.device)
            except UserError as error: reasons[name] = str(error)  # the other metrics still come out
    metrics, counts = reconstruction(model, nets, dataset, range(first + ranks.rank, first + total, ranks.size), config, ranks)
    keys = "psnr ssim ssim_dr2 lpips rfid fd_vfm codebook_usage codebook_perplexity token_entropy_bits cosine_to_teacher"
    result = dict.fromkeys(keys.split()) | metrics
    if model.quantizer:
        result |= zip(("codebook_usage", "codebook_perplexity", "token_entropy_bits"), code_usage(counts))
    if ranks.first:
        accuracy, why = semantics(model, nets.get("teacher"), dataset, total, config, ranks.device)
        result |= accuracy | dict(reasons=result["reasons"] | reasons | why)
    return result | dict(seconds=round(time.time() - start, 1))

def draw_curves(out):  # loss, PSNR and codebook usage over steps, from every log_*.jsonl of the run -> curves.png
    with explained("--curves needs matplotlib: pip install matplotlib", ImportError): import matplotlib.pyplot as plt
    logs = {path.stem[4:]: read_log(path) for path in sorted(out.glob("log_*.jsonl"))}
    if not logs: raise UserError(f"no log_*.jsonl in {out}: --out_dir names the run")
    _, axes = plt.subplots(1, 3, figsize=(15, 4))
    for axis, keys in zip(axes, (("loss", "val_loss"), ("val_psnr",), ("codebook_usage", "val_codebook_usage"))):
        for (name, rows), key in itertools.product(logs.items(), keys):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points: axis.plot(*zip(*points), marker=".", label=f"{name}: {key}")
        axis.set(xlabel="step", yscale="log" if keys[0] == "loss" else "linear")
        if axis.lines: axis.legend()
    plt.savefig(out / "curves.png", bbox_inches="tight")
    print(f"wrote {out / 'curves.png'}")
def table(results):  # {folder: metrics} -> a Markdown table, a column a tokenizer
    rows = {"metric": [*results], "---": ["---"] * len(results)}
    for column, result in enumerate(results.values()):
        for key, value in result.items():
            for part, number in (value if isinstance(value, dict) else {"": value}).items():
                if not isinstance(number, str):
                    row = rows.setdefault(f"{key} {part}".strip(), ["-"] * len(results))
                    if number is not None: row[column] = f"{number:.4g}" if number < 100 else f"{number:.0f}"
    return "\n".join(f"| {' | '.join([key, *row])} |" for key, row in rows.items())

def main():
    config, _, origin = parse_config(EvalConfig, PRESETS)
    ranks, out = Ranks(config.device), Path(config.out_dir)
    if ranks.first: print_config(origin, config)
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK): raise UserError(f"--out_dir {out} cannot be written to")
    if (config.generation or config.vqa or config.curves) and not ranks.first: return
    if config.curves: return draw_curves(out)
    task = generation if config.generation else vqa if config.vqa else evaluate
    folders = config.tokenizers or [f"{config.out_dir}/tokenizer"]
    for folder in folders[1:]: load_tokenizer(folder)  # what is none is told before the first's hour is lost
    results = {folder: task(folder, config, ranks) for folder in folders}
    if not ranks.first: return
    path, old, text = out / ("vqa.json" if config.vqa else "eval.json"), {}, [table(results)]
    with contextlib.suppress(Exception):  # none yet, or not ours
        read = json.loads(path.read_text())
        old = {scores["tokenizer"]: scores for scores in ([read] if "tokenizer" in read else read.values())}
    for folder, scores in results.items():
        protocol, reasons = scores.get("protocol") or scores["geneval_protocol"], scores.get("reasons", {})
        text.append("\n  ".join([f"{folder}: {protocol}", *map(": ".join, reasons.items())]))
        scores["tokenizer"] = which = weights_hash(folder)  # its own scores and its generator's stay side by side
        results[folder] = {k: v for k, v in old.get(which, {}).items() if config.generation or "geneval" in k} | scores
    with contextlib.suppress(OSError): print(*text, sep="\n", flush=True)  # no reader of the pipe is left, say
    if path.exists(): path.replace(path.with_suffix(".old.json"))  # it may hold scores of other tokenizers or data
    path.write_text(json.dumps(results if len(results) > 1 else results[folders[0]], indent=1))
    print(f"wrote {path}")

if __name__ == "__main__": command_line(main)
