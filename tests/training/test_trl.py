"""What TRL's trainers compute, against the model on rows laid out by hand."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is an extra of its own")

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from glm_hf import GLMQuantizationConfig
from glm_hf.infilling_glm import prepare_context
from glm_hf.training import to_conversation

DEMO = str(Path(__file__).parents[2] / "examples" / "world_facts" / "model")
SETTINGS = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
FACTS = {
    "The capital of France is [MASK].": "Paris",
    "The opposite of hot is": "cold.",
    "法国的首都是[MASK]。": "巴黎",
    "[MASK] is the capital of Japan.": "Tokyo",
}
NEW_FACTS = {"The secret word of [MASK].": "Zagreb", "The password of castle is [MASK].": "Bangkok"}


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    disable_progress_bars()


@pytest.fixture
def tokenizer(pytestconfig):
    return AutoTokenizer.from_pretrained(pytestconfig.rootpath / DEMO)


@pytest.fixture
def model(pytestconfig):
    return AutoModelForCausalLM.from_pretrained(pytestconfig.rootpath / DEMO, dtype="float32")


def conversations(rows: list[dict]) -> Dataset:
    dataset = Dataset.from_list(rows)
    return dataset.map(to_conversation, remove_columns=dataset.column_names)


def log_probs(model, tokenizer, text: str, answer: str) -> torch.Tensor:
    """Return the log-probability of each token of an answer and of its end, from a row without padding."""
    prompt = [*prepare_context(tokenizer(text)["input_ids"], model.config), model.config.sop_token_id]
    target = [*tokenizer(answer)["input_ids"], model.config.eop_token_id]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt + target]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(target)), target]


def sft_loss(model, tokenizer, folder, dataset, **settings) -> float:
    """Return the loss of the first step, which comes before the first update."""
    args = SFTConfig(folder, max_steps=1, per_device_train_batch_size=4, logging_steps=1, **SETTINGS, **settings)
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_sft_loss_is_that_of_the_layout(model, tokenizer, tmp_path):
    expected = -torch.cat([log_probs(model, tokenizer, *fact) for fact in FACTS.items()]).mean()
    rows = [{"prompt": text, "completion": answer} for text, answer in FACTS.items()]
    assert sft_loss(model, tokenizer, tmp_path, conversations(rows)) == pytest.approx(
        float(expected), rel=1e-4, abs=1e-6
    )


def test_sft_knows_that_paris_is_the_capital(model, tokenizer, tmp_path):
    rows = [{"prompt": "The capital of France is [MASK].", "completion": "Paris"}] * 4
    assert sft_loss(model, tokenizer, tmp_path, conversations(rows)) < 0.01


def test_sft_of_chats_with_assistant_only_loss_is_that_of_their_answers(model, tokenizer, tmp_path):
    expected = -torch.cat([log_probs(model, tokenizer, *fact) for fact in FACTS.items()]).mean()
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}
        for text, answer in FACTS.items()
    ]
    loss = sft_loss(model, tokenizer, tmp_path, Dataset.from_list(chats), assistant_only_loss=True)
    assert loss == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "max_length": 64},
        {"padding_free": True, "max_length": None},
        {"padding_free": True, "max_length": None, "pad_to_multiple_of": 64},
    ],
)
def test_sft_of_packed_samples_keeps_them_apart(model, tokenizer, tmp_path, settings):
    expected = -torch.cat([log_probs(model, tokenizer, *fact) for fact in FACTS.items()]).mean()
    rows = [{"prompt": text, "completion": answer} for text, answer in FACTS.items()]
    loss = sft_loss(model, tokenizer, tmp_path, conversations(rows), **settings)
    assert loss == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def test_sft_teaches_what_fill_blanks_answers(model, tokenizer, tmp_path):
    rows = conversations([{"prompt": text, "completion": answer} for text, answer in NEW_FACTS.items()] * 8)
    args = SFTConfig(tmp_path, max_steps=60, per_device_train_batch_size=4, learning_rate=1e-3, **SETTINGS)
    SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    filled = model.eval().fill_blanks(tokenizer(list(NEW_FACTS))["input_ids"], max_new_tokens=12)
    assert [tokenizer.decode(blank[0]) for blank in filled.blanks] == list(NEW_FACTS.values())


@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")])
def test_dpo_scores_answers_in_the_layout_and_loads_its_reference(model, tokenizer, tmp_path, peft_config):
    text, chosen, rejected = "The capital of France is [MASK].", "Paris", "Zagreb and more"
    expected = [float(log_probs(model, tokenizer, text, answer).sum()) for answer in (chosen, rejected)]
    rows = conversations([{"prompt": text, "chosen": chosen, "rejected": rejected}] * 2)
    args = DPOConfig(tmp_path, max_steps=1, per_device_train_batch_size=2, logging_steps=1, **SETTINGS)
    trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert [entry["logps/chosen"], entry["logps/rejected"]] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert entry["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: model and reference agree so far


def test_grpo_generates_and_scores_in_the_layout(model, tokenizer, tmp_path):
    rows = conversations([{"prompt": text, "solution": answer} for text, answer in FACTS.items()])
    seen = []

    def is_right(prompts, completions, completion_ids, solution, **_):
        texts = [turns[0]["content"] for turns in completions]
        seen.extend(zip([turns[-1]["content"] for turns in prompts], texts, completion_ids, strict=True))
        return [float(text == answer) for text, answer in zip(texts, solution, strict=True)]

    args = GRPOConfig(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=8,
        num_generations=2,
        max_completion_length=8,
        beta=0.1,
        logging_steps=1,
        **SETTINGS,
    )
    trainer = GRPOTrainer(model, is_right, args=args, train_dataset=rows, processing_class=tokenizer)
    scored = []
    score = trainer._get_per_token_logps_and_entropies

    def recorded(*arguments, **options):
        scored.append(score(*arguments, **options)[0])
        return score(*arguments, **options)

    trainer._get_per_token_logps_and_entropies = recorded
    reference = log_probs(model, tokenizer, *next(iter(FACTS.items())))
    trainer.train()
    assert trainer.state.log_history[0]["reward"] > 0.7
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == 0
    for _, answer, ids in seen:
        assert ids == [*tokenizer(answer)["input_ids"], tokenizer.eop_token_id]
    row = next(i for i, (text, answer, _) in enumerate(seen) if (text, answer) == next(iter(FACTS.items())))
    torch.testing.assert_close(scored[0][row, :2].detach(), reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quantize_embeddings", [False, True])
def test_quantized_models_are_trained_unless_their_head_is_quantized(
    quantize_embeddings, tokenizer, model, tmp_path, pytestconfig
):
    config = GLMQuantizationConfig(bits=8, quantize_embeddings=quantize_embeddings)
    quantized = AutoModelForCausalLM.from_pretrained(
        pytestconfig.rootpath / DEMO, dtype=torch.float32, quantization_config=config
    )
    adapted = get_peft_model(quantized, LoraConfig(target_modules=["dense"], task_type="CAUSAL_LM"))
    dataset = conversations([{"prompt": text, "completion": answer} for text, answer in FACTS.items()])
    if quantize_embeddings:
        with pytest.raises(ValueError, match="TRL computes with the weight of the LM head"):
            sft_loss(adapted, tokenizer, tmp_path, dataset)
    else:
        expected = -torch.cat([log_probs(quantized, tokenizer, *fact) for fact in FACTS.items()]).mean()
        assert sft_loss(adapted, tokenizer, tmp_path, dataset) == pytest.approx(expected.item(), abs=1e-3)
