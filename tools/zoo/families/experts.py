"""Decoders with a mixture of experts, in the batched form that exports."""

from zoo.families.decoders import GROUPED, grouped

ROWS = {
    "mlp.gate.weight": "experts hidden",
    "mlp.experts.gate_up_proj": "experts (2 ffn) hidden",
    "mlp.experts.down_proj": "experts hidden ffn",
}
ATTRIBUTES = GROUPED | {
    "mlp.gate": {"num_experts": "experts", "hidden_dim": "hidden"},
    "mlp.experts": {"num_experts": "experts"},
}
HALVES = {"attention": "zero self_attn.o_proj", "ffn": "zero mlp.experts.down_proj"}
BATCHED = {"experts_implementation": "batched_mm"}

MIXTRAL = grouped(
    "mixtral",
    "MixtralForCausalLM",
    "MixtralConfig",
    ROWS,
    ATTRIBUTES,
    HALVES,
    {"experts": 7},
    num_local_experts=7,
    num_experts_per_tok=2,
    sliding_window=None,
    **BATCHED,
)
OLMOE = grouped(
    "olmoe",
    "OlmoeForCausalLM",
    "OlmoeConfig",
    ROWS
    | {
        "self_attn.q_norm.weight": "(kv_heads queries_per_kv head_dim)",
        "self_attn.k_norm.weight": "(kv_heads head_dim)",
    },
    ATTRIBUTES,
    HALVES,
    {"experts": 7, "head_dim": 8},
    num_experts=7,
    num_experts_per_tok=2,
    head_dim=8,
    **BATCHED,
)
QWEN3_MOE = grouped(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    ROWS,
    ATTRIBUTES,
    HALVES,
    {"experts": 7, "ffn": 56},
    num_experts=7,
    num_experts_per_tok=2,
    moe_intermediate_size=56,
    **BATCHED,
)

FAMILIES = (MIXTRAL, OLMOE, QWEN3_MOE)
