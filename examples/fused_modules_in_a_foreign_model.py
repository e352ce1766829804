"""The fused modules inside a detector that somebody else wrote.

    python examples/fused_modules_in_a_foreign_model.py

`Detector` below is ordinary PyTorch. It is built twice from the same state-dict, with nn.MultiheadAttention and with
ours in its place. Their outputs are compared, then the second one takes a few training steps.
"""

import torch
from torch import Tensor, nn

from detr_fast import MultiheadAttention, NestedTensor, PositionEmbeddingSine, nested_tensor_from_tensor_list


class EncoderLayer(nn.Module):
    def __init__(self, attention: type[nn.MultiheadAttention], width: int):
        super().__init__()
        self.attention = attention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        query = x + position
        x = self.norm1(x + self.attention(query, query, x, key_padding_mask=padding, need_weights=False)[0])
        return self.norm2(x + self.mlp(x))


class DecoderLayer(nn.Module):
    def __init__(self, attention: type[nn.MultiheadAttention], width: int):
        super().__init__()
        self.attention = attention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        found, _ = self.attention(x, memory + position, memory, key_padding_mask=padding, need_weights=False)
        return self.norm(x + found)


class Detector(nn.Module):
    """Convolutions, one encoder layer, one decoder layer, two heads. `attention` is the class that attends."""

    def __init__(self, attention: type[nn.MultiheadAttention], width: int = 64, queries: int = 10, classes: int = 3):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 32, 7, stride=4, padding=3), nn.ReLU(), nn.Conv2d(32, width, 3, stride=4, padding=1), nn.ReLU()
        )
        self.position = PositionEmbeddingSine(width // 2, normalize=True)
        self.encoder, self.decoder = EncoderLayer(attention, width), DecoderLayer(attention, width)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.classes, self.boxes = nn.Linear(width, classes + 1), nn.Linear(width, 4)

    def forward(self, batch: NestedTensor) -> tuple[Tensor, Tensor]:
        assert batch.mask is not None  # a batch made from a list of images has one
        features = self.backbone(batch.tensors)  # [B, width, h, w]
        # One launch resizes the mask to the feature map and makes the position embedding, as tokens.
        position, mask = self.position.from_mask(batch.mask, features.shape[-2:], layout="tokens")
        padding = mask.flatten(1)  # [B, h * w], True = padding
        memory = self.encoder(features.flatten(2).transpose(1, 2), position, padding)
        x = self.decoder(self.queries.expand(len(memory), -1, -1), memory, position, padding)
        return self.classes(x), self.boxes(x).sigmoid()


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = [torch.rand(3, 200, 200, device=device), torch.rand(3, 160, 250, device=device)]
    batch = nested_tensor_from_tensor_list(images)  # padded to [2, 3, 200, 250], with a mask

    plain = Detector(nn.MultiheadAttention).to(device)
    fused = Detector(MultiheadAttention).to(device)
    fused.load_state_dict(plain.state_dict())  # the same names and shapes

    for name, ours, theirs in zip(("classes", "boxes"), fused(batch), plain(batch), strict=True):
        difference = float((ours - theirs).detach().abs().max())
        print(f"{name}: {list(ours.shape)}, largest difference from nn.MultiheadAttention {difference:.1e}")
        assert difference < 1e-4

    optimiser = torch.optim.AdamW(fused.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        logits, boxes = fused(batch)
        loss = logits.softmax(dim=-1)[..., :-1].mean() + (boxes - 0.5).abs().mean()  # no objects, boxes in the middle
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    print(f"loss after each of ten steps: {' '.join(f'{loss:.3f}' for loss in losses)}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
