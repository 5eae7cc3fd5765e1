"""Text encoders."""

from zoo.families.decoders import INPUTS, POSITIONS, VOCAB, make
from zoo.family import BATCH, SEQUENCE, Family
from zoo.layout import Layout, Stack

SIZES = dict(vocab_size=VOCAB, hidden_size=48, num_attention_heads=3, intermediate_size=112, num_hidden_layers=5,
             max_position_embeddings=POSITIONS)
LAYOUT_SIZES = {"vocab": VOCAB, "hidden": 48, "heads": 3, "head_dim": 16, "ffn": 112, "head_0": 48}
BERT_BLOCK = Stack(
    "encoder.layer",
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
    attributes={
        "attention.self": {
            "num_attention_heads": "heads",
            "attention_head_size": "head_dim",
            "all_head_size": "heads * head_dim",
        }
    },
    halves={"attention": "second attention.output", "ffn": "second output"},
)

BERT = Family(
    "bert",
    make("BertModel", "BertConfig", **SIZES),
    INPUTS,
    {"last_hidden_state": (BATCH, SEQUENCE, "hidden"), "pooler_output": (BATCH, "head_0")},
    Layout(
        sizes=LAYOUT_SIZES,
        rows={
            "embeddings.word_embeddings.weight": "vocab hidden",
            "embeddings.*_embeddings.weight": "_ hidden",
            "embeddings.LayerNorm.*": "hidden",
            "pooler.dense.weight": "head_0 hidden",
            "pooler.dense.bias": "head_0",
        },
        stacks=(BERT_BLOCK,),
    ),
)

FAMILIES = (BERT,)
