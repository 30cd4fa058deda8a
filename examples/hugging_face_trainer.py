"""Hugging Face's Trainer: one callback patches the model and measures on the training backward."""

import tempfile

import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from nslightning import Jacobians
from nslightning.integrations.transformers import NonsmoothTrainerCallback

torch.manual_seed(0)
# Of random weights, so that nothing is loaded; `from_pretrained` is patched in the same way.
config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
model = ResNetForImageClassification(config)
data = [{"pixel_values": torch.randn(3, 64, 64), "labels": i % 4} for i in range(8)]

callback = NonsmoothTrainerCallback(Jacobians(relu=0.0), choices={"beta10": Jacobians(max_pool=10.0)}, every_n_steps=1)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=4, use_cpu=True, bf16=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
print(callback.report)
for entry in trainer.state.log_history:
    if "divergence/beta10/relative" in entry:
        print(f"relative divergence of beta = 10: {entry['divergence/beta10/relative']:.3g}")
