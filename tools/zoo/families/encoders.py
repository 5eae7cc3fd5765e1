"""Text encoders."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from zoo.families.decoders import INPUTS, LOGITS, POSITIONS, QUERY_SCALE, VOCAB, make
from zoo.family import BATCH, SEQUENCE, Family
from zoo.layout import Layout, Stack, rotary

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    num_attention_heads=3,
    intermediate_size=112,
    num_hidden_layers=5,
    max_position_embeddings=POSITIONS,
    pad_token_id=0,
)
LAYOUT_SIZES = {"vocab": VOCAB, "hidden": 48, "heads": 3, "head_dim": 16, "ffn": 112}
PLAIN = {}
BERT_ATTENTION = {
    "num_attention_heads": "heads",
    "attention_head_size": "head_dim",
    "all_head_size": "heads * head_dim",
}


def bert_block(path: str) -> Stack:
    """Return BERT's stack of blocks at a module path."""
    return Stack(
        path,
        rows={
            "attention.self.*.weight": "(heads head_dim) hidden",
            "attention.self.*.bias": "(heads head_dim)",
            "attention.output.dense.weight": "hidden (heads head_dim)",
            "attention.output.dense.bias": "hidden",
            "*LayerNorm.*": "hidden",
            "intermediate.dense.weight": "ffn hidden",
            "intermediate.dense.bias": "ffn",
            "output.dense.weight": "hidden ffn",
            "output.dense.bias": "hidden",
        },
        attributes={"attention.self": BERT_ATTENTION},
        halves={
            "attention": "zero attention.output.dense; identity attention.output.LayerNorm",
            "ffn": "zero output.dense; identity output.LayerNorm",
        },
    )


def embeddings(base: str, width: str = "hidden") -> dict[str, str]:
    """Return the rows of BERT's embeddings below a module path that ends in a dot, or is empty."""
    return {
        f"{base}embeddings.word_embeddings.weight": f"vocab {width}",
        f"{base}embeddings.*_embeddings.weight": f"_ {width}",
        f"{base}embeddings.LayerNorm.*": width,
    }


BERT = Family(
    "bert",
    make("BertModel", "BertConfig", **SIZES),
    INPUTS,
    {"last_hidden_state": (BATCH, SEQUENCE, "hidden"), "pooler_output": (BATCH, "head_0")},
    Layout(
        sizes=LAYOUT_SIZES | {"head_0": 48},
        rows=embeddings("") | {"pooler.dense.weight": "head_0 hidden", "pooler.dense.bias": "head_0"},
        stacks=(bert_block("encoder.layer"),),
    ),
)

BERT_MLM = Family(
    "bert_mlm",
    make("BertForMaskedLM", "BertConfig", **SIZES, tie_word_embeddings=False),
    INPUTS,
    LOGITS,
    Layout(
        sizes=LAYOUT_SIZES | {"head_0": 48},
        rows=embeddings("bert.")
        | {
            "cls.predictions.transform.dense.weight": "head_0 hidden",
            "cls.predictions.transform.*": "head_0",
            "cls.predictions.decoder.weight": "vocab head_0",
            "cls.predictions.*bias": "vocab",
        },
        stacks=(bert_block("bert.encoder.layer"),),
    ),
    extra=PLAIN,
)

ROBERTA = Family(
    "roberta",
    make("RobertaForMaskedLM", "RobertaConfig", **SIZES, bos_token_id=0, eos_token_id=1),
    INPUTS,
    LOGITS,
    Layout(
        sizes=LAYOUT_SIZES,
        rows=embeddings("roberta.")
        | {
            "lm_head.dense.weight": "hidden hidden",
            "lm_head.dense.bias": "hidden",
            "lm_head.layer_norm.*": "hidden",
            "lm_head.*bias": "vocab",
        },
        stacks=(bert_block("roberta.encoder.layer"),),
    ),
    extra=PLAIN,
)

DISTILBERT = Family(
    "distilbert",
    make(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        vocab_size=VOCAB,
        dim=48,
        n_heads=3,
        hidden_dim=112,
        n_layers=5,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
    ),
    INPUTS,
    LOGITS,
    Layout(
        sizes=LAYOUT_SIZES,
        rows=embeddings("distilbert.")
        | {
            "vocab_transform.weight": "hidden hidden",
            "vocab_transform.bias": "hidden",
            "vocab_layer_norm.*": "hidden",
            "vocab_projector.bias": "vocab",
        },
        stacks=(
            Stack(
                "distilbert.transformer.layer",
                rows={
                    "attention.out_lin.weight": "hidden (heads head_dim)",
                    "attention.out_lin.bias": "hidden",
                    "attention.*_lin.weight": "(heads head_dim) hidden",
                    "attention.*_lin.bias": "(heads head_dim)",
                    "*layer_norm.*": "hidden",
                    "ffn.lin1.weight": "ffn hidden",
                    "ffn.lin1.bias": "ffn",
                    "ffn.lin2.weight": "hidden ffn",
                    "ffn.lin2.bias": "hidden",
                },
                attributes={"attention": {"n_heads": "heads", "attention_head_size": "head_dim"}},
                halves={
                    "attention": "zero attention.out_lin; identity sa_layer_norm",
                    "ffn": "zero ffn.lin2; identity output_layer_norm",
                },
                depth=("config.num_hidden_layers", "distilbert.transformer:n_layers"),
            ),
        ),
    ),
    extra=PLAIN,
)

ALBERT = Family(
    "albert",
    make("AlbertForMaskedLM", "AlbertConfig", **SIZES, embedding_size=24),
    INPUTS,
    LOGITS,
    Layout(
        sizes=LAYOUT_SIZES | {"stem_0": 24},
        rows=embeddings("albert.", "stem_0")
        | {
            "albert.encoder.embedding_hidden_mapping_in.weight": "hidden stem_0",
            "albert.encoder.embedding_hidden_mapping_in.bias": "hidden",
            "predictions.dense.weight": "stem_0 hidden",
            "predictions.dense.bias": "stem_0",
            "predictions.LayerNorm.*": "stem_0",
            "predictions.*bias": "vocab",
        },
        stacks=(
            Stack(
                "albert.encoder.albert_layer_groups.0.albert_layers",
                rows={
                    "*ayer_norm.*": "hidden",
                    "*LayerNorm.*": "hidden",
                    "attention.dense.weight": "hidden (heads head_dim)",
                    "attention.dense.bias": "hidden",
                    "attention.*.weight": "(heads head_dim) hidden",
                    "attention.*.bias": "(heads head_dim)",
                    "ffn.weight": "ffn hidden",
                    "ffn.bias": "ffn",
                    "ffn_output.weight": "hidden ffn",
                    "ffn_output.bias": "hidden",
                },
                attributes={"attention": BERT_ATTENTION},
                shared=5,
            ),
        ),
        coupled=("hidden", "vocab", "heads", "head_dim", "ffn"),
    ),
    extra=PLAIN,
)

ELECTRA = Family(
    "electra",
    make("ElectraForPreTraining", "ElectraConfig", **SIZES, embedding_size=24),
    INPUTS,
    {"logits": (BATCH, SEQUENCE)},
    Layout(
        sizes=LAYOUT_SIZES | {"stem_0": 24, "head_0": 48},
        rows=embeddings("electra.", "stem_0")
        | {
            "electra.embeddings_project.weight": "hidden stem_0",
            "electra.embeddings_project.bias": "hidden",
            "discriminator_predictions.dense.weight": "head_0 hidden",
            "discriminator_predictions.dense.bias": "head_0",
            "discriminator_predictions.dense_prediction.weight": "_ head_0",
            "discriminator_predictions.dense_prediction.bias": "_",
        },
        stacks=(bert_block("electra.encoder.layer"),),
    ),
    extra=PLAIN,
)


class FoldedProjection(nn.Linear):
    """A projection that keeps what it makes of relative positions, [heads * head_dim, positions]."""

    def __init__(self, whole: nn.Linear, positions: torch.Tensor) -> None:
        super().__init__(*reversed(whole.weight.shape))
        self.weight, self.bias = whole.weight, whole.bias
        self.table = nn.Parameter(whole(positions).T.contiguous())
        self.of_positions = False

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.table.T[None] if self.of_positions else super().forward(given)


@torch.no_grad()
def _fold_positions(model: nn.Module) -> None:
    """Let each block keep what its projections make of the relative positions."""
    encoder = model.deberta.encoder
    for layer in encoder.layer:
        attention = layer.attention.self
        both = [
            FoldedProjection(each, encoder.get_rel_embedding()) for each in (attention.query_proj, attention.key_proj)
        ]
        attention.query_proj, attention.key_proj = both
        attention.disentangled_attention_bias = functools.partial(
            _from_tables, attention.disentangled_attention_bias, both
        )


def _from_tables(bias: Callable, projections: list[FoldedProjection], *given, **named) -> torch.Tensor:
    for each in projections:
        each.of_positions = True
    result = bias(*given, **named)
    for each in projections:
        each.of_positions = False
    return result


_DEBERTA_BLOCK = bert_block("deberta.encoder.layer")
DEBERTA_V2 = Family(
    "deberta_v2",
    make(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        **SIZES,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    ),
    INPUTS,
    LOGITS,
    Layout(
        sizes=LAYOUT_SIZES,
        rows=embeddings("deberta.")
        | {
            "deberta.encoder.rel_embeddings.weight": "_ hidden",
            "deberta.encoder.LayerNorm.*": "hidden",
            "cls.predictions.transform.dense.weight": "hidden hidden",
            "cls.predictions.transform.*": "hidden",
            "cls.predictions.*bias": "vocab",
        },
        stacks=(
            replace(
                _DEBERTA_BLOCK,
                rows={"attention.self.*.table": "(heads head_dim) _"} | _DEBERTA_BLOCK.rows,
                attributes=_DEBERTA_BLOCK.attributes | {"attention.self.query_proj": {"scaled_rows": QUERY_SCALE}},
            ),
        ),
        folded={"deberta.encoder.rel_embeddings.weight": _fold_positions},
        stack_coupled=("heads",),  # by positions that dynamo expands to batch * heads once for all blocks
    ),
    extra=PLAIN,
)

MODERNBERT = Family(
    "modernbert",
    make(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        **SIZES,
        local_attention=4,
        bos_token_id=1,
        eos_token_id=1,
        cls_token_id=1,
        sep_token_id=1,
        global_attn_every_n_layers=2,
    ),
    INPUTS,
    LOGITS,
    Layout(
        sizes=LAYOUT_SIZES,
        rows={
            "model.embeddings.tok_embeddings.weight": "vocab hidden",
            "model.embeddings.norm.*": "hidden",
            "model.final_norm.*": "hidden",
            "head.dense.weight": "hidden hidden",
            "head.norm.*": "hidden",
            "decoder.bias": "vocab",
            "model.rotary_emb.full_attention*inv_freq": "blocks.0.pairs",
            "model.rotary_emb.sliding_attention*inv_freq": "blocks.1.pairs",
        },
        stacks=(
            Stack(
                "model.layers",
                rows={
                    "*_norm.*": "hidden",
                    "attn.Wqkv.weight": "(3 heads head_dim) hidden",
                    "attn.Wo.weight": "hidden (heads head_dim)",
                    "mlp.Wi.weight": "(2 ffn) hidden",
                    "mlp.Wo.weight": "hidden ffn",
                },
                attributes={"attn": {"head_dim": "head_dim"}, "attn.Wqkv": {"scaled_rows": QUERY_SCALE}},
                halves={"attention": "zero attn.Wo", "ffn": "zero mlp.Wo"},
            ),
        ),
        block_groups={"head_dim": ((0, 2, 4), (1, 3))},  # full and sliding attention have a table each
        derived=rotary(),
    ),
    extra=PLAIN,
)

FAMILIES = (BERT, BERT_MLM, ROBERTA, DISTILBERT, ALBERT, ELECTRA, DEBERTA_V2, MODERNBERT)
