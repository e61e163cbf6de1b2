"""Run patterns over a captured graph: every anchor yields a candidate, accepted or refused with its reason."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from chipmunk_fx.graph.between import unknown_between
from chipmunk_fx.graph.capture import dotted
from chipmunk_fx.graph.language import Mismatch, match
from chipmunk_fx.graph.opaque import batched_experts, grouped_experts, opaque_attention
from chipmunk_fx.graph.pattern import Accepted, AttentionOperands, MlpOperands, Pattern, Refused
from chipmunk_fx.graph.products import unweighted
from chipmunk_fx.graph.walk import projections
from chipmunk_fx.graph.weights import unread_weights

_TORCH_FILES = ("/torch/", "<eval_with_key>")


@dataclass(frozen=True)
class Candidate:
    """An anchor that a pattern took (`operands` given) or refused (`reason` given).

    Of a refusal, `node` is where `constraint` was not met: what the expression wants there, or what a guard says.
    """

    anchor: fx.Node
    kind: str
    form: str
    pattern: str
    operands: AttentionOperands | MlpOperands | None
    reason: str | None
    name: str
    block: str | None
    where: str
    nodes: tuple[fx.Node, ...]
    node: fx.Node | None = None
    constraint: str | None = None
    dense: str | None = None  # of an accepted one: why it cannot be computed sparsely


def find(module: fx.GraphModule, patterns: Sequence[Pattern]) -> list[Candidate]:
    """Candidates in the order of the graph. Ops explained by an accepted match belong to no other."""
    applicable: dict[Any, list[Pattern]] = {}
    for pattern in patterns:
        for op in pattern.anchors:
            applicable.setdefault(op, []).append(pattern)
    calls = [n for n in module.graph.nodes if n.op == "call_function"]
    candidates = [_opaque(n) or (_best(n, applicable[n.target]) if n.target in applicable else None) for n in calls]
    found = _largest([candidate for candidate in candidates if candidate])
    taken: dict[fx.Node, fx.Node] = {}  # node -> anchor of the match that explains it
    for index, candidate in enumerate(found):
        if candidate.operands is None:
            continue
        if shared := next((n for n in candidate.nodes if n in taken), None):
            reason = f"{shared} is part of the match that ends at {taken[shared]}"
            constraint = "each op belongs to one match"
            found[index] = replace(candidate, operands=None, reason=reason, node=shared, constraint=constraint)
        else:
            taken.update(dict.fromkeys(candidate.nodes, candidate.anchor))
    found = [c for c in found if c.operands is not None or c.anchor not in taken]
    anchors = {candidate.anchor for candidate in found}
    place = {node: index for index, node in enumerate(calls)}
    found += _unread(calls, anchors)
    found = _unweighted(calls, found)
    return sorted([*found, *_unknown(calls, found)], key=lambda candidate: place[candidate.anchor])


def _unread(calls: Sequence[fx.Node], anchors: Set[fx.Node]) -> list[Candidate]:
    reasons = {node: reason for node in calls if (reason := unread_weights(node, anchors))}
    refused = [_candidate(n, "attention", "softmax", Refused("explicit", r), (n,)) for n, r in reasons.items()]
    return [replace(c, node=c.anchor, constraint="attention weights times values") for c in refused]


def _unweighted(calls: Sequence[fx.Node], found: Sequence[Candidate]) -> list[Candidate]:
    """`found` with products in a row, in place of what begins there: one of the same projections (recurrences have many)."""
    begun = [c for c in found if c.kind == "attention" and c.form == "unknown" and len(c.nodes) == 1]
    told = unweighted(calls, {node for candidate in found if candidate not in begun for node in candidate.nodes})
    last = {frozenset(projections(products[0])): products for products in told}
    refused = [
        _candidate(n, "attention", "products", Refused("unknown", w), (n, first)) for n, first, w in last.values()
    ]
    taken = {n for n, _, _ in told}
    kept = [candidate for candidate in found if candidate not in begun or candidate.anchor not in taken]
    return [*kept, *(replace(c, node=c.anchor, constraint="a softmax between the products") for c in refused)]


def _unknown(calls: Sequence[fx.Node], found: Sequence[Candidate]) -> list[Candidate]:
    explained = {node for candidate in found for node in candidate.nodes}
    seen = [(node, told) for node in calls if (told := unknown_between(node, explained))]
    refused = [_candidate(n, "mlp", "between", Refused("unknown", why), (n, first)) for n, (why, first) in seen]
    return [replace(c, node=c.anchor, constraint="a known activation") for c in refused]


def _largest(found: Sequence[Candidate]) -> list[Candidate]:
    """Without what lies within a larger match: a product whose bias is added by an op of its own is an anchor too."""
    within: dict[fx.Node, list[Candidate]] = {}
    for candidate in found:
        for node in candidate.nodes[1:]:
            within.setdefault(node, []).append(candidate)

    def is_part(candidate: Candidate) -> bool:
        return any(
            set(candidate.nodes) <= set(whole.nodes) and (whole.operands is not None or candidate.operands is None)
            for whole in within.get(candidate.anchor, ())
        )

    return [candidate for candidate in found if not is_part(candidate)]


def _best(anchor: fx.Node, patterns: Sequence[Pattern]) -> Candidate | None:
    """The first pattern that accepts; else the refusal of the attempt that got furthest."""
    refusal: tuple[int, Candidate] | None = None  # a complete match that a guard refused beats any partial one
    for pattern in patterns:
        result = match(pattern.expression, anchor)
        if isinstance(result, Mismatch):
            if result.depth < pattern.begins:
                continue
            depth, verdict, nodes = result.depth, Refused("unknown", str(result)), (anchor,)
            node, constraint = result.node, f"wanted {result.wanted}"
        else:
            depth, verdict, nodes = result.depth + 1, pattern.judge(result), result.nodes
            if isinstance(verdict, Accepted):
                return _candidate(anchor, pattern.kind, pattern.name, verdict, nodes)
            node, constraint = None, verdict.reason
        if refusal is None or depth > refusal[0]:
            refused = _candidate(anchor, pattern.kind, pattern.name, verdict, nodes)
            refusal = depth, replace(refused, node=node or anchor, constraint=constraint)
    return refusal[1] if refusal else None


def _opaque(anchor: fx.Node) -> Candidate | None:
    if reason := opaque_attention(anchor):
        refused = _candidate(anchor, "attention", "opaque", Refused("opaque", reason), (anchor,))
        return replace(refused, node=anchor, constraint="an attention that the graph shows the formula of")
    if reason := grouped_experts(anchor) or batched_experts(anchor):
        refused = _candidate(anchor, "mlp", "opaque", Refused("experts", reason), (anchor,))
        return replace(refused, node=anchor, constraint="rows that stay from step to step")
    return None


def _candidate(anchor: fx.Node, kind: str, pattern: str, verdict: Accepted | Refused, nodes: tuple) -> Candidate:
    paths = [p for node in nodes if (p := module_path(node))]
    name = _common(paths) if paths else anchor.name
    operands = verdict.operands if isinstance(verdict, Accepted) else None
    reason = verdict.reason if isinstance(verdict, Refused) else None
    dense = verdict.dense if isinstance(verdict, Accepted) else None
    block = _block(name)
    return Candidate(
        anchor, kind, verdict.form, pattern, operands, reason, name, block, source_line(anchor), nodes,
        dense=dense,
    )  # fmt: skip


def module_path(node: fx.Node) -> str | None:
    """The innermost module that ran the op, dotted: `transformer_blocks.0.attn`."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    return dotted(re.sub(r"^L\[['\"]\w+['\"]\]", "", list(stack.values())[-1][0])) or None


def block_of(node: fx.Node) -> str | None:
    """The outermost numbered container around the op: `transformer_blocks.0`."""
    path = module_path(node)
    return _block(path) if path else None


def source_line(node: fx.Node) -> str:
    """`file.py:123` of the user's model: the innermost frame in a file that defines a module around the op.

    Where there is none (a model without modules), the innermost frame outside torch.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    outside = [(file, line) for file, line in reversed(frames) if not any(part in file for part in _TORCH_FILES)]
    homes = _module_files(node)
    file, line = next((frame for frame in outside if frame[0] in homes), next(iter(outside), ("", "")))
    return f"{file.rsplit('/', 1)[-1]}:{line}" if file else ""


def _module_files(node: fx.Node) -> set[str]:
    """The files that define the modules around the op; helpers they share (attention dispatch, say) are in others."""
    kinds = [kind for _, kind in (node.meta.get("nn_module_stack") or {}).values() if isinstance(kind, type)]
    modules = [sys.modules.get(kind.__module__) for kind in kinds]
    return {file for module in modules if (file := getattr(module, "__file__", None))}


def _common(paths: Sequence[str]) -> str:
    """The longest dotted prefix that all paths share."""
    split = [p.split(".") for p in paths]
    prefix = []
    for words in zip(*split, strict=False):
        if len(set(words)) > 1:
            break
        prefix.append(words[0])
    return ".".join(prefix) or paths[0]


def _block(name: str) -> str | None:
    """`transformer_blocks.0` of `transformer_blocks.0.attn`: the outermost numbered container."""
    found = re.match(r"(?:[^.]*\D\.|[^.\d]+\.)*?\d+(?=\.|$)", name)
    return found.group(0) if found else None
