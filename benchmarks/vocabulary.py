"""What authors call the same thing; for renaming as another author would, never for matching."""

from __future__ import annotations

SYNONYMS = (
    ("attn", "attention", "self_attn", "self_attention", "mixer", "mha"),
    ("mlp", "ffn", "feed_forward", "feedforward", "ff"),
    ("norm1", "ln_1", "ln1", "layernorm_before", "input_layernorm", "layer_norm1", "attention_norm", "pre_norm"),
    ("norm2", "ln_2", "ln2", "layernorm_after", "post_attention_layernorm", "layer_norm2", "ffn_norm", "post_norm"),
    ("norm", "ln_f", "layernorm", "final_layernorm", "ln_post", "final_norm", "LayerNorm"),
    ("fc1", "c_fc", "dense_h_to_4h", "linear1", "lin1", "wi", "dense_in", "expand"),
    ("fc2", "dense_4h_to_h", "linear2", "lin2", "dense_out", "contract"),
    ("q_proj", "query", "wq", "to_q", "q", "q_lin", "query_proj", "linear_q"),
    ("k_proj", "key", "wk", "to_k", "k", "k_lin", "key_proj", "linear_k"),
    ("v_proj", "value", "wv", "to_v", "v", "v_lin", "value_proj", "linear_v"),
    ("o_proj", "out_proj", "wo", "to_out", "proj", "out_lin", "linear_out", "c_proj"),
    ("qkv", "c_attn", "query_key_value", "Wqkv", "in_proj", "qkv_proj"),
    ("gate_proj", "w1", "gate", "fc_1", "wi_0"),
    ("up_proj", "w3", "up", "fc_2", "wi_1"),
    ("down_proj", "w2", "down", "proj_out"),
    ("layers", "blocks", "h", "layer", "block", "resblocks", "transformer_blocks"),
    ("encoder", "backbone", "trunk", "body", "feature_extractor", "visual"),
    ("decoder", "dec", "upsampler", "decode_head"),
    ("head", "classifier", "fc", "lm_head", "output", "cls_head", "last_linear"),
    ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "token_embedding", "embeddings"),
    ("conv1", "conv_1", "first_conv", "conv_a"),
    ("conv2", "conv_2", "second_conv", "conv_b"),
    ("conv3", "conv_3", "third_conv", "conv_c"),
    ("bn1", "norm_1", "batchnorm1", "bn_a"),
    ("bn2", "norm_2", "batchnorm2", "bn_b"),
    ("bn3", "norm_3", "batchnorm3", "bn_c"),
    ("downsample", "shortcut", "skip", "identity_conv", "downsampler"),
    ("patch_embed", "patch_embedding", "embeddings", "stem", "patch_embeddings"),
    ("layer1", "stage1", "stages_0", "res2"),
    ("layer2", "stage2", "stages_1", "res3"),
    ("layer3", "stage3", "stages_2", "res4"),
    ("layer4", "stage4", "stages_3", "res5"),
    ("features", "convs", "feature_layers", "extractor"),
)
Q, K, V, GATE, UP = (set(SYNONYMS[i]) for i in (7, 8, 9, 12, 13))
FUSED = set(SYNONYMS[11]) - {"query_key_value"}  # that one is interleaved by head wherever it occurs
