"""My own loss and my own sampler: a plain PyTorch loop on a feature store.

    python examples/own_training_loop.py             # on a small world, half a minute
    python examples/own_training_loop.py STORE       # on yours

The store gives tensors, `MSQNet` is an ordinary `torch.nn.Module`, `msq.metrics` scores. Here the
loss ranks every label of a clip above all others (ZLPR), and clips with rare classes are drawn more
often; msq has neither. What comes out: mAP on the test clips, and `own-loop/head.safetensors`,
which `msq eval`, `msq predict` and `msq.load_head` take as they take a head of msq's.
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import msq
from msq.config import HeadConfig
from msq.head import MSQNet, load_features, save_head
from small_world import small_store

EPOCHS, BATCH, OUT = 12, 32, Path("own-loop")


def zlpr(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of arXiv 2208.02955: log(1 + Σ e^-s of its labels) + log(1 + Σ e^s of the others); [B, K]."""
    zero = logits.new_zeros(len(logits), 1)
    has = torch.where(labels > 0, -logits, -torch.inf)
    has_not = torch.where(labels > 0, -torch.inf, logits)
    both = [torch.cat([zero, part], dim=1).logsumexp(1) for part in (has, has_not)]
    return (both[0] + both[1]).mean()


def rare_first(labels: torch.Tensor) -> torch.Tensor:
    """A weight for each clip [N]: one over the number of clips that have its rarest class."""
    clips_of_class = labels.sum(0).clamp(min=1)
    weights = (labels / clips_of_class).amax(1)
    return weights.clamp(min=1 / len(labels))  # clips without any label are drawn, too


torch.manual_seed(0)
store = msq.open_store(sys.argv[1] if sys.argv[1:] else small_store())
# The splits, and only the clips that could be encoded; store.tokens(rows), .image(rows) and
# .labels(rows) are the tensors by themselves.
features = load_features(store, feed="resident")  # in memory, in float32
train, test = features.rows("train"), features.rows("test")
tokens, image, labels = features.tokens, features.image, features.labels.float()
print(f"{store.name}: {features.coverage()}, tokens {list(tokens.shape)}, K = {labels.shape[1]}")

head = MSQNet(
    HeadConfig(queries="multimodal", classifier="text", layers=2, heads=4, ffn=256),
    classes=len(store.classes),
    token_width=tokens.shape[2],
    image_width=image.shape[1],
    text=features.text,
)
sampler = WeightedRandomSampler(rare_first(labels[train]).tolist(), num_samples=len(train))
data = TensorDataset(tokens[train], image[train], labels[train])
clips = DataLoader(data, BATCH, sampler=sampler)
optimiser = torch.optim.AdamW(head.parameters(), weight_decay=0.01)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, EPOCHS * len(clips))

for epoch in range(EPOCHS):
    head.train()
    total = 0.0
    for x, v, y in clips:
        loss = zlpr(head(x, v)["logits"], y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        total += loss.item() * len(x)
    print(f"epoch {epoch + 1}: loss {total / len(train):.3f}")

head.eval()
with torch.inference_mode():
    logits = head(tokens[test], image[test])["logits"]
found = msq.metrics.all_metrics(logits, labels[test], store.task)
print(f"test mAP {found['map']:.3f} (chance {found['map_chance']:.3f})")

OUT.mkdir(exist_ok=True)
save_head(OUT / "head.safetensors", head, features, "paper")
print(f"try: msq predict VIDEO --run {OUT} --top 3")
