"""PEFT, TRL and the Trainer of transformers train the model, and packing is exact there too."""

import math

import pytest
import torch
from datasets import Dataset
from models import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from wrapped import TEXT, make_tokenizer, write_checkpoint

from starlm.generate.text import load

# PEFT and TRL still use the old name of what transformers now calls activation checkpointing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_)?gradient_checkpointing(_enable)?. is deprecated:FutureWarning"
)

TOKENIZER = make_tokenizer()
CHATS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, you"}],
    [{"role": "user", "content": "name"}, {"role": "assistant", "content": "x"}],
    [{"role": "user", "content": "print"}, {"role": "assistant", "content": TEXT[:30]}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = make_model("star", dtype=torch.float32, vocab_size=TOKENIZER.vocab_size)
    return write_checkpoint(model, tmp_path_factory.mktemp("run") / "m", TOKENIZER)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def arguments(kind, path, **options):
    shared = {
        **{
            "output_dir": str(path),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": False,
        },
        **{"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2},
        **{"dataloader_pin_memory": False, "seed": 1},
    }
    return kind(**(shared | options))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_lora_trains_every_linear_layer_and_is_saved(model, folder, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    named = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    layers = [name for name in before if name.endswith("weight") and name.startswith("blocks")]
    assert len(named) == len(layers)
    tokens = torch.randint(9, TOKENIZER.vocab_size, (2, 20))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.05)
    history = []
    for _ in range(5):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert history[-1] < history[0]
    adapted.eval()
    wanted = adapted(tokens).logits
    adapted.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name])
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(tokens).logits, wanted)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    TOKENIZER.save_pretrained(tmp_path / "merged")
    ours = load(tmp_path / "merged", device="cpu").model
    torch.testing.assert_close(ours(tokens), wanted, atol=1e-4, rtol=1e-4)


def test_smoothed_labels_are_those_of_the_next_token(model, tmp_path):
    trainer = Trainer(model, arguments(TrainingArguments, tmp_path, label_smoothing_factor=0.1))
    tokens = torch.randint(9, TOKENIZER.vocab_size, (2, 20))
    with torch.no_grad():
        found = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens})
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found, wanted)


def sft(model, tokenizer, path, data, **options):
    return SFTTrainer(
        model, args=arguments(SFTConfig, path, **options), train_dataset=data, processing_class=tokenizer
    )


def test_packing_without_padding_is_separate(model, tokenizer, tmp_path):
    """Documents in one row, apart by positions only, have the loss that each has in a row of its own."""
    data = Dataset.from_list([{"text": TEXT[: 10 * n]} for n in (2, 5, 3)])
    options = {"padding_free": True, "max_length": None, "per_device_train_batch_size": 3}
    packed = sft(model, tokenizer, tmp_path, data, **options)
    batch = packed.data_collator([packed.train_dataset[n] for n in range(3)])
    assert batch["input_ids"].shape[0] == 1
    assert "attention_mask" not in batch
    assert (batch["position_ids"] == 0).sum() == 3
    model.eval()
    with torch.no_grad():
        out = model(**batch)
        rows = [torch.tensor(packed.train_dataset[n]["input_ids"]) for n in range(3)]
        separate = [model(row[None]).logits[0] for row in rows]
        torch.testing.assert_close(out.logits[0], torch.cat(separate), atol=1e-4, rtol=1e-4)
        nats = [
            torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum")
            for logits, row in zip(separate, rows, strict=True)
        ]
        mean = sum(nats) / sum(len(row) - 1 for row in rows)
        torch.testing.assert_close(out.loss, mean, atol=1e-4, rtol=1e-4)
        together = model(torch.cat(rows)[None]).logits
        assert (together - out.logits).abs().max() > 0.1, "without positions the documents must mix"


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_loss_of_trl_is_the_loss_of_the_model(tokenizer, tmp_path, softcap):
    """TRL runs the model without its head and computes logits itself: it must not miss the softcap."""
    model = make_model("star", dtype=torch.float32, vocab_size=TOKENIZER.vocab_size, softcap=softcap)
    wrapper = AutoModelForCausalLM.from_pretrained(write_checkpoint(model, tmp_path / "m", TOKENIZER))
    data = Dataset.from_list([{"messages": chat} for chat in CHATS])
    trainer = sft(wrapper, tokenizer, tmp_path, data, assistant_only_loss=True)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(3)])
    found = trainer.compute_loss(wrapper, dict(batch))
    targets = torch.where(batch["labels"] == -100, -1, batch["labels"])[:, 1:]
    padding = (batch["attention_mask"].cumsum(1) == 0).sum(1, keepdim=True)
    first = padding.expand(-1, targets.shape[1])
    torch.testing.assert_close(found, model.loss(batch["input_ids"][:, :-1], targets, first=first))
    found.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wrapper.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"assistant_only_loss": True},
        {"assistant_only_loss": True, "padding_free": True, "max_length": None},
        {"packing": True, "max_length": 64, "gradient_checkpointing": True},
    ],
    ids=["padded", "padding-free", "packed"],
)
def test_sft_learns(model, tokenizer, tmp_path, options):
    data = Dataset.from_list([{"messages": chat} for chat in CHATS * 2])
    trainer = sft(model, tokenizer, tmp_path, data, max_steps=6, save_strategy="no", **options)
    trainer.train()
    history = losses(trainer)
    assert len(history) == 6
    assert all(math.isfinite(loss) for loss in history)
    assert history[-1] < history[0]


def test_padded_and_padding_free_training_are_the_same(folder, tokenizer, tmp_path):
    data = Dataset.from_list([{"messages": chat} for chat in CHATS * 2])
    found = []
    for padding_free in (False, True):
        options = {"padding_free": padding_free, "max_length": None}
        trainer = sft(AutoModelForCausalLM.from_pretrained(folder), tokenizer, tmp_path, data, **options)
        trainer.train()
        found.append(losses(trainer))
    torch.testing.assert_close(*map(torch.tensor, found), atol=1e-3, rtol=1e-3)


def test_the_trainer_saves_and_goes_on(folder, tokenizer, tmp_path):
    """Two steps, saved, and two more are four steps: the weights come back by the names in the file."""
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(9, 280, (8, 12)).tolist()]

    def train(path, steps, resume=None):
        options = {"max_steps": steps, "save_steps": 2, "lr_scheduler_type": "constant"}
        trainer = Trainer(
            AutoModelForCausalLM.from_pretrained(folder),
            arguments(TrainingArguments, path, **options),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    wanted = train(tmp_path / "a", 4)
    train(tmp_path / "b", 2)
    found = train(tmp_path / "b", 4, resume=str(tmp_path / "b/checkpoint-2"))
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    ours = load(tmp_path / "b/checkpoint-4", device="cpu")
    assert torch.equal(ours.model.state_dict()["head.weight"], wanted["head.weight"])
    assert ours.tokenizer.fingerprint == TOKENIZER.fingerprint
