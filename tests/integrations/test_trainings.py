"""A few steps of each library's own training, on images and sentences made here: with its loss, and with ours put in."""

import contextlib
import importlib
import json
import logging
import re

import pytest
import small_models
import torch
from torch import nn

from fastnce import integrations

STEPS = 4
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
IMAGES = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def applied(name):
    found = integrations.apply_to(name)
    try:
        yield
    finally:
        found.undo()


def assert_same_training(name, train):
    """``train()`` returns the losses of its steps, and is deterministic."""
    torch.manual_seed(0)
    before = train()
    with applied(name):
        torch.manual_seed(0)
        after = train()
    assert len(before) >= STEPS
    assert before[0] != before[-1]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "loss", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]
)
def test_sentence_transformers(library, tmp_path, loss):
    """``SentenceTransformerTrainer``, from sentences on."""
    library("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    columns = {
        name: small_models.sentences(32, seed)
        for seed, name in enumerate(("anchor", "positive", "negative"))
    }

    def train():
        (tmp_path / "model").mkdir(exist_ok=True)
        model = small_models.sentence_transformer(tmp_path / "model")
        losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
            loss=getattr(losses, loss)(model),
        )
        trainer.train()
        return [x["loss"] for x in trainer.state.log_history if "loss" in x]

    assert_same_training("sentence_transformers", train)


@pytest.fixture
def logging_as_before():
    """open_clip sets the level and the handlers of every logger."""
    names = [None, *logging.root.manager.loggerDict]
    before = [(x, x.level, list(x.handlers)) for x in map(logging.getLogger, names)]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def test_open_clip(library, tmp_path, logging_as_before):
    """``open_clip_train.main``, with its table of image files and captions."""
    library("open_clip").add_model_config(written(tmp_path / "tiny.json", json.dumps(OPEN_CLIP)))
    from open_clip_train import main
    from torchvision.utils import save_image

    table = ["filepath\ttitle"]
    for i, (image, caption) in enumerate(zip(IMAGES, small_models.sentences(32, 0), strict=True)):
        save_image(image, tmp_path / f"{i:02}.png")
        table.append(f"{tmp_path / f'{i:02}.png'}\t{caption}")
    options = {"model": "tiny", "dataset-type": "csv", "logs": tmp_path / "logs", "device": "cpu"}
    options["precision"] = "fp32"  # theirs would be rounded under autocast
    options |= {"train-data": written(tmp_path / "train.csv", "\n".join(table)), "workers": 0}
    options |= {"batch-size": 8, "epochs": 2, "warmup": 1, "lr": 1e-3, "log-every-n-steps": 1}
    words = [str(x) for k, v in options.items() for x in (f"--{k}", v)]

    def train():
        name = "first" if not (tmp_path / "logs").exists() else "second"
        main.main([*words, "--name", name])
        text = (tmp_path / "logs" / name / "out.log").read_text()
        return [float(x) for x in re.findall(r"Contrastive_loss: (\S+)", text)]

    assert_same_training("open_clip", train)


def written(path, text):
    path.write_text(text)
    return path


def test_transformers(library, tmp_path):
    """``Trainer`` of a small CLIP with ``return_loss``."""
    transformers = library("transformers")
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        **small,
        "vocab_size": 50,
        "max_position_embeddings": 12,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {**small, "image_size": 16, "patch_size": 8}
    ids = torch.randint(3, 50, (32, 7), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": i, "pixel_values": x} for i, x in zip(ids, IMAGES, strict=True)]

    def collate(batch):
        found = {k: torch.stack([row[k] for row in batch]) for k in batch[0]}
        return {**found, "return_loss": True}

    def train():
        module = importlib.import_module("transformers.models.clip.modeling_clip")
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            remove_unused_columns=False,
        )
        trainer = transformers.Trainer(
            model=module.CLIPModel(config),
            args=arguments,
            train_dataset=rows,
            data_collator=collate,
        )
        trainer.train()
        return [x["loss"] for x in trainer.state.log_history if "loss" in x]

    assert_same_training("transformers", train)


def encoder(dim: int = 8) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, dim))


@pytest.mark.parametrize("options", [{}, {"memory_bank_size": (16, 8)}])
def test_lightly(library, tmp_path, options):
    """Its datasets, transforms and collation of image files, under Lightning's trainer."""
    library("lightly.loss")
    import pytorch_lightning
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform
    from torchvision.utils import save_image

    for i, image in enumerate(IMAGES):
        save_image(image, tmp_path / f"{i:02}.png")
    transform = SimCLRTransform(input_size=16, gaussian_blur=0.0)

    def train():
        losses = []

        class Model(pytorch_lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.encoder = encoder()
                self.criterion = importlib.import_module("lightly.loss").NTXentLoss(**options)
                bank = self.criterion.memory_bank
                if options:  # both begin with the same keys
                    first = nn.functional.normalize(torch.arange(128.0).view(16, 8) % 7 - 3, dim=1)
                    with torch.no_grad():
                        (bank.bank if hasattr(bank, "bank") else bank.keys).copy_(first)

            def training_step(self, batch, _):
                views = batch[0]
                loss = self.criterion(*(self.encoder(x) for x in views))
                losses.append(loss.item())
                return loss

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        dataset = LightlyDataset(str(tmp_path), transform=transform)
        loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
        model = Model()
        pytorch_lightning.seed_everything(0, verbose=False)  # their bank has drawn, ours has not
        pytorch_lightning.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, loader)
        return losses

    assert_same_training("lightly", train)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_pytorch_metric_learning(library, name):
    """``trainers.MetricLossOnly``."""
    trainers = library("pytorch_metric_learning.trainers")
    data = torch.utils.data.TensorDataset(IMAGES, torch.arange(32) % 4)

    def train():
        losses = []
        trunk, embedder = encoder(16), nn.Linear(16, 8)
        parameters = [*trunk.parameters(), *embedder.parameters()]
        made = importlib.import_module("pytorch_metric_learning.losses")
        trainers.MetricLossOnly(
            models={"trunk": trunk, "embedder": embedder},
            optimizers={"trunk_optimizer": torch.optim.SGD(parameters, lr=0.1)},
            batch_size=8,
            loss_funcs={"metric_loss": getattr(made, name)()},
            dataset=data,
            iterations_per_epoch=STEPS,
            dataloader_num_workers=0,
            data_device=torch.device("cpu"),
            end_of_iteration_hook=lambda t: losses.append(t.losses["metric_loss"].item()),
        ).train(num_epochs=1)
        return losses

    assert_same_training("pytorch_metric_learning", train)
