"""A Llama's weights as inference engines keep them: fused and sharded."""

import torch

KV_HEADS = 2


def rows(weight, rank, size, heads=None):
    """A shard by rows; heads that are fewer than ranks are on several."""
    copies = 1 if heads is None else max(1, size // heads)
    return weight.chunk(size // copies)[rank // copies]


def fuse(state, rank=0, size=1):
    """A Llama's tensors as vLLM keeps them on one rank."""
    engine = {}
    for name, tensor in state.items():
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf == "q_proj":
            parts = [rows(tensor, rank, size)]
            parts += [rows(state[f"{parent}.{kv}_proj.weight"], rank, size, KV_HEADS) for kv in "kv"]
            engine[f"{parent}.qkv_proj.weight"] = torch.cat(parts)
        elif leaf == "gate_proj":
            parts = [rows(state[f"{parent}.{part}.weight"], rank, size) for part in ("gate_proj", "up_proj")]
            engine[f"{parent}.gate_up_proj.weight"] = torch.cat(parts)
        elif leaf in ("o_proj", "down_proj"):
            engine[name] = tensor.chunk(size, dim=1)[rank].clone()
        elif leaf in ("embed_tokens", "lm_head"):
            engine[name] = rows(tensor, rank, size).clone()
        elif leaf not in ("k_proj", "v_proj", "up_proj"):
            engine[name] = tensor.clone()
    return engine


def assert_same(engine, expected):
    assert engine.keys() == expected.keys()
    for name, tensor in engine.items():
        assert torch.equal(tensor, expected[name]), name
