"""Configurations of tiny vision-language backbones."""

from __future__ import annotations

from typing import Any

import transformers

ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
TOWERS: dict[str, dict[str, Any]] = {
    "Qwen2VL": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14},
    "Qwen2_5_VL": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "Qwen3VL": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    },
}


def vision_config(name: str, vocab_size: int, special: tuple[int, int, int, int], **text: Any) -> Any:
    """Config of `<name>ForConditionalGeneration`.

    Args:
        special: token ids of vision start, vision end, image, video.
        **text: more settings of the language model.
    """
    start, end, image, video = special
    rope = ROPE | ({"mrope_interleaved": True} if name == "Qwen3VL" else {})
    return getattr(transformers, f"{name}Config")(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "rope_parameters": rope,
            "bos_token_id": None,
            "tie_word_embeddings": True,
            **text,
        },
        vision_config={
            "depth": 2,
            "num_heads": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **TOWERS[name],
        },
        tie_word_embeddings=True,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
