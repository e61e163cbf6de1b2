"""Models to measure: published diffusion transformers in their real configuration with random weights, or anyone's own.

diffusers is imported when a model of its own is made, not before.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from chipmunk_fx.pretrained import FAMILIES, PretrainedError, Size, example_inputs

STD = 0.02  # of random weights


@dataclass(frozen=True)
class Subject:
    """A diffusers class with its `settings` beyond the defaults, the preset published for it, and how a pipeline calls it:
    `calls` a step, `samples` a call, `words` of the text tokens that are no padding (None: all)."""

    transformer: str
    preset: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    calls: int = 1
    samples: int = 1
    words: int | None = None
    fullgraph: bool = False

    @property
    def size(self) -> Size:
        return FAMILIES[self.transformer].size


SUBJECTS: Mapping[str, Subject] = {
    "flux": Subject("FluxTransformer2DModel", "flux", {"guidance_embeds": True}),
    "hunyuan": Subject("HunyuanVideoTransformer3DModel", "hunyuan", words=64),
    "wan": Subject("WanTransformer3DModel", "wan", calls=2),
    # Without fullgraph, picking valid tokens by a mask breaks the graph into eleven.
    "mochi": Subject("MochiTransformer3DModel", "mochi", samples=2, fullgraph=True),
}


@dataclass(frozen=True)
class Built:
    """A model and the inputs of the calls of one step, and those without padding where some of them are padded."""

    model: nn.Module
    calls: Sequence[dict[str, Any]]
    unpadded: Sequence[dict[str, Any]] | None = None
    fullgraph: bool = False


def build(
    subject: Subject, size: Size | None, blocks: int | None, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Built:
    """`subject` with random weights on `device`; at most `blocks` blocks of each kind where given.

    Raises PretrainedError where diffusers or accelerate is missing.
    """
    model = random_weights(subject.transformer, _limited(subject, blocks), device, dtype, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given = example_inputs(model, size)
        texts = [given] + [given | _other_text(given) for _ in range(subject.calls - 1)]
    calls = [{key: _placed(value, subject.samples, device, dtype) for key, value in text.items()} for text in texts]
    if subject.words is None:
        return Built(model, calls, fullgraph=subject.fullgraph)
    text, mask = "encoder_hidden_states", "encoder_attention_mask"
    for call in calls:
        call[mask][:, subject.words :] = 0
    unpadded = [call | {name: call[name][:, : subject.words] for name in (text, mask)} for call in calls]
    return Built(model, calls, unpadded, subject.fullgraph)


def few(subject: Subject, fewest: int) -> tuple[Subject, int, int]:
    """`subject` with `fewest` blocks of its rarest kind and of the others in proportion; how many these are, and all."""
    kinds = _kinds(subject)
    rarest = min(kinds.values())
    fewer = {kind: min(round(fewest * count / rarest), count) for kind, count in kinds.items()}
    settings = dict(subject.settings) | fewer
    return replace(subject, settings=settings), sum(fewer.values()), sum(kinds.values())


def own(factory: Callable[[], Any], device: torch.device) -> Built:
    """The model and the keyword inputs that `factory` returns, in the types it gave them, on `device`."""
    model, inputs = factory()
    call = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return Built(model.to(device).eval(), [call])


def random_weights(
    name: str, settings: Mapping[str, Any], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> nn.Module:
    """diffusers' class `name`, made without memory for its weights, which are then drawn on `device`: normal of standard
    deviation `STD`, scales of norms 1. Modules that diffusers keeps in fp32 are kept there. Raises PretrainedError."""
    try:
        import diffusers
        from accelerate import init_empty_weights
    except ImportError as missing:
        raise PretrainedError(
            "this model needs diffusers and accelerate: pip install diffusers accelerate"
        ) from missing
    with init_empty_weights():
        model: Any = getattr(diffusers, name)(**settings)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            own_dtype = torch.float32 if kept & {*path.split("."), leaf} else dtype
            value = torch.empty(parameter.shape, dtype=own_dtype, device=device)
            scale_of_norm = leaf == "weight" and parameter.ndim == 1
            value = value.fill_(1) if scale_of_norm else value.normal_(0, STD, generator=generator)
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return model.to(device).eval()  # what is left to move: buffers


def ignore_masks(model: nn.Module) -> None:
    """Call every attention inside the blocks without a mask, as a user may where no token is padding."""

    def unmasked(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"attention_mask": None}

    for path, module in model.named_modules():
        block, _, name = path.rpartition(".")
        if name == "attn" and "refiner" not in block:
            module.register_forward_pre_hook(unmasked, with_kwargs=True)


def _limited(subject: Subject, blocks: int | None) -> dict[str, Any]:
    at_most = {} if blocks is None else {kind: min(blocks, count) for kind, count in _kinds(subject).items()}
    return dict(subject.settings) | at_most


def _kinds(subject: Subject) -> dict[str, int]:
    """The arguments that say how many blocks there are, of each kind."""
    import diffusers

    known = inspect.signature(getattr(diffusers, subject.transformer).__init__).parameters
    names = [name for name in ("num_layers", "num_single_layers") if name in known]
    return {name: subject.settings.get(name, known[name].default) for name in names}


def _other_text(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Another prompt for the same latents: the second branch of guidance."""
    texts = ("encoder_hidden_states", "pooled_projections")
    return {name: torch.randn_like(inputs[name]) for name in texts if name in inputs}


def _placed(value: Any, samples: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors on `device`, `samples` times as large a batch. Times and position ids (fp32) keep their type."""
    if not isinstance(value, Tensor):
        return value
    narrow = value.is_floating_point() and value.dtype is not torch.float32
    value = value.to(device, dtype if narrow else value.dtype)
    return value.repeat(samples, *[1] * (value.ndim - 1)) if samples > 1 else value
