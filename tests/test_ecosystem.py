"""Exports in other people's tools: PEFT, Trainer, lm-eval; checkpointed gradients; model cards."""

import functools
import importlib.util
import json
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest

import delve_jax
from delve_jax import checkpoint, lineage
from delve_jax.config import DelveError

torch = pytest.importorskip("torch")
from exported import V, make, mamba, random_params, three, tiny_tokenizer, torch_model  # noqa: E402

TEXT = ["the export of the model", "the model and the model of the export", "of the export the"] * 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return make(tmp_path_factory.mktemp("three"), three(), "factored", 0)


@pytest.fixture
def fresh(exported):
    return torch_model(exported["hf"])


def ids(rows=4, length=24, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, V, (rows, length)))


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


def same_weights(one, other):
    """Bit by bit; logits of equal weights may differ by where in memory these begin."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def gradients(model, tokens):
    model.train()
    model.zero_grad()
    out = model(tokens, labels=tokens)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters()}


def test_checkpointed_gradients_are_the_gradients(fresh):
    """Layers that run again in the backward pass read the same, and leave no state behind."""
    out, plain = gradients(fresh, ids())
    fresh.activation_checkpointing_enable()
    assert sum(getattr(m, "gradient_checkpointing", False) for m in fresh.modules()) == 12
    again, recomputed = gradients(fresh, ids())
    assert torch.equal(out.loss, again.loss) and again.past_key_values is None
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_trainer_trains_it_and_the_result_loads(fresh, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in ids(8)]
    before = logits(fresh, ids())
    args = TrainingArguments(
        tmp_path / "run", max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], logging_steps=1, save_steps=4, use_cpu=True, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(fresh, args, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    back = torch_model(tmp_path / "run" / "checkpoint-4")
    assert same_weights(back, fresh) and not torch.equal(logits(back, ids()), before)


def lora(model, targets=("u", "v"), rank=2):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=8, target_modules=list(targets), lora_dropout=0.0)
    return get_peft_model(model, config)


def test_lora_on_the_factors_trains_merges_and_loads(exported, fresh, tmp_path):
    peft = pytest.importorskip("peft")
    tokens, base = ids(), logits(fresh, ids())
    adapted = lora(fresh)
    torch.testing.assert_close(
        logits(adapted, tokens), base, rtol=0, atol=1e-5
    )  # starts as nothing
    assert {n.split(".")[-4] for n, p in adapted.named_parameters() if p.requires_grad} == {
        "u",
        "v",
    }
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    adapted.train()
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.01
    trained = logits(adapted, tokens)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(torch_model(exported["hf"]), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, tokens), trained, rtol=0, atol=1e-5)
    merged = again.merge_and_unload()
    assert (logits(merged, tokens) - trained).abs().max() <= 1e-5 * trained.abs().max()
    merged.save_pretrained(tmp_path / "merged")
    assert same_weights(torch_model(tmp_path / "merged"), merged)


def test_lora_on_a_factored_map_itself_is_refused(fresh):
    """What people type first: PEFT knows no adapter of a pair of maps, and says so."""
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="not supported"):
        lora(fresh, targets=["in_proj"])


# ---- lm-eval -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval")
    path = Path(__file__).parents[1] / "experiments" / "harness.py"
    spec = importlib.util.spec_from_file_location("harness", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def task_files(folder):
    """A few lines of each kind of task, as the evaluation sets have them."""
    words = "the export of the model and the model of the export".split()
    rng = np.random.default_rng(0)
    some = lambda n: " ".join(rng.choice(words, n))  # noqa: E731
    rows = {
        "piqa": [{"query": f"Question: {some(5)}\n", "choices": [some(4), some(6)],
                  "gold": i % 2} for i in range(6)],
        "arc_easy": [{"query": f"Question: {some(5)}?", "choices": [some(2) for _ in range(4)],
                      "gold": i % 4} for i in range(6)],
        "lambada_openai": [{"context": some(9), "continuation": some(1)} for _ in range(6)],
        "blimp_some": [{"sentence_good": some(6), "sentence_bad": some(6)} for _ in range(6)],
    }  # fmt: skip
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return {name: folder / f"{name}.jsonl" for name in rows}


def test_lm_eval_agrees_on_checkpoint_and_export(exported, harness, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = harness.compare(exported["checkpoint"], exported["hf"], task_files(tmp_path))
    assert {r["task"] for r in rows} == {"piqa", "arc_easy", "lambada_openai", "blimp_some"}
    apart = [r for r in rows if r["apart"] > 1e-3]
    assert len(rows) == 8 and not apart, str(apart)
    assert len({r["export"] for r in rows}) > 3  # not all the same number


def test_lm_eval_writes_and_rolls_with_the_jax_model(exported, harness):
    from lm_eval.api.instance import Instance

    model = harness.DelveLM(str(exported["checkpoint"]))
    text = "the export of the model and the model"
    asked = Instance("loglikelihood_rolling", {}, (text,), 0)
    alone = model.loglikelihood_rolling([asked])[0]
    tokens = [model.eot_token_id, *model.tok_encode(text)]
    log_p = jax.nn.log_softmax(model.model.logits(np.array([tokens[:-1]]))[0])
    assert abs(alone - sum(float(log_p[i, t]) for i, t in enumerate(tokens[1:]))) < 1e-3
    write = lambda **how: model.generate_until(  # noqa: E731
        [Instance("generate_until", {}, (text, {"max_gen_toks": 12, **how}), 0)]
    )[0]
    whole = write()
    stop = whole[len(whole) // 2]
    assert write(until=[stop]) == whole.partition(stop)[0] != whole


def test_lm_eval_says_how_answers_are_drawn(exported, harness, monkeypatch, capsys):
    """In the words that its other models take; of a request that is repeated, other samples."""
    from lm_eval.api.instance import Instance

    model, asked = harness.DelveLM(str(exported["checkpoint"])), []
    most = model.model.config.context_length // 2

    def generate(tokens_BT, n, **how):
        asked.append({"read": tokens_BT.shape[1], "n": n, **how})
        return np.pad(tokens_BT, ((0, 0), (0, 1)), mode="edge")

    monkeypatch.setattr(model.model, "generate", generate)
    hows = [{"max_tokens": 5}, {"max_new_tokens": 6, "temperature": 0.7, "top_k": 3, "top_p": 0.9},
            {"max_completion_tokens": 7, "do_sample": True, "top_k": -1},
            {"max_gen_toks": 8, "do_sample": False, "temperature": 0.7}, {"max_gen_toks": 9999},
            {"max_gen_toks": 9999}]  # fmt: skip
    text = "the export of the model " * most
    model.generate_until([Instance("generate_until", {}, (text, how), 0) for how in hows])
    assert [one["n"] for one in asked] == [5, 6, 7, 8, most, most]
    assert [one["temperature"] for one in asked] == [0, 0.7, 1, 0, 0, 0]
    assert [one["top_k"] for one in asked] == [0, 3, 0, 0, 0, 0]
    assert [one["top_p"] for one in asked] == [1, 0.9, 1, 1, 1, 1]
    assert [one["seed"] for one in asked] == list(range(6))
    assert all(one["read"] + one["n"] == model.model.config.context_length for one in asked)
    assert capsys.readouterr().err.count(f"answers end at {most} tokens") == 1


def test_the_command_line_of_lm_eval_with_the_jax_model(
    exported, harness, tmp_path, monkeypatch, capsys
):
    """`python -m delve_jax.harness`, but for its process and the index of lm-eval's own tasks."""
    import lm_eval.tasks

    from delve_jax.harness import main

    few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", sys.argv)
    file = task_files(tmp_path)["arc_easy"]
    (tmp_path / "arc_easy.yaml").write_text(harness.task_yaml("arc_easy", file))
    how = ["--tasks", "arc_easy_local", "--include_path", str(tmp_path), "--output_path",
           str(tmp_path / "out")]  # fmt: skip
    args = f"pretrained={exported['checkpoint']}"
    assert main(["run", "--model", "delve", "--model_args", args, *how]) == 0
    (written,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(written.read_text())["results"]["arc_easy_local"]
    ours = delve_jax.evaluate(exported["checkpoint"], tasks=[file])["tasks"]["arc_easy"]
    assert found["acc,none"] == ours["acc"] and found["acc_bytes,none"] == ours["acc_norm"]
    capsys.readouterr()
    args = f"pretrained={tmp_path / 'gone'}"
    assert main(["run", "--model", "delve", "--model_args", args, *how]) == 2
    assert f"error: {tmp_path / 'gone'}: no such file" in capsys.readouterr().err


# ---- the card ------------------------------------------------------------------------------------


def test_the_card_says_where_a_model_comes_from_and_no_local_path(tmp_path):
    """From a parent with a card of its own, through two verbs, to the exported directory."""
    from delve_jax import road

    cfg = mamba(tie_embeddings=True)
    parent = tmp_path / "private" / "tiny-mamba"
    checkpoint.save(tmp_path / "dense", cfg, random_params(cfg), tiny_tokenizer())
    road.export(tmp_path / "dense", parent)
    (parent / "README.md").write_text("---\nlicense: mit\n---\nA parent.\n")
    (parent / lineage.FILE).unlink(missing_ok=True)
    small = tmp_path / "private" / "small"
    road.compress(parent, small, keep=0.8, method="svd")
    scores = {"tasks": {"piqa": {"examples": 9, "acc": 0.625}}, "nll_per_token": 3.25,
              "bits_per_byte": 1.5, "tokens": 77, "window": 64, "data_hash": "ab" * 32,
              "command": {"verb": "eval", "text": [str(tmp_path / "held_back.txt")]}}  # fmt: skip
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    facts = road.export(small, tmp_path / "hf", layout="factored",
                        results=[tmp_path / "scores.json"])  # fmt: skip
    before = json.loads((small / "compress.json").read_text())["parameters_before"]
    card = (tmp_path / "hf" / "README.md").read_text()
    head = huggingface_hub.metadata_load(tmp_path / "hf" / "README.md")
    assert head["license"] == "mit" and head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation" and "mamba" in head["tags"]
    for said in (f"{facts['parameters']:,} parameters", "tiny-mamba", "**compress** of tiny-mamba",
                 "keep 0.8", "| piqa | 9 | acc | 0.6250 |", "nats per token 3.2500",
                 "delve eval --text held_back.txt", "trust_remote_code=True", "arxiv.org",
                 'target_modules=["u", "v"]', f"parents' {before:,} parameters"):  # fmt: skip
        assert said in card, (said, [line for line in card.splitlines() if "Kept" in line])
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (tmp_path / "hf" / lineage.FILE).read_text()
    again = road.convert(tmp_path / "hf", tmp_path / "back")
    steps = lineage.read(tmp_path / "back")
    assert [s["verb"] for s in steps] == ["parent", "compress", "convert"] and not again.get("x")
    other = road.export(small, tmp_path / "hf", layout="factored",
                        results=[tmp_path / "scores.json"])  # fmt: skip
    assert other["already"]


def test_the_card_of_an_unknown_origin_says_so(tmp_path):
    cfg = mamba()
    checkpoint.save(tmp_path / "c", cfg, random_params(cfg))
    from delve_jax import road

    road.export(tmp_path / "c", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "parents were not recorded" in card and "license: other" in card
    assert "None were handed" in card
    (tmp_path / "c" / lineage.FILE).write_text('{"steps": [1]}')
    with pytest.raises(DelveError, match="field 'steps'"):
        road.export(tmp_path / "c", tmp_path / "hf", overwrite=True)
    (tmp_path / "c" / lineage.FILE).unlink()
    for wrong, message in (({"rows": []}, "damaged"), ({"x": 1}, "neither")):
        with pytest.raises(DelveError, match=f"--results: .*{message}"):
            road.export(tmp_path / "c", tmp_path / "other", results=[wrong])
        assert not (tmp_path / "other").exists()
    with pytest.raises(DelveError, match="no such file"):
        road.export(tmp_path / "c", tmp_path / "other", results=[tmp_path / "missing.json"])
