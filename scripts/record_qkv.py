"""Train a small language model and record its q, k, v on held-out text.

Writes ``tasks/data/recorded_qkv.npz``, which ships with the package: realistic inputs to judge approximate
attention on. Takes some minutes on one thread; equal software on an equal CPU writes equal bytes.

    python scripts/record_qkv.py [--out FILE] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from attnbench.impls import registry
from attnbench.impls.base import Attention
from attnbench.tasks.base import Shape
from attnbench.tasks.cab.lm import EMBEDDING_STD, TINY, LMSession, blocks_of
from attnbench.tasks.data.recorded import PATH, digest
from attnbench.tasks.trainer import seed_of, train

SEED, LAYERS, HEADS, HEAD_DIM, CONTEXT, SEQUENCES = 0, 2, 4, 32, 512, 2


def session(steps: int) -> LMSession:
    """The task's session with a longer context, wider heads and a smaller batch."""
    workload = replace(TINY.shape.workload, name="recorded", batch=4, heads=HEADS, kv_heads=HEADS)
    workload = replace(workload, head_dim=HEAD_DIM)
    recipe = replace(TINY.recipe, steps=steps, lr=6e-3, warmup=steps // 10, max_seconds=float("inf"))
    preset = replace(TINY, shape=Shape(workload, CONTEXT, CONTEXT), recipe=recipe, layers=LAYERS)
    return LMSession(replace(preset, eval_batch=8), "cpu")


def trained_model(data: LMSession) -> tuple[nn.Module, dict[str, float]]:
    """A softmax language model after training, and its metrics on the test part."""

    def attention(layer: int) -> Attention:
        return registry.build("softmax", HEADS * HEAD_DIM, HEADS, pattern="CS", backend="torch")

    torch.manual_seed(seed_of(SEED, "init"))
    model = data.model(attention)
    with torch.no_grad():
        model.position.weight.copy_(sinusoids(CONTEXT, HEADS * HEAD_DIM) * EMBEDDING_STD * 2**0.5)
    recipe = data.preset.recipe
    train(
        model,
        data.batches(seed_of(SEED, "order")),
        data.loss,
        recipe,
        data.tokens_per_step,
        lambda done, total, loss: print(f"step {done}/{total}, loss {loss:.3f}") if done % 100 == 0 else None,
    )
    return model, data.evaluate(model)


def sinusoids(positions: int, width: int) -> Tensor:
    """Sines and cosines of geometric wavelengths: learned positions that start from them find neighbours.

    Without this start a run of 1000 steps ended at 8.4 byte perplexity, with no head that looks nearby.
    """
    angle = torch.arange(positions)[:, None] * 1e4 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


@torch.no_grad()
def record(model: nn.Module, tokens: Tensor) -> dict[str, np.ndarray]:
    """q, k, v as fp16 (sequences, layers, heads, context, D) of one forward pass over ``tokens``."""
    seen: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}

    def keep(name: str):
        return lambda module, inputs, output: seen[name].append(Attention.split(output, HEADS))

    hooks = [
        getattr(block.attention, f"{name}_proj").register_forward_hook(keep(name))
        for block in model.blocks
        for name in seen
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(layers, 1).half().numpy() for name, layers in seen.items()}


def describe(arrays: dict[str, np.ndarray]) -> None:
    """Print what each recorded head attends to under the causal mask, averaged over rows and sequences."""
    q, k = (torch.from_numpy(arrays[name]).float() for name in ("q", "k"))
    scores = q @ k.transpose(-1, -2) / HEAD_DIM**0.5
    hidden = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    entropy = torch.special.entr(weights).sum(-1)
    uniform = torch.arange(1, CONTEXT + 1).log()
    distance = torch.arange(CONTEXT)[:, None] - torch.arange(CONTEXT)[None]
    late = slice(CONTEXT // 4, None)
    for layer in range(LAYERS):
        for head in range(HEADS):
            w = weights[:, layer, head, late]
            held = w.sort(-1, descending=True).values.cumsum(-1)
            keys = ((held < 0.9).sum(-1) + 1) / torch.arange(1, CONTEXT + 1)[late]
            print(
                f"layer {layer} head {head}: entropy {entropy[:, layer, head, late].mean():.2f} nats "
                f"(uniform {uniform[late].mean():.2f}), on key 0 {w[..., 0].mean():.3f}, within 16 tokens "
                f"{w.masked_fill(distance[late] >= 16, 0).sum(-1).mean():.3f}, 90 % on {keys.mean():.3f}"
            )


def main() -> None:
    """Train, record, describe, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PATH)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = session(options.steps)
    model, metrics = trained_model(data)
    tokens, _ = blocks_of(data.test_part, CONTEXT)
    arrays = record(model, tokens[:SEQUENCES])
    describe(arrays)
    meta = {
        "model": f"byte-level decoder, {LAYERS} layers, width {HEADS * HEAD_DIM}, {HEADS} heads, softmax",
        "text": data.corpus.label,
        "text_sha256": data.corpus.fingerprint,
        "part": "start of the held-out tenth",
        "sequences": SEQUENCES,
        "context": CONTEXT,
        "steps": options.steps,
        "seed": SEED,
        "metrics": {name: round(value, 3) for name, value in metrics.items()},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sha256": digest(arrays),
    }
    np.savez_compressed(options.out, meta=np.array(json.dumps(meta, sort_keys=True)), **arrays)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, {metrics}")


if __name__ == "__main__":
    main()
