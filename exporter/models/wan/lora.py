"""What Wan's LoRAs call its modules: most of them are trained in the names of its authors' code."""

from __future__ import annotations

from ...lora_names import LoraNames

OF_IMAGES = ("img_emb", "k_img", "v_img", "image_embedder", "add_k_proj", "add_v_proj", "norm_added_k")
LORA_NAMES = LoraNames(
    original=(
        ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
        ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
        ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
        ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
        ("condition_embedder.time_proj.", "time_projection.1."),
        ("proj_out.", "head.head."),
        (".attn1.", ".self_attn."),
        (".attn2.", ".cross_attn."),
        (".to_q.", ".q."),
        (".to_k.", ".k."),
        (".to_v.", ".v."),
        (".to_out.0.", ".o."),
        (".ffn.net.0.proj.", ".ffn.0."),
        (".ffn.net.2.", ".ffn.2."),
        (".norm2.", ".norm3."),  # the second of three: diffusers counts in order, the authors as they were added
        (".scale_shift_table", ".modulation"),  # of blocks, before the one of the head, which has nothing before it
        ("scale_shift_table", "head.modulation"),
    ),
    others=dict.fromkeys(OF_IMAGES, "image-to-video models, which cannot be exported"),
)
