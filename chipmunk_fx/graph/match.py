"""Run patterns over a captured graph: every anchor yields a candidate, accepted or refused with its reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from chipmunk_fx.graph.capture import dotted
from chipmunk_fx.graph.language import Mismatch, match
from chipmunk_fx.graph.pattern import Accepted, AttentionOperands, MlpOperands, Pattern, Refused

_TORCH_FILES = ("/torch/", "<eval_with_key>")


@dataclass(frozen=True)
class Candidate:
    """An anchor that a pattern took (`operands` given) or refused (`reason` given)."""

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


def find(module: fx.GraphModule, patterns: Sequence[Pattern]) -> list[Candidate]:
    """Candidates in the order of the graph. Ops explained by an accepted match belong to no other."""
    found: list[Candidate] = []
    for node in module.graph.nodes:
        if node.op == "call_function":
            applicable = [p for p in patterns if node.target in p.anchors]
            if applicable and (candidate := _best(node, applicable)):
                found.append(candidate)
    taken: dict[fx.Node, fx.Node] = {}  # node -> anchor of the match that explains it
    for index, candidate in enumerate(found):
        if candidate.operands is None:
            continue
        if shared := next((n for n in candidate.nodes if n in taken), None):
            reason = f"{shared} is part of the match that ends at {taken[shared]}"
            found[index] = replace(candidate, operands=None, reason=reason)
        else:
            taken.update(dict.fromkeys(candidate.nodes, candidate.anchor))
    return [c for c in found if c.operands is not None or c.anchor not in taken]


def _best(anchor: fx.Node, patterns: Sequence[Pattern]) -> Candidate | None:
    """The first pattern that accepts; else the refusal of the attempt that got furthest."""
    refusal: tuple[int, Candidate] | None = None  # a complete match that a guard refused beats any partial one
    for pattern in patterns:
        result = match(pattern.expression, anchor)
        if isinstance(result, Mismatch):
            if result.depth < pattern.begins:
                continue
            depth, verdict, nodes = result.depth, Refused(pattern.name, str(result)), (anchor,)
        else:
            depth, verdict, nodes = result.depth + 1, pattern.judge(result), result.nodes
            if isinstance(verdict, Accepted):
                return _candidate(anchor, pattern, verdict, nodes)
        if refusal is None or depth > refusal[0]:
            assert isinstance(verdict, Refused)
            refusal = depth, _candidate(anchor, pattern, verdict, nodes)
    return refusal[1] if refusal else None


def _candidate(anchor: fx.Node, pattern: Pattern, verdict: Accepted | Refused, nodes: tuple) -> Candidate:
    paths = [p for node in nodes if (p := module_path(node))]
    name = _common(paths) if paths else anchor.name
    operands = verdict.operands if isinstance(verdict, Accepted) else None
    reason = verdict.reason if isinstance(verdict, Refused) else None
    block = _block(name)
    return Candidate(
        anchor, pattern.kind, verdict.form, pattern.name, operands, reason, name, block, source_line(anchor), nodes
    )


def module_path(node: fx.Node) -> str | None:
    """The innermost module that ran the op, dotted: `transformer_blocks.0.attn`."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    return dotted(re.sub(r"^L\[['\"]\w+['\"]\]", "", list(stack.values())[-1][0])) or None


def source_line(node: fx.Node) -> str:
    """`file.py:123` of the user's model, the innermost frame outside torch."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    for file, line in reversed(frames):
        if not any(part in file for part in _TORCH_FILES):
            return f"{file.rsplit('/', 1)[-1]}:{line}"
    return ""


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
