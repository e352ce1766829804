"""What `load` takes beside the source, for type checkers; a test keeps it equal to the configuration."""

from typing import TypedDict


class LoadSettings(TypedDict, total=False):
    """Settings of `Config`, see there."""

    backbone: str
    backbone_norm: str | None
    backbone_level: int | None
    dilation: bool
    position_embedding: str
    enc_layers: int
    dec_layers: int
    dim_feedforward: int
    hidden_dim: int
    nheads: int
    num_queries: int
    pre_norm: bool
    masks: bool
    image_size: int | None
    max_size: int | None
    layer1_num: int
    LETRpost: bool
    layer2_num: int
    second_enc_layers: int
    second_dec_layers: int
    second_dim_feedforward: int
    second_hidden_dim: int
    second_nheads: int
    second_dropout: float
    second_pre_norm: bool
    dataset_file: str
    compile: bool
