"""Train the small FLUX-architecture model of `flux-photos` on nine photographs, by class-conditional flow matching.

    python examples/train_flux.py --out build/flux-photos                                # one GPU, or slowly a CPU
    torchrun --standalone --nproc-per-node 2 examples/train_flux.py --out build/flux-photos
    python examples/train_flux.py --out /tmp/tiny --steps-128 2 --steps-256 1 --sample-steps 1  # does it run?

Two stages: 128 px (1024 tokens) teaches the objects, 256 px (4096 tokens) the detail. Each stage lasts a number of
minutes or of steps and the learning rate follows the share that has passed, so the same line goes on with `--resume`.
Written to `--out`: checkpoint.pt, the model as diffusers saves it (moving average of the weights, bfloat16) and a
sheet of samples a size.
"""

import argparse
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from photos import (
    NAMES,
    PATCH,
    UNCONDITIONAL,
    condition,
    contact_sheet,
    generate,
    load_photos,
    position_ids,
    shift,
    to_tokens,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

LEAST_AREA, STRETCH = 0.6, 1.05  # of a random crop: share of the photograph, largest ratio of its sides
MARGIN = 1.5  # photographs are kept this much larger than a picture, so that bilinear crops neither alias nor blur
DROP = 0.1  # share of pictures trained without their class
EMA_DECAY = 0.999
WARM_UP = 500  # steps
CHUNK = 20  # steps between two looks at the clock
SAVE_SECONDS, PRINT_SECONDS = 180, 10


@dataclass(frozen=True)
class Stage:
    """One size of picture. Rates fall along a cosine from `rate` to `last_rate`; `batch` is per process."""

    side: int
    batch: int
    rate: float
    last_rate: float
    minutes: float
    steps: int | None

    def share(self, seconds: float, steps: int) -> float:
        """How much of the stage has passed, in [0, 1]."""
        whole, passed = (self.steps, steps) if self.steps is not None else (60 * self.minutes, seconds)
        return min(1.0, passed / whole) if whole else 1.0

    def learning_rate(self, share: float) -> float:
        return self.last_rate + (self.rate - self.last_rate) * (1 + math.cos(math.pi * share)) / 2


@dataclass
class Progress:
    """Where the training stands; saved in the checkpoint. Seconds and steps by picture size."""

    step: int = 0
    images: int = 0
    seconds: dict[int, float] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    loss: float = float("nan")


@dataclass(frozen=True)
class Place:
    """This process among all that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def agree(self, value: float) -> float:
        """The first process's value, so that all of them take the same turn at the same step."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.item()


def find_place() -> Place:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # with torch 2.11 its backward pass fails at these shapes
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return Place(rank, world, device)


def build_model(device: torch.device) -> FluxTransformer2DModel:
    """A FLUX transformer of width 192, initialised as DiT is: every block starts as the identity (adaLN-Zero)."""
    with device:
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=3 * PATCH**2,
            num_layers=3,
            num_single_layers=6,
            attention_head_dim=64,
            num_attention_heads=3,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(16, 24, 24),
        )
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            closed = "norm" in name or name == "proj_out"
            torch.nn.init.zeros_(layer.weight) if closed else torch.nn.init.xavier_uniform_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return model


def draw_pictures(photos: torch.Tensor, classes: torch.Tensor, side: int, random: torch.Generator) -> torch.Tensor:
    """Random resized crops, half of them mirrored: [P, 3, S, S], [B] -> [B, 3, side, side]."""
    b, device = len(classes), photos.device

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(b, generator=random, device=device) * (high - low) + low

    area, stretch = uniform(LEAST_AREA, 1), torch.exp(uniform(-1, 1) * math.log(STRETCH) / 2)
    width, height = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
    left, top = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(left)
    window = torch.stack([mirror * width, zero, left, zero, height, top], dim=1).view(b, 2, 3)
    grid = F.affine_grid(window, [b, 3, side, side], align_corners=False)
    return F.grid_sample(photos[classes], grid, mode="bilinear", padding_mode="border", align_corners=False)


def flow_matching_loss(
    model: torch.nn.Module,
    photos: torch.Tensor,
    ids: dict[str, torch.Tensor],
    stage: Stage,
    random: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the velocity noise - image, at logit-normal noise levels (Esser et al., 2024)."""
    device = photos.device
    classes = torch.randint(len(photos), (stage.batch,), generator=random, device=device)
    image = to_tokens(draw_pictures(photos, classes, stage.side, random))
    noise = torch.randn(image.shape, generator=random, device=device)
    level = torch.randn(stage.batch, generator=random, device=device) + math.log(shift(stage.side))
    sigma = torch.sigmoid(level)
    x = torch.lerp(image, noise, sigma[:, None, None])
    kept = torch.rand(stage.batch, generator=random, device=device) >= DROP
    conditions = condition(torch.where(kept, classes, UNCONDITIONAL))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity = model(hidden_states=x, timestep=sigma, **conditions, **ids, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - image)


class Trainer:
    """Model, moving average, optimiser and progress, and how they are saved."""

    def __init__(self, place: Place, out: Path, seed: int, compiled: bool):
        torch.manual_seed(seed)
        self.place, self.out, self.seed = place, out, seed
        self.progress = Progress()
        self.model = build_model(place.device)
        self.average = build_model(place.device).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        fused = place.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
        if compiled:
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        self.parallel: torch.nn.Module = self.model
        if place.world > 1:
            self.parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def resume(self, file: Path) -> None:
        saved = torch.load(file, map_location=self.place.device, weights_only=True)
        for name in ("model", "average", "optimizer"):
            getattr(self, name).load_state_dict(saved[name])
        self.progress = Progress(**saved["progress"])

    def save(self) -> None:
        part = self.out / "checkpoint.part"
        state = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
        torch.save(state | {"progress": asdict(self.progress)}, part)
        part.replace(self.out / "checkpoint.pt")

    def step(self, loss: torch.Tensor, rate: float) -> None:
        """One step of the optimiser and of the moving average, which forgets its start quickly."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        done = self.progress.step = self.progress.step + 1
        blend = get_ema_multi_avg_fn(min(EMA_DECAY, (1 + done) / (10 + done)))
        blend(list(self.average.parameters()), list(self.model.parameters()), done)

    def train(self, stage: Stage, until: float) -> bool:
        """Train a stage to its end (True), or to `until`, in seconds of time.monotonic (False)."""
        place, progress, side = self.place, self.progress, stage.side
        steps, seconds = progress.steps.get(side, 0), progress.seconds.get(side, 0.0)
        if stage.share(seconds, steps) >= 1:
            return True
        photos = load_photos(round(MARGIN * side)).to(place.device)
        ids = position_ids(side, place.device)
        random = torch.Generator(place.device).manual_seed(self.seed + progress.step * place.world + place.rank)
        flow_matching_loss(self.parallel, photos, ids, stage, random).backward()  # compiles, before the clock starts
        self.optimizer.zero_grad()

        start = time.monotonic() - seconds
        printed, saved = (seconds, steps), seconds
        while True:
            seconds = place.agree(time.monotonic() - start)
            progress.steps[side], progress.seconds[side] = steps, seconds
            share, late = stage.share(seconds, steps), place.agree(time.monotonic() - until) > 0
            if place.leads and (seconds - printed[0] > PRINT_SECONDS or share >= 1 or late):
                speed = (steps - printed[1]) * stage.batch * place.world / max(seconds - printed[0], 1e-9)
                at = f"{side} px {share:4.0%} step {progress.step}"
                print(f"{at} loss {progress.loss:.4f} {speed:.0f} images/s", flush=True)
                printed = seconds, steps
            if place.leads and seconds - saved > SAVE_SECONDS:
                self.save()
                saved = seconds
            if share >= 1 or late:
                return share >= 1
            rate = stage.learning_rate(share) * min(1.0, (progress.step + 1) / WARM_UP)
            count = min(CHUNK, stage.steps - steps) if stage.steps is not None else CHUNK
            total = torch.zeros((), device=place.device)
            for _ in range(count):
                loss = flow_matching_loss(self.parallel, photos, ids, stage, random)
                self.step(loss, rate)
                total += loss.detach()
            steps += count
            progress.images += count * stage.batch * place.world
            mean = total.item() / count
            progress.loss = mean if math.isnan(progress.loss) else 0.95 * progress.loss + 0.05 * mean

    def export(self, side: int, sample_steps: int) -> None:
        """Write the moving average in bfloat16 as diffusers saves it, and a sheet of samples, one a class."""
        model = build_model(self.place.device).bfloat16().eval()
        model.load_state_dict(self.average.state_dict())
        model.save_pretrained(self.out)
        pictures = generate(model, torch.arange(len(NAMES)), side, sample_steps, self.seed)
        contact_sheet(pictures).save(self.out / f"samples-{side}.png")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/flux-photos"), help="folder to write to")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="MINUTES", help="end this run then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample-steps", type=int, default=50, help="of the sampler that draws the sheets")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks (never done on a CPU)")
    for side, minutes, batch, rate in ((128, 5.5, 64, 1e-3), (256, 7.2, 16, 5e-4)):
        parser.add_argument(f"--minutes-{side}", type=float, default=minutes, help=f"length of the {side} px stage")
        parser.add_argument(f"--steps-{side}", type=int, help="the same in steps, instead of minutes")
        parser.add_argument(f"--batch-{side}", type=int, default=batch, help="pictures a step and process")
        parser.add_argument(f"--rate-{side}", type=float, default=rate, help="learning rate at the stage's start")
    return parser.parse_args()


def main() -> None:
    began, arguments, place = time.monotonic(), parse_arguments(), find_place()
    options = vars(arguments)

    def stage(side: int, last_rate: float) -> Stage:
        of = {name: options[f"{name}_{side}"] for name in ("minutes", "steps", "batch", "rate")}
        return Stage(side=side, last_rate=last_rate, **of)

    stages = (stage(128, arguments.rate_256), stage(256, 1e-6))
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(place, arguments.out, arguments.seed, place.device.type == "cuda" and not arguments.eager)
    if arguments.resume:
        trainer.resume(arguments.out / "checkpoint.pt")
    for each in stages:
        ended = trainer.train(each, began + 60 * arguments.stop_after)
        if place.leads:
            trainer.save()
            trainer.export(each.side, arguments.sample_steps)
        if not ended:
            break
    if place.leads:
        print(trainer.progress)
    if place.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
