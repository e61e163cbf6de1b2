"""A DiT of a few hundred parameters with all that matters to the runtime: timestep, text, patches, one list of blocks."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, CHANNELS = 32, 2, 4

# Every site sparse, lists shared by 16 rows, no Inductor.
SPARSE: dict[str, Any] = {
    "lowering": "eager",
    "gate": "off",
    "attention.group_rows": 16,
    "mlp.group_rows": 16,
    "attention.dense_layers": 0,
    "mlp.dense_layers": 0,
}
# ... and every column computed: each phase equals the dense model.
EXACT = SPARSE | {
    "attention.density": 1.0,
    "mlp.density": 1.0,
    "attention.random_density": 0.0,
    "mlp.random_density": 0.0,
}


class Block(nn.Module):
    """x [B, N, C] -> [B, N, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TinyDiT(nn.Module):
    """latents [B, 4, h, w], timestep [B], text [B, T, 16] -> [B, 4, h, w]; text tokens come first."""

    blocks: Any  # tests take single layers out and put others in

    def __init__(self, depth: int = 1, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Conv2d(CHANNELS, WIDTH, 2, 2)
            self.context = nn.Linear(16, WIDTH)
            self.time = nn.Linear(WIDTH, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.out = nn.Linear(WIDTH, 4 * CHANNELS)
        self.eval()

    def forward(self, latents: Tensor, timestep: Tensor, text: Any = None) -> Tensor:
        b, _, h, w = latents.shape
        x = self.embed(latents).flatten(2).transpose(1, 2)
        angles = timestep[:, None].float() * torch.exp(-torch.arange(WIDTH // 2, device=latents.device) / 2)
        x = x + self.time(torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype))[:, None]
        words = 0 if text is None else text.shape[1]
        if text is not None:
            x = torch.cat([self.context(text), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.out(x[:, words:]).unflatten(1, (h // 2, w // 2)).unflatten(-1, (2, 2, CHANNELS))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, CHANNELS, h, w)


class Unsure(TinyDiT):
    """Two sinusoids, of which no name tells which is the time."""

    def forward(self, latents: Tensor, a: Tensor, b: Tensor, text: Any) -> Tensor:
        return super().forward(latents, a, text) + super().forward(latents, b, text)


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors of a few thousand numbers are not worth a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def chipmunk(model: nn.Module, **arguments: Any) -> Any:
    """What a user writes, with nothing said about types."""
    return torch.compile(model, backend="chipmunk", **arguments)


def compiled(model: nn.Module, **options: Any) -> Any:
    """`model` under our backend with `SPARSE` and `options` (dots written with two underscores).

    Dynamo's caches are cleared first: it gives up on a class after eight sets of options.
    """
    torch._dynamo.reset()
    settings = SPARSE | {key.replace("__", "."): value for key, value in options.items()}
    return chipmunk(model, options=settings)


def exactly(model: nn.Module, **options: Any) -> Any:
    """`compiled`, with every column computed."""
    return compiled(model, **({key.replace(".", "__"): value for key, value in EXACT.items()} | options))


def noise(seed: int = 0, side: int = 16, batch: int = 1) -> Tensor:
    return torch.randn(batch, CHANNELS, side, side, generator=torch.Generator().manual_seed(seed))


def words(seed: int = 0, count: int = 8, batch: int = 1) -> Tensor:
    return torch.randn(batch, count, 16, generator=torch.Generator().manual_seed(seed))


Call = tuple[Tensor, Tensor, Tensor]


def calls(
    times: Iterable[float], texts: Sequence[Tensor] | None = None, seed: int = 0, side: int = 16, batch: int = 1
) -> list[Call]:
    """The calls of one generation: each of `texts` at each of `times`, the latents moving from step to step."""
    texts = [words(batch=batch)] if texts is None else texts
    latents, moves = noise(seed, side, batch), noise(seed + 1000, side, batch)
    return [
        (latents + 0.1 * step * moves, torch.full((batch,), float(time)), text)
        for step, time in enumerate(times)
        for text in texts
    ]


@torch.no_grad()
def run(model: Any, inputs: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    return [model(*call) for call in inputs]


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Equal up to rounding."""
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def identical(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
