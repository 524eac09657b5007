"""The real packages: fetched (never skipped), and what is in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from moduli.data import Task, fetch, load_task, resolve_model
from moduli.data.archives import sha256_of
from moduli.data.sentiment import DOMAINS, rated_sentences
from moduli.errors import ConfigError, DataError

# rows, rating > 0.5, rating < -0.5, rating > 0, rating < 0
COUNTS = {
    "tweets": (4200, 2300, 1062, 2897, 1299),
    "movie": (10605, 4982, 5061, 5242, 5326),
    "amazon": (3708, 1725, 1218, 2128, 1482),
    "nyt": (5190, 1100, 1688, 2204, 2742),
}


@pytest.fixture(scope="module")
def sentiment() -> Task:
    return load_task("sentiment")


@pytest.mark.network
def test_minilm_is_the_real_model_and_loads_plainly() -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    path = Path(resolve_model("minilm"))
    digest = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert sha256_of(path / "model.safetensors") == digest
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path).eval()
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "The sky is overcast."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = float(pooled[0] @ pooled[1]), float(pooled[0] @ pooled[2])
    assert near > 0.6 > 0.3 > far  # it is trained, not random


@pytest.mark.network
def test_sentiment_has_the_published_counts() -> None:
    directory = fetch("sentiment")
    for domain in DOMAINS:
        ratings = [rating for _, rating, _ in rated_sentences(directory, domain)]
        assert COUNTS[domain] == (
            len(ratings),
            sum(r > 0.5 for r in ratings),
            sum(r < -0.5 for r in ratings),
            sum(r > 0 for r in ratings),
            sum(r < 0 for r in ratings),
        )
        assert -4 <= min(ratings) < max(ratings) <= 4


@pytest.mark.network
def test_sentiment_splits_every_labelled_sentence_once(sentiment: Task) -> None:
    assert sentiment.label_names == ("negative", "positive")
    assert list(sentiment.domains) == ["tweets", "movie", "amazon", "nyt"]
    for domain, splits in sentiment.domains.items():
        assert splits.train is not None
        assert splits.validation is not None
        assert splits.test is not None
        labels = Counter(
            label for part in (splits.train, splits.validation, splits.test) for label in
            part["label"]
        )  # fmt: skip
        _, positive, negative, _, _ = COUNTS[domain]
        assert labels == {1: positive, 0: negative}
        total = positive + negative
        assert len(splits.train) / total == pytest.approx(0.7, abs=0.01)
        assert len(splits.validation) / total == pytest.approx(0.1, abs=0.01)
        assert len(splits.test) / total == pytest.approx(0.2, abs=0.01)
        # no part is sorted by class (the movie file is), and all have the shares of the whole
        for part in (splits.train, splits.validation, splits.test, splits.train.select(range(300))):
            assert sum(part["label"]) / len(part) == pytest.approx(positive / total, abs=0.09)


@pytest.mark.network
def test_sentiment_documents_and_texts_stay_in_one_split(sentiment: Task) -> None:
    directory = fetch("sentiment")
    for domain, splits in sentiment.domains.items():
        where: dict[str, set[str]] = {}
        for name in ("train", "validation", "test"):
            for text in getattr(splits, name)["text"]:
                where.setdefault(text, set()).add(name)
        assert all(len(names) == 1 for names in where.values())
        if domain not in ("amazon", "nyt"):
            continue
        homes: dict[str, set[str]] = {}
        for key, rating, text in rated_sentences(directory, domain):
            # a neutral sentence is in no split, even if its words are (rated otherwise elsewhere)
            found = where[text] if abs(rating) > 0.5 else set()
            homes.setdefault(key.split("_")[0], set()).update(found)
        assert len(homes) == {"amazon": 300, "nyt": 498}[domain]
        assert all(len(names) <= 1 for names in homes.values())


@pytest.mark.network
def test_sentiment_is_the_same_in_another_process(sentiment: Task) -> None:
    code = (
        "from moduli.data import load_task\n"
        "t = load_task('sentiment', domains=('nyt', 'amazon'), max_train=50, max_test=20)\n"
        "import json; print(json.dumps({d: [list(s.train['text']), list(s.test['text'])]"
        " for d, s in t.domains.items()}))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "5"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    there = json.loads(done.stdout)
    assert list(there) == ["nyt", "amazon"]
    for domain, (train, test) in there.items():
        splits = sentiment.domains[domain]
        assert splits.train is not None
        assert splits.test is not None
        assert train == list(splits.train["text"][:50])
        assert test == list(splits.test["text"][:20])


@pytest.mark.network
def test_sentiment_refuses_options_it_has_no_use_for() -> None:
    with pytest.raises(ConfigError, match="text_column"):
        load_task("sentiment", text_column="sentence")
    with pytest.raises(DataError, match="Did you mean 'amazon'"):
        load_task("sentiment", domains=["amazons"])


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_answers_and_saves_like_any_model(tmp_path: Path) -> None:
    """It loads where gguf is not installed and no GGUF quantiser is left on it."""
    path = resolve_model("smollm2")
    config = json.loads((Path(path) / "config.json").read_text())
    assert "quantization_config" not in config
    assert not list(Path(path).glob("*.gguf"))
    code = """
import sys
sys.modules["gguf"] = None  # importing it fails, as where it is not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
assert model.dtype == torch.bfloat16
chat = [{"role": "user", "content": "What is the capital of France?"}]
batch = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
with torch.no_grad():
    made = model.generate(**batch, max_new_tokens=12, do_sample=False)
answer = tokenizer.decode(made[0, batch["input_ids"].shape[1]:], skip_special_tokens=True)
assert answer.strip() == "The capital of France is Paris.", answer
model.save_pretrained(out)
again = AutoModelForCausalLM.from_pretrained(out).state_dict()
assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, path, str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.network
def test_converting_smollm2_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = fetch("smollm2"), fetch("smollm2", cache=tmp_path)
    names = sorted(p.name for p in first.iterdir())
    assert sorted(p.name for p in second.iterdir()) == names
    assert {n: sha256_of(first / n) for n in names} == {n: sha256_of(second / n) for n in names}
