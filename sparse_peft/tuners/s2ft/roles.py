"""A layer's role in a transformer, by its name; S2FT's side and coupling follow from it."""

from __future__ import annotations

from dataclasses import dataclass

IN, OUT = "in", "out"
ATTENTION, FFN = "attention", "ffn"

# Layers that write into the residual stream train input channels, layers that read from it output channels.
SIDES = {"o": IN, "down": IN, "q": OUT, "k": OUT, "v": OUT, "up": OUT, "gate": OUT}
FAMILIES = {"q": ATTENTION, "k": ATTENTION, "v": ATTENTION, "o": ATTENTION, "up": FFN, "gate": FFN, "down": FFN}

# Ends of layers' names in the models of transformers and diffusers.
_ENDINGS = {
    "q": (
        "q_proj",
        "attention.self.query",
        "attention.query",
        "query",
        "SelfAttention.q",
        "EncDecAttention.q",
        "to_q",
    ),
    "k": ("k_proj", "attention.self.key", "attention.key", "key", "SelfAttention.k", "EncDecAttention.k", "to_k"),
    "v": (
        "v_proj",
        "attention.self.value",
        "attention.value",
        "value",
        "SelfAttention.v",
        "EncDecAttention.v",
        "to_v",
    ),
    "o": (
        "attention.output.dense",
        "self_attention.dense",
        "attention.dense",
        "attn.c_proj",
        "SelfAttention.o",
        "EncDecAttention.o",
        "o_proj",
        "out_proj",
        "to_out.0",
        "attention.out_lin",
    ),
    "up": (
        "up_proj",
        "intermediate.dense",
        "mlp.c_fc",
        "mlp.dense_h_to_4h",
        "DenseReluDense.wi_1",
        "DenseReluDense.wi",
        "ffn.lin1",
        "fc1",
        "fc_in",
        "w3",
        "ff.net.0.proj",
    ),
    "gate": ("gate_proj", "DenseReluDense.wi_0", "w1"),
    "down": (
        "down_proj",
        "output.dense",
        "mlp.c_proj",
        "mlp.dense_4h_to_h",
        "DenseReluDense.wo",
        "ffn.lin2",
        "fc2",
        "fc_out",
        "w2",
        "ff.net.2",
    ),
}
_BY_LENGTH = sorted(
    ((ending, role) for role, endings in _ENDINGS.items() for ending in endings), key=lambda pair: -len(pair[0])
)

# Default targets: attention and FFN outputs, which cost least and train best.
_LLAMA_LIKE = (
    "cohere cohere2 deepseek_v3 gemma gemma2 gemma3 glm glm4 granite helium llama llama4 mistral olmo olmo2 "
    "olmo3 phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 exaone4 ministral gemma3_text"
)
DEFAULT_TARGETS = {
    **{key: ["o_proj", "down_proj"] for key in _LLAMA_LIKE.split()},
    "starcoder2": ["o_proj", "mlp.c_proj"],
    **{key: ["o_proj"] for key in ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]},
    "phi": ["self_attn.dense", "fc2"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "gpt_bigcode": ["attn.c_proj", "mlp.c_proj"],
    **{key: ["attention.dense", "self_attention.dense", "dense_4h_to_h"] for key in ["gpt_neox", "bloom", "falcon"]},
    "gptj": ["out_proj", "fc_out"],
    "gpt_neo": ["out_proj", "mlp.c_proj"],
    "opt": ["out_proj"],  # it flattens the tokens before fc2, where a mixed batch could not tell its items apart
    **{key: ["out_proj", "fc2"] for key in ["bart", "mbart", "whisper", "m2m_100", "blenderbot", "pegasus"]},
    **{key: ["out_proj", "fc2"] for key in ["clip", "siglip"]},
    **{key: ["o", "wo"] for key in ["t5", "mt5", "umt5"]},
    **{
        key: ["output.dense"]
        for key in [
            "bert",
            "roberta",
            "xlm-roberta",
            "electra",
            "deberta",
            "deberta-v2",
            "vit",
            "deit",
            "beit",
            "camembert",
        ]
    },
    "dinov2": ["output.dense", "fc2"],
    "distilbert": ["out_lin", "lin2"],
}


@dataclass(frozen=True)
class Role:
    """A layer's part in a transformer block.

    Attributes:
        kind: a key of ``SIDES``.
        block: the name of the attention or feed-forward block that it is in.
    """

    kind: str
    block: str

    @property
    def family(self) -> str:
        return FAMILIES[self.kind]


def role_of(name: str) -> Role | None:
    """The role of the layer of this name; None for an unknown name."""
    for ending, kind in _BY_LENGTH:
        if name == ending or name.endswith(f".{ending}"):
            return Role(kind, name.removesuffix(ending).rstrip("."))
    return None
